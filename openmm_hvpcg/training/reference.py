"""The truth a CG potential aims at: mean forces and CG Hessians at chosen configurations, with standard errors.

The beads are held, the rest of the molecule is sampled, and the identities of the theory note are averaged:
``-grad W = <Q f>`` and ``(grad grad W) v = <Q H Q^T v> - beta Cov(Q f, Q f) v``. No model takes part, so no model can
flatter itself with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.platforms import PlatformChoice, choose_platform
from openmm_hvpcg.atomistic.systems import AtomisticSystem
from openmm_hvpcg.config import REFERENCE_BEFORE, ReferenceSettings
from openmm_hvpcg.errors import BackendError, DataError, InputError, MappingError
from openmm_hvpcg.frames import Frames, find_not_finite
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.progress import track
from openmm_hvpcg.storage import (
    PathLike,
    check_free_space,
    create_store,
    explain_disk_errors,
    open_store,
    read_array,
)
from openmm_hvpcg.training.labels.force_maps import ForceMap, split_in_blocks
from openmm_hvpcg.training.labels.frame_maps import MapSample
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, HeldSamples, Starts, find_held_atoms
from openmm_hvpcg.training.labels.hvp import StepScan, scan_step
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.training.labels.probes import draw_probes
from openmm_hvpcg.training.labels.sources import check_sizes, choose_frames, describe_sources, open_unfinished
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
KIND = "pmf_reference"
#: Frames the force map is fitted to, and the step is scanned on.
FORCE_MAP_FRAMES = 1000
SCAN_FRAMES = 4
#: Temperatures of frames and System that differ by more, K, are two.
TEMPERATURE_TOLERANCE_K = 1e-6
#: Share of exchanges below which a ladder of temperatures is told to be too coarse.
MIN_ACCEPTED = 0.1
VECTORS = ("positions", "forces", "force_errors")
MATRICES = ("probes", "hvps", "hvp_errors")


@dataclass(frozen=True)
class PMFReference:
    """Mean forces and CG Hessian-vector products of one molecule.

    Attributes
    ----------
    positions : (T, B, 3) nm, the configurations
    forces, force_errors : (T, B, 3) kJ/mol/nm, ``-grad W`` and its standard error
    probes : (T, P, B, 3); the 3B unit vectors where the whole Hessian was asked for
    hvps, hvp_errors : (T, P, B, 3) kJ/mol/nm^2, ``(grad grad W) v`` and its standard error
    frame : (T,) index of each configuration among the frames it was made from
    force_map : Q (B, A) used
    bead_map : BeadMap
    temperature_K : float
    attributes : provenance
    name : the molecule

    Raises
    ------
    DataError
        Shapes that do not fit together, NaN or infinity, negative errors.
    """

    positions: NDArray[np.float64]
    forces: NDArray[np.float64]
    force_errors: NDArray[np.float64]
    probes: NDArray[np.float64]
    hvps: NDArray[np.float64]
    hvp_errors: NDArray[np.float64]
    frame: NDArray[np.int64]
    force_map: NDArray[np.float64]
    bead_map: BeadMap
    temperature_K: float
    attributes: dict[str, Any]
    name: str = ""

    def __post_init__(self) -> None:
        n_frames, n_beads = len(self.positions), self.bead_map.n_beads
        n_probes = self.probes.shape[1] if self.probes.ndim == 4 else -1
        shapes: dict[str, tuple[int, ...]] = {name: (n_frames, n_beads, 3) for name in VECTORS}
        shapes |= {name: (n_frames, n_probes, n_beads, 3) for name in MATRICES}
        shapes |= {"frame": (n_frames,), "force_map": (n_beads, self.bead_map.n_atoms)}
        for name, shape in shapes.items():
            values = getattr(self, name)
            if values.shape != shape or not n_frames:
                raise DataError(f"{name} have the wrong shape", expected=shape, got=values.shape, where=self.name)
            bad = find_not_finite(values)
            if bad is not None or (name.endswith("errors") and (values < 0).any()):
                raise DataError(
                    f"{name} hold NaN, infinity or a negative error", where=self.name, hint="make the reference again"
                )

    @property
    def n_frames(self) -> int:
        return len(self.positions)


def average_samples(
    samples: HeldSamples, probes: NDArray[np.float64], beta: float, n_blocks: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean force, its error, HVP of the PMF, its error, from the samples at one configuration.

    A delete-one-block jackknife over ``n_blocks`` stretches of the chain: it gives the errors, correlation within a
    block included, and takes out the bias of the covariance, which a finite chain makes too small. Both suppose blocks
    that are longer than what is correlated.

    Parameters
    ----------
    samples : forces (n, B, 3), hvps (m, P, B, 3)
    probes : (P, B, 3)
    beta : 1/kT
    n_blocks : at least 2

    Returns
    -------
    forces, force_errors (B, 3); hvps, hvp_errors (P, B, 3)

    Raises
    ------
    DataError
        Fewer samples than blocks.

    References
    ----------
    Künsch, Ann. Statist. 17, 1217 (1989).
    """
    q, p = samples.forces, samples.hvps
    if n_blocks < 2 or min(len(q), len(p)) < n_blocks:
        raise DataError("too few samples for blocks", expected=f"{max(n_blocks, 2)} or more", got=min(len(q), len(p)))
    block_q, block_p = split_in_blocks(len(q), n_blocks), split_in_blocks(len(p), n_blocks)
    mean = q.mean(axis=0)
    d = q - mean  # small numbers: the covariance loses no digits to the mean
    keep = [(block_q != k, block_p != k) for k in range(n_blocks)]
    means = np.array([d[kq].mean(axis=0) for kq, _ in keep])
    hvps = np.array([_combine(d[kq], p[kp], probes, beta) for kq, kp in keep])
    unbiased = n_blocks * _combine(d, p, probes, beta) - (n_blocks - 1) * hvps.mean(axis=0)
    scale = np.sqrt(n_blocks - 1.0)
    return mean, scale * means.std(axis=0), unbiased, scale * hvps.std(axis=0)


