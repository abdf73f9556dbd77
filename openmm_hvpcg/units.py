"""Units and the few constants of the package.

Inside the package: nm, ps, kJ/mol, amu, K. A float whose name carries no unit is in one of these; any
other unit is in the name (``timestep_fs``).
"""

from __future__ import annotations

#: Boltzmann constant times Avogadro's number, kJ/(mol K); CODATA 2018, exact.
BOLTZMANN = 0.00831446261815324

#: The units of every array on disk, written into each file and checked when it is read.
UNITS = {"length": "nm", "time": "ps", "energy": "kJ/mol", "mass": "amu", "temperature": "K"}

PS_PER_FS = 1.0e-3
NS_PER_PS = 1.0e-3
SECONDS_PER_DAY = 86400.0


def compute_kt(temperature_K: float) -> float:
    """Thermal energy kT in kJ/mol at ``temperature_K`` (K)."""
    return BOLTZMANN * temperature_K
