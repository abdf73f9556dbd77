"""PDB files as they are deposited: what is chosen, left out, added and replaced, and what is refused by name."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openmm import app, unit

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.pdb_reading import read_deposit
from openmm_hvpcg.atomistic.peptides import build_peptide
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.mapping import build_bead_map

DATA = Path(__file__).resolve().parents[2] / "data"


def write(tmp_path: Path, lines: Iterable[str]) -> Path:
    (tmp_path / "x.pdb").write_text("\n".join(lines) + "\n")
    return tmp_path


def build(base: Path, flexible: str | None = None, **settings: Any) -> AtomisticSystem:
    return build_atomistic_system(
        InputSettings.model_validate({"pdb": "x.pdb", **settings}),
        temperature_K=300.0,
        name="m",
        base=base,
        flexible_beads=None if flexible is None else lambda topology: build_bead_map(flexible, topology),
    )


def make_pdb(sequence: str, *, caps: bool = True, start: Any = "extended") -> list[str]:
    """Atom lines of a peptide with all its hydrogens."""
    topology, positions = build_peptide(sequence, caps, start)
    return list_lines(topology, positions)


def list_lines(topology: app.Topology, positions: np.ndarray) -> list[str]:
    lines = []
    for number, (atom, position) in enumerate(zip(topology.atoms(), 10 * positions, strict=True), start=1):
        lines.append(
            format_atom(number, atom.name, atom.residue.name, int(atom.residue.id), position, atom.element.symbol)
        )
    return lines


def format_atom(
    number: int, name: str, residue: str, residue_number: int, position: Iterable[float], element: str, chain: str = "A"
) -> str:
    padded = f" {name:<3}" if len(name) < 4 else name
    x, y, z = position
    head = f"ATOM  {number:5d} {padded} {residue:>3} {chain}{residue_number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
    return f"{head}  1.00  0.00          {element:>2}"


def is_heavy(line: str) -> bool:
    return line[76:78].strip() != "H"


def name_of(line: str) -> str:
    return line[12:16].strip()


def number_of(line: str) -> int:
    return int(line[22:26])


def rename(line: str, residue: str) -> str:
    return line[:17] + residue + line[20:]


def shift(line: str, x: float) -> str:
    return f"{line[:30]}{float(line[30:38]) + x:8.3f}{line[38:]}"


DIALANINE = [line for line in (DATA / "dialanine.pdb").read_text().splitlines() if line[:6] in ("ATOM  ", "HETATM")]


def test_a_complete_file_is_used_untouched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    molecule = build(write(tmp_path, DIALANINE))
    positions = np.array([[float(line[k : k + 8]) for k in (30, 38, 46)] for line in DIALANINE]) / 10
    np.testing.assert_allclose(molecule.positions, positions, atol=1e-9)
    assert "changes" not in molecule.provenance
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    # The pH changes nothing about what has its protons.
    aspartate = write(tmp_path, make_pdb("D"))
    assert build(aspartate, ph=2.0).system_hash == build(aspartate).system_hash


def test_what_is_missing_is_added_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [line for line in DIALANINE if is_heavy(line) and not (name_of(line) == "CB" and number_of(line) == 2)]
    molecule = build(write(tmp_path, lines), flexible="ca")
    assert molecule.n_atoms == 32
    changes = json.loads(json.dumps(molecule.provenance))["changes"]
    assert changes == {"added_heavy_atoms": ["CB of ALA 2 (chain A)"], "added_hydrogens": "17 at pH 7"}
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [w.split("x.pdb: ")[1] for w in warned] == [
        "added heavy atoms: CB of ALA 2 (chain A)",
        "added hydrogens: 17 at pH 7",
    ]
    assert molecule.provenance["lifted_constraints"] == 2
    kept = {(number_of(line), name_of(line)): [float(line[k : k + 8]) / 10 for k in (30, 38, 46)] for line in lines}
    places = {(a.residue.resSeq, a.name): molecule.positions[a.index] for a in molecule.topology.atoms}
    for key, position in kept.items():
        np.testing.assert_allclose(places[key], position, atol=1e-9)
    # A carbon of a chain, near its neighbours and on the side of an L amino acid.
    n, ca, c, cb = (places[2, name] for name in ("N", "CA", "C", "CB"))
    assert np.linalg.norm(cb - ca) == pytest.approx(0.153, abs=0.02)
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 0
    # The deleted carbon comes back to where it was, within the width of a soft potential.
    original = next(line for line in DIALANINE if name_of(line) == "CB" and number_of(line) == 2)
    assert np.linalg.norm(cb - np.array([float(original[k : k + 8]) / 10 for k in (30, 38, 46)])) < 0.04


def test_repair_is_the_same_at_every_call(tmp_path: Path) -> None:
    lines = [line for line in make_pdb("LSEY") if is_heavy(line) and name_of(line)[1:2] not in ("D", "E", "Z")]
    first, second = (build(write(tmp_path, lines)) for _ in range(2))
    np.testing.assert_array_equal(first.positions, second.positions)
    assert first.system_hash == second.system_hash
    added = first.provenance["changes"]["added_heavy_atoms"]
    assert [entry.split(" of ")[1] for entry in added] == ["LEU 2 (chain A)", "GLU 4 (chain A)", "TYR 5 (chain A)"]


def test_repair_can_be_forbidden(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks hydrogens"):
        build(write(tmp_path, filter(is_heavy, DIALANINE)), repair=False)


@pytest.mark.parametrize(
    ("ph", "states"),
    [
        (7.0, ["ASP 2", "HI[DE] 3", "LYS 4", "GLU 5", "CYS 6"]),
        (2.0, ["ASH 2", "HIP 3", "LYS 4", "GLH 5", "CYS 6"]),
        (12.0, ["ASP 2", "HI[DE] 3", "LYN 4", "GLU 5", "CYM 6"]),
    ],
)
def test_protonation_follows_the_ph(tmp_path: Path, ph: float, states: list[str]) -> None:
    write(tmp_path, filter(is_heavy, make_pdb("DHKEC")))
    molecule = build(tmp_path, ph=ph, solvent="vacuum")
    found = molecule.provenance["changes"]["protonation"]
    assert len(found) == len(states)
    for entry, state in zip(found, states, strict=True):
        assert re.fullmatch(rf"{state} \(chain A\)", entry)
    charge = {7.0: -1, 2.0: 2, 12.0: -3}[ph]
    nonbonded = next(f for f in molecule.system.getForces() if hasattr(f, "getNumExceptions"))
    total = sum(nonbonded.getParticleParameters(i)[0]._value for i in range(molecule.n_atoms))
    assert total == pytest.approx(charge, abs=1e-4)


def test_ends_without_caps(tmp_path: Path) -> None:
    lines = [line for line in make_pdb("AAA", caps=False) if is_heavy(line) and name_of(line) != "OXT"]
    molecule = build(write(tmp_path, lines))
    assert molecule.provenance["changes"]["added_heavy_atoms"] == ["OXT of ALA 3 (chain A)"]
    assert molecule.n_atoms == 33  # NH3+ and COO-


# --- one of several ---


def with_locations(lines: list[str], first: str, second: str) -> list[str]:
    """Alanine 2 and 3 at two locations, B 0.05 nm apart; ``first``, ``second``: their occupancies."""
    result = []
    for line in lines:
        if number_of(line) in (2, 3) and name_of(line) == "CB":
            for label, occupancy, x in (("A", first, 0.0), ("B", second, 0.5)):
                moved = shift(line, x)
                result.append(f"{moved[:16]}{label}{moved[17:54]}{occupancy:>6}{moved[60:]}")
        else:
            result.append(line)
    return result


@pytest.mark.parametrize(
    ("first", "second", "kept"), [("0.60", "0.40", "A"), ("0.30", "0.70", "B"), ("0.5", "0.5", "A")]
)
def test_alternate_locations(tmp_path: Path, first: str, second: str, kept: str) -> None:
    molecule = build(write(tmp_path, with_locations(DIALANINE, first, second)))
    assert molecule.n_atoms == 32
    plain = build(DATA, pdb="dialanine.pdb")
    moved = np.flatnonzero(np.linalg.norm(molecule.positions - plain.positions, axis=1) > 1e-6)
    names = [str(plain.topology.atom(i)) for i in moved]
    assert names == ([] if kept == "A" else ["ALA2-CB", "ALA3-CB"])
    assert molecule.provenance["changes"]["alternate_locations"] == [
        f"{kept} of A/B at residue {n} (chain A)" for n in (2, 3)
    ]


def test_two_residues_at_one_place(tmp_path: Path) -> None:
    """Of an alanine and a glycine at one place the one of larger occupancy is taken, whole."""
    lines = []
    for line in DIALANINE:
        if number_of(line) != 2:
            lines.append(line)
            continue
        lines.append(f"{line[:16]}A{line[17:54]}  0.40{line[60:]}")
        if name_of(line) in ("N", "CA", "C", "O"):
            lines.append(f"{rename(line, 'GLY')[:16]}B{rename(line, 'GLY')[17:54]}  0.60{line[60:]}")
    molecule = build(write(tmp_path, lines))
    assert [r.name for r in molecule.topology.residues] == ["ACE", "GLY", "ALA", "NME"]
    assert molecule.provenance["changes"]["alternate_locations"] == ["B of A/B at residue 2 (chain A)"]


def test_the_first_of_several_models(tmp_path: Path) -> None:
    second = [shift(line, 1.0) for line in DIALANINE]
    lines = ["MODEL        1", *DIALANINE, "ENDMDL", "MODEL        2", *second, "ENDMDL", "END"]
    molecule = build(write(tmp_path, lines))
    plain = build(DATA, pdb="dialanine.pdb")
    np.testing.assert_array_equal(molecule.positions, plain.positions)
    assert molecule.system_hash == plain.system_hash
    assert molecule.provenance["changes"] == {"models": "the first of 2 taken"}


# --- waters, ions, ligands, other residues ---

WATER = format_atom(900, "O", "HOH", 101, (3.0, 12.0, 9.0), "O")
SODIUM = format_atom(901, "NA", "NA", 102, (-6.0, 8.0, 9.0), "NA")
LIGAND = format_atom(902, "C1", "XYZ", 103, (9.0, 9.0, 9.0), "C")
CRYSTAL = "CRYST1   40.000   42.000   44.000  90.00  90.00  90.00 P 21 21 21    4"


def test_what_else_is_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    for extra, message in (
        (WATER, r"holds 1 water molecules, but the solvent is obc2.*remove: \[HOH\]"),
        (SODIUM, r"residue NA 102 \(chain A\) is unknown"),
        (LIGAND, r"residue XYZ 103 \(chain A\) is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            build(write(tmp_path, [*filter(is_heavy, DIALANINE), "TER", extra]))


def test_residues_are_removed_where_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, [*DIALANINE, "TER", WATER, SODIUM, LIGAND, WATER.replace("101", "104")])
    molecule = build(tmp_path, remove=["HOH", "NA", "XYZ"])
    assert molecule.provenance["changes"] == {"removed": ["2 HOH", "1 NA", "1 XYZ"]}
    assert molecule.system_hash == build(DATA, pdb="dialanine.pdb").system_hash
    with pytest.raises(InputError, match="no residue GOL to remove: expected one of ACE, ALA, HOH, NA, NME, XYZ"):
        build(tmp_path, remove="GOL")


def test_crystal_water_and_ions_go_into_a_new_box(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [CRYSTAL, *filter(is_heavy, DIALANINE), "TER", WATER, SODIUM])
    with caplog.at_level(logging.INFO):
        molecule = build(tmp_path, solvent="explicit", padding_nm=0.7)
    assert "CRYST1 is no box of water" in caplog.text
    names = [r.name for r in molecule.topology.residues]
    assert names[:4] == ["ACE", "ALA", "ALA", "NME"]
    assert (names.count("NA"), names.count("CL")) == (1, 1)  # a chloride makes it neutral
    assert names.count("HOH") > 300
    assert molecule.box is not None
    assert molecule.box[0, 0] == pytest.approx(molecule.box[2, 2])  # not that of the crystal
    oxygen = next(a for a in molecule.topology.atoms if a.residue.name == "HOH" and a.element.symbol == "O")
    heavy = molecule.topology.select("not water and name CA and resid 1")[0]
    start = np.array([float(DIALANINE[8][k : k + 8]) / 10 for k in (30, 38, 46)])
    np.testing.assert_allclose(
        molecule.positions[oxygen.index] - molecule.positions[heavy], np.array([0.3, 1.2, 0.9]) - start, atol=1e-5
    )
    assert molecule.provenance["changes"]["added_hydrogens"] == "19 at pH 7"


def test_selenomethionine_becomes_methionine(tmp_path: Path) -> None:
    lines = []
    for line in filter(is_heavy, make_pdb("AMA")):
        if number_of(line) == 3:
            line = rename(line, "MSE").replace("ATOM  ", "HETATM")
            if name_of(line) == "SD":
                line = f"{line[:12]}SE  {line[16:76]}SE"
        lines.append(line)
    molecule = build(write(tmp_path, lines))
    assert [r.name for r in molecule.topology.residues] == ["ACE", "ALA", "MET", "ALA", "NME"]
    changes = molecule.provenance["changes"]
    assert changes["replaced"] == ["MSE 3 (chain A) by MET"]
    assert changes["added_heavy_atoms"] == ["SD of MET 3 (chain A)"]
    assert {a.element.symbol for a in molecule.topology.atoms} == {"C", "H", "N", "O", "S"}
    with pytest.raises(InputError, match=r"residue MSE 3 \(chain A\) is unknown"):
        build(tmp_path, repair=False)


@pytest.mark.parametrize(("sequence", "modified", "standard"), [("ASA", "SEP", "SER"), ("AKA", "ALY", "LYS")])
def test_a_modification_is_not_dropped_unasked(tmp_path: Path, sequence: str, modified: str, standard: str) -> None:
    lines = [
        rename(line, modified).replace("ATOM  ", "HETATM") if number_of(line) == 3 else line
        for line in filter(is_heavy, make_pdb(sequence))
    ]
    write(tmp_path, lines)
    with pytest.raises(
        InputError, match=rf"{modified} 3 \(chain A\) is a modified {standard}, unknown.*replace: \[{modified}\]"
    ) as caught:
        build(tmp_path)
    assert "cannot be repaired" not in str(caught.value)
    molecule = build(tmp_path, replace=modified)
    assert [r.name for r in molecule.topology.residues] == ["ACE", "ALA", standard, "ALA", "NME"]
    assert molecule.provenance["changes"]["replaced"] == [f"{modified} 3 (chain A) by {standard}"]
    with pytest.raises(InputError, match="no residue TPO to replace: expected one of ACE, ALA"):
        build(tmp_path, replace=[modified, "TPO"])


# --- chains ---


def test_a_gap_is_refused_with_the_names_of_what_is_missing(tmp_path: Path) -> None:
    lines = [line for line in make_pdb("AGSFA") if number_of(line) not in (4, 5)]
    sequence = "SEQRES   1 A    7  ACE ALA GLY SER PHE ALA NME"
    for head, words in (([], "2 residues missing"), ([sequence], r"2 residues \(SER PHE\) missing")):
        with pytest.raises(
            InputError,
            match=rf"gap, {words} between GLY 3 \(chain A\) and ALA 6 \(chain A\).*at most 0\.25 nm.*TER line",
        ):
            build(write(tmp_path, [*head, *lines]))
    # Numbers that jump where the chain goes on are none.
    whole = [f"{line[:22]}{number_of(line) + 10 * (number_of(line) > 3):4d}{line[26:]}" for line in make_pdb("AGSFA")]
    assert build(write(tmp_path, whole)).n_atoms == len(whole)


def test_a_chain_that_ends_at_a_gap(tmp_path: Path) -> None:
    lines = [line for line in filter(is_heavy, make_pdb("AGSFA")) if number_of(line) not in (4, 5)]
    cut = next(k for k, line in enumerate(lines) if number_of(line) == 6)
    molecule = build(write(tmp_path, [*lines[:cut], "TER", *lines[cut:]]))
    assert [c.n_residues for c in molecule.topology.chains] == [3, 2]
    assert molecule.provenance["changes"]["added_heavy_atoms"] == ["OXT of GLY 3 (chain A)"]


def test_ends_that_are_not_resolved_are_left_out_and_told(tmp_path: Path) -> None:
    lines = [f"{line[:22]}{number_of(line) + 2:4d}{line[26:]}" for line in make_pdb("AGS", caps=False)]
    molecule = build(write(tmp_path, ["SEQRES   1 A    7  MET LYS ALA GLY SER TRP TYR", *lines]))
    assert molecule.topology.n_residues == 3
    assert molecule.provenance["changes"] == {
        "unresolved_ends_left_out": ["MET LYS before ALA 3 (chain A)", "TRP TYR after SER 5 (chain A)"]
    }


def make_two_chains(separation: float, sequence: str = "C") -> list[str]:
    """Two cysteine peptides with their sulfurs so far apart, in angstrom, the second turned by a half turn."""
    lines = [line for line in make_pdb(sequence) if is_heavy(line)]
    positions = np.array([[float(line[k : k + 8]) for k in (30, 38, 46)] for line in lines])
    sulfur = next(k for k, line in enumerate(lines) if name_of(line) == "SG")
    carbon = next(k for k, line in enumerate(lines) if name_of(line) == "CA")
    away = positions[sulfur] - positions[carbon]
    away /= np.linalg.norm(away)
    # Mirrored twice, which is a rotation: through the sulfur along ``away`` and along a direction across it.
    across = np.cross(away, [0.3, 0.5, 0.8])
    across /= np.linalg.norm(across)
    relative = positions - positions[sulfur]
    for axis in (away, across):
        relative = relative - 2 * np.outer(relative @ axis, axis)
    second = relative + positions[sulfur] + separation * away
    moved = [
        f"{line[:21]}B{line[22:30]}{''.join(f'{x:8.3f}' for x in p)}{line[54:]}"
        for line, p in zip(lines, second, strict=True)
    ]
    return [*lines, "TER", *moved, "TER"]


BRIDGE = "SSBOND   1 CYS A    2    CYS B    2                          1555   1555  2.05"


@pytest.mark.parametrize("head", [[BRIDGE], []], ids=["SSBOND", "found"])
def test_a_disulfide_joins_two_chains(tmp_path: Path, head: list[str]) -> None:
    molecule = build(write(tmp_path, [*head, *make_two_chains(2.05)]))
    assert molecule.topology.n_chains == 2
    changes = molecule.provenance["changes"]
    assert changes["disulfides"] == ["CYS 2 (chain B) - CYS 2 (chain A)"]
    assert changes["protonation"] == ["CYX 2 (chain A)", "CYX 2 (chain B)"]
    bonds = [{a.name, b.name} for a, b in molecule.topology.bonds]
    assert bonds.count({"SG"}) == 1
    assert not [a for a in molecule.topology.atoms if a.name == "HG"]
    # The harmonic term of CYX-CYX is there.
    sulfurs = {a.index for a in molecule.topology.atoms if a.name == "SG"}
    force = next(f for f in molecule.system.getForces() if f.getName() == "HarmonicBondForce")
    assert sulfurs in [set(force.getBondParameters(k)[:2]) for k in range(force.getNumBonds())]


def test_cysteines_that_are_far_apart(tmp_path: Path) -> None:
    molecule = build(write(tmp_path, make_two_chains(6.0)))
    assert "disulfides" not in molecule.provenance["changes"]
    assert sum(a.name == "HG" for a in molecule.topology.atoms) == 2
    with pytest.raises(InputError, match=r"SSBOND joins CYS 2 \(chain A\) and CYS 2 \(chain B\).*not bonded.*0\.60 nm"):
        build(write(tmp_path, [BRIDGE, *make_two_chains(6.0)]))
    elsewhere = BRIDGE.replace("1555   1555", "1555   2655")
    assert build(write(tmp_path, [elsewhere, *make_two_chains(6.0)])).n_atoms == molecule.n_atoms


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["HEADER    nothing"], "x.pdb: holds no atoms"),
        (lambda lines: [lines[0][:30] + "     nan" + lines[0][38:], *lines[1:]], "positions hold NaN"),
        (lambda lines: [lines[0][:30] + "    abcd" + lines[0][38:], *lines[1:]], "x.pdb: cannot be read"),
        (
            lambda lines: [shift(lines[0], 30.0), *lines[1:]],
            r"bonded but far apart: expected bonds of at most 0\.25 nm",
        ),
    ],
    ids=["no atoms", "NaN", "letters", "an atom far away"],
)
def test_files_that_cannot_be_read(tmp_path: Path, change: Callable[[list[str]], list[str]], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_deposit(write(tmp_path, change(DIALANINE)) / "x.pdb")
    assert "\n" not in str(caught.value)


def test_the_gap_of_a_broken_box_is_none(tmp_path: Path) -> None:
    """A molecule that is broken over a box full of water is whole in its images."""
    boxed = build_atomistic_system(
        InputSettings(sequence="G", solvent="explicit", padding_nm=0.65), temperature_K=300.0
    )
    assert boxed.box is not None
    positions = boxed.positions.copy()
    positions[:6] += boxed.box[0]
    with open(tmp_path / "x.pdb", "w") as handle:
        app.PDBFile.writeFile(boxed.openmm_topology, positions * unit.nanometer, handle)
    assert build(tmp_path, solvent="explicit").n_atoms == boxed.n_atoms
