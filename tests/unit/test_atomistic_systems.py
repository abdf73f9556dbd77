"""Every way to an AtomisticSystem, and every way it must refuse."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_hvpcg.atomistic.flexible import free_beads, warn_of_fast_bonds
from openmm_hvpcg.atomistic.molecule import AtomisticSystem, is_movable
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.mapping import BeadMap, build_bead_map

DATA = Path(__file__).resolve().parents[2] / "data"
PDB = {"pdb": "dialanine.pdb"}
AMBER = {"prmtop": "dialanine.prmtop", "coordinates": "dialanine.rst7"}
GROMACS = {"top": "dialanine.top", "coordinates": "dialanine.gro"}
PSF: dict[str, Any] = {"psf": "dialanine.psf", "parameters": "dialanine.prm", "coordinates": "dialanine.crd"}
XML = {"system_xml": "dialanine.xml", "pdb": "dialanine.pdb"}


def build(
    base: Path = DATA, constraints: str = "hbonds", flexible: str | None = None, **settings: object
) -> AtomisticSystem:
    """``flexible``: the beads whose bonds stay flexible."""

    def map_beads(topology: md.Topology) -> BeadMap:
        return build_bead_map(flexible or "", topology)

    return build_atomistic_system(
        InputSettings.model_validate(settings),
        temperature_K=300.0,
        constraints=constraints,  # type: ignore[arg-type]
        name="m",
        base=base,
        flexible_beads=None if flexible is None else map_beads,
    )


def evaluate(system: openmm.System, positions: np.ndarray) -> tuple[float, np.ndarray]:
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(getEnergy=True, getForces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), np.asarray(forces)


def kinds(system: openmm.System) -> set[str]:
    return {type(f).__name__ for f in system.getForces()}


@pytest.mark.parametrize(
    "settings",
    [{"sequence": "AA"}, PDB, AMBER, GROMACS, PSF, XML],
    ids=["sequence", "pdb", "amber", "gromacs", "charmm", "system_xml"],
)
def test_all_sources_give_the_same_molecule(settings: dict[str, Any]) -> None:
    molecule = build(**settings)
    reference = build(sequence="AA")
    assert molecule.n_atoms == 32
    assert [a.element for a in molecule.topology.atoms] == [a.element for a in reference.topology.atoms]
    assert molecule.topology.n_bonds == 31
    assert not molecule.is_periodic
    assert molecule.box is None
    assert "GBSAOBCForce" in kinds(molecule.system)
    assert not kinds(molecule.system) & {"CustomGBForce", "CMMotionRemover"}
    energy, forces = evaluate(molecule.system, reference.positions)
    want_energy, want_forces = evaluate(reference.system, reference.positions)
    # Amber files hold charges and force constants to 8 digits and Amber's own Coulomb constant (relative
    # difference 1e-6 of the electrostatic energy, some 1000 kJ/mol): 0.05 kJ/mol. The others are exact.
    tolerance = 0.05 if "coordinates" in settings else 1e-6
    assert energy == pytest.approx(want_energy, abs=tolerance)
    np.testing.assert_allclose(forces, want_forces, atol=max(0.5 * (tolerance > 1e-3), 1e-6))


def test_provenance_is_json_and_names_files_and_hashes() -> None:
    molecule = build(**PDB)
    facts = json.loads(json.dumps(molecule.provenance))
    assert facts["source"] == "pdb"
    assert len(facts["files"]["dialanine.pdb"]) == 64
    assert facts["force_field"] == ["amber14-all.xml"]
    assert facts["system_sha256"] == molecule.system_hash
    assert facts["solvent"] == "obc2"
    assert build(**PDB).system_hash == molecule.system_hash
    assert build(**PDB, solvent="vacuum").system_hash != molecule.system_hash


def test_sequence_is_minimised_and_repeatable() -> None:
    first, second = build(sequence="AK"), build(sequence="AK")
    np.testing.assert_array_equal(first.positions, second.positions)
    context = openmm.Context(
        first.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(first.positions)
    before = context.getState(getEnergy=True).getPotentialEnergy()._value
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 1000)
    after = context.getState(getEnergy=True).getPotentialEnergy()._value
    # Minimised to 10 kJ/mol/nm rms: a second minimisation gains little beside the ~1000 kJ/mol of the first.
    assert before - after < 5.0


@pytest.mark.parametrize(
    "settings", [{"sequence": "A"}, AMBER, GROMACS, PSF], ids=["sequence", "amber", "gromacs", "charmm"]
)
def test_vacuum_has_no_solvent(settings: dict[str, str]) -> None:
    assert not kinds(build(**settings, solvent="vacuum").system) & {"GBSAOBCForce", "CustomGBForce"}


@pytest.mark.parametrize("settings", [PDB, AMBER, GROMACS, PSF], ids=["pdb", "amber", "gromacs", "charmm"])
def test_constraints(settings: dict[str, str]) -> None:
    counts = [build(constraints=c, **settings).system.getNumConstraints() for c in ("none", "hbonds", "allbonds")]
    assert counts == [0, 17, 31]  # dialanine has 17 hydrogens and 31 bonds


@pytest.mark.parametrize("settings", [PDB, AMBER, GROMACS, PSF], ids=["pdb", "amber", "gromacs", "charmm"])
def test_hydrogen_mass_repartitioning(settings: dict[str, str]) -> None:
    plain, heavy = build(**settings), build(**settings, hydrogen_mass_amu=1.5)
    masses = [np.array([m.system.getParticleMass(i)._value for i in range(m.n_atoms)]) for m in (plain, heavy)]
    hydrogens = np.array([a.element.symbol == "H" for a in heavy.topology.atoms])
    np.testing.assert_allclose(masses[1][hydrogens], 1.5)
    # Force-field files give masses to three or four digits; their sums agree to rounding.
    assert masses[1].sum() == pytest.approx(masses[0].sum(), abs=1e-9)
    assert (masses[1][~hydrogens] <= masses[0][~hydrogens]).all()


@pytest.mark.parametrize("caps", [True, False])
def test_charmm_knows_caps_and_charged_ends(caps: bool) -> None:
    molecule = build(sequence="A" if caps else "AA", caps=caps, force_field="charmm36", solvent="vacuum")
    assert np.isfinite(evaluate(molecule.system, molecule.positions)[0])
    assert [r.name for r in molecule.topology.residues] == (["ACE", "ALA", "NME"] if caps else ["ALA", "ALA"])


def test_explicit_box_is_neutral_periodic_and_rigid() -> None:
    molecule = build(sequence="D", solvent="explicit", padding_nm=0.6, ionic_strength_molar=0.3, constraints="none")
    names = [r.name for r in molecule.topology.residues]
    assert molecule.is_periodic
    assert names[:3] == ["ACE", "ASP", "NME"]
    n_water, n_sodium, n_chloride = (names.count(n) for n in ("HOH", "NA", "CL"))
    assert n_sodium == n_chloride + 1  # aspartate carries -1
    assert n_chloride >= 1
    assert molecule.system.getNumConstraints() == 3 * n_water  # rigid water, nothing else
    nonbonded = next(f for f in molecule.system.getForces() if isinstance(f, openmm.NonbondedForce))
    assert nonbonded.getNonbondedMethod() == openmm.NonbondedForce.PME
    charge = sum(nonbonded.getParticleParameters(i)[0]._value for i in range(molecule.n_atoms))
    assert charge == pytest.approx(0.0, abs=1e-4)  # force-field charges have four to six digits
    assert molecule.box is not None
    # 33.4 waters a cubic nm in the bulk; the solute and the layer around it leave some of the box free.
    assert 20.0 < n_water / np.prod(np.diag(molecule.box)) < 34.0
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("CPU"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 100)
    energy = context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    # Liquid TIP3P has -40 kJ/mol a molecule; a third of it says that the water is there and does not overlap.
    assert energy < -13.0 * n_water


def test_water_of_a_pdb_is_kept(tmp_path: Path) -> None:
    boxed = build(sequence="G", solvent="explicit", padding_nm=0.65)
    path = tmp_path / "boxed.pdb"
    with open(path, "w") as handle:
        app.PDBFile.writeFile(boxed.openmm_topology, boxed.positions * unit.nanometer, handle)
    again = build(base=tmp_path, pdb="boxed.pdb", solvent="explicit")
    assert again.n_atoms == boxed.n_atoms
    assert again.box is not None
    np.testing.assert_allclose(again.box, boxed.box, atol=1e-4)  # CRYST1 has three decimals in angstrom
    with pytest.raises(InputError, match=r"water molecules, but the solvent is obc2.*Remove the water"):
        build(base=tmp_path, pdb="boxed.pdb")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("CRYST1")]
    (tmp_path / "boxless.pdb").write_text("\n".join(lines))
    with pytest.raises(InputError, match="needs a periodic box"):
        build(base=tmp_path, pdb="boxless.pdb", solvent="explicit")


def test_system_xml_is_used_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    system = openmm.XmlSerializer.deserialize((DATA / "dialanine.xml").read_text())
    system.addForce(openmm.CMMotionRemover())
    (tmp_path / "s.xml").write_text(openmm.XmlSerializer.serialize(system))
    (tmp_path / "s.pdb").write_text((DATA / "dialanine.pdb").read_text())
    with caplog.at_level(logging.INFO):
        molecule = build(base=tmp_path, system_xml="s.xml", pdb="s.pdb", solvent="vacuum", constraints="none")
    assert "used as it is" in caplog.text
    assert "CMMotionRemover" in caplog.text
    assert kinds(molecule.system) == kinds(build(**XML).system)
    assert molecule.system.getNumConstraints() == 17


def test_own_force_field_file_is_found_beside_the_protocol(tmp_path: Path) -> None:
    source = Path(app.__file__).parent / "data" / "amber99sbildn.xml"
    (tmp_path / "mine.xml").write_text(source.read_text())
    (tmp_path / "d.pdb").write_text((DATA / "dialanine.pdb").read_text())
    molecule = build(base=tmp_path, pdb="d.pdb", force_field=["mine.xml"])
    assert list(molecule.provenance["force_field_hashes"]) == ["mine.xml"]


def list_constraints(system: openmm.System) -> set[frozenset[int]]:
    return {frozenset(system.getConstraintParameters(k)[:2]) for k in range(system.getNumConstraints())}


def soften(system: openmm.System, pairs: set[frozenset[int]]) -> None:
    """Take the harmonic bonds of some pairs away."""
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for k in range(force.getNumBonds()):
                a, b, length, stiffness = force.getBondParameters(k)
                force.setBondParameters(k, a, b, length, 0.0 if frozenset((a, b)) in pairs else stiffness)


CHARMM = {**PDB, "force_field": "charmm36", "solvent": "vacuum"}
FLEXIBLE = [
    (settings, constraints, beads)
    for settings in ({"sequence": "AA"}, PDB, AMBER, GROMACS, PSF)
    for constraints in ("hbonds", "allbonds")
    for beads in ("ca", "heavy")
]


# CHARMM has further harmonic terms, between atoms that are two bonds apart; it takes seconds to read.
@pytest.mark.parametrize(("settings", "constraints", "beads"), [*FLEXIBLE, (CHARMM, "allbonds", "ca")])
def test_flexible_beads(settings: dict[str, str], constraints: str, beads: str) -> None:
    """No constraint is left on a bead's atom, all others are; the energy is that of a System without the former."""
    rigid = build(constraints=constraints, **settings)
    freed = build(constraints=constraints, flexible=beads, **settings)
    loose = build(constraints="none", **settings)
    bead_map = build_bead_map(beads, freed.topology)
    atoms = set(np.flatnonzero(bead_map.site_weights.any(axis=0)).tolist())
    before, left = list_constraints(rigid.system), list_constraints(freed.system)
    assert left == {pair for pair in before if not pair & atoms}
    # Every bond has a heavy atom; of alpha carbons two hydrogens, or all eight bonds.
    assert len(before) - len(left) == {"heavy": len(before), "ca": 2 if constraints == "hbonds" else 8}[beads]
    assert freed.provenance["lifted_constraints"] == len(before) - len(left)
    soften(loose.system, left)
    positions = rigid.positions + np.random.default_rng(1).normal(scale=0.002, size=rigid.positions.shape)
    energy, forces = evaluate(freed.system, positions)
    want_energy, want_forces = evaluate(loose.system, positions)
    # The same terms in another order, in double precision: rounding of energies and forces of up to 1e4.
    assert energy == pytest.approx(want_energy, abs=1e-8)
    np.testing.assert_allclose(forces, want_forces, atol=1e-7)
    assert np.abs(evaluate(rigid.system, positions)[1] - want_forces).max() > 100.0


