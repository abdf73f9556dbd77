"""Add what a deposited PDB lacks: side-chain atoms, ends, hydrogens; the same at every call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openmm
from openmm import app, unit
from pdbfixer import PDBFixer

from openmm_hvpcg.atomistic.building import label_residue
from openmm_hvpcg.atomistic.pdb_reading import Deposit, check_chains
from openmm_hvpcg.atomistic.peptides import repeatable_modeller, to_nm
from openmm_hvpcg.errors import InputError

#: Seed of the short dynamics by which pdbfixer moves new atoms out of others' way.
SEED = 1

#: Residues that may be replaced without a word from the user: they differ from what stands for them by selenium instead
#: of sulfur (MSE) or in protonation, which ``ph`` decides. All others are modifications.
HARMLESS = ("MSE", "HIP", "CYM")

#: Residues that take or give up a proton near pH 7, whose state is worth telling.
TITRATABLE = ("ASP", "GLU", "HIS", "LYS", "CYS")


def repair(deposit: Deposit, force_field: app.ForceField, ph: float, replaceable: Iterable[str] = ()) -> Deposit:
    """Replace non-standard residues, add missing heavy atoms and hydrogens; atoms that are there do not move.

    pdbfixer knows the residues (MSE becomes MET, say) and places heavy atoms, on the Reference platform and with a
    fixed seed; OpenMM's Modeller places the hydrogens and chooses protonation states by ``ph``, histidine's tautomer
    by its hydrogen bonds. Residues that neither knows stay as they are.

    Parameters
    ----------
    deposit : what was read
    force_field : residues it has templates for are not replaced
    ph : for the protonation states
    replaceable : names of modified residues that may lose their modification

    Returns
    -------
    The repaired structure, ``changes`` saying what was done; ``deposit`` itself where nothing was to be done.

    Raises
    ------
    InputError
        A modified residue that may not be replaced; an atom cannot be placed, or a chain turns out to have a gap.
    """
    changes = dict(deposit.changes)
    fixer = deposit.open_fixer()
    fixer.topology = deposit.topology
    fixer.positions = [openmm.Vec3(*p) for p in deposit.positions.tolist()] * unit.nanometer
    try:
        _replace_residues(fixer, force_field, (*HARMLESS, *replaceable), deposit.path, changes)
        _add_heavy_atoms(fixer, changes)
        modeller = _add_hydrogens(fixer, ph, changes)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot be repaired ({type(error).__name__}: {error})", where=deposit.path) from error
    if changes == deposit.changes:
        return deposit
    repaired = replace(deposit, topology=modeller.topology, positions=to_nm(modeller.positions), changes=changes)
    # Residues that were replaced have only now bonds to their neighbours.
    check_chains(repaired)
    return repaired


def _replace_residues(
    fixer: PDBFixer, force_field: app.ForceField, replaceable: tuple[str, ...], path: Path, changes: dict[str, Any]
) -> None:
    fixer.findNonstandardResidues()
    unknown = [(r, name) for r, name in fixer.nonstandardResidues if r.name not in force_field._templates]
    if not unknown:
        return
    for residue, name in unknown:
        if residue.name not in replaceable:
            raise InputError(
                f"{label_residue(residue)} is a modified {name}, unknown to the force field",
                where=path,
                hint=f"add a force field that knows {residue.name}; or set replace: [{residue.name}], which makes it"
                f" {name} and so another molecule",
            )
    changes["replaced"] = [f"{label_residue(residue)} by {name}" for residue, name in unknown]
    fixer.nonstandardResidues = unknown
    fixer.replaceNonstandardResidues()


def _add_heavy_atoms(fixer: PDBFixer, changes: dict[str, Any]) -> None:
    # Residues are never invented: gaps were refused, ends that are not resolved stay away.
    fixer.missingResidues = {}
    fixer.findMissingAtoms()
    missing = {r: [a.name for a in atoms] for r, atoms in fixer.missingAtoms.items()}
    for residue, names in fixer.missingTerminals.items():
        missing.setdefault(residue, []).extend(names)
    added = [f"{' '.join(missing[r])} of {label_residue(r)}" for r in fixer.topology.residues() if r in missing]
    if added:
        changes["added_heavy_atoms"] = added
    if added or "replaced" in changes:
        fixer.addMissingAtoms(seed=SEED)


def _add_hydrogens(fixer: PDBFixer, ph: float, changes: dict[str, Any]) -> app.Modeller:
    """Not pdbfixer's own way, which asks the PDB over the network for residues it does not know."""
    before = fixer.topology.getNumAtoms()
    modeller = app.Modeller(fixer.topology, fixer.positions)
    with repeatable_modeller():
        modeller.addHydrogens(pH=ph, platform=openmm.Platform.getPlatformByName("Reference"))
    count = modeller.topology.getNumAtoms() - before
    if count:
        changes["added_hydrogens"] = f"{count} at pH {ph:g}"
        bridged = {
            a.residue for bond in modeller.topology.bonds() if bond[0].name == bond[1].name == "SG" for a in bond
        }
        states = [
            f"{_name_state(residue, residue in bridged)} {residue.id} (chain {residue.chain.id})"
            for residue in modeller.topology.residues()
            if residue.name in TITRATABLE
        ]
        if states:
            changes["protonation"] = states
    return modeller


def _name_state(residue: app.topology.Residue, bridged: bool) -> str:
    """Name of a protonation state as Amber has it; ``bridged``: the residue is in a disulfide."""
    names = {atom.name for atom in residue.atoms()}
    if residue.name == "HIS":
        return {(True, True): "HIP", (True, False): "HID"}.get(("HD1" in names, "HE2" in names), "HIE")
    if residue.name == "CYS":
        return "CYX" if bridged else "CYS" if "HG" in names else "CYM"
    if residue.name == "LYS":
        return "LYS" if {"HZ1", "HZ2", "HZ3"} <= names else "LYN"
    protonated = {"ASP": ("ASH", {"HD1", "HD2"}), "GLU": ("GLH", {"HE1", "HE2"})}[residue.name]
    return protonated[0] if names & protonated[1] else residue.name
