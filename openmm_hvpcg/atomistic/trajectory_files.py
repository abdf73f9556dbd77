"""Trajectory files of any format mdtraj reads, chunk by chunk, with what is wrong in them named by file and frame."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import mdtraj as md
import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.building import LONGEST_BOND_NM
from openmm_hvpcg.atomistic.molecule import AtomisticSystem, is_movable
from openmm_hvpcg.atomistic.periodic import label_molecules, recentre, wrap_molecules
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.quiet import hide_c_output

logger = logging.getLogger(__name__)

#: Frames read at once: at most so many, and fewer of large systems. Reading, making whole and wrapping hold some
#: eight times CHUNK_BYTES.
CHUNK_FRAMES = 100
CHUNK_BYTES = 16 * 2**20

#: Text formats that mdtraj loads whole before it hands out chunks, and the size that is worth a word.
LOADED_WHOLE = (".pdb", ".pdb.gz", ".gsd")
LARGE_BYTES = 200 * 2**20

#: Formats that round positions: nm.
ROUNDED = {".xtc": 1e-3, ".gro": 1e-3, ".pdb": 1e-4, ".pdb.gz": 1e-4, ".mdcrd": 1e-4, ".crd": 1e-4}

DCD_HEADER = 84
LONGEST_ERROR = 200


class Placer:
    """Puts frames where they are stored: whole molecules near the first, or the centroid at the origin.

    Parameters
    ----------
    topology : of the frames
    periodic : whether they have boxes to be made whole in
    movable : whether the energy stays the same when all is moved
    """

    def __init__(self, topology: md.Topology, *, periodic: bool, movable: bool) -> None:
        self.periodic, self.movable = periodic, movable
        self._molecules = label_molecules(topology.n_atoms, [(a.index, b.index) for a, b in topology.bonds])
        self._bonds = _walk_bonds(topology)

    @classmethod
    def of_system(cls, system: AtomisticSystem) -> Placer:
        return cls(system.topology, periodic=system.is_periodic, movable=is_movable(system))

    def place(self, chunk: md.Trajectory) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Positions (n, A, 3) and box (n, 3, 3), nm, of frames whose positions may be changed."""
        if not self.periodic:
            return (recentre(chunk.xyz) if self.movable else np.asarray(chunk.xyz, dtype=np.float64)), None
        if len(self._bonds):
            chunk.make_molecules_whole(inplace=True, sorted_bonds=self._bonds)
        box = np.asarray(chunk.unitcell_vectors, dtype=np.float64)
        positions = np.asarray(chunk.xyz, dtype=np.float64)
        if self.movable:
            for k, (frame, vectors) in enumerate(zip(positions, box, strict=True)):
                positions[k] = wrap_molecules(frame, vectors, self._molecules)
        return positions, box


