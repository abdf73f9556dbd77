"""From AA frames to a dataset of projected forces and Hessian-vector products, chunk by chunk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.platforms import choose_platform
from openmm_hvpcg.atomistic.systems import AtomisticSystem
from openmm_hvpcg.config import LABELS_BEFORE, LabelSettings
from openmm_hvpcg.cores import count_cores
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.progress import track
from openmm_hvpcg.storage import (
    PathLike,
    check_free_space,
    create_store,
    explain_disk_errors,
    read_array,
)
from openmm_hvpcg.training.dataset import FORMAT_VERSION, KIND, LabelledFrames, load_dataset
from openmm_hvpcg.training.labels.averaging import average_labels, split_by_fold
from openmm_hvpcg.training.labels.cost import state_cost
from openmm_hvpcg.training.labels.force_maps import FITTED, ForceMap, split_in_blocks
from openmm_hvpcg.training.labels.frame_maps import FrameMaps, MapSample, compare_force_maps
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, Starts, find_held_atoms
from openmm_hvpcg.training.labels.hvp import StepScan, scan_step
from openmm_hvpcg.training.labels.job import LabelJob, compute_chunks, start_team
from openmm_hvpcg.training.labels.oracle import ForceOracle, count_copies
from openmm_hvpcg.training.labels.sources import check_sizes, choose_frames, describe_sources, open_unfinished
from openmm_hvpcg.training.labels.team import Team

logger = logging.getLogger(__name__)

#: Frames of a chunk, a file each array, and what a kill loses at most: the fewest, and the most where there are so many
#: that chunks of the fewest would be more than MANY_CHUNKS, which is enough for a cluster.
CHUNK_FRAMES, MAX_CHUNK_FRAMES = 64, 256
MANY_CHUNKS = 64
#: zarr takes a millisecond a file, which labels of a small molecule feel: there a chunk has so many frames times atoms
#: squared, half a second of work, up to QUICK_CHUNK_FRAMES, and a dataset at least FEW_CHUNKS chunks.
CHUNK_WORK, QUICK_CHUNK_FRAMES, FEW_CHUNKS = 1_000_000, 2048, 8
#: Conditional averaging: frames sampled one after the other in one Context.
CHAIN_FRAMES = 16
AVERAGED = ("forces", "hvps", "covariances")
FORCE_MAP_FRAMES = 1000
COMPARISON_FRAMES = 64
SCAN_FRAMES = 4
#: Noisier than the quietest map by more than this is worth a warning.
WARN_NOISE_RATIO = 1.05


def label_frames(
    system: AtomisticSystem,
    frames: Frames,
    bead_map: BeadMap,
    settings: LabelSettings,
    path: PathLike,
    *,
    progress: bool = True,
) -> LabelledFrames:
    """Label ``frames``: projected forces, and ``settings.probes_per_frame`` projected HVPs each.

    Writes a dataset at ``path`` chunk by chunk. If one is there already, made from the same frames, System, map and
    settings, it is finished where it was left.

    Parameters
    ----------
    system : the System whose forces are the labels
    frames : AA frames (T, A, 3), the float32 positions that are stored
    bead_map : M (B, A)
    settings : see :class:`~openmm_hvpcg.config.LabelSettings`
    path : the dataset, a zarr folder
    progress : show a progress bar

    Raises
    ------
    InputError, MappingError
        System, frames and map do not fit together.
    StudyError
        ``path`` holds labels made from something else; it says from what.
    """
    label_chunks(system, frames, bead_map, settings, path, progress=progress)
    return load_dataset(path, bead_map)


def label_chunks(
    system: AtomisticSystem,
    frames: Frames,
    bead_map: BeadMap,
    settings: LabelSettings,
    path: PathLike,
    chunks: Sequence[int] | None = None,
    *,
    progress: bool = True,
) -> list[int]:
    """Label some chunks of frames only, for :func:`label_frames` to finish.

    Calls with different chunks may run at once, on different machines with one file system, after a call with none
    has begun the dataset: no two chunks share a file.

    Parameters
    ----------
    system, frames, bead_map, settings, path, progress : those of :func:`label_frames`, the same in all calls
    chunks : indices; an empty list only begins the dataset; None: all

    Returns
    -------
    list of int, the chunks that were not labelled when this was called

    Raises
    ------
    InputError, MappingError, StudyError
        As :func:`label_frames`.
    """
    check_sizes(system, frames, bead_map)
    if settings.averaging is not None:
        find_held_atoms(system, bead_map)
    chosen = choose_frames(frames.n_frames, settings.max_frames)
    made_from = describe_sources(system, frames, bead_map, settings, chosen)
    box = None if frames.box is None else frames.box[0]
    platform = choose_platform(
        system.system,
        frames.positions[0].astype(np.float64),
        platform=settings.platform,
        precision=settings.precision,
        purpose="labels",
        box=box,
        threads=1,
    )
    with ForceOracle(
        system.system,
        platform.name,
        platform.properties,
        _count_workers(platform.name, settings.workers),
        count_copies(system.system, platform.name),
    ) as oracle:
        job = LabelJob(system, frames, bead_map, settings, chosen, platform, oracle)
        group, size, done = None, _choose_chunk(len(chosen), system.n_atoms), np.zeros(len(chosen), dtype=bool)
        if Path(path).exists():
            group = open_unfinished(path, KIND, FORMAT_VERSION, "labels", made_from, LABELS_BEFORE)
            done = read_array(group, "done", path).astype(bool)
            size = group["done"].chunks[0]
        left = [k for k in range(-(-len(chosen) // size)) if not done[k * size :][:size].all()]
        if group is not None and done.any() and left and chunks is None:
            logger.info("%s: %d of %d frames are labelled already", path, int(done.sum()), len(done))
        todo = [k * size for k in left if chunks is None or k in chunks]
        slices = [slice(start, min(start + size, len(chosen))) for start in todo]
        with start_team(job, sum(s.stop - s.start for s in slices)) as team:
            if group is None:
                group = _create(job, path, made_from, size)
            _fill(job, group, path, slices, team, progress)
        return left


def _count_workers(platform: str, asked: int | str) -> int:
    """Contexts to work at once: one a core on the CPU, two on a GPU, where one can compute while the other copies."""
    if asked != "auto":
        return int(asked)
    return count_cores() if platform in ("Reference", "CPU") else 2


def _choose_chunk(n_frames: int, n_atoms: int) -> int:
    """Frames of a chunk of a new dataset."""
    many = min(n_frames // MANY_CHUNKS, MAX_CHUNK_FRAMES)
    quick = min(n_frames // FEW_CHUNKS, CHUNK_WORK // n_atoms**2, QUICK_CHUNK_FRAMES)
    return max(1, max(many, quick) // CHUNK_FRAMES) * CHUNK_FRAMES


def _create(job: LabelJob, path: PathLike, made_from: dict[str, Any], chunk_frames: int) -> Any:
    """Build the force maps, choose the step, and lay out the store."""
    settings, chosen = job.settings, job.chosen
    n_beads, n_probes, n_frames = job.bead_map.n_beads, settings.probes_per_frame, len(chosen)
    check_free_space(path, n_frames * n_beads * 12 * (2 + (2 if settings.averaging is None else 3) * n_probes))
    fold = split_in_blocks(n_frames)
    rows = choose_frames(n_frames, FORCE_MAP_FRAMES)
    part = job.take(rows, 1)
    began = time.perf_counter()
    forces = job.oracle(part.positions.astype(np.float64), part.box)
    rate = len(rows) / (time.perf_counter() - began)
    cost = state_cost(job.system, job.bead_map, n_frames * job.count_calls(), rate)
    sample = MapSample(job.system, job.bead_map, forces, fold[rows])
    force_map, frame_maps = sample.fit(settings.force_map)
    scan = _choose_step(job, force_map)
    few = choose_frames(len(rows), COMPARISON_FRAMES)
    part = job.take(rows[few], 1)
    comparison = compare_force_maps(sample, job.oracle, few, part.positions, part.probes, scan.step_nm, part.box)
    _warn_if_noisy(settings.force_map, comparison, len(rows))
    attributes = {
        "molecule": job.system.name,
        "temperature_K": job.system.temperature_K,
        "bead_map": json.dumps(job.bead_map.to_dict()),
        "force_map": {
            "method": force_map.method,
            **force_map.diagnostics,
            "comparison": comparison,
            "comparison_frames": {"forces": len(rows), "hvps": len(few)},
        },
        "finite_difference": {
            "step_nm": scan.step_nm,
            "relative_error": scan.relative_error,
            "scan_steps_nm": scan.steps_nm,
            "scan_relative_errors": scan.relative_errors,
            "meaning": "step_nm is the displacement of the atom that moves most",
        },
        "probe_law": job.law.name,
        "probe_modes": job.law.n_modes,
        "probe_translations": job.law.translations,
        "probe_second_moment": job.law.describe(),
        "force_calls": {
            "force_map": len(rows),
            "step_scan": 2 * SCAN_FRAMES * len(scan.steps_nm),
            "map_comparison": 2 * len(few) * len(comparison),
            "labels": n_frames * job.count_calls(),
        },
        "cost": cost,
        "seed": settings.seed,
        "platform": {
            "name": job.platform.name,
            "properties": job.platform.properties,
            "workers": job.oracle.n_workers,
            "copies": job.oracle.n_copies,
        },
        "openmm_version": openmm.version.version,
        "made_from": made_from,
        "system": job.system.provenance,
        "frames": job.frames.provenance,
    }
    vector, matrix = (n_frames, n_beads, 3), (n_frames, n_probes, n_beads, 3)

    def add_arrays(group: Any) -> None:
        # Fill values no finished file holds: what a lost chunk reads as is noticed.
        for name, shape in (("positions", vector), ("forces", vector), ("probes", matrix), ("hvps", matrix)):
            group.create_array(
                name, shape=shape, dtype="float32", chunks=(chunk_frames, *shape[1:]), fill_value=float("nan")
            )
        if settings.averaging is not None:
            group.create_array(
                "covariances",
                shape=matrix,
                dtype="float32",
                chunks=(chunk_frames, *matrix[1:]),
                fill_value=float("nan"),
            )
        group.create_array("force_map", data=force_map.weights, fill_value=float("nan"))
        group.create_array("fold_force_maps", data=frame_maps.weights, fill_value=float("nan"))
        group.create_array("fold", data=fold, fill_value=-1)
        group.create_array("frame", data=chosen, fill_value=-1)
        group.create_array("walker", data=job.frames.walker[chosen], fill_value=-1)
        group.create_array("done", shape=(n_frames,), dtype="uint8", chunks=(chunk_frames,), fill_value=0)

    return create_store(path, KIND, FORMAT_VERSION, attributes, add_arrays)


def _warn_if_noisy(method: str, comparison: dict[str, dict[str, float]], n_frames: int) -> None:
    if n_frames == 1 and method in FITTED:
        logger.warning("force map %s was fitted to one frame, whose label it makes too small; set harmonic", method)
        return
    quiet = min(comparison, key=lambda name: comparison[name]["forces"])
    if comparison[method]["forces"] > WARN_NOISE_RATIO * comparison[quiet]["forces"]:
        logger.warning(
            "force map %s, from %d frames, makes noisier labels than %s: rms force %.0f against %.0f kJ/mol/nm;"
            " set labels.force_map to %s",
            method,
            n_frames,
            quiet,
            comparison[method]["forces"],
            comparison[quiet]["forces"],
            quiet,
        )


def _choose_step(job: LabelJob, force_map: ForceMap) -> StepScan:
    """Scan steps on a few frames; a step given by the user is kept and its error estimated beside two neighbours."""
    part = job.take(choose_frames(len(job.chosen), SCAN_FRAMES), 1)
    arguments = (job.oracle, part.positions, part.probes, force_map.weights, part.box)
    if job.settings.step_nm == "auto":
        scan = scan_step(*arguments)
    else:
        step = float(job.settings.step_nm)
        scan = scan_step(*arguments, steps_nm=(step * 10**0.5, step, step / 10**0.5))
    logger.info(
        "finite-difference step %.1e nm, estimated relative error of an HVP %.1e", scan.step_nm, scan.relative_error
    )
    return scan


def _fill(job: LabelJob, group: Any, path: PathLike, chunks: list[slice], team: Team | None, progress: bool) -> None:
    """Label some chunks and write them as they come."""
    if not chunks:
        return
    n_frames = len(job.chosen)
    n_done = int(np.count_nonzero(read_array(group, "done", path)))
    maps = FrameMaps.read(group, path)
    step_nm = float(group.attrs["finite_difference"]["step_nm"])
    began, calls = time.perf_counter(), 0
    if job.settings.averaging is None:
        found = compute_chunks(job, maps, chunks, step_nm, team)
    else:
        found = _average_chunks(job, maps, chunks, step_nm)
    bar = track(f"label {Path(path).stem}", n_frames, "frames", done=n_done, show=progress)
    with bar as advance, ThreadPoolExecutor(1) as background:
        written: Future[None] | None = None
        for rows, arrays in found:
            if written is not None:
                written.result()
            # While the next ones are computed: Python's lock is free in force calls, and for the most part in writing.
            written = background.submit(_write, group, path, rows, arrays)
            calls += (rows.stop - rows.start) * job.count_calls()
            advance(rows.stop - rows.start)
        if written is not None:
            written.result()
    logger.info("%s: %.0f force calls/s", path, calls / (time.perf_counter() - began))


def _write(group: Any, path: PathLike, rows: slice, arrays: dict[str, NDArray[Any]]) -> None:
    """Write labels of a chunk to the dataset, and last what says that they are there."""
    with explain_disk_errors(path):
        for name, values in arrays.items():
            group[name][rows] = values
        group["done"][rows] = 1


def _average_chunks(
    job: LabelJob, maps: FrameMaps, chunks: list[slice], step_nm: float
) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
    """Labels averaged over the hidden atoms, a chain a frame."""
    settings, system = job.settings, job.system
    if settings.averaging is None or not chunks:
        return
    platform = choose_platform(
        system.system,
        job.frames.positions[0].astype(np.float64),
        platform=settings.platform,
        precision=settings.precision,
        purpose="dynamics",
        box=None if job.frames.box is None else job.frames.box[0],
        threads=1,
    )
    workers = None if settings.workers == "auto" else int(settings.workers)
    sampler = HeldSampler(system, job.bead_map, platform.name, platform.properties, step_nm, settings.seed, workers)
    parts = [(rows, job.take(rows, settings.probes_per_frame), maps.select(rows)) for rows in chunks]
    starts = [
        Starts(
            job.chosen[rows][run],
            part.positions[run],
            part.probes[run],
            own.weights[own.fold[run][0]],
            None if part.box is None else part.box[run],
        )
        for rows, part, own in parts
        for run in split_by_fold(own.fold, CHAIN_FRAMES)
    ]
    found = sampler.sample(starts, Chains.from_settings(settings.averaging, system.temperature_K))
    with closing(found):
        for rows, part, own in parts:
            samples = [s for _ in split_by_fold(own.fold, CHAIN_FRAMES) for s in next(found)]
            labels = [average_labels(s, v) for s, v in zip(samples, part.probes, strict=True)]
            arrays = {name: np.stack([getattr(label, name) for label in labels]) for name in AVERAGED}
            yield rows, {"positions": part.beads, "probes": part.probes, **arrays}
