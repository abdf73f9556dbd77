"""One-letter sequence to a peptide with hydrogens, in an extended or helical start structure."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Literal

import numpy as np
import openmm
import PeptideBuilder
from numpy.typing import NDArray
from openmm import app, unit

from openmm_hvpcg.errors import InputError

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"

#: Backbone dihedrals (phi, psi) in degrees; proline's ring fixes its phi near -65.
START_DIHEDRALS = {"extended": (-120.0, 140.0), "helix": (-57.8, -47.0)}
PROLINE_PHI = -65.0

#: Atoms of the two glycines around the sequence that become the caps, and their names there.
ACE_ATOMS = {"CA": "CH3", "C": "C", "O": "O"}
NME_ATOMS = {"N": "N", "CA": "C"}


def build_peptide(
    sequence: str, caps: bool = True, start: Literal["extended", "helix"] = "extended"
) -> tuple[app.Topology, NDArray[np.float64]]:
    """Build a peptide from its sequence, all atoms, L amino acids, pH 7.

    PeptideBuilder (Tien et al., PeerJ 1, e80, 2013) places the heavy atoms, OpenMM's Modeller the hydrogens.
    The caps are what is left of one glycine more at either end. The result is not minimised.

    Parameters
    ----------
    sequence : one-letter codes of the twenty amino acids; upper or lower case
    caps : ACE and NME at the ends; without them the ends are charged (NH3+, COO-)
    start : "extended" (phi -120, psi 140) or "helix" (phi -57.8, psi -47)

    Returns
    -------
    topology : openmm.app.Topology with all bonds
    positions : (A, 3) float64, nm

    Raises
    ------
    InputError
        Empty sequence, or a letter that is no amino acid (named with its position).
    """
    sequence = _check_sequence(sequence)
    if start not in START_DIHEDRALS:
        raise InputError("unknown start structure", expected=" or ".join(START_DIHEDRALS), got=start)
    residues = _build_heavy_atoms(f"G{sequence}G" if caps else sequence, start, add_oxt=not caps)
    if caps:
        residues[0] = ("ACE", _rename(residues[0][1], ACE_ATOMS))
        residues[-1] = ("NME", _rename(residues[-1][1], NME_ATOMS))
    topology, positions = _to_openmm(residues)
    with repeatable_modeller():
        modeller = app.Modeller(topology, positions * unit.nanometer)
        modeller.addHydrogens(platform=openmm.Platform.getPlatformByName("Reference"))
    return modeller.topology, to_nm(modeller.positions)


@contextlib.contextmanager
def repeatable_modeller() -> Iterator[None]:
    """Give OpenMM's Modeller, which draws from Python's global generator, the same numbers at every call."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def to_nm(positions: unit.Quantity) -> NDArray[np.float64]:
    """OpenMM positions as a float64 array in nm."""
    return np.array([[*p] for p in positions.value_in_unit(unit.nanometer)], dtype=np.float64).reshape(-1, 3)


def _check_sequence(sequence: str) -> str:
    letters = sequence.strip().upper()
    if not letters:
        raise InputError("the sequence is empty", expected="one-letter amino acids, such as AAGAA")
    for position, letter in enumerate(letters, start=1):
        if letter not in AMINO_ACIDS:
            raise InputError(
                f"unknown residue {letter!r} at position {position} of the sequence",
                expected=f"one of {AMINO_ACIDS}",
                got=sequence.strip(),
            )
    return letters


_Residue = tuple[str, dict[str, tuple[str, NDArray[np.float64]]]]


def _build_heavy_atoms(sequence: str, start: str, *, add_oxt: bool) -> list[_Residue]:
    """Residues as (name, atom name -> (element, position in nm)), in order."""
    phi, psi = START_DIHEDRALS[start]
    phis = [PROLINE_PHI if letter == "P" else phi for letter in sequence]
    n = len(sequence) - 1
    structure = PeptideBuilder.make_structure(sequence, phis[1:], [psi] * n, [180.0] * n)
    if add_oxt:
        structure = PeptideBuilder.add_terminal_OXT(structure)
    return [
        (
            residue.get_resname(),
            {a.get_name(): (a.element, np.asarray(a.get_coord(), dtype=np.float64) / 10.0) for a in residue},
        )
        for residue in structure.get_residues()
    ]


def _rename(
    atoms: dict[str, tuple[str, NDArray[np.float64]]], names: dict[str, str]
) -> dict[str, tuple[str, NDArray[np.float64]]]:
    return {new: atoms[old] for old, new in names.items()}


def _to_openmm(residues: list[_Residue]) -> tuple[app.Topology, NDArray[np.float64]]:
    topology = app.Topology()
    chain = topology.addChain("A")
    positions = []
    for number, (name, atoms) in enumerate(residues, start=1):
        residue = topology.addResidue(name, chain, id=str(number))
        for atom_name, (symbol, position) in atoms.items():
            topology.addAtom(atom_name, app.element.get_by_symbol(symbol), residue)
            positions.append(position)
    topology.createStandardBonds()
    return topology, np.array(positions)
