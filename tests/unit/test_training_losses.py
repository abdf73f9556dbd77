from __future__ import annotations

import numpy as np
import pytest
import torch
from test_training_models import SPECIES, build_random_network, sample_frames

from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.losses import (
    LossScales,
    compute_correction,
    compute_hvp_target,
    force_loss,
    hvp_loss,
    whiten,
)
from openmm_hvpcg.training.projection import build_projector, list_links

SCALES = LossScales(4.0, 9.0)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_correction_is_the_outer_product_applied_to_the_probe():
    d, v = draw(0, 5, 4, 3), draw(1, 5, 2, 4, 3)
    outer = torch.einsum("fbx,fcy->fbxcy", d, d)
    expected = 0.3 * torch.einsum("fbxcy,fpcy->fpbx", outer, v)
    torch.testing.assert_close(compute_correction(d, v, 0.3), expected)
    p = draw(2, 5, 2, 4, 3)
    torch.testing.assert_close(compute_hvp_target(p, d, v, 0.3), p - expected)


def test_correction_passes_no_gradient():
    d = draw(0, 2, 3, 3).requires_grad_(True)
    assert not compute_correction(d, draw(1, 2, 1, 3, 3), 1.0).requires_grad


def test_losses_are_mean_squares_over_their_scale():
    f, q = draw(0, 5, 4, 3), draw(1, 5, 4, 3)
    v, p, h = draw(2, 5, 2, 4, 3), draw(3, 5, 2, 4, 3), draw(4, 5, 2, 4, 3)
    torch.testing.assert_close(force_loss(f, q, SCALES), ((f - q) ** 2).mean() / 4)
    target = p - compute_correction(q - f, v, 0.4)
    torch.testing.assert_close(hvp_loss(h, p, q - f, v, 0.4, SCALES), ((h - target) ** 2).mean() / 9)


def test_gradient_of_the_whole_loss_against_finite_differences():
    """Parameters' gradient in float64, with the correction held at its value as the stop-gradient says."""
    network, x = build_random_network(), sample_frames()
    q, v, p = draw(5, *x.shape) * 50, draw(6, len(x), 2, *x.shape[1:]), draw(7, len(x), 2, *x.shape[1:]) * 1000

    def energy(y: torch.Tensor) -> torch.Tensor:
        return network(y, SPECIES)

    held = (q - compute_forces_and_hvps(energy, x, v)[0]).detach()

    def loss() -> torch.Tensor:
        forces, hvps = compute_forces_and_hvps(energy, x, v, create_graph=True)
        return force_loss(forces, q, SCALES) + hvp_loss(hvps, p, held, v, 0.4, SCALES)

    forces, hvps = compute_forces_and_hvps(energy, x, v, create_graph=True)
    total = force_loss(forces, q, SCALES) + hvp_loss(hvps, p, q - forces, v, 0.4, SCALES)
    network.zero_grad()
    total.backward()
    for name, parameter in network.named_parameters():
        if name == "readout.2.bias":  # a constant energy: no force, no gradient
            assert parameter.grad is None
            continue
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        k = int(gradient.abs().argmax())
        old, h = float(flat[k]), 1e-5
        flat[k] = old + h
        above = float(loss().detach())
        flat[k] = old - h
        below = float(loss().detach())
        flat[k] = old
        # Central differences of step 1e-5 in double: about 1e-8 relative plus rounding of the loss (1e-16/1e-5).
        np.testing.assert_allclose((above - below) / (2 * h), float(gradient[k]), rtol=1e-5, atol=1e-6)


def test_probe_average_is_the_frobenius_norm():
    """All 2^6 Rademacher probes of two beads: the HVP loss equals |H - T|_F^2 / n exactly."""
    signs = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * 6)).reshape(6, -1).T.copy()).reshape(1, 64, 2, 3)
    difference = draw(8, 6, 6)
    difference = difference + difference.T
    model = torch.einsum("ij,fpj->fpi", difference, signs.reshape(1, 64, 6)).reshape(1, 64, 2, 3)
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    value = hvp_loss(model, torch.zeros_like(model), zero, signs, 1.0, LossScales(1.0, 1.0))
    torch.testing.assert_close(value, (difference**2).sum() / 6)


