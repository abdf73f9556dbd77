"""Where molecules are put before float32 frames are written; numpy only.

Float32 keeps about 1e-7 of a coordinate, so molecules that drift far from the origin lose digits that
finite differences need.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def recentre(positions: NDArray[np.floating]) -> NDArray[np.float64]:
    """Move each frame's centroid to the origin; positions (..., A, 3) nm."""
    values = np.asarray(positions, dtype=np.float64)
    return values - values.mean(axis=-2, keepdims=True)


def label_molecules(n_atoms: int, bonds: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Number the groups of joined atoms, (A,): 0, 1, ... in the order of their first atoms."""
    parent = np.arange(n_atoms)

    def find(atom: int) -> int:
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = int(parent[atom])
        return atom

    for i, j in bonds:
        a, b = find(i), find(j)
        parent[max(a, b)] = min(a, b)
    roots = np.array([find(i) for i in range(n_atoms)])
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def wrap_molecules(
    positions: NDArray[np.floating], box: NDArray[np.floating], molecules: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Put the first molecule's centroid at the box centre and every other molecule at its nearest image.

    Molecules stay whole, so they must be whole on entry.

    Parameters
    ----------
    positions : (A, 3) nm, one frame
    box : (3, 3) nm, vectors as rows in OpenMM's reduced (lower triangular) form
    molecules : (A,) from :func:`label_molecules`
    """
    values = np.asarray(positions, dtype=np.float64)
    vectors = np.asarray(box, dtype=np.float64)
    counts = np.bincount(molecules)
    centroids = np.stack([np.bincount(molecules, weights=values[:, k]) for k in range(3)], axis=1) / counts[:, None]
    anchor = centroids[0]
    offsets = centroids - anchor
    shifts = np.zeros_like(offsets)
    for k in (2, 1, 0):
        turns = np.round((offsets[:, k] + shifts[:, k]) / vectors[k, k])
        shifts -= turns[:, None] * vectors[k]
    return values + shifts[molecules] - anchor + 0.5 * vectors.sum(axis=0)
