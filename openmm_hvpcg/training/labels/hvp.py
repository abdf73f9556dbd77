"""Projected Hessian-vector products by central differences of any force function. numpy alone.

``p(v) = Q H Q^T v ~= -Q [f(r + e Q^T v) - f(r - e Q^T v)] / (2 e)``: two force calls a probe. ``e`` is chosen for each
probe so that the atom that moves most moves by ``step_nm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import InputError

#: Steps tried by :func:`scan_step`, nm: from where the third derivative spoils the difference to where rounding does.
SCAN_STEPS_NM = tuple(float(10.0**exponent) for exponent in np.arange(-2.0, -7.01, -0.5))

#: Displaced positions in memory at once: enough for any platform to work on, little memory.
BLOCK_BYTES = 2**25


class ForceFunction(Protocol):
    """AA forces (n, A, 3) kJ/mol/nm of positions (n, A, 3) nm in boxes (n, 3, 3) nm or None."""

    def __call__(self, positions: NDArray[Any], boxes: NDArray[Any] | None) -> NDArray[np.float64]: ...


def compute_projected_hvps(
    force_function: ForceFunction,
    positions: NDArray[Any],
    probes: NDArray[Any],
    force_map: NDArray[np.float64],
    step_nm: float,
    boxes: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Projected HVPs ``+Q H Q^T v`` (n, P, B, 3), kJ/mol/nm^2 per unit of the probe.

    Parameters
    ----------
    force_function : AA forces of a batch of configurations
    positions : (n, A, 3) nm
    probes : (n, P, B, 3)
    force_map : Q (B, A)
    step_nm : displacement of the atom that moves most, nm
    boxes : (n, 3, 3) nm or None
    """
    n_frames, n_probes, n_beads, _ = probes.shape
    hvps = np.empty((n_frames, n_probes, n_beads, 3))
    block = max(1, BLOCK_BYTES // max(1, 2 * n_probes * 24 * positions.shape[1]))
    for start in range(0, n_frames, block):
        rows = slice(start, start + block)
        boxes_of_rows = None if boxes is None else boxes[rows]
        hvps[rows] = _compute_block(force_function, positions[rows], probes[rows], force_map, step_nm, boxes_of_rows)
    return hvps


def _compute_block(
    force_function: ForceFunction,
    positions: NDArray[Any],
    probes: NDArray[Any],
    force_map: NDArray[np.float64],
    step_nm: float,
    boxes: NDArray[Any] | None,
) -> NDArray[np.float64]:
    """HVPs of frames whose displaced copies are in memory together."""
    n_frames, n_probes = probes.shape[:2]
    n_atoms = positions.shape[1]
    directions = np.matmul(force_map.T, probes.astype(np.float64))
    squares = directions**2
    largest = np.sqrt((squares[..., 0] + squares[..., 1] + squares[..., 2]).max(axis=-1))
    if not (largest > 0).all():
        raise InputError("a probe displaces no atom", hint="probes must not be zero")
    epsilon = step_nm / largest
    directions *= epsilon[..., None, None]
    base = positions.astype(np.float64)[:, None]
    displaced = np.empty((n_frames, n_probes, 2, n_atoms, 3))
    np.add(base, directions, out=displaced[:, :, 0])
    np.subtract(base, directions, out=displaced[:, :, 1])
    repeated = None if boxes is None else np.repeat(boxes, 2 * n_probes, axis=0)
    forces = force_function(displaced.reshape(-1, n_atoms, 3), repeated)
    forces = forces.reshape(n_frames, n_probes, 2, n_atoms, 3)
    difference = np.matmul(force_map, forces[:, :, 1] - forces[:, :, 0])
    return np.asarray(difference / (2.0 * epsilon)[..., None, None])


@dataclass(frozen=True)
class StepScan:
    """Outcome of :func:`scan_step`: the chosen step, its estimated relative error, and the whole table."""

    step_nm: float
    relative_error: float
    steps_nm: tuple[float, ...]
    relative_errors: tuple[float, ...]


def scan_step(
    force_function: ForceFunction,
    positions: NDArray[Any],
    probes: NDArray[Any],
    force_map: NDArray[np.float64],
    boxes: NDArray[Any] | None = None,
    steps_nm: Sequence[float] = SCAN_STEPS_NM,
) -> StepScan:
    """Choose the finite-difference step on a few frames.

    The error of a step is estimated as its largest relative difference from the neighbouring steps: a step too long
    disagrees with the shorter one, a step too short with both. Arguments as in :func:`compute_projected_hvps`.
    """
    hvps = [compute_projected_hvps(force_function, positions, probes, force_map, step, boxes) for step in steps_nm]
    differences = np.array([_relative_difference(a, b) for a, b in pairwise(hvps)])
    errors = np.maximum(np.append(differences, differences[-1]), np.insert(differences, 0, differences[0]))
    # The ends have one neighbour only and are not chosen: nothing vouches for them.
    best = 1 + int(np.argmin(errors[1:-1]))
    return StepScan(float(steps_nm[best]), float(errors[best]), tuple(map(float, steps_nm)), tuple(map(float, errors)))


def _relative_difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    scale = np.sqrt(np.mean(a**2)) + np.sqrt(np.mean(b**2))
    return float(2.0 * np.sqrt(np.mean((a - b) ** 2)) / scale) if scale > 0 else 0.0
