"""Amber, GROMACS and CHARMM files of one molecule: the same energies, boxes, includes, and what must be refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import parmed
import pytest
from openmm import app, unit

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "data"
AMBER = {"prmtop": "dialanine.prmtop", "coordinates": "dialanine.rst7"}
GROMACS = {"top": "dialanine.top", "coordinates": "dialanine.gro"}
CHARMM: dict[str, Any] = {"psf": "dialanine.psf", "parameters": "dialanine.prm", "coordinates": "dialanine.crd"}
SOURCES = {"gromacs": GROMACS, "charmm": CHARMM}


def build(base: Path = DATA, constraints: Any = "hbonds", **settings: Any) -> AtomisticSystem:
    return build_atomistic_system(
        InputSettings.model_validate(settings), temperature_K=300.0, constraints=constraints, name="m", base=base
    )


def evaluate(system: openmm.System, positions: np.ndarray) -> tuple[float, np.ndarray]:
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    state = context.getState(getEnergy=True, getForces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), np.asarray(forces)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in DATA.glob("dialanine.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("solvent", ["vacuum", "obc2"])
@pytest.mark.parametrize("settings", SOURCES.values(), ids=SOURCES)
def test_energies_agree_with_amber(settings: dict[str, Any], solvent: str) -> None:
    """1-4 interactions are scaled alike in all three (by fudge factors in a top, e14fac and epsilon,1-4 in a prm)."""
    molecule, amber = build(**settings, solvent=solvent), build(**AMBER, solvent=solvent)
    np.testing.assert_allclose(molecule.positions, amber.positions, atol=1e-7)
    positions = amber.positions + np.random.default_rng(1).normal(scale=0.005, size=amber.positions.shape)
    energy, forces = evaluate(molecule.system, positions)
    want_energy, want_forces = evaluate(amber.system, positions)
    # parmed writes force constants, lengths (0.00001 nm) and angles (0.01 degree) to few digits into a prm, more into
    # a top; the Amber reader has its own Coulomb constant. Energies are of hundreds of kJ/mol, forces of up to 4e4.
    assert energy == pytest.approx(want_energy, abs=0.05)
    np.testing.assert_allclose(forces, want_forces, atol=2.0, rtol=1e-3)
    assert np.abs(want_forces).max() > 1e3


@pytest.mark.parametrize("settings", SOURCES.values(), ids=SOURCES)
def test_one_four_interactions_are_scaled(settings: dict[str, Any]) -> None:
    """The pair of a top or prm without its scaling is not what is built."""
    system = build(**settings, solvent="vacuum").system
    force = find_force(system, openmm.NonbondedForce)
    ratios = []
    for k in range(force.getNumExceptions()):
        a, b, product, _, _ = force.getExceptionParameters(k)
        full = (force.getParticleParameters(a)[0] * force.getParticleParameters(b)[0])._value
        if product._value != 0:
            ratios.append(product._value / full)
    assert len(ratios) > 30
    np.testing.assert_allclose(ratios, 1 / 1.2, rtol=1e-4)


def find_force(system: openmm.System, kind: type) -> Any:
    return next(f for f in system.getForces() if isinstance(f, kind))


@pytest.mark.parametrize("settings", SOURCES.values(), ids=SOURCES)
def test_obc2_is_that_of_a_sequence(settings: dict[str, Any]) -> None:
    molecules = build(sequence="AA"), build(**settings)
    forces = [find_force(m.system, openmm.GBSAOBCForce) for m in molecules]
    for atom in range(32):
        charges, radii, scales = zip(*(f.getParticleParameters(atom) for f in forces), strict=True)
        assert radii[0] == radii[1]
        assert scales[0] == scales[1]
        assert charges[0]._value == pytest.approx(charges[1]._value, abs=1e-5)


@pytest.mark.parametrize("settings", SOURCES.values(), ids=SOURCES)
def test_provenance_names_every_file(settings: dict[str, Any]) -> None:
    molecule = build(**settings)
    assert sorted(molecule.provenance["files"]) == sorted(settings.values())
    assert molecule.provenance["source"] in SOURCES
    assert set(InputSettings.model_validate(settings).list_files()) == set(settings.values())
    assert build(**settings).system_hash == molecule.system_hash


# --- explicit solvent ---


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Glycine in water as GROMACS and CHARMM files, written by parmed from OpenMM's System of it."""
    folder = tmp_path_factory.mktemp("boxed")
    molecule = build(sequence="G", solvent="explicit", padding_nm=0.65)
    force_field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    topology = molecule.openmm_topology
    system = force_field.createSystem(topology, nonbondedMethod=app.PME, constraints=None, rigidWater=False)
    structure = parmed.openmm.load_topology(topology, system, xyz=molecule.positions * unit.nanometer)
    structure.save(str(folder / "boxed.top"))
    parmed.gromacs.GromacsGroFile.write(structure, str(folder / "boxed.gro"), precision=7)
    with open(folder / "boxed.pdb", "w") as handle:
        app.PDBFile.writeFile(topology, molecule.positions * unit.nanometer, handle)
    return folder


