"""How much of the labels no model can explain: noise estimated from pairs of frames that look alike.

Two frames with (nearly) the same beads but different hidden atoms have the same mean label, so half the mean square
difference of their labels, turned onto each other, is the noise (a nearest-neighbour, or Gamma-test, estimate: Jones,
Comput. Manag. Sci. 1, 109 (2004)). It is taken on a model's residuals, which vary far less from frame to frame than the
labels do. What the neighbours still differ in beads adds to it: it leans towards too large. Frames close in time are
never paired: their hidden atoms are alike too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from openmm_hvpcg.training.labels.probes import ProbeLaw

#: Frames of one walker closer than this many are not independent.
MIN_SEPARATION = 20
MAX_FRAMES = 4000


@dataclass(frozen=True)
class LabelNoise:
    """Root mean square noise per component: ``force`` kJ/mol/nm, ``hvp`` kJ/mol/nm^2; ``n_pairs`` it rests on.

    ``hvp`` is for probes of the dataset's own law; None where that law does not reveal it.
    """

    force: float
    hvp: float | None
    n_pairs: int


def estimate_noise(
    positions: NDArray[np.floating],
    walker: NDArray[np.int64],
    force_residuals: NDArray[np.floating],
    probes: NDArray[np.floating],
    hvp_residuals: NDArray[np.floating],
    law: ProbeLaw | None = None,
    times: NDArray[np.int64] | None = None,
) -> LabelNoise | None:
    """Noise of forces and HVP targets.

    Parameters
    ----------
    positions : (T, B, 3) nm
    walker : (T,)
    force_residuals : (T, B, 3), projected force minus a model's force
    probes : (T, P, B, 3)
    hvp_residuals : (T, P, B, 3), HVP target minus the model's HVP
    law : of the probes; None: one with E[v v^T] = 1. Neighbours must be compared along the same direction, but each has
        probes of its own, so that their likeness is averaged over all directions the law reaches. Rigid motions it
        leaves out count as noise in full. A law of a few soft modes leaves out more: its HVP noise is None.
    times : (T,), the frames' places among all there are, increasing; None: they are all. No more are used than
        :func:`choose_frames` chooses.

    Returns
    -------
    LabelNoise, or None where there are too few frames to pair.
    """
    times = np.arange(len(positions)) if times is None else times
    frames = choose_frames(len(positions))
    pairs = _pair_neighbours(positions[frames].astype(np.float64), frames, times[frames], walker[frames])
    if len(pairs) < 10:
        return None
    i, j = pairs[:, 0], pairs[:, 1]
    turns = np.stack([_align(positions[a], positions[b]) for a, b in pairs])
    d_i, d_j = force_residuals[i], force_residuals[j] @ turns
    force = 0.5 * np.mean((d_i - d_j) ** 2)
    return LabelNoise(
        float(np.sqrt(force)),
        _estimate_hvp_noise(positions, probes, hvp_residuals, pairs, turns, law or ProbeLaw()),
        len(pairs),
    )


def choose_frames(n_frames: int) -> NDArray[np.int64]:
    """The frames that noise is estimated from: all, or evenly spaced ones."""
    return np.unique(np.linspace(0, n_frames - 1, min(n_frames, MAX_FRAMES)).astype(np.int64))


def _estimate_hvp_noise(
    positions: NDArray[np.floating],
    probes: NDArray[np.floating],
    hvp_residuals: NDArray[np.floating],
    pairs: NDArray[np.int64],
    turns: NDArray[np.float64],
    law: ProbeLaw,
) -> float | None:
    """Half of ``E |(A - B) v|^2`` of neighbours with residual matrices A and B, as a root mean square component."""
    i, j = pairs[:, 0], pairs[:, 1]
    duals = law.compute_duals(positions[j], probes[j])
    if duals is None:
        return None
    n_components = positions.shape[1] * 3
    v, e_i = probes[i].astype(np.float64), hvp_residuals[i].astype(np.float64)
    w, e_j = duals @ turns[:, None], hvp_residuals[j].astype(np.float64) @ turns[:, None]
    # E|A v|^2 = tr(A S A) for each frame; E[(S^+ w . A v)(v . B w)] = tr(A S B) for the cross term, from independent
    # probes v and w (theory note: E[v v^T] = S).
    own = 0.5 * ((e_i**2).sum((2, 3)).mean(1) + (e_j**2).sum((2, 3)).mean(1))
    cross = np.einsum("nqbx,npbx->npq", w, e_i) * np.einsum("npbx,nqbx->npq", v, e_j)
    hvp = (own - cross.mean((1, 2))).mean() / n_components
    return float(np.sqrt(max(hvp, 0.0)))


def _pair_neighbours(
    positions: NDArray[np.float64], frames: NDArray[np.int64], times: NDArray[np.int64], walker: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each frame with its nearest frame, in bead distances, that is not near it in time; (n, 2) original indices."""
    first, second = np.triu_indices(positions.shape[1], k=1)
    features = np.linalg.norm(positions[:, first] - positions[:, second], axis=-1)
    if features.shape[1] == 0 or len(features) < 2:
        return np.empty((0, 2), dtype=np.int64)
    neighbours = cKDTree(features).query(features, k=min(len(features), 2 * MIN_SEPARATION + 1))[1]
    rows = np.arange(len(frames))[:, None]
    apart = (walker[neighbours] != walker[:, None]) | (np.abs(times[neighbours] - times[:, None]) >= MIN_SEPARATION)
    apart &= neighbours != rows
    found = apart.any(axis=1)
    nearest = neighbours[np.arange(len(frames)), apart.argmax(axis=1)]
    return np.stack([frames[found], frames[nearest[found]]], axis=1)


def _align(target: NDArray[np.floating], moving: NDArray[np.floating]) -> NDArray[np.float64]:
    """Matrix R (3, 3) with ``moving @ R`` closest to ``target``, both centred."""
    rotation, _ = Rotation.align_vectors(target - target.mean(0), moving - moving.mean(0))
    return rotation.as_matrix().T
