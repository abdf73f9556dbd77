"""Force fields by short name or OpenMM XML file, and what is wrong with a residue that none of them knows."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmm import app

from openmm_hvpcg.errors import InputError
from openmm_hvpcg.storage import hash_file

#: Short name: (files for the solute, files added for explicit water and ions).
SHORT_NAMES: dict[str, tuple[list[str], list[str]]] = {
    "amber14": (["amber14-all.xml"], ["amber14/tip3p.xml"]),
    "amber99sbildn": (["amber99sbildn.xml"], ["tip3p.xml"]),
    "charmm36": (["charmm36.xml"], ["charmm36/water.xml"]),
}

#: Protonation states that PDB files write under one name.
VARIANTS = {
    "HIS": ("HID", "HIE", "HIP"),
    "ASP": ("ASH",),
    "GLU": ("GLH",),
    "LYS": ("LYN",),
    "CYS": ("CYX", "CYM"),
}


CAPS = ("ACE", "NME")


@dataclass(frozen=True)
class LoadedForceField:
    """A force field, the files it came from and the hashes of those that are the user's own."""

    force_field: app.ForceField
    files: tuple[str, ...]
    hashes: dict[str, str]


def load_force_field(force_field: str | list[str], *, explicit: bool, base: Path = Path(".")) -> LoadedForceField:
    """Load a force field.

    Parameters
    ----------
    force_field : a short name (amber14, amber99sbildn, charmm36), or XML files: the user's, relative to
        ``base``, or OpenMM's own. Short names bring TIP3P water and ions along where ``explicit``
    explicit : water and ions are needed

    Raises
    ------
    InputError
        Unknown name, a file that does not exist or cannot be read.
    """
    given = [force_field] if isinstance(force_field, str) else list(force_field)
    names: list[str] = []
    for name in given:
        solute, water = SHORT_NAMES.get(name, ([name], []))
        names += solute + (water if explicit else [])
    if not names:
        raise InputError("no force field given", expected=", ".join(SHORT_NAMES))
    own = {name: base / name for name in names if (base / name).is_file()}
    try:
        loaded = app.ForceField(*[str(own.get(name, name)) for name in names])
    except Exception as error:
        raise _explain_failure(names, own, error) from error
    return LoadedForceField(loaded, tuple(names), {name: hash_file(path) for name, path in own.items()})


def _explain_failure(names: list[str], own: dict[str, Path], error: Exception) -> InputError:
    data = Path(app.__file__).parent / "data"
    for name in names:
        if name not in own and not (data / name).is_file():
            known = [*SHORT_NAMES, *(str(p.relative_to(data)) for p in data.rglob("*.xml"))]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "name an XML file of OpenMM or of your own"
            return InputError(
                f"unknown force field {name!r}",
                expected=f"{', '.join(SHORT_NAMES)} or an XML file",
                hint=hint,
            )
    return InputError(f"force field {', '.join(names)} cannot be read ({error})")


def explain_mismatch(
    force_field: app.ForceField, topology: app.Topology, error: Exception, where: object = None
) -> InputError:
    """Say what is wrong with the residue OpenMM found no template for, or pass on OpenMM's own words."""
    named = re.search(r"No template found for residue (\d+)", str(error))
    unmatched = force_field.getUnmatchedResidues(topology)
    if named is None or not unmatched:
        return InputError(f"OpenMM cannot build the System ({error})", where=where)
    residue = _pick_residue(force_field, topology, unmatched, int(named.group(1)))
    label = f"residue {residue.name} {residue.id} (chain {residue.chain.id})"
    more = f" ({len(unmatched) - 1} more residues do not match)" if len(unmatched) > 1 else ""
    templates = _candidate_templates(force_field, residue)
    if not templates:
        return InputError(
            f"{label} is unknown to the force field{more}",
            where=where,
            hint="rename or remove it, or add a force-field XML with a template for it",
        )
    missing, extra = min((_compare(residue, template) for template in templates), key=lambda d: len(d[0]) + len(d[1]))
    hydrogens = [name for name, symbol in missing if symbol == "H"]
    heavy = [name for name, symbol in missing if symbol != "H"]
    if heavy:
        return InputError(
            f"{label} lacks atoms {_list(heavy)}{more}", where=where, hint="rebuild them, e.g. with pdbfixer"
        )
    if hydrogens:
        return InputError(
            f"{label} lacks hydrogens {_list(hydrogens)}{more}",
            where=where,
            hint="add them, e.g. with Modeller.addHydrogens or pdbfixer",
        )
    detail = f"has atoms the template lacks: {_list(extra)}" if extra else "has bonds or ends that fit no template"
    return InputError(
        f"{label} {detail}{more}",
        where=where,
        hint="check protonation, chain breaks (TER lines) and terminal atoms such as OXT",
    )


