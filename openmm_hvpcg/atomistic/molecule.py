"""The all-atom molecule that every later stage works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mdtraj as md
import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_hvpcg.errors import InputError
from openmm_hvpcg.storage import compute_hash

#: Energy change (kJ/mol) by which a System is told to depend on where it stands in space, when moved by
#: ``SHIFT_NM``: far above double-precision rounding (about 1e-12 of the energy), far below any restraint.
SHIFT_NM = 100.0
SHIFT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AtomisticSystem:
    """An all-atom molecule ready to be simulated and labelled.

    Attributes
    ----------
    topology : mdtraj topology of A atoms
    openmm_topology : the same as an OpenMM topology
    system : openmm.System without a CMMotionRemover, so that its forces are -grad u alone
    positions : (A, 3) float64, nm
    temperature_K : temperature of the ensemble
    provenance : JSON-ready: source, files and their SHA-256, force field, solvent, constraints, OpenMM
        version, SHA-256 of the System XML
    name : the molecule's name in the study

    Raises
    ------
    InputError
        Numbers of atoms that differ, NaN in the positions, a temperature that is not positive.
    """

    topology: md.Topology
    openmm_topology: app.Topology
    system: openmm.System
    positions: NDArray[np.float64]
    temperature_K: float
    provenance: dict[str, Any]
    name: str = ""

    def __post_init__(self) -> None:
        positions = np.asarray(self.positions, dtype=np.float64)
        n_atoms = self.system.getNumParticles()
        for what, count in (
            ("topology", self.topology.n_atoms),
            ("OpenMM topology", self.openmm_topology.getNumAtoms()),
            ("positions", len(positions)),
        ):
            if count != n_atoms:
                raise InputError(
                    f"System and {what} disagree",
                    expected=f"{n_atoms} atoms (System)",
                    got=count,
                    where=self.name or None,
                )
        if positions.shape != (n_atoms, 3):
            raise InputError("positions have the wrong shape", expected=(n_atoms, 3), got=positions.shape)
        check_positions(positions, self.openmm_topology, self.name or None)
        if not self.temperature_K > 0:
            raise InputError("temperature must be positive", got=f"{self.temperature_K} K")
        object.__setattr__(self, "positions", positions)

    @property
    def n_atoms(self) -> int:
        return int(self.positions.shape[0])

    @property
    def is_periodic(self) -> bool:
        return bool(self.system.usesPeriodicBoundaryConditions())

    @property
    def box(self) -> NDArray[np.float64] | None:
        """Box vectors as rows, (3, 3) nm, or None without periodicity."""
        if not self.is_periodic:
            return None
        vectors = self.system.getDefaultPeriodicBoxVectors()
        return np.array([[*v.value_in_unit(unit.nanometer)] for v in vectors])

    @cached_property
    def system_hash(self) -> str:
        """SHA-256 of the System's XML."""
        return compute_hash(openmm.XmlSerializer.serialize(self.system))


def check_positions(positions: NDArray[np.float64], topology: app.Topology, where: object = None) -> None:
    """Raise :class:`InputError` naming the first atom whose position is NaN or infinite."""
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        atom = list(topology.atoms())[int(np.argmin(finite))]
        label = f"{atom.index} ({atom.residue.name} {atom.residue.id} {atom.name})"
        raise InputError(
            f"positions hold NaN or infinity, first at atom {label}",
            where=where,
        )


def is_movable(system: AtomisticSystem) -> bool:
    """Whether the energy stays the same when the whole system is moved, so that frames may be recentred."""
    if system.is_periodic:
        return not any(isinstance(f, openmm.CustomExternalForce) for f in system.system.getForces())
    context = openmm.Context(
        system.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    energies = []
    for shift in (0.0, SHIFT_NM):
        context.setPositions(system.positions + shift)
        energies.append(context.getState(getEnergy=True).getPotentialEnergy()._value)
    return abs(energies[1] - energies[0]) <= SHIFT_TOLERANCE + 1e-6 * abs(energies[0])
