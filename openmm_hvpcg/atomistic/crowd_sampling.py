"""All walkers of a molecule in one OpenMM System: how a GPU, idle with one small molecule, samples many.

The walkers do not feel each other (:mod:`openmm_hvpcg.atomistic.crowd`); each gets velocities and noise of its own.
Frames and the state after them are put on disk as those of walkers in processes are, and a killed run goes on from
there.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_hvpcg.atomistic.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from openmm_hvpcg.atomistic.crowd import build_crowd
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.periodic import recentre
from openmm_hvpcg.atomistic.platforms import GPU_PLATFORMS, PlatformChoice
from openmm_hvpcg.atomistic.pool import Meter
from openmm_hvpcg.atomistic.walker import (
    MAX_TEMPERATURE_RATIO,
    MINIMIZE_ITERATIONS,
    MINIMIZE_TOLERANCE,
    PROGRESS_SECONDS,
)
from openmm_hvpcg.config import SamplingSettings
from openmm_hvpcg.errors import InputError, UnstableSimulationError
from openmm_hvpcg.frames import FramesStore
from openmm_hvpcg.units import BOLTZMANN, PS_PER_FS

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "crowd.chk"
#: Between two looks at where the walkers are, ps: free molecules drift by far less than the room between them.
LOOK_PS = 10.0
#: Sets the seeds of a crowd apart from those of walkers in processes.
CROWD = 1 << 20


def use_one_system(
    system: AtomisticSystem, settings: SamplingSettings, store: FramesStore, checkpoints: Path, choice: PlatformChoice
) -> bool:
    """Whether the walkers go into one System; a run goes on in the way it began.

    Raises
    ------
    InputError
        ``walkers_in`` is one_system, and the System does not allow it.
    """
    if (checkpoints / CHECKPOINT_NAME).exists():
        return True
    begun = any(store.count_done(w) for w in range(len(store.counts))) or any(checkpoints.glob("walker_*.chk"))
    if settings.walkers_in == "processes" or begun:
        return False
    if settings.walkers_in == "auto" and (choice.name not in GPU_PLATFORMS or settings.walkers == 1):
        return False
    try:
        build_crowd([system.system])
    except InputError as error:
        if settings.walkers_in == "one_system":
            raise InputError(
                f"walkers_in: one_system cannot be ({error.problem})",
                where=system.name or None,
                hint="set sampling.walkers_in to processes",
            ) from error
        return False
    return True


class CrowdRun:
    """The walkers of a store in one Context.

    Parameters
    ----------
    system, settings, store : as :func:`~openmm_hvpcg.atomistic.sampling.sample_frames` has them
    checkpoints : folder of the state
    choice : platform
    checkpoint_seconds : time between states on disk
    """

    def __init__(
        self,
        system: AtomisticSystem,
        settings: SamplingSettings,
        store: FramesStore,
        checkpoints: Path,
        choice: PlatformChoice,
        checkpoint_seconds: float,
    ) -> None:
        self._system = system
        self._settings = settings
        self._store = store
        self._path = checkpoints / CHECKPOINT_NAME
        self._choice = choice
        self._checkpoint_seconds = checkpoint_seconds
        self._n_walkers = len(store.counts)
        self._crowd = build_crowd([system.system] * self._n_walkers)
        masses = [system.system.getParticleMass(i).value_in_unit(unit.amu) for i in range(system.n_atoms)]
        self._masses = np.array(masses)
        self._dof = max(1, 3 * int(np.count_nonzero(self._masses)) - system.system.getNumConstraints())
        self._buffer: list[NDArray[np.float32]] = []
        self._frame = self._equilibrated = 0

    def run(self, meter: Meter) -> None:
        """Equilibrate, then make the frames that are missing.

        Raises
        ------
        UnstableSimulationError
            A walker blew up; finished frames are kept.
        """
        settings = self._settings
        context = self._start()
        meter.add_steps(self._n_walkers * (self._equilibrated + self._frame * settings.stride))
        self._flushed = time.monotonic()
        try:
            while self._equilibrated < settings.equilibration_steps:
                steps = min(self._look_steps, settings.equilibration_steps - self._equilibrated)
                self._advance(context, steps, meter)
                self._equilibrated += steps
                self._flush_if_due(context)
            while self._frame < max(self._store.counts):
                for first in range(0, settings.stride, self._look_steps):
                    positions = self._advance(context, min(self._look_steps, settings.stride - first), meter)
                self._buffer.append(np.stack([recentre(x) for x in positions]).astype(np.float32))
                self._frame += 1
                self._flush_if_due(context)
        except (UnstableSimulationError, openmm.OpenMMException) as error:
            self._store_frames()
            if isinstance(error, openmm.OpenMMException) and "nan" not in str(error).lower():
                raise
            when = f"after frame {self._frame - 1}" if self._frame else "before its first frame"
            raise UnstableSimulationError(
                f"a walker blew up {when} ({error})",
                where=self._store.path,
                hint="finished frames are kept; use a shorter timestep_fs or constraints: hbonds",
            ) from error
        self._flush(context)

    @property
    def _look_steps(self) -> int:
        return max(1, int(LOOK_PS / (self._settings.timestep_fs * PS_PER_FS)))

    def _start(self) -> openmm.Context:
        """A Context where the run was left, or at the start."""
        settings, temperature = self._settings, self._system.temperature_K
        stored = min(self._store.count_done(w) for w in range(self._n_walkers))
        checkpoint = read_checkpoint(self._path)
        if checkpoint is not None and (checkpoint.frame > stored or checkpoint.platform != self._choice.name):
            logger.warning("%s: its state is of other frames or another platform and not used", self._store.path)
            checkpoint = None
        self._frame = checkpoint.frame if checkpoint else stored
        self._equilibrated = checkpoint.equilibrated if checkpoint else (settings.equilibration_steps if stored else 0)
        # Generators that a checkpoint does not hold must not repeat what they gave before.
        sequence = np.random.SeedSequence([settings.seed, CROWD, self._frame, self._equilibrated])
        velocities, noise = (int(s % (2**31 - 1)) + 1 for s in sequence.generate_state(2))
        integrator = openmm.LangevinMiddleIntegrator(
            temperature, settings.friction_per_ps, settings.timestep_fs * PS_PER_FS
        )
        integrator.setRandomNumberSeed(noise)
        context = self._choice.make_context(self._crowd.system, integrator)
        if checkpoint is not None:
            context.loadCheckpoint(checkpoint.state)
            return context
        if stored:
            logger.warning("%s: goes on from frame %d with fresh velocities", self._store.path, stored - 1)
        context.setPositions(self._crowd.place(self._read_starts(stored)))
        if not stored:
            openmm.LocalEnergyMinimizer.minimize(context, MINIMIZE_TOLERANCE, MINIMIZE_ITERATIONS)
        context.applyConstraints(1e-6)
        context.setVelocitiesToTemperature(temperature, velocities)
        self._write_state(context)
        return context

    def _read_starts(self, stored: int) -> list[NDArray[np.float64]]:
        if not stored:
            return [self._system.positions] * self._n_walkers
        rows = [self._store.read_rows(walker, stored - 1, stored)[0][0] for walker in range(self._n_walkers)]
        return [row.astype(np.float64) for row in rows]

    def _advance(self, context: openmm.Context, steps: int, meter: Meter) -> list[NDArray[np.float64]]:
        """Positions of the walkers after so many steps; drifted ones are put back."""
        done = 0
        block = 1
        while done < steps:
            began = time.perf_counter()
            size = min(block, steps - done)
            context.getIntegrator().step(size)
            done += size
            meter.add_steps(size * self._n_walkers, new=True)
            # Grouping steps does not change the trajectory.
            block = block * 2 if time.perf_counter() - began < PROGRESS_SECONDS else max(1, block // 2)
        state = context.getState(getPositions=True, getVelocities=True)
        positions = np.asarray(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        velocities = np.asarray(state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond))
        self._check_temperatures(velocities)
        parts = self._crowd.split(positions)
        if self._crowd.find_drifted(positions):
            context.setPositions(self._crowd.place(parts))
        return parts

    def _check_temperatures(self, velocities: NDArray[np.float64]) -> None:
        kinetic = np.array([(self._masses[:, None] * v**2).sum() for v in self._crowd.split(velocities)])
        temperatures = kinetic / (self._dof * BOLTZMANN)
        hottest = int(np.argmax(np.where(np.isfinite(temperatures), temperatures, np.inf)))
        if not temperatures[hottest] <= MAX_TEMPERATURE_RATIO * self._system.temperature_K:
            raise UnstableSimulationError(
                f"the kinetic temperature of walker {hottest} reached {temperatures[hottest]:.3g} K"
            )

    def _flush_if_due(self, context: openmm.Context) -> None:
        if time.monotonic() - self._flushed >= self._checkpoint_seconds:
            self._flush(context)

    def _flush(self, context: openmm.Context) -> None:
        """Frames, then the state after them: never a state ahead of its frames."""
        self._store_frames()
        self._write_state(context)
        self._flushed = time.monotonic()

    def _store_frames(self) -> None:
        first = self._frame - len(self._buffer)
        for walker, count in enumerate(self._store.counts):
            # A kill between frames and state leaves frames that the resumed run makes once more.
            known = self._store.count_done(walker) - first
            fresh = self._buffer[known : max(0, count - first)]
            if fresh:
                self._store.append(walker, np.stack([frame[walker] for frame in fresh]), None)
        self._buffer.clear()

    def _write_state(self, context: openmm.Context) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint(self._frame, self._equilibrated, self._choice.name, context.createCheckpoint())
        write_checkpoint(self._path, checkpoint)
