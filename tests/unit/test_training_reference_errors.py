from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_cases import KT, SPECIES, TEMPERATURE, build_labels, build_map

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import DataError, PotentialError
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.models.total import TotalEnergy
from openmm_hvpcg.training.preparation import prepare
from openmm_hvpcg.training.reference import PMFReference
from openmm_hvpcg.training.reference_errors import compute_reference_errors

N_BEADS = len(SPECIES)
MODEL = ModelSettings(features=8, interactions=1, radial=6)


@pytest.fixture(scope="module")
def spec():
    return prepare([build_labels()], TrainingSettings(), MODEL, PriorSettings(), {}).spec


def compute_priors(spec, positions: np.ndarray, probes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = TotalEnergy(torch.nn.Identity(), spec).double()
    found = compute_forces_and_hvps(total.prior_energies, torch.from_numpy(positions), torch.from_numpy(probes))
    return found[0].numpy(), found[1].numpy()


def build_reference(
    spec, n_frames: int = 40, probes: str = "full", force_noise: float = 0.0, hvp_noise: float = 0.0
) -> PMFReference:
    """The priors' own forces and HVPs, plus those of :class:`Spring`, plus noise of known standard errors."""
    rng = np.random.default_rng(1)
    positions = build_labels(n_frames, seed=3).positions.astype(np.float64)
    v = np.tile(np.eye(3 * N_BEADS).reshape(-1, N_BEADS, 3), (n_frames, 1, 1, 1))
    if probes != "full":
        v = rng.choice([-1.0, 1.0], (n_frames, 4, N_BEADS, 3))
    forces, hvps = compute_priors(spec, positions, v)
    centred = positions - positions.mean(axis=1, keepdims=True)
    forces = forces - Spring.stiffness * centred
    hvps = hvps + Spring.stiffness * (v - v.mean(axis=2, keepdims=True))
    return PMFReference(
        positions,
        forces + force_noise * rng.standard_normal(forces.shape),
        np.full_like(forces, force_noise),
        v,
        hvps + hvp_noise * rng.standard_normal(hvps.shape),
        np.full_like(hvps, hvp_noise),
        np.arange(n_frames),
        np.eye(N_BEADS),
        build_map(),
        TEMPERATURE,
        {},
        "mol",
    )


class Spring(torch.nn.Module):
    """``k/2 sum_b |x_b - mean|^2``: Hessian k (1 - translations)."""

    stiffness = 500.0

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, positions: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
        centred = positions - positions.mean(dim=1, keepdim=True)
        return 0.5 * self.stiffness * self.factor * (centred**2).sum(dim=(1, 2))


@pytest.mark.parametrize("probes", ["full", "rademacher"])
def test_errors_of_priors_are_what_they_lack(spec, probes):
    reference = build_reference(spec, probes=probes)
    found = compute_reference_errors(reference, spec, None)
    centred = reference.positions - reference.positions.mean(axis=1, keepdims=True)
    assert found.force_rmse == pytest.approx(Spring.stiffness * np.sqrt(np.mean(centred**2)), rel=1e-9)
    # Frobenius norm of k (1 - translations), which has 3B - 3 eigenvalues k, over sqrt(3B).
    expected = Spring.stiffness * np.sqrt(1 - 1 / N_BEADS)
    # 160 random probes fix the mean of |(1 - P) v|^2, whose own spread is a quarter, to 2 %.
    assert found.hvp_rmse == pytest.approx(expected, rel=1e-9 if probes == "full" else 0.05)
    assert (found.force_noise, found.hvp_noise, found.n_frames) == (0.0, 0.0, 40)
    assert found.force_size == pytest.approx(np.sqrt(np.mean(reference.forces**2)))
    if probes == "full":
        hessians = reference.hvps.reshape(40, -1)
        assert found.hvp_size == pytest.approx(np.sqrt(np.mean((hessians**2).sum(axis=1)) / (3 * N_BEADS)))
        assert found.hvp_rmse_error == pytest.approx(0.0, abs=1e-9 * expected)  # the same in all configurations


def test_network_that_makes_up_for_it_has_no_error(spec):
    reference = build_reference(spec)
    found = compute_reference_errors(reference, spec, Spring())
    priors = compute_reference_errors(reference, spec, None)
    # Networks compute in float32.
    assert found.force_rmse < 1e-5 * priors.force_rmse
    assert found.hvp_rmse < 1e-5 * priors.hvp_rmse
    half = compute_reference_errors(reference, spec, Spring(0.5))
    assert half.force_rmse == pytest.approx(0.5 * priors.force_rmse, rel=1e-5)
    assert half.hvp_rmse == pytest.approx(0.5 * priors.hvp_rmse, rel=1e-5)


def test_network_of_the_package_is_evaluated_as_in_a_simulation(spec):
    """Priors and network of one module, whose forces are what OpenMM gets."""
    torch.manual_seed(0)
    network = build_network(len(spec.species), MODEL, KT)
    for parameter in network.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)  # a new network's output is zero
    reference = build_reference(spec, n_frames=5)
    total = TotalEnergy(network, spec)
    forces, hvps = compute_forces_and_hvps(
        total.frame_energies, torch.from_numpy(reference.positions), torch.from_numpy(reference.probes)
    )
    found = compute_reference_errors(reference, spec, network)
    alone = compute_reference_errors(reference, spec, None)
    assert abs(found.force_rmse - alone.force_rmse) > 1e-3 * alone.force_rmse
    expected = np.sqrt(np.mean((forces.numpy() - reference.forces) ** 2))
    # float32 energies of the network in both, summed in another order.
    assert found.force_rmse == pytest.approx(expected, rel=1e-4)
    scale = np.sqrt(3 * N_BEADS)
    assert found.hvp_rmse == pytest.approx(scale * np.sqrt(np.mean((hvps.numpy() - reference.hvps) ** 2)), rel=1e-4)


