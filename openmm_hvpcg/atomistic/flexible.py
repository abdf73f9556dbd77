"""Constraints that keep beads from being held, and how to do without them.

A bead is held by giving its atoms no mass, which a constraint on them forbids. Where beads are to be held, frames,
labels and reference all have to come from one System in which those bonds are harmonic again: then they are of one
ensemble, and nothing has to be corrected.
"""

from __future__ import annotations

import logging

import numpy as np
import openmm

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.mapping import BeadMap

logger = logging.getLogger(__name__)

#: Lightest hydrogen (amu) whose flexible bonds ``FAST_TIMESTEP_FS`` or more resolves with some five points a period.
HEAVY_HYDROGEN_AMU = 2.5
FAST_TIMESTEP_FS = 1.0


def free_beads(system: openmm.System, unconstrained: openmm.System, bead_map: BeadMap, name: str = "") -> int:
    """Lift, in place, the constraints that touch an atom of a bead, and put their harmonic bonds back in.

    Everything else of ``system`` stays as it is, the other constraints too.

    Parameters
    ----------
    system : the System with its constraints
    unconstrained : the same molecule built without constraints (rigid water apart)
    bead_map : the beads to free
    name : the molecule, for messages

    Returns
    -------
    How many constraints were lifted.

    Raises
    ------
    InputError
        A bead rests on rigid water, or a constrained bond has no harmonic term to take its place.
    """
    rigid = _list_constraints(unconstrained)
    lifted = {pair: k for pair, k in _list_constraints(system).items() if _touches(pair, bead_map)}
    for pair in lifted:
        if pair in rigid:
            raise InputError(
                "flexible_beads: a bead rests on rigid water, whose constraints stay",
                got=f"a constraint between atoms {pair[0]} and {pair[1]}",
                where=name or None,
                hint="choose beads on the solute",
            )
    for k in sorted(lifted.values(), reverse=True):
        system.removeConstraint(k)
    missing = set(lifted) - _add_bonds(system, unconstrained, set(lifted))
    if missing:
        a, b = min(missing)
        raise InputError(
            f"flexible_beads: the force field has no harmonic term for the bond of atoms {a} and {b}",
            where=name or None,
            hint="set constraints: none, or choose another force field",
        )
    logger.info("%s: %d constraints on beads' atoms lifted", name or "molecule", len(lifted))
    return len(lifted)


def check_beads_are_free(system: openmm.System, bead_map: BeadMap, where: object = None) -> None:
    """Raise :class:`InputError` where a constraint of a System that must not be changed touches a bead's atom."""
    for a, b in _list_constraints(system):
        if _touches((a, b), bead_map):
            raise InputError(
                "flexible_beads: a constraint of this System touches a bead, and the System is used as it is",
                got=f"a constraint between atoms {a} and {b}",
                where=where,
                hint="write the System again without it",
            )


def warn_of_fast_bonds(system: AtomisticSystem, timestep_fs: float) -> None:
    """Warn where light hydrogens move on flexible bonds faster than the timestep resolves."""
    if timestep_fs <= FAST_TIMESTEP_FS:
        return
    constrained = _list_constraints(system.system)
    for bond in system.topology.bonds:
        pair = (min(bond[0].index, bond[1].index), max(bond[0].index, bond[1].index))
        if pair in constrained:
            continue
        for atom in bond:
            mass = system.system.getParticleMass(atom.index)._value
            if atom.element.symbol == "H" and 0 < mass < HEAVY_HYDROGEN_AMU:
                logger.warning(
                    "%s: flexible bonds to hydrogen (%s among them) at %g fs: set input.hydrogen_mass_amu: 3, or"
                    " timestep_fs: 1",
                    system.name or "molecule",
                    atom,
                    timestep_fs,
                )
                return


def _list_constraints(system: openmm.System) -> dict[tuple[int, int], int]:
    """Pair of atoms, the lower first -> index of its constraint."""
    found = {}
    for k in range(system.getNumConstraints()):
        a, b, _ = system.getConstraintParameters(k)
        found[min(a, b), max(a, b)] = k
    return found


def _touches(pair: tuple[int, int], bead_map: BeadMap) -> bool:
    return bool(np.any(bead_map.site_weights[:, list(pair)] != 0))


def _add_bonds(
    system: openmm.System, unconstrained: openmm.System, pairs: set[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Copy the harmonic terms of ``pairs``; the pairs that have one."""
    found = set()
    bonds = next((f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce)), None)
    for force in unconstrained.getForces():
        if not isinstance(force, openmm.HarmonicBondForce):
            continue
        for k in range(force.getNumBonds()):
            a, b, length, stiffness = force.getBondParameters(k)
            pair = (min(a, b), max(a, b))
            if pair not in pairs:
                continue
            if bonds is None:
                bonds = system.getForce(system.addForce(openmm.HarmonicBondForce()))
                bonds.setUsesPeriodicBoundaryConditions(force.usesPeriodicBoundaryConditions())
            bonds.addBond(a, b, length, stiffness)
            found.add(pair)
    return found
