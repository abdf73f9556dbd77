"""The covariance of forces follows the projected Hessian: a ratio estimator of what varies within a region.

Where hidden atoms are stiffer, ``<Q H Q>`` is larger, and so is the covariance of forces that it takes away from the
PMF's curvature: along soft directions of C-alpha beads the one is nine tenths of the other, and they vary together
(`benchmarks/information.py`). A pooled covariance knows the mean of a region alone, so that whatever the Hessian varies
by within it would be taken for curvature of the PMF. Here the covariance of a frame is

``C(R) v = C v + share * D (p(v) - P v)``,  ``D = C P^+``,

C and P the region's mean covariance and projected Hessian in local axes: with a share of one the covariance is in
proportion to the Hessian (ratio estimator; Cochran, Sampling Techniques, 1977), with none it is the pooled one.

The share is fitted. Frames whose hidden atoms happen to be stiffer have larger forces too, at the same beads, and that
is not what it is about: so the slope is taken along what of the Hessian the beads tell, its mean over many small
regions of other frames (an instrumental variable). A frame's own HVP then adds noise of zero mean, and no bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_hvpcg.training.covariance import PooledCovariance

#: Regions that tell what of the Hessian follows the beads; fewer where frames are few.
FINE_REGIONS = 48
#: Blocks of frames by turns in one half or the other, of which each is told by the other.
BLOCKS = 10
#: Stiffnesses below this share of the mean one are none: translations, nearly.
LEAST_STIFFNESS = 0.02


@dataclass
class HessianRatio:
    """How much the projected Hessians of a molecule's frames are off their regions' means.

    Attributes
    ----------
    means, inverses : (K, 3B, 3B) kJ/mol/nm^2, of the regions, local axes; and their pseudoinverses
    probes, deviations, told : (F, P, 3B) at the frames of the fit, local axes: probes, what their HVPs are off the
        region's mean, and what of that frames with beads alike tell
    share : of the deviations that the covariance follows, 0 to 1, the same for all molecules
    everywhere : (T, P, B, 3), deviations of all frames, not in local axes; None until they are computed
    """

    means: Tensor
    inverses: Tensor
    probes: Tensor
    deviations: Tensor
    told: Tensor
    share: float = 0.0
    everywhere: Tensor | None = None

    @classmethod
    def build(
        cls, pooled: PooledCovariance, positions: Tensor, probes: Tensor, hvps: Tensor, seed: int
    ) -> HessianRatio:
        """From frames (F, B, 3) in the order of time, probes with ``E[v v^T] = 1`` and HVPs (F, P, B, 3)."""
        v, p = pooled.turn(positions, probes), pooled.turn(positions, hvps)
        means = pooled.average(positions, p, v)
        fine = PooledCovariance(positions, FINE_REGIONS, seed)
        half = (torch.arange(len(positions)) * BLOCKS // len(positions)) % 2
        told = torch.zeros_like(p)
        for k in (0, 1):
            own, other = half == k, half != k
            x, w = positions[own], positions[other]
            if len(x) > 0 and len(w) > 0:
                near = fine.multiply(x, fine.average(w, p[other], v[other]), v[own])
                told[own] = near - pooled.multiply(x, pooled.average(w, p[other], v[other]), v[own])
        deviations = p - pooled.multiply(positions, means, v)
        return cls(means, _invert(means), v.float(), deviations.float(), told.float())

    def subtract_means(self, pooled: PooledCovariance, positions: Tensor, probes: Tensor, hvps: Tensor) -> Tensor:
        """What HVPs (T, P, B, 3) of any frames (T, B, 3) are off their regions' means, in double."""
        means = pooled.multiply(positions, self.means, pooled.turn(positions, probes))
        return hvps - pooled.turn_back(positions, means)

    def compute_matrices(self, pooled: PooledCovariance) -> Tensor:
        """``D`` (K, 3B, 3B) of the regions, kJ/mol."""
        return pooled.regions @ self.inverses

    def compute_excess(self, pooled: PooledCovariance, positions: Tensor, residuals: Tensor) -> Tensor:
        """``d (d . v) - C v`` (F, P, 3B) at the frames of the fit, from force residuals (F, 3B) as they were pooled."""
        v = self.probes.double()
        own = residuals[:, None] * (v @ residuals[:, :, None])
        return own - pooled.multiply(positions, pooled.regions, v)

    def regress(self, pooled: PooledCovariance, positions: Tensor, residuals: Tensor) -> tuple[float, float]:
        """Numerator and denominator of the share, from force residuals (F, 3B) in local axes as they were pooled."""
        matrices = self.compute_matrices(pooled)
        told, followed = (pooled.multiply(positions, matrices, a.double()) for a in (self.told, self.deviations))
        excess = self.compute_excess(pooled, positions, residuals)
        return float((told * excess).sum()), float((told * followed).sum())

    def compute_change(self, pooled: PooledCovariance, positions: Tensor, deviations: Tensor) -> Tensor:
        """What covariances times probes change by (T, P, B, 3), where HVPs are off their means by ``deviations``."""
        product = pooled.multiply(positions, self.compute_matrices(pooled), pooled.turn(positions, deviations))
        return pooled.turn_back(positions, self.share * product).to(deviations.dtype)


def _invert(matrices: Tensor) -> Tensor:
    """Pseudoinverses of symmetric matrices (K, n, n)."""
    stiffness, modes = torch.linalg.eigh(matrices)
    least = LEAST_STIFFNESS * stiffness.mean(dim=1, keepdim=True)
    inverse = torch.where(stiffness > least, 1.0 / stiffness.clamp(min=1e-9), torch.zeros_like(stiffness))
    return (modes * inverse[:, None]) @ modes.transpose(1, 2)


def find_share(terms: Sequence[tuple[float, float]]) -> float:
    """The share, 0 to 1, from numerators and denominators of all molecules; none where the beads tell nothing."""
    top, bottom = (sum(column) for column in zip(*terms, strict=True)) if terms else (0.0, 0.0)
    return min(1.0, max(0.0, top / bottom)) if bottom > 0 else 0.0
