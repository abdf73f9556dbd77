"""What moves the replicas of a run: here all of them in one System, at one temperature.

:class:`~openmm_hvpcg.simulation.exchange.TemperatureLadder` is the other way. Both give a :class:`Snapshot` after
each stretch of steps, and all they need to go on after a kill.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_hvpcg.config import SimulationSettings
from openmm_hvpcg.errors import StudyError
from openmm_hvpcg.simulation.backends import create_context
from openmm_hvpcg.units import PS_PER_FS

#: Steps between looks at the replicas' health, at most.
CHECK_STEPS = 100
#: Calls after which TorchScript has settled: one or two profile it, the next optimises.
WARM_UP_CALLS = 4


@dataclass(frozen=True)
class Snapshot:
    """The replicas after a stretch of steps.

    Attributes
    ----------
    positions, velocities : (K, B, 3) nm, nm/ps
    energies : potential energies kJ/mol, of each replica (K,) or, where only that is known, their sum (1,)
    states : (K,) index of each replica's bath temperature, or None with one bath for all
    """

    positions: NDArray[np.float64]
    velocities: NDArray[np.float64]
    energies: NDArray[np.float64]
    states: NDArray[np.int64] | None = None


class Mover(Protocol):
    """What :mod:`openmm_hvpcg.simulation.run` asks of whatever moves the replicas."""

    #: Steps of each :meth:`advance`; fewer where a frame is due.
    stretch: int

    def start(self, step: int) -> None:
        """Place the replicas at their starts with fresh velocities."""

    def advance(self, n_steps: int) -> Snapshot:
        """Integrate every replica; errors of OpenMM come through."""

    def dump(self) -> tuple[bytes, dict[str, NDArray[Any]]]:
        """OpenMM's checkpoint, and arrays for what it does not hold."""

    def load(self, checkpoint: bytes, arrays: dict[str, NDArray[Any]], folder: Path) -> None:
        """Inverse of :meth:`dump`."""

    def describe(self) -> dict[str, Any] | None:
        """Figures of its own for ``result.json``."""


def derive_seed(seed: int, purpose: int, step: int) -> int:
    """A seed for OpenMM, never its "choose one" 0.

    It changes with the step a run resumes from: platforms other than Reference restart their noise there.
    """
    return int(np.random.SeedSequence([seed, purpose, step]).generate_state(1)[0] % (2**31 - 2)) + 1


def build_integrator(settings: SimulationSettings, temperature_K: float, step: int) -> openmm.LangevinMiddleIntegrator:
    """The Langevin integrator of a run that begins, or goes on, at ``step``."""
    integrator = openmm.LangevinMiddleIntegrator(
        temperature_K, settings.friction_per_ps, settings.timestep_fs * PS_PER_FS
    )
    integrator.setRandomNumberSeed(derive_seed(settings.seed, 0, step))
    return integrator


def warm_up(context: openmm.Context, positions: NDArray[np.float64]) -> None:
    """Let TorchScript rewrite itself before the first step.

    It does so during its first calls, which changes the last bits of its forces; so a resumed run goes on with the code
    it was killed in.
    """
    context.setPositions(positions)
    for _ in range(WARM_UP_CALLS):
        context.getState(forces=True)
        context.getState(energy=True)


def load_context(context: openmm.Context, checkpoint: bytes, folder: Path) -> None:
    """Load OpenMM's checkpoint, or raise a :class:`StudyError`."""
    try:
        context.loadCheckpoint(checkpoint)
    except openmm.OpenMMException as error:
        raise StudyError(
            f"this OpenMM cannot read the checkpoint ({error})",
            where=folder,
            hint="resume on the machine it was written on, or remove the folder",
        ) from error


def read_state(state: openmm.State, shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions nm and velocities nm/ps of an OpenMM state, in a shape."""
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    velocities = state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
    return positions.reshape(shape), velocities.reshape(shape)


class CopiesInOneSystem:
    """Independent replicas in one System at one temperature: one batched call of the network moves all.

    Parameters
    ----------
    system : of all replicas
    starts : (K, B, 3) nm
    step : the run begins, or goes on, here
    """

    stretch = CHECK_STEPS

    def __init__(
        self,
        system: openmm.System,
        starts: NDArray[np.float64],
        settings: SimulationSettings,
        temperature_K: float,
        platform: str,
        step: int,
    ) -> None:
        self.starts, self.settings, self.temperature_K = starts, settings, temperature_K
        self.context = create_context(system, build_integrator(settings, temperature_K, step), platform)
        warm_up(self.context, starts.reshape(-1, 3))

    def start(self, step: int) -> None:
        self.context.setPositions(self.starts.reshape(-1, 3))
        self.context.setVelocitiesToTemperature(self.temperature_K, derive_seed(self.settings.seed, 1, step))

    def advance(self, n_steps: int) -> Snapshot:
        self.context.getIntegrator().step(n_steps)
        state = self.context.getState(positions=True, velocities=True, energy=True)
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        return Snapshot(*read_state(state, self.starts.shape), np.array([energy]))

    def dump(self) -> tuple[bytes, dict[str, NDArray[Any]]]:
        return self.context.createCheckpoint(), {}

    def load(self, checkpoint: bytes, arrays: dict[str, NDArray[Any]], folder: Path) -> None:
        load_context(self.context, checkpoint, folder)

    def describe(self) -> dict[str, Any] | None:
        return None
