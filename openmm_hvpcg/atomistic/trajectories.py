"""Existing trajectories (any format mdtraj reads) to frames, streamed and never loaded whole."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.molecule import AtomisticSystem, is_movable
from openmm_hvpcg.atomistic.periodic import label_molecules, recentre, wrap_molecules
from openmm_hvpcg.errors import InputError, StudyError
from openmm_hvpcg.frames import FramesStore
from openmm_hvpcg.quiet import hide_c_output
from openmm_hvpcg.storage import PathLike, hash_file

logger = logging.getLogger(__name__)

CHUNK_FRAMES = 100

#: Formats that hold no times: mdtraj numbers their frames instead.
TIMELESS = (".dcd", ".pdb", ".pdb.gz", ".mdcrd", ".crd", ".xyz", ".xyz.gz", ".binpos", ".arc", ".lammpstrj")

#: Relative difference between frame intervals that is still one interval: times are stored as float32.
INTERVAL_TOLERANCE = 1e-3


def import_trajectory(
    system: AtomisticSystem,
    files: Sequence[PathLike],
    path: PathLike,
    *,
    interval_ps: float | None,
    temperature_K: float,
) -> FramesStore:
    """Take frames from trajectory files instead of sampling; one walker a file.

    Every file is read through and checked before anything is written; the store appears whole or not at all.
    In periodic systems molecules are made whole and put at their image nearest to the first; otherwise the
    centroid is moved to the origin.

    Parameters
    ----------
    system : the molecule; its topology says what the atoms are
    files : trajectories of the same atoms in the same order
    path : frames store to write; if it exists already, made from the same files, it is returned as it is
    interval_ps : time between frames, else what the files say, else (with a warning) 1 ps
    temperature_K : temperature the frames were drawn at

    Raises
    ------
    InputError
        A file that is missing, empty, unreadable, of another number of atoms, with NaN, or without the box
        that the system needs.
    StudyError
        ``path`` holds other frames.
    """
    paths = [Path(f) for f in files]
    if not paths:
        raise InputError("no trajectory files given")
    for file in paths:
        if not file.is_file():
            raise InputError("no such trajectory file", where=file)
    target = Path(path)
    provenance = {
        "system": system.provenance,
        "system_hash": system.system_hash,
        "trajectories": [{"file": str(f), "sha256": hash_file(f)} for f in paths],
        "interval_ps": interval_ps,
    }
    if target.exists():
        return _reopen(target, provenance)
    scans = [_scan(system, file) for file in paths]
    store_options: dict[str, Any] = {
        "temperature_K": temperature_K,
        "interval_ps": _agree_interval(paths, [interval for _, interval in scans], interval_ps),
        "periodic": system.is_periodic,
        "provenance": provenance,
    }
    partial = target.with_name(f".{target.name}.{os.getpid()}.import")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        store = FramesStore.create(partial, system.topology, [n for n, _ in scans], **store_options)
        for walker, file in enumerate(paths):
            for positions, box in _prepare_chunks(system, file):
                store.append(walker, positions, box)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s: %d frames from %d files", system.name or "molecule", sum(n for n, _ in scans), len(paths))
    return FramesStore.open(target)


def _reopen(path: Path, provenance: dict[str, Any]) -> FramesStore:
    store = FramesStore.open(path)
    found = store.attributes.get("provenance", {})
    same = all(found.get(key) == provenance[key] for key in ("system_hash", "interval_ps"))
    hashes = [[t.get("sha256") for t in p.get("trajectories", [])] for p in (found, provenance)]
    if not same or hashes[0] != hashes[1]:
        raise StudyError(
            "holds frames of other trajectories or of another system",
            where=path,
            hint="move it away or choose another output folder",
        )
    return store


def _scan(system: AtomisticSystem, file: Path) -> tuple[int, float | None]:
    """Check every frame of a file; number of frames, and the interval in ps if the file tells times."""
    n_frames = 0
    times: list[NDArray[Any]] = []
    for chunk in _read_chunks(system, file):
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
            raise InputError(
                f"positions hold NaN or infinity, first in frame {n_frames + int(np.argmin(finite))}",
                where=file,
            )
        times.append(np.asarray(chunk.time, dtype=np.float64))
        n_frames += chunk.n_frames
    if n_frames == 0:
        raise InputError("the trajectory has no frames", where=file)
    return n_frames, _measure_interval(file, np.concatenate(times))


def _measure_interval(file: Path, times: NDArray[np.float64]) -> float | None:
    if file.name.lower().endswith(TIMELESS) or len(times) < 2:
        return None
    steps = np.diff(times)
    interval = float(np.median(steps))
    if interval <= 0:
        return None
    # Rounding of float32 times grows with the time itself.
    allowed = INTERVAL_TOLERANCE * interval + 4 * np.finfo(np.float32).eps * np.abs(times).max()
    uneven = np.flatnonzero(np.abs(steps - interval) > allowed)
    if len(uneven):
        logger.warning("%s: frames are not evenly spaced, first after frame %d", file, int(uneven[0]))
    return interval


def _agree_interval(files: list[Path], found: list[float | None], given: float | None) -> float:
    if given is not None:
        return given
    known = [(f, i) for f, i in zip(files, found, strict=True) if i is not None]
    if not known:
        logger.warning(
            "%s: no times in the trajectory; 1 ps between frames is assumed (set trajectory_interval_ps)",
            files[0],
        )
        return 1.0
    first_file, interval = known[0]
    for file, other in known[1:]:
        if abs(other - interval) > INTERVAL_TOLERANCE * interval:
            raise InputError(
                "trajectories have different intervals between frames",
                expected=f"{interval:g} ps ({first_file})",
                got=f"{other:g} ps",
                where=file,
                hint="make them equal, or set trajectory_interval_ps",
            )
    return interval


def _read_chunks(system: AtomisticSystem, file: Path) -> Iterator[md.Trajectory]:
    """Chunks of a trajectory; whatever mdtraj raises becomes one line that names the file."""
    n_atoms = _count_atoms(file)
    if n_atoms is not None and n_atoms != system.n_atoms:
        raise _wrong_atoms(system, file, n_atoms)
    try:
        for chunk in _read_quietly(md.iterload(str(file), top=system.topology, chunk=CHUNK_FRAMES)):
            if chunk.n_atoms != system.n_atoms:
                raise _wrong_atoms(system, file, chunk.n_atoms)
            yield chunk
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the trajectory cannot be read ({type(error).__name__}: {error})",
            where=file,
            hint="it is empty, damaged, of a format mdtraj cannot read, or of other atoms than the topology",
        ) from error


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


def _prepare_chunks(
    system: AtomisticSystem, file: Path
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64] | None]]:
    """Positions (n, A, 3) and box (n, 3, 3), nm, as they are stored."""
    movable = is_movable(system)
    molecules = label_molecules(system.n_atoms, [(a.index, b.index) for a, b in system.topology.bonds])
    bonds = _walk_bonds(system.topology)
    for chunk in _read_chunks(system, file):
        if not system.is_periodic:
            yield (recentre(chunk.xyz) if movable else np.asarray(chunk.xyz, dtype=np.float64)), None
            continue
        if len(bonds):
            chunk.make_molecules_whole(inplace=True, sorted_bonds=bonds)
        box = np.asarray(chunk.unitcell_vectors, dtype=np.float64)
        positions = np.asarray(chunk.xyz, dtype=np.float64)
        if movable:
            positions = np.stack([wrap_molecules(p, b, molecules) for p, b in zip(positions, box, strict=True)])
        yield positions, box


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
