"""Sampling with the beads held: what the rest of the molecule does at one CG configuration.

Beads that sit on single atoms are held exactly by giving those atoms no mass; Langevin dynamics then samples
``exp(-beta u)`` at fixed R = M r. A chain that starts from a frame of the unrestrained ensemble is stationary from its
first step on, since the hidden coordinates of such a frame are already distributed as they should be given its beads.
One chain stays near where it starts, though: hidden states that take longer than the chain to reach are not averaged
over, and its own scatter does not tell. Replica exchange with hotter chains of the same beads reaches them.

Chains run in processes of their own: OpenMM's Reference platform has one random generator a process, and forces of
small molecules are bound by Python's lock, not by arithmetic.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import joblib
import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.systems import AtomisticSystem
from openmm_hvpcg.atomistic.walker import MAX_TEMPERATURE_RATIO
from openmm_hvpcg.config import AveragingSettings, ReferenceSettings
from openmm_hvpcg.cores import count_cores
from openmm_hvpcg.errors import BackendError, HVPCGError, InputError, MappingError, UnstableSimulationError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps
from openmm_hvpcg.training.labels.ladder import Ladder
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.units import BOLTZMANN

CONSTRAINT_TOLERANCE = 1e-8
#: How often a process looks whether the one that started it is still there.
PARENT_POLL_S = 1.0


@dataclass(frozen=True)
class Chains:
    """How the hidden atoms are sampled at each configuration.

    Attributes
    ----------
    n_samples : samples at each configuration
    stride : MD steps between them
    hvp_every : HVPs are taken at every so many samples
    timestep_fs, friction_per_ps : of the Langevin dynamics
    temperature_K : of the ensemble
    equilibration_steps : MD steps before; from a frame of the equilibrium ensemble only hotter chains need them
    ladder_K : temperatures of further chains, upwards; neighbours exchange every ``stride`` steps; samples are those of
        ``temperature_K``
    """

    n_samples: int
    stride: int
    hvp_every: int
    timestep_fs: float
    friction_per_ps: float
    temperature_K: float
    equilibration_steps: int = 0
    ladder_K: tuple[float, ...] = ()

    @classmethod
    def from_settings(cls, settings: AveragingSettings | ReferenceSettings, temperature_K: float) -> Chains:
        """Those that a section of a protocol asks for."""
        own: dict[str, Any] = {}
        if isinstance(settings, ReferenceSettings):
            own = {"equilibration_steps": settings.equilibration_steps, "ladder_K": tuple(settings.ladder_K)}
        return cls(
            settings.n_samples,
            settings.stride,
            settings.hvp_every,
            settings.timestep_fs,
            settings.friction_per_ps,
            temperature_K,
            **own,
        )

    @property
    def n_hvp_samples(self) -> int:
        return -(-self.n_samples // self.hvp_every)

    def count_force_calls(self, n_probes: int) -> int:
        """AA force calls at one configuration: MD steps, forces of samples, two calls an HVP."""
        steps = (self.equilibration_steps + self.n_samples * self.stride) * (1 + len(self.ladder_K))
        return steps + self.n_samples + 2 * n_probes * self.n_hvp_samples


@dataclass(frozen=True)
class Starts:
    """A few configurations, sampled one after the other in one Context: the unit of work.

    What comes out depends on this, the sampler's seed and the chains alone (on the Reference platform, bit for bit),
    so that an interrupted run can go on with what it lacks.

    Attributes
    ----------
    frames : (n,) index of each, for seeds and messages
    positions : (n, A, 3) nm
    probes : (n, P, B, 3); P may be 0
    force_map : Q (B, A)
    boxes : (n, 3, 3) nm, or None
    """

    frames: NDArray[np.int64]
    positions: NDArray[Any]
    probes: NDArray[Any]
    force_map: NDArray[np.float64]
    boxes: NDArray[Any] | None = None


@dataclass(frozen=True)
class HeldSamples:
    """Samples at one configuration, in order of time.

    ``forces`` (n, B, 3) projected forces; ``hvps`` (m, P, B, 3) projected HVPs at every ``hvp_every``-th sample;
    ``accepted``, the share of exchanges with hotter chains so far that were, None without such chains.
    """

    forces: NDArray[np.float64]
    hvps: NDArray[np.float64]
    accepted: float | None = None


@dataclass(frozen=True)
class HeldSampler:
    """Samples forces and HVPs with the beads of a molecule held.

    Parameters
    ----------
    system : the molecule; its System's forces are sampled and labelled
    bead_map : each bead on one atom, none of them constrained
    platform, properties : where chains run
    step_nm : finite-difference step, see :mod:`openmm_hvpcg.training.labels.hvp`
    seed : of all chains
    workers : processes at once; None: one a core

    Raises
    ------
    MappingError, InputError
        The beads cannot be held, see :func:`find_held_atoms`.
    """

    system: AtomisticSystem
    bead_map: BeadMap
    platform: str
    properties: dict[str, str]
    step_nm: float
    seed: int
    workers: int | None = None
    _held: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_held", find_held_atoms(self.system, self.bead_map))

    def sample(self, starts: Sequence[Starts], chains: Chains) -> Generator[list[HeldSamples], None, None]:
        """Samples of each of ``starts``, in order, as they come.

        Raises
        ------
        UnstableSimulationError
            A chain blew up.
        BackendError
            The platform failed, or a process was killed.
        """
        n_jobs = min(self.workers or count_cores(), len(starts))
        if not n_jobs:
            return
        xml = openmm.XmlSerializer.serialize(self.system.system)
        recipe = _Recipe(
            xml, self.system.name, self._held, self.platform, self.properties, self.step_nm, self.seed, chains
        )
        jobs = (joblib.delayed(_sample)(recipe, part, os.getpid()) for part in starts)
        # max_nbytes: arrays go through pipes, not through files that a kill would leave behind.
        parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator", pre_dispatch="2*n_jobs", max_nbytes=None)
        try:
            with closing(parallel(jobs)) as found:
                yield from found
        except BrokenProcessPool as error:
            raise BackendError(
                f"a process that samples {self.system.name or 'the molecule'} was killed",
                hint="free some memory or ask for fewer workers, and run the same again: it goes on where it was",
            ) from error


def find_held_atoms(system: AtomisticSystem, bead_map: BeadMap) -> tuple[int, ...]:
    """The atom of each bead.

    Raises
    ------
    MappingError
        A bead is spread over several atoms, or its atom takes part in a constraint.
    InputError
        The System holds a barostat, under which nothing stays where it is.
    """
    where = system.name or None
    weights = bead_map.site_weights
    spread = np.flatnonzero((weights != 0).sum(axis=1) != 1)
    if len(spread):
        raise MappingError(
            f"bead {spread[0]} ({bead_map.names[spread[0]]}) cannot be held",
            expected="a bead on one atom",
            got=f"{int((weights[spread[0]] != 0).sum())} atoms",
            where=where,
            hint="a PMF reference and conditional averaging need a slice map: one atom a bead",
        )
    atoms = tuple(int(a) for a in weights.argmax(axis=1))
    pairs = (system.system.getConstraintParameters(k)[:2] for k in range(system.system.getNumConstraints()))
    constrained = {atom for pair in pairs for atom in pair}
    for bead, atom in enumerate(atoms):
        if atom in constrained:
            raise MappingError(
                f"bead {bead} ({system.topology.atom(atom)}) cannot be held: its atom takes part in a constraint",
                where=where,
                hint="set sampling.flexible_beads: true and sample again, for frames and reference of one ensemble",
            )
    barostat = next((f.getName() for f in system.system.getForces() if "Barostat" in f.getName()), None)
    if barostat is not None:
        raise InputError(
            f"the System holds a {barostat}, under which beads cannot be held",
            where=where,
            hint="give a System without it: the box of each frame is kept",
        )
    return atoms


@dataclass(frozen=True)
class _Recipe:
    """What a process is sent beside the configurations."""

    system: str
    name: str
    held: tuple[int, ...]
    platform: str
    properties: dict[str, str]
    step_nm: float
    seed: int
    chains: Chains


def _sample(recipe: _Recipe, starts: Starts, main_process: int) -> list[HeldSamples]:
    """Run in a process of its own, or in the main one; names the configuration in what goes wrong."""
    if os.getpid() != main_process:
        _end_with(main_process)
    found, frame = [], int(starts.frames[0])
    where = f"{recipe.name or 'molecule'}, frame"
    try:
        with closing(_Walker(recipe, frame)) as walker:
            for k, frame in enumerate(starts.frames.tolist()):
                box = None if starts.boxes is None else np.asarray(starts.boxes[k], dtype=np.float64)
                walker.place(starts.positions[k], box, frame)
                found.append(walker.run(starts.probes[k], starts.force_map, box))
    except HVPCGError as error:
        raise type(error)(str(error), where=f"{where} {frame}") from error
    except (openmm.OpenMMException, ValueError) as error:
        if "nan" in str(error).lower():
            raise _blew_up(recipe.chains, f"{where} {frame}") from error
        raise BackendError(
            f"sampling with the beads held failed ({error})", where=f"{where} {frame}", hint="try another platform"
        ) from error
    return found


class _Walker:
    """A Context with the beads held, and one without for forces at displaced positions."""

    def __init__(self, recipe: _Recipe, first_frame: int) -> None:
        self._recipe, self._chains = recipe, recipe.chains
        system = _load_system(recipe.system)
        held = openmm.XmlSerializer.clone(system)
        for atom in recipe.held:
            held.setParticleMass(atom, 0.0)
        self._masses = np.array([held.getParticleMass(i)._value for i in range(held.getNumParticles())])
        self._dof = max(1, 3 * int(np.count_nonzero(self._masses)) - held.getNumConstraints())
        chains = recipe.chains
        self._ladder = Ladder(
            held,
            (chains.temperature_K, *chains.ladder_K),
            chains.friction_per_ps,
            chains.timestep_fs,
            (recipe.platform, recipe.properties),
            _draw_seeds(recipe.seed, first_frame)[0],
        )
        self._oracle = ForceOracle(system, recipe.platform, recipe.properties)

    def close(self) -> None:
        self._oracle.close()

    def place(self, positions: NDArray[Any], box: NDArray[np.float64] | None, frame: int) -> None:
        """Go to a frame, with velocities of its own."""
        seed, start = self._recipe.seed, np.asarray(positions, dtype=np.float64)
        self._ladder.place(start, box, CONSTRAINT_TOLERANCE, _draw_seeds(seed, frame)[1], (seed, frame))
        self._ladder.run(self._chains.equilibration_steps, self._chains.stride)

    def run(self, probes: NDArray[Any], force_map: NDArray[np.float64], box: NDArray[np.float64] | None) -> HeldSamples:
        chains, (n_probes, n_beads) = self._chains, probes.shape[:2]
        forces = np.empty((chains.n_samples, n_beads, 3))
        hvps = np.empty((chains.n_hvp_samples, n_probes, n_beads, 3))
        boxes = None if box is None else box[None]
        for n in range(chains.n_samples):
            self._ladder.run(chains.stride, chains.stride)
            with_hvps = n % chains.hvp_every == 0
            state = self._ladder.context.getState(getForces=True, getPositions=with_hvps, getVelocities=with_hvps)
            forces[n] = force_map @ state.getForces(asNumpy=True)._value
            if with_hvps:
                self._check(state)
                if n_probes:
                    here = state.getPositions(asNumpy=True)._value[None]
                    hvps[n // chains.hvp_every] = compute_projected_hvps(
                        self._oracle, here, probes[None], force_map, self._recipe.step_nm, boxes
                    )[0]
        self._check(self._ladder.context.getState(getPositions=True, getVelocities=True))
        if not (np.isfinite(forces).all() and np.isfinite(hvps).all()):
            raise _blew_up(chains)
        tried = self._ladder.attempts
        return HeldSamples(forces, hvps, self._ladder.accepted / tried if tried else None)

    def _check(self, state: openmm.State) -> None:
        """Raise where positions are NaN or the hidden atoms are far too hot."""
        velocities = state.getVelocities(asNumpy=True)._value
        temperature = float(np.sum(self._masses[:, None] * velocities**2)) / (self._dof * BOLTZMANN)
        limit = MAX_TEMPERATURE_RATIO * self._chains.temperature_K
        if not (temperature <= limit and np.isfinite(state.getPositions(asNumpy=True)._value).all()):
            raise _blew_up(self._chains)


@functools.cache
def _end_with(main_process: int) -> None:
    """Let this process end soon after the main one is killed: joblib's would work on, then wait for minutes."""

    def watch() -> None:
        while os.getppid() == main_process:
            time.sleep(PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=2)
def _load_system(xml: str) -> openmm.System:
    return openmm.XmlSerializer.deserialize(xml)


def _draw_seeds(seed: int, frame: int) -> tuple[int, int]:
    """Seeds of noise and of velocities; apart, since OpenMM draws both from generators of one kind, and not 0, by which
    it means any."""
    noise, velocities = np.random.default_rng([seed, frame]).integers(1, 2**31 - 1, size=2).tolist()
    return noise, velocities


def _blew_up(chains: Chains, where: str | None = None) -> UnstableSimulationError:
    return UnstableSimulationError(
        f"the dynamics of the hidden atoms blew up at {chains.timestep_fs} fs",
        where=where,
        hint="choose a shorter timestep_fs",
    )
