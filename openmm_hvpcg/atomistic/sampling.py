"""All-atom molecular dynamics to frames: several walkers at once, resumable at any moment."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from openmm_hvpcg.atomistic.checkpoints import read_checkpoint
from openmm_hvpcg.atomistic.crowd_sampling import CHECKPOINT_NAME, CrowdRun, use_one_system
from openmm_hvpcg.atomistic.flattening import DihedralBias
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.parts import find_parts, gather_parts, open_part
from openmm_hvpcg.atomistic.platforms import PlatformChoice, choose_platform
from openmm_hvpcg.atomistic.pool import Meter, WalkerPool
from openmm_hvpcg.config import SamplingSettings
from openmm_hvpcg.cores import count_cores
from openmm_hvpcg.errors import BackendError, StudyError
from openmm_hvpcg.frames import FramesStore, topology_to_json
from openmm_hvpcg.progress import console
from openmm_hvpcg.storage import PathLike
from openmm_hvpcg.units import PS_PER_FS

logger = logging.getLogger(__name__)

#: Settings that frames are not told apart by.
UNRECORDED = {"platform", "precision", "flexible_beads", "walkers_in", "flatten", "flatten_frames"}
#: How long a walker goes on before its frames and its state are put on disk, s.
CHECKPOINT_SECONDS = 5.0


def sample_frames(
    system: AtomisticSystem,
    settings: SamplingSettings,
    path: PathLike,
    *,
    bias: DihedralBias | None = None,
    progress: bool = True,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> FramesStore:
    """Run LangevinMiddle dynamics and store a frame every ``settings.stride`` steps.

    Each walker is minimised, gets velocities of its own and is equilibrated. Walkers run at once in processes
    of their own, or, where a GPU would be idle with one of them, all in one System
    (:mod:`~openmm_hvpcg.atomistic.crowd_sampling`). Every ``checkpoint_seconds`` the frames made are added to the
    store and OpenMM's checkpoint is put beside it, in ``<path without suffix>.checkpoints/``; the same call goes on
    from there after a kill. On the Reference platform the result is, bit for bit, that of an uninterrupted run.

    Parameters
    ----------
    system : the molecule; frames are drawn at ``system.temperature_K``
    settings : ``n_frames`` over all walkers, the first of which take the remainder
    path : frames store, new or begun with the same system, settings and bias
    bias : added to the System here, and recorded; the frames count as those of the System without it
    progress : show a progress bar with ns/day and time left on standard error

    Returns
    -------
    FramesStore, complete: positions float32 nm; without periodic boundaries the centroid is at the origin,
        with them molecules are whole and nearest to the first one. Systems held in space (external forces)
        are stored where they are.

    Raises
    ------
    StudyError
        ``path`` holds frames of another system or other settings.
    UnstableSimulationError
        A walker blew up (named with its last good frame); finished frames are kept.
    BackendError
        The platform is not here or failed.
    """
    path = Path(path)
    store = _open_or_create(system, settings, path, bias)
    gather_parts(store)
    checkpoints = path.with_suffix(".checkpoints")
    left = [w for w in range(settings.walkers) if store.count_done(w) < store.counts[w]]
    if left:
        system = _add_bias(system, bias)
        cores = count_cores()
        workers = min(len(left), cores)
        choice = _choose_platform(system, settings, checkpoints, max(1, cores // workers))
        with _show_progress(system, settings, store, progress) as meter:
            if use_one_system(system, settings, store, checkpoints, choice):
                CrowdRun(system, settings, store, checkpoints, choice, checkpoint_seconds).run(meter)
            else:
                run = WalkerPool(system, settings, store, checkpoints, choice, checkpoint_seconds)
                run.run_walkers(left, workers, meter)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return store


def sample_walker(
    system: AtomisticSystem,
    settings: SamplingSettings,
    path: PathLike,
    walker: int | None,
    *,
    bias: DihedralBias | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> list[int]:
    """Make the frames of one walker only; :func:`sample_frames` puts them together, and is quick once all are made.

    Calls for different walkers may run at once, on different machines with one file system, after a call for none
    has begun the store. The frames are those that one process would make.

    Parameters
    ----------
    system, settings, path, bias, checkpoint_seconds : those of :func:`sample_frames`, the same in all calls
    walker : its index; None only begins the store

    Returns
    -------
    list of int, the walkers that ``path`` does not hold whole yet

    Raises
    ------
    StudyError, UnstableSimulationError, BackendError
        As :func:`sample_frames`.
    """
    path = Path(path)
    store = _open_or_create(system, settings, path, bias)
    unfinished = [w for w in range(settings.walkers) if store.count_done(w) < store.counts[w]]
    if walker is not None and walker in unfinished:
        part = open_part(store, walker)
        if not part.is_complete:
            system = _add_bias(system, bias)
            checkpoints = path.with_suffix(".checkpoints")
            choice = _choose_platform(system, settings, checkpoints, count_cores())
            run = WalkerPool(system, settings, part, checkpoints, choice, checkpoint_seconds)
            with _show_progress(system, settings, part, False) as meter:
                run.run_walkers([walker], 1, meter)
    return unfinished


def spread_frames(n_frames: int, walkers: int) -> list[int]:
    """Frames of each walker; the first ones take the remainder."""
    return [n_frames // walkers + (w < n_frames % walkers) for w in range(walkers)]


def _add_bias(system: AtomisticSystem, bias: DihedralBias | None) -> AtomisticSystem:
    return system if bias is None else replace(system, system=bias.add_to(system.system, system.temperature_K))


def _open_or_create(
    system: AtomisticSystem, settings: SamplingSettings, path: Path, bias: DihedralBias | None
) -> FramesStore:
    # Platform and precision may change between runs: they change speed and rounding, not the ensemble. Flexible beads
    # change the System, and its hash tells; the bias is recorded as it is.
    recorded = settings.model_dump(mode="json", exclude=UNRECORDED)
    provenance = {"system": system.provenance, "system_hash": system.system_hash, "sampling": recorded}
    if bias is not None:
        provenance["bias"] = bias.describe()
    if not path.exists():
        # Checkpoints without their frames belong to a store that was moved away.
        shutil.rmtree(path.with_suffix(".checkpoints"), ignore_errors=True)
        shutil.rmtree(find_parts(path), ignore_errors=True)
        return FramesStore.create(
            path,
            system.topology,
            spread_frames(settings.n_frames, settings.walkers),
            temperature_K=system.temperature_K,
            interval_ps=settings.stride * settings.timestep_fs * PS_PER_FS,
            periodic=system.is_periodic,
            provenance=provenance,
        )
    store = FramesStore.open(path, mode="r+")
    found = store.attributes.get("provenance", {})
    differences = [
        f"{key} was {found.get('sampling', {}).get(key)}, now {value}"
        for key, value in recorded.items()
        if found.get("sampling", {}).get(key) != value
    ]
    if store.attributes["topology"] != topology_to_json(system.topology):
        differences.append(f"the topology was another ({store.topology.n_atoms} atoms, now {system.n_atoms})")
    elif found.get("system_hash") != system.system_hash:
        differences.append("the System was another")
    if store.attributes["temperature_K"] != system.temperature_K:
        differences.append(f"temperature_K was {store.attributes['temperature_K']}, now {system.temperature_K}")
    if found.get("bias") != provenance.get("bias"):
        differences.append("the bias (sampling.flatten) was another")
    if differences:
        raise StudyError(
            f"holds frames of another run: {'; '.join(differences)}",
            where=path,
            hint="restore the settings, move the frames away or choose another output folder",
        )
    return store


def _choose_platform(
    system: AtomisticSystem, settings: SamplingSettings, checkpoints: Path, threads: int
) -> PlatformChoice:
    """The platform the checkpoints were made on where the user left it open, else the fastest."""
    choose = functools.partial(
        choose_platform,
        system.system,
        system.positions,
        precision=settings.precision,
        purpose="dynamics",
        box=system.box,
        threads=threads,
    )
    if settings.platform == "auto":
        states = [*sorted(checkpoints.glob("walker_*.chk")), checkpoints / CHECKPOINT_NAME]
        made_on = {c.platform for c in map(read_checkpoint, states) if c}
        if len(made_on) == 1:
            with contextlib.suppress(BackendError):
                choice = choose(platform=made_on.pop())
                logger.info("platform %s, on which the run began", choice.name)
                return choice
    return choose(platform=settings.platform)


@contextlib.contextmanager
def _show_progress(
    system: AtomisticSystem, settings: SamplingSettings, store: FramesStore, progress: bool
) -> Iterator[Meter]:
    steps = sum(settings.equilibration_steps + n * settings.stride for n in store.counts)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not progress) as bar:
        finished = sum(
            settings.equilibration_steps + n * settings.stride
            for w, n in enumerate(store.counts)
            if store.count_done(w) == n
        )
        task = bar.add_task(f"sampling {system.name}".rstrip(), total=steps, completed=finished, speed="")
        meter = Meter(bar, task, settings.timestep_fs)
        yield meter
        bar.update(task, completed=steps)
    logger.info(
        "%s: %d frames of %d walkers, %.3g ns at %.0f ns/day",
        system.name or "molecule",
        sum(store.counts),
        sum(n > 0 for n in store.counts),
        meter.ns,
        meter.ns_per_day,
    )
