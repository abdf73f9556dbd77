"""CG molecular dynamics: Langevin, many replicas; resumes after a kill, stops on a blow-up."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app

from openmm_hvpcg.config import SimulationSettings
from openmm_hvpcg.cores import choose_torch_threads, use_torch_threads
from openmm_hvpcg.errors import BackendError, InputError, UnstableSimulationError
from openmm_hvpcg.frames import check_finite
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.progress import track
from openmm_hvpcg.simulation.backends import choose_platform, resolve_backend
from openmm_hvpcg.simulation.copies import CopiesInOneSystem, Mover, Snapshot
from openmm_hvpcg.simulation.exchange import TemperatureLadder, list_temperatures
from openmm_hvpcg.simulation.outputs import (
    CHECKPOINT_NAME,
    TOPOLOGY_NAME,
    Checkpoint,
    RunWriter,
    load_checkpoint,
    save_checkpoint,
    trajectory_names,
)
from openmm_hvpcg.simulation.results import (
    RESULT_NAME,
    STUDY_NAME,
    SimulationResult,
    collect_versions,
    load_result,
    read_study,
)
from openmm_hvpcg.simulation.stability import build_limits, compute_temperatures, find_blow_up
from openmm_hvpcg.simulation.system import CGPotential, CGTopology, load_any_potential
from openmm_hvpcg.storage import PathLike, check_free_space, compute_hash, write_json
from openmm_hvpcg.units import NS_PER_PS, PS_PER_FS, SECONDS_PER_DAY

logger = logging.getLogger(__name__)


def simulate(
    potential: CGPotential | PathLike,
    initial_positions: NDArray[Any],
    settings: SimulationSettings,
    out: PathLike,
    *,
    temperature_K: float | None = None,
    topology: CGTopology = None,
    progress: bool = True,
    checkpoint_interval_s: float = 20.0,
) -> SimulationResult:
    """Run ``settings.replicas`` copies and write them to the folder ``out``.

    They are independent and at one temperature, or, with ``settings.exchange``, at as many temperatures, which they
    swap (:mod:`~openmm_hvpcg.simulation.exchange`). ``out`` gets ``topology.pdb``, one trajectory a replica (each
    frame centred on its centroid), ``energies.csv`` (total potential energy; kinetic temperature of each replica; with
    exchange its bath and its energy, too), ``run.json`` (what is being run) and, at the end, ``result.json``. Called
    again on a killed run it goes on from the last checkpoint, on the Reference platform bit for bit as if nothing had
    happened; called again on a finished one it returns the stored result.

    Parameters
    ----------
    potential : or the path of a potential file
    initial_positions : (n, B, 3) nm, frames to start from; the replicas take evenly spaced ones
    settings : the ``simulation`` section of a protocol
    temperature_K : of the bath, with exchange of the coldest; the potential's own where None
    topology : another molecule than the one the potential is bound to; see :meth:`CGPotential.createSystem`
    progress : show a progress bar
    checkpoint_interval_s : seconds of work that a kill may cost

    Raises
    ------
    InputError
        The frames do not fit the molecule; exchange without a temperature above ``temperature_K``.
    StudyError
        The folder holds a run of something else; what differs is named.
    BackendError
        Backend or platform cannot run here.
    UnstableSimulationError
        A replica blew up; good frames and ``result.json`` are kept.
    """
    potential = load_any_potential(potential)
    molecule = potential.resolve_molecule(topology)
    starts = choose_starts(initial_positions, molecule.n_beads, settings.replicas)
    temperature = potential.spec.temperature_K if temperature_K is None else float(temperature_K)
    if temperature != potential.spec.temperature_K:
        logger.warning(
            "simulating at %g K with a potential trained at %g K: it is a free energy at that temperature",
            temperature,
            potential.spec.temperature_K,
        )
    temperatures = list_temperatures(settings, temperature)
    folder = Path(out)
    study = {
        "settings": settings.model_dump(),
        "temperature_K": temperature,
        "potential": potential.hash,
        "molecule": compute_hash(molecule.hash, molecule.masses),
        "initial positions": compute_hash(starts),
    }
    stored = read_study(folder, study)
    if (folder / RESULT_NAME).exists():
        return _return_stored(folder)
    backend = resolve_backend(settings.backend) if stored is None else stored["backend"]
    copies = settings.replicas if settings.exchange is None else 1
    system = potential.createSystem(topology, copies, backend, settings.priors)
    one_replica = potential.createTopology(topology)
    if stored is None:
        stored = _prepare_folder(folder, study, system, starts, molecule, backend, copies)
    plan = _Plan(folder, stored, settings, molecule, one_replica, system, starts, temperatures)
    with use_torch_threads(stored["torch_threads"]):
        return _Run(plan, checkpoint_interval_s).run(progress)


def choose_starts(initial_positions: NDArray[Any], n_beads: int, replicas: int) -> NDArray[np.float64]:
    """Start positions (K, B, 3) nm: evenly spaced frames of (n, B, 3), repeated if there are fewer."""
    frames = np.asarray(initial_positions)
    if frames.ndim != 3 or frames.shape[1:] != (n_beads, 3) or len(frames) == 0:
        raise InputError(
            "initial positions do not fit the molecule", expected=f"(n, {n_beads}, 3) nm", got=frames.shape
        )
    check_finite(frames, "initial positions")
    index = ((np.arange(replicas) + 0.5) * len(frames) / replicas).astype(int)
    return frames[index].astype(np.float64)


def _return_stored(folder: Path) -> SimulationResult:
    result = load_result(folder)
    if not result.stable:
        raise UnstableSimulationError(result.message)
    logger.info("%s is finished; nothing to run", folder)
    return result


def _prepare_folder(
    folder: Path,
    study: dict[str, Any],
    system: openmm.System,
    starts: NDArray[np.float64],
    molecule: BeadMap,
    backend: str,
    copies: int,
) -> dict[str, Any]:
    """Decide how to run; write ``topology.pdb`` and, last, ``run.json``, which makes the folder ours."""
    settings = study["settings"]
    replicas, n_beads = starts.shape[:2]
    check_free_space(folder, (settings["n_steps"] // settings["save_every"]) * replicas * n_beads * 12)
    threads, timestep_ps = choose_torch_threads(n_beads, copies), settings["timestep_fs"] * PS_PER_FS
    with use_torch_threads(threads):
        choice = choose_platform(
            system, starts[:copies].reshape(-1, 3), settings["platform"], timestep_ps, study["temperature_K"]
        )
    stored = {
        "study": study,
        "backend": backend,
        "platform": choice.name,
        "measured_steps_per_second": choice.steps_per_second,
        "torch_threads": threads,
    }
    molecule.save_pdb(folder / TOPOLOGY_NAME, starts[0] - starts[0].mean(axis=0))
    write_json(folder / STUDY_NAME, stored)
    return stored


@dataclass(frozen=True)
class _Plan:
    """Everything a run needs: where, how (``run.json``), of what, from where."""

    folder: Path
    stored: dict[str, Any]
    settings: SimulationSettings
    molecule: BeadMap
    topology: app.Topology
    system: openmm.System
    starts: NDArray[np.float64]
    temperatures_K: NDArray[np.float64]


class _Run:
    """One simulation in progress."""

    def __init__(self, plan: _Plan, checkpoint_interval_s: float) -> None:
        self.folder, self.stored, self.settings = plan.folder, plan.stored, plan.settings
        self.molecule = plan.molecule
        self.temperature: float = plan.stored["study"]["temperature_K"]
        self.checkpoint_interval_s = checkpoint_interval_s
        self.limits = build_limits(plan.starts, plan.molecule.bonds, float(plan.temperatures_K[-1]))
        self.writer = RunWriter(
            plan.folder,
            plan.topology,
            replicas=self.settings.replicas,
            trajectory_format=self.settings.trajectory_format,
            save_every=self.settings.save_every,
            timestep_fs=self.settings.timestep_fs,
            exchange=self.settings.exchange is not None,
        )
        checkpoint = load_checkpoint(self.folder)
        self.step = 0 if checkpoint is None else checkpoint.step
        self.wall_before = 0.0 if checkpoint is None else checkpoint.wall_time_s
        self.mover = self._build_mover(plan)
        if checkpoint is None:
            self.writer.start()
            self.mover.start(self.step)
        else:
            logger.info("%s: going on from step %d", self.folder, self.step)
            self.writer.resume(checkpoint)
            self.mover.load(checkpoint.context, checkpoint.arrays, self.folder)

    def _build_mover(self, plan: _Plan) -> Mover:
        platform = self.stored["platform"]
        if self.settings.exchange is None:
            return CopiesInOneSystem(plan.system, plan.starts, self.settings, self.temperature, platform, self.step)
        return TemperatureLadder(
            plan.system, plan.topology, plan.starts, self.settings, plan.temperatures_K, platform, self.step
        )

    def run(self, progress: bool) -> SimulationResult:
        settings = self.settings
        self.started = last_checkpoint = time.perf_counter()
        what = f"simulate {self.folder.parent.name}/{self.folder.name}"
        ns_per_step = self._simulated_ns(1)
        with track(what, settings.n_steps, "steps", done=self.step, show=progress, ns_per_item=ns_per_step) as advance:
            while self.step < settings.n_steps:
                before = self.step
                self._advance()
                advance(self.step - before)
                now = time.perf_counter()
                if now - last_checkpoint >= self.checkpoint_interval_s and self.step < settings.n_steps:
                    self._checkpoint()
                    last_checkpoint = now
        return self._finish(True, "finished")

    def _advance(self) -> None:
        """Integrate to the next look at the replicas; keep a frame where one is due."""
        every = self.settings.save_every
        n_steps = min(self.mover.stretch, every - self.step % every, self.settings.n_steps - self.step)
        try:
            snapshot = self.mover.advance(n_steps)
        except openmm.OpenMMException as error:
            if "NaN" in str(error):
                self._stop(self.step + n_steps, None, str(error))
            raise BackendError(
                f"OpenMM stopped after step {self.step} ({str(error).splitlines()[0]})", where=self.folder
            ) from error
        temperatures = self._check(snapshot, self.step + n_steps)
        self.step += n_steps
        if self.step % every == 0:
            self.writer.add(self.step, snapshot, temperatures)

    def _check(self, snapshot: Snapshot, step: int) -> NDArray[np.float64]:
        """Kinetic temperatures (K,) of the replicas; stops the run where one blew up."""
        with np.errstate(over="ignore", invalid="ignore"):
            temperatures = compute_temperatures(snapshot.velocities, self.molecule.masses)
            energy = float(snapshot.energies.sum())
            found = find_blow_up(snapshot.positions, temperatures, energy, self.molecule.bonds, self.limits)
        if found is not None:
            self._stop(step, *found)
        return temperatures

    def _stop(self, step: int, replica: int | None, what: str) -> None:
        who = "a replica" if replica is None else f"replica {replica}"
        kept = (self.step // self.settings.save_every) * self.settings.save_every
        message = (
            f"{self.folder}: {who} blew up by step {step}: {what}. Frames up to step {kept} are kept. "
            "Try a shorter timestep_fs, or train longer or on more frames"
        )
        self._finish(False, message)
        raise UnstableSimulationError(message)

    def _checkpoint(self) -> None:
        sizes = self.writer.flush()
        wall = self.wall_before + time.perf_counter() - self.started
        content, arrays = self.mover.dump()
        save_checkpoint(self.folder, Checkpoint(content, self.step, self.writer.n_frames, sizes, wall, arrays))

    def _simulated_ns(self, n_steps: int) -> float:
        return n_steps * self.settings.replicas * self.settings.timestep_fs * PS_PER_FS * NS_PER_PS

    def _finish(self, stable: bool, message: str) -> SimulationResult:
        wall = self.wall_before + time.perf_counter() - self.started
        self.writer.flush()
        simulated = self._simulated_ns(self.step)
        result = SimulationResult(
            stable=stable,
            message=message,
            n_steps=self.step,
            n_frames=self.writer.n_frames,
            replicas=self.settings.replicas,
            simulated_ns=simulated,
            wall_time_s=wall,
            steps_per_second=self.step / wall,
            ns_per_day=simulated / wall * SECONDS_PER_DAY,
            temperature_K=self.temperature,
            backend=self.stored["backend"],
            platform=self.stored["platform"],
            torch_threads=self.stored["torch_threads"],
            seed=self.settings.seed,
            potential_hash=self.stored["study"]["potential"],
            trajectories=tuple(
                name
                for name in trajectory_names(self.settings.replicas, self.settings.trajectory_format)
                if (self.folder / name).exists()
            ),
            settings=self.stored["study"]["settings"],
            versions=collect_versions(),
            exchange=self.mover.describe(),
        )
        write_json(self.folder / RESULT_NAME, asdict(result))
        (self.folder / CHECKPOINT_NAME).unlink(missing_ok=True)
        if stable:
            logger.info("%s: %.0f steps/s, %.4g ns/day", self.folder, result.steps_per_second, result.ns_per_day)
        return result
