"""Force and Hessian matching as pure functions (theory note, "Labels, correction, loss").

Shapes: forces and residuals (F, B, 3); probes, HVPs and covariances times probes (F, P, B, 3); whitening (F, 3B, 3B).
Any matching set of units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_hvpcg.training.projection import LinkProjector


def compute_correction(
    residual: Tensor,
    probes: Tensor,
    beta: float,
    covariances: Tensor | None = None,
    own_share: float | Tensor = 1.0,
) -> Tensor:
    """Covariance correction ``c(v) = beta C v``, (F, P, B, 3).

    ``C`` is ``d d^T`` of the frame's own residual (centred, theory note), or where ``own_share`` is below 1, that share
    of it and the rest of ``covariances``, an estimate of ``C v`` from elsewhere. ``own_share`` is one number, or one a
    frame (F,) in double.

    ``d`` is the projected force minus the model's force, detached here: with its gradient the loss would reward a force
    error.
    """
    d = residual.detach()
    along = torch.einsum("fbx,fpbx->fp", d, probes)
    own = beta * along[:, :, None, None] * d[:, None]
    if covariances is None:
        return own
    share = torch.as_tensor(own_share, dtype=torch.float64, device=own.device).reshape(-1, 1, 1, 1)
    return share.to(own.dtype) * own + ((1.0 - share) * beta).to(own.dtype) * covariances


def compute_hvp_target(
    hvps: Tensor,
    residual: Tensor,
    probes: Tensor,
    beta: float,
    covariances: Tensor | None = None,
    own_share: float | Tensor = 1.0,
) -> Tensor:
    """HVP target ``t(v) = p(v) - c(v)``: its mean is the CG Hessian times v up to second order in the force error."""
    return hvps - compute_correction(residual, probes, beta, covariances, own_share)


@dataclass(frozen=True)
class LossScales:
    """Mean squares of the labels' residuals for the priors alone: dividing by them, the priors score 1 on each term.

    ``force`` (kJ/mol/nm)^2 and ``hvp`` (kJ/mol/nm^2)^2, per component.
    """

    force: float
    hvp: float

    def balance(self, beta: float, noise: float | None = None) -> float:
        """Weight of the HVP term at which both normalised terms count by the information they hold.

        With force noise of variance ``s`` a component, ``beta d d^T`` has noise of variance ``(beta s)^2`` an element,
        twice that on the diagonal, and each element of the symmetric Hessian is seen twice: a Gaussian likelihood of
        both is ``|F - q|^2 / s + |A v|^2 / (2 (beta s)^2)``. Averaging over n inner samples divides both by n.

        Parameters
        ----------
        beta : 1/kT
        noise : ``s``, of forces that are not averaged; None: what the priors leave of the forces
        """
        return self.hvp / (2.0 * beta**2 * self.force * (self.force if noise is None else noise))


def whiten(residual: Tensor, whitening: Tensor | None) -> Tensor:
    """Residuals (F, ..., B, 3) times the whitening matrix of each frame."""
    if whitening is None:
        return residual
    rows = residual.reshape(len(residual), -1, whitening.shape[-1])
    return (rows @ whitening).reshape(residual.shape)


def restrict(hvps: Tensor, projector: LinkProjector | None) -> Tensor:
    """What of HVPs or their residuals (F, P, B, 3) is matched: all, or what is along the projector's links."""
    return hvps if projector is None else projector.keep(hvps)


def force_loss(forces: Tensor, projected_forces: Tensor, scales: LossScales, whitening: Tensor | None = None) -> Tensor:
    """Mean square of the force residual over that of the priors."""
    return (whiten(forces - projected_forces, whitening) ** 2).mean() / scales.force


def compute_density_excess(
    forces: Tensor, hvps: Tensor, density_forces: Tensor, density_probes: Tensor, beta: float
) -> Tensor:
    """``G . q + kT div G`` (F,) for what of the network's forces is not along bonds: zero on average.

    See :mod:`openmm_hvpcg.training.density`, also for what ``density_forces`` (F, B, 3) and ``density_probes``
    (F, P, B, 3) are.
    """
    along = (forces * density_forces).sum(dim=(-1, -2))
    return along - (density_probes * hvps).sum(dim=(-1, -2)).mean(dim=1) / beta


def density_loss(
    forces: Tensor, hvps: Tensor, density_forces: Tensor, density_probes: Tensor, beta: float, scales: LossScales
) -> Tensor:
    """What :func:`force_loss` changes by where the mean force is learnt from the density of the frames."""
    excess = compute_density_excess(forces, hvps, density_forces, density_probes, beta)
    return 2.0 * excess.mean() / forces[0].numel() / scales.force


def hvp_loss(
    model_hvps: Tensor,
    hvps: Tensor,
    residual: Tensor,
    probes: Tensor,
    beta: float,
    scales: LossScales,
    covariances: Tensor | None = None,
    own_share: float | Tensor = 1.0,
    whitening: Tensor | None = None,
    projector: LinkProjector | None = None,
) -> Tensor:
    """Mean square of ``(grad grad U) v - t(v)`` over that of the priors: unbiased for the Frobenius-norm objective.

    With ``whitening`` it is a weighted norm: directions count by their noise. With a ``projector`` what is along its
    links counts alone.
    """
    target = compute_hvp_target(hvps, residual, probes, beta, covariances, own_share)
    return (whiten(restrict(model_hvps - target, projector), whitening) ** 2).mean() / scales.hvp