@pytest.mark.parametrize("coordinates", ["boxed.gro", "boxed.pdb"])
def test_a_gromacs_box_of_water(boxed: Path, coordinates: str) -> None:
    molecule = build(base=boxed, top="boxed.top", coordinates=coordinates, solvent="explicit")
    reference = build(sequence="G", solvent="explicit", padding_nm=0.65)
    assert molecule.n_atoms == reference.n_atoms
    assert molecule.is_periodic
    np.testing.assert_allclose(molecule.box, reference.box, atol=1e-4)
    n_water = [r.name for r in molecule.topology.residues].count("HOH")
    assert molecule.system.getNumConstraints() == reference.system.getNumConstraints() > 3 * n_water > 300
    nonbonded = find_force(molecule.system, openmm.NonbondedForce)
    assert nonbonded.getNonbondedMethod() == openmm.NonbondedForce.PME
    assert nonbonded.getUseSwitchingFunction()
    if coordinates.endswith("gro"):
        # Thousands of kJ/mol; the parameters in a top have five digits or more.
        want = evaluate(reference.system, reference.positions)[0]
        assert evaluate(molecule.system, molecule.positions)[0] == pytest.approx(want, rel=1e-3)


def test_water_needs_explicit_solvent(boxed: Path) -> None:
    with pytest.raises(InputError, match="water molecules, but the solvent is obc2"):
        build(base=boxed, top="boxed.top", coordinates="boxed.gro")


def test_a_box_for_a_psf(folder: Path) -> None:
    with pytest.raises(InputError, match="needs a periodic box"):
        build(base=folder, **CHARMM, solvent="explicit")
    molecule = build(base=folder, **CHARMM, solvent="explicit", box_nm=[3.0, 2.5, 2.6])
    np.testing.assert_allclose(molecule.box, np.diag([3.0, 2.5, 2.6]))
    assert molecule.is_periodic
    with pytest.raises(InputError, match=r"too small for the cutoff.*2\.00 nm, got 1\.50|at least 2 nm, got 1\.50 nm"):
        build(base=folder, **CHARMM, solvent="explicit", box_nm=[3.0, 1.5, 2.6])


# --- files that others need ---


def test_included_files_are_found(folder: Path) -> None:
    text = (folder / "dialanine.top").read_text()
    start = text.index("[ moleculetype ]")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "types.itp").write_text(text[:start])
    (folder / "dialanine.top").write_text('#include "types.itp"\n' + text[start:])
    with pytest.raises(InputError, match=r"dialanine\.top: cannot be read.*types\.itp.*include_folder"):
        build(base=folder, **GROMACS)
    molecule = build(base=folder, **GROMACS, include_folder="elsewhere")
    assert molecule.system_hash == build(**GROMACS).system_hash
    with pytest.raises(InputError, match="nowhere: no such folder"):
        build(base=folder, **GROMACS, include_folder="nowhere")


