"""Inputs (sequence, PDB, Amber files, System XML) to an :class:`AtomisticSystem`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mdtraj as md
import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_hvpcg.atomistic.flexible import check_beads_are_free, free_beads
from openmm_hvpcg.atomistic.forcefields import (
    LoadedForceField,
    choose_templates,
    explain_mismatch,
    load_force_field,
    merge_caps,
)
from openmm_hvpcg.atomistic.molecule import AtomisticSystem, check_positions
from openmm_hvpcg.atomistic.peptides import build_peptide, to_nm
from openmm_hvpcg.atomistic.solvent import (
    CUTOFF_NM,
    SWITCH_NM,
    add_obc2,
    add_water_box,
    check_box,
    count_waters,
    has_implicit_solvent,
)
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import compute_hash, hash_file

logger = logging.getLogger(__name__)

Constraints = Literal["none", "hbonds", "allbonds"]
#: Gives the beads that are to be free of constraints, from the finished topology.
MapBeads = Callable[[md.Topology], BeadMap]
CONSTRAINTS = {"none": None, "hbonds": app.HBonds, "allbonds": app.AllBonds}

#: Minimisation of a start structure: rms force it stops at (kJ/mol/nm), and its most iterations.
MINIMIZE_TOLERANCE = 10.0
MINIMIZE_ITERATIONS = 1000


def build_atomistic_system(
    settings: InputSettings,
    *,
    temperature_K: float,
    constraints: Constraints = "hbonds",
    name: str = "",
    base: Path = Path("."),
    flexible_beads: MapBeads | None = None,
) -> AtomisticSystem:
    """Build a molecule of a study from whichever source its settings name.

    Parameters
    ----------
    settings : one of sequence, pdb, prmtop + coordinates, system_xml + pdb; paths relative to ``base``
    temperature_K : temperature of the ensemble
    constraints : which bonds are rigid (water in explicit solvent always is)
    flexible_beads : the bead map of the topology it is called with; bonds of atoms that carry beads then stay
        flexible, whatever ``constraints`` says, so that these beads can be held

    Raises
    ------
    InputError
        Anything in the input that cannot be used; the message says what and where.
    """
    if settings.sequence is not None:
        builder = build_from_sequence
    elif settings.prmtop is not None:
        builder = build_from_amber
    elif settings.system_xml is not None:
        builder = build_from_system_xml
    else:
        builder = build_from_pdb
    return builder(
        settings,
        temperature_K=temperature_K,
        constraints=constraints,
        name=name,
        base=base,
        flexible_beads=flexible_beads,
    )


def build_from_sequence(
    settings: InputSettings,
    *,
    temperature_K: float,
    constraints: Constraints = "hbonds",
    name: str = "",
    base: Path = Path("."),
    flexible_beads: MapBeads | None = None,
) -> AtomisticSystem:
    """Build the peptide ``settings.sequence``, minimised before water is added; the same at every call."""
    if settings.sequence is None:
        raise InputError("no sequence given")
    topology, positions = build_peptide(settings.sequence, settings.caps, settings.start)
    loaded = load_force_field(settings.force_field, explicit=settings.solvent == "explicit", base=base)
    where = f"sequence {settings.sequence}"
    implicit = settings.model_copy(update={"solvent": "vacuum" if settings.solvent == "vacuum" else "obc2"})
    system = _create_system(topology, loaded, implicit, constraints, where)
    positions = minimize_positions(system, positions)
    if settings.solvent == "explicit":
        topology, positions = _solvate(topology, positions, loaded, settings, where)
        system = _create_system(topology, loaded, settings, constraints, where)
    freed = _free_beads(
        system, lambda: _create_system(topology, loaded, settings, "none", where), topology, flexible_beads, name
    )
    facts = {"sequence": settings.sequence, "caps": settings.caps, "start": settings.start}
    return _assemble(
        "sequence",
        topology,
        system,
        positions,
        temperature_K,
        name,
        facts | _describe(settings, constraints, loaded) | freed,
    )


def build_from_pdb(
    settings: InputSettings,
    *,
    temperature_K: float,
    constraints: Constraints = "hbonds",
    name: str = "",
    base: Path = Path("."),
    flexible_beads: MapBeads | None = None,
) -> AtomisticSystem:
    """Build from a PDB file with all its hydrogens, and force-field XMLs.

    In explicit solvent, water that is in the file is kept, with its box; else a box is added.
    """
    path, topology, positions = _read_pdb(settings.pdb, base)
    _check_waters(topology, settings.solvent, path)
    loaded = load_force_field(settings.force_field, explicit=settings.solvent == "explicit", base=base)
    if settings.solvent == "explicit":
        if count_waters(topology) == 0:
            topology, positions = _solvate(topology, positions, loaded, settings, path)
        check_box(topology, path)
    system = _create_system(topology, loaded, settings, constraints, path)
    freed = _free_beads(
        system, lambda: _create_system(topology, loaded, settings, "none", path), topology, flexible_beads, name
    )
    facts = {"files": {str(settings.pdb): hash_file(path)}, **_describe(settings, constraints, loaded), **freed}
    return _assemble("pdb", topology, system, positions, temperature_K, name, facts)


def build_from_amber(
    settings: InputSettings,
    *,
    temperature_K: float,
    constraints: Constraints = "hbonds",
    name: str = "",
    base: Path = Path("."),
    flexible_beads: MapBeads | None = None,
) -> AtomisticSystem:
    """Build from an Amber prmtop and inpcrd/rst7; obc2 takes radii and scale factors from the prmtop."""
    prmtop_path = _existing(settings.prmtop, base)
    coordinates_path = _existing(settings.coordinates, base)
    coordinates = _read(coordinates_path, app.AmberInpcrdFile, "Amber coordinates (inpcrd or rst7)")
    positions = to_nm(coordinates.positions)
    box = getattr(coordinates, "boxVectors", None)
    prmtop = _read(prmtop_path, lambda p: app.AmberPrmtopFile(p, periodicBoxVectors=box), "an Amber prmtop")
    if prmtop.topology.getNumAtoms() != len(positions):
        raise InputError(
            "prmtop and coordinates are of different sizes",
            expected=f"{prmtop.topology.getNumAtoms()} atoms ({prmtop_path})",
            got=f"{len(positions)} ({coordinates_path})",
        )
    check_positions(positions, prmtop.topology, coordinates_path)
    _check_waters(prmtop.topology, settings.solvent, prmtop_path)
    if settings.solvent == "explicit":
        check_box(prmtop.topology, coordinates_path)
    system = _create_amber_system(prmtop, settings, constraints, prmtop_path)
    freed = _free_beads(
        system,
        lambda: _create_amber_system(prmtop, settings, "none", prmtop_path),
        prmtop.topology,
        flexible_beads,
        name,
    )
    files = {
        str(settings.prmtop): hash_file(prmtop_path),
        str(settings.coordinates): hash_file(coordinates_path),
    }
    facts = {"files": files, **_describe(settings, constraints, None), **freed}
    return _assemble("amber", prmtop.topology, system, positions, temperature_K, name, facts)


def build_from_system_xml(
    settings: InputSettings,
    *,
    temperature_K: float,
    constraints: Constraints = "hbonds",
    name: str = "",
    base: Path = Path("."),
    flexible_beads: MapBeads | None = None,
) -> AtomisticSystem:
    """Take a serialized openmm.System as it is, with topology and positions from a PDB file.

    Solvent, force field, constraints and hydrogen mass of the settings do not apply: the System has its own.
    """
    xml_path = _existing(settings.system_xml, base)
    system = _read(xml_path, _deserialize, "a serialized openmm.System")
    if not isinstance(system, openmm.System):
        raise InputError("wrong kind of XML", expected="openmm.System", got=type(system).__name__, where=xml_path)
    pdb_path, topology, positions = _read_pdb(settings.pdb, base)
    if system.getNumParticles() != topology.getNumAtoms():
        raise InputError(
            "System XML and PDB disagree",
            expected=f"{system.getNumParticles()} particles ({xml_path})",
            got=f"{topology.getNumAtoms()} atoms ({pdb_path})",
        )
    if flexible_beads is not None:
        check_beads_are_free(system, flexible_beads(md.Topology.from_openmm(topology)), xml_path)
    logger.info(
        "%s: %s is used as it is: solvent, force_field, constraints, hydrogen_mass_amu do not apply",
        name or "molecule",
        xml_path,
    )
    files = {str(settings.system_xml): hash_file(xml_path), str(settings.pdb): hash_file(pdb_path)}
    return _assemble("system_xml", topology, system, positions, temperature_K, name, {"files": files})


def minimize_positions(system: openmm.System, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimise on the Reference platform, whose result is the same at every call; (A, 3) nm in and out."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, MINIMIZE_TOLERANCE, MINIMIZE_ITERATIONS)
    minimized = context.getState(getPositions=True).getPositions(asNumpy=True)
    return np.array(minimized.value_in_unit(unit.nanometer), dtype=np.float64)


def _create_system(
    topology: app.Topology,
    loaded: LoadedForceField,
    settings: InputSettings,
    constraints: Constraints,
    where: object = None,
) -> openmm.System:
    merged = merge_caps(topology, loaded.force_field)
    options = _system_options(settings, constraints)
    try:
        system = loaded.force_field.createSystem(
            merged, residueTemplates=choose_templates(merged, loaded.force_field), **options
        )
    except Exception as error:
        raise explain_mismatch(loaded.force_field, topology, error, where) from error
    if has_implicit_solvent(system):
        raise InputError(
            f"force field {', '.join(loaded.files)} brings its own implicit solvent",
            hint="leave out its implicit or _obc file; solvent: obc2 adds OBC2",
        )
    if settings.solvent == "obc2":
        add_obc2(system, topology)
    return system


def _free_beads(
    system: openmm.System,
    build_unconstrained: Callable[[], openmm.System],
    topology: app.Topology,
    flexible_beads: MapBeads | None,
    name: str,
) -> dict[str, Any]:
    """Free the beads of constraints where that is asked; facts for the provenance."""
    if flexible_beads is None:
        return {}
    bead_map = flexible_beads(md.Topology.from_openmm(topology))
    return {"lifted_constraints": free_beads(system, build_unconstrained(), bead_map, name)}


def _create_amber_system(
    prmtop: app.AmberPrmtopFile, settings: InputSettings, constraints: Constraints, where: Path
) -> openmm.System:
    options = _system_options(settings, constraints)
    if settings.solvent == "obc2":
        options["implicitSolvent"] = app.OBC2
    try:
        return prmtop.createSystem(**options)
    except Exception as error:
        raise InputError(f"OpenMM cannot build this prmtop ({error})", where=where) from error


def _system_options(settings: InputSettings, constraints: Constraints) -> dict[str, Any]:
    """Arguments shared by ForceField.createSystem and AmberPrmtopFile.createSystem."""
    if constraints not in CONSTRAINTS:
        raise InputError("unknown constraints", expected=", ".join(CONSTRAINTS), got=constraints)
    options: dict[str, Any] = {
        "nonbondedMethod": app.NoCutoff,
        "constraints": CONSTRAINTS[constraints],
        "rigidWater": True,
        "removeCMMotion": False,
    }
    if settings.hydrogen_mass_amu is not None:
        options["hydrogenMass"] = settings.hydrogen_mass_amu * unit.amu
    if settings.solvent == "explicit":
        options |= {
            "nonbondedMethod": app.PME,
            "nonbondedCutoff": CUTOFF_NM * unit.nanometer,
            "switchDistance": SWITCH_NM * unit.nanometer,
        }
    return options


def _solvate(
    topology: app.Topology,
    positions: NDArray[np.float64],
    loaded: LoadedForceField,
    settings: InputSettings,
    where: object,
) -> tuple[app.Topology, NDArray[np.float64]]:
    return add_water_box(
        topology,
        positions,
        loaded.force_field,
        padding_nm=settings.padding_nm,
        ionic_strength_molar=settings.ionic_strength_molar,
        where=where,
    )


def _describe(settings: InputSettings, constraints: Constraints, loaded: LoadedForceField | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "solvent": settings.solvent,
        "constraints": constraints,
        "hydrogen_mass_amu": settings.hydrogen_mass_amu,
    }
    if loaded is not None:
        facts["force_field"] = list(loaded.files)
        facts["force_field_hashes"] = loaded.hashes
    if settings.solvent == "explicit":
        facts |= {
            "cutoff_nm": CUTOFF_NM,
            "switch_nm": SWITCH_NM,
            "padding_nm": settings.padding_nm,
            "ionic_strength_molar": settings.ionic_strength_molar,
        }
    return facts


def _assemble(
    source: str,
    topology: app.Topology,
    system: openmm.System,
    positions: NDArray[np.float64],
    temperature_K: float,
    name: str,
    facts: dict[str, Any],
) -> AtomisticSystem:
    for index in reversed(range(system.getNumForces())):
        if isinstance(system.getForce(index), openmm.CMMotionRemover):
            system.removeForce(index)
            logger.info("%s: the CMMotionRemover of the System is left out", name or "molecule")
    provenance = {
        "source": source,
        **facts,
        "n_atoms": system.getNumParticles(),
        "openmm_version": openmm.version.full_version,
        "positions_sha256": compute_hash(positions),
    }
    result = AtomisticSystem(
        md.Topology.from_openmm(topology), topology, system, positions, temperature_K, provenance, name
    )
    provenance["system_sha256"] = result.system_hash
    return result


def _existing(name: str | None, base: Path) -> Path:
    if name is None:
        raise InputError("a file name is missing from the input")
    path = base / name
    if not path.is_file():
        raise InputError("no such file", where=path)
    return path


def _read(path: Path, reader: Any, what: str) -> Any:
    """Call ``reader`` on the file name; whatever it raises becomes one line that names the file."""
    try:
        return reader(str(path))
    except Exception as error:
        raise InputError(f"cannot be read ({type(error).__name__}: {error})", expected=what, where=path) from error


def _deserialize(path: str) -> Any:
    return openmm.XmlSerializer.deserialize(Path(path).read_text(encoding="utf-8"))


def _read_pdb(name: str | None, base: Path) -> tuple[Path, app.Topology, NDArray[np.float64]]:
    path = _existing(name, base)
    pdb = _read(path, app.PDBFile, "a PDB file")
    positions = to_nm(pdb.positions)
    if len(positions) == 0:
        raise InputError("holds no atoms", expected="a PDB file", where=path)
    check_positions(positions, pdb.topology, path)
    return path, pdb.topology, positions


def _check_waters(topology: app.Topology, solvent: str, where: object) -> None:
    waters = count_waters(topology)
    if waters and solvent != "explicit":
        raise InputError(
            f"holds {waters} water molecules, but the solvent is {solvent}",
            where=where,
            hint="remove the water, or set solvent: explicit",
        )