def test_flexible_beads_change_nothing_without_constraints() -> None:
    assert (
        build(**PDB, constraints="none", flexible="heavy").system_hash == build(**PDB, constraints="none").system_hash
    )


def test_water_stays_rigid() -> None:
    box = {"sequence": "G", "solvent": "explicit", "padding_nm": 0.65}
    plain, freed = build(**box), build(**box, flexible="ca")
    assert plain.system.getNumConstraints() - freed.system.getNumConstraints() == 2  # glycine has HA2 and HA3
    with pytest.raises(InputError, match=r"flexible_beads: a bead rests on rigid water.*Choose beads on the solute"):
        build(**box, flexible="water and name O and resid 5")


def test_flexible_beads_of_a_system_xml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dialanine\.xml: flexible_beads: a constraint of this System touches a bead"):
        build(**XML, flexible="ca")
    # Its hydrogens are constrained; the carbonyl carbons have none.
    assert build(**XML, flexible="name C and resname ALA").system_hash == build(**XML).system_hash


def test_a_bond_that_is_not_harmonic_cannot_take_a_constraints_place() -> None:
    rigid, loose = build(**PDB), build(**PDB, constraints="none")
    index = next(k for k, f in enumerate(loose.system.getForces()) if isinstance(f, openmm.HarmonicBondForce))
    loose.system.removeForce(index)
    with pytest.raises(InputError, match="no harmonic term for the bond of atoms"):
        free_beads(rigid.system, loose.system, build_bead_map("ca", rigid.topology))


