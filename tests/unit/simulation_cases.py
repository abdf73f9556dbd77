"""Small potentials for the tests of the simulation room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import PotentialSpec, save_potential
from openmm_hvpcg.prior_terms import PriorParameters
from openmm_hvpcg.simulation.system import CGPotential
from openmm_hvpcg.training.export import script_potential
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.models.total import TotalEnergy

TEMPERATURE = 300.0
#: Species of the branched molecule: bead 2 has three neighbours, so that every kind of prior occurs.
BRANCHED = "ABABCC"
BONDS = [[0, 1], [1, 2], [2, 3], [3, 4], [2, 5]]
SITES = {"ALA:CA": "A", "GLY:CA": "B", "SER:CA": "C", "SER:CB": "B"}


def build_molecule(species: str, bonds: list[list[int]]) -> BeadMap:
    n_beads = len(species)
    return BeadMap(
        np.eye(n_beads),
        tuple(species),
        np.linspace(12.0, 40.0, n_beads),
        np.array(bonds),
        tuple(f"X{b}" for b in range(n_beads)),
        tuple(("ALA", 1 + b // 2, 0) for b in range(n_beads)),
    )


def build_priors(bond_k: float = 1500.0) -> PriorParameters:
    """Parameters that differ between species, so that a mix-up of terms shows."""
    return PriorParameters(
        {"*": (bond_k, 0.30), "A|B": (1.2 * bond_k, 0.33)},
        {"*": (60.0, -0.5, 40.0, 0.6), "A|B|A": (80.0, -0.3, 30.0, 0.8)},
        {"*": (1.0, 0.5, 0.2, 0.1, 0.3, 0.4), "A|B|A|B": (2.0, -0.7, 0.3, 0.6, -0.2, 0.1)},
        {"*": (20.0, 0.6)},
        {"*": (0.5,), "A|C": (0.62,)},
        2.5,
    )


def build_eager(
    molecule: BeadMap,
    priors: PriorParameters,
    settings: ModelSettings | None = None,
    energy_scale: float = 30.0,
) -> tuple[TotalEnergy, PotentialSpec]:
    settings = settings or ModelSettings(features=16, interactions=2, radial=12)
    masses = {"A": 12.0, "B": 15.0, "C": 20.0}
    spec = PotentialSpec(tuple("ABC"), molecule, SITES, masses, priors, settings.cutoff_nm, TEMPERATURE)
    return TotalEnergy(build_trained_network(settings, energy_scale), spec), spec


def build_trained_network(settings: ModelSettings, energy_scale: float) -> torch.nn.Module:
    """A network as training might leave it: a new one is zero everywhere, and nothing would be compared."""
    torch.manual_seed(11)
    network = build_network(3, settings, energy_scale)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


def build_potential(
    molecule: BeadMap | None = None, priors: PriorParameters | None = None, **options: object
) -> CGPotential:
    molecule = molecule or build_molecule(BRANCHED, BONDS)
    eager, spec = build_eager(molecule, priors or build_priors(), **options)  # type: ignore[arg-type]
    return CGPotential(script_potential(eager), spec)


def save_example(path: Path, **options: object) -> Path:
    potential = build_potential(**options)  # type: ignore[arg-type]
    save_potential(path, potential.script, potential.spec)
    return path


def build_frames(n_frames: int, molecule: BeadMap | None = None, seed: int = 5) -> np.ndarray:
    """Frames (n, B, 3) nm with bonds near 0.3 nm; the branched ends come within reach of the repulsion."""
    molecule = molecule or build_molecule(BRANCHED, BONDS)
    rng = np.random.default_rng(seed)
    frames = np.zeros((n_frames, molecule.n_beads, 3))
    for i, j in molecule.bonds:
        step = rng.normal(size=(n_frames, 3)) + np.array([0.9, 0.5 * (j % 2), 0.2 * j])
        step *= rng.normal(0.31, 0.02, size=(n_frames, 1)) / np.linalg.norm(step, axis=1, keepdims=True)
        frames[:, j] = frames[:, i] + step
    return frames


def build_dimer(bond_k: float, r0: float = 0.3) -> CGPotential:
    """Two beads and one spring; the network is there and contributes nothing."""
    settings = ModelSettings(features=4, interactions=1, radial=4)
    priors = PriorParameters({"*": (bond_k, r0)})
    return build_potential(build_molecule("AA", [[0, 1]]), priors, settings=settings, energy_scale=0.0)
