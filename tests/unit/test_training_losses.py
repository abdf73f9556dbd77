from __future__ import annotations

import numpy as np
import torch
from test_training_models import SPECIES, build_random_network, sample_frames

from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.losses import LossScales, compute_correction, compute_hvp_target, force_loss, hvp_loss

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
