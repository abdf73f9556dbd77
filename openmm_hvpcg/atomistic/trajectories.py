"""Existing trajectories (any format mdtraj reads) to frames, streamed and never loaded whole."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.frame_choice import (
    CANDIDATES,
    BeadTraces,
    FrameChoice,
    IndexArray,
    choose_by_cluster,
    choose_by_time,
)
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.trajectory_files import CHUNK_BYTES, ROUNDED, Placer, check_frames, read_chunks
from openmm_hvpcg.errors import InputError, StudyError
from openmm_hvpcg.frames import MAX_CHUNK_FRAMES, FramesStore
from openmm_hvpcg.storage import PathLike, hash_file

logger = logging.getLogger(__name__)

#: Formats that hold no times: mdtraj numbers their frames instead.
TIMELESS = (".dcd", ".pdb", ".pdb.gz", ".mdcrd", ".crd", ".xyz", ".xyz.gz", ".binpos", ".arc", ".lammpstrj")

#: Relative difference between frame intervals that is still one interval: times are stored as float32.
INTERVAL_TOLERANCE = 1e-3

#: What stores made before there was a choice hold.
CHOICE_BEFORE = FrameChoice().describe()


def import_trajectory(
    system: AtomisticSystem,
    files: Sequence[PathLike],
    path: PathLike,
    *,
    interval_ps: float | None,
    temperature_K: float,
    choice: FrameChoice = FrameChoice(),  # noqa: B008 - frozen
) -> FramesStore:
    """Take frames from trajectory files instead of sampling; one walker a file.

    Every file is read through and checked before anything is written, then once more for the chosen frames; the
    store appears whole or not at all. Memory holds a few chunks of frames (``CHUNK_BYTES`` each) and, for a choice by
    cluster, the features of at most ``CANDIDATES`` frames (or four times the frames wanted), however long the files.
    In periodic systems molecules are made whole and put at their image nearest to the first; otherwise the
    centroid is moved to the origin.

    Parameters
    ----------
    system : the molecule; its topology says what the atoms are
    files : trajectories of the same atoms in the same order
    path : frames store to write; if it exists already, made from the same files, it is returned as it is
    interval_ps : time between frames of the files, else what they say, else (with a warning) 1 ps
    temperature_K : temperature the frames were drawn at
    choice : which frames are taken

    Raises
    ------
    InputError
        A file that is missing, empty, unreadable, given twice, cut off, of other atoms, with NaN, with times that run
        backwards, or without the box that the system needs.
    StudyError
        ``path`` holds other frames.
    """
    paths = [Path(f) for f in files]
    _check_files(paths)
    target = Path(path)
    provenance: dict[str, Any] = {
        "system": system.provenance,
        "system_hash": system.system_hash,
        "trajectories": [{"file": str(f), "sha256": hash_file(f)} for f in paths],
        "interval_ps": interval_ps,
        "choice": choice.describe(),
    }
    _check_distinct(provenance["trajectories"])
    if target.exists():
        return _reopen(target, provenance)
    placer = Placer.of_system(system)
    traces = None
    if choice.kind == "cluster":
        traces = _begin_traces(system, choice, len(paths))
    scans = [_scan(system, file, placer, interval_ps is None, traces, k) for k, file in enumerate(paths)]
    interval = _agree_interval(paths, [found for _, found in scans], interval_ps)
    counts = [n for n, _ in scans]
    chosen, step, found = _choose(counts, choice, traces)
    provenance["chosen"] = {"of": counts, "taken": [len(c) for c in chosen], **found}
    partial = target.with_name(f".{target.name}.{os.getpid()}.import")
    shutil.rmtree(partial, ignore_errors=True)
    chunk_frames = int(np.clip(CHUNK_BYTES // (12 * system.n_atoms), 1, min(MAX_CHUNK_FRAMES, sum(map(len, chosen)))))
    try:
        store = FramesStore.create(
            partial,
            system.topology,
            [len(c) for c in chosen],
            temperature_K=temperature_K,
            interval_ps=interval * step,
            periodic=system.is_periodic,
            provenance=provenance,
            chunk_frames=chunk_frames,
            sources=np.concatenate(chosen),
        )
        for walker, (file, rows) in enumerate(zip(paths, chosen, strict=True)):
            for positions, box in _gather(_take(system, file, rows, placer), chunk_frames):
                store.append(walker, positions, box)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info(
        "%s: %d of %d frames taken from %d files, by %s",
        system.name or "molecule",
        sum(map(len, chosen)),
        sum(counts),
        len(paths),
        choice.kind,
    )
    return FramesStore.open(target)


def _check_files(paths: list[Path]) -> None:
    if not paths:
        raise InputError("no trajectory files given")
    for file in paths:
        if not file.is_file():
            raise InputError("no such trajectory file", where=file)
        digits = next((d for ending, d in ROUNDED.items() if file.name.lower().endswith(ending)), None)
        if digits is not None:
            logger.warning(
                "%s: this format rounds positions to %g nm, which adds noise to forces along stiff bonds; dcd, trr, nc"
                " and h5 do not",
                file,
                digits,
            )


def _check_distinct(trajectories: list[dict[str, str]]) -> None:
    seen: dict[str, str] = {}
    for entry in trajectories:
        if entry["sha256"] in seen:
            raise InputError(f"the same frames are in {seen[entry['sha256']]}", where=entry["file"])
        seen[entry["sha256"]] = entry["file"]


def _reopen(path: Path, provenance: dict[str, Any]) -> FramesStore:
    store = FramesStore.open(path)
    found = {"choice": CHOICE_BEFORE, **store.attributes.get("provenance", {})}
    same = all(found.get(key) == provenance[key] for key in ("system_hash", "interval_ps", "choice"))
    hashes = [[t.get("sha256") for t in p.get("trajectories", [])] for p in (found, provenance)]
    if not same or hashes[0] != hashes[1]:
        raise StudyError(
            "holds frames of other trajectories, chosen in another way, or of another system",
            where=path,
            hint="move it away or choose another output folder",
        )
    return store


def _begin_traces(system: AtomisticSystem, choice: FrameChoice, n_files: int) -> BeadTraces:
    if choice.bead_map is None or choice.n_frames is None:
        raise InputError("a choice by cluster needs a bead map and a number of frames")
    return BeadTraces(system, choice.bead_map, choice.stride, n_files, max(CANDIDATES, 4 * choice.n_frames))


def _choose(
    counts: list[int], choice: FrameChoice, traces: BeadTraces | None
) -> tuple[list[IndexArray], float, dict[str, Any]]:
    """Frames to take of each file, frames of the files between two of them (on average), and how they were found."""
    if traces is None or choice.n_frames is None:
        chosen, step = choose_by_time(counts, choice.stride, choice.n_frames)
        return chosen, float(step), {"every": step}
    chosen, facts = choose_by_cluster(*traces.finish(), choice.n_frames, choice.seed)
    logger.info("%d clusters in %s", facts["clusters"], facts["coordinates"])
    return chosen, sum(counts) / sum(map(len, chosen)), {"every": traces.every, **facts}


def _scan(
    system: AtomisticSystem, file: Path, placer: Placer, check_times: bool, traces: BeadTraces | None, index: int
) -> tuple[int, float | None]:
    """Check every frame of a file; number of frames, and the interval in ps if the file tells times."""
    n_frames = 0
    times: list[NDArray[Any]] = []
    for chunk in read_chunks(system, file):
        check_frames(system, file, chunk, n_frames, placer)
        if traces is not None:
            traces.add(index, chunk, n_frames)
        times.append(np.asarray(chunk.time, dtype=np.float64))
        n_frames += chunk.n_frames
    if n_frames == 0:
        raise InputError("the trajectory has no frames", where=file)
    return n_frames, _measure_interval(file, np.concatenate(times), check_times)


def _measure_interval(file: Path, times: NDArray[np.float64], check: bool) -> float | None:
    if file.name.lower().endswith(TIMELESS) or len(times) < 2:
        return None
    steps = np.diff(times)
    interval = float(np.median(steps))
    if interval <= 0:
        return None
    if check and (steps <= 0).any():
        first = int(np.argmax(steps <= 0))
        raise InputError(
            f"times do not rise from frame {first} to frame {first + 1}",
            expected=f"{interval:g} ps between frames",
            got=f"{times[first]:g} ps, then {times[first + 1]:g} ps",
            where=file,
            hint="parts were joined in the wrong order or overlap: give them as files of their own, or say"
            " trajectory_interval_ps to take the frames as they come",
        )
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


def _take(
    system: AtomisticSystem, file: Path, rows: IndexArray, placer: Placer
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64] | None]]:
    """Positions (n, A, 3) and box (n, 3, 3), nm, of the frames ``rows`` of a file, as they are stored."""
    first, last = 0, int(rows[-1]) if len(rows) else -1
    for chunk in read_chunks(system, file):
        if first > last:
            return
        local = rows[(rows >= first) & (rows < first + chunk.n_frames)] - first
        if len(local):
            yield placer.place(chunk[local])
        first += chunk.n_frames


def _gather(
    parts: Iterator[tuple[NDArray[np.float64], NDArray[np.float64] | None]], n_frames: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64] | None]]:
    """The same frames, at least ``n_frames`` at a time, so that chunks of the store are not written over and over."""
    held: list[tuple[NDArray[np.float64], NDArray[np.float64] | None]] = []
    for part in parts:
        held.append(part)
        if sum(len(positions) for positions, _ in held) >= n_frames:
            yield _join(held)
            held = []
    if held:
        yield _join(held)


def _join(
    parts: list[tuple[NDArray[np.float64], NDArray[np.float64] | None]],
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    boxes = [box for _, box in parts if box is not None]
    return np.concatenate([positions for positions, _ in parts]), np.concatenate(boxes) if boxes else None
