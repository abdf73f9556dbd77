"""Has a replica blown up? Judged for each replica by its bond lengths and its kinetic temperature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from openmm_hvpcg.units import BOLTZMANN

#: A replica is too hot above this many times the bath's temperature ...
HOT_FACTOR = 10.0
#: ... and, for molecules of a few beads whose kinetic temperature fluctuates widely, above the value that a
#: healthy replica exceeds with this probability (kinetic energies follow a chi-square law).
HOT_FALSE_ALARM = 1e-12
#: A bond is torn above this many times the longest bond of the start frames.
STRETCH_FACTOR = 5.0


@dataclass(frozen=True)
class StabilityLimits:
    """What a healthy replica stays below: kinetic temperature K, bond length nm (None without bonds)."""

    temperature_K: float
    bond_nm: float | None


def build_limits(starts: NDArray[np.float64], bonds: NDArray[np.int64], temperature_K: float) -> StabilityLimits:
    """Limits for replicas that start from ``starts`` (K, B, 3) nm."""
    n_degrees = 3 * starts.shape[1]
    factor = max(HOT_FACTOR, float(chdtri(n_degrees, HOT_FALSE_ALARM)) / n_degrees)
    longest = STRETCH_FACTOR * float(_bond_lengths(starts, bonds).max()) if len(bonds) else None
    return StabilityLimits(factor * temperature_K, longest)


def compute_temperatures(velocities: NDArray[np.float64], masses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kinetic temperature (K,) of each replica, K; velocities (K, B, 3) nm/ps, masses (B,) amu."""
    kinetic = 0.5 * (masses[:, None] * velocities**2).sum(axis=(1, 2))
    return kinetic / (1.5 * len(masses) * BOLTZMANN)


def find_blow_up(
    positions: NDArray[np.float64],
    temperatures: NDArray[np.float64],
    energy: float,
    bonds: NDArray[np.int64],
    limits: StabilityLimits,
) -> tuple[int | None, str] | None:
    """The replica that blew up (None where only the shared energy tells) and what was seen, or None."""
    for k in np.flatnonzero(~np.isfinite(positions).all(axis=(1, 2)) | ~np.isfinite(temperatures)):
        return int(k), "positions or velocities are not finite"
    hottest = int(np.argmax(temperatures))
    if temperatures[hottest] > limits.temperature_K:
        return (
            hottest,
            f"kinetic temperature {temperatures[hottest]:.4g} K is above {limits.temperature_K:.4g} K",
        )
    if limits.bond_nm is not None:
        lengths = _bond_lengths(positions, bonds)
        k, bond = np.unravel_index(int(np.argmax(lengths)), lengths.shape)
        if lengths[k, bond] > limits.bond_nm:
            i, j = bonds[bond]
            return int(k), f"bond {i}-{j} is {lengths[k, bond]:.4g} nm long, above {limits.bond_nm:.4g} nm"
    if not np.isfinite(energy):
        return None, "the potential energy is not finite"
    return None


def _bond_lengths(positions: NDArray[np.float64], bonds: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.linalg.norm(positions[:, bonds[:, 0]] - positions[:, bonds[:, 1]], axis=-1)