def test_frame_target_is_that_of_the_paper():
    """``t(v) = p(v) - beta d (d . v)``, to the last bit where nothing is pooled."""
    d, v, p = draw(0, 5, 4, 3), draw(1, 5, 2, 4, 3), draw(2, 5, 2, 4, 3)
    expected = p - 0.3 * torch.einsum("fbx,fpbx->fp", d, v)[:, :, None, None] * d[:, None]
    assert torch.equal(compute_hvp_target(p, d, v, 0.3), expected)
    assert torch.equal(compute_hvp_target(p, d, v, 0.3, torch.zeros_like(v), 1.0), expected)


def test_pooled_target_mixes_own_and_pooled_covariance():
    d, v, p, pooled = draw(0, 5, 4, 3), draw(1, 5, 2, 4, 3), draw(2, 5, 2, 4, 3), draw(3, 5, 2, 4, 3)
    own = compute_correction(d, v, 0.3)
    expected = p - 0.25 * own - 0.75 * 0.3 * pooled
    torch.testing.assert_close(compute_hvp_target(p, d, v, 0.3, pooled, 0.25), expected)


def test_target_of_inner_samples_knows_no_model():
    v, p, samples = draw(1, 5, 2, 4, 3), draw(2, 5, 2, 4, 3), draw(3, 5, 2, 4, 3)
    targets = [compute_hvp_target(p, draw(seed, 5, 4, 3), v, 0.3, samples, 0.0) for seed in (7, 8)]
    assert torch.equal(targets[0], targets[1])
    torch.testing.assert_close(targets[0], p - 0.3 * samples)


def test_whitening_multiplies_each_frame_by_its_matrix():
    white, d, h = draw(0, 5, 12, 12), draw(1, 5, 4, 3), draw(2, 5, 2, 4, 3)
    white = white + white.transpose(1, 2)
    torch.testing.assert_close(
        whiten(d, white), torch.stack([w @ x.flatten() for w, x in zip(white, d, strict=True)]).reshape(d.shape)
    )
    for k in range(2):
        torch.testing.assert_close(whiten(h, white)[:, k], whiten(h[:, k], white))
    assert whiten(d, None) is d
    f, v, p = draw(3, 5, 4, 3), draw(4, 5, 2, 4, 3), draw(5, 5, 2, 4, 3)
    torch.testing.assert_close(force_loss(f, d, SCALES, white), (whiten(f - d, white) ** 2).mean() / 4)
    target = compute_hvp_target(p, d - f, v, 0.4)
    torch.testing.assert_close(
        hvp_loss(h, p, d - f, v, 0.4, SCALES, whitening=white), (whiten(h - target, white) ** 2).mean() / 9
    )


def test_links_are_bonds_and_the_ends_of_two_in_a_row():
    """Backbone beads of a residue: a chain of five, one of them with a branch."""
    bonds = np.array([[0, 1], [1, 2], [2, 3], [2, 4], [3, 5]])
    np.testing.assert_array_equal(list_links(bonds, "bonds"), bonds)
    angles = list_links(bonds, "angles")[len(bonds) :]
    assert sorted(map(tuple, angles.tolist())) == [(0, 2), (1, 3), (1, 4), (2, 5), (3, 4)]
    # A ring of three: every pair is a bond already.
    assert len(list_links(np.array([[0, 1], [1, 2], [0, 2]]), "angles")) == 3


def test_hvps_are_matched_along_links_alone():
    """Only a model's error in how bonds stretch counts, wherever the probe points."""
    x = draw(0, 5, 4, 3)
    links = torch.from_numpy(list_links(np.array([[0, 1], [1, 2], [2, 3]]), "bonds"))
    projector = build_projector(x, links)
    v, p, q, f = draw(1, 5, 2, 4, 3), draw(2, 5, 2, 4, 3), draw(3, 5, 4, 3), draw(4, 5, 4, 3)
    target = compute_hvp_target(p, q - f, v, 0.4)
    error = draw(5, 5, 2, 4, 3)
    across = error - projector.keep(error)
    ends = x[:, links[:, 1]] - x[:, links[:, 0]]
    stretch = ((across[:, :, links[:, 1]] - across[:, :, links[:, 0]]) * ends[:, None]).sum(-1)
    assert float(stretch.abs().max()) < 1e-3, "what is left out stretches no bond"

    def loss(h: torch.Tensor) -> float:
        return float(hvp_loss(h, p, q - f, v, 0.4, SCALES, projector=projector))

    # The ridge of 1e-4 beside a diagonal of 2, squared.
    assert loss(target + across) < 1e-6 * loss(target + error)
    assert loss(target + error) == pytest.approx(float((projector.keep(error) ** 2).mean() / 9), rel=1e-4)
    assert build_projector(x, None) is None