def _combine(
    q: NDArray[np.float64], p: NDArray[np.float64], probes: NDArray[np.float64], beta: float
) -> NDArray[np.float64]:
    d = q - q.mean(axis=0)
    along = np.einsum("nbx,pbx->np", d, probes)
    return p.mean(axis=0) - beta * np.einsum("np,nbx->pbx", along, d, optimize=True) / len(q)


@dataclass(frozen=True)
class _Job:
    """What the reference is made of."""

    system: AtomisticSystem
    frames: Frames
    bead_map: BeadMap
    settings: ReferenceSettings
    chosen: NDArray[np.int64]

    @property
    def chains(self) -> Chains:
        return Chains.from_settings(self.settings, self.system.temperature_K)

    def get_boxes(self, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        return None if self.frames.box is None else self.frames.box[rows]

    def make_probes(self) -> NDArray[np.float64]:
        """Unit vectors for the whole Hessian, or Rademacher probes, (T, P, B, 3)."""
        n_beads = self.bead_map.n_beads
        if self.settings.probes == "full":
            return np.tile(np.eye(3 * n_beads).reshape(3 * n_beads, n_beads, 3), (len(self.chosen), 1, 1, 1))
        return draw_probes("rademacher", self.chosen, self.settings.probes, n_beads, self.settings.seed).astype(float)


def compute_reference(
    system: AtomisticSystem,
    frames: Frames,
    bead_map: BeadMap,
    settings: ReferenceSettings,
    path: PathLike,
    *,
    progress: bool = True,
) -> PMFReference:
    """Mean force and CG Hessian at ``settings.n_frames`` of the ``frames``; resumes where it was killed.

    On the Reference platform the result is, bit for bit, that of an uninterrupted run.

    Parameters
    ----------
    system : the System the frames were sampled with, without constraints on the beads' atoms
    frames : AA frames (T, A, 3) of the equilibrium ensemble: each chain starts from one, and is stationary at once
    bead_map : each bead on one atom
    settings : see :class:`~openmm_hvpcg.config.ReferenceSettings`
    path : the reference file, a zarr folder, written configuration by configuration
    progress : show a progress bar

    Raises
    ------
    MappingError
        The beads cannot be held.
    InputError
        System and frames do not fit together.
    StudyError
        ``path`` holds a reference made from something else.
    UnstableSimulationError
        A chain blew up.
    BackendError
        The platform is not here or failed, or a process was killed.
    """
    check_sizes(system, frames, bead_map)
    find_held_atoms(system, bead_map)
    if abs(frames.temperature_K - system.temperature_K) > TEMPERATURE_TOLERANCE_K:
        raise InputError(
            "frames and System differ in temperature",
            expected=f"{system.temperature_K:g} K",
            got=f"{frames.temperature_K:g} K",
            where=system.name or None,
        )
    if settings.ladder_K and settings.ladder_K[0] <= system.temperature_K:
        raise InputError(
            "reference.ladder_K does not lead upwards",
            expected=f"temperatures above {system.temperature_K:g} K, that of the ensemble",
            got=settings.ladder_K,
            where=system.name or None,
        )
    job = _Job(system, frames, bead_map, settings, choose_frames(frames.n_frames, settings.n_frames))
    made_from = describe_sources(system, frames, bead_map, settings, job.chosen)
    if Path(path).exists():
        group = open_unfinished(path, KIND, FORMAT_VERSION, "reference", made_from, REFERENCE_BEFORE)
    else:
        group = _create(job, path, made_from, _choose_platform(job, settings.platform))
    _fill(job, group, path, progress)
    return load_reference(path, bead_map)


def load_reference(path: PathLike, bead_map: BeadMap | None = None) -> PMFReference:
    """Read a finished reference.

    Raises
    ------
    DataError
        Not a reference, unfinished, or damaged.
    MappingError
        Of another mapping than ``bead_map``.
    """
    group = open_store(path, KIND, FORMAT_VERSION)
    done = read_array(group, "done", path)
    if not done.all():
        raise DataError(
            "the reference is not finished",
            expected=f"{len(done)} configurations",
            got=int(done.sum()),
            where=path,
            hint="run `openmm-hvpcg reference` again; it resumes",
        )
    attributes = dict(group.attrs)
    try:
        found = BeadMap.from_dict(json.loads(attributes["bead_map"]), where=path)
        temperature, name = float(attributes["temperature_K"]), str(attributes["molecule"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the header is incomplete ({error})", where=path, hint="make the reference again") from error
    if bead_map is not None and found.hash != bead_map.hash:
        raise MappingError(
            "the reference was made with another mapping",
            expected=f"{bead_map.n_beads} beads, map {bead_map.hash[:12]}",
            got=f"{found.n_beads} beads, map {found.hash[:12]}",
            where=path,
            hint="make it again in another folder, or use its mapping",
        )
    arrays = {name: read_array(group, name, path) for name in (*VECTORS, *MATRICES, "frame", "force_map")}
    try:
        return PMFReference(**arrays, bead_map=found, temperature_K=temperature, attributes=attributes, name=name)
    except DataError as error:
        raise DataError(str(error), where=path) from error


def _choose_platform(job: _Job, asked: str) -> PlatformChoice:
    box = job.get_boxes(np.arange(1))
    return choose_platform(
        job.system.system,
        job.frames.positions[0].astype(np.float64),
        platform=asked,
        purpose="dynamics",
        box=None if box is None else box[0],
        threads=1,
    )


def _create(job: _Job, path: PathLike, made_from: dict[str, Any], platform: PlatformChoice) -> Any:
    """Fit a quiet force map, choose the step, and lay out the store."""
    n_frames, n_beads = len(job.chosen), job.bead_map.n_beads
    probes = job.make_probes()
    check_free_space(path, 3 * (probes.nbytes + 8 * n_frames * n_beads * 3))
    with ForceOracle(job.system.system, platform.name, platform.properties) as oracle:
        force_map = _fit_force_map(job, oracle)
        scan = _choose_step(job, oracle, force_map)
    attributes = {
        "molecule": job.system.name,
        "temperature_K": job.system.temperature_K,
        "bead_map": json.dumps(job.bead_map.to_dict()),
        "force_map": {"method": force_map.method, **force_map.diagnostics},
        "finite_difference": {"step_nm": scan.step_nm, "relative_error": scan.relative_error},
        "force_calls_per_configuration": job.chains.count_force_calls(probes.shape[1]),
        "platform": {"name": platform.name, "properties": platform.properties},
        "openmm_version": openmm.version.version,
        "made_from": made_from,
        "system": job.system.provenance,
        "frames": job.frames.provenance,
    }

    def add_arrays(group: Any) -> None:
        # Fill values no finished file holds: what a lost chunk reads as is noticed.
        for name in (*VECTORS, *MATRICES):
            shape = probes.shape if name in MATRICES else (n_frames, n_beads, 3)
            group.create_array(name, shape=shape, dtype="float64", chunks=(1, *shape[1:]), fill_value=float("nan"))
        group["probes"][:] = probes
        group.create_array("force_map", data=force_map.weights, fill_value=float("nan"))
        group.create_array("frame", data=job.chosen, fill_value=-1)
        group.create_array("done", shape=(n_frames,), dtype="uint8", chunks=(1,), fill_value=0)

    return create_store(path, KIND, FORMAT_VERSION, attributes, add_arrays)


def _fit_force_map(job: _Job, oracle: ForceOracle) -> ForceMap:
    """The quietest map known: the mean is the same for all. Samples are new to it, so that it has no folds."""
    rows = choose_frames(job.frames.n_frames, FORCE_MAP_FRAMES)
    forces = oracle(job.frames.positions[rows].astype(np.float64), job.get_boxes(rows))
    return MapSample(job.system, job.bead_map, forces, split_in_blocks(len(rows))).fit("optimal_cv")[0]


def _choose_step(job: _Job, oracle: ForceOracle, force_map: ForceMap) -> StepScan:
    rows = job.chosen[choose_frames(len(job.chosen), SCAN_FRAMES)]
    probes = draw_probes("rademacher", rows, 1, job.bead_map.n_beads, job.settings.seed)
    scan = scan_step(oracle, job.frames.positions[rows], probes, force_map.weights, job.get_boxes(rows))
    logger.info("finite-difference step %.1e nm, relative error of an HVP %.1e", scan.step_nm, scan.relative_error)
    return scan


def _fill(job: _Job, group: Any, path: PathLike, progress: bool) -> None:
    done = read_array(group, "done", path).astype(bool)
    todo = np.flatnonzero(~done).tolist()
    if not todo:
        return
    if done.any():
        logger.info("%s: %d of %d configurations are done already", path, int(done.sum()), len(done))
    probes = read_array(group, "probes", path)
    beta = 1.0 / compute_kt(job.system.temperature_K)
    bar = track(f"reference {job.system.name}", len(done), "configurations", done=int(done.sum()), show=progress)
    accepted = []
    with bar as advance:
        for k, samples in zip(todo, _sample(job, group, path, probes, todo), strict=True):
            values = average_samples(samples, probes[k], beta, job.settings.blocks)
            with explain_disk_errors(path):
                group["positions"][k] = job.bead_map.map_positions(job.frames.positions[job.chosen[k]])
                for name, value in zip(("forces", "force_errors", "hvps", "hvp_errors"), values, strict=True):
                    group[name][k] = value
                group["done"][k] = 1
            accepted.append(samples.accepted)
            advance(1)
    _report_exchanges(path, [share for share in accepted if share is not None])


def _report_exchanges(path: PathLike, accepted: list[float]) -> None:
    """Say how well the ladder of temperatures works, where there is one."""
    if not accepted:
        return
    mean = float(np.mean(accepted))
    logger.info("%s: %.0f %% of the exchanges between temperatures were accepted", path, 100 * mean)
    if mean < MIN_ACCEPTED:
        logger.warning("%s: hot chains hardly reach the ensemble: put reference.ladder_K closer together", path)


def _sample(
    job: _Job, group: Any, path: PathLike, probes: NDArray[np.float64], todo: list[int]
) -> Iterator[HeldSamples]:
    """Samples of the configurations ``todo``, one a process at a time."""
    platform = _get_platform(job, group)
    weights = read_array(group, "force_map", path)
    step_nm = float(group.attrs["finite_difference"]["step_nm"])
    workers = None if job.settings.workers == "auto" else int(job.settings.workers)
    sampler = HeldSampler(
        job.system, job.bead_map, platform.name, platform.properties, step_nm, job.settings.seed, workers
    )
    parts = []
    for k in todo:
        rows = job.chosen[k : k + 1]
        parts.append(Starts(rows, job.frames.positions[rows], probes[k : k + 1], weights, job.get_boxes(rows)))
    return (samples for (samples,) in sampler.sample(parts, job.chains))


def _get_platform(job: _Job, group: Any) -> PlatformChoice:
    """The platform the file was begun on where the user leaves it open and it is still here, else a new choice."""
    begun = group.attrs["platform"]
    if job.settings.platform != "auto":
        return _choose_platform(job, job.settings.platform)
    try:
        _choose_platform(job, begun["name"])
    except BackendError as error:
        logger.info("%s; another platform goes on", error)
        return _choose_platform(job, "auto")
    return PlatformChoice(begun["name"], dict(begun["properties"]))