def _pick_residue(
    force_field: app.ForceField, topology: app.Topology, unmatched: list[app.topology.Residue], number: int
) -> app.topology.Residue:
    """The residue to explain: one of unknown name (its neighbours fail with it), or the one OpenMM named."""
    merged = merge_caps(topology, force_field)
    if merged is not topology:  # caps then have no templates of their own
        unmatched = [r for r in unmatched if r.name not in CAPS] or unmatched
    unknown = [r for r in unmatched if not _candidate_templates(force_field, r)]
    if unknown:
        return unknown[0]
    named = {a.index for a in list(merged.residues())[number].atoms()}
    return next((r for r in unmatched if next(r.atoms()).index in named), unmatched[0])


def _candidate_templates(force_field: app.ForceField, residue: app.topology.Residue) -> list[Any]:
    names = {residue.name, *VARIANTS.get(residue.name, ())}
    inside = [force_field._templates[n] for n in sorted(names) if n in force_field._templates]
    residues = list(residue.chain.residues())
    ends = ("N" if residue is residues[0] else "", "C" if residue is residues[-1] else "")
    terminal = [f"{end}{n}" for end in ends if end for n in sorted(names)]
    return inside + [force_field._templates[n] for n in terminal if n in force_field._templates]


def _compare(residue: app.topology.Residue, template: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Atoms (name, element) the residue lacks, and names of those it has too many, matched by element."""
    have = [(a.name, a.element.symbol if a.element else "") for a in residue.atoms()]
    want = [(a.name, a.element.symbol if a.element else "") for a in template.atoms]
    missing: list[tuple[str, str]] = []
    extra: list[str] = []
    for symbol in sorted({s for _, s in have + want}):
        here = [n for n, s in have if s == symbol]
        there = [n for n, s in want if s == symbol]
        surplus = len(there) - len(here)
        if surplus > 0:
            absent = [n for n in there if n not in here]
            missing += [(n, symbol) for n in absent[:surplus]]
        elif surplus < 0:
            extra += [n for n in here if n not in there][:-surplus]
    return missing, extra


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def merge_caps(topology: app.Topology, force_field: app.ForceField) -> app.Topology:
    """Put ACE and NME into the residues next to them, where the force field knows caps as patches only.

    So it is in CHARMM. Atoms, their order and bonds stay; the result serves to match templates.
    """
    if "ACE" in force_field._templates or "ACE" not in force_field._patches:
        return topology
    result = app.Topology()
    result.setPeriodicBoxVectors(topology.getPeriodicBoxVectors())
    for chain in topology.chains():
        new_chain = result.addChain(chain.id)
        target = None
        previous = ""
        for residue in chain.residues():
            if target is None or not (previous == "ACE" or residue.name == "NME"):
                target = result.addResidue(residue.name, new_chain, residue.id, residue.insertionCode)
            elif previous == "ACE":
                target.name = residue.name
            for atom in residue.atoms():
                result.addAtom(atom.name, atom.element, target)
            previous = residue.name
    _copy_bonds(topology, result)
    return result


def choose_templates(merged: app.Topology, force_field: app.ForceField) -> dict[app.topology.Residue, str]:
    """Templates OpenMM cannot choose itself: CHARMM holds capped alanine twice (ALAD, and AANM of CGenFF)."""
    caps = {"CH3", "N", "CA", "C", "O", "CB"}
    return {
        residue: "ALAD"
        for residue in merged.residues()
        if residue.name == "ALA"
        and "ALAD" in force_field._templates
        and len(list(residue.atoms())) == len(force_field._templates["ALAD"].atoms)
        and caps <= {a.name for a in residue.atoms()}
    }


def restore_residues(original: app.Topology, solvated: app.Topology) -> app.Topology:
    """The atoms of ``solvated``, of which the first ones belong to the residues of ``original``."""
    result = app.Topology()
    result.setPeriodicBoxVectors(solvated.getPeriodicBoxVectors())
    n_solute = original.getNumAtoms()
    for source, first in ((original, 0), (solvated, n_solute)):
        for chain in source.chains():
            residues = [r for r in chain.residues() if next(r.atoms()).index >= first]
            new_chain = result.addChain(chain.id) if residues else None
            for residue in residues:
                new_residue = result.addResidue(residue.name, new_chain, residue.id, residue.insertionCode)
                for atom in residue.atoms():
                    result.addAtom(atom.name, atom.element, new_residue)
    _copy_bonds(solvated, result)
    return result


def _copy_bonds(source: app.Topology, target: app.Topology) -> None:
    atoms = list(target.atoms())
    for bond in source.bonds():
        target.addBond(atoms[bond[0].index], atoms[bond[1].index], bond.type, bond.order)