def test_an_element_that_is_unknown(folder: Path) -> None:
    lines = (folder / "dialanine.top").read_text().splitlines()
    kind = next(k for k, line in enumerate(lines) if line.startswith("O1 "))
    lines[kind] = lines[kind].replace(" 8 ", " 0 ", 1)  # as for a virtual site, but it has a mass
    (folder / "dialanine.top").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"the element of O of ACE 1 \(chain 1\) is unknown.*atomtypes"):
        build(base=folder, **GROMACS, solvent="vacuum")


def test_a_parameter_that_is_missing(folder: Path) -> None:
    lines = (folder / "dialanine.prm").read_text().splitlines(keepends=True)
    bond = lines.index("BONDS\n") + 1
    (folder / "dialanine.prm").write_text("".join(lines[:bond] + lines[bond + 1 :]))
    with pytest.raises(InputError, match=r"dialanine\.psf: OpenMM cannot build.*Missing bond type") as caught:
        build(base=folder, **CHARMM)
    assert "\n" not in str(caught.value)


def test_parameters_of_unknown_ending(folder: Path) -> None:
    (folder / "dialanine.prm").rename(folder / "dialanine.txt")
    with pytest.raises(InputError, match="Unrecognized file type"):
        build(base=folder, **{**CHARMM, "parameters": ["dialanine.txt"]})


@pytest.mark.parametrize("settings", SOURCES.values(), ids=SOURCES)
def test_coordinates_of_another_molecule(folder: Path, settings: dict[str, Any]) -> None:
    atoms = [
        line for line in (folder / "dialanine.pdb").read_text().splitlines() if line.startswith(("ATOM", "HETATM"))
    ]
    swapped = [*atoms[:-12], atoms[-1], *atoms[-11:-1], atoms[-12]]
    for lines, message in (
        (atoms[:-1], r"different sizes: expected 32 atoms \(.*\), got 31"),
        (swapped, r"other\.pdb: coordinates and dialanine\.(top|psf) do not belong together.*at most 0\.25 nm"),
    ):
        (folder / "other.pdb").write_text("\n".join(lines) + "\nEND\n")
        with pytest.raises(InputError, match=message):
            build(base=folder, **{**settings, "coordinates": "other.pdb"})
    with pytest.raises(InputError, match=r"dialanine\.rst7: unknown kind of coordinates"):
        build(base=folder, **{**settings, "coordinates": "dialanine.rst7"})


def test_every_included_file_is_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an included file includes too, and those behind an #ifdef; a comment includes nothing."""
    monkeypatch.setenv("GMXDATA", str(folder / "nowhere"))
    text = (folder / "dialanine.top").read_text()
    start = text.index("[ moleculetype ]")
    (folder / "ff").mkdir()
    (folder / "ff" / "types.itp").write_text(text[:start])
    (folder / "ff" / "all.itp").write_text('#include "types.itp" ; beside it\n')
    (folder / "posre.itp").write_text("; nothing\n")
    head = ';#include "none.itp"\n#include "ff/all.itp"\n#ifdef POSRES\n#include "posre.itp"\n#include "none.itp"\n'
    head += "#endif\n"
    (folder / "dialanine.top").write_text(head + text[start:])
    before = build(base=folder, **GROMACS).provenance
    assert sorted(before["included"]) == ["ff/all.itp", "ff/types.itp", "posre.itp"]
    (folder / "ff" / "types.itp").write_text(text[:start] + "; changed\n")
    after = build(base=folder, **GROMACS).provenance
    assert [k for k in before["included"] if before["included"][k] != after["included"][k]] == ["ff/types.itp"]
    assert before["files"] == after["files"]


# --- terms of CHARMM ---

#: Spring constants (kcal/mol/A^2, kcal/mol/rad^2), length (A), angle (rad) of a Urey-Bradley term and an improper.
UREY_BRADLEY, IMPROPER = (11.0, 2.3), (9.0, 0.1)


