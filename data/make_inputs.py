"""Makes the small input files of this folder: ``python data/make_inputs.py``.

- ``dialanine.pdb``       ACE-ALA-ALA-NME with all hydrogens, extended, minimised in OBC2
- ``dialanine.prmtop``, ``dialanine.rst7``   the same as Amber files (amber14, mbondi2 radii), by parmed
- ``dialanine.xml``       its serialized openmm.System (amber14, OBC2 as GBSAOBCForce, HBonds)
"""

from __future__ import annotations

from pathlib import Path

import openmm
import parmed
from openmm import app, unit
from openmm.app.internal.customgbforces import GBSAOBC2Force

from openmm_hvpcg.atomistic.systems import build_from_sequence
from openmm_hvpcg.config import InputSettings

HERE = Path(__file__).parent


def main() -> None:
    settings = InputSettings(sequence="AA", solvent="obc2")
    molecule = build_from_sequence(settings, temperature_K=300.0)
    positions = molecule.positions * unit.nanometer
    with open(HERE / "dialanine.pdb", "w", encoding="utf-8") as handle:
        app.PDBFile.writeFile(molecule.openmm_topology, positions, handle, keepIds=True)
    (HERE / "dialanine.xml").write_text(openmm.XmlSerializer.serialize(molecule.system), encoding="utf-8")
    write_amber(molecule.openmm_topology, positions)


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


if __name__ == "__main__":
    main()
