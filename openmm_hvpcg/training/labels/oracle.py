"""AA forces from a pool of OpenMM Contexts, and what the System says about which atoms move together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.crowd import Crowd, build_crowd
from openmm_hvpcg.atomistic.periodic import label_molecules
from openmm_hvpcg.atomistic.platforms import GPU_PLATFORMS, read_forces
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.frames import find_not_finite

if TYPE_CHECKING:
    import mdtraj as md

#: Atoms that keep a GPU busy. With more of them, molecules stand so far out that single precision costs digits.
CROWD_ATOMS = 16000


class ForceOracle:
    """Forces of many configurations of one System, computed by several Contexts in threads.

    OpenMM releases the interpreter lock in force calls, so that threads scale; each worker has a Context of its own.
    Virtual sites are placed from their parents before each call and get no force: OpenMM hands theirs to the parents.

    Parameters
    ----------
    system : openmm.System
    platform : name of the OpenMM platform
    properties : platform properties
    workers : Contexts working at once
    copies : configurations a Context computes in one call, as molecules of one System that do not feel each other; see
        :func:`count_copies`
    """

    def __init__(
        self,
        system: openmm.System,
        platform: str,
        properties: dict[str, str] | None = None,
        workers: int = 1,
        copies: int = 1,
    ) -> None:
        chosen = openmm.Platform.getPlatformByName(platform)
        self._crowd = build_crowd([system] * copies) if copies > 1 else None
        self.n_atoms = system.getNumParticles()
        masses = [system.getParticleMass(i)._value for i in range(self.n_atoms)]
        self._massless = np.flatnonzero(np.asarray(masses) == 0)
        self._has_virtual_sites = any(system.isVirtualSite(i) for i in self._massless.tolist())
        self._contexts = [
            openmm.Context(
                system if self._crowd is None else self._crowd.system,
                openmm.VerletIntegrator(0.001),
                chosen,
                properties or {},
            )
            for _ in range(workers)
        ]
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    @property
    def n_workers(self) -> int:
        return len(self._contexts)

    @property
    def n_copies(self) -> int:
        return 1 if self._crowd is None else self._crowd.n_molecules

    def __call__(self, positions: NDArray[Any], boxes: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """Forces (n, A, 3) kJ/mol/nm of positions (n, A, 3) nm in boxes (n, 3, 3) nm or None.

        Raises
        ------
        InputError
            Wrong number of atoms, or a configuration whose forces are not finite.
        """
        if positions.ndim != 3 or positions.shape[1:] != (self.n_atoms, 3):
            raise InputError("positions do not fit the System", expected=f"(n, {self.n_atoms}, 3)", got=positions.shape)
        forces = np.empty(positions.shape, dtype=np.float64)
        if self._pool is None:
            self._fill(self._contexts[0], positions, boxes, forces, 0, len(positions))
        else:
            edges = np.linspace(0, len(positions), self.n_workers + 1).astype(int).tolist()
            jobs = [
                self._pool.submit(self._fill, context, positions, boxes, forces, start, stop)
                for context, start, stop in zip(self._contexts, edges, edges[1:], strict=False)
            ]
            for job in jobs:
                job.result()
        if len(self._massless):
            forces[:, self._massless] = 0.0
        bad = find_not_finite(forces)
        if bad is not None:
            raise InputError(f"forces of configuration {bad} are not finite", hint="check that frame for overlaps")
        return forces

    def _fill(
        self,
        context: openmm.Context,
        positions: NDArray[Any],
        boxes: NDArray[Any] | None,
        forces: NDArray[np.float64],
        start: int,
        stop: int,
    ) -> None:
        if self._crowd is not None:
            for first in range(start, stop, self.n_copies):
                rows = slice(first, min(first + self.n_copies, stop))
                self._fill_at_once(self._crowd, context, positions[rows], forces[rows])
            return
        for i in range(start, stop):
            # The displaced copies of a frame share its box.
            if boxes is not None and (i == start or not np.array_equal(boxes[i], boxes[i - 1])):
                context.setPeriodicBoxVectors(*boxes[i].astype(np.float64))
            context.setPositions(positions[i])
            if self._has_virtual_sites:
                context.computeVirtualSites()
            read_forces(context, forces[i])

    @staticmethod
    def _fill_at_once(
        crowd: Crowd, context: openmm.Context, positions: NDArray[Any], forces: NDArray[np.float64]
    ) -> None:
        """Forces of at most as many configurations as there are copies; the copies left over repeat the last."""
        n = len(positions)
        index = np.minimum(np.arange(crowd.n_molecules), n - 1)
        centred = positions.astype(np.float64) - positions.mean(axis=1, keepdims=True, dtype=np.float64)
        placed = (centred[index] + crowd.places[:, None]).reshape(-1, 3)
        context.setPositions(placed)
        read_forces(context, placed)
        forces[:] = placed.reshape(crowd.n_molecules, -1, 3)[:n]

    def close(self) -> None:
        """Stop the threads and free the Contexts."""
        if self._pool is not None:
            self._pool.shutdown()
        self._contexts.clear()

    def __enter__(self) -> ForceOracle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def count_copies(system: openmm.System, platform: str) -> int:
    """How many configurations to compute in one call: many of a small molecule on a GPU, elsewhere one."""
    copies = CROWD_ATOMS // system.getNumParticles()
    if platform not in GPU_PLATFORMS or copies < 2:
        return 1
    try:
        build_crowd([system])
    except InputError:
        return 1
    return copies


def find_rigid_clusters(system: openmm.System) -> NDArray[np.int64]:
    """Cluster index (A,) of each atom: atoms joined by constraints, also through a chain, share one."""
    n_atoms = system.getNumParticles()
    pairs = [system.getConstraintParameters(k)[:2] for k in range(system.getNumConstraints())]
    return label_molecules(n_atoms, pairs)


def find_active_atoms(
    system: openmm.System, topology: md.Topology, site_weights: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Atoms (A,) that a force map may weigh: massive, and bonded (through any chain) to an atom of a bead.

    Solvent and other molecules without beads stay out. Virtual sites too: they move with their parents.
    """
    n_atoms = system.getNumParticles()
    molecules = label_molecules(n_atoms, [(a.index, b.index) for a, b in topology.bonds])
    used = np.abs(site_weights).sum(axis=0) > 0
    massive = np.array([system.getParticleMass(i)._value > 0 for i in range(n_atoms)])
    return np.isin(molecules, molecules[used]) & massive
