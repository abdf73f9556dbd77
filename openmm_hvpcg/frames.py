"""Frames of either resolution: in memory (:class:`Frames`), on disk (:class:`FramesStore`).

Positions are float32, nm: what is stored is exactly what labels are computed from.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import DataError, InputError
from openmm_hvpcg.storage import (
    PathLike,
    atomic_path,
    check_free_space,
    create_store,
    explain_disk_errors,
    open_store,
    read_array,
)

FORMAT_VERSION = 1
MAX_CHUNK_FRAMES = 128


@dataclass(frozen=True)
class Frames:
    """Frames of one molecule.

    Attributes
    ----------
    positions : (T, A, 3) float32, nm
    topology : mdtraj.Topology of A atoms (or beads)
    temperature_K : float
    walker : (T,) int64, the independent trajectory each frame belongs to; frames of one walker are
        consecutive and in time order
    interval_ps : float, time between consecutive frames of a walker
    box : (T, 3, 3) float32, nm, box vectors as rows, or None without periodicity
    provenance : what the frames were made from
    """

    positions: NDArray[np.float32]
    topology: md.Topology
    temperature_K: float
    walker: NDArray[np.int64]
    interval_ps: float = 1.0
    box: NDArray[np.float32] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positions = np.asarray(self.positions, dtype=np.float32)
        if positions.ndim != 3 or positions.shape[2] != 3:
            raise InputError("positions have the wrong shape", expected="(T, A, 3)", got=positions.shape)
        n_frames, n_atoms = positions.shape[:2]
        if n_atoms != self.topology.n_atoms:
            raise InputError(
                "positions and topology disagree",
                expected=f"{self.topology.n_atoms} atoms (topology)",
                got=f"{n_atoms} (positions)",
            )
        check_finite(positions, "positions")
        walker = np.asarray(self.walker, dtype=np.int64)
        if walker.shape != (n_frames,):
            raise InputError("walker has the wrong shape", expected=(n_frames,), got=walker.shape)
        box = None if self.box is None else np.asarray(self.box, dtype=np.float32)
        if box is not None:
            if box.shape != (n_frames, 3, 3):
                raise InputError("box has the wrong shape", expected=(n_frames, 3, 3), got=box.shape)
            check_finite(box, "box vectors")
        if not self.temperature_K > 0:
            raise InputError("temperature must be positive", got=f"{self.temperature_K} K")
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "walker", walker)
        object.__setattr__(self, "box", box)

    @property
    def n_frames(self) -> int:
        return int(self.positions.shape[0])

    @property
    def n_atoms(self) -> int:
        return int(self.positions.shape[1])

    def select(self, frames: NDArray[np.intp] | slice) -> Frames:
        """The frames at the given indices, in that order, with everything else unchanged."""
        return Frames(
            self.positions[frames],
            self.topology,
            self.temperature_K,
            self.walker[frames],
            self.interval_ps,
            None if self.box is None else self.box[frames],
            self.provenance,
        )

    def split_walkers(self) -> list[NDArray[np.float32]]:
        """Positions of each walker, (T_w, A, 3) each, in the order of their first frame."""
        return [self.positions[self.walker == w] for w in dict.fromkeys(self.walker.tolist())]

    def to_mdtraj(self) -> md.Trajectory:
        """The frames as an mdtraj trajectory (times restart with each walker)."""
        index = np.zeros(self.n_frames, dtype=np.float32)
        for w in np.unique(self.walker):
            index[self.walker == w] = np.arange((self.walker == w).sum())
        trajectory = md.Trajectory(self.positions, self.topology, time=index * self.interval_ps)
        if self.box is not None:
            trajectory.unitcell_vectors = self.box
        return trajectory

    def export(self, path: PathLike) -> None:
        """Write the frames in any format mdtraj writes, chosen by its ending; whole or not at all.

        Raises
        ------
        InputError
            mdtraj does not write that format, not these frames in it, or only with a package that is missing.
        """
        try:
            with atomic_path(path) as temporary:
                self.to_mdtraj().save(str(temporary))
        except ImportError as error:
            raise InputError(
                f"exporting this format needs a package that is missing ({error.name or error})",
                where=path,
                hint="install it, or use .dcd, .xtc or .pdb",
            ) from error
        except (ValueError, KeyError, TypeError, OSError) as error:
            # mdtraj's OSError about an unknown ending has no errno; one of the file system has.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = str(error).replace(str(temporary), str(path))
            raise InputError(
                f"cannot export frames ({problem})", where=path, hint="use .dcd, .xtc, .h5 or .pdb"
            ) from error

    def save(self, path: PathLike) -> None:
        """Write all frames to a new store at ``path``."""
        counts = [len(p) for p in self.split_walkers()]
        store = FramesStore.create(
            path,
            self.topology,
            counts,
            temperature_K=self.temperature_K,
            interval_ps=self.interval_ps,
            periodic=self.box is not None,
            provenance=self.provenance,
        )
        for index, w in enumerate(dict.fromkeys(self.walker.tolist())):
            mask = self.walker == w
            store.append(index, self.positions[mask], None if self.box is None else self.box[mask])


def check_finite(values: NDArray[Any], what: str, where: object = None) -> None:
    """Raise :class:`InputError` naming the first frame of ``values`` (T, ...) that has a NaN or infinity."""
    bad = find_not_finite(values)
    if bad is not None:
        raise InputError(
            f"{what} hold NaN or infinity, first in frame {bad}", where=where, hint="remove or repair that frame"
        )


def find_not_finite(values: NDArray[Any]) -> int | None:
    """Index of the first entry of ``values`` (T, ...) that holds a NaN or infinity; None if there is none."""
    if np.isfinite(values).all():
        return None
    return int(np.argmin(np.isfinite(values.reshape(len(values), -1)).all(axis=1)))


class FramesStore:
    """Frames on disk, written walker by walker as they are made.

    Arrays ``positions`` (T, A, 3) float32, ``box`` (T, 3, 3) where periodic, ``walker`` (T,), ``done`` (T,); of frames
    from files ``source_frame`` (T,), their index there.
    Walker ``w`` owns a contiguous block of rows. ``done`` is written after the positions it speaks of: a kill
    at any moment loses only the frames being written.
    """

    def __init__(self, path: PathLike, group: Any) -> None:
        self.path = Path(path)
        self._group = group
        self._lock = threading.Lock()
        try:
            self.counts: list[int] = [int(c) for c in group.attrs["frames_per_walker"]]
            self.topology = topology_from_json(group.attrs["topology"])
            self.attributes = dict(group.attrs)
            self.periodic = bool(group.attrs["periodic"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"header is incomplete ({error})", where=path, hint="make the file again") from error
        self._starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(int)

    @classmethod
    def create(
        cls,
        path: PathLike,
        topology: md.Topology,
        frames_per_walker: Sequence[int],
        *,
        temperature_K: float,
        interval_ps: float,
        periodic: bool,
        provenance: dict[str, Any],
        chunk_frames: int | None = None,
        sources: NDArray[np.int64] | None = None,
    ) -> FramesStore:
        """Make an empty store with room for ``frames_per_walker`` frames of each walker.

        ``chunk_frames`` frames are one chunk of the file, for a single writer. ``sources`` (T,) is the index of each
        frame in the trajectory file it is taken from.
        """
        n_frames, n_atoms = int(sum(frames_per_walker)), topology.n_atoms
        check_free_space(path, n_frames * n_atoms * 12)
        chunk = chunk_frames or min([MAX_CHUNK_FRAMES, *(n for n in frames_per_walker if n > 0)])
        walker = np.repeat(np.arange(len(frames_per_walker)), frames_per_walker)

        def add_array(group: Any, name: str, *shape: int) -> None:
            group.create_array(
                name,
                shape=(n_frames, *shape),
                dtype="float32",
                chunks=(chunk, *shape),
                fill_value=float("nan"),
            )

        def add_arrays(group: Any) -> None:
            add_array(group, "positions", n_atoms, 3)
            if periodic:
                add_array(group, "box", 3, 3)
            group.create_array("walker", data=walker.astype(np.int64), chunks=(max(1, n_frames),))
            group.create_array("done", shape=(n_frames,), dtype="uint8", chunks=(chunk,), fill_value=0)
            if sources is not None:
                group.create_array("source_frame", data=sources, chunks=(max(1, n_frames),))

        group = create_store(
            path,
            "frames",
            FORMAT_VERSION,
            {
                "temperature_K": float(temperature_K),
                "interval_ps": float(interval_ps),
                "periodic": bool(periodic),
                "frames_per_walker": [int(c) for c in frames_per_walker],
                "topology": topology_to_json(topology),
                "provenance": provenance,
            },
            add_arrays,
        )
        return cls(path, group)

    @classmethod
    def open(cls, path: PathLike, mode: str = "r") -> FramesStore:
        """Open an existing store; raises :class:`DataError` for anything else."""
        return cls(path, open_store(path, "frames", FORMAT_VERSION, mode))

    def count_done(self, walker: int) -> int:
        """Frames of ``walker`` that are safely on disk."""
        start, stop = self._starts[walker], self._starts[walker + 1]
        done = read_array(self._group, "done", self.path)[start:stop]
        return int(np.argmin(done)) if not done.all() else int(stop - start)

    @property
    def is_complete(self) -> bool:
        return bool(read_array(self._group, "done", self.path).all())

    def append(self, walker: int, positions: NDArray[Any], box: NDArray[Any] | None = None) -> None:
        """Add frames (n, A, 3) nm after the last finished one of ``walker``; several threads may call it.

        ``box`` (n, 3, 3) nm goes with them where the store is periodic.
        """
        self._check_new(walker, "positions", positions, (len(positions), self.topology.n_atoms, 3))
        if self.periodic:
            self._check_new(walker, "box vectors", box, (len(positions), 3, 3))
        with self._lock, explain_disk_errors(self.path):
            start = int(self._starts[walker]) + self.count_done(walker)
            stop = start + len(positions)
            if stop > self._starts[walker + 1]:
                raise DataError(f"walker {walker} is already full", where=self.path)
            self._group["positions"][start:stop] = np.asarray(positions, dtype=np.float32)
            if self.periodic:
                self._group["box"][start:stop] = np.asarray(box, dtype=np.float32)
            self._group["done"][start:stop] = 1

    def _check_new(self, walker: int, what: str, values: NDArray[Any] | None, shape: tuple[int, ...]) -> None:
        if values is None or values.shape != shape:
            got = "none" if values is None else values.shape
            raise InputError(
                f"new {what} of walker {walker} have the wrong shape",
                expected=shape,
                got=got,
                where=self.path,
            )
        check_finite(values, f"new {what} of walker {walker}", self.path)

    def read_rows(self, walker: int, first: int, last: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Positions (n, A, 3) and box (n, 3, 3) or None, nm, of frames ``first`` to ``last`` - 1 of ``walker``."""
        start = int(self._starts[walker])
        rows = slice(start + first, start + last)
        box = np.asarray(self._group["box"][rows]) if self.periodic else None
        return np.asarray(self._group["positions"][rows]), box

    def read(self) -> Frames:
        """All frames; raises :class:`DataError` if some are missing or damaged."""
        if not self.is_complete:
            done = read_array(self._group, "done", self.path)
            raise DataError(
                "frames are missing",
                expected=f"{len(done)} frames",
                got=int(done.sum()),
                where=self.path,
                hint="run the sample stage again; it resumes",
            )
        n_frames, n_atoms = int(self._starts[-1]), self.topology.n_atoms
        positions = read_array(self._group, "positions", self.path, (n_frames, n_atoms, 3))
        box = read_array(self._group, "box", self.path, (n_frames, 3, 3)) if self.periodic else None
        walker = read_array(self._group, "walker", self.path, (n_frames,))
        # A chunk that is not there reads as its fill value.
        whole = np.isfinite(positions).all() and (box is None or np.isfinite(box).all())
        if not whole or not np.array_equal(walker, np.repeat(np.arange(len(self.counts)), self.counts)):
            raise DataError(
                "the file is truncated: finished frames are not there",
                where=self.path,
                hint="make the file again",
            )
        return Frames(
            positions,
            self.topology,
            float(self.attributes["temperature_K"]),
            walker,
            float(self.attributes["interval_ps"]),
            box,
            dict(self.attributes.get("provenance", {})),
        )


