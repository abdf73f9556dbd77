"""What every source of a molecule shares: its request, its files, options of its System, and the last steps."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import mdtraj as md
import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from openmm_hvpcg.atomistic.flexible import free_beads
from openmm_hvpcg.atomistic.forcefields import LoadedForceField
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.solvent import CUTOFF_NM, SWITCH_NM, count_waters
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import compute_hash, hash_file

logger = logging.getLogger(__name__)

Constraints = Literal["none", "hbonds", "allbonds"]
#: Gives the beads that are to be free of constraints, from the finished topology.
MapBeads = Callable[[md.Topology], BeadMap]
#: Builds the System of a molecule with the bonds rigid that are asked for.
CreateSystem = Callable[[Constraints], openmm.System]
CONSTRAINTS = {"none": None, "hbonds": app.HBonds, "allbonds": app.AllBonds}

#: No covalent bond of a biomolecule is as long (nm); C and N on both sides of a gap in a chain are farther apart.
LONGEST_BOND_NM = 0.25

T = TypeVar("T")


@dataclass(frozen=True)
class Build:
    """A molecule to be built.

    Attributes
    ----------
    settings : where it comes from
    temperature_K : temperature of the ensemble
    constraints : which bonds are rigid (water in explicit solvent always is)
    name : the molecule, for messages
    base : folder that file names are relative to
    flexible_beads : the beads whose bonds stay flexible, whatever ``constraints`` says
    """

    settings: InputSettings
    temperature_K: float
    constraints: Constraints = "hbonds"
    name: str = ""
    base: Path = Path(".")
    flexible_beads: MapBeads | None = None

    @property
    def is_explicit(self) -> bool:
        return self.settings.solvent == "explicit"

    def find_file(self, name: str | None) -> Path:
        """Path of an input file; :class:`InputError` where there is none."""
        if name is None:
            raise InputError("a file name is missing from the input")
        path = self.base / name
        if not path.is_file():
            raise InputError("no such file", where=path)
        return path

    def choose_options(self, constraints: Constraints) -> dict[str, Any]:
        """Arguments that every ``createSystem`` of OpenMM knows."""
        if constraints not in CONSTRAINTS:
            raise InputError("unknown constraints", expected=", ".join(CONSTRAINTS), got=constraints)
        options: dict[str, Any] = {
            "nonbondedMethod": app.NoCutoff,
            "constraints": CONSTRAINTS[constraints],
            "rigidWater": True,
            "removeCMMotion": False,
        }
        if self.settings.hydrogen_mass_amu is not None:
            options["hydrogenMass"] = self.settings.hydrogen_mass_amu * unit.amu
        if self.is_explicit:
            options |= {
                "nonbondedMethod": app.PME,
                "nonbondedCutoff": CUTOFF_NM * unit.nanometer,
                "switchDistance": SWITCH_NM * unit.nanometer,
            }
        return options

    def finish(
        self,
        source: str,
        topology: app.Topology,
        positions: NDArray[np.float64],
        create_system: CreateSystem,
        facts: dict[str, Any],
    ) -> AtomisticSystem:
        """Create the System, free the beads of constraints where that is asked, and put all together.

        Parameters
        ----------
        source : name of the kind of input, for the provenance
        topology, positions : the molecule, (A, 3) nm
        create_system : called with the constraints asked for, and with "none" where beads are freed
        facts : of the source, for the provenance
        """
        system = create_system(self.constraints)
        freed: dict[str, Any] = {}
        if self.flexible_beads is not None:
            bead_map = self.flexible_beads(md.Topology.from_openmm(topology))
            freed["lifted_constraints"] = free_beads(system, create_system("none"), bead_map, self.name)
        return self.assemble(source, topology, system, positions, facts | freed)

    def assemble(
        self,
        source: str,
        topology: app.Topology,
        system: openmm.System,
        positions: NDArray[np.float64],
        facts: dict[str, Any],
    ) -> AtomisticSystem:
        """The finished molecule with its provenance, without a CMMotionRemover."""
        for index in reversed(range(system.getNumForces())):
            if isinstance(system.getForce(index), openmm.CMMotionRemover):
                system.removeForce(index)
                logger.info("%s: the CMMotionRemover of the System is left out", self.name or "molecule")
        provenance = {
            "source": source,
            **facts,
            "n_atoms": system.getNumParticles(),
            "openmm_version": openmm.version.full_version,
            "positions_sha256": compute_hash(positions),
        }
        result = AtomisticSystem(
            md.Topology.from_openmm(topology), topology, system, positions, self.temperature_K, provenance, self.name
        )
        provenance["system_sha256"] = result.system_hash
        return result

    def describe(self, loaded: LoadedForceField | None = None) -> dict[str, Any]:
        """Facts of solvent, constraints and force field, for the provenance."""
        facts: dict[str, Any] = {
            "solvent": self.settings.solvent,
            "constraints": self.constraints,
            "hydrogen_mass_amu": self.settings.hydrogen_mass_amu,
        }
        if loaded is not None:
            facts["force_field"] = list(loaded.files)
            facts["force_field_hashes"] = loaded.hashes
        if self.is_explicit:
            facts |= {
                "cutoff_nm": CUTOFF_NM,
                "switch_nm": SWITCH_NM,
                "padding_nm": self.settings.padding_nm,
                "ionic_strength_molar": self.settings.ionic_strength_molar,
            }
        return facts

    def hash_files(self, *names: str | None) -> dict[str, str]:
        """Names of the files as they were given, and their SHA-256."""
        return {name: hash_file(self.base / name) for name in names if name is not None}


def read_file(path: Path, reader: Callable[[str], T], what: str) -> T:
    """Call ``reader`` on the file name; whatever it raises becomes one line that names the file."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = reader(str(path))
    except Exception as error:
        raise InputError(f"cannot be read ({type(error).__name__}: {error})", expected=what, where=path) from error
    for warning in caught:
        if issubclass(warning.category, UserWarning):  # what the file is blamed for, not how the reader is written
            logger.warning("%s: %s", path, " ".join(str(warning.message).split()))
    return result


