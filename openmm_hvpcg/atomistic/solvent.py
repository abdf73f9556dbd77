"""Solvent: OBC2 as OpenMM's GBSAOBCForce, and boxes of explicit water."""

from __future__ import annotations

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit
from openmm.app.internal.customgbforces import GBSAOBC2Force

from openmm_hvpcg.atomistic.forcefields import (
    choose_templates,
    explain_mismatch,
    merge_caps,
    restore_residues,
)
from openmm_hvpcg.atomistic.peptides import repeatable_modeller, to_nm
from openmm_hvpcg.errors import InputError

#: Direct-space cutoff of explicit solvent, nm, and where Lennard-Jones starts to be switched off. The switch
#: makes forces continuous at the cutoff, which their finite differences (the HVP labels) need.
CUTOFF_NM = 1.0
SWITCH_NM = 0.9

#: g/cm^3 of the atoms of a file whose box is filled with water; a deposited crystal has a few waters in a unit cell
#: that the rest of the crystal fills, a structure of NMR a box of 0.1 nm.
WATER_BOX_DENSITY = (0.5, 2.0)
AMU_PER_NM3_IN_G_PER_CM3 = 1.66053907e-3

SOLVENT_DIELECTRIC = 78.5
SOLUTE_DIELECTRIC = 1.0


def add_obc2(system: openmm.System, topology: app.Topology) -> None:
    """Add OBC2 implicit solvent (Onufriev, Bashford, Case, Proteins 55, 383, 2004) as a GBSAOBCForce.

    Radii and scale factors are those OpenMM's ``implicit/obc2.xml`` assigns (mbondi2), charges those of the
    System's NonbondedForce. That file builds a CustomGBForce of the same energy, far slower on small systems.

    Raises
    ------
    InputError
        The System has no single NonbondedForce to take charges from.
    """
    nonbonded = [f for f in system.getForces() if isinstance(f, openmm.NonbondedForce)]
    if len(nonbonded) != 1:
        raise InputError(
            "obc2 takes its charges from the force field",
            expected="one NonbondedForce",
            got=len(nonbonded),
            hint="use solvent: vacuum, or a force field with point charges",
        )
    force = openmm.GBSAOBCForce()
    force.setSolventDielectric(SOLVENT_DIELECTRIC)
    force.setSoluteDielectric(SOLUTE_DIELECTRIC)
    force.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    for index, (radius_nm, scale) in enumerate(GBSAOBC2Force.getStandardParameters(topology)):
        charge = nonbonded[0].getParticleParameters(index)[0]
        force.addParticle(charge, radius_nm, scale)
    nonbonded[0].setReactionFieldDielectric(1.0)
    system.addForce(force)


def has_implicit_solvent(system: openmm.System) -> bool:
    """Whether some force of the System is a generalized Born term."""
    return any(isinstance(f, openmm.GBSAOBCForce | openmm.CustomGBForce) for f in system.getForces())


def count_waters(topology: app.Topology) -> int:
    """Number of water molecules (OpenMM's readers name them all HOH)."""
    return sum(residue.name in ("HOH", "WAT") for residue in topology.residues())


def holds_water_box(topology: app.Topology) -> bool:
    """Whether the box is filled with water, rather than the unit cell of a crystal or no box at all."""
    vectors = topology.getPeriodicBoxVectors()
    if vectors is None or count_waters(topology) == 0:
        return False
    volume_nm3 = np.prod([vectors[i][i].value_in_unit(unit.nanometer) for i in range(3)])
    mass_amu = sum(a.element.mass.value_in_unit(unit.amu) for a in topology.atoms() if a.element is not None)
    low, high = WATER_BOX_DENSITY
    return bool(low < mass_amu / volume_nm3 * AMU_PER_NM3_IN_G_PER_CM3 < high)


def add_water_box(
    topology: app.Topology,
    positions: NDArray[np.float64],
    force_field: app.ForceField,
    *,
    padding_nm: float,
    ionic_strength_molar: float,
    where: object = None,
) -> tuple[app.Topology, NDArray[np.float64]]:
    """Put a molecule into a cube of TIP3P water with ions that make it neutral.

    Parameters
    ----------
    topology, positions : the molecule, (A, 3) nm
    force_field : must know water and ions
    padding_nm : least distance from the molecule to the box's faces, however it turns
    ionic_strength_molar : NaCl beyond neutralisation
    where : the input, for messages

    Returns
    -------
    topology with its box, positions (A', 3) nm

    Raises
    ------
    InputError
        The force field does not know a residue, water or ions; a box smaller than twice the cutoff.
    """
    center = 0.5 * (positions.min(axis=0) + positions.max(axis=0))
    edge = 2.0 * (float(np.linalg.norm(positions - center, axis=1).max()) + padding_nm)
    if edge < 2.0 * CUTOFF_NM:
        raise InputError(
            "the water box is too small for the cutoff",
            expected=f"an edge of at least {2 * CUTOFF_NM:g} nm",
            got=f"{edge:.2f} nm",
            hint="raise padding_nm",
        )
    merged = merge_caps(topology, force_field)
    modeller = app.Modeller(merged, positions * unit.nanometer)
    try:
        with repeatable_modeller():
            modeller.addSolvent(
                force_field,
                model="tip3p",
                boxSize=openmm.Vec3(edge, edge, edge) * unit.nanometer,
                ionicStrength=ionic_strength_molar * unit.molar,
                residueTemplates=choose_templates(merged, force_field),
            )
    except Exception as error:
        if force_field.getUnmatchedResidues(topology):
            raise explain_mismatch(force_field, topology, error, where) from error
        raise InputError(
            f"cannot add water ({error})",
            hint="add a water and ion file, such as amber14/tip3p.xml, to force_field",
        ) from error
    return restore_residues(topology, modeller.topology), to_nm(modeller.positions)


def check_box(topology: app.Topology, where: object) -> None:
    """Raise :class:`InputError` unless there is a periodic box that is large enough for the cutoff."""
    vectors = topology.getPeriodicBoxVectors()
    if vectors is None:
        raise InputError(
            "explicit solvent needs a periodic box",
            where=where,
            hint="write the box (CRYST1 of a PDB, last line of a rst7), or use solvent: obc2 without water",
        )
    edges = [vectors[i][i].value_in_unit(unit.nanometer) for i in range(3)]
    if min(edges) < 2.0 * CUTOFF_NM:
        raise InputError(
            "the box is too small for the cutoff",
            expected=f"at least {2 * CUTOFF_NM:g} nm",
            got=f"{min(edges):.2f} nm",
            where=where,
        )
