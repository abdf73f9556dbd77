"""Frames in memory, on disk, and exported: exact, whole, or refused."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openmm_hvpcg.errors import DataError, InputError, StorageError
from openmm_hvpcg.frames import Frames, FramesStore, load_frames, topology_from_json, topology_to_json
from openmm_hvpcg.units import UNITS

Usage = namedtuple("Usage", "total used free")


def build_topology() -> md.Topology:
    """Two chains: a dipeptide piece with odd numbering, and a four-site water."""
    topology = md.Topology()
    chain = topology.add_chain()
    first = topology.add_residue("ALA", chain, resSeq=-3)
    second = topology.add_residue("GLY", chain, resSeq=41)
    atoms = [topology.add_atom(n, md.element.get_by_symbol(n[0]), first) for n in ("N", "CA", "C", "O", "H")]
    atoms += [topology.add_atom("CA", md.element.carbon, second)]
    for i, j in ((0, 1), (1, 2), (2, 3), (0, 4), (2, 5)):
        topology.add_bond(atoms[i], atoms[j])
    water = topology.add_residue("HOH", topology.add_chain(), resSeq=1)
    oxygen, *hydrogens = (topology.add_atom(n, md.element.get_by_symbol(n[0]), water) for n in ("O", "H1", "H2"))
    topology.add_atom("M", md.element.virtual, water)
    for hydrogen in hydrogens:
        topology.add_bond(oxygen, hydrogen)
    return topology


TOPOLOGY = build_topology()
N_ATOMS = TOPOLOGY.n_atoms


def build_frames(walkers: tuple[int, ...] = (0, 0, 0, 1, 1), periodic: bool = True) -> Frames:
    rng = np.random.default_rng(5)
    n = len(walkers)
    box = np.tile(np.diag([3.0, 4.0, 5.0]), (n, 1, 1)) + np.arange(n)[:, None, None] * np.eye(3) * 0.1
    return Frames(
        rng.normal(size=(n, N_ATOMS, 3)).astype(np.float32),
        TOPOLOGY,
        310.5,
        np.array(walkers),
        0.5,
        box.astype(np.float32) if periodic else None,
        {"made": {"from": "noise", "seed": 5}},
    )


def create(path: Path, counts: tuple[int, ...] = (3, 2), periodic: bool = False) -> FramesStore:
    return FramesStore.create(
        path, TOPOLOGY, counts, temperature_K=300.0, interval_ps=2.0, periodic=periodic, provenance={"a": 1}
    )


def edit(path: Path, **attributes: Any) -> None:
    zarr.open_group(str(path), mode="r+").attrs.update(attributes)


def describe(topology: md.Topology) -> list[Any]:
    atoms = [
        (a.index, a.name, a.element.symbol, a.residue.name, a.residue.resSeq, a.residue.index, a.residue.chain.index)
        for a in topology.atoms
    ]
    return [atoms, [(a.index, b.index) for a, b in topology.bonds]]


class TestTopology:
    def test_round_trip(self) -> None:
        again = topology_from_json(topology_to_json(TOPOLOGY))
        assert describe(again) == describe(TOPOLOGY)
        assert again == TOPOLOGY
        assert again.atom(N_ATOMS - 1).element is md.element.virtual

    def test_atoms_out_of_order_are_refused(self) -> None:
        topology = md.Topology()
        chain = topology.add_chain()
        one, two = (topology.add_residue("X", chain) for _ in range(2))
        for residue in (one, two, one):
            topology.add_atom("C", md.element.carbon, residue)
        with pytest.raises(InputError, match="not consecutive"):
            topology_to_json(topology)


class TestFrames:
    def test_float32_positions_are_kept_to_the_bit(self) -> None:
        values = np.array([[[1 / 3, 1e-30, 16777217.0]] * N_ATOMS])
        frames = Frames(values, TOPOLOGY, 300.0, np.zeros(1))
        assert frames.positions.dtype == np.float32
        assert np.array_equal(frames.positions, values.astype(np.float32))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_names_the_first_bad_frame(self, bad: float) -> None:
        positions = np.zeros((5, N_ATOMS, 3), dtype=np.float32)
        positions[3, 2, 1] = positions[4, 0, 0] = bad
        with pytest.raises(InputError, match="NaN or infinity, first in frame 3"):
            Frames(positions, TOPOLOGY, 300.0, np.zeros(5))
        box = np.tile(np.eye(3), (5, 1, 1))
        box[2, 0, 0] = bad
        with pytest.raises(InputError, match="box vectors hold NaN or infinity, first in frame 2"):
            Frames(np.zeros_like(positions), TOPOLOGY, 300.0, np.zeros(5), 1.0, box)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"positions": np.zeros((5, 3))}, r"positions have the wrong shape: expected \(T, A, 3\)"),
            ({"positions": np.zeros((5, N_ATOMS, 2))}, "positions have the wrong shape"),
            ({"positions": np.zeros((5, 4, 3))}, "expected 10 atoms .topology., got 4 .positions."),
            ({"walker": np.zeros(4)}, r"walker has the wrong shape: expected \(5,\), got \(4,\)"),
            ({"box": np.zeros((5, 3))}, "box has the wrong shape"),
            ({"temperature_K": 0.0}, "temperature must be positive"),
            ({"temperature_K": float("nan")}, "temperature must be positive"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        good = {
            "positions": np.zeros((5, N_ATOMS, 3)),
            "topology": TOPOLOGY,
            "temperature_K": 300.0,
            "walker": np.zeros(5),
        }
        Frames(**good)
        with pytest.raises(InputError, match=message):
            Frames(**{**good, **change})

    def test_select_and_split(self) -> None:
        frames = build_frames((4, 4, 2, 2, 2))
        parts = frames.split_walkers()
        assert [len(p) for p in parts] == [2, 3]
        assert np.array_equal(parts[1], frames.positions[2:])
        some = frames.select(np.array([4, 0]))
        assert some.walker.tolist() == [2, 4]
        assert np.array_equal(some.positions, frames.positions[[4, 0]])
        assert some.box is not None
        assert frames.box is not None
        assert np.array_equal(some.box, frames.box[[4, 0]])
        assert frames.select(slice(1, 3)).n_frames == 2

    def test_times_restart_with_each_walker_in_any_order(self) -> None:
        times = build_frames((1, 0, 1, 0, 1)).to_mdtraj().time
        assert times.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0]


class TestStore:
    @pytest.mark.parametrize("periodic", [False, True])
    def test_round_trip(self, tmp_path: Path, periodic: bool) -> None:
        frames = build_frames(periodic=periodic)
        frames.save(tmp_path / "f.zarr")
        again = load_frames(tmp_path / "f.zarr")
        assert again.positions.tobytes() == frames.positions.tobytes()
        assert (again.box is None) == (not periodic)
        if again.box is not None and frames.box is not None:
            assert again.box.tobytes() == frames.box.tobytes()
        assert describe(again.topology) == describe(TOPOLOGY)
        assert again.walker.tolist() == [0, 0, 0, 1, 1]
        assert (again.temperature_K, again.interval_ps) == (310.5, 0.5)
        assert again.provenance == frames.provenance

    def test_no_frames(self, tmp_path: Path) -> None:
        build_frames().select(slice(0, 0)).save(tmp_path / "f.zarr")
        assert load_frames(tmp_path / "f.zarr").n_frames == 0

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        values=hnp.arrays(
            np.float32, (3, N_ATOMS, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        )
    )
    def test_every_finite_float32_comes_back(
        self, tmp_path_factory: pytest.TempPathFactory, values: np.ndarray
    ) -> None:
        path = tmp_path_factory.mktemp("frames") / "f.zarr"
        Frames(values, TOPOLOGY, 300.0, np.zeros(3)).save(path)
        # Zero has two signs, and both are equal.
        assert np.array_equal(load_frames(path).positions, values)
        shutil.rmtree(path.parent)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(order=st.permutations([0] * 3 + [1] * 5 + [2] * 4))
    def test_append_per_walker_in_any_order(self, tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
        rng = np.random.default_rng(1)
        walkers = [rng.normal(size=(n, N_ATOMS, 3)).astype(np.float32) for n in (3, 5, 4)]
        path = tmp_path_factory.mktemp("frames") / "f.zarr"
        store = create(path, (3, 5, 4))
        for step, w in enumerate(order):
            if step == 6:  # as after a kill
                store = FramesStore.open(path, mode="r+")
            done = store.count_done(w)
            assert done == order[:step].count(w)
            store.append(w, walkers[w][done : done + 1])
        assert load_frames(path).positions.tobytes() == np.concatenate(walkers).tobytes()
        shutil.rmtree(path.parent)

    def test_a_full_walker_takes_no_more(self, tmp_path: Path) -> None:
        store = create(tmp_path / "f.zarr")
        store.append(1, np.zeros((2, N_ATOMS, 3)))
        with pytest.raises(DataError, match="walker 1 is already full"):
            store.append(1, np.zeros((1, N_ATOMS, 3)))
        with pytest.raises(DataError, match="walker 0 is already full"):
            store.append(0, np.zeros((4, N_ATOMS, 3)))
        assert [store.count_done(w) for w in (0, 1)] == [0, 2]

    def test_append_refuses_what_does_not_fit(self, tmp_path: Path) -> None:
        store = create(tmp_path / "f.zarr", periodic=True)
        good, box = np.zeros((2, N_ATOMS, 3)), np.tile(np.eye(3), (2, 1, 1))
        bad = good.copy()
        bad[1, 0, 0] = np.nan
        for positions, boxes, message in (
            (good[:, :4], box, "new positions of walker 0 have the wrong shape"),
            (good[0], box, "wrong shape"),
            (bad, box, "new positions of walker 0 hold NaN or infinity, first in frame 1"),
            (good, None, "box vectors of walker 0 .* got none"),
            (good, box[:1], "box vectors of walker 0 have the wrong shape"),
            (good, np.full_like(box, np.inf), "box vectors of walker 0 hold NaN"),
        ):
            with pytest.raises(InputError, match=message):
                store.append(0, positions, boxes)
        assert store.count_done(0) == 0

    def test_partial_store_is_not_read(self, tmp_path: Path) -> None:
        store = create(tmp_path / "f.zarr")
        store.append(0, np.zeros((3, N_ATOMS, 3)))
        store.append(1, np.zeros((1, N_ATOMS, 3)))
        assert not store.is_complete
        with pytest.raises(DataError, match="frames are missing: expected 5 frames, got 4"):
            load_frames(tmp_path / "f.zarr")
        store.append(1, np.zeros((1, N_ATOMS, 3)))
        assert load_frames(tmp_path / "f.zarr").n_frames == 5

    def test_does_not_overwrite(self, tmp_path: Path) -> None:
        build_frames().save(tmp_path / "f.zarr")
        with pytest.raises(StorageError, match="already exists"):
            build_frames((0,)).save(tmp_path / "f.zarr")
        assert load_frames(tmp_path / "f.zarr").n_frames == 5

    @pytest.mark.parametrize(
        "chunk", ["positions/c/0/0/0", "positions/c/2/0/0", "box/c/1/0/0", "walker/c/0", "done/c/1"]
    )
    @pytest.mark.parametrize("keep", [None, 0, 6, -3])
    def test_truncated(self, tmp_path: Path, chunk: str, keep: int | None) -> None:
        build_frames().save(tmp_path / "f.zarr")
        file = tmp_path / "f.zarr" / chunk
        content = file.read_bytes()
        file.unlink()
        if keep is not None:
            file.write_bytes(content[:keep])
        with pytest.raises(DataError, match=r"f\.zarr: .*(truncated|damaged|missing)"):
            load_frames(tmp_path / "f.zarr")

    def test_missing_array(self, tmp_path: Path) -> None:
        for name in ("positions", "box", "walker", "done"):
            build_frames().save(tmp_path / f"{name}.zarr")
            shutil.rmtree(tmp_path / f"{name}.zarr" / name)
            with pytest.raises(DataError, match=f"array '{name}' is missing"):
                load_frames(tmp_path / f"{name}.zarr")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "openmm-hvpcg/labels"}, "wrong kind of file"),
            ({"format_version": 2}, "too new: expected 1, got 2. Upgrade"),
            ({"units": {**UNITS, "length": "angstrom"}}, "units differ"),
            ({"topology": "{"}, "header is incomplete"),
            ({"topology": '{"chains": [], "bonds": [[0, 1]]}'}, "header is incomplete"),
            ({"frames_per_walker": None}, "header is incomplete"),
            ({"frames_per_walker": [3, 3]}, "array 'positions' has the wrong shape"),
            ({"frames_per_walker": [2, 3]}, "finished frames are not there"),
        ],
    )
    def test_wrong_header(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        build_frames().save(tmp_path / "f.zarr")
        edit(tmp_path / "f.zarr", **change)
        with pytest.raises(DataError, match=message):
            load_frames(tmp_path / "f.zarr")

    def test_no_disk_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = 5 * N_ATOMS * 3 * 4
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, needed - 1))
        with pytest.raises(StorageError, match="not enough disk space"):
            build_frames().save(tmp_path / "f.zarr")
        assert os.listdir(tmp_path) == []


#: Largest error a coordinate may have: xtc keeps three decimals of a nm, pdb three of an Angstrom, dcd multiplies
#: by 10 in float32 and back, where two roundings of coordinates below 4 nm give less than 1e-6.
TOLERANCE = {"dcd": 1e-6, "xtc": 5.01e-4, "h5": 0.0, "pdb": 5.01e-5}


class TestExport:
    @pytest.mark.parametrize("ending", TOLERANCE)
    @pytest.mark.parametrize("periodic", [False, True])
    def test_formats(self, tmp_path: Path, ending: str, periodic: bool) -> None:
        frames = build_frames(periodic=periodic)
        path = tmp_path / f"f.{ending}"
        frames.export(path)
        top = {} if ending in ("h5", "pdb") else {"top": TOPOLOGY}
        again = md.load(str(path), **top)
        assert again.n_frames == 5
        # float32 spacing at 4 nm adds to the format's own rounding
        np.testing.assert_allclose(again.xyz, frames.positions, rtol=0, atol=TOLERANCE[ending] + 5e-7)
        assert [a.name for a in again.topology.atoms] == [a.name for a in TOPOLOGY.atoms]
        if frames.box is not None and ending != "pdb":  # a PDB has one box for all models
            # Lengths and angles there and back: trigonometry in float32
            np.testing.assert_allclose(again.unitcell_vectors, frames.box, rtol=0, atol=1e-5)
        assert os.listdir(tmp_path) == [path.name]

    @pytest.mark.parametrize("name", ["f.foo", "f", "f.tng"])
    def test_unknown_ending(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=rf"{name}: cannot export frames .*Use \.dcd, \.xtc"):
            build_frames().export(tmp_path / name)
        assert os.listdir(tmp_path) == []

    def test_a_format_that_needs_a_box(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot export frames"):
            build_frames(periodic=False).export(tmp_path / "f.lammpstrj")
        assert os.listdir(tmp_path) == []

    def test_missing_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def save(*_: Any) -> None:
            raise ImportError("No module named 'tables'", name="tables")

        monkeypatch.setattr(md.Trajectory, "save", save)
        with pytest.raises(InputError, match=r"f\.h5: .*a package that is missing \(tables\)\. Install it"):
            build_frames().export(tmp_path / "f.h5")

    def test_failure_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def save(_: md.Trajectory, path: str) -> None:
            Path(path).write_text("half")
            raise OSError(28, "No space left on device")

        (tmp_path / "f.dcd").write_text("old")
        monkeypatch.setattr(md.Trajectory, "save", save)
        with pytest.raises(StorageError, match="no space left"):
            build_frames().export(tmp_path / "f.dcd")
        assert (tmp_path / "f.dcd").read_text() == "old"
        assert os.listdir(tmp_path) == ["f.dcd"]
