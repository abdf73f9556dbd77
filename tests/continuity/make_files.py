"""Makes the stored files of this folder: ``python tests/continuity/make_files.py``.

Run it once for each new format version and keep the files of the older ones: what these hold has to load for ever.

- ``frames.zarr``      six frames of ACE-ALA-ALA-NME, two walkers
- ``dataset.zarr``     their labels, backbone beads, two probes a frame
- ``potential.pt``     a small untrained network with priors, exported and checked
- ``protocol.yaml``    the protocol all came from; ``protocol.resolved.yaml``, the same with every default
- ``expected.json``    values they held
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
import zarr

from openmm_hvpcg import potential
from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import dump_protocol, load_protocol
from openmm_hvpcg.frames import Frames, load_frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.potential import PotentialSpec, load_potential
from openmm_hvpcg.prior_terms import ANY, PriorParameters
from openmm_hvpcg.storage import write_text
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.labels.label import label_frames
from openmm_hvpcg.training.models.registry import build_network

HERE = Path(__file__).parent
FILES = HERE / "files" / f"version_{potential.FORMAT_VERSION}"
DATA = HERE.parents[1] / "data"

PROTOCOL = """\
temperature_K: 300
molecules:
  - {name: ala2, input: {system_xml: dialanine.xml, pdb: dialanine.pdb}}
  - {name: other, role: test, input: {sequence: AGA, solvent: vacuum, hydrogen_mass_amu: 1.5}}
sampling: {n_frames: 6, walkers: 2, stride: 50, equilibration_steps: 100, timestep_fs: 2, platform: Reference}
mapping: {beads: backbone}
labels: {force_map: optimal, probes_per_frame: 2, step_nm: 1.0e-4, platform: Reference, workers: 1}
model: {features: 4, interactions: 1, radial: 6, cutoff_nm: 0.8}
training:
  arms: [{name: fm}, {name: hvp, hvp_weight: 1.0, max_epochs: 3}]
  learning_rate: 1e-3
simulation: {replicas: 2, n_steps: 100, save_every: 10}
"""


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    shutil.rmtree(FILES, ignore_errors=True)
    write_text(FILES / "protocol.yaml", PROTOCOL)
    protocol = load_protocol(FILES / "protocol.yaml")
    write_text(FILES / "protocol.resolved.yaml", dump_protocol(protocol))
    molecule = build_atomistic_system(protocol.molecules[0].input, temperature_K=300.0, base=DATA)
    sample_frames(molecule, protocol.sampling, FILES / "frames.zarr", progress=False)
    frames = load_frames(FILES / "frames.zarr")
    bead_map = build_bead_map("backbone", frames.topology)
    dataset = label_frames(molecule, frames, bead_map, protocol.labels, FILES / "dataset.zarr", progress=False)
    spec = build_spec(bead_map, dataset)
    torch.manual_seed(11)
    network = build_network(len(spec.species), protocol.model, 10.0)
    with torch.no_grad():  # a new network is zero everywhere
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    export_potential(network, spec, FILES / "potential.pt", dataset.positions)
    write_text(FILES / "expected.json", json.dumps(describe(FILES, frames, dataset)) + "\n")


def build_spec(bead_map: BeadMap, dataset: LabelledFrames) -> PotentialSpec:
    priors = PriorParameters(
        bonds={ANY: (5e4, 0.14)},
        angles={ANY: (200.0, -0.5, 50.0, -0.4)},
        dihedrals={ANY: (1.0, 0.5, 0.2, 0.1, 0.3, 0.4)},
        impropers={ANY: (20.0, 0.6)},
        repulsion={ANY: (0.35,)},
        repulsion_epsilon=2.5,
    )
    sites = zip(bead_map.residues, bead_map.names, bead_map.species, strict=True)
    return PotentialSpec(
        tuple(sorted(set(bead_map.species))),
        bead_map,
        {f"{residue[0]}:{name}": species for residue, name, species in sites},
        dict(zip(bead_map.species, bead_map.masses.tolist(), strict=True)),
        priors,
        cutoff_nm=0.8,
        temperature_K=300.0,
        model={"kind": "schnet", "features": 4, "interactions": 1, "radial": 6, "cutoff_nm": 0.8},
        datasets={"ala2": dataset.hash},
        metrics={"val_force": 1.25, "val_hvp": None},
        provenance={"arm": "hvp", "seed": 11},
    )


def describe(folder: Path, frames: Frames, dataset: LabelledFrames) -> dict:
    """Values that have to come back, read with nothing of ours but the energy."""
    script, spec = load_potential(folder / "potential.pt")
    x = torch.from_numpy(dataset.positions.astype(np.float64)).requires_grad_()
    energies = torch.stack([script(frame) for frame in x])
    forces = -torch.autograd.grad(energies.sum(), x)[0]
    return {
        "frames": {
            name: np.asarray(values, dtype=float).tolist()
            for name, values in zarr.open_group(str(folder / "frames.zarr"), mode="r").arrays()
        },
        "frames_provenance": frames.provenance,
        "interval_ps": frames.interval_ps,
        "atoms": [str(atom) for atom in frames.topology.atoms],
        "atom_bonds": [[a.index, b.index] for a, b in frames.topology.bonds],
        "dataset": {
            name: np.asarray(values, dtype=float).tolist()
            for name, values in zarr.open_group(str(folder / "dataset.zarr"), mode="r").arrays()
        },
        "dataset_hash": dataset.hash,
        "bead_map_hash": spec.bead_map.hash,
        "species": list(spec.bead_map.species),
        "bead_bonds": spec.bead_map.bonds.tolist(),
        "energies": energies.tolist(),
        "forces": forces.tolist(),
    }


if __name__ == "__main__":
    main()
