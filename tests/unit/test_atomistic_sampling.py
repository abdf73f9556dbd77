"""Sampling: seeds, resume after kills, blow-ups, and the distribution it draws from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mdtraj as md
import numpy as np
import openmm
import pytest
from openmm import app

from openmm_hvpcg.atomistic import pool
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.sampling import sample_frames, spread_frames
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, SamplingSettings
from openmm_hvpcg.errors import StudyError, UnstableSimulationError
from openmm_hvpcg.frames import Frames, FramesStore
from openmm_hvpcg.units import compute_kt

DATA = Path(__file__).resolve().parents[2] / "data"

SETTINGS = SamplingSettings(n_frames=61, stride=20, walkers=2, equilibration_steps=200, platform="Reference", seed=7)

#: Runs the sampling of SETTINGS with other lengths, in a process that can be killed.
SCRIPT = """
import sys
from pathlib import Path
from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, SamplingSettings
source = InputSettings(system_xml="dialanine.xml", pdb="dialanine.pdb")
molecule = build_atomistic_system(source, temperature_K=300.0, base=Path(sys.argv[1]))
settings = SamplingSettings.model_validate_json(sys.argv[3])
sample_frames(molecule, settings, sys.argv[2], progress=False, checkpoint_seconds=0.05)
"""


@pytest.fixture(scope="module")
def molecule() -> AtomisticSystem:
    settings = InputSettings(system_xml="dialanine.xml", pdb="dialanine.pdb")
    return build_atomistic_system(settings, temperature_K=300.0, base=DATA)


def run(molecule: AtomisticSystem, path: Path, settings: SamplingSettings = SETTINGS, every: float = 5.0) -> Frames:
    return sample_frames(molecule, settings, path, progress=False, checkpoint_seconds=every).read()


@pytest.fixture(scope="module")
def reference(molecule: AtomisticSystem, tmp_path_factory: pytest.TempPathFactory) -> Frames:
    return run(molecule, tmp_path_factory.mktemp("reference") / "f.zarr")


def test_frames_and_walkers(reference: Frames, molecule: AtomisticSystem) -> None:
    assert reference.positions.dtype == np.float32
    assert reference.interval_ps == pytest.approx(0.04)
    np.testing.assert_array_equal(np.bincount(reference.walker), [31, 30])
    assert reference.box is None
    # Centroids at the origin: float32 of a molecule of 1 nm is good to 1e-7 nm.
    assert np.abs(reference.positions.mean(axis=1)).max() < 1e-6
    a, b = reference.split_walkers()
    assert not np.array_equal(a[0], b[0])  # walkers have velocities of their own
    bonds = np.array(
        [[i.index, j.index] for i, j in molecule.topology.bonds if "H" in (i.element.symbol, j.element.symbol)]
    )
    lengths = np.linalg.norm(np.diff(reference.positions[:, bonds], axis=2), axis=-1)
    # Constrained to a relative 1e-5 (OpenMM's default), 1e-6 nm; float32 positions add 2e-7.
    assert lengths.std(axis=0).max() < 3e-6


def test_same_seed_same_frames_whatever_the_checkpoints(
    molecule: AtomisticSystem, reference: Frames, tmp_path: Path
) -> None:
    np.testing.assert_array_equal(run(molecule, tmp_path / "f.zarr", every=0.0).positions, reference.positions)
    assert [p.name for p in tmp_path.iterdir()] == ["f.zarr"]  # checkpoints are gone


def test_other_seed_other_frames(molecule: AtomisticSystem, reference: Frames, tmp_path: Path) -> None:
    other = run(molecule, tmp_path / "f.zarr", SETTINGS.model_copy(update={"seed": 8}))
    assert not np.array_equal(other.positions[0], reference.positions[0])


def _wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _count_done(path: Path) -> int:
    if not path.exists():
        return 0
    store = FramesStore.open(path)
    return sum(store.count_done(w) for w in range(len(store.counts)))


@pytest.mark.parametrize("moment", ["equilibration", "frames"])
def test_sigkill_and_resume_equals_the_uninterrupted_run(
    molecule: AtomisticSystem, tmp_path: Path, moment: str
) -> None:
    sizes = {"n_frames": 40, "stride": 20, "equilibration_steps": 8000}
    if moment == "frames":
        sizes = {"n_frames": 240, "stride": 60, "equilibration_steps": 100}
    settings = SETTINGS.model_copy(update=sizes)
    path, checkpoints = tmp_path / "killed.zarr", tmp_path / "killed.checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(DATA), str(path), settings.model_dump_json()],
        start_new_session=True,
    )
    try:
        least = 1 if moment == "frames" else 0
        _wait_for(lambda: len(list(checkpoints.glob("*.chk"))) == 2 and _count_done(path) >= least, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done = _count_done(path)
        assert done < settings.n_frames
        assert (done > 0) == (moment == "frames")
        _wait_until_gone(process.pid)  # the walkers end with the process that started them
    finally:
        process.kill()
        process.wait()
    resumed = run(molecule, path, settings)
    whole = run(molecule, tmp_path / "whole.zarr", settings)
    np.testing.assert_array_equal(resumed.positions, whole.positions)
    assert not checkpoints.exists()


def _wait_until_gone(group: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("walkers outlived the process that started them")


def test_crash_between_frames_and_checkpoint(
    molecule: AtomisticSystem, reference: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    true_write = pool.write_checkpoint

    def write(path: Path, checkpoint: object) -> None:
        calls.append(path)
        if len(calls) > 25:
            raise KeyboardInterrupt
        true_write(path, checkpoint)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pool, "write_checkpoint", write)
        with pytest.raises(KeyboardInterrupt):
            run(molecule, tmp_path / "f.zarr", every=0.0)
    assert 0 < _count_done(tmp_path / "f.zarr") < 61
    np.testing.assert_array_equal(run(molecule, tmp_path / "f.zarr").positions, reference.positions)


def _stop_early(molecule: AtomisticSystem, path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """When each walker has frames: on a busy machine one may begin when the other is far ahead."""
    appended = []
    true_append = FramesStore.append

    def append(self: FramesStore, walker: int, *arguments: object) -> None:
        if len(appended) >= 20 and len(set(appended)) == 2:
            raise KeyboardInterrupt
        appended.append(walker)
        true_append(self, walker, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(FramesStore, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run(molecule, path, every=0.0)
    return _count_done(path)


@pytest.mark.parametrize("trouble", ["other platform", "damaged", "lost", "refused"])
def test_without_its_checkpoint_it_goes_on_from_the_last_frame(
    molecule: AtomisticSystem,
    reference: Frames,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    path = tmp_path / "f.zarr"
    done = _stop_early(molecule, path, monkeypatch)
    assert 0 < done < 61
    settings = SETTINGS
    for file in (tmp_path / "f.checkpoints").glob("*.chk"):
        if trouble == "damaged":
            file.write_bytes(file.read_bytes()[:-7])
        elif trouble == "lost":
            file.unlink()
        elif trouble == "refused":  # sound as a file, but not a state that OpenMM loads
            checkpoint = pool.read_checkpoint(file)
            assert checkpoint is not None
            state = b"not a state" + checkpoint.state
            pool.write_checkpoint(
                file, pool.Checkpoint(checkpoint.frame, checkpoint.equilibrated, checkpoint.platform, state)
            )
    if trouble == "other platform":
        settings = SETTINGS.model_copy(update={"platform": "CPU"})
    frames = run(molecule, path, settings)
    assert "with fresh velocities" in caplog.text
    kept = [
        int((reference.positions[reference.walker == w] == p).all(axis=(1, 2)).sum())
        for w, p in enumerate(frames.split_walkers())
    ]
    assert sum(kept) == done  # finished frames are untouched, the others are new
    # It went on from the last frame: within one interval (0.04 ps) an atom moves far less than 0.15 nm.
    for positions in frames.split_walkers():
        moved = np.linalg.norm(np.diff(positions, axis=0), axis=-1)
        assert moved.max() < 0.15


def test_auto_goes_on_with_the_platform_it_began_on(
    molecule: AtomisticSystem, reference: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.zarr"
    _stop_early(molecule, path, monkeypatch)
    frames = run(molecule, path, SETTINGS.model_copy(update={"platform": "auto"}))
    np.testing.assert_array_equal(frames.positions, reference.positions)


def test_finished_store_is_left_alone_and_other_settings_are_refused(molecule: AtomisticSystem, tmp_path: Path) -> None:
    path = tmp_path / "f.zarr"
    first = run(molecule, path)
    started = time.monotonic()
    np.testing.assert_array_equal(run(molecule, path).positions, first.positions)
    assert time.monotonic() - started < 1.0  # nothing is run: opening a process alone would take about that
    with pytest.raises(StudyError, match=r"n_frames was 61, now 62"):
        run(molecule, path, SETTINGS.model_copy(update={"n_frames": 62}))
    vacuum = build_atomistic_system(
        InputSettings(pdb="dialanine.pdb", solvent="vacuum"), temperature_K=310.0, base=DATA
    )
    with pytest.raises(StudyError, match=r"the System was another; temperature_K was 300\.0, now 310\.0"):
        run(vacuum, path)
    with pytest.raises(StudyError, match=r"the topology was another \(32 atoms, now 22\)"):
        run(build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0), path)


def test_blow_up_names_the_walker_and_keeps_frames(tmp_path: Path) -> None:
    molecule = build_atomistic_system(
        InputSettings(pdb="dialanine.pdb"), temperature_K=300.0, constraints="none", base=DATA
    )
    # Stretching of bonds to hydrogen has a period of 10 fs: any step above 3 fs diverges.
    settings = SETTINGS.model_copy(update={"timestep_fs": 8.0, "equilibration_steps": 0, "stride": 1})
    with pytest.raises(UnstableSimulationError, match=r"walker [01] blew up, (last good frame|before its first)"):
        run(molecule, tmp_path / "f.zarr", settings)
    store = FramesStore.open(tmp_path / "f.zarr")
    assert not store.is_complete


def _oscillators(n: int, force_constant: float) -> AtomisticSystem:
    topology, omm, system = md.Topology(), app.Topology(), openmm.System()
    chain, omm_chain = topology.add_chain(), omm.addChain()
    force = openmm.CustomExternalForce(f"{force_constant / 2}*(x^2+y^2+(z-1)^2)")
    for i in range(n):
        topology.add_atom("C", md.element.carbon, topology.add_residue("X", chain))
        omm.addAtom("C", app.element.carbon, omm.addResidue("X", omm_chain))
        system.addParticle(12.0)
        force.addParticle(i, [])
    system.addForce(force)
    return AtomisticSystem(topology, omm, system, np.zeros((n, 3)), 300.0, {})


def test_equipartition_and_places_in_space(tmp_path: Path) -> None:
    force_constant = 1000.0
    molecule = _oscillators(20, force_constant)
    settings = SamplingSettings(
        n_frames=600, stride=200, equilibration_steps=1000, friction_per_ps=10.0, platform="Reference", seed=3
    )
    frames = run(molecule, tmp_path / "f.zarr", settings)
    # An external force holds the particles in space: they are stored where they are.
    offsets = frames.positions.astype(np.float64) - [0.0, 0.0, 1.0]
    terms = 0.5 * force_constant * offsets**2
    # The mean of 36000 terms is kT/2; a term has relative variance 2. Frames are 0.4 ps apart, after which
    # the correlation of x^2 is exp(-friction t) = 0.02: independent. LangevinMiddle's positions are exact for
    # harmonic forces at any step. False alarm at 4.5 sigma: 7e-6.
    sigma = np.sqrt(2.0 / terms.size)
    assert terms.mean() / (0.5 * compute_kt(300.0)) == pytest.approx(1.0, abs=4.5 * sigma)
    # The mean position: variance kT/k over as many draws (correlation of x itself 0.14 at most, 1.3 times).
    error = np.sqrt(1.3 * compute_kt(300.0) / force_constant / (frames.n_frames * 20))
    assert np.abs(offsets.mean(axis=(0, 1))).max() < 4.8 * error  # three components: 5e-6


def test_periodic_frames_are_whole(tmp_path: Path) -> None:
    molecule = build_atomistic_system(
        InputSettings(sequence="G", solvent="explicit", padding_nm=0.65), temperature_K=300.0
    )
    settings = SamplingSettings(n_frames=4, stride=5, walkers=1, equilibration_steps=5, platform="CPU", seed=1)
    frames = run(molecule, tmp_path / "f.zarr", settings)
    assert frames.box is not None
    assert molecule.box is not None
    np.testing.assert_allclose(frames.box[0], molecule.box, atol=1e-6)
    pairs = np.array([[a.index, b.index] for a, b in molecule.topology.bonds])
    lengths = np.linalg.norm(np.diff(frames.positions[:, pairs], axis=2), axis=-1)
    assert lengths.max() < 0.2  # no bond crosses the box, which is 2 nm wide
    solute = [a.index for a in molecule.topology.atoms if a.residue.name != "HOH"]
    centroid = frames.positions[:, solute].mean(axis=1)
    np.testing.assert_allclose(centroid, frames.box.sum(axis=1) / 2, atol=1e-5)


def test_spread_frames() -> None:
    assert spread_frames(10, 4) == [3, 3, 2, 2]
    assert spread_frames(3, 3) == [1, 1, 1]
