"""Does an exported potential conserve energy, tabulated or not, with a list of pairs or without?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.prior_terms import PriorParameters
from openmm_hvpcg.simulation.system import CGPotential
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.models.registry import build_network

PRIORS = PriorParameters(
    {"*": (1500.0, 0.38)}, {"*": (50.0, -0.3, 0.0, 0.0)}, {"*": (1.0, 0.5, 0.2, 0.1, 0.3, 0.4)}, {}, {"*": (0.4,)}, 2.5
)
#: kJ/mol per ns and degree of freedom. Steps of 1 fs are short for bonds of this strength and forces are the gradient
#: of the energy, so that what drifts is rounding of a float32 network: below 1e-4 was found, tabulated or not.
LARGEST_DRIFT = 2e-3


def build_chain(n_beads: int) -> tuple[PotentialSpec, np.ndarray]:
    """A chain folded back and forth, so that many of its pairs cross the cutoff as it moves."""
    places = np.arange(n_beads)
    row, column = places // 4, places % 4
    x = np.stack((0.38 * np.where(row % 2, 3 - column, column), 0.38 * (row % 3), 0.38 * (row // 3)), 1)
    bonds = np.array([[i, i + 1] for i in range(n_beads - 1)])
    residues = tuple(("CG", b, 0) for b in range(n_beads))
    beads = BeadMap(
        np.eye(n_beads),
        tuple(("AB" * n_beads)[:n_beads]),
        np.full(n_beads, 30.0),
        bonds,
        tuple(f"X{b}" for b in range(n_beads)),
        residues,
    )
    spec = PotentialSpec(("A", "B"), beads, {}, {"A": 30.0, "B": 30.0}, PRIORS, 0.9, 300.0)
    return spec, x + 0.01 * np.random.default_rng(0).normal(size=x.shape)


@pytest.mark.parametrize(
    ("n_beads", "tabulate", "n_steps"), [(8, "off", 4000), (8, "on", 8000), (48, "on", 6000)], ids=str
)
def test_total_energy_does_not_drift(tmp_path: Path, n_beads: int, tabulate: str, n_steps: int) -> None:
    spec, start = build_chain(n_beads)
    settings = {"kind": "schnet", "features": 16, "radial": 20, "cutoff_nm": 0.9, "chiral_channels": 2}
    torch.manual_seed(1)
    network = build_network(2, ModelSettings.model_validate(settings), 10.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    export_potential(network, spec, tmp_path / "potential.pt", start[None], tabulate=tabulate)
    system = CGPotential.load(tmp_path / "potential.pt").createSystem(backend="torchforce")
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(start)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 100)
    context.setVelocitiesToTemperature(300.0, 3)
    integrator.step(500)
    first = context.getState(positions=True).getPositions(asNumpy=True)._value
    energies = []
    for _ in range(n_steps // 50):
        integrator.step(50)
        state = context.getState(energy=True)
        energies.append((state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole))
    moved = context.getState(positions=True).getPositions(asNumpy=True)._value - first
    assert np.linalg.norm(moved, axis=1).max() > 0.1  # more than the skin of the list
    times_ns = 50e-6 * np.arange(len(energies))
    drift = np.polyfit(times_ns, energies, 1)[0] / (3 * n_beads)
    print(f"{n_beads} beads, tables {tabulate}: {drift:.2g} kJ/mol/ns per degree of freedom")
    assert abs(drift) < LARGEST_DRIFT