def check_same_size(topology: app.Topology, positions: NDArray[np.float64], topology_path: Path, path: Path) -> None:
    """Raise :class:`InputError` where topology and coordinates have different numbers of atoms."""
    if topology.getNumAtoms() != len(positions):
        raise InputError(
            "topology and coordinates are of different sizes",
            expected=f"{topology.getNumAtoms()} atoms ({topology_path})",
            got=f"{len(positions)} ({path})",
        )


def check_waters(topology: app.Topology, solvent: str, where: object) -> None:
    """Raise :class:`InputError` for water molecules in vacuum or implicit solvent."""
    waters = count_waters(topology)
    if waters and solvent != "explicit":
        raise InputError(
            f"holds {waters} water molecules, but the solvent is {solvent}",
            where=where,
            hint="remove the water (of a PDB: remove: [HOH]), or set solvent: explicit",
        )


def find_long_bond(
    topology: app.Topology, positions: NDArray[np.float64], *, periodic: bool
) -> tuple[tuple[app.topology.Atom, app.topology.Atom], float] | None:
    """The first bond longer than any bond is, and its length in nm; periodic: between nearest images."""
    bonds = list(topology.bonds())
    if not bonds:
        return None
    frame = md.Trajectory(positions, md.Topology.from_openmm(topology))
    if periodic:
        vectors = topology.getPeriodicBoxVectors()
        frame.unitcell_vectors = np.array([[[*v.value_in_unit(unit.nanometer)] for v in vectors]])
    pairs = [[b[0].index, b[1].index] for b in bonds]
    lengths = md.compute_distances(frame, pairs, periodic=periodic)[0]
    first = int(np.argmax(lengths > LONGEST_BOND_NM))
    if not lengths[first] > LONGEST_BOND_NM:
        return None
    return (bonds[first][0], bonds[first][1]), float(lengths[first])


def check_bond_lengths(
    topology: app.Topology, positions: NDArray[np.float64], topology_path: Path, path: Path, *, periodic: bool
) -> None:
    """Raise :class:`InputError` where coordinates belong to other atoms than those of the topology."""
    found = find_long_bond(topology, positions, periodic=periodic)
    if found is not None:
        (a, b), length = found
        raise InputError(
            f"coordinates and {topology_path.name} do not belong together, or a molecule is broken over the box",
            expected=f"bonds of at most {LONGEST_BOND_NM} nm",
            got=f"{length:.2f} nm between atoms {label_atom(a)} and {label_atom(b)}",
            where=path,
            hint="write the atoms in the order of the topology, with whole molecules",
        )


def label_residue(residue: app.topology.Residue) -> str:
    """A residue as messages name it, such as ``ALA 2 (chain A)``."""
    return f"{residue.name} {residue.id}{residue.insertionCode.strip()} (chain {residue.chain.id})"


def label_atom(atom: app.topology.Atom) -> str:
    """An atom as messages name it, such as ``CA of ALA 2 (chain A)``."""
    return f"{atom.name} of {label_residue(atom.residue)}"
