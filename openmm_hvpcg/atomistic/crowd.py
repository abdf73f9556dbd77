"""Many molecules in one OpenMM System that do not feel each other: what keeps a GPU busy with small molecules.

The molecules stand on a lattice, farther apart than the cutoff of every pair interaction, and the cutoff is longer than
any molecule. No pair within a molecule is cut, no pair of two molecules is within reach: forces are those of each
molecule alone without a cutoff. The reaction field of OpenMM's cutoff is switched off by a dielectric of 1, which
leaves a constant in the energy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path

from openmm_hvpcg.errors import InputError, UnstableSimulationError

#: The cutoff over the length of the longest molecule with all its bonds in one line, and more, nm: bonds vibrate.
STRETCH, MARGIN_NM = 1.05, 0.1
#: How far a molecule may drift from its place before it is put back, nm.
DRIFT_NM = 1.0


@dataclass(frozen=True)
class Crowd:
    """Molecules in one System.

    Attributes
    ----------
    system : openmm.System of all of them, without periodicity
    offsets : (n + 1,) first atom of each molecule, and the number of all atoms
    places : (n, 3) nm, where the centroid of each molecule belongs
    cutoff_nm : of the pair interactions
    """

    system: openmm.System
    offsets: NDArray[np.int64]
    places: NDArray[np.float64]
    cutoff_nm: float

    @property
    def n_molecules(self) -> int:
        return len(self.places)

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Rows (A, 3) of all atoms as one array (A_m, 3) for each molecule."""
        return np.split(values, self.offsets[1:-1])

    def place(self, positions: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """Positions (A, 3) nm of all atoms, from each molecule's (A_m, 3), its centroid put where it belongs."""
        return np.concatenate(
            [x - x.mean(axis=0) + place for x, place in zip(positions, self.places, strict=True)], dtype=np.float64
        )

    def find_drifted(self, positions: NDArray[Any]) -> bool:
        """Whether some molecule is farther from its place than it may be.

        Raises
        ------
        UnstableSimulationError
            Not a number; a molecule as long as the cutoff; two molecules within the cutoff of each other.
        """
        parts = self.split(positions)
        centres = np.array([x.mean(axis=0) for x in parts])
        radii = np.array([np.linalg.norm(x - c, axis=1).max() for x, c in zip(parts, centres, strict=True)])
        drift = float(np.linalg.norm(centres - self.places, axis=1).max())
        if not (np.isfinite(radii).all() and math.isfinite(drift)):
            raise UnstableSimulationError("positions are NaN")
        # Within its radius of the centroid on all sides, a molecule could be twice that long; it seldom is.
        for k in np.flatnonzero(2 * radii > self.cutoff_nm):
            length = float(np.linalg.norm(parts[k][:, None] - parts[k][None], axis=-1).max())
            if length > self.cutoff_nm:
                raise UnstableSimulationError(
                    f"molecule {k} is longer than the cutoff", expected=f"{self.cutoff_nm:.2f} nm", got=f"{length:.2f}"
                )
        spacing = _find_spacing(self.places)
        gap = spacing - 2 * (drift + float(radii.max()))
        if gap < self.cutoff_nm:
            raise UnstableSimulationError(
                "molecules came within the cutoff of each other", expected=f"{self.cutoff_nm:.2f} nm", got=f"{gap:.2f}"
            )
        return drift > DRIFT_NM


def build_crowd(systems: Sequence[openmm.System]) -> Crowd:
    """Put molecules, many copies of one or different ones, into one System.

    Parameters
    ----------
    systems : one for each molecule, without periodicity; the same object may come many times

    Raises
    ------
    InputError
        A System with periodic boundaries, virtual sites or a force that cannot be made to end at a cutoff (named).
    """
    if not systems:
        raise InputError("a crowd needs at least one molecule")
    lengths = {id(s): _compute_contour_nm(s) for s in systems}
    longest = STRETCH * max(lengths.values()) + MARGIN_NM
    cutoff = longest
    # A drifting molecule is put back at DRIFT_NM; until the next look it may go as far again.
    places = _build_lattice(len(systems), cutoff + longest + 4 * DRIFT_NM)
    joint = openmm.System()
    forces: dict[type, openmm.Force] = {}
    offsets = [0]
    for system in systems:
        first = joint.getNumParticles()
        _add_particles(joint, system, first)
        for force in system.getForces():
            kind = type(force)
            if kind not in _JOIN:
                raise InputError(
                    f"{force.getName()} cannot be shared by molecules in one System",
                    expected=", ".join(k.__name__ for k in _JOIN),
                    hint="sample this molecule with separate walkers",
                )
            if kind not in forces:
                forces[kind] = _start(force, cutoff)
            _JOIN[kind](forces[kind], force, first)
        offsets.append(joint.getNumParticles())
    for kind, force in forces.items():
        if any(kind not in {type(f) for f in s.getForces()} for s in systems):
            raise InputError(f"{force.getName()} is a force of some molecules and not of others")
        joint.addForce(force)
    return Crowd(joint, np.array(offsets), places, cutoff)


def _add_particles(joint: openmm.System, system: openmm.System, first: int) -> None:
    if system.usesPeriodicBoundaryConditions():
        raise InputError("molecules in one System need to be without periodic boundaries")
    for i in range(system.getNumParticles()):
        if system.isVirtualSite(i):
            raise InputError(f"particle {i} is a virtual site, which molecules in one System cannot have")
        joint.addParticle(system.getParticleMass(i))
    for i in range(system.getNumConstraints()):
        a, b, distance = system.getConstraintParameters(i)
        joint.addConstraint(a + first, b + first, distance)


def _start(force: openmm.Force, cutoff_nm: float) -> openmm.Force:
    """An empty force of the same kind; pair interactions end at the cutoff."""
    if isinstance(force, openmm.NonbondedForce | openmm.GBSAOBCForce):
        if force.getNonbondedMethod() != force.NoCutoff:
            raise InputError(f"{force.getName()} has a cutoff, which would change in one System with others")
        empty = type(force)()
        empty.setNonbondedMethod(force.CutoffNonPeriodic)
        empty.setCutoffDistance(cutoff_nm)
        if isinstance(force, openmm.NonbondedForce):
            if force.getNumGlobalParameters() or force.getNumParticleParameterOffsets():
                raise InputError(f"{force.getName()} has parameter offsets, which molecules in one System cannot have")
            empty.setReactionFieldDielectric(1.0)
        else:
            empty.setSolventDielectric(force.getSolventDielectric())
            empty.setSoluteDielectric(force.getSoluteDielectric())
            empty.setSurfaceAreaEnergy(force.getSurfaceAreaEnergy())
        return empty
    return type(force)()


def _join_bonded(width: int, get: str, count: str, add: str) -> Callable[[Any, Any, int], None]:
    """Copies terms whose first ``width`` parameters are particles."""

    def join(target: Any, source: Any, first: int) -> None:
        for i in range(getattr(source, count)()):
            row = getattr(source, get)(i)
            getattr(target, add)(*(p + first for p in row[:width]), *row[width:])

    return join


def _join_cmap(target: Any, source: Any, first: int) -> None:
    maps = target.getNumMaps()
    for i in range(source.getNumMaps()):
        target.addMap(*source.getMapParameters(i))
    for i in range(source.getNumTorsions()):
        kind, *atoms = source.getTorsionParameters(i)
        target.addTorsion(kind + maps, *(a + first for a in atoms))


def _join_nonbonded(target: Any, source: Any, first: int) -> None:
    for i in range(source.getNumParticles()):
        target.addParticle(*source.getParticleParameters(i))
    for i in range(source.getNumExceptions()):
        a, b, *rest = source.getExceptionParameters(i)
        target.addException(a + first, b + first, *rest)


def _join_gb(target: Any, source: Any, first: int) -> None:
    same = ("getSolventDielectric", "getSoluteDielectric", "getSurfaceAreaEnergy")
    if any(getattr(target, g)() != getattr(source, g)() for g in same):
        raise InputError("molecules in one System need the same implicit solvent")
    for i in range(source.getNumParticles()):
        target.addParticle(*source.getParticleParameters(i))


_JOIN: dict[type, Callable[[Any, Any, int], None]] = {
    openmm.HarmonicBondForce: _join_bonded(2, "getBondParameters", "getNumBonds", "addBond"),
    openmm.HarmonicAngleForce: _join_bonded(3, "getAngleParameters", "getNumAngles", "addAngle"),
    openmm.PeriodicTorsionForce: _join_bonded(4, "getTorsionParameters", "getNumTorsions", "addTorsion"),
    openmm.RBTorsionForce: _join_bonded(4, "getTorsionParameters", "getNumTorsions", "addTorsion"),
    openmm.CMAPTorsionForce: _join_cmap,
    openmm.NonbondedForce: _join_nonbonded,
    openmm.GBSAOBCForce: _join_gb,
}


def _compute_contour_nm(system: openmm.System) -> float:
    """An upper bound of a molecule's length: the longest of the shortest ways along bonds between two of its atoms."""
    bonds: list[tuple[int, int, float]] = []
    for i in range(system.getNumConstraints()):
        a, b, distance = system.getConstraintParameters(i)
        bonds.append((a, b, distance.value_in_unit(unit.nanometer)))
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for i in range(force.getNumBonds()):
                a, b, distance, _ = force.getBondParameters(i)
                bonds.append((a, b, distance.value_in_unit(unit.nanometer)))
    n_atoms = system.getNumParticles()
    first, second, lengths = (np.array(column) for column in zip(*bonds, strict=True)) if bonds else ([], [], [])
    graph = csr_matrix((lengths, (first, second)), shape=(n_atoms, n_atoms))
    longest = float(shortest_path(graph, directed=False).max())
    if not math.isfinite(longest):
        raise InputError("a molecule in one System with others needs to be one piece", got="atoms that no bond joins")
    return longest


def _build_lattice(n: int, spacing_nm: float) -> NDArray[np.float64]:
    """The first ``n`` points of a cubic lattice about the origin."""
    edge = math.ceil(n ** (1 / 3) - 1e-9)
    points = np.array(list(itertools.islice(itertools.product(range(edge), repeat=3), n)), dtype=np.float64)
    return (points - points.mean(axis=0)) * spacing_nm


def _find_spacing(places: NDArray[np.float64]) -> float:
    if len(places) == 1:
        return math.inf
    # A cubic lattice filled along its last axis: the first two points are neighbours.
    return float(np.linalg.norm(places[1] - places[0]))
