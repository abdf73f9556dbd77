"""Sequence to peptide: composition, L chirality, start dihedrals, ends."""

from __future__ import annotations

import mdtraj as md
import numpy as np
import pytest

from openmm_hvpcg.atomistic.peptides import AMINO_ACIDS, START_DIHEDRALS, build_peptide
from openmm_hvpcg.errors import InputError

#: Atoms of each residue inside a chain at pH 7 (His neutral; Asp, Glu, Lys, Arg charged), counted by hand in
#: the residue formulae. The caps have 12 more.
N_ATOMS = {
    "G": 7, "A": 10, "S": 11, "C": 11, "T": 14, "V": 16, "L": 19, "I": 19, "M": 17, "P": 14,
    "F": 20, "Y": 21, "W": 24, "D": 12, "E": 15, "N": 14, "Q": 17, "K": 22, "R": 24, "H": 17,
}  # fmt: skip


def _triple(positions: np.ndarray, center: int, a: int, b: int, c: int) -> float:
    u, v, w = (positions[i] - positions[center] for i in (a, b, c))
    return float(np.dot(u, np.cross(v, w)))


def _dihedrals(topology: md.Topology, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    trajectory = md.Trajectory(positions[None], topology)
    return np.degrees(md.compute_phi(trajectory)[1][0]), np.degrees(md.compute_psi(trajectory)[1][0])


@pytest.mark.parametrize("letter", AMINO_ACIDS)
def test_every_residue_is_complete_and_l(letter: str) -> None:
    topology, positions = build_peptide(letter)
    assert [r.name for r in topology.residues()][::2] == ["ACE", "NME"]
    assert topology.getNumAtoms() == len(positions) == N_ATOMS[letter] + 12
    atoms = {a.name: a.index for a in list(topology.residues())[1].atoms()}
    if letter != "G":
        # CORN rule of L residues: seen from HA, CO, R and N go clockwise, which makes these volumes positive.
        assert _triple(positions, atoms["CA"], atoms["N"], atoms["C"], atoms["CB"]) > 0
        assert _triple(positions, atoms["CA"], atoms["C"], atoms["N"], atoms["HA"]) > 0
    if letter == "I":  # (2S,3S): priorities at CB are CA, CG1, CG2, H
        assert _triple(positions, atoms["CB"], atoms["CA"], atoms["CG1"], atoms["CG2"]) > 0
    if letter == "T":  # (2S,3R): priorities at CB are OG1, CA, CG2, H
        assert _triple(positions, atoms["CB"], atoms["OG1"], atoms["CA"], atoms["CG2"]) < 0


@pytest.mark.parametrize("start", ["extended", "helix"])
def test_start_dihedrals_of_a_long_peptide(start: str) -> None:
    topology, positions = build_peptide("ACDEFGHIKLMNQRSTVWY", start=start)  # type: ignore[arg-type]
    phi, psi = _dihedrals(md.Topology.from_openmm(topology), positions)
    want_phi, want_psi = START_DIHEDRALS[start]
    assert len(phi) == len(psi) == 19
    # PeptideBuilder's coordinates are rounded to 1e-3 A, which is well below 1 degree in a dihedral.
    np.testing.assert_allclose(phi, want_phi, atol=1.0)
    np.testing.assert_allclose(psi, want_psi, atol=1.0)


def test_helix_is_shorter_than_extended() -> None:
    length = {}
    for start in ("extended", "helix"):
        topology, positions = build_peptide("A" * 10, start=start)  # type: ignore[arg-type]
        ca = [a.index for a in topology.atoms() if a.name == "CA"]
        length[start] = np.linalg.norm(positions[ca[-1]] - positions[ca[0]]) / 9
    # Rise per residue: alpha helix 0.15 nm; extended strand 0.32 to 0.38 nm.
    assert 0.13 < length["helix"] < 0.18
    assert 0.30 < length["extended"] < 0.39


def test_uncapped_ends_are_charged() -> None:
    topology, _ = build_peptide("GA", caps=False)
    first, last = topology.residues()
    assert {"H", "H2", "H3"} <= {a.name for a in first.atoms()}
    assert "OXT" in {a.name for a in last.atoms()}
    assert topology.getNumAtoms() == 7 + 10 + 3


def test_all_bonds_are_there() -> None:
    topology, positions = build_peptide("WHPK")
    bonded = {i for bond in topology.bonds() for i in (bond[0].index, bond[1].index)}
    assert bonded == set(range(topology.getNumAtoms()))
    lengths = [np.linalg.norm(positions[a.index] - positions[b.index]) for a, b in topology.bonds()]
    # No bond of a peptide is longer than C-S, 0.18 nm; PeptideBuilder's proline ring closes within 0.02 nm.
    assert max(lengths) < 0.20


def test_the_same_at_every_call() -> None:
    np.testing.assert_array_equal(build_peptide("AH")[1], build_peptide("AH")[1])


def test_lower_case_and_proline_phi() -> None:
    topology, positions = build_peptide("apa")
    phi, _ = _dihedrals(md.Topology.from_openmm(topology), positions)
    assert phi[1] == pytest.approx(-65.0, abs=1.0)


@pytest.mark.parametrize(("sequence", "words"), [("AXB", "'X' at position 2"), ("", "empty"), ("A A", "position 2")])
def test_bad_sequences(sequence: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_peptide(sequence)


def test_bad_start() -> None:
    with pytest.raises(InputError, match="extended or helix"):
        build_peptide("A", start="sheet")  # type: ignore[arg-type]
