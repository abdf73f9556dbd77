"""Force maps Q: from AA forces to forces on beads, under the constraints of the System. numpy alone.

A force map is admissible for a configuration map M if ``Q M^T = I`` and if atoms joined by rigid constraints have
equal columns (theory note; Krämer et al., J. Phys. Chem. Lett. 14, 3970 (2023)). All admissible maps give the same
mean force and the same CG Hessian; they differ in noise, and for Hessian labels the noise decides.

Maps by name:

- ``slice``: least norm; for beads on single atoms, the force on each bead's atom or rigid cluster.
- ``harmonic``: weights vary as little as possible along bonds (the harmonic functions of the bond graph that are 1 at
  one bead and 0 at the others). Atoms move with the beads they hang between, so that stiff bonds are hardly strained
  and drop out of the projected force. It knows no forces.
- ``optimal``: least mean square of the projected forces of sample frames. As the mean force is the same for all
  admissible maps, the least mean square is the least variance. It overfits few frames.
- ``optimal_cv``: the same plus a ridge on the deviation from ``harmonic``, measured along bonds, its strength chosen by
  cross-validation over contiguous blocks of frames. Few frames give ``harmonic``, many ``optimal``.

A map fitted to a frame's own forces projects them too small: they helped to choose what cancels them. With w free
weights and n forces a component the label is short of its mean by w / n. :func:`fit_force_maps` therefore gives, beside
the map of all sample frames, one for each block of frames that has not seen that block (cross-fitting).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import MappingError

METHODS = ("slice", "harmonic", "optimal", "optimal_cv")
#: Methods that look at forces.
FITTED = ("optimal", "optimal_cv")
N_FOLDS = 5
#: Largest deviation of Q M^T from I that rounding in the linear solve explains.
ADMISSIBLE_TOLERANCE = 1e-6
#: Ridge of ``optimal``, of the mean diagonal of the sample's Gram matrix: far below the noise, it picks small weights
#: where the sample leaves a direction open.
OPEN_RIDGE = 1e-9
#: Ridges tried by ``optimal_cv``: a unit step of weight along a bond costs as much as this many forces of average size.
CV_STRENGTHS = tuple(float(10.0**exponent) for exponent in np.arange(-1.0, 6.01, 0.5))
#: What a weight costs beside a step along a bond, so that atoms without bonds to any bead have a definite weight.
NORM_SHARE = 1e-6


@dataclass(frozen=True)
class ForceMap:
    """A constant linear map from atom forces to bead forces.

    Attributes
    ----------
    weights : (B, A), with ``weights @ site_weights.T = I``
    method : how it was made
    diagnostics : figures about it, JSON-ready
    """

    weights: NDArray[np.float64]
    method: str
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def project(self, forces: NDArray[Any]) -> NDArray[np.float64]:
        """Bead forces (..., B, 3) of atom forces (..., A, 3)."""
        return np.matmul(self.weights, forces)

    def lift(self, probes: NDArray[Any]) -> NDArray[np.float64]:
        """Atom displacements ``Q^T v`` (..., A, 3) of bead displacements (..., B, 3)."""
        return np.matmul(self.weights.T, probes)


def check_force_map(force_map: ForceMap, site_weights: NDArray[np.float64], clusters: NDArray[np.int64]) -> None:
    """Raise :class:`MappingError` unless the map is admissible for M (B, A) and the rigid clusters (A,)."""
    weights = force_map.weights
    if weights.shape != site_weights.shape:
        raise MappingError("force map and bead map differ in size", expected=site_weights.shape, got=weights.shape)
    deviation = float(np.abs(weights @ site_weights.T - np.eye(len(weights))).max())
    if not deviation <= ADMISSIBLE_TOLERANCE:
        raise MappingError("the force map is not admissible: Q M^T is not 1", got=f"largest deviation {deviation:.2g}")
    _, first = np.unique(clusters, return_index=True)
    representative = first[np.searchsorted(np.unique(clusters), clusters)]
    if not np.allclose(weights, weights[:, representative], atol=1e-12):
        raise MappingError("the force map breaks constraints: columns differ within a rigid cluster")


def build_force_map(
    method: str,
    site_weights: NDArray[np.float64],
    clusters: NDArray[np.int64],
    active: NDArray[np.bool_],
    forces: NDArray[np.floating[Any]],
    bonds: NDArray[np.integer[Any]] | None = None,
) -> ForceMap:
    """The map of all sample frames alone; see :func:`fit_force_maps`."""
    return fit_force_maps(method, site_weights, clusters, active, forces, bonds)[0]


def fit_force_maps(
    method: str,
    site_weights: NDArray[np.float64],
    clusters: NDArray[np.int64],
    active: NDArray[np.bool_],
    forces: NDArray[np.floating[Any]],
    bonds: NDArray[np.integer[Any]] | None = None,
    folds: NDArray[np.integer[Any]] | None = None,
) -> tuple[ForceMap, NDArray[np.float64]]:
    """Build a force map by name, and one for each fold of the sample frames that has not seen the fold's forces.

    Parameters
    ----------
    method : one of :data:`METHODS`
    site_weights : M (B, A)
    clusters : (A,) index of the rigid cluster of each atom
    active : (A,) atoms that may have weight (those of molecules with beads, massive)
    forces : (T, A, 3) AA forces of sample frames in order of time, kJ/mol/nm
    bonds : (n, 2) atoms; without any, ``harmonic`` is ``slice`` and ``optimal_cv`` keeps near it
    folds : (T,) fold of each sample frame, 0 .. K-1; None: :func:`split_in_blocks`

    Returns
    -------
    ForceMap
        Of all frames. ``diagnostics``: ``rms_projected_force`` of the frames it was fitted to, and
        ``rms_projected_force_held_out`` of each fold with the map that has not seen it (None with one fold);
        for ``optimal_cv`` the strength chosen and the curve it was chosen from.
    array (K, B, A)
        The maps of the folds, equal where the method looks at no forces. With one fold there are no frames left to
        fit to: its map has seen its forces.

    Raises
    ------
    MappingError
        Two beads share a rigid cluster, so that no admissible map exists, or a bead rests on an inactive atom.
    """
    if method not in METHODS:
        raise MappingError("no such force map", expected=", ".join(METHODS), got=method)
    problem = _ReducedProblem(site_weights, clusters, active, bonds)
    folds = split_in_blocks(len(forces)) if folds is None else np.asarray(folds)
    solutions, figures = _solve(problem, method, forces, folds)
    maps = np.stack([problem.expand(x) for x in solutions])
    whole, by_fold = maps[0], maps[1:]
    sums = whole.sum(axis=0)[active]
    reference = problem.expand(problem.least_norm)
    held_out = None
    if len(by_fold) > 1:
        parts = [np.matmul(q, forces[folds == k]) for k, q in enumerate(by_fold)]
        held_out = _rms(np.concatenate(parts))
    diagnostics = {
        "sample_frames": len(forces),
        "folds": len(by_fold),
        "rms_projected_force": _rms(np.matmul(whole, forces)),
        "rms_projected_force_held_out": held_out,
        "rms_projected_force_slice": _rms(np.matmul(reference, forces)),
        "column_sum_min": float(sums.min()),
        "column_sum_max": float(sums.max()),
        **figures,
    }
    for weights in maps:
        check_force_map(ForceMap(weights, method), site_weights, clusters)
    return ForceMap(whole, method, diagnostics), by_fold


def split_in_blocks(n_frames: int, n_blocks: int = N_FOLDS) -> NDArray[np.int64]:
    """Block (T,) of each of ``n_frames`` frames: contiguous, of equal length, no more than there are frames."""
    return np.arange(n_frames) * min(n_blocks, n_frames) // max(n_frames, 1)


def _solve(
    problem: _ReducedProblem, method: str, forces: NDArray[Any], folds: NDArray[Any]
) -> tuple[list[NDArray[np.float64]], dict[str, Any]]:
    """Cluster weights (C, B) for all frames and then without each fold, and figures on how they were found."""
    n_folds = int(folds.max()) + 1
    if method not in FITTED:
        fixed = problem.least_norm if method == "slice" else problem.harmonic
        return [fixed] * (1 + n_folds), {}
    grams = [problem.compute_gram(forces[folds == k]) for k in range(n_folds)]
    total = np.sum(grams, axis=0)
    # The mean square of a force component; where all are zero any unit will do.
    unit = float(np.trace(total)) / len(total) / (3 * len(forces)) or 1.0
    rest = [total - gram for gram in grams] if n_folds > 1 else [total]
    if method == "optimal":
        ridge = OPEN_RIDGE * unit * 3 * len(forces)
        return [_Ridge(gram, problem.least_norm, problem.free).solve(ridge) for gram in [total, *rest]], {}
    start, steps = problem.harmonic, problem.free_steps
    partial = [_Ridge(gram, start, steps) for gram in rest]
    squares = np.zeros(len(CV_STRENGTHS))
    if n_folds > 1:
        for gram, fit in zip(grams, partial, strict=True):
            squares += [np.sum(x * (gram @ x)) for x in (fit.solve(s * unit) for s in CV_STRENGTHS)]
    # One frame leaves nothing to choose by: the strongest ridge.
    best = int(np.argmin(squares)) if n_folds > 1 else -1
    ridge = CV_STRENGTHS[best] * unit
    figures = {
        "ridge_strength": CV_STRENGTHS[best],
        "cv_strengths": list(CV_STRENGTHS),
        "cv_rms_projected_force": np.sqrt(squares / (3 * len(forces) * start.shape[1])).tolist() if n_folds > 1 else [],
    }
    return [fit.solve(ridge) for fit in [_Ridge(total, start, steps), *partial]], figures


class _ReducedProblem:
    """The problem in terms of active rigid clusters: rows q with ``q N = e_b``, ``N = C M^T`` (clusters, B).

    Solutions are stored as columns (clusters, B). ``least_norm`` and ``harmonic`` are two admissible ones; ``free``
    (clusters, w) spans what may be added to any, and so does ``free_steps``, in which the square sum of coefficients
    is the cost of steps along bonds.
    """

    def __init__(
        self,
        site_weights: NDArray[np.float64],
        clusters: NDArray[np.int64],
        active: NDArray[np.bool_],
        bonds: NDArray[np.integer[Any]] | None,
    ) -> None:
        n_beads, n_atoms = site_weights.shape
        used = np.abs(site_weights).sum(axis=0) > 0
        if (used & ~active).any():
            atom = int(np.argmax(used & ~active))
            raise MappingError(f"a bead rests on atom {atom}, which is massless", hint="select massive atoms only")
        labels, member = np.unique(clusters[active], return_inverse=True)
        self.indicator = np.zeros((len(labels), n_atoms))
        self.indicator[member, np.flatnonzero(active)] = 1.0
        self.constraint = self.indicator @ site_weights.T
        if np.linalg.matrix_rank(self.constraint) < n_beads:
            shared = np.flatnonzero((np.abs(self.constraint) > 0).sum(axis=1) > 1)
            beads = np.flatnonzero(self.constraint[shared[0]]) if len(shared) else np.arange(n_beads)
            raise MappingError(
                f"no force map exists: beads {beads.tolist()} are joined by rigid constraints",
                hint="use fewer constraints in the AA simulation, or put the beads on atoms free to move",
            )
        self.least_norm = np.asarray(np.linalg.pinv(self.constraint).T, dtype=np.float64)
        self.free = np.linalg.svd(self.constraint)[0][:, n_beads:]
        cost = self._build_step_cost(active, np.empty((0, 2), dtype=int) if bonds is None else bonds)
        inner = self.free.T @ cost @ self.free
        self.harmonic = self.least_norm - self.free @ np.linalg.solve(inner, self.free.T @ cost @ self.least_norm)
        self.free_steps = np.linalg.solve(np.linalg.cholesky(inner), self.free.T).T

    def _build_step_cost(self, active: NDArray[np.bool_], bonds: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Matrix (clusters, clusters) of the sum over bonds of squared differences of weight: a graph Laplacian."""
        inside = bonds[active[bonds].all(axis=1)]
        steps = self.indicator[:, inside[:, 0]] - self.indicator[:, inside[:, 1]]
        return steps @ steps.T + NORM_SHARE * np.eye(len(steps))

    def expand(self, cluster_weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights (B, A) on atoms."""
        return cluster_weights.T @ self.indicator

    def compute_gram(self, forces: NDArray[Any]) -> NDArray[np.float64]:
        """Sum over frames and components of products of cluster forces, (clusters, clusters)."""
        components = np.matmul(self.indicator, forces.astype(np.float64)).transpose(1, 0, 2)
        components = components.reshape(len(self.indicator), -1)
        return components @ components.T


class _Ridge:
    """Least ``tr X^T G X + ridge |Y|^2`` with ``X = start + steps Y``, for any ridge by one diagonalisation."""

    def __init__(self, gram: NDArray[np.float64], start: NDArray[np.float64], steps: NDArray[np.float64]) -> None:
        self._start = start
        self._values, vectors = np.linalg.eigh(steps.T @ gram @ steps)
        self._modes = steps @ vectors
        self._pull = self._modes.T @ gram @ start

    def solve(self, ridge: float) -> NDArray[np.float64]:
        stiffness = np.maximum(self._values, 0.0) + ridge
        return self._start - self._modes @ (self._pull / stiffness[:, None])


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(values**2)))
