"""The covariance of projected forces at fixed beads, pooled over frames that look alike.

The HVP target needs ``Cov_R(Q f, Q f)``. One frame gives ``d d^T`` (its force residual times itself): unbiased, and so
noisy that it drowns the rest of the label. Hidden atoms hang on the beads, though, and the covariance they cause is
much the same in every frame when it is seen from axes that move with the beads. Pooled over frames in such local axes,
by regions of the soft coordinates, it is nearly free of noise, at the price of a bias: what varies within a region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor

from openmm_hvpcg.training.models.priors import dihedral_angle

#: Frames the axes and regions are chosen on.
SAMPLE_FRAMES = 2000
#: Sine of the angle at a bead, in 98 of 100 frames: good enough to look no further, and the least that gives axes.
GOOD_SINE = 0.35
MIN_SINE = 0.05
#: A length that is nothing beside a rounding error of positions: kept out of denominators.
TINY_NM = 1e-12
#: Length that a full turn of a dihedral counts for, nm, beside distances.
DIHEDRAL_SCALE_NM = 0.1
#: Frames of the overall mean mixed into each region: keeps a region of few frames from being noise.
SHRINKAGE_FRAMES = 50.0
#: The regression that takes the model's error out has no more coefficients than one for so many frames.
FRAMES_PER_COEFFICIENT = 10
#: Regions overlap by this many times their mean square radius.
OVERLAP = 2.0
#: Frames whitened at once.
CHUNK_FRAMES = 256
#: Share of the mean variance added before inverting: what the model cannot fit anyway.
WHITENING_FLOOR = 0.1


@dataclass(frozen=True)
class LocalAxes:
    """Right-handed orthonormal axes at each bead, from the directions to two others: ``first``, ``second`` (B,)."""

    first: Tensor
    second: Tensor

    def __call__(self, positions: Tensor) -> Tensor:
        """Axes (F, B, 3, 3), rows, of frames (F, B, 3)."""
        a = positions[:, self.first] - positions
        e1 = a / torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        b = positions[:, self.second] - positions
        b = b - (b * e1).sum(-1, keepdim=True) * e1
        # On a line by chance: no second axis, rather than NaN.
        e2 = b / torch.linalg.vector_norm(b, dim=-1, keepdim=True).clamp(min=TINY_NM)
        return torch.stack([e1, e2, torch.linalg.cross(e1, e2)], dim=-2)


def choose_axes(positions: Tensor) -> LocalAxes | None:
    """For each bead two others (F, B, 3) that stay clear of a line with it, near ones first.

    The first pair whose sine stays above ``GOOD_SINE`` is taken, else the one that stays furthest from a line; None
    where that is below ``MIN_SINE``.
    """
    n_beads = positions.shape[1]
    distances = torch.cdist(positions, positions).mean(dim=0)
    chosen = []
    for bead in range(n_beads):
        near = [b for b in torch.argsort(distances[bead]).tolist() if b != bead]
        best, best_sine = None, MIN_SINE
        for pair in ((near[i], near[j]) for j in range(1, len(near)) for i in range(j)):
            sine = _measure_sine(positions, bead, *pair)
            if sine > best_sine:
                best, best_sine = pair, sine
            if best_sine > GOOD_SINE:
                break
        if best is None:
            return None
        chosen.append(best)
    first, second = torch.tensor(chosen).T
    return LocalAxes(first, second)


def _measure_sine(positions: Tensor, bead: int, first: int, second: int) -> float:
    """Sine of the angle at the bead that 98 of 100 frames exceed."""
    a, b = positions[:, first] - positions[:, bead], positions[:, second] - positions[:, bead]
    area = torch.linalg.vector_norm(torch.linalg.cross(a, b), dim=-1)
    sine = area / (torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1))
    return float(sine.quantile(0.02))


def compute_soft_features(positions: Tensor) -> Tensor:
    """Distances, and sines and cosines of the dihedrals of successive beads, as lengths (F, n): soft ones vary most."""
    n_beads = positions.shape[1]
    first, second = torch.triu_indices(n_beads, n_beads, 1)
    features = [torch.linalg.vector_norm(positions[:, first] - positions[:, second], dim=-1)]
    if n_beads >= 4:
        phi = dihedral_angle(positions, torch.arange(n_beads - 3)[:, None] + torch.arange(4))
        features += [DIHEDRAL_SCALE_NM * torch.sin(phi), DIHEDRAL_SCALE_NM * torch.cos(phi)]
    return torch.cat(features, dim=1)


def count_soft_features(n_beads: int) -> int:
    """How many numbers :func:`compute_soft_features` gives of a frame."""
    return n_beads * (n_beads - 1) // 2 + (2 * (n_beads - 3) if n_beads >= 4 else 0)


class PooledCovariance:
    """Covariance of forces at fixed beads, as a weighted mean over regions of its value in local axes.

    Parameters
    ----------
    positions : (T, B, 3) nm, the training frames
    n_regions : regions of the soft coordinates; fewer where frames are few
    seed : of the clustering

    Raises
    ------
    ValueError
        No local axes exist (two beads, or beads on a line).
    """

    def __init__(self, positions: Tensor, n_regions: int, seed: int) -> None:
        x = positions.double()
        few = x[torch.from_numpy(np.unique(np.linspace(0, len(x) - 1, min(len(x), SAMPLE_FRAMES)).astype(int)))]
        axes = choose_axes(few)
        if axes is None:
            raise ValueError("no local axes")
        self.axes = axes
        features = compute_soft_features(few)
        n_regions = max(1, min(n_regions, len(few) // 20))
        self.centres = torch.from_numpy(_cluster(features.numpy(), n_regions, seed))
        self.radius2 = OVERLAP * float((torch.cdist(features, self.centres).min(dim=1)[0] ** 2).mean())
        self.regions = torch.zeros(len(self.centres), 3 * x.shape[1], 3 * x.shape[1], dtype=torch.float64)

    def fit(self, positions: Tensor, residuals: Tensor) -> Tensor:
        """Set the regions' covariances from frames (T, B, 3) and their force residuals ``q - F`` (T, B, 3).

        What of the residuals follows the beads is the model's error, not noise: a linear regression on the features
        (and on the regions) takes it out first, and its leverages make up for what it takes of the noise. Returns
        what is left of the residuals, (T, 3B) in local axes.
        """
        x = positions.double()
        y = self.turn(x, residuals[:, None]).squeeze(1)
        features = compute_soft_features(x)
        weights = self._weigh(features)
        basis = _build_basis(features, weights)
        y = y - basis @ (basis.T @ y)
        y = y / torch.sqrt(1.0 - (basis**2).sum(dim=1, keepdim=True)).clamp(min=0.1)
        self.regions = _average(y[:, None], y[:, None], weights)
        return y

    def turn(self, positions: Tensor, vectors: Tensor) -> Tensor:
        """Vectors (T, P, B, 3) in the axes of frames (T, B, 3): (T, P, 3B), in double."""
        return _turn(self.axes(positions.double()), vectors)

    def turn_back(self, positions: Tensor, local: Tensor) -> Tensor:
        """Inverse of :meth:`turn`."""
        return _turn_back(self.axes(positions.double()), local)

    def average(self, positions: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Means (K, 3B, 3B) over regions of the symmetric part of ``first second^T``, both (T, P, 3B), local axes."""
        return _average(first, second, self._weigh(compute_soft_features(positions.double())))

    def multiply(self, positions: Tensor, matrices: Tensor, local: Tensor) -> Tensor:
        """Matrices (K, 3B, 3B) of the regions, as each frame has a share of each, times (T, P, 3B), local axes."""
        product = torch.zeros_like(local)
        for matrix, weight in zip(matrices, self._weigh(compute_soft_features(positions.double())).T, strict=True):
            product += weight[:, None, None] * (local @ matrix.T)
        return product

    def apply(self, positions: Tensor, probes: Tensor) -> Tensor:
        """Covariance times probes, (T, P, B, 3) like the probes, at frames (T, B, 3)."""
        axes = self.axes(positions.double())
        product = self.multiply(positions, self.regions, _turn(axes, probes))
        return _turn_back(axes, product).to(probes.dtype)

    def whiten(self, positions: Tensor, out: Tensor | None = None, release: Callable[[], None] | None = None) -> Tensor:
        """``(C / c + floor)^(-1/2)`` (T, 3B, 3B) in the frames' own axes, c the mean variance, mean diagonal of its
        square 1: residuals times it have noise of about equal size and without correlation.

        It is written to ``out``, where that is given, chunk by chunk, with ``release`` called after each.
        """
        n_frames, size = len(positions), self.regions.shape[1]
        out = positions.new_empty(n_frames, size, size) if out is None else out
        chunks = [slice(start, start + CHUNK_FRAMES) for start in range(0, n_frames, CHUNK_FRAMES)]
        diagonals = self.regions.diagonal(dim1=1, dim2=2)
        variance, square = 0.0, 0.0
        for rows in chunks:
            weights = self._weigh(compute_soft_features(positions[rows].double()))
            variance += float((weights @ diagonals).sum()) / (n_frames * size)
        for rows in chunks:
            out[rows] = self._compute_roots(positions[rows].double(), variance).to(out.dtype)
            square += float((out[rows].double() ** 2).sum()) / (n_frames * size)
            if release is not None:
                release()
        for rows in chunks:
            out[rows] /= square**0.5
            if release is not None:
                release()
        return out

    def _compute_roots(self, x: Tensor, variance: float) -> Tensor:
        """``(C / variance + floor)^(-1/2)`` (F, 3B, 3B) in the axes of frames (F, B, 3)."""
        axes, weights = self.axes(x), self._weigh(compute_soft_features(x))
        n_beads = x.shape[1]
        local = torch.einsum("tk,kij->tij", weights, self.regions)
        values, vectors = torch.linalg.eigh(local / variance + WHITENING_FLOOR * torch.eye(3 * n_beads, dtype=x.dtype))
        root = (vectors * values[:, None].rsqrt()) @ vectors.transpose(1, 2)
        blocks = root.reshape(-1, n_beads, 3, n_beads, 3)
        turned = torch.einsum("tbix,tbicj,tcjy->tbxcy", axes, blocks, axes)
        return turned.reshape(-1, 3 * n_beads, 3 * n_beads)

    def _weigh(self, features: Tensor) -> Tensor:
        """Share (F, K) of each region in frames with these soft features (F, n)."""
        if len(self.centres) == 1:
            return torch.ones(len(features), 1, dtype=torch.float64)
        return torch.softmax(-(torch.cdist(features, self.centres) ** 2) / self.radius2, dim=1)