@pytest.fixture(scope="module")
def charmm_terms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """dialanine with a CMAP 2 cos(phi) + sin(psi) kcal/mol: as psf and prm, and as a CHAMBER prmtop with all terms."""
    folder = tmp_path_factory.mktemp("charmm")
    for ending in ("crd", "rst7"):
        shutil.copy(DATA / f"dialanine.{ending}", folder / f"m.{ending}")
    structure = parmed.charmm.CharmmPsfFile(str(DATA / "dialanine.psf"))
    structure.load_parameters(parmed.charmm.CharmmParameterSet(str(DATA / "dialanine.prm")))
    by_name = {(a.residue.idx, a.name): a for a in structure.atoms}
    atoms = [by_name[key] for key in [(0, "C"), (1, "N"), (1, "CA"), (1, "C"), (2, "N")]]
    angles = np.deg2rad(15.0 * np.arange(24) - 180.0)
    grid = (2 * np.cos(angles)[:, None] + np.sin(angles)).ravel().tolist()
    kind = parmed.CmapType(24, grid)
    structure.cmaps.append(parmed.Cmap(*atoms, kind))
    structure.cmap_types.append(kind)
    structure.save(str(folder / "m.psf"))
    lines = ["CMAP", " ".join([*(a.type for a in atoms[:4]), *(a.type for a in atoms[1:]), "24"])]
    lines += [" ".join(f"{v:.6f}" for v in grid[k : k + 6]) for k in range(0, 576, 6)]
    text = (DATA / "dialanine.prm").read_text()
    (folder / "m.prm").write_text(text.replace("NONBONDED", "\n".join(lines) + "\n\nNONBONDED", 1))
    structure.urey_bradleys.append(parmed.UreyBradley(atoms[0], atoms[2], parmed.BondType(*UREY_BRADLEY)))
    improper = parmed.ImproperType(IMPROPER[0], np.rad2deg(IMPROPER[1]))
    structure.impropers.append(parmed.Improper(*atoms[:4], improper))
    structure.urey_bradley_types.append(structure.urey_bradleys[0].type)
    structure.improper_types.append(improper)
    parmed.amber.ChamberParm.from_structure(structure).write_parm(str(folder / "m.prmtop"))
    return folder, np.array([a.idx for a in atoms])


@pytest.mark.parametrize("source", ["psf", "prmtop"])
def test_charmm_terms_reach_the_system(charmm_terms: tuple[Path, np.ndarray], source: str) -> None:
    """CMAP of a psf and of a CHAMBER prmtop, Urey-Bradley and harmonic impropers of the latter: energies by hand."""
    folder, atoms = charmm_terms
    more = {"psf": {"parameters": "m.prm", "coordinates": "m.crd"}, "prmtop": {"coordinates": "m.rst7"}}[source]
    molecule = build(base=folder, solvent="vacuum", **{source: f"m.{source}"}, **more)
    plain = build(**CHARMM, solvent="vacuum")
    positions = plain.positions + np.random.default_rng(0).normal(scale=0.005, size=plain.positions.shape)
    frame = md.Trajectory(positions, plain.topology)
    phi, psi = md.compute_dihedrals(frame, [atoms[:4], atoms[1:]])[0].tolist()
    want = 4.184 * (2 * np.cos(phi) + np.sin(psi))
    if source == "prmtop":
        length = 10 * np.linalg.norm(positions[atoms[0]] - positions[atoms[2]])
        turn = (phi - IMPROPER[1] + np.pi) % (2 * np.pi) - np.pi
        want += 4.184 * (UREY_BRADLEY[0] * (length - UREY_BRADLEY[1]) ** 2 + IMPROPER[0] * turn**2)
    found = evaluate(molecule.system, positions)[0] - evaluate(plain.system, positions)[0]
    # The map is interpolated by splines from points 15 degrees apart (4e-4 of its size); a prmtop rounds charges to
    # 2e-5 e, 0.008 kJ/mol here. 1-4 interactions of CHARMM have parameters of their own: ten times that if lost.
    assert found == pytest.approx(want, abs=0.02)
    assert abs(want) > 1.0
