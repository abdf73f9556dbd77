"""PDB files as they are deposited: one model and one location of every atom, and no gaps in the chains.

Nothing is taken silently: what is left out is in ``Deposit.changes``, for the log and the provenance.
"""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit
from pdbfixer import PDBFixer

from openmm_hvpcg.atomistic.building import LONGEST_BOND_NM, find_long_bond, label_atom, label_residue, read_file
from openmm_hvpcg.atomistic.molecule import check_positions
from openmm_hvpcg.atomistic.peptides import to_nm
from openmm_hvpcg.atomistic.solvent import holds_water_box
from openmm_hvpcg.errors import InputError

logger = logging.getLogger(__name__)

ATOM_RECORDS = ("ATOM  ", "HETATM")
#: So many entries of a list of changes are logged; the provenance has all.
SHOWN = 6


@dataclass(frozen=True)
class Deposit:
    """What a PDB file holds.

    Attributes
    ----------
    path : the file
    text : its text, with one model and one location of every atom
    topology, positions : the molecule, (A, 3) nm
    changes : JSON-ready: what was left out, replaced, added; and which disulfides there are
    missing : names of residues of SEQRES without coordinates, by the residue they stand before
    """

    path: Path
    text: str
    topology: app.Topology
    positions: NDArray[np.float64]
    changes: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def report(self, name: str) -> Deposit:
        """Log the changes, one line each."""
        for what, value in self.changes.items():
            entries = value if isinstance(value, list) else [str(value)]
            more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
            shown = f"{', '.join(entries[:SHOWN])}{more}"
            level = logging.INFO if what in ("disulfides", "protonation") else logging.WARNING
            logger.log(level, "%s: %s: %s: %s", name or "molecule", self.path, what.replace("_", " "), shown)
        return self

    def open_fixer(self) -> PDBFixer:
        """A PDBFixer of the file, on the platform whose results are the same at every call."""
        platform = openmm.Platform.getPlatformByName("Reference")
        return read_file(self.path, lambda _: PDBFixer(pdbfile=io.StringIO(self.text), platform=platform), "a PDB file")


def read_deposit(path: Path, remove: Iterable[str] = (), replaced: Iterable[str] = ()) -> Deposit:
    """Read a PDB file: its first model, of alternate locations one, without the residues named in ``remove``.

    Raises
    ------
    InputError
        No atoms, NaN, a residue to remove (or one of ``replaced``) that is not there, residues missing inside a
        chain, a disulfide of an SSBOND record that is none.
    """
    text = read_file(path, lambda p: Path(p).read_text(encoding="utf-8", errors="replace"), "a PDB file")
    if not any(line.startswith(ATOM_RECORDS) for line in text.splitlines()):
        raise InputError("holds no atoms", expected="a PDB file", where=path)
    changes: dict[str, Any] = {}
    text = _keep_first_model(text, changes)
    text = _choose_locations(text, changes)
    pdb = read_file(path, lambda _: app.PDBFile(io.StringIO(text)), "a PDB file")
    deposit = Deposit(path, text, pdb.topology, to_nm(pdb.positions), changes)
    check_positions(deposit.positions, deposit.topology, path)
    _check_names(deposit, list(replaced), "replace")
    deposit = _remove_residues(deposit, list(remove))
    gaps, ends = _find_missing(deposit)
    deposit = replace(deposit, missing=gaps)
    check_chains(deposit)
    if ends:
        changes["unresolved_ends_left_out"] = ends
    _check_ssbonds(deposit)
    disulfides = _list_disulfides(deposit.topology)
    if disulfides:
        changes["disulfides"] = disulfides
    return deposit


def check_chains(deposit: Deposit) -> None:
    """Raise :class:`InputError` naming the residues that are missing where a chain has a gap."""
    topology = deposit.topology
    found = find_long_bond(topology, deposit.positions, periodic=holds_water_box(topology))
    if found is None:
        return
    (a, b), length = found
    expected = f"bonds of at most {LONGEST_BOND_NM} nm"
    if a.residue is b.residue or {a.name, b.name} != {"C", "N"}:
        problem = f"atoms {label_atom(a)} and {label_atom(b)} are bonded but far apart"
        raise InputError(problem, expected=expected, got=f"{length:.2f} nm", where=deposit.path)
    before, after = sorted((a.residue, b.residue), key=lambda r: int(r.index))
    names = deposit.missing.get(label_residue(after), [])
    number = len(names) or _count_between(before, after)
    count = {0: "residues", 1: "1 residue"}.get(number, f"{number} residues")
    raise InputError(
        f"chain with a gap, {count}{' (' if names else ''}{' '.join(names)}{')' if names else ''} missing between"
        f" {label_residue(before)} and {label_residue(after)}",
        expected=expected,
        got=f"{length:.2f} nm from C to N",
        where=deposit.path,
        hint="build them first with a loop modeller; or end the chain there with a TER line, which makes charged ends"
        " unless you add ACE and NME",
    )


def _keep_first_model(text: str, changes: dict[str, Any]) -> str:
    lines = text.splitlines(keepends=True)
    n_models = sum(line.startswith("MODEL ") for line in lines)
    if n_models <= 1:
        return text
    kept = []
    count = 0
    for line in lines:
        count += line.startswith("MODEL ")
        if count > 1 and line.startswith((*ATOM_RECORDS, "TER", "MODEL ", "ENDMDL", "ANISOU", "SIGATM", "SIGUIJ")):
            continue
        kept.append(line)
    changes["models"] = f"the first of {n_models} taken"
    return "".join(kept)


