"""What every kind of network must satisfy to be exported and simulated; a new kind is tested by existing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.errors import PotentialError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import PotentialSpec, bind_molecule, load_potential, save_potential
from openmm_hvpcg.prior_terms import PriorParameters
from openmm_hvpcg.simulation.backends import evaluate_script
from openmm_hvpcg.simulation.check import check_potential
from openmm_hvpcg.simulation.system import CGPotential
from openmm_hvpcg.training.export import script_potential
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.models.total import TotalEnergy

KINDS = (*ModelSettings.KINDS, "my_network:MyNetwork")
SETTINGS = {"features": 16, "interactions": 2, "radial": 12, "cutoff_nm": 0.9}


def build_molecule(species: str) -> BeadMap:
    n_beads = len(species)
    bonds = np.array([[i, i + 1] for i in range(n_beads - 1)])
    names = tuple(f"X{b}" for b in range(n_beads))
    residues = tuple(("CG", b + 1, 0) for b in range(n_beads))
    return BeadMap(np.eye(n_beads), tuple(species), np.full(n_beads, 15.0), bonds, names, residues)


def build_model(kind: str, species: str = "ABCBA") -> tuple[TotalEnergy, PotentialSpec]:
    settings = ModelSettings.model_validate({"kind": kind, **SETTINGS})
    priors = PriorParameters(
        {"*": (1500.0, 0.35)},
        {"*": (50.0, -0.4)},
        {"*": (1.0, 0.5, 0.2, 0.1, 0.3, 0.4)},
        {},
        {"*": (0.5,)},
        2.5,
    )
    masses = {"A": 15.0, "B": 15.0, "C": 15.0}
    spec = PotentialSpec(
        tuple("ABC"),
        build_molecule(species),
        {},
        masses,
        priors,
        settings.cutoff_nm,
        300.0,
        settings.model_dump(),
    )
    torch.manual_seed(2)
    network = build_network(3, settings, 25.0)
    with torch.no_grad():  # as training might leave it: a new network may be zero everywhere
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return TotalEnergy(network, spec), spec


def build_frames(n_frames: int, n_beads: int) -> np.ndarray:
    steps = np.random.default_rng(8).normal(size=(n_frames, n_beads, 3)) + np.array([0.8, 0.0, 0.0])
    return np.cumsum(0.35 * steps / np.linalg.norm(steps, axis=-1, keepdims=True), axis=1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_passes_every_check(kind: str) -> None:
    eager, spec = build_model(kind)
    check_potential(CGPotential(script_potential(eager), spec), build_frames(4, 5), eager=eager).raise_if_failed()


def test_survives_the_file(kind: str, tmp_path: Path) -> None:
    eager, spec = build_model(kind)
    save_potential(tmp_path / "potential.pt", script_potential(eager), spec)
    script, back = load_potential(tmp_path / "potential.pt")
    assert back.to_json() == spec.to_json()
    for frame in build_frames(3, 5):
        # The same float32 operations, perhaps fused differently.
        assert evaluate_script(script, frame)[0] == pytest.approx(
            float(eager(torch.from_numpy(frame)).detach()), rel=1e-5
        )


def test_binds_to_another_molecule(kind: str) -> None:
    eager, spec = build_model(kind)
    script = script_potential(eager)
    other, other_spec = build_model(kind, "CCA")
    assert bind_molecule(script, spec, build_molecule("CCA")).bead_map.species == other_spec.bead_map.species
    for frame in build_frames(3, 3):
        assert evaluate_script(script, frame)[0] == pytest.approx(
            float(other(torch.from_numpy(frame)).detach()), rel=1e-5
        )
    with pytest.raises(PotentialError, match="species Z"):
        bind_molecule(script, spec, build_molecule("AZ"))


def test_tells_species_apart(kind: str) -> None:
    (first, _), (second, _) = build_model(kind, "ABC"), build_model(kind, "ACB")
    first.include_priors = second.include_priors = False
    x = torch.from_numpy(build_frames(1, 3)[0])
    assert abs(float(first(x).detach()) - float(second(x).detach())) > 1e-3


def test_network_alone_without_priors(kind: str) -> None:
    eager, _ = build_model(kind)
    frame = torch.from_numpy(build_frames(1, 5)[0])
    total = float(eager(frame).detach())
    eager.include_priors = False
    network = float(eager(frame).detach())
    priors = float(eager.prior_energies(frame.unsqueeze(0)).detach())
    assert total == pytest.approx(network + priors, rel=1e-9)
    assert priors > 1.0


def test_second_derivative_is_continuous_at_the_cutoff(kind: str) -> None:
    """Two beads pulled apart, in float64: the curvature just inside the cutoff tends to that outside, zero.

    It goes to zero at least linearly, so at 1e-5 of the cutoff inside it may be some 1e-4 of its largest
    value; a jump would leave it at order one.
    """
    eager, _ = build_model(kind, "AB")
    network, species = eager.network.double(), eager.species

    def compute_curvature(r: float) -> float:
        x = torch.tensor(r, dtype=torch.float64, requires_grad=True)
        positions = torch.stack([torch.zeros(3, dtype=torch.float64), x * torch.tensor([1.0, 0, 0]).double()])
        energy = network(positions.unsqueeze(0), species).sum()
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return float(torch.autograd.grad(slope, x)[0])

    cutoff = SETTINGS["cutoff_nm"]
    largest = max(abs(compute_curvature(r)) for r in np.linspace(0.3, 0.85, 12))
    assert largest > 1.0
    assert abs(compute_curvature(cutoff * (1 - 1e-5))) < 1e-2 * largest
    assert compute_curvature(cutoff * (1 + 1e-5)) == 0.0
