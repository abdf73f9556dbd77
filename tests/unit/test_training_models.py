from __future__ import annotations

import mdtraj as md
import numpy as np
import pytest
import torch
from training_cases import REST, build_map

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.training.derivatives import compute_forces, compute_forces_and_hvps
from openmm_hvpcg.training.models import priors
from openmm_hvpcg.training.models.schnet import SchNet, build_network, cutoff_envelope

SETTINGS = ModelSettings(features=8, interactions=2, radial=10, cutoff_nm=0.5)


def build_random_network(seed: int = 0, settings: ModelSettings = SETTINGS) -> SchNet:
    torch.manual_seed(seed)
    network = build_network(3, settings, energy_scale=10.0).double()
    for parameter in network.readout[-1].parameters():
        torch.nn.init.normal_(parameter)
    return network


def sample_frames(n: int = 4, seed: int = 1) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(REST + 0.02 * rng.standard_normal((n, *REST.shape)))


SPECIES = torch.tensor([0, 1, 0, 1, 2])
INDEX4 = torch.tensor([[0, 1, 2, 3], [2, 1, 3, 4]])
ENERGIES = {
    "network": lambda x: build_random_network()(x, SPECIES),
    "bond": lambda x: priors.bond_energy(x, torch.tensor([[0, 1], [2, 3]]), torch.tensor([[900.0, 0.1], [500.0, 0.2]])),
    "angle": lambda x: priors.angle_energy(
        x, torch.tensor([[0, 1, 2], [1, 2, 4]]), torch.tensor([[50.0, -0.4], [9.0, 0.3]])
    ),
    "dihedral": lambda x: priors.dihedral_energy(x, INDEX4, torch.arange(12.0).reshape(2, 6).double()),
    "improper": lambda x: priors.improper_energy(x, INDEX4, torch.tensor([[20.0, 0.5], [30.0, -2.0]])),
    "repulsion": lambda x: priors.repulsion_energy(
        x, torch.tensor([[0, 3], [1, 4]]), torch.tensor([[0.5], [0.4]]), 2.5
    ),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_forces_and_hvps_are_derivatives_of_the_energy(name):
    """Against central differences in double: step 1e-5 nm leaves about 1e-7 of the value."""
    energy, x = ENERGIES[name], sample_frames()
    probes = torch.from_numpy(np.random.default_rng(2).standard_normal((len(x), 2, *x.shape[1:])))
    forces, hvps = compute_forces_and_hvps(energy, x, probes)
    torch.testing.assert_close(forces, compute_forces(energy, x))
    h = 1e-5
    for p in range(2):
        v = probes[:, p]
        slope = (energy(x + h * v) - energy(x - h * v)) / (2 * h)
        torch.testing.assert_close(slope, -(forces * v).sum((1, 2)), rtol=1e-5, atol=1e-5)
        curvature = -(compute_forces(energy, x + h * v) - compute_forces(energy, x - h * v)) / (2 * h)
        torch.testing.assert_close(hvps[:, p], curvature, rtol=1e-5, atol=1e-5 * float(hvps.abs().max()))
    assert float(forces.abs().max()) > 0.1


def test_energy_curvature_is_continuous_at_the_cutoff():
    """Value, slope and second derivative across the cutoff differ by O(step); a mere C1 envelope would jump."""
    network = build_random_network()
    direction = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0]]], dtype=torch.float64)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return network(x, torch.tensor([0, 1]))

    def curvature(r: float) -> float:
        return float(compute_forces_and_hvps(energy, r * direction, direction[:, None])[1][0, 0, 1, 0])

    cutoff = SETTINGS.cutoff_nm
    inside = curvature(cutoff - 1e-7)
    # The third derivative is of the size of the curvature well inside over the distance: 1e-7 nm changes little.
    scale = abs(curvature(0.8 * cutoff))
    assert scale > 1e-3
    assert abs(inside) < 1e-4 * scale
    assert curvature(cutoff + 1e-7) == 0.0
    assert float(energy((cutoff + 0.1) * direction)) == float(energy((cutoff + 0.3) * direction))


def test_envelope_is_one_at_zero_and_zero_beyond():
    x = torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64)
    assert cutoff_envelope(x).tolist() == [1.0, 0.0, 0.0]


def test_network_is_invariant_and_starts_at_zero():
    x, network = sample_frames(), build_random_network()
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0])
    # Double-precision rounding.
    torch.testing.assert_close(network(x @ turn + 1.0, SPECIES), network(x, SPECIES), rtol=1e-10, atol=1e-10)
    swapped = x[:, [2, 1, 0, 3, 4]]  # beads 0 and 2 are of one species
    torch.testing.assert_close(network(swapped, SPECIES), network(x, SPECIES), rtol=1e-10, atol=1e-10)
    assert (build_network(3, SETTINGS)(x.float(), SPECIES) == 0).all()


def test_species_matter():
    x, network = sample_frames(), build_random_network()
    assert not torch.allclose(network(x, SPECIES), network(x, torch.tensor([1, 1, 0, 1, 2])))


def test_dihedral_has_the_sign_of_mdtraj():
    x = sample_frames(20)
    trajectory = md.Trajectory(x.numpy(), build_map().to_topology())
    expected = md.compute_dihedrals(trajectory, INDEX4.numpy(), periodic=False)
    # mdtraj works in float32.
    np.testing.assert_allclose(priors.dihedral_angle(x, INDEX4).numpy(), expected, atol=1e-4)


def test_repulsion_is_smooth_where_it_starts():
    """Zero with two derivatives at sigma: within 1e-4 nm of it, energy ~ x^3, slope ~ x^2, curvature ~ x."""
    x = torch.tensor([[[0.0, 0, 0], [0.4 - 1e-4, 0, 0]]], dtype=torch.float64)
    direction = torch.tensor([[[[0.0, 0, 0], [1.0, 0, 0]]]], dtype=torch.float64)

    def energy(y: torch.Tensor) -> torch.Tensor:
        return priors.repulsion_energy(y, torch.tensor([[0, 1]]), torch.tensor([[0.4]], dtype=torch.float64), 2.5)

    force, hvp = compute_forces_and_hvps(energy, x, direction)
    # (sigma/r)^4 - 1 ~ 4 * 1e-4 / 0.4 = 1e-3: energy 2.5e-9, force 3 * 2.5e-6 * 10, curvature 6 * 2.5e-3 * 100.
    assert float(energy(x)) == pytest.approx(2.5e-9, rel=0.02)
    assert float(force[0, 1, 0]) == pytest.approx(7.5e-5, rel=0.02)
    assert float(hvp[0, 0, 1, 0]) == pytest.approx(1.5, rel=0.02)
    assert float(energy(x + 0.5 * direction[:, 0])) == 0.0
