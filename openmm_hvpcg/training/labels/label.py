"""From AA frames to a dataset of projected forces and Hessian-vector products, chunk by chunk."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.platforms import choose_platform
from openmm_hvpcg.atomistic.systems import AtomisticSystem
from openmm_hvpcg.config import LabelSettings
from openmm_hvpcg.cores import count_cores
from openmm_hvpcg.errors import InputError, MappingError, StudyError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.progress import track
from openmm_hvpcg.storage import (
    PathLike,
    check_free_space,
    compute_hash,
    create_store,
    describe_changes,
    explain_disk_errors,
    open_store,
    read_array,
)
from openmm_hvpcg.training.dataset import FORMAT_VERSION, KIND, LabelledFrames, load_dataset
from openmm_hvpcg.training.labels.force_maps import ForceMap, build_force_map
from openmm_hvpcg.training.labels.hvp import StepScan, compute_projected_hvps, scan_step
from openmm_hvpcg.training.labels.oracle import ForceOracle, find_active_atoms, find_rigid_clusters
from openmm_hvpcg.training.labels.probes import PROBE_SECOND_MOMENTS, draw_probes

logger = logging.getLogger(__name__)

CHUNK_FRAMES = 64
FORCE_MAP_FRAMES = 1000
SCAN_FRAMES = 4
WARN_RELATIVE_ERROR = 0.01


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
    _check_sizes(system, frames, bead_map)
    chosen = _choose_frames(frames.n_frames, settings.max_frames)
    made_from = {
        "settings": settings.model_dump(mode="json", exclude={"platform", "workers"}),
        "system_hash": system.system_hash,
        "frames_hash": compute_hash(frames.positions, chosen),
        "bead_map_hash": bead_map.hash,
    }
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
        system.system, platform.name, platform.properties, _count_workers(platform.name, settings.workers)
    ) as oracle:
        if Path(path).exists():
            group = _open_unfinished(path, made_from)
        else:
            group = _create(path, system, frames, bead_map, settings, chosen, made_from, oracle, platform)
        _fill(group, path, frames, bead_map, settings, chosen, oracle, progress)
    return load_dataset(path, bead_map)


def _count_workers(platform: str, asked: int | str) -> int:
    """Contexts to work at once: one a core on the CPU, two on a GPU, where one can compute while the other copies."""
    if asked != "auto":
        return int(asked)
    return count_cores() if platform in ("Reference", "CPU") else 2


def _check_sizes(system: AtomisticSystem, frames: Frames, bead_map: BeadMap) -> None:
    n_atoms = system.system.getNumParticles()
    if frames.n_atoms != n_atoms:
        raise InputError(
            "frames and System differ", expected=f"{n_atoms} atoms", got=frames.n_atoms, where=system.name or None
        )
    if bead_map.n_atoms != n_atoms:
        raise MappingError(
            "bead map and System differ", expected=f"{n_atoms} atoms", got=bead_map.n_atoms, where=system.name or None
        )


def _choose_frames(n_frames: int, most: int | None) -> NDArray[np.int64]:
    if most is None or most >= n_frames:
        return np.arange(n_frames)
    return np.unique(np.linspace(0, n_frames - 1, most).round().astype(np.int64))


def _open_unfinished(path: PathLike, made_from: dict[str, Any]) -> Any:
    group = open_store(path, KIND, FORMAT_VERSION, mode="r+")
    found = group.attrs.get("made_from", {})
    changed = [key for key in made_from if key != "settings" and found.get(key) != made_from[key]]
    changed += describe_changes("labels", found.get("settings", {}), made_from["settings"])
    if changed:
        raise StudyError(
            f"the dataset there was made from something else: {', '.join(changed)} differ",
            where=path,
            hint="choose another output folder, or delete the dataset to make it again",
        )
    return group


def _create(
    path: PathLike,
    system: AtomisticSystem,
    frames: Frames,
    bead_map: BeadMap,
    settings: LabelSettings,
    chosen: NDArray[np.int64],
    made_from: dict[str, Any],
    oracle: ForceOracle,
    platform: Any,
) -> Any:
    """Build the force map, choose the step, and lay out the store."""
    n_beads, n_probes, n_frames = bead_map.n_beads, settings.probes_per_frame, len(chosen)
    n_bytes = n_frames * n_beads * 12 * (2 + 2 * n_probes)
    check_free_space(path, n_bytes)
    force_map = _build_force_map(system, frames, bead_map, settings, chosen, oracle)
    scan = _choose_step(frames, bead_map, settings, chosen, force_map, oracle)
    attributes = {
        "molecule": system.name,
        "temperature_K": system.temperature_K,
        "bead_map": json.dumps(bead_map.to_dict()),
        "force_map": {"method": force_map.method, **force_map.diagnostics},
        "finite_difference": {
            "step_nm": scan.step_nm,
            "relative_error": scan.relative_error,
            "scan_steps_nm": scan.steps_nm,
            "scan_relative_errors": scan.relative_errors,
            "meaning": "step_nm is the displacement of the atom that moves most",
        },
        "probe_law": settings.probe_law,
        "probe_second_moment": PROBE_SECOND_MOMENTS[settings.probe_law],
        "seed": settings.seed,
        "platform": {"name": platform.name, "properties": platform.properties, "workers": oracle.n_workers},
        "openmm_version": openmm.version.version,
        "made_from": made_from,
        "system": system.provenance,
        "frames": frames.provenance,
    }
    vector, matrix = (n_frames, n_beads, 3), (n_frames, n_probes, n_beads, 3)

    def add_arrays(group: Any) -> None:
        # Fill values no finished file holds: what a lost chunk reads as is noticed.
        for name, shape in (("positions", vector), ("forces", vector), ("probes", matrix), ("hvps", matrix)):
            group.create_array(
                name, shape=shape, dtype="float32", chunks=(CHUNK_FRAMES, *shape[1:]), fill_value=float("nan")
            )
        group.create_array("force_map", data=force_map.weights, fill_value=float("nan"))
        group.create_array("frame", data=chosen, fill_value=-1)
        group.create_array("walker", data=frames.walker[chosen], fill_value=-1)
        group.create_array("done", shape=(n_frames,), dtype="uint8", chunks=(CHUNK_FRAMES,), fill_value=0)

    return create_store(path, KIND, FORMAT_VERSION, attributes, add_arrays)


def _build_force_map(
    system: AtomisticSystem,
    frames: Frames,
    bead_map: BeadMap,
    settings: LabelSettings,
    chosen: NDArray[np.int64],
    oracle: ForceOracle,
) -> ForceMap:
    sample = chosen[_choose_frames(len(chosen), FORCE_MAP_FRAMES)]
    forces = oracle(frames.positions[sample].astype(np.float64), _take(frames.box, sample))
    force_map = build_force_map(
        settings.force_map,
        bead_map.site_weights,
        find_rigid_clusters(system.system),
        find_active_atoms(system.system, system.topology, bead_map.site_weights),
        forces,
    )
    logger.info(
        "force map %s: rms projected force %.0f kJ/mol/nm (slice map: %.0f), from %d frames",
        force_map.method,
        force_map.diagnostics["rms_projected_force"],
        force_map.diagnostics["rms_projected_force_slice"],
        len(sample),
    )
    return force_map


def _choose_step(
    frames: Frames,
    bead_map: BeadMap,
    settings: LabelSettings,
    chosen: NDArray[np.int64],
    force_map: ForceMap,
    oracle: ForceOracle,
) -> StepScan:
    """Scan steps on a few frames; a step given by the user is kept and its error estimated beside two neighbours."""
    sample = chosen[_choose_frames(len(chosen), SCAN_FRAMES)]
    probes = draw_probes(settings.probe_law, sample, 1, bead_map.n_beads, settings.seed)
    arguments = (oracle, frames.positions[sample], probes, force_map.weights, _take(frames.box, sample))
    if settings.step_nm == "auto":
        scan = scan_step(*arguments)
    else:
        step = float(settings.step_nm)
        scan = scan_step(*arguments, steps_nm=(step * 10**0.5, step, step / 10**0.5))
    logger.info(
        "finite-difference step %.1e nm, estimated relative error of an HVP %.1e", scan.step_nm, scan.relative_error
    )
    return scan


def _fill(
    group: Any,
    path: PathLike,
    frames: Frames,
    bead_map: BeadMap,
    settings: LabelSettings,
    chosen: NDArray[np.int64],
    oracle: ForceOracle,
    progress: bool,
) -> None:
    done = read_array(group, "done", path).astype(bool)
    weights = read_array(group, "force_map", path)
    step_nm = float(group.attrs["finite_difference"]["step_nm"])
    starts = [s for s in range(0, len(chosen), CHUNK_FRAMES) if not done[s : s + CHUNK_FRAMES].all()]
    if done.any() and starts:
        logger.info("%s: %d of %d frames are labelled already", path, int(done.sum()), len(done))
    began, calls = time.perf_counter(), 0
    with track(f"label {Path(path).stem}", len(chosen), "frames", done=int(done.sum()), show=progress) as advance:
        for start in starts:
            rows = slice(start, min(start + CHUNK_FRAMES, len(chosen)))
            index = chosen[rows]
            positions, boxes = frames.positions[index], _take(frames.box, index)
            probes = draw_probes(settings.probe_law, index, settings.probes_per_frame, bead_map.n_beads, settings.seed)
            forces = np.matmul(weights, oracle(positions.astype(np.float64), boxes))
            hvps = compute_projected_hvps(oracle, positions, probes, weights, step_nm, boxes)
            calls += len(index) * (1 + 2 * settings.probes_per_frame)
            with explain_disk_errors(path):
                group["positions"][rows] = bead_map.map_positions(positions).astype(np.float32)
                group["forces"][rows] = forces.astype(np.float32)
                group["probes"][rows] = probes
                group["hvps"][rows] = hvps.astype(np.float32)
                group["done"][rows] = 1
            advance(len(index))
    if calls:
        logger.info("%s: %.0f force calls/s", path, calls / (time.perf_counter() - began))


def _take(box: NDArray[Any] | None, index: NDArray[np.int64]) -> NDArray[Any] | None:
    return None if box is None else box[index]
