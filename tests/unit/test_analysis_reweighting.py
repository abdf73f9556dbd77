"""Weights of frames of many temperatures, against harmonic systems, whose energies follow Gamma(d / 2, kT)."""

from __future__ import annotations

import numpy as np
import pytest

from openmm_hvpcg.analysis.reweighting import compute_weights, count_effective
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.units import compute_kt

TEMPERATURES = np.array([300.0, 340.0, 390.0, 450.0])


def draw(n_degrees: int, n_frames: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Energies (n,) kJ/mol, around an offset as potentials have it, and states (n,)."""
    rng = np.random.default_rng(seed)
    kt = np.array([compute_kt(t) for t in TEMPERATURES])
    states = np.repeat(np.arange(4), n_frames)
    return rng.gamma(n_degrees / 2, kt[states]) - 5.0e4, states


@pytest.mark.parametrize("temperature", [300.0, 320.0, 450.0])
@pytest.mark.parametrize("n_degrees", [4, 60, 600])
def test_energies_of_harmonic_systems(n_degrees: int, temperature: float) -> None:
    """Mean energy d/2 kT from 40 independent draws of 4 x 500 frames, at sampled temperatures and between them.

    The mean of the draws lies within 4.5 of its standard errors, which by Student's law with 39 degrees of freedom one
    change of the seeds in 16,000 exceeds (nine cases: in 1,800). Neighbours of 600 degrees overlap by a few per cent:
    with so few frames a ratio of sums is biased by a fraction of its error.
    """
    means, plain = [], []
    for seed in range(40):
        energies, states = draw(n_degrees, [500, 500, 500, 500], seed)
        weights = compute_weights(energies, states, TEMPERATURES, temperature)
        assert weights.sum() == pytest.approx(1.0, abs=1e-12)
        means.append((weights * energies).sum() + 5.0e4)
        plain.append(energies[states == 0].mean() + 5.0e4)
    expected = 0.5 * n_degrees * compute_kt(temperature)
    error = np.std(means, ddof=1) / np.sqrt(40)
    assert abs(np.mean(means) - expected) < 4.5 * error
    if temperature == 300.0 and n_degrees == 4:
        # What all this is for: three hotter states make the figure better than the frames of 300 K alone. The ratio
        # of two standard deviations of 40 draws scatters by 16 %; the true one is below 0.8.
        assert np.std(means) < np.std(plain)


def test_frames_of_one_temperature_count_alike() -> None:
    energies, states = draw(6, [0, 700, 0, 0], 1)
    weights = compute_weights(energies, states, TEMPERATURES, TEMPERATURES[1])
    np.testing.assert_allclose(weights, 1 / 700, rtol=1e-9)
    assert count_effective(weights) == pytest.approx(700)
    assert count_effective(compute_weights(energies, states, TEMPERATURES, 200.0)) < 600


def test_uneven_and_missing_states() -> None:
    """The equations that define the weights hold: the frames of all states make up each state's distribution."""
    energies, states = draw(30, [50, 0, 900, 13], 2)
    counts, kt = np.bincount(states), np.array([compute_kt(t) for t in TEMPERATURES])
    weights = np.array([compute_weights(energies, states, TEMPERATURES, t) for t in TEMPERATURES])
    np.testing.assert_allclose((counts[:, None] * weights).sum(axis=0), 1.0, rtol=1e-6)
    # And they are Boltzmann factors of one another.
    logs = np.log(weights) + energies / kt[:, None]
    np.testing.assert_allclose(np.ptp(logs - logs[:1], axis=1), 0.0, atol=1e-6)


@pytest.mark.parametrize(("energies", "states"), [([], []), ([1.0], [4]), ([1.0, 2.0], [0]), ([1.0], [-1])])
def test_refused(energies: list[float], states: list[int]) -> None:
    with pytest.raises(InputError, match="do not fit"):
        compute_weights(np.array(energies), np.array(states, dtype=np.int64), TEMPERATURES, 300.0)