def read_chunks(system: AtomisticSystem, file: Path) -> Iterator[md.Trajectory]:
    """Chunks of a trajectory; whatever mdtraj raises becomes one line that names file and frame.

    Raises
    ------
    InputError
        A file that cannot be read, ends within a frame or is of another number of atoms.
    """
    n_atoms = _count_atoms(file)
    if n_atoms is not None and n_atoms != system.n_atoms:
        raise _wrong_atoms(system, file, n_atoms)
    if file.suffix.lower() == ".dcd":
        check_dcd_end(file)
    if file.name.lower().endswith(LOADED_WHOLE) and file.stat().st_size > LARGE_BYTES:
        logger.warning("%s: this format is loaded whole; dcd, xtc, trr and h5 are not", file)
    size = int(np.clip(CHUNK_BYTES // (12 * system.n_atoms), 1, CHUNK_FRAMES))
    n_read = 0
    try:
        for chunk in _read_quietly(md.iterload(str(file), top=system.topology, chunk=size)):
            if chunk.n_atoms != system.n_atoms:
                raise _wrong_atoms(system, file, chunk.n_atoms)
            yield chunk
            n_read += chunk.n_frames
    except InputError:
        raise
    except Exception as error:
        frame = _find_broken_frame(system, file, n_read) if n_read or size > 1 else 0
        what = (
            "the trajectory cannot be read" if frame == 0 else f"the trajectory is cut off or damaged at frame {frame}"
        )
        reason = " ".join(str(error).split())[:LONGEST_ERROR]
        raise InputError(
            f"{what} ({type(error).__name__}: {reason})",
            where=file,
            hint="it is empty, damaged, of a format mdtraj cannot read, or of other atoms than the topology"
            if frame == 0
            else "write the frames before it to a new file",
        ) from error


def check_frames(system: AtomisticSystem, file: Path, chunk: md.Trajectory, first: int, placer: Placer) -> None:
    """Raise :class:`InputError` for NaN, a box that is missing, or atoms in another order, naming file and frame.

    Parameters
    ----------
    first : index of the chunk's first frame in its file
    placer : of the system; in a periodic one only the file's first frame is made whole for a look at its bonds
    """
    finite = np.isfinite(chunk.xyz).all(axis=(1, 2))
    if system.is_periodic:
        if chunk.unitcell_vectors is None:
            raise InputError(
                "the trajectory has no periodic box, but the system needs one",
                where=file,
                hint="write the box into the trajectory, or use solvent: vacuum or obc2",
            )
        finite &= np.isfinite(chunk.unitcell_vectors).all(axis=(1, 2))
    if not finite.all():
        raise InputError(f"positions hold NaN or infinity, first in frame {first + int(np.argmin(finite))}", where=file)
    if not system.is_periodic:
        _check_bonds(system, file, chunk.xyz, first)
    elif first == 0:
        _check_bonds(system, file, placer.place(chunk[0])[0], first)


def _check_bonds(system: AtomisticSystem, file: Path, positions: NDArray[Any], first: int) -> None:
    atoms = [(a.index, b.index) for a, b in system.topology.bonds]
    if not atoms:
        return
    a, b = np.array(atoms).T
    lengths = np.linalg.norm(positions[:, a] - positions[:, b], axis=-1)
    frame, bond = np.unravel_index(int(np.argmax(lengths > LONGEST_BOND_NM)), lengths.shape)
    if lengths[frame, bond] > LONGEST_BOND_NM:
        names = " and ".join(str(system.topology.atom(int(i[bond]))) for i in (a, b))
        raise InputError(
            f"frame {first + int(frame)} is of other atoms than the topology, of atoms in another order, or of a"
            " molecule broken over the box",
            expected=f"bonds of at most {LONGEST_BOND_NM} nm",
            got=f"{lengths[frame, bond]:.2f} nm between {names}",
            where=file,
            hint="write the atoms in the order of the topology, with whole molecules",
        )


def check_dcd_end(file: Path) -> None:
    """Raise :class:`InputError` where a dcd ends within a frame, which its reader passes over in silence."""
    with open(file, "rb") as handle:
        layout = _read_dcd_layout(handle)
        if layout is None:
            return
        first, others = layout
        left = file.stat().st_size - handle.tell() - first
    if left < 0 or left % others:
        whole = 0 if left < 0 else 1 + left // others
        raise InputError(
            f"the trajectory ends within frame {whole}",
            where=file,
            hint=f"its program was stopped; mdconvert -o new.dcd {file.name} keeps the {whole} whole frames",
        )


def _read_dcd_layout(handle: BinaryIO) -> tuple[int, int] | None:
    """Bytes of the first frame and of each other one, with ``handle`` at the first; None for what is no plain dcd."""
    head = handle.read(8 + DCD_HEADER)
    order = next((o for o in "<>" if head[:8] == struct.pack(f"{o}i4s", DCD_HEADER, b"CORD")), None)
    if order is None or len(head) < 8 + DCD_HEADER:
        return None
    control = struct.unpack(f"{order}20i", head[8:-4])
    n_fixed, is_charmm = control[8], control[19] != 0
    has_cell, has_fourth = is_charmm and control[10] != 0, is_charmm and control[11] != 0
    title = _read_record(handle, order)
    count = _read_record(handle, order)
    if title is None or count is None or len(count) != 4:
        return None
    n_atoms = struct.unpack(f"{order}i", count)[0]
    if n_fixed and _read_record(handle, order) is None:
        return None
    n_axes, cell = 3 + has_fourth, 56 * has_cell
    return cell + n_axes * (8 + 4 * n_atoms), cell + n_axes * (8 + 4 * (n_atoms - n_fixed))


def _read_record(handle: BinaryIO, order: str) -> bytes | None:
    marker = handle.read(4)
    if len(marker) < 4:
        return None
    size = struct.unpack(f"{order}i", marker)[0]
    content = handle.read(size) if 0 <= size < 2**20 else b""
    return content if len(content) == size and handle.read(4) == marker else None


def _find_broken_frame(system: AtomisticSystem, file: Path, start: int) -> int:
    """Index of the first frame from ``start`` on that cannot be read."""
    n_read = 0
    try:
        for chunk in _read_quietly(md.iterload(str(file), top=system.topology, chunk=1, skip=start)):
            n_read += chunk.n_frames
    except Exception as error:
        logger.debug("%s: frame %d: %s", file, start + n_read, error)
    return start + n_read


def _read_quietly(chunks: Iterator[md.Trajectory]) -> Iterator[md.Trajectory]:
    """The same chunks; mdtraj's DCD reader talks on standard output while it makes one."""
    while True:
        with hide_c_output():
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def _wrong_atoms(system: AtomisticSystem, file: Path, n_atoms: int) -> InputError:
    return InputError(
        "trajectory and topology disagree",
        expected=f"{system.n_atoms} atoms (topology)",
        got=f"{n_atoms} (trajectory)",
        where=file,
        hint="strip both in the same way",
    )


def _count_atoms(file: Path) -> int | None:
    """Atoms of the first frame, or None where the format tells only together with a topology."""
    try:
        with hide_c_output(), md.open(str(file)) as handle:
            first = handle.read(1)
        positions = np.asarray(first[0] if isinstance(first, tuple) else first)
    except Exception:
        return None
    return int(positions.shape[1]) if positions.ndim == 3 and len(positions) else None


def _walk_bonds(topology: md.Topology) -> NDArray[np.int32]:
    """A spanning tree of each molecule, (n, 2): each atom is reached from one that was reached before."""
    neighbours: list[list[int]] = [[] for _ in range(topology.n_atoms)]
    for a, b in topology.bonds:
        neighbours[a.index].append(b.index)
        neighbours[b.index].append(a.index)
    seen = np.zeros(topology.n_atoms, dtype=bool)
    tree: list[tuple[int, int]] = []
    for root in range(topology.n_atoms):
        if seen[root]:
            continue
        seen[root] = True
        queue = [root]
        for atom in queue:
            for other in neighbours[atom]:
                if not seen[other]:
                    seen[other] = True
                    tree.append((atom, other))
                    queue.append(other)
    return np.array(tree, dtype=np.int32).reshape(-1, 2)
