"""Makes the small input files of this folder: ``python data/make_inputs.py``.

- ``dialanine.pdb``       ACE-ALA-ALA-NME with all hydrogens, extended, minimised in OBC2
- ``dialanine.prmtop``, ``dialanine.rst7``   the same as Amber files (amber14, mbondi2 radii), by parmed
- ``dialanine.top``, ``dialanine.gro``   the same as GROMACS files, by parmed from the Amber files
- ``dialanine.psf``, ``dialanine.crd``, ``dialanine.prm``   the same as CHARMM files, by parmed from the Amber files
- ``dialanine.xml``       its serialized openmm.System (amber14, OBC2 as GBSAOBCForce, HBonds)
"""

from __future__ import annotations

from copy import copy
from pathlib import Path

import openmm
import parmed
from openmm import app, unit
from openmm.app.internal.customgbforces import GBSAOBC2Force

from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings

HERE = Path(__file__).parent


def main() -> None:
    settings = InputSettings(sequence="AA", solvent="obc2")
    molecule = build_atomistic_system(settings, temperature_K=300.0)
    positions = molecule.positions * unit.nanometer
    with open(HERE / "dialanine.pdb", "w", encoding="utf-8") as handle:
        app.PDBFile.writeFile(molecule.openmm_topology, positions, handle, keepIds=True)
    (HERE / "dialanine.xml").write_text(openmm.XmlSerializer.serialize(molecule.system), encoding="utf-8")
    write_amber(molecule.openmm_topology, positions)
    write_gromacs()
    write_charmm()


def write_amber(topology: app.Topology, positions: unit.Quantity) -> None:
    # Without constraints, so that parmed sees the parameters of every bond.
    system = app.ForceField("amber14-all.xml").createSystem(topology, constraints=None, removeCMMotion=False)
    structure = parmed.openmm.load_topology(topology, system, xyz=positions)
    amber = parmed.amber.AmberParm.from_structure(structure)
    amber.parm_data["RADIUS_SET"] = ["H(N)-modified Bondi radii (mbondi2)"]
    for atom, (radius_nm, scale) in zip(amber.atoms, GBSAOBC2Force.getStandardParameters(topology), strict=True):
        atom.solvent_radius, atom.screen = 10.0 * radius_nm, scale
    amber.remake_parm()
    amber.write_parm(str(HERE / "dialanine.prmtop"))
    amber.save(str(HERE / "dialanine.rst7"), overwrite=True)


def load_amber() -> parmed.Structure:
    return parmed.load_file(str(HERE / "dialanine.prmtop"), str(HERE / "dialanine.rst7"))


def write_gromacs() -> None:
    structure = load_amber()
    # Neither the time nor the folder it was made in.
    (HERE / "dialanine.top").write_text(without_comments(structure, "dialanine.top"), encoding="utf-8")
    # Seven digits, as many as the rst7 has; three are usual.
    parmed.gromacs.GromacsGroFile.write(structure, str(HERE / "dialanine.gro"), precision=7)


def without_comments(structure: parmed.Structure, name: str) -> str:
    structure.save(str(HERE / name), overwrite=True)
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(";")) + "\n"


def write_charmm() -> None:
    structure = load_amber()
    # CHARMM knows one 1-4 scaling for all torsions, and impropers that are harmonic: Amber's are torsions like others.
    for kind in structure.dihedral_types:
        kind.scee, kind.scnb = 1.2, 2.0
    for dihedral in structure.dihedrals:
        dihedral.improper = False
    # A type of its own for each atom: no two sets of parameters are then of the same types.
    for number, atom in enumerate(structure.atoms, start=1):
        atom.type = f"{atom.element_name}{number}"
        atom.atom_type = copy(atom.atom_type)
        atom.atom_type.name = atom.type
    psf = parmed.charmm.CharmmPsfFile.from_structure(structure)
    for ending in ("psf", "crd"):
        psf.save(str(HERE / f"dialanine.{ending}"), overwrite=True)
    parmed.charmm.CharmmParameterSet.from_structure(structure).write(par=str(HERE / "dialanine.prm"))


if __name__ == "__main__":
    main()
