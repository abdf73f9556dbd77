"""Dynamics of a molecule at one temperature, or by replica exchange over a ladder of them.

Hot chains cross barriers of the hidden atoms that one chain at the ensemble's temperature would take too long for, and
exchanges of neighbours bring what they find down to it, each temperature keeping its own distribution exactly.

Source: Sugita and Okamoto, Chem. Phys. Lett. 314, 141 (1999).
"""

from __future__ import annotations

import math

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.units import BOLTZMANN, PS_PER_FS


class Ladder:
    """Langevin dynamics of one System at several temperatures; the first is the one that is asked for.

    Parameters
    ----------
    system : massless particles stay where they are
    temperatures_K : upwards
    friction_per_ps, timestep_fs : of all chains
    platform, properties : of their Contexts
    seed : of the noise
    """

    def __init__(
        self,
        system: openmm.System,
        temperatures_K: tuple[float, ...],
        friction_per_ps: float,
        timestep_fs: float,
        platform: tuple[str, dict[str, str]],
        seed: int,
    ) -> None:
        self.temperatures_K = temperatures_K
        self.attempts = self.accepted = 0
        self._turn = 0
        name, properties = platform
        self._integrators, self._contexts = [], []
        for temperature in temperatures_K:
            integrator = openmm.LangevinMiddleIntegrator(temperature, friction_per_ps, timestep_fs * PS_PER_FS)
            integrator.setRandomNumberSeed(seed)
            self._integrators.append(integrator)
            self._contexts.append(
                openmm.Context(system, integrator, openmm.Platform.getPlatformByName(name), properties)
            )

    @property
    def context(self) -> openmm.Context:
        """Of the first temperature."""
        return self._contexts[0]

    def place(
        self,
        positions: NDArray[np.float64],
        box: NDArray[np.float64] | None,
        constraint_tolerance: float,
        seed: int,
        exchange_seed: tuple[int, int],
    ) -> None:
        """Start all chains from positions (A, 3) nm, in a box (3, 3) nm or None, with velocities of their own."""
        self._random = np.random.default_rng(exchange_seed)
        for k, (context, temperature) in enumerate(zip(self._contexts, self.temperatures_K, strict=True)):
            if box is not None:
                context.setPeriodicBoxVectors(*box)
            context.setPositions(positions)
            context.applyConstraints(constraint_tolerance)
            context.setVelocitiesToTemperature(temperature, seed + k)

    def run(self, n_steps: int, exchange_every: int) -> None:
        """``n_steps`` of each chain, with an attempt to exchange neighbours after every so many of them."""
        while n_steps > 0:
            steps = min(n_steps, exchange_every)
            for integrator in self._integrators:
                integrator.step(steps)
            n_steps -= steps
            if len(self._contexts) > 1:
                self._exchange()

    def _exchange(self) -> None:
        """Pairs (0, 1), (2, 3), ... and (1, 2), (3, 4), ... in turn."""
        states = [c.getState(getPositions=True, getVelocities=True, getEnergy=True) for c in self._contexts]
        energies = [s.getPotentialEnergy()._value for s in states]
        for low in range(self._turn, len(states) - 1, 2):
            cold, hot = self.temperatures_K[low], self.temperatures_K[low + 1]
            log_ratio = (1.0 / cold - 1.0 / hot) / BOLTZMANN * (energies[low] - energies[low + 1])
            self.attempts += 1
            if math.log(self._random.uniform(low=1e-300)) < log_ratio:
                self.accepted += 1
                self._put(low, states[low + 1], math.sqrt(cold / hot))
                self._put(low + 1, states[low], math.sqrt(hot / cold))
        self._turn = 1 - self._turn if len(states) > 2 else 0

    def _put(self, index: int, state: openmm.State, velocity_scale: float) -> None:
        context = self._contexts[index]
        context.setPositions(state.getPositions(asNumpy=True)._value)
        context.setVelocities(state.getVelocities(asNumpy=True)._value * velocity_scale)
