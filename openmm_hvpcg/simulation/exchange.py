"""Replica exchange in temperature by OpenMM's own ``ReplicaExchangeSampler``.

One replica a temperature. OpenMM's sampler moves them one after the other in one Context, so that a stretch of steps
costs as many calls of the network as there are temperatures; replicas at one temperature share a call instead. What it
buys is barriers: a replica crosses them where it is hot and carries what it finds down to the target temperature.

Every replica has one continuous trajectory, whose temperature changes; which it had in each frame stands in the energy
log, as does its energy, from which :mod:`openmm_hvpcg.analysis.reweighting` weighs the frames of all temperatures.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_hvpcg.config import ExchangeSettings, SimulationSettings
from openmm_hvpcg.errors import BackendError, InputError
from openmm_hvpcg.simulation.backends import find_platform, platform_properties
from openmm_hvpcg.simulation.copies import (
    Snapshot,
    build_integrator,
    derive_seed,
    load_context,
    read_state,
    warm_up,
)
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

#: Neighbours that would swap more rarely than this hold the walk through temperature up.
LOW_ACCEPTANCE = 0.1


def list_temperatures(settings: SimulationSettings, temperature_K: float) -> NDArray[np.float64]:
    """Temperatures (K,) of a run, the coldest, ``temperature_K``, first; that one alone without exchange.

    Raises
    ------
    InputError
        The hottest is not above the coldest.
    """
    if settings.exchange is None:
        return np.array([temperature_K])
    if settings.exchange.hottest_K <= temperature_K:
        raise InputError(
            "the hottest temperature of the exchange is not above the simulation's",
            expected=f"hottest_K above {temperature_K:g}",
            got=f"{settings.exchange.hottest_K:g}",
        )
    return np.geomspace(temperature_K, settings.exchange.hottest_K, settings.exchange.temperatures)


@dataclass
class SwapRecord:
    """How well replicas walk through the temperatures.

    Attributes
    ----------
    heading : (K,) 1 for a replica last at the coldest temperature, -1 for one that came from there to the hottest,
        0 before either
    probabilities : (K - 1,) probability of swapping neighbouring temperatures, summed over ``n_swaps`` occasions
    round_trips : from the coldest to the hottest and back, all replicas
    """

    heading: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    n_swaps: int = 0
    round_trips: int = 0

    @classmethod
    def start(cls, n_states: int) -> SwapRecord:
        return cls(np.zeros(n_states, dtype=np.int64), np.zeros(n_states - 1))

    def add(self, states: NDArray[np.int64], energies: NDArray[np.float64], betas: NDArray[np.float64]) -> None:
        """Count one occasion: temperature index, energy kJ/mol of each replica; 1/kT of each temperature."""
        by_state = energies[np.argsort(states)]
        exponents = np.diff(by_state) * np.diff(betas)
        self.probabilities += np.exp(np.minimum(exponents, 0.0))
        self.n_swaps += 1
        cold, hot = states == 0, states == len(betas) - 1
        self.round_trips += int((cold & (self.heading == -1)).sum())
        self.heading[cold] = 1
        self.heading[hot & (self.heading == 1)] = -1

    @property
    def acceptance(self) -> NDArray[np.float64]:
        return self.probabilities / max(self.n_swaps, 1)


class SeededSampler(app.ReplicaExchangeSampler):
    """OpenMM's sampler with random numbers of its own and a record of its swaps.

    OpenMM's loop over swaps draws from Python's one global generator, which a run can neither seed nor store without
    meddling with everyone else's; and its ``math.exp`` overflows for replicas far apart in energy.
    """

    def __init__(
        self,
        temperatures_K: NDArray[np.float64],
        simulation: app.Simulation,
        every: int,
        generator: np.random.Generator,
    ) -> None:
        super().__init__([{"temperature": t * unit.kelvin} for t in temperatures_K], simulation, every)
        self.betas = 1.0 / np.array([compute_kt(t) for t in temperatures_K])
        self.generator = generator
        self.record = SwapRecord.start(len(temperatures_K))
        self.sampled_states = np.array(self.replicaStateIndex)
        self.energies = np.full(len(temperatures_K), np.nan)

    def exchangeReplicas(self) -> None:
        """As many attempts between random pairs as OpenMM makes, by the same rule."""
        states, n = self.replicaStateIndex, len(self.states)
        kilojoule = unit.kilojoule_per_mole
        # Temperatures differ, the potential does not: a replica's energy is the same in all states.
        self.energies = np.array([of_replica[0].value_in_unit(kilojoule) for of_replica in self.replicaStateEnergy])
        self.sampled_states = np.array(states)
        self.record.add(self.sampled_states, self.energies, self.betas)
        for _ in range(self.exchangesPerIteration):
            i, j = self.generator.choice(n, 2, replace=False).tolist()
            difference = self.betas[states[i]] - self.betas[states[j]]
            if (self.energies[i] - self.energies[j]) * difference >= -self.generator.exponential():
                states[i], states[j] = states[j], states[i]


class TemperatureLadder:
    """Replicas at different temperatures that swap them.

    Parameters
    ----------
    system, topology : of one replica
    starts : (K, B, 3) nm
    temperatures_K : (K,) coldest first
    step : the run begins, or goes on, here
    """

    def __init__(
        self,
        system: openmm.System,
        topology: app.Topology,
        starts: NDArray[np.float64],
        settings: SimulationSettings,
        temperatures_K: NDArray[np.float64],
        platform: str,
        step: int,
    ) -> None:
        self.starts, self.settings, self.temperatures_K = starts, settings, temperatures_K
        self.stretch = (settings.exchange or ExchangeSettings()).every
        integrator = build_integrator(settings, float(temperatures_K[0]), step)
        chosen = find_platform(platform)
        try:
            simulation = app.Simulation(topology, system, integrator, chosen, platform_properties(platform))
        except openmm.OpenMMException as error:
            raise BackendError(f"platform {platform} cannot run this system ({error})") from error
        self.context = simulation.context
        warm_up(self.context, starts[0])
        generator = np.random.default_rng(derive_seed(settings.seed, 2, step))
        self.sampler = SeededSampler(temperatures_K, simulation, self.stretch, generator)

    def start(self, step: int) -> None:
        for k, temperature in enumerate(self.temperatures_K):
            self.context.setPositions(self.starts[k])
            seed = derive_seed(self.settings.seed, 1, step + k)
            self.context.setVelocitiesToTemperature(float(temperature), seed)
            self.sampler.replicaConformation[k] = self._get_state()

    def advance(self, n_steps: int) -> Snapshot:
        self.sampler.stepsPerIteration = n_steps
        self.sampler.simulate(1)
        shape = self.starts.shape[1:]
        moved = [read_state(state, shape) for state in self.sampler.replicaConformation]
        positions, velocities = (np.stack(arrays) for arrays in zip(*moved, strict=True))
        return Snapshot(positions, velocities, self.sampler.energies, self.sampler.sampled_states)

    def dump(self) -> tuple[bytes, dict[str, NDArray[Any]]]:
        shape, sampler = self.starts.shape[1:], self.sampler
        moved = [read_state(state, shape) for state in sampler.replicaConformation]
        random_state = json.dumps(sampler.generator.bit_generator.state).encode()
        return self.context.createCheckpoint(), {
            "positions": np.stack([positions for positions, _ in moved]),
            "velocities": np.stack([velocities for _, velocities in moved]),
            "states": np.array(sampler.replicaStateIndex),
            "sampled_states": sampler.sampled_states,
            "random_state": np.frombuffer(random_state, dtype=np.uint8),
            "heading": sampler.record.heading,
            "probabilities": sampler.record.probabilities,
            "counts": np.array([sampler.record.n_swaps, sampler.record.round_trips]),
        }

    def load(self, checkpoint: bytes, arrays: dict[str, NDArray[Any]], folder: Path) -> None:
        sampler = self.sampler
        for k in range(len(self.starts)):
            self.context.setPositions(arrays["positions"][k])
            self.context.setVelocities(arrays["velocities"][k])
            sampler.replicaConformation[k] = self._get_state()
        sampler.replicaStateIndex = arrays["states"].tolist()
        # Velocities are rescaled where the next stretch finds another temperature than this.
        sampler._previousReplicaStateIndex = arrays["sampled_states"].tolist()
        sampler.sampled_states = arrays["sampled_states"]
        sampler.generator.bit_generator.state = json.loads(arrays["random_state"].tobytes())
        n_swaps, round_trips = arrays["counts"].tolist()
        sampler.record = SwapRecord(arrays["heading"].copy(), arrays["probabilities"].copy(), n_swaps, round_trips)
        load_context(self.context, checkpoint, folder)

    def describe(self) -> dict[str, Any] | None:
        """Temperatures, probability of a swap between neighbours, round trips; warns where swaps are rare."""
        record = self.sampler.record
        acceptance = record.acceptance
        if record.n_swaps and acceptance.min() < LOW_ACCEPTANCE:
            rarest = int(acceptance.argmin())
            logger.warning(
                "replicas at %.0f and %.0f K would swap on %.1f %% of occasions only: take more temperatures or a"
                " lower hottest_K",
                self.temperatures_K[rarest],
                self.temperatures_K[rarest + 1],
                100 * acceptance[rarest],
            )
        return {
            "temperatures_K": self.temperatures_K.tolist(),
            "acceptance": acceptance.tolist(),
            "n_swaps": record.n_swaps,
            "round_trips": record.round_trips,
        }

    def _get_state(self) -> openmm.State:
        return self.context.getState(positions=True, velocities=True, parameters=True, integratorParameters=True)