@pytest.mark.parametrize(
    ("flexible", "mass", "timestep_fs", "warned"),
    [(None, None, 4.0, False), ("ca", None, 2.0, True), ("ca", None, 1.0, False), ("ca", 3.0, 2.0, False)],
)
def test_warning_of_fast_bonds(
    caplog: pytest.LogCaptureFixture, flexible: str | None, mass: float | None, timestep_fs: float, warned: bool
) -> None:
    molecule = build(**PDB, flexible=flexible, hydrogen_mass_amu=mass)
    with caplog.at_level(logging.WARNING):
        warn_of_fast_bonds(molecule, timestep_fs)
    assert ("flexible bonds to hydrogen (ALA2-HA among them) at 2 fs" in caplog.text) == warned
    assert any(r.levelno >= logging.WARNING for r in caplog.records) == warned


def test_movable() -> None:
    molecule = build(**XML)
    assert is_movable(molecule)
    restraint = openmm.CustomExternalForce("1000*x^2")
    restraint.addParticle(0, [])
    molecule.system.addForce(restraint)
    assert not is_movable(molecule)


# --- bad input ---


def _edit_pdb(tmp_path: Path, keep: object = None, replace: tuple[str, str] | None = None) -> str:
    lines = (DATA / "dialanine.pdb").read_text().splitlines()
    if callable(keep):
        lines = [line for line in lines if line[:6] not in ("ATOM  ", "HETATM") or keep(line)]
    lines = [line for line in lines if not line.startswith("CONECT")]
    text = "\n".join(lines) + "\n"
    (tmp_path / "edited.pdb").write_text(text.replace(*replace) if replace else text)
    return "edited.pdb"


