"""Inputs (sequence, PDB, Amber, GROMACS or CHARMM files, System XML) to an :class:`AtomisticSystem`."""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_hvpcg.atomistic.building import (
    Build,
    Constraints,
    CreateSystem,
    MapBeads,
    check_waters,
    read_file,
)
from openmm_hvpcg.atomistic.files import build_from_amber, build_from_charmm, build_from_gromacs
from openmm_hvpcg.atomistic.flexible import check_beads_are_free
from openmm_hvpcg.atomistic.forcefields import (
    LoadedForceField,
    choose_templates,
    explain_mismatch,
    load_force_field,
    merge_caps,
)
from openmm_hvpcg.atomistic.molecule import AtomisticSystem, check_positions
from openmm_hvpcg.atomistic.pdb_reading import Deposit, read_deposit
from openmm_hvpcg.atomistic.pdb_repair import repair
from openmm_hvpcg.atomistic.peptides import build_peptide, to_nm
from openmm_hvpcg.atomistic.solvent import (
    add_obc2,
    add_water_box,
    check_box,
    count_waters,
    has_implicit_solvent,
    holds_water_box,
)
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError

__all__ = ["AtomisticSystem", "build_atomistic_system"]

logger = logging.getLogger(__name__)

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
    settings : one of sequence, pdb, prmtop, top, psf (each with its coordinates), system_xml + pdb; paths relative
        to ``base``
    temperature_K : temperature of the ensemble
    constraints : which bonds are rigid (water in explicit solvent always is)
    flexible_beads : the bead map of the topology it is called with; bonds of atoms that carry beads then stay
        flexible, whatever ``constraints`` says, so that these beads can be held

    Raises
    ------
    InputError
        Anything in the input that cannot be used; the message says what and where.
    """
    builders = {
        "sequence": build_from_sequence,
        "prmtop": build_from_amber,
        "top": build_from_gromacs,
        "psf": build_from_charmm,
        "system_xml": build_from_system_xml,
        "pdb": build_from_pdb,
    }
    build = Build(settings, temperature_K, constraints, name, base, flexible_beads)
    return next(builder for key, builder in builders.items() if getattr(settings, key) is not None)(build)


def build_from_sequence(build: Build) -> AtomisticSystem:
    """Build the peptide ``settings.sequence``, minimised before water is added; the same at every call."""
    settings = build.settings
    if settings.sequence is None:
        raise InputError("no sequence given")
    topology, positions = build_peptide(settings.sequence, settings.caps, settings.start)
    loaded = load_force_field(settings.force_field, explicit=build.is_explicit, base=build.base)
    where = f"sequence {settings.sequence}"
    create_system = _remember(_without_box(build, "obc2"), topology, loaded, where)
    positions = minimize_positions(create_system(build.constraints), positions)
    if build.is_explicit:
        topology, positions = _solvate(build, topology, positions, loaded, where)
        create_system = _remember(build, topology, loaded, where)
    facts = {"sequence": settings.sequence, "caps": settings.caps, "start": settings.start, **build.describe(loaded)}
    return build.finish("sequence", topology, positions, create_system, facts)


def build_from_pdb(build: Build) -> AtomisticSystem:
    """Build from a PDB file and force-field XMLs.

    What the force field takes is used as it is; atoms that are missing are added (see :func:`pdb_repair.repair`).
    In explicit solvent, water that is in the file is kept, with its box; else a box is added, and so it is around
    the few waters of a crystal, whose unit cell is no box of water.
    """
    settings = build.settings
    path = build.find_file(settings.pdb)
    deposit = read_deposit(path, settings.remove, settings.replace)
    check_waters(deposit.topology, settings.solvent, path)
    loaded = load_force_field(settings.force_field, explicit=build.is_explicit, base=build.base)
    deposit, create_system = _complete(build, deposit, loaded)
    topology, positions = deposit.topology, deposit.positions
    if build.is_explicit:
        has_box = topology.getPeriodicBoxVectors() is not None
        if count_waters(topology) == 0 or (has_box and not holds_water_box(topology)):
            if has_box:
                logger.info("%s: CRYST1 is no box of water; one is added", path)
            topology, positions = _solvate(build, topology, positions, loaded, path)
        check_box(topology, path)
        create_system = _remember(build, topology, loaded, path)
    changes = {"changes": deposit.changes} if deposit.changes else {}
    facts = {"files": build.hash_files(settings.pdb), **build.describe(loaded), **changes}
    return build.finish("pdb", topology, positions, create_system, facts)


def build_from_system_xml(build: Build) -> AtomisticSystem:
    """Take a serialized openmm.System as it is, with topology and positions from a PDB file.

    Solvent, force field, constraints and hydrogen mass of the settings do not apply: the System has its own.
    """
    settings = build.settings
    xml_path = build.find_file(settings.system_xml)
    system = read_file(xml_path, _deserialize, "a serialized openmm.System")
    if not isinstance(system, openmm.System):
        raise InputError("wrong kind of XML", expected="openmm.System", got=type(system).__name__, where=xml_path)
    pdb_path = build.find_file(settings.pdb)
    pdb = read_file(pdb_path, app.PDBFile, "a PDB file")
    positions = to_nm(pdb.positions)
    if system.getNumParticles() != len(positions):
        raise InputError(
            "System XML and PDB disagree",
            expected=f"{system.getNumParticles()} particles ({xml_path})",
            got=f"{len(positions)} atoms ({pdb_path})",
        )
    check_positions(positions, pdb.topology, pdb_path)
    if build.flexible_beads is not None:
        check_beads_are_free(system, build.flexible_beads(md.Topology.from_openmm(pdb.topology)), xml_path)
    logger.info(
        "%s: %s is used as it is: solvent, force_field, constraints, hydrogen_mass_amu do not apply",
        build.name or "molecule",
        xml_path,
    )
    files = build.hash_files(settings.system_xml, settings.pdb)
    return build.assemble("system_xml", pdb.topology, system, positions, {"files": files})


def minimize_positions(system: openmm.System, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimise on the Reference platform, whose result is the same at every call; (A, 3) nm in and out."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, MINIMIZE_TOLERANCE, MINIMIZE_ITERATIONS)
    minimized = context.getState(getPositions=True).getPositions(asNumpy=True)
    return np.array(minimized.value_in_unit(unit.nanometer), dtype=np.float64)


def _without_box(build: Build, solvent: str = "vacuum") -> Build:
    """The same molecule before a box of water is added."""
    if not build.is_explicit:
        return build
    return replace(build, settings=build.settings.model_copy(update={"solvent": solvent}))


def _complete(build: Build, deposit: Deposit, loaded: LoadedForceField) -> tuple[Deposit, CreateSystem]:
    """The structure as it is where the force field takes it, or repaired where that is allowed and helps."""

    def try_out(content: Deposit) -> tuple[Deposit, CreateSystem]:
        create_system = _remember(_without_box(build), content.topology, loaded, content.path)
        create_system(build.constraints)
        content.report(build.name)
        return content, create_system

    try:
        return try_out(deposit)
    except InputError:
        settings = build.settings
        repaired = repair(deposit, loaded.force_field, settings.ph, settings.replace) if settings.repair else deposit
        if repaired is deposit:
            raise
    return try_out(repaired)


def _remember(build: Build, topology: app.Topology, loaded: LoadedForceField, where: object) -> CreateSystem:
    """Create each System once: templates of CHARMM with their patches take seconds to be matched."""

    @functools.cache
    def create_once(constraints: Constraints) -> openmm.System:
        return _create_system(build, topology, loaded, constraints, where)

    return lambda constraints: copy.deepcopy(create_once(constraints))


def _create_system(
    build: Build, topology: app.Topology, loaded: LoadedForceField, constraints: Constraints, where: object = None
) -> openmm.System:
    merged = merge_caps(topology, loaded.force_field)
    options: dict[str, Any] = build.choose_options(constraints)
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
    if build.settings.solvent == "obc2":
        add_obc2(system, topology)
    return system


def _solvate(
    build: Build, topology: app.Topology, positions: NDArray[np.float64], loaded: LoadedForceField, where: object
) -> tuple[app.Topology, NDArray[np.float64]]:
    return add_water_box(
        topology,
        positions,
        loaded.force_field,
        padding_nm=build.settings.padding_nm,
        ionic_strength_molar=build.settings.ionic_strength_molar,
        where=where,
    )


def _deserialize(path: str) -> Any:
    return openmm.XmlSerializer.deserialize(Path(path).read_text(encoding="utf-8"))
