"""Existing trajectories instead of sampling."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmm_hvpcg.atomistic import trajectory_files
from openmm_hvpcg.atomistic.frame_choice import BeadTraces, FrameChoice, measure_beads, share_evenly
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.atomistic.trajectories import import_trajectory
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError, StudyError
from openmm_hvpcg.frames import FramesStore
from openmm_hvpcg.mapping import build_bead_map

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


@pytest.mark.parametrize("ending", ["xtc", "dcd", "trr", "nc", "h5", "pdb"])
def test_formats(molecule: AtomisticSystem, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_files, "CHUNK_FRAMES", 4)
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
    monkeypatch.setattr(trajectory_files, "CHUNK_FRAMES", 4)
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


# --- files that are cut off, joined in the wrong order, or of atoms in another order ---


def take(molecule: AtomisticSystem, files: list[Path], target: Path, **choice: Any) -> FramesStore:
    return import_trajectory(
        molecule, files, target, interval_ps=2.0, temperature_K=300.0, choice=FrameChoice(**choice)
    )


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("dcd", r"ends within frame 12.*mdconvert"),
        ("xtc", r"cut off or damaged at frame 12 "),
        ("trr", r"cut off or damaged at frame 12 "),
        ("nc", r"cannot be read"),
        ("h5", r"cannot be read"),
    ],
)
def test_a_last_frame_that_is_cut_off(
    molecule: AtomisticSystem, tmp_path: Path, ending: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_files, "CHUNK_FRAMES", 5)
    good = write(tmp_path / "a.dcd", molecule.topology, shake(molecule, 3, 0))
    file = write(tmp_path / f"t.{ending}", molecule.topology, shake(molecule, 13, 1))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match=rf"t\.{ending}: .*{message}") as caught:
        take(molecule, [good, file], tmp_path / "f.zarr")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.zarr*"))


def test_dcd_with_boxes_and_of_a_killed_program(dimer: AtomisticSystem, tmp_path: Path) -> None:
    trajectory = md.Trajectory(np.repeat(dimer.positions[None], 5, axis=0), dimer.topology)
    trajectory.unitcell_vectors = np.repeat(3.0 * np.eye(3)[None], 5, axis=0)
    trajectory.save(str(tmp_path / "t.dcd"))
    whole = (tmp_path / "t.dcd").read_bytes()
    frame = 56 + 3 * (8 + 4 * 6)
    for n_cut, n_frames in ((0, 5), (frame, 4)):
        (tmp_path / "t.dcd").write_bytes(whole[: len(whole) - n_cut])
        assert take(dimer, [tmp_path / "t.dcd"], tmp_path / f"{n_frames}.zarr").counts == [n_frames]
    for n_cut, message in ((frame - 1, "within frame 4"), (4 * frame + 1, "within frame 0")):
        (tmp_path / "t.dcd").write_bytes(whole[: len(whole) - n_cut])
        with pytest.raises(InputError, match=message):
            take(dimer, [tmp_path / "t.dcd"], tmp_path / "cut.zarr")


def test_parts_joined_in_the_wrong_order(molecule: AtomisticSystem, tmp_path: Path) -> None:
    trajectory = md.Trajectory(shake(molecule, 6, 0), molecule.topology, time=[6, 8, 10, 0, 2, 4])
    trajectory.save(str(tmp_path / "t.xtc"))
    arguments: dict[str, Any] = {"temperature_K": 300.0}
    with pytest.raises(InputError, match=r"t\.xtc: times do not rise from frame 2 to frame 3.*10 ps, then 0 ps"):
        import_trajectory(molecule, [tmp_path / "t.xtc"], tmp_path / "f.zarr", interval_ps=None, **arguments)
    assert take(molecule, [tmp_path / "t.xtc"], tmp_path / "f.zarr").counts == [6]


def test_one_file_given_twice(molecule: AtomisticSystem, tmp_path: Path) -> None:
    file = write(tmp_path / "a.dcd", molecule.topology, shake(molecule, 3, 0))
    copy = tmp_path / "b.dcd"
    copy.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"b\.dcd: the same frames are in .*a\.dcd"):
        take(molecule, [file, copy], tmp_path / "f.zarr")


def test_atoms_in_another_order(molecule: AtomisticSystem, dimer: AtomisticSystem, tmp_path: Path) -> None:
    positions = shake(molecule, 9, 0)
    positions[7, [3, 20]] = positions[7, [20, 3]]
    file = write(tmp_path / "t.dcd", molecule.topology, positions)
    with pytest.raises(InputError, match=r"t\.dcd: frame 7 is of other atoms.*nm between"):
        take(molecule, [file], tmp_path / "f.zarr")
    trajectory = md.Trajectory(dimer.positions[None, [0, 3, 2, 1, 4, 5]], dimer.topology)
    trajectory.unitcell_vectors = 3.0 * np.eye(3)[None]
    trajectory.save(str(tmp_path / "p.dcd"))
    with pytest.raises(InputError, match=r"p\.dcd: frame 0 is of other atoms.*nm between"):
        take(dimer, [tmp_path / "p.dcd"], tmp_path / "f.zarr")


# --- which frames are taken ---


def read_sources(store: FramesStore) -> np.ndarray:
    return np.asarray(store._group["source_frame"])


def test_stride_and_number(molecule: AtomisticSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_files, "CHUNK_FRAMES", 4)
    positions = [shake(molecule, n, n) for n in (23, 11)]
    files = [write(tmp_path / f"{len(p)}.dcd", molecule.topology, p) for p in positions]
    for stride, most, want in ((3, None, 3), (1, 12, 3), (2, 12, 4), (2, 2, 24), (1, 99, 1)):
        store = take(molecule, files, tmp_path / f"{stride}{most}.zarr", stride=stride, n_frames=most)
        frames = store.read()
        rows = [np.arange(0, n, want) for n in (23, 11)]
        assert most is None or frames.n_frames <= most
        np.testing.assert_array_equal(read_sources(store), np.concatenate(rows))
        assert frames.interval_ps == 2.0 * want
        expected = np.concatenate([p[r] for p, r in zip(positions, rows, strict=True)])
        np.testing.assert_allclose(frames.positions, expected - expected.mean(axis=1, keepdims=True), atol=2e-6)
    with pytest.raises(InputError, match="trajectory_frames is too small: expected a frame for each of 2 files, got 1"):
        take(molecule, files, tmp_path / "f.zarr", n_frames=1)
    with pytest.raises(StudyError, match="chosen in another way"):
        take(molecule, files, tmp_path / "3None.zarr", stride=2)


def test_a_store_of_before_there_was_a_choice(molecule: AtomisticSystem, tmp_path: Path) -> None:
    file = write(tmp_path / "a.dcd", molecule.topology, shake(molecule, 5, 0))
    take(molecule, [file], tmp_path / "f.zarr")
    header = json.loads((tmp_path / "f.zarr" / "zarr.json").read_text())
    for key in ("choice", "chosen"):
        del header["attributes"]["provenance"][key]
    (tmp_path / "f.zarr" / "zarr.json").write_text(json.dumps(header))
    assert take(molecule, [file], tmp_path / "f.zarr").counts == [5]
    with pytest.raises(StudyError, match="chosen in another way"):
        take(molecule, [file], tmp_path / "f.zarr", stride=5)


N_RARE, N_COMMON = 60, 2940


@pytest.fixture(scope="module")
def two_states(molecule: AtomisticSystem, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of a chain that bends at random and, in one stretch of the second, 2 % of all, is mirrored."""
    folder = tmp_path_factory.mktemp("states")
    rng = np.random.default_rng(0)
    positions = molecule.positions + rng.normal(scale=0.004, size=(N_RARE + N_COMMON, molecule.n_atoms, 3))
    # A slow bend common to both states, and a twist of its middle out of the plane in one.
    t = np.arange(len(positions))
    rare = (t >= 2000) & (t < 2000 + N_RARE)
    x = molecule.positions[:, 0] - molecule.positions[:, 0].mean()
    shape = (x / np.abs(x).max()) ** 3
    positions[:, :, 2] += np.where(rare, 0.3, -0.3)[:, None] * shape
    positions[:, :, 1] += 0.1 * np.sin(t / 40)[:, None] * (x / np.abs(x).max()) ** 2
    return [
        write(folder / f"{k}.dcd", molecule.topology, part)
        for k, part in enumerate((positions[:1500], positions[1500:]))
    ]