def test_missing_hydrogens(tmp_path: Path) -> None:
    name = _edit_pdb(tmp_path, keep=lambda line: line[76:78].strip() != "H" or line[22:26].strip() != "3")
    with pytest.raises(InputError, match=r"residue ALA 3 \(chain A\) lacks hydrogens .*addHydrogens or pdbfixer"):
        build(base=tmp_path, pdb=name, repair=False)


def test_missing_heavy_atom(tmp_path: Path) -> None:
    name = _edit_pdb(tmp_path, keep=lambda line: line[12:16].strip() != "O" or line[22:26].strip() != "2")
    with pytest.raises(InputError, match=r"residue ALA 2 \(chain A\) lacks atoms O"):
        build(base=tmp_path, pdb=name, repair=False)


@pytest.mark.parametrize("solvent", ["obc2", "explicit"])
def test_unknown_residue(tmp_path: Path, solvent: str) -> None:
    name = _edit_pdb(tmp_path, replace=("ALA A   2", "XYZ A   2"))
    with pytest.raises(InputError, match=r"residue XYZ 2 \(chain A\) is unknown"):
        build(base=tmp_path, pdb=name, solvent=solvent)


def test_missing_hydrogens_with_charmm_patches(tmp_path: Path) -> None:
    name = _edit_pdb(tmp_path, keep=lambda line: line[12:16].strip() not in ("HA", "HB1"))
    with pytest.raises(InputError, match=r"residue ALA [23] \(chain A\) lacks hydrogens"):
        build(base=tmp_path, pdb=name, force_field="charmm36", repair=False)