def load_frames(path: PathLike) -> Frames:
    """Read a finished frames store."""
    return FramesStore.open(path).read()


def topology_to_json(topology: md.Topology) -> str:
    """Atoms, residues, chains and bonds of an mdtraj topology as JSON text.

    Raises
    ------
    InputError
        The atoms of a residue or chain are not consecutive: the text would put them in another order.
    """
    if [a.index for c in topology.chains for r in c.residues for a in r.atoms] != list(range(topology.n_atoms)):
        raise InputError(
            "the atoms of a residue or chain are not consecutive", hint="reorder the atoms of the topology"
        )
    chains = [
        [
            {
                "name": residue.name,
                "seq": residue.resSeq,
                "atoms": [[a.name, a.element.symbol if a.element is not None else ""] for a in residue.atoms],
            }
            for residue in chain.residues
        ]
        for chain in topology.chains
    ]
    return json.dumps({"chains": chains, "bonds": [[a.index, b.index] for a, b in topology.bonds]})


def topology_from_json(text: str) -> md.Topology:
    """Inverse of :func:`topology_to_json`."""
    content = json.loads(text)
    topology = md.Topology()
    for residues in content["chains"]:
        chain = topology.add_chain()
        for entry in residues:
            residue = topology.add_residue(entry["name"], chain, resSeq=entry["seq"])
            for name, symbol in entry["atoms"]:
                topology.add_atom(name, _element(symbol), residue)
    atoms = list(topology.atoms)
    for i, j in content["bonds"]:
        topology.add_bond(atoms[i], atoms[j])
    return topology


def _element(symbol: str) -> Any:
    if symbol in ("", "VS"):
        return md.element.virtual
    return md.element.get_by_symbol(symbol)
