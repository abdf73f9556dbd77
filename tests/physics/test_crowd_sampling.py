"""Walkers in one System: the ensemble of each alone, resumable, written as walkers in processes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import pytest
from openmm import app

import openmm_hvpcg.atomistic.crowd_sampling as crowd_sampling
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, SamplingSettings
from openmm_hvpcg.errors import InputError, UnstableSimulationError
from openmm_hvpcg.frames import load_frames
from openmm_hvpcg.units import compute_kt

TEMPERATURE_K = 300.0
SPRING, LENGTH_NM = 5000.0, 0.3


def make_dumbbell() -> AtomisticSystem:
    """Two atoms and a spring."""
    topology = app.Topology()
    residue = topology.addResidue("DUM", topology.addChain())
    system = openmm.System()
    for name in ("A", "B"):
        topology.addAtom(name, app.element.carbon, residue)
        system.addParticle(12.0)
    bonds = openmm.HarmonicBondForce()
    bonds.addBond(0, 1, LENGTH_NM, SPRING)
    system.addForce(bonds)
    positions = np.array([[0.0, 0.0, 0.0], [LENGTH_NM, 0.0, 0.0]])
    return AtomisticSystem(
        md.Topology.from_openmm(topology), topology, system, positions, TEMPERATURE_K, {}, "dumbbell"
    )


def make_settings(**changes: Any) -> SamplingSettings:
    base = {"n_frames": 6400, "walkers": 32, "stride": 25, "timestep_fs": 4.0, "equilibration_steps": 500}
    together = {"walkers_in": "one_system", "platform": "Reference", "seed": 3}
    return SamplingSettings(**{**base, **together, **changes})


def test_bond_lengths_are_boltzmann_distributed(tmp_path: Path) -> None:
    """Mean and variance of r with weight r^2 exp(-k (r - r0)^2 / 2kT), by quadrature; 32 walkers, seeded."""
    store = sample_frames(make_dumbbell(), make_settings(), tmp_path / "frames.zarr", progress=False)
    frames = store.read()
    assert (frames.n_frames, frames.interval_ps) == (6400, pytest.approx(0.1))
    np.testing.assert_array_equal(frames.walker, np.repeat(np.arange(32), 200))
    np.testing.assert_allclose(frames.positions.mean(axis=1), 0.0, atol=1e-6)
    r = np.linalg.norm(frames.positions[:, 1].astype(float) - frames.positions[:, 0], axis=-1).reshape(32, 200)
    grid = np.linspace(0.1, 0.5, 4001)
    weight = grid**2 * np.exp(-SPRING * (grid - LENGTH_NM) ** 2 / (2 * compute_kt(TEMPERATURE_K)))
    mean = np.average(grid, weights=weight)
    for observable, exact in ((r, mean), ((r - mean) ** 2, np.average((grid - mean) ** 2, weights=weight))):
        each = observable.mean(axis=1)
        # Independent walkers: their scatter is the error. 4 standard errors: a false alarm in 2000, for one fixed seed.
        # The integrator's own error at omega dt = 0.1 is (0.1)^2 / 12 of the variance at most, a tenth of that.
        assert abs(each.mean() - exact) < 4 * each.std(ddof=1) / np.sqrt(len(each))


def test_killed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    molecule = build_atomistic_system(InputSettings(sequence="G"), temperature_K=300.0, name="gly")
    settings = make_settings(n_frames=25, walkers=3, stride=10, timestep_fs=2.0, equilibration_steps=40)
    whole = sample_frames(molecule, settings, tmp_path / "whole.zarr", progress=False).read()
    advance, calls = crowd_sampling.CrowdRun._advance, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return advance(*arguments)

    monkeypatch.setattr(crowd_sampling.CrowdRun, "_advance", interrupted)
    path = tmp_path / "killed.zarr"
    with pytest.raises(KeyboardInterrupt):
        sample_frames(molecule, settings, path, progress=False, checkpoint_seconds=0.0)
    monkeypatch.undo()
    assert (tmp_path / "killed.checkpoints" / "crowd.chk").exists()
    # Left to itself it would now use processes: a run goes on in the way it began.
    resumed = sample_frames(molecule, settings.model_copy(update={"walkers_in": "auto"}), path, progress=False).read()
    np.testing.assert_array_equal(resumed.positions, whole.positions)
    assert not (tmp_path / "killed.checkpoints").exists()
    assert np.bincount(whole.walker).tolist() == [9, 8, 8]
    assert np.abs(whole.positions[0] - whole.positions[9]).max() > 1e-3


def test_blow_up_keeps_frames(tmp_path: Path) -> None:
    settings = make_settings(n_frames=4000, walkers=2, timestep_fs=10.0, stride=2, equilibration_steps=0)
    system = make_dumbbell()
    system.system.getForce(0).setBondParameters(0, 0, 1, LENGTH_NM, 5e6)
    with pytest.raises(UnstableSimulationError, match=r"blew up before its first frame.*Finished frames are kept"):
        sample_frames(system, settings, tmp_path / "frames.zarr", progress=False)


def test_what_cannot_share_a_system_says_so_or_uses_processes(tmp_path: Path) -> None:
    system = make_dumbbell()
    system.system.addForce(openmm.CustomBondForce("r^2"))
    small = {"n_frames": 4, "walkers": 2, "stride": 1, "equilibration_steps": 0}
    with pytest.raises(InputError, match=r"one_system cannot be \(CustomBondForce"):
        sample_frames(system, make_settings(**small), tmp_path / "a.zarr", progress=False)
    sample_frames(system, make_settings(**small, walkers_in="auto"), tmp_path / "b.zarr", progress=False)
    assert load_frames(tmp_path / "b.zarr").n_frames == 4