def test_nan_in_pdb(tmp_path: Path) -> None:
    name = _edit_pdb(tmp_path, replace=("   2.026  -0.775", "     nan  -0.775"))
    with pytest.raises(InputError, match=r"edited.pdb: positions hold NaN.*ALA 2 N"):
        build(base=tmp_path, pdb=name)


def test_amber_files_of_different_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.prmtop").write_text((DATA / "dialanine.prmtop").read_text())
    lines = (DATA / "dialanine.rst7").read_text().splitlines()
    lines[1] = lines[1].replace("32", "30", 1)
    (tmp_path / "a.rst7").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match=r"different sizes.*expected 32 atoms.*got 30"):
        build(base=tmp_path, prmtop="a.prmtop", coordinates="a.rst7")


def test_amber_explicit_needs_a_box() -> None:
    with pytest.raises(InputError, match="needs a periodic box"):
        build(**AMBER, solvent="explicit")


@pytest.mark.parametrize(
    "settings", [PDB, AMBER, GROMACS, PSF, XML], ids=["pdb", "amber", "gromacs", "charmm", "system_xml"]
)
def test_missing_and_unreadable_files(tmp_path: Path, settings: dict[str, str]) -> None:
    for key in settings:
        for other, name in settings.items():
            (tmp_path / name).write_text((DATA / settings[other]).read_text())
        (tmp_path / settings[key]).unlink()
        with pytest.raises(InputError, match="no such file"):
            build(base=tmp_path, **settings)
        for garbage in (b"", b"not a structure\n", bytes(range(256))):
            (tmp_path / settings[key]).write_bytes(garbage)
            with pytest.raises(InputError, match=settings[key].replace(".", r"\.")):
                build(base=tmp_path, **settings)


def test_system_xml_of_another_size(tmp_path: Path) -> None:
    name = _edit_pdb(tmp_path, keep=lambda line: line[22:26].strip() != "3")
    (tmp_path / "s.xml").write_text((DATA / "dialanine.xml").read_text())
    with pytest.raises(InputError, match=r"System XML and PDB disagree: expected 32 particles.*got 22 atoms"):
        build(base=tmp_path, system_xml="s.xml", pdb=name)


def test_xml_that_is_no_system(tmp_path: Path) -> None:
    (tmp_path / "s.xml").write_text(openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001)))
    (tmp_path / "s.pdb").write_text((DATA / "dialanine.pdb").read_text())
    with pytest.raises(InputError, match=r"expected openmm\.System, got VerletIntegrator"):
        build(base=tmp_path, system_xml="s.xml", pdb="s.pdb")


def test_unknown_force_field() -> None:
    with pytest.raises(InputError, match=r"unknown force field 'ambr14'.*Did you mean amber14"):
        build(sequence="A", force_field="ambr14")


def test_force_field_with_its_own_solvent() -> None:
    with pytest.raises(InputError, match="brings its own implicit solvent"):
        build(sequence="A", force_field=["amber14-all.xml", "implicit/obc2.xml"])


def test_explicit_without_water_in_the_force_field() -> None:
    with pytest.raises(InputError, match=r"add .*amber14/tip3p\.xml"):
        build(sequence="A", force_field=["amber14-all.xml"], solvent="explicit")


def test_box_smaller_than_the_cutoff() -> None:
    with pytest.raises(InputError, match="Raise padding_nm"):
        build(sequence="G", solvent="explicit", padding_nm=0.2)


def test_atomistic_system_checks_itself() -> None:
    molecule = build(**PDB)
    parts = (molecule.topology, molecule.openmm_topology, molecule.system)
    with pytest.raises(InputError, match="expected 32 atoms"):
        AtomisticSystem(*parts, molecule.positions[:-1], 300.0, {})
    with pytest.raises(InputError, match="NaN"):
        AtomisticSystem(*parts, np.full_like(molecule.positions, np.nan), 300.0, {})
    with pytest.raises(InputError, match="temperature"):
        AtomisticSystem(*parts, molecule.positions, 0.0, {})
