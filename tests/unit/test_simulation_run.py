"""simulate: right physics, resumes after a real kill, refuses mixes, stops when it blows up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
from simulation_cases import (
    BONDS,
    TEMPERATURE,
    build_dimer,
    build_frames,
    build_molecule,
    build_potential,
    build_priors,
    save_example,
)

from openmm_hvpcg.config import SimulationSettings
from openmm_hvpcg.errors import BackendError, InputError, StudyError, UnstableSimulationError
from openmm_hvpcg.simulation.results import load_result
from openmm_hvpcg.simulation.run import choose_starts, simulate
from openmm_hvpcg.simulation.stability import build_limits, compute_temperatures
from openmm_hvpcg.units import compute_kt


def build_settings(**changes: object) -> SimulationSettings:
    defaults = {"replicas": 2, "n_steps": 60, "save_every": 10, "platform": "Reference", "timestep_fs": 2.0}
    return SimulationSettings.model_validate({**defaults, **changes})


def load_log(folder: Path) -> np.ndarray:
    return np.atleast_1d(np.genfromtxt(folder / "energies.csv", delimiter=",", names=True))


def test_harmonic_dimer_against_theory(tmp_path: Path) -> None:
    """Bond lengths, their second moment and the energy of a thermal spring, and its kinetic temperature.

    Replicas are independent, so their 48 averages give the error of the mean. Three figures, each within
    4.5 of its standard errors: by Student's law with 47 degrees of freedom 5e-5 each, a false alarm in
    some 7000 changes of the noise.
    The time step (omega dt = 0.07) shifts the velocities by 0.1 %, a tenth of the error.
    """
    k, r0, replicas = 2000.0, 0.3, 48
    settings = build_settings(
        replicas=replicas, n_steps=3000, save_every=50, timestep_fs=4.0, friction_per_ps=10.0, seed=12
    )
    start = np.array([[[0.0, 0.0, 0.0], [r0, 0.0, 0.0]]])
    potential = build_dimer(k, r0)
    result = simulate(potential, start, settings, tmp_path / "dimer", progress=False)
    assert result.stable
    lengths = np.array(
        [
            np.linalg.norm(
                np.diff(md.load(str(tmp_path / "dimer" / name), top=tmp_path / "dimer/topology.pdb").xyz, axis=1),
                axis=-1,
            )[:, 0]
            for name in result.trajectories
        ]
    )[:, 10:]  # 2 ps: twenty times 1/friction
    log = load_log(tmp_path / "dimer")[10:]
    temperatures = np.array([log[f"temperature_K_{i:03d}"] for i in range(replicas)])
    r = np.linspace(0.15, 0.45, 20001)
    weight = r**2 * np.exp(-0.5 * k * (r - r0) ** 2 / compute_kt(TEMPERATURE))
    weight /= weight.sum()
    for observed, expected in (
        (lengths, (weight * r).sum()),
        ((lengths - r0) ** 2, (weight * (r - r0) ** 2).sum()),
        (temperatures, TEMPERATURE),
    ):
        means = observed.mean(axis=1)
        assert abs(means.mean() - expected) < 4.5 * means.std(ddof=1) / np.sqrt(replicas)
    # The logged energy is that of all springs at the logged frames; DCD keeps float32 Angstrom.
    energies = (0.5 * k * (lengths - r0) ** 2).sum(axis=0)
    np.testing.assert_allclose(log["potential_energy_kJ_per_mol"], energies, rtol=1e-3)


@pytest.mark.parametrize("trajectory_format", ["dcd", "xtc"])
def test_output_of_a_run(tmp_path: Path, trajectory_format: str) -> None:
    settings = build_settings(n_steps=65, trajectory_format=trajectory_format)
    potential = build_potential()
    result = simulate(potential, build_frames(4), settings, tmp_path, progress=False)
    assert (result.n_steps, result.n_frames, result.stable) == (65, 6, True)
    assert result.simulated_ns == pytest.approx(65 * 2 * 2e-6)
    assert result.ns_per_day == pytest.approx(result.simulated_ns / result.wall_time_s * 86400)
    assert result.backend == "torchforce"
    assert result == load_result(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["topology.pdb", "energies.csv", "run.json", "result.json", *result.trajectories]
    )
    for name in result.trajectories:
        trajectory = md.load(str(tmp_path / name), top=tmp_path / "topology.pdb")
        assert trajectory.xyz.shape == (6, 6, 3)
        # XTC keeps 0.001 nm; six beads' rounding can shift the centroid by half of it.
        assert np.abs(trajectory.xyz.mean(axis=1)).max() < 1e-3
        np.testing.assert_allclose(
            trajectory.time if trajectory_format == "xtc" else 0.02 * np.arange(1, 7),
            0.02 * np.arange(1, 7),
            rtol=1e-5,
        )
    log = load_log(tmp_path)
    assert log["step"].tolist() == [10, 20, 30, 40, 50, 60]
    np.testing.assert_allclose(
        log["temperature_K"], (log["temperature_K_000"] + log["temperature_K_001"]) / 2, atol=0.011
    )


def test_topology_shows_the_bonds(tmp_path: Path) -> None:
    """Residues have standard names here: writers of PDB leave their bonds out unless made to."""
    simulate(build_potential(), build_frames(1), build_settings(n_steps=10), tmp_path, progress=False)
    text = (tmp_path / "topology.pdb").read_text()
    found = sorted([int(line[6:11]) - 1, int(line[11:16]) - 1] for line in text.splitlines() if "CONECT" in line)
    assert found == sorted(BONDS)
    loaded = md.load_topology(tmp_path / "topology.pdb")
    assert sorted(sorted((a.index, b.index)) for a, b in loaded.bonds) == sorted(BONDS)


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> np.ndarray:
        simulate(build_potential(), build_frames(4), build_settings(seed=seed), tmp_path / name, progress=False)
        return load_log(tmp_path / name)["potential_energy_kJ_per_mol"]

    first, again, other = run("a", 0), run("b", 0), run("c", 1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_replicas_start_from_evenly_spaced_frames() -> None:
    frames = np.arange(8.0)[:, None, None] * np.ones((8, 2, 3))
    assert choose_starts(frames, 2, 4)[:, 0, 0].tolist() == [1, 3, 5, 7]
    assert choose_starts(frames[:2], 2, 4)[:, 0, 0].tolist() == [0, 0, 1, 1]


WORKER = """
import sys
import numpy as np
from openmm_hvpcg.config import SimulationSettings
from openmm_hvpcg.simulation.run import simulate
settings = SimulationSettings.model_validate_json(sys.argv[3])
simulate(sys.argv[1], np.load(sys.argv[2]), settings, sys.argv[4], progress=False, checkpoint_interval_s=0.1)
"""


@pytest.mark.parametrize("trajectory_format", ["dcd", "xtc"])
def test_killed_run_resumes_bit_for_bit(tmp_path: Path, trajectory_format: str) -> None:
    """SIGKILL in the middle of writing; the resumed files equal those of a run that was never killed."""
    potential = save_example(tmp_path / "potential.pt")
    frames = build_frames(4)
    np.save(tmp_path / "frames.npy", frames)
    settings = build_settings(n_steps=1000, save_every=4, trajectory_format=trajectory_format)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [str(potential), str(tmp_path / "frames.npy"), settings.model_dump_json(), str(killed)]
    worker = subprocess.Popen([sys.executable, "-c", WORKER, *arguments])
    try:
        deadline = time.monotonic() + 60
        while not (killed / "checkpoint.npz").exists():
            assert worker.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint within a minute"
            time.sleep(0.02)
        time.sleep(0.1)
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    assert not (killed / "result.json").exists()
    # What a kill between frame and checkpoint leaves: a frame cut short, a log line too many.
    first = killed / f"replica_000.{trajectory_format}"
    first.write_bytes(first.read_bytes() + b"\x00" * 37)
    with open(killed / "energies.csv", "a") as handle:
        handle.write("99999,1,2")
    result = simulate(potential, frames, settings, killed, progress=False)
    reference = simulate(potential, frames, settings, whole, progress=False)
    assert result.n_frames == reference.n_frames == 250
    for name in reference.trajectories:
        got, expected = (md.load(str(f / name), top=whole / "topology.pdb") for f in (killed, whole))
        np.testing.assert_array_equal(got.xyz, expected.xyz)
    assert (killed / "energies.csv").read_text() == (whole / "energies.csv").read_text()
    assert not (killed / "checkpoint.npz").exists()


def test_finished_run_is_returned_and_other_settings_are_refused(tmp_path: Path) -> None:
    potential, frames, settings = build_potential(), build_frames(4), build_settings()
    first = simulate(potential, frames, settings, tmp_path, progress=False)
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    assert simulate(potential, frames, settings, tmp_path, progress=False) == first
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(StudyError, match=r"another friction_per_ps, seed: expected friction_per_ps 1\.0, seed 4"):
        simulate(potential, frames, build_settings(seed=5, friction_per_ps=2), tmp_path, progress=False)
    with pytest.raises(StudyError, match="another potential"):
        simulate(build_potential(priors=build_priors(1600.0)), frames, settings, tmp_path, progress=False)
    with pytest.raises(StudyError, match="another initial positions"):
        simulate(potential, frames + 1.0, settings, tmp_path, progress=False)
    with pytest.raises(StudyError, match="another temperature_K"):
        simulate(potential, frames, settings, tmp_path, temperature_K=310.0, progress=False)
    assert load_result(tmp_path) == first


def test_folder_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "energies.csv").write_text("mine\n")
    with pytest.raises(StudyError, match=r"energies\.csv of an unknown run"):
        simulate(build_potential(), build_frames(2), build_settings(), tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["energies.csv"]
    assert (tmp_path / "energies.csv").read_text() == "mine\n"


@pytest.mark.parametrize("content", ["", "[1, 2]", "{}", '{"study": 3}'])
def test_damaged_description_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StudyError, match=r"run\.json: not a description"):
        simulate(build_potential(), build_frames(2), build_settings(), tmp_path, progress=False)


@pytest.mark.parametrize("damage", ["checkpoint", "trajectory"])
def test_damaged_checkpoint_is_an_error(tmp_path: Path, damage: str) -> None:
    potential, frames, settings = build_potential(), build_frames(2), build_settings()
    simulate(potential, frames, settings, tmp_path, progress=False)
    (tmp_path / "result.json").unlink()
    sizes = {"replica_000.dcd": 10**6}
    from openmm_hvpcg.simulation.outputs import Checkpoint, save_checkpoint

    save_checkpoint(tmp_path, Checkpoint(b"abc", 10, 1, sizes, 1.0))
    if damage == "checkpoint":
        (tmp_path / "checkpoint.npz").write_bytes(b"PK not really")
    with pytest.raises(StudyError, match="damaged" if damage == "checkpoint" else "shorter than the checkpoint"):
        simulate(potential, frames, settings, tmp_path, progress=False)


def test_blow_up_names_step_and_replica_and_keeps_good_frames(tmp_path: Path) -> None:
    """Replica 1 starts from a bond stretched to where a stiff spring and a long step cannot hold it."""
    k, r0 = 4.0e5, 0.3
    starts = np.array([[[0.0, 0, 0], [r0, 0, 0]], [[0.0, 0, 0], [1.2 * r0, 0, 0]]])
    settings = build_settings(n_steps=400, save_every=1, timestep_fs=6.0)  # omega dt = 1.5 for 12 and 40 amu
    soft = simulate(build_dimer(2000.0, r0), starts, settings, tmp_path / "soft", progress=False)
    assert soft.stable
    with pytest.raises(UnstableSimulationError, match=r"replica 1 blew up by step \d+: .*Frames up to step") as caught:
        simulate(build_dimer(k, r0), starts, settings, tmp_path / "stiff", progress=False)
    result = load_result(tmp_path / "stiff")
    assert not result.stable
    assert result.message in str(caught.value)
    assert result.n_frames == result.n_steps < 400
    for name in result.trajectories:
        frames = md.load(str(tmp_path / "stiff" / name), top=tmp_path / "stiff" / "topology.pdb")
        assert len(frames) == result.n_frames
        assert np.isfinite(frames.xyz).all()
    # Asked again, it says the same without running.
    with pytest.raises(UnstableSimulationError, match="replica 1 blew up"):
        simulate(build_dimer(k, r0), starts, settings, tmp_path / "stiff", progress=False)


def test_explosion_to_infinity_is_caught(tmp_path: Path) -> None:
    settings = build_settings(n_steps=2000, save_every=2000, timestep_fs=50.0)
    with pytest.raises(UnstableSimulationError, match=r"replica \d blew up by step \d+"):
        simulate(build_dimer(1e7), np.array([[[0.0, 0, 0], [0.3, 0, 0]]]), settings, tmp_path, progress=False)
    assert not load_result(tmp_path).stable
    assert json.loads((tmp_path / "result.json").read_text())["n_frames"] == 0


def test_limits_leave_room_for_few_beads() -> None:
    """A kinetic temperature above the limit has probability at most 1e-12: none of 1e6 draws may reach it."""
    rng = np.random.default_rng(3)
    for n_beads in (1, 2, 20):
        masses = np.full(n_beads, 12.0)
        limits = build_limits(np.zeros((1, n_beads, 3)), np.zeros((0, 2), dtype=np.int64), TEMPERATURE)
        velocities = rng.normal(size=(50000, n_beads, 3)) * np.sqrt(compute_kt(TEMPERATURE) / 12.0)
        temperatures = compute_temperatures(velocities, masses)
        # The mean of 50000 draws of a law with relative width <= 0.82 has an error of 0.4 %: 5 sigma.
        assert temperatures.mean() == pytest.approx(TEMPERATURE, rel=0.02)
        assert temperatures.max() < limits.temperature_K
        assert limits.bond_nm is None


def test_temperature_differing_from_training_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    simulate(
        build_potential(),
        build_frames(1),
        build_settings(n_steps=10),
        tmp_path,
        temperature_K=350,
        progress=False,
    )
    assert "350 K with a potential trained at 300 K" in caplog.text


def test_platform_auto_is_measured_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    result = simulate(
        build_potential(),
        build_frames(1),
        build_settings(n_steps=10, platform="auto"),
        tmp_path,
        progress=False,
    )
    measured = json.loads((tmp_path / "run.json").read_text())["measured_steps_per_second"]
    assert result.platform == max(measured, key=measured.get)
    assert {"Reference", "CPU"} <= set(measured)
    assert "steps/s" in caplog.text


def test_refused_input(tmp_path: Path) -> None:
    potential, settings = build_potential(), build_settings()
    with pytest.raises(InputError, match="initial positions"):
        simulate(potential, np.zeros((2, 7, 3)), settings, tmp_path / "a", progress=False)
    with pytest.raises(InputError, match="NaN"):
        simulate(potential, np.full((2, 6, 3), np.nan), settings, tmp_path / "a", progress=False)
    with pytest.raises(BackendError, match="expected one of Reference"):
        simulate(potential, build_frames(2), build_settings(platform="Quantum"), tmp_path / "a", progress=False)
    with pytest.raises(StudyError, match="no finished simulation"):
        load_result(tmp_path / "a")


def test_another_molecule_and_python_backend(tmp_path: Path) -> None:
    molecule = build_molecule("ABC", [[0, 1], [1, 2]])
    settings = build_settings(backend="pythonforce", priors="torch")
    frames = build_frames(3, molecule)
    result = simulate(build_potential(), frames, settings, tmp_path, topology=molecule, progress=False)
    assert (result.backend, result.n_frames) == ("pythonforce", 6)
    assert md.load(str(tmp_path / "replica_001.dcd"), top=tmp_path / "topology.pdb").n_atoms == 3