def test_flat_centres_do_not_blow_up():
    """Bonds and angles around a bead in one plane with its neighbours: six links, five of which move anything."""
    x = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-0.5, 0.8, 0], [-0.5, -0.9, 0]])[None] * 0.15
    links = torch.from_numpy(list_links(np.array([[0, 1], [0, 2], [0, 3]]), "angles"))
    unit = torch.eye(12).reshape(1, 12, 4, 3)
    kept = build_projector(x, links).keep(unit).flatten(2)[0]
    values = torch.linalg.eigvalsh(0.5 * (kept + kept.T))
    assert float(values.max()) < 1 + 1e-3
    # To the ridge over the smallest square that is not nothing.
    assert float(values.sum()) == pytest.approx(5.0, abs=0.01)


def test_balanced_weight_is_its_formula():
    assert LossScales(4.0, 9.0).balance(0.4) == pytest.approx(9.0 / (2 * 0.4**2 * 4.0**2), rel=1e-12)
    assert LossScales(4.0, 9.0).balance(0.4, noise=6.0) == pytest.approx(9.0 / (2 * 0.4**2 * 4.0 * 6.0), rel=1e-12)


def test_balanced_loss_does_not_depend_on_the_scales():
    """Another scale of the HVP term changes nothing, and neither do other units of energy or length."""
    f, q = draw(0, 5, 4, 3), draw(1, 5, 4, 3)
    v, p, h = draw(2, 5, 2, 4, 3), draw(3, 5, 2, 4, 3), draw(4, 5, 2, 4, 3)

    def combine(scales: LossScales, energy: float = 1.0, length: float = 1.0) -> torch.Tensor:
        beta, force, hvp = 0.4 / energy, energy / length, energy / length**2
        scales = LossScales(scales.force * force**2, scales.hvp * hvp**2)
        second = hvp_loss(h * hvp, p * hvp, (q - f) * force, v, beta, scales)
        return force_loss(f * force, q * force, scales) + scales.balance(beta) * second

    loss = combine(SCALES)
    torch.testing.assert_close(combine(LossScales(4.0, 900.0)), loss)
    torch.testing.assert_close(combine(SCALES, energy=4.184), loss)
    torch.testing.assert_close(combine(SCALES, energy=1.0, length=10.0), loss)


def test_noise_of_the_frame_correction_is_what_the_balance_says():
    """Elements of ``beta d d^T`` for normal d of variance s: variance (beta s)^2, and twice that on the diagonal.

    400,000 draws of 4 components. The relative error of a variance is sqrt((kurtosis - 1) / n): products of two normal
    numbers have kurtosis 9, squares of one 15: 0.45 and 0.6 %. 10 elements at 5 standard errors: false-alarm rate 1e-5.
    """
    beta, s = 0.4, 7.0
    d = np.sqrt(s) * np.random.default_rng(0).standard_normal((400_000, 4))
    variances = (beta * d[:, :, None] * d[:, None]).var(axis=0)
    expected = (beta * s) ** 2 * (1 + np.eye(4))
    error = expected * np.sqrt(np.where(np.eye(4), 14, 8) / len(d))
    assert (np.abs(variances - expected) < 5 * error).all()
    # Hence the likelihood: sum over pairs A_ij^2 / (beta s)^2 + diagonal A_ii^2 / 2 (beta s)^2 = |A|^2 / 2 (beta s)^2.
    a = np.random.default_rng(1).standard_normal((4, 4))
    a = a + a.T
    likelihood = (a[np.triu_indices(4)] ** 2 / expected[np.triu_indices(4)]).sum()
    assert likelihood == pytest.approx((a**2).sum() / (2 * (beta * s) ** 2), rel=1e-12)
    # Per component, beside |F - q|^2 / s, that is the balanced weight for scales (s, m): m / (2 beta^2 s^2).
    assert LossScales(s, 5.0).balance(beta) / 5.0 * s == pytest.approx(1 / (2 * beta**2 * s), rel=1e-12)
