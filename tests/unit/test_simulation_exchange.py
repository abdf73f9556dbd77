"""Replica exchange: what it writes, that it goes on after a kill, what it counts, what it refuses."""

from __future__ import annotations

from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
from simulation_cases import build_dimer, build_frames, build_potential

from openmm_hvpcg.config import SimulationSettings
from openmm_hvpcg.errors import InputError, StudyError, UnstableSimulationError
from openmm_hvpcg.simulation import load_ladder, load_result, load_run, simulate
from openmm_hvpcg.simulation.exchange import SwapRecord, TemperatureLadder
from openmm_hvpcg.simulation.outputs import CHECKPOINT_NAME

EXCHANGE = {"hottest_K": 500.0, "temperatures": 3, "every": 5}


def build_settings(**changes: object) -> SimulationSettings:
    shared = {"exchange": EXCHANGE, "n_steps": 200, "save_every": 10, "platform": "Reference", "timestep_fs": 2.0}
    return SimulationSettings.model_validate({**shared, **changes})


def test_output_of_an_exchange(tmp_path: Path) -> None:
    """One continuous trajectory a replica; each frame has every temperature once; the energies fit the frames."""
    k, r0 = 2000.0, 0.3
    start = np.array([[[0.0, 0.0, 0.0], [r0, 0.0, 0.0]]])
    result = simulate(build_dimer(k, r0), start, build_settings(), tmp_path, progress=False)
    assert (result.replicas, result.n_steps, result.n_frames, result.temperature_K) == (3, 200, 20, 300.0)
    assert result.simulated_ns == pytest.approx(200 * 3 * 2e-6)
    assert result == load_result(tmp_path)
    ladder = load_ladder(tmp_path)
    assert ladder is not None
    np.testing.assert_allclose(ladder.temperatures_K, [300.0, 300.0 * np.sqrt(5 / 3), 500.0])
    np.testing.assert_array_equal(np.sort(ladder.states, axis=0), np.repeat([[0], [1], [2]], 20, axis=1))
    frames = load_run(tmp_path, md.load_topology(tmp_path / "topology.pdb"))
    lengths = np.linalg.norm(frames.positions[:, 1] - frames.positions[:, 0], axis=1)
    # DCD keeps float32 Angstrom: 1e-8 nm in 0.3, times a force of some 100 kJ/mol/nm, beside the log's 1e-4.
    np.testing.assert_allclose(ladder.energies.ravel(), 0.5 * k * (lengths - r0) ** 2, atol=2e-4)
    assert result.exchange is not None
    assert result.exchange["n_swaps"] == 40
    assert all(0 < p <= 1 for p in result.exchange["acceptance"])


def test_no_exchange_has_no_ladder(tmp_path: Path) -> None:
    settings = build_settings(exchange=None, replicas=2)
    result = simulate(build_potential(), build_frames(2), settings, tmp_path, progress=False)
    assert result.exchange is None
    assert load_ladder(tmp_path) is None


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> str:
        simulate(build_potential(), build_frames(3), build_settings(seed=seed), tmp_path / name, progress=False)
        return (tmp_path / name / "energies.csv").read_text()

    assert run("a", 0) == run("b", 0) != run("c", 1)


def test_killed_exchange_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    potential, frames, settings = build_potential(), build_frames(3), build_settings()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = simulate(potential, frames, settings, whole, progress=False)
    advance, count = TemperatureLadder.advance, iter(range(10**6))

    def advance_until_killed(self: TemperatureLadder, n_steps: int) -> object:
        if next(count) == 23:
            raise KeyboardInterrupt
        return advance(self, n_steps)

    monkeypatch.setattr(TemperatureLadder, "advance", advance_until_killed)
    with pytest.raises(KeyboardInterrupt):
        simulate(potential, frames, settings, killed, progress=False, checkpoint_interval_s=0.0)
    monkeypatch.undo()
    assert (killed / CHECKPOINT_NAME).exists()
    resumed = simulate(potential, frames, settings, killed, progress=False)
    assert resumed.exchange == reference.exchange
    assert (killed / "energies.csv").read_text() == (whole / "energies.csv").read_text()
    for name in reference.trajectories:
        # The header of a DCD file holds the time of day.
        got, expected = (md.load(str(folder / name), top=whole / "topology.pdb") for folder in (killed, whole))
        np.testing.assert_array_equal(got.xyz, expected.xyz)


