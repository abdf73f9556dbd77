"""Existing trajectories instead of sampling."""

from __future__ import annotations

import logging
from pathlib import Path

import mdtraj as md
import numpy as np
import openmm
import pytest

from openmm_hvpcg.atomistic import trajectories
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.atomistic.trajectories import import_trajectory
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError, StudyError

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture(scope="module")
def molecule() -> AtomisticSystem:
    settings = InputSettings(system_xml="dialanine.xml", pdb="dialanine.pdb")
    return build_atomistic_system(settings, temperature_K=300.0, base=DATA)


def shake(molecule: AtomisticSystem, n_frames: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return molecule.positions + rng.normal(scale=0.01, size=(n_frames, molecule.n_atoms, 3)) + 1.0


def write(path: Path, topology: md.Topology, positions: np.ndarray, interval_ps: float = 2.0) -> Path:
    md.Trajectory(positions, topology, time=np.arange(len(positions)) * interval_ps).save(str(path))
    return path


@pytest.mark.parametrize("ending", ["xtc", "dcd", "trr", "nc", "pdb"])
def test_formats(molecule: AtomisticSystem, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "CHUNK_FRAMES", 4)
    counts, files, positions = (7, 10), [], []
    for i, n in enumerate(counts):
        positions.append(shake(molecule, n, i))
        files.append(write(tmp_path / f"{i}.{ending}", molecule.topology, positions[-1]))
    store = import_trajectory(molecule, files, tmp_path / "f.zarr", interval_ps=None, temperature_K=310.0)
    frames = store.read()
    assert frames.temperature_K == 310.0
    assert frames.box is None
    np.testing.assert_array_equal(frames.walker, np.repeat([0, 1], counts))
    # dcd and pdb hold no times; xtc, trr and nc do.
    assert frames.interval_ps == (1.0 if ending in ("dcd", "pdb") else 2.0)
    expected = np.concatenate(positions)
    expected -= expected.mean(axis=1, keepdims=True)
    # xtc and pdb keep 1e-3 nm and 1e-4 nm; the others float32, in angstrom or nm, at 2 nm from the origin.
    tolerance = {"xtc": 1.1e-3, "pdb": 1.1e-4}.get(ending, 2e-6)
    np.testing.assert_allclose(frames.positions, expected, atol=tolerance)
    assert len(store.attributes["provenance"]["trajectories"]) == 2


def test_given_interval_wins_and_a_guess_is_told(
    molecule: AtomisticSystem, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.dcd", molecule.topology, shake(molecule, 3, 0))
    import_trajectory(molecule, [file], tmp_path / "a.zarr", interval_ps=None, temperature_K=300.0)
    assert "1 ps between frames is assumed" in caplog.text
    store = import_trajectory(molecule, [file], tmp_path / "b.zarr", interval_ps=5.0, temperature_K=300.0)
    assert store.read().interval_ps == 5.0


def test_again_is_a_no_op_and_other_files_are_refused(molecule: AtomisticSystem, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.xtc", molecule.topology, shake(molecule, 5, i)) for i in range(2)]
    target = tmp_path / "f.zarr"
    import_trajectory(molecule, files[:1], target, interval_ps=None, temperature_K=300.0)
    before = target.stat().st_mtime_ns
    import_trajectory(molecule, files[:1], target, interval_ps=None, temperature_K=300.0)
    assert target.stat().st_mtime_ns == before
    with pytest.raises(StudyError, match="other trajectories"):
        import_trajectory(molecule, files, target, interval_ps=None, temperature_K=300.0)


@pytest.fixture(scope="module")
def dimer() -> AtomisticSystem:
    """Two three-atom molecules in a periodic cube."""
    topology, omm = md.Topology(), openmm.app.Topology()
    system, force = openmm.System(), openmm.NonbondedForce()
    chain, omm_chain = topology.add_chain(), omm.addChain()
    carbon = openmm.app.element.carbon
    for _ in range(2):
        residue, omm_residue = topology.add_residue("MOL", chain), omm.addResidue("MOL", omm_chain)
        atoms = [topology.add_atom(f"C{i}", md.element.carbon, residue) for i in range(3)]
        omm_atoms = [omm.addAtom(f"C{i}", carbon, omm_residue) for i in range(3)]
        for i in (0, 1):
            topology.add_bond(atoms[i], atoms[i + 1])
            omm.addBond(omm_atoms[i], omm_atoms[i + 1])
    for _ in range(6):
        system.addParticle(12.0)
        force.addParticle(0.0, 0.3, 0.1)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors([3, 0, 0], [0, 3, 0], [0, 0, 3])
    positions = np.array([[0.1 * i, 0, 0] for i in range(3)] + [[0.1 * i, 0.5, 0] for i in range(3)])
    return AtomisticSystem(topology, omm, system, positions, 300.0, {})


def test_molecules_are_made_whole(dimer: AtomisticSystem, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = dimer.positions + rng.normal(scale=0.01, size=(9, 6, 3))
    moved = whole + rng.uniform(-3, 3, size=(9, 1, 3))
    broken = moved + 3.0 * rng.integers(-1, 2, size=(9, 6, 3))  # every atom in a cell of its own
    trajectory = md.Trajectory(broken, dimer.topology)
    trajectory.unitcell_vectors = np.repeat(3.0 * np.eye(3)[None], 9, axis=0)
    trajectory.save(str(tmp_path / "t.dcd"))
    store = import_trajectory(dimer, [tmp_path / "t.dcd"], tmp_path / "f.zarr", interval_ps=1.0, temperature_K=300.0)
    frames = store.read()
    assert frames.box is not None
    np.testing.assert_allclose(frames.box, np.repeat(3.0 * np.eye(3)[None], 9, axis=0), atol=1e-6)
    relative = frames.positions - frames.positions[:, :1]
    # float32 in angstrom at up to 6 nm: 4e-6 nm each way.
    np.testing.assert_allclose(relative, whole - whole[:, :1], atol=2e-5)


def test_periodic_system_needs_a_box(dimer: AtomisticSystem, tmp_path: Path) -> None:
    file = write(tmp_path / "t.dcd", dimer.topology, dimer.positions[None])
    with pytest.raises(InputError, match="no periodic box"):
        import_trajectory(dimer, [file], tmp_path / "f.zarr", interval_ps=1.0, temperature_K=300.0)


@pytest.mark.parametrize("ending", ["dcd", "xtc", "trr", "nc", "pdb"])
def test_other_number_of_atoms(molecule: AtomisticSystem, tmp_path: Path, ending: str) -> None:
    fewer = molecule.topology.subset(range(20))
    file = write(tmp_path / f"t.{ending}", fewer, shake(molecule, 3, 0)[:, :20])
    with pytest.raises(InputError, match=rf"t\.{ending}: .*expected 32 atoms \(topology\), got 20"):
        import_trajectory(molecule, [file], tmp_path / "f.zarr", interval_ps=1.0, temperature_K=300.0)


def test_nan_in_the_second_file(molecule: AtomisticSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "CHUNK_FRAMES", 4)
    good = write(tmp_path / "good.dcd", molecule.topology, shake(molecule, 3, 0))
    positions = shake(molecule, 9, 1)
    positions[6, 5, 1] = np.nan
    bad = write(tmp_path / "bad.dcd", molecule.topology, positions)
    with pytest.raises(InputError, match=r"bad\.dcd: .*NaN.*frame 6"):
        import_trajectory(molecule, [good, bad], tmp_path / "f.zarr", interval_ps=1.0, temperature_K=300.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.dcd", "good.dcd"]  # nothing was written


@pytest.mark.parametrize("name", ["t.dcd", "t.xtc", "t.h5", "t.nc", "t.pdb", "t.what"])
@pytest.mark.parametrize("content", [b"", b"not a trajectory at all, only words\n" * 20])
def test_unreadable_files(molecule: AtomisticSystem, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        import_trajectory(molecule, [tmp_path / name], tmp_path / "f.zarr", interval_ps=1.0, temperature_K=300.0)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_missing_files_and_different_intervals(molecule: AtomisticSystem, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such trajectory"):
        import_trajectory(molecule, [tmp_path / "t.xtc"], tmp_path / "f.zarr", interval_ps=None, temperature_K=300.0)
    files = [
        write(tmp_path / f"{i}.xtc", molecule.topology, shake(molecule, 5, i), interval_ps=1.0 + i) for i in range(2)
    ]
    with pytest.raises(InputError, match="different intervals"):
        import_trajectory(molecule, files, tmp_path / "f.zarr", interval_ps=None, temperature_K=300.0)


def test_uneven_times_are_told(molecule: AtomisticSystem, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trajectory = md.Trajectory(shake(molecule, 4, 0), molecule.topology, time=[0, 2, 4, 9])
    trajectory.save(str(tmp_path / "t.xtc"))
    with caplog.at_level(logging.WARNING):
        import_trajectory(molecule, [tmp_path / "t.xtc"], tmp_path / "f.zarr", interval_ps=None, temperature_K=300.0)
    assert "not evenly spaced, first after frame 2" in caplog.text