def test_clusters_cover_what_is_rare(molecule: AtomisticSystem, two_states: list[Path], tmp_path: Path) -> None:
    bead_map = build_bead_map("heavy", molecule.topology)
    choice: dict[str, Any] = {"n_frames": 300, "kind": "cluster", "seed": 1, "bead_map": bead_map}
    store = take(molecule, two_states, tmp_path / "a.zarr", **choice)
    frames = store.read()
    assert frames.n_frames == 300
    sources = read_sources(store)
    walker = frames.walker
    for w in (0, 1):
        assert (np.diff(sources[walker == w]) > 0).all()
    n_rare = int(((walker == 1) & (sources >= 500) & (sources < 500 + N_RARE)).sum())
    # In time they would be 6 of 300 (2 %); k-means on a slow mode puts far more centres on a state than its share.
    assert n_rare >= 18
    record = store.attributes["provenance"]
    assert record["choice"]["kind"] == "cluster"
    assert record["chosen"]["of"] == [1500, 1500]
    assert sum(record["chosen"]["taken"]) == 300
    assert "TICA" in record["chosen"]["coordinates"]
    assert "not distributed as the ensemble" in record["chosen"]["weights"]
    again = take(molecule, two_states, tmp_path / "b.zarr", **choice)
    np.testing.assert_array_equal(read_sources(again), sources)
    other = take(molecule, two_states, tmp_path / "c.zarr", **{**choice, "seed": 2})
    assert not np.array_equal(read_sources(other), sources)
    with pytest.raises(StudyError, match="chosen in another way"):
        take(molecule, two_states, tmp_path / "a.zarr", **{**choice, "seed": 2})