def _turn(axes: Tensor, vectors: Tensor) -> Tensor:
    return torch.einsum("tbix,tpbx->tpbi", axes, vectors.double()).flatten(2)


def _turn_back(axes: Tensor, local: Tensor) -> Tensor:
    return torch.einsum("tbix,tpbi->tpbx", axes, local.reshape(*local.shape[:2], -1, 3))


def _average(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Weighted means (K, n, n) of the symmetric part of ``first second^T`` (T, P, n), that of all mixed in a little."""
    overall = torch.einsum("tpi,tpj->ij", first, second) / first.shape[1]
    sums = torch.einsum("tk,tpi,tpj->kij", weights, first, second) / first.shape[1]
    means = (sums + SHRINKAGE_FRAMES * overall / len(first)) / (weights.sum(dim=0) + SHRINKAGE_FRAMES)[:, None, None]
    return 0.5 * (means + means.transpose(1, 2))


def _build_basis(features: Tensor, weights: Tensor) -> Tensor:
    """Orthonormal columns (F, n) of the regression: regions, and the widest features that the frames can carry."""
    features = (features - features.mean(dim=0)) / features.std(dim=0).clamp(min=1e-9)
    most = max(0, len(features) // FRAMES_PER_COEFFICIENT - weights.shape[1])
    leading = torch.linalg.svd(features, full_matrices=False)[0][:, :most]
    both = torch.cat([weights, leading], dim=1)
    vectors, sizes, _ = torch.linalg.svd(both, full_matrices=False)
    return vectors[:, sizes > 1e-6 * sizes[0]]


def _cluster(features: NDArray[np.float64], n_regions: int, seed: int) -> NDArray[np.float64]:
    if n_regions == 1:
        return features.mean(axis=0, keepdims=True)
    centres, _ = kmeans2(features, n_regions, minit="++", seed=seed)
    return np.asarray(centres, dtype=np.float64)
