"""Force maps Q: from AA forces to forces on beads, under the constraints of the System. numpy alone.

A force map is admissible for a configuration map M if ``Q M^T = I`` and if atoms joined by rigid constraints have
equal columns (theory note; Krämer et al., J. Phys. Chem. Lett. 14, 3970 (2023)). All admissible maps give the same
mean force and the same CG Hessian; they differ in noise, and for Hessian labels the noise decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import MappingError

#: Largest deviation of Q M^T from I that rounding in the linear solve explains.
ADMISSIBLE_TOLERANCE = 1e-6


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
) -> ForceMap:
    """Build a force map by name.

    Parameters
    ----------
    method : "slice" or "optimal"
    site_weights : M (B, A)
    clusters : (A,) index of the rigid cluster of each atom
    active : (A,) atoms that may have weight (those of molecules with beads, massive)
    forces : (T, A, 3) AA forces of sample frames, kJ/mol/nm: what ``optimal`` minimises; the diagnostics are of them

    Raises
    ------
    MappingError
        Two beads share a rigid cluster, so that no admissible map exists, or a bead rests on an inactive atom.
    """
    reduced = _ReducedProblem(site_weights, clusters, active)
    builders: dict[str, Callable[[_ReducedProblem, NDArray[Any]], NDArray[np.float64]]] = {
        "slice": lambda problem, _: problem.solve_least_norm(),
        "optimal": lambda problem, sample: problem.solve_least_variance(sample),
    }
    if method not in builders:
        raise MappingError("no such force map", expected=", ".join(builders), got=method)
    weights = reduced.expand(builders[method](reduced, forces))
    reference = reduced.expand(reduced.solve_least_norm())
    sums = weights.sum(axis=0)[active]
    force_map = ForceMap(
        weights,
        method,
        {
            "sample_frames": len(forces),
            "rms_projected_force": _rms(np.matmul(weights, forces)),
            "rms_projected_force_slice": _rms(np.matmul(reference, forces)),
            "column_sum_min": float(sums.min()),
            "column_sum_max": float(sums.max()),
        },
    )
    check_force_map(force_map, site_weights, clusters)
    return force_map


class _ReducedProblem:
    """The problem in terms of active rigid clusters: rows q with ``q N = e_b``, ``N = C M^T`` (clusters, B)."""

    def __init__(
        self, site_weights: NDArray[np.float64], clusters: NDArray[np.int64], active: NDArray[np.bool_]
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

    def expand(self, cluster_weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return cluster_weights @ self.indicator

    def solve_least_norm(self) -> NDArray[np.float64]:
        """Least-norm admissible map; for a slice map, the rigid cluster of each bead's atom with weight 1."""
        return np.asarray(np.linalg.pinv(self.constraint), dtype=np.float64)

    def solve_least_variance(self, forces: NDArray[Any]) -> NDArray[np.float64]:
        """``min <|Q f|^2>`` over admissible maps, by its Karush-Kuhn-Tucker system.

        The mean force is the same for every admissible map, so the least mean square is the least variance.
        """
        n_clusters, n_beads = self.constraint.shape
        components = np.moveaxis(np.matmul(self.indicator, forces.astype(np.float64)), 1, 0).reshape(n_clusters, -1)
        gram = components @ components.T
        gram /= np.trace(gram) / n_clusters
        # A ridge far below the noise picks the smallest weights where the sample leaves a direction open.
        gram[np.diag_indices(n_clusters)] += 1e-9
        kkt = np.block([[gram, self.constraint], [self.constraint.T, np.zeros((n_beads, n_beads))]])
        right = np.vstack([np.zeros((n_clusters, n_beads)), np.eye(n_beads)])
        return np.linalg.lstsq(kkt, right, rcond=None)[0][:n_clusters].T


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(values**2)))
