"""Force and Hessian matching as pure functions (theory note, "Labels, correction, loss").

Shapes: forces and residuals (F, B, 3); probes and HVPs (F, P, B, 3). Any matching pair of units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def compute_correction(residual: Tensor, probes: Tensor, beta: float) -> Tensor:
    """Centred covariance correction ``c(v) = beta d (d . v)``, (F, P, B, 3).

    ``d`` is the projected force minus the model's force, detached here: with its gradient the loss would reward a force
    error.
    """
    d = residual.detach()
    along = torch.einsum("fbx,fpbx->fp", d, probes)
    return beta * along[:, :, None, None] * d[:, None]


def compute_hvp_target(hvps: Tensor, residual: Tensor, probes: Tensor, beta: float) -> Tensor:
    """HVP target ``t(v) = p(v) - c(v)``: its mean is the CG Hessian times v up to second order in the force error."""
    return hvps - compute_correction(residual, probes, beta)


@dataclass(frozen=True)
class LossScales:
    """Mean squares of the labels' residuals for the priors alone: dividing by them, the priors score 1 on each term.

    ``force`` (kJ/mol/nm)^2 and ``hvp`` (kJ/mol/nm^2)^2, per component.
    """

    force: float
    hvp: float


def force_loss(forces: Tensor, projected_forces: Tensor, scales: LossScales) -> Tensor:
    """Mean square of the force residual over that of the priors."""
    return ((forces - projected_forces) ** 2).mean() / scales.force


def hvp_loss(
    model_hvps: Tensor, hvps: Tensor, residual: Tensor, probes: Tensor, beta: float, scales: LossScales
) -> Tensor:
    """Mean square of ``(grad grad U) v - t(v)`` over that of the priors: unbiased for the Frobenius-norm objective."""
    return ((model_hvps - compute_hvp_target(hvps, residual, probes, beta)) ** 2).mean() / scales.hvp