def test_noise_of_the_reference_does_not_count(spec):
    """Noise as large as the error itself: the rmse stays, within the standard error that it states.

    Two figures at 4 standard errors: false-alarm rate 1.3e-4.
    """
    clean = compute_reference_errors(build_reference(spec, 400), spec, None)
    noisy_reference = build_reference(spec, 400, force_noise=40.0, hvp_noise=120.0)
    noisy = compute_reference_errors(noisy_reference, spec, None)
    assert noisy.force_noise == pytest.approx(40.0)
    assert noisy.hvp_noise == pytest.approx(120.0 * np.sqrt(3 * N_BEADS))  # for |v|^2 = 3B
    assert noisy.force_noise > 0.5 * clean.force_rmse
    assert noisy.hvp_noise > 0.5 * clean.hvp_rmse
    for rmse, error, truth in (
        (noisy.force_rmse, noisy.force_rmse_error, clean.force_rmse),
        (noisy.hvp_rmse, noisy.hvp_rmse_error, clean.hvp_rmse),
    ):
        assert abs(rmse - truth) < 4 * error
        assert error < 0.1 * truth
    assert noisy.force_size == pytest.approx(clean.force_size, rel=0.02)  # 1600 of 6000 noise against 300 squared
    perfect = compute_reference_errors(noisy_reference, spec, Spring())
    assert perfect.force_rmse < 0.25 * 40.0  # what is left of 6000 squares of noise: their spread, 1.8 %


def test_standard_errors_are_the_spread_of_repetitions(spec):
    """The bootstrap against 60 independent references: two figures known to 9 % each way, held to a factor 1.6."""
    figures = []
    whole = build_reference(spec, 60 * 20, force_noise=60.0, probes="rademacher")
    for k in range(60):
        rows = slice(20 * k, 20 * k + 20)
        names = ("positions", "forces", "force_errors", "probes", "hvps", "hvp_errors", "frame")
        part = replace(whole, **{name: getattr(whole, name)[rows] for name in names})
        found = compute_reference_errors(part, spec, None)
        figures.append((found.force_rmse, found.force_rmse_error, found.hvp_rmse, found.hvp_rmse_error))
    force, force_error, hvp, hvp_error = np.array(figures).T
    for values, errors in ((force, force_error), (hvp, hvp_error)):
        assert 1 / 1.6 < np.sqrt(np.mean(errors**2)) / values.std(ddof=1) < 1.6


def test_one_configuration_has_no_standard_error(spec):
    found = compute_reference_errors(build_reference(spec, 1), spec, None)
    assert np.isnan(found.force_rmse_error)
    assert np.isnan(found.hvp_rmse_error)


def test_wrong_potentials_are_refused(spec):
    reference = build_reference(spec, 3)
    with pytest.raises(DataError, match=r"different temperatures: expected 310 K \(potential\), got 300 K"):
        compute_reference_errors(reference, replace(spec, temperature_K=310.0), None)
    with pytest.raises(PotentialError, match="does not know species Z"):
        compute_reference_errors(replace(reference, bead_map=build_map("ABABZ")), spec, None)
    with pytest.raises(PotentialError, match="not finite"):
        compute_reference_errors(reference, spec, Spring(float("nan")))
    with pytest.raises(DataError, match="all probes of the reference are zero"):
        compute_reference_errors(replace(reference, probes=0 * reference.probes), spec, None)
