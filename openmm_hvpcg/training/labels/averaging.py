"""Conditional averaging: labels of a frame as means over samples of its hidden atoms, the beads held.

One frame's force and Hessian are one sample of the ensemble whose means are wanted, and the covariance correction needs
the mean force of a model. Means over a short chain at fixed beads have far less noise, and the chain's own covariance
makes the correction independent of any model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.training.labels.held import HeldSamples


@dataclass(frozen=True)
class AveragedLabels:
    """Labels of one frame: ``forces`` (B, 3); ``hvps`` and ``covariances`` (covariance times probe) (P, B, 3)."""

    forces: NDArray[np.float64]
    hvps: NDArray[np.float64]
    covariances: NDArray[np.float64]


def average_labels(samples: HeldSamples, probes: NDArray[np.floating]) -> AveragedLabels:
    """Mean force, mean HVP and covariance times probes from the samples at one frame.

    The samples of a short chain are correlated, and their scatter about their own mean misses the variance of that
    mean. The halves of the chain show it: the square of the difference of their means is four times that variance, so
    that a quarter of it is added. Independent samples get the usual n/(n-1) this way, and no model takes part.

    Parameters
    ----------
    samples : forces (n, B, 3) and hvps (m, P, B, 3)
    probes : (P, B, 3)
    """
    q = samples.forces
    mean = q.mean(axis=0)
    half = len(q) // 2
    # An odd number has no equal halves, and a little less than a quarter.
    share = np.sqrt(half * (len(q) - half)) / len(q)
    between = share * (q[:half].mean(axis=0) - q[half:].mean(axis=0))
    deviations = np.concatenate([(q - mean) / np.sqrt(len(q)), between[None]])
    along = np.einsum("nbx,pbx->np", deviations, probes)
    return AveragedLabels(mean, samples.hvps.mean(axis=0), np.einsum("np,nbx->pbx", along, deviations))


def split_by_fold(fold: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Runs of at most ``most`` neighbours with one force map."""
    edges = [0, *(np.flatnonzero(np.diff(fold)) + 1).tolist(), len(fold)]
    for start, stop in pairwise(edges):
        for begin in range(start, stop, most):
            yield slice(begin, min(begin + most, stop))
