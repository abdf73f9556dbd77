"""Molecules whose force field comes in files: Amber, GROMACS, CHARMM.

OpenMM's own readers serve all three, CHAMBER prmtops (CHARMM in Amber's format) among them, and build Systems with
one set of options. The exception is gro files, where OpenMM refuses more than three decimals: parmed reads those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import parmed
from numpy.typing import NDArray
from openmm import app, unit
from openmm.app.internal.unitcell import computePeriodicBoxVectors

from openmm_hvpcg.atomistic.building import (
    Build,
    Constraints,
    check_bond_lengths,
    check_same_size,
    check_waters,
    label_atom,
    read_file,
)
from openmm_hvpcg.atomistic.gromacs_includes import hash_includes
from openmm_hvpcg.atomistic.molecule import AtomisticSystem, check_positions
from openmm_hvpcg.atomistic.peptides import to_nm
from openmm_hvpcg.atomistic.solvent import add_obc2, check_box
from openmm_hvpcg.errors import InputError

ANGSTROM_PER_NM = 10.0


def _read_crd(path: str) -> app.CharmmCrdFile:
    # On a file that ends in its title OpenMM's reader never returns; parmed recognises what is none.
    if not parmed.charmm.CharmmCrdFile.id_format(path):
        raise ValueError("no atoms in the format of a crd")
    return app.CharmmCrdFile(path)


#: Ending of a coordinate file of GROMACS or CHARMM -> what it is, and its reader.
COORDINATES: dict[str, tuple[str, Callable[[str], Any]]] = {
    ".gro": ("GROMACS coordinates (gro)", partial(parmed.gromacs.GromacsGroFile.parse, skip_bonds=True)),
    ".crd": ("CHARMM coordinates (crd)", _read_crd),
    ".cor": ("CHARMM coordinates (cor)", _read_crd),
    ".pdb": ("a PDB file", app.PDBFile),
}


def build_from_amber(build: Build) -> AtomisticSystem:
    """Build from an Amber prmtop and inpcrd/rst7; obc2 takes radii and scale factors from the prmtop."""
    settings = build.settings
    path = build.find_file(settings.prmtop)
    coordinates_path = build.find_file(settings.coordinates)
    coordinates = read_file(coordinates_path, app.AmberInpcrdFile, "Amber coordinates (inpcrd or rst7)")
    positions = to_nm(coordinates.positions)
    box = getattr(coordinates, "boxVectors", None)
    prmtop = read_file(path, lambda p: app.AmberPrmtopFile(p, periodicBoxVectors=box), "an Amber prmtop")
    _check_molecule(build, prmtop.topology, positions, path, coordinates_path)

    def create_system(constraints: Constraints) -> openmm.System:
        options = build.choose_options(constraints)
        if settings.solvent == "obc2":
            options["implicitSolvent"] = app.OBC2
        return _create("prmtop", path, lambda: prmtop.createSystem(**options))

    facts = {"files": build.hash_files(settings.prmtop, settings.coordinates), **build.describe()}
    return build.finish("amber", prmtop.topology, positions, create_system, facts)


def build_from_gromacs(build: Build) -> AtomisticSystem:
    """Build from a GROMACS top and gro (or PDB); obc2 has the radii of ``implicit/obc2.xml`` (mbondi2).

    Files the top includes are looked for beside it, then in ``include_folder``, then in an installed GROMACS.
    """
    settings = build.settings
    path = build.find_file(settings.top)
    coordinates_path = build.find_file(settings.coordinates)
    positions, box = _read_coordinates(coordinates_path)
    include = None if settings.include_folder is None else build.base / settings.include_folder
    if include is not None and not include.is_dir():
        raise InputError("no such folder", where=include)

    def read_top() -> app.GromacsTopFile:
        return read_file(
            path,
            lambda p: app.GromacsTopFile(
                p,
                periodicBoxVectors=_choose_box(build, box),
                includeDir=None if include is None else str(include),
            ),
            "a GROMACS top; files it includes are found beside it or in include_folder",
        )

    topology = read_top().topology
    _check_molecule(build, topology, positions, path, coordinates_path)

    def create_system(constraints: Constraints) -> openmm.System:
        # Read again: createSystem converts pair parameters of some combination rules in place.
        options = build.choose_options(constraints)
        system = _create("GROMACS top", path, lambda: read_top().createSystem(**options))
        _check_elements(system, topology, path)
        return _add_solvent(build, system, topology)

    facts = {"files": build.hash_files(settings.top, settings.coordinates), **build.describe()}
    included = hash_includes(build.base, str(settings.top), settings.include_folder)
    if included:
        facts["included"] = included
    return build.finish("gromacs", topology, positions, create_system, facts)


def build_from_charmm(build: Build) -> AtomisticSystem:
    """Build from a CHARMM psf, parameter files and crd (or PDB); obc2 has the radii of ``implicit/obc2.xml``."""
    settings = build.settings
    path = build.find_file(settings.psf)
    coordinates_path = build.find_file(settings.coordinates)
    positions, box = _read_coordinates(coordinates_path)
    if settings.box_nm is not None:
        box = [openmm.Vec3(*row) for row in np.diag(settings.box_nm).tolist()] * unit.nanometer
    parameter_paths = [build.find_file(name) for name in settings.parameters or []]
    parameters = read_file(
        parameter_paths[0],
        lambda _: app.CharmmParameterSet(*map(str, parameter_paths)),
        "CHARMM parameters (rtf, prm, str), those that others build on first",
    )
    psf = read_file(path, lambda p: app.CharmmPsfFile(p, periodicBoxVectors=_choose_box(build, box)), "a CHARMM psf")
    # Elements come with the types of the parameters; masses may have been repartitioned.
    _create(f"psf with {', '.join(settings.parameters or [])}", path, lambda: psf.loadParameters(parameters))
    topology = psf.topology
    _check_molecule(build, topology, positions, path, coordinates_path)

    def create_system(constraints: Constraints) -> openmm.System:
        # Otherwise a constrained bond keeps its harmonic term, and would have two where beads are freed.
        options = {**build.choose_options(constraints), "flexibleConstraints": False}
        system = _create("psf", path, lambda: psf.createSystem(parameters, **options))
        return _add_solvent(build, system, topology)

    files = build.hash_files(settings.psf, settings.coordinates, *(settings.parameters or []))
    return build.finish("charmm", topology, positions, create_system, {"files": files, **build.describe()})


def _read_coordinates(path: Path) -> tuple[NDArray[np.float64], Any]:
    """Positions (A, 3) in nm, and box vectors or None."""
    what, reader = COORDINATES.get(path.suffix.lower(), (None, None))
    if what is None or reader is None:
        raise InputError("unknown kind of coordinates", expected=f"a file in {', '.join(COORDINATES)}", where=path)
    content = read_file(path, reader, what)
    if isinstance(content, app.PDBFile):
        return to_nm(content.positions), content.topology.getPeriodicBoxVectors()
    if not isinstance(content, parmed.Structure):
        return to_nm(content.positions), None
    if content.coordinates is None:
        raise InputError("holds no atoms", expected=what, where=path)
    positions = np.asarray(content.coordinates, dtype=np.float64) / ANGSTROM_PER_NM
    if content.box is None or not np.all(content.box[:3] > 0):
        return positions, None
    return positions, computePeriodicBoxVectors(*(content.box[:3] / ANGSTROM_PER_NM), *np.deg2rad(content.box[3:]))


def _choose_box(build: Build, box: Any) -> Any:
    """The box, where it counts; gro files of a single molecule often hold one of no size."""
    return box if build.is_explicit else None


def _check_molecule(
    build: Build, topology: app.Topology, positions: NDArray[np.float64], topology_path: Path, path: Path
) -> None:
    check_same_size(topology, positions, topology_path, path)
    check_positions(positions, topology, path)
    check_waters(topology, build.settings.solvent, topology_path)
    if build.is_explicit:
        check_box(topology, path)
    check_bond_lengths(topology, positions, topology_path, path, periodic=build.is_explicit)


def _create(what: str, where: Path, create: Callable[[], Any]) -> Any:
    try:
        return create()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"OpenMM cannot build this {what} ({error})", where=where) from error


def _check_elements(system: openmm.System, topology: app.Topology, path: Path) -> None:
    """Raise :class:`InputError` for an atom of unknown element that is no virtual site."""
    for atom in topology.atoms():
        if atom.element is None and system.getParticleMass(atom.index)._value > 0:
            raise InputError(
                f"the element of {label_atom(atom)} is unknown",
                where=path,
                hint="write atomic numbers into [ atomtypes ]",
            )


def _add_solvent(build: Build, system: openmm.System, topology: app.Topology) -> openmm.System:
    if build.settings.solvent == "obc2":
        add_obc2(system, topology)
    return system
