"""Constants against an independent source."""

from __future__ import annotations

import openmm.unit as u
import pytest
from scipy import constants

from openmm_hvpcg.units import BOLTZMANN, NS_PER_PS, PS_PER_FS, SECONDS_PER_DAY, UNITS, compute_kt


def test_boltzmann_constant() -> None:
    # Both factors are exact by definition of the SI; only double rounding remains.
    assert pytest.approx(constants.R / 1000, rel=1e-14) == BOLTZMANN


def test_kt_agrees_with_openmm() -> None:
    expected = u.MOLAR_GAS_CONSTANT_R * 300 * u.kelvin
    # OpenMM holds the constant to the same digits.
    assert compute_kt(300.0) == pytest.approx(expected.value_in_unit(u.kilojoule_per_mole), rel=1e-9)


def test_conversions() -> None:
    assert (4 * u.femtosecond).value_in_unit(u.picosecond) == pytest.approx(4 * PS_PER_FS, rel=1e-15)
    assert (7 * u.picosecond).value_in_unit(u.nanosecond) == pytest.approx(7 * NS_PER_PS, rel=1e-15)
    assert SECONDS_PER_DAY == 24 * 60 * 60


def test_units_on_disk_never_change() -> None:
    assert UNITS == {"length": "nm", "time": "ps", "energy": "kJ/mol", "mass": "amu", "temperature": "K"}