def test_candidates_are_thinned_evenly(molecule: AtomisticSystem, two_states: list[Path]) -> None:
    traces = BeadTraces(molecule, build_bead_map("heavy", molecule.topology), 3, 2, most=200)
    first = 0
    for chunk in md.iterload(str(two_states[0]), top=molecule.topology, chunk=70):
        traces.add(0, chunk, first)
        first += chunk.n_frames
    frames, features = traces.finish()
    assert traces.every == 12
    np.testing.assert_array_equal(frames[0], np.arange(0, 1500, 12))
    assert features[0].shape == (125, 12 * 11 // 2 + 2 * 9)
    assert len(frames[1]) == 0


def test_mirror_images_differ() -> None:
    rng = np.random.default_rng(0)
    beads = rng.normal(size=(4, 6, 3))
    features, mirrored = measure_beads(beads), measure_beads(beads * [1, 1, -1])
    np.testing.assert_allclose(mirrored[:, :18], features[:, :18], atol=1e-6)
    np.testing.assert_allclose(mirrored[:, 18:], -features[:, 18:], atol=1e-6)  # sines
    trajectory = md.Trajectory(beads, None)
    angles = md.compute_dihedrals(trajectory, [[k, k + 1, k + 2, k + 3] for k in range(3)])
    np.testing.assert_allclose(features[:, 15:], np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=1e-5)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 200))
def test_shares_are_as_equal_as_can_be(counts: list[int], total: int) -> None:
    quotas = share_evenly(np.array(counts), total)
    assert quotas.sum() == min(total, sum(counts))
    assert (quotas <= counts).all()
    # Whoever got less than another by more than one had no more.
    assert all(q == c for q, c in zip(quotas, counts, strict=True) if q < quotas.max() - 1)


def test_one_bead_has_no_slow_coordinate(molecule: AtomisticSystem, two_states: list[Path], tmp_path: Path) -> None:
    bead_map = build_bead_map("name CA and resid 1", molecule.topology)
    with pytest.raises(InputError, match="needs distances of beads: expected two or more beads, got 1"):
        take(molecule, two_states, tmp_path / "a.zarr", n_frames=9, kind="cluster", bead_map=bead_map)


# --- memory ---

IMPORT = """
import resource, sys
import mdtraj, numpy, openmm
from openmm_hvpcg.atomistic.frame_choice import FrameChoice
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.trajectories import import_trajectory
from openmm_hvpcg.mapping import build_bead_map
kind, n_atoms, target, *files = sys.argv[1:]
topology, system = openmm.app.Topology(), openmm.System()
chain = topology.addChain()
for _ in range(int(n_atoms)):
    topology.addAtom("CA", openmm.app.element.carbon, topology.addResidue("GLY", chain))
    system.addParticle(12.0)
zeros = numpy.zeros((int(n_atoms), 3))
system = AtomisticSystem(mdtraj.Topology.from_openmm(topology), topology, system, zeros, 300.0, {})
choice = FrameChoice(2, 100, kind, 0, build_bead_map("resid < 20", system.topology))
for k, file in enumerate(files):
    import_trajectory(system, [file], target + str(k), interval_ps=1.0, temperature_K=300.0, choice=choice)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.parametrize("kind", ["time", "cluster"])
def test_memory_stays_far_below_the_file(tmp_path: Path, kind: str) -> None:
    """A file of 200 MB takes hardly more than one of 10 MB, the importing process counted whole."""
    n_atoms, rng = 2500, np.random.default_rng(0)
    for name, n_frames in (("short.dcd", 350), ("long.dcd", 7000)):
        with md.formats.DCDTrajectoryFile(str(tmp_path / name), "w") as handle:
            for _ in range(n_frames // 350):
                handle.write(rng.normal(size=(350, n_atoms, 3)).astype(np.float32))
    size_mb = (tmp_path / "long.dcd").stat().st_size / 2**20
    assert size_mb > 190
    files = [str(tmp_path / name) for name in ("short.dcd", "long.dcd")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, kind, str(n_atoms), str(tmp_path / "f"), *files],
        capture_output=True,
        text=True,
        check=True,
    )
    short_mb, long_mb = (float(v) for v in done.stdout.split())
    # What a short import takes is mostly libraries. The allowance is for the allocator, and by cluster the features of
    # 3500 frames (a few MB); loaded whole the file would add all its size.
    assert long_mb - short_mb < size_mb / 4
    assert FramesStore.open(tmp_path / "f1").read().n_frames == 100
    (tmp_path / "long.dcd").unlink()