def test_other_exchange_is_refused(tmp_path: Path) -> None:
    potential, frames = build_potential(), build_frames(3)
    simulate(potential, frames, build_settings(), tmp_path, progress=False)
    other = build_settings(exchange={**EXCHANGE, "hottest_K": 600.0})
    with pytest.raises(StudyError, match="another exchange"):
        simulate(potential, frames, other, tmp_path, progress=False)
    with pytest.raises(InputError, match=r"hottest_K above 500, got 500"):
        simulate(potential, frames, build_settings(), tmp_path / "hot", temperature_K=500.0, progress=False)


def test_blow_up_names_the_replica(tmp_path: Path) -> None:
    start = np.array([[[0.0, 0, 0], [0.36, 0, 0]]])
    settings = build_settings(timestep_fs=6.0, n_steps=400)  # omega dt = 1.5: a stretched stiff spring cannot hold
    with pytest.raises(UnstableSimulationError, match=r"replica \d blew up by step \d+"):
        simulate(build_dimer(4.0e5), start, settings, tmp_path, progress=False)
    assert not load_result(tmp_path).stable


def test_rare_swaps_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Replicas that start cold in a stiff molecule: 300 and 1900 K share no energies once they are warm."""
    settings = build_settings(exchange={"hottest_K": 1900.0, "temperatures": 2, "every": 10}, n_steps=3000)
    result = simulate(build_potential(), build_frames(2), settings, tmp_path, progress=False)
    assert result.exchange is not None
    assert result.exchange["acceptance"][0] < 0.1
    assert "replicas at 300 and 1900 K would swap on" in caplog.text


def test_acceptance_of_a_harmonic_system_against_quadrature() -> None:
    """Energies of d harmonic degrees of freedom follow Gamma(d / 2, kT): the mean of min(1, exp(...)) is an integral.

    20,000 draws of numbers in [0, 1] have a mean with a standard error below 0.0036; five of it: one in 2e6 changes of
    the seed.
    """
    from scipy.stats import gamma

    rng, betas, half = np.random.default_rng(3), np.array([0.40, 0.25]), 3.0
    record = SwapRecord.start(2)
    for energies in rng.gamma(half, 1 / betas, size=(20000, 2)):
        flip = int(rng.integers(2))
        record.add(np.array([flip, 1 - flip]), energies if not flip else energies[::-1], betas)
    e = np.linspace(1e-3, 120.0, 1500)
    cold, hot = (gamma.pdf(e, half, scale=1 / b) for b in betas)
    p = np.minimum(1.0, np.exp((e[:, None] - e[None, :]) * (betas[0] - betas[1])))
    expected = (cold[:, None] * hot[None, :] * p).sum() / (cold.sum() * hot.sum())
    assert record.acceptance[0] == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(20000))


def test_round_trips_are_counted() -> None:
    """Replica 0 walks 0 1 2 1 0 1 2 0: twice up and down. Replica 1 begins at the top: a way down is no round trip."""
    record = SwapRecord.start(3)
    walks = ([0, 1, 2, 1, 0, 1, 2, 0], [2, 2, 1, 0, 1, 0, 0, 1], [1, 0, 0, 2, 2, 2, 1, 2])
    trips = []
    for states in zip(*walks, strict=True):
        record.add(np.array(states), np.zeros(3), np.array([3.0, 2.0, 1.0]))
        trips.append(record.round_trips)
    assert trips == [0, 0, 0, 0, 1, 1, 1, 2]
    np.testing.assert_array_equal(record.acceptance, [1.0, 1.0])