def _choose_locations(text: str, changes: dict[str, Any]) -> str:
    """One location of every atom: of the labels a residue has, the one of largest mean occupancy in the whole file.

    Neighbours that move together carry the same label, so that what is kept fits together.
    """
    lines = text.splitlines(keepends=True)
    occupancies: dict[str, list[float]] = defaultdict(list)
    labels: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        if line.startswith(ATOM_RECORDS) and line[16] != " ":
            occupancies[line[16]].append(_parse_occupancy(line))
            labels[line[21:27]].add(line[16])
    if not labels:
        return text
    ranks = sorted(occupancies, key=lambda label: (-float(np.mean(occupancies[label])), label))
    chosen = {key: min(found, key=ranks.index) for key, found in labels.items()}
    kept = []
    for line in lines:
        if line.startswith(ATOM_RECORDS) and line[16] != " ":
            if line[16] != chosen[line[21:27]]:
                continue
            line = f"{line[:16]} {line[17:]}"
        kept.append(line)
    several = [key for key, found in labels.items() if len(found) > 1]
    if several:
        changes["alternate_locations"] = [
            f"{chosen[key]} of {'/'.join(sorted(labels[key]))} at residue {key[1:].strip()} (chain {key[0]})"
            for key in several
        ]
    return "".join(kept)


def _parse_occupancy(line: str) -> float:
    try:
        return float(line[54:60])
    except ValueError:
        return 0.0


def _check_names(deposit: Deposit, names: list[str], purpose: str) -> None:
    """Raise :class:`InputError` for a name that no residue has."""
    there = {r.name for r in deposit.topology.residues()}
    absent = [name for name in names if name not in there]
    if absent:
        raise InputError(
            f"no residue {absent[0]} to {purpose}", expected=f"one of {', '.join(sorted(there))}", where=deposit.path
        )


def _remove_residues(deposit: Deposit, names: list[str]) -> Deposit:
    if not names:
        return deposit
    residues = [r for r in deposit.topology.residues() if r.name in names]
    found = {r.name for r in residues}
    _check_names(deposit, names, "remove")
    modeller = app.Modeller(deposit.topology, deposit.positions * unit.nanometer)
    modeller.delete(residues)
    if modeller.topology.getNumAtoms() == 0:
        raise InputError(f"nothing is left without {', '.join(sorted(found))}", where=deposit.path)
    deposit.changes["removed"] = [f"{sum(r.name == name for r in residues)} {name}" for name in sorted(found)]
    return replace(deposit, topology=modeller.topology, positions=to_nm(modeller.positions))


def _find_missing(deposit: Deposit) -> tuple[dict[str, list[str]], list[str]]:
    """Residues of the SEQRES records without coordinates: by the residue they stand before; and at ends of chains."""
    if "\nSEQRES" not in f"\n{deposit.text}":
        return {}, []
    fixer = deposit.open_fixer()
    try:
        fixer.findMissingResidues()
    except Exception as error:  # residue numbers that are none, or run backwards
        logger.warning("%s: SEQRES cannot be compared with the coordinates (%s)", deposit.path, error)
        return {}, []
    chains = list(fixer.topology.chains())
    keyed = {index for index, _ in fixer.missingResidues}
    ids = [chains[index].id for index in keyed]
    gaps, ends = {}, []
    for (index, position), names in fixer.missingResidues.items():
        residues = list(chains[index].residues())
        if 0 < position < len(residues):
            gaps[label_residue(residues[position])] = list(names)
        elif ids.count(chains[index].id) == 1:  # else a TER cut the chain, and the rest of it is there
            where = "before" if position == 0 else "after"
            ends.append(f"{' '.join(names)} {where} {label_residue(residues[0 if position == 0 else -1])}")
    return gaps, ends


def _count_between(before: app.topology.Residue, after: app.topology.Residue) -> int:
    try:
        return int(after.id) - int(before.id) - 1
    except ValueError:
        return 0


def _list_disulfides(topology: app.Topology) -> list[str]:
    return [
        f"{label_residue(a.residue)} - {label_residue(b.residue)}"
        for a, b in topology.bonds()
        if a.name == b.name == "SG" and a.residue is not b.residue
    ]


def _check_ssbonds(deposit: Deposit) -> None:
    """Raise :class:`InputError` where an SSBOND record joins cysteines whose sulfurs are not bonded."""
    sulfurs = {
        (a.residue.chain.id.strip(), a.residue.id.strip(), a.residue.insertionCode.strip()): a
        for a in deposit.topology.atoms()
        if a.name == "SG"
    }
    bonded = {frozenset((a.index, b.index)) for a, b in deposit.topology.bonds()}
    for line in deposit.text.splitlines():
        if not line.startswith("SSBOND") or line[59:65].strip() != line[66:72].strip():
            continue  # operators that differ: the partner is in another cell of the crystal
        ends = [(line[c].strip(), line[c + 2 : c + 6].strip(), line[c + 6].strip()) for c in (15, 29)]
        if not all(end in sulfurs for end in ends):
            continue
        a, b = (sulfurs[end] for end in ends)
        if frozenset((a.index, b.index)) not in bonded:
            length = float(np.linalg.norm(deposit.positions[a.index] - deposit.positions[b.index]))
            raise InputError(
                f"SSBOND joins {label_residue(a.residue)} and {label_residue(b.residue)}, which are not bonded",
                expected="sulfurs at most 0.3 nm apart, without HG",
                got=f"{length:.2f} nm",
                where=deposit.path,
                hint="take the SSBOND record away, or repair the structure",
            )
