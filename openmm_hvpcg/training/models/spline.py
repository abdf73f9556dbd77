"""Functions of a distance as a spline that is quick to evaluate: many of them, and their slopes, in one look-up.

A quintic B-spline on evenly spaced knots is a sum of six neighbouring rows of a table of coefficients, weighted by
polynomials of the place between two knots. So is its slope, with other weights. torch's ``embedding_bag`` makes such
sums without writing the rows out first. The spline is C4, but at the cutoff C2, as the networks here are, and beyond it
exactly zero: a pair out there adds zeros, not merely little.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.linalg import solve
from torch import Tensor, nn
from torch.nn.functional import linear

#: Neighbouring rows that make up the value of a quintic spline.
ROWS = 6
#: Points of each interval at which the spline is fitted.
POINTS = 6


def compute_weights() -> NDArray[np.float64]:
    """Powers 0..5 of the place in an interval -> weights of the six rows, times 5!: whole (6 powers, 6 rows)."""
    # The B-spline is positive over six intervals; row k belongs to the one that starts k intervals to the right.
    spline = BSpline.basis_element(np.arange(ROWS + 1.0))
    places = np.linspace(0.05, 0.95, ROWS)
    values = np.stack([spline(places + (ROWS - 1 - row)) for row in range(ROWS)], axis=1)
    return np.round(120.0 * np.linalg.solve(np.vander(places, increasing=True), values))


def fit_spline(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], cutoff_nm: float, per_nm: int
) -> NDArray[np.float64]:
    """Coefficients (rows, C) of the least-squares spline of ``function``: distances (n,) -> values (n, C).

    ``per_nm`` intervals make a nanometre; the last ends at zero or below. The function has to end at the cutoff without
    value, slope and curvature, and so does the spline. It runs inwards from there; before its coefficients stand six
    rows of zeros, for what is beyond the cutoff, and after them one.
    """
    intervals = int(np.ceil(cutoff_nm * per_nm))
    places, n = (np.arange(POINTS) + 0.5) / POINTS, intervals + ROWS - 1
    weights = np.vander(places, ROWS, increasing=True) @ compute_weights()
    values = function((cutoff_nm - (np.arange(intervals)[:, None] + places) / per_nm).ravel())
    values = values.reshape(intervals, POINTS, -1)
    moments, gram = np.zeros((n, values.shape[-1])), np.zeros((n, n))
    for k in range(intervals):
        gram[k : k + ROWS, k : k + ROWS] += weights.T @ weights
        moments[k : k + ROWS] += weights.T @ values[k]
    # Value, slope and curvature at the cutoff are combinations of the first five rows: three follow from the others.
    ends = compute_weights()[:3, : ROWS - 1]
    free = np.eye(n)[:, 3:]
    free[:3, :2] = -np.linalg.solve(ends[:, :3], ends[:, 3:])
    solution = solve(free.T @ gram @ free, free.T @ moments, assume_a="pos")
    return np.concatenate((np.zeros((ROWS, values.shape[-1])), free @ solution, np.zeros((1, values.shape[-1]))))


class RadialTable(nn.Module):
    """Splines of C functions of one distance.

    Parameters
    ----------
    coefficients : of :func:`fit_spline`
    cutoff_nm : where the functions end
    per_nm : intervals in a nanometre
    """

    coefficients: Tensor
    constants: Tensor
    powers: Tensor
    offsets: Tensor
    nowhere: Tensor
    bags: Tensor

    def __init__(self, coefficients: NDArray[np.float64], cutoff_nm: float, per_nm: int) -> None:
        super().__init__()
        self.per_nm = float(per_nm)
        self.cutoff_place = float(ROWS)
        self.centre_place = float(ROWS + cutoff_nm * per_nm)
        self.channels = coefficients.shape[1]
        weights = compute_weights()
        # Places count inwards from the cutoff, slopes are by the distance: hence the sign. All are whole numbers, which
        # float32 holds exactly: slopes are those of the values, whatever the precision.
        slopes = np.zeros_like(weights)
        slopes[:-1] = -self.per_nm * np.arange(1, ROWS)[:, None] * weights[1:]
        both = torch.from_numpy(np.concatenate((weights, slopes), axis=1)).float()
        self.register_buffer("coefficients", torch.from_numpy(coefficients).float())
        self.register_buffer("constants", both[0].clone())
        self.register_buffer("powers", both[1:].t().contiguous())
        self.register_buffer("offsets", torch.arange(ROWS).repeat(2))
        self.register_buffer("nowhere", torch.zeros(()))
        self.register_buffer("bags", torch.zeros(0, dtype=torch.int64))

    def forward(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Values and slopes, (n, C) each, at distances (n,) nm; what is not a number counts as beyond the cutoff."""
        n = distance.shape[0]
        place = torch.fmax(torch.rsub(distance, self.centre_place, alpha=self.per_nm), self.nowhere)
        place = torch.threshold(place, self.cutoff_place, 0.0)
        powers = place.frac().unsqueeze(1).expand(n, 5).cumprod(1)
        weights = linear(powers, self.powers, self.constants)
        rows = place.long().unsqueeze(1) + self.offsets
        # A bag of six rows for each value, the next for its slope.
        if self.bags.shape[0] < 2 * n:
            self.bags = torch.arange(0, 12 * n, 6, device=distance.device)
        bags = self.bags if self.bags.shape[0] == 2 * n else self.bags.narrow(0, 0, 2 * n)
        sums = torch.embedding_bag(self.coefficients, rows.view(-1), bags, False, 0, False, weights.view(-1))[0]
        values, slopes = sums.view(n, 2, self.channels).unbind(1)
        return values, slopes

    def forget(self) -> None:
        """Drop what depends on the number of distances asked for."""
        self.bags = self.bags.new_zeros(0)
