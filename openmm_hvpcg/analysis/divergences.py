r"""How far apart two sampled distributions are, with errors from time blocks.

State bins divide the range of the reference evenly and go on with bins of the same width over the range of
the models; the outermost bins take whatever lies beyond. So no sample is lost, and the bins inside the
reference range do not depend on which models are compared.

For the Kullback-Leibler divergence, counts n over K reference bins become probabilities with a pseudo-count
of one frame in all, shared by these bins: ``p_i = (n_i + 1/K) / (N + 1)`` (the prior of Perks, J. Inst.
Actuaries 73, 285 (1947)). So it stays finite where a model never goes, at about ``ln(N K)`` nats times the
weight it misses. The Jensen-Shannon divergence needs no floor. All divergences are in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from openmm_hvpcg.errors import InputError

FloatArray = NDArray[np.float64]
Statistic = Callable[..., FloatArray]

#: Bins beyond the reference range, on each side, as a share of those inside.
MAX_EXTENSION = 0.5
#: A reference range narrower than this share of its magnitude is widened: it is rounding, not spread.
MIN_RELATIVE_RANGE = 1e-3
#: Splits of the reference into halves that are averaged for the sampling floor.
MAX_SPLITS = 200


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, from time blocks."""

    value: float
    error: float


@dataclass(frozen=True)
class StateBins:
    """Cells over one or more coordinates.

    Attributes
    ----------
    edges : one increasing array an axis
    inside : boolean array of the cells' shape, True within the range of the reference
    """

    edges: tuple[FloatArray, ...]
    inside: NDArray[np.bool_]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(edges) - 1 for edges in self.edges)

    @property
    def volume(self) -> FloatArray:
        """Size of each cell, of the cells' shape, in the product of the coordinates' units."""
        return np.asarray(reduce(np.multiply.outer, [np.diff(edges) for edges in self.edges]))

    @property
    def centres(self) -> tuple[FloatArray, ...]:
        return tuple(0.5 * (edges[1:] + edges[:-1]) for edges in self.edges)

    def assign(self, values: FloatArray) -> NDArray[np.intp]:
        """Flat cell index (n,) of each row of values (n, d); what lies beyond goes to the outermost cells."""
        index = [
            np.clip(np.searchsorted(edges, values[:, axis], side="right") - 1, 0, len(edges) - 2)
            for axis, edges in enumerate(self.edges)
        ]
        return np.ravel_multi_index(index, self.shape)

    def count_blocks(
        self, values: FloatArray, blocks: Sequence[NDArray[np.intp]], weights: FloatArray | None = None
    ) -> FloatArray:
        """Counts (n_blocks, cells), or sums of weights (n,), of the rows of ``values`` (n, d) in each block."""
        cells, n_cells = self.assign(values), int(np.prod(self.shape))
        counted = np.ones(len(cells)) if weights is None else weights
        return np.array([np.bincount(cells[block], counted[block], n_cells) for block in blocks])


def build_bins(
    reference: FloatArray,
    models: Sequence[FloatArray],
    n_bins: int,
    period: tuple[float, float] | None = None,
) -> StateBins:
    """State bins: ``n_bins`` an axis over the reference, and more of that width for the models.

    Parameters
    ----------
    reference, models : (n, d) values each
    n_bins : bins an axis within the range of the reference
    period : for angles, the fixed range of every axis instead; all values must lie in it
    """
    edges: list[FloatArray] = []
    masks: list[NDArray[np.bool_]] = []
    for axis in range(reference.shape[1]):
        if period is not None:
            edges.append(np.linspace(*period, n_bins + 1))
            masks.append(np.ones(n_bins, dtype=bool))
            continue
        low, high = _widen(float(reference[:, axis].min()), float(reference[:, axis].max()))
        width = (high - low) / n_bins
        lowest = min([low, *(float(m[:, axis].min()) for m in models)])
        highest = max([high, *(float(m[:, axis].max()) for m in models)])
        below, above = (_count_extension(beyond / width, n_bins) for beyond in (low - lowest, highest - high))
        edges.append(np.asarray(low + width * np.arange(-below, n_bins + above + 1), dtype=np.float64))
        mask = np.zeros(below + n_bins + above, dtype=bool)
        mask[below : below + n_bins] = True
        masks.append(mask)
    return StateBins(tuple(edges), np.asarray(reduce(np.logical_and.outer, masks)))


def compute_kl(reference: FloatArray, model: FloatArray, inside: NDArray[np.bool_] | None = None) -> FloatArray:
    """Kullback-Leibler divergence KL(reference || model) in nats of counts (..., K) over the last axis.

    Parameters
    ----------
    reference, model : counts, (..., K)
    inside : (K,) the bins that share the pseudo-count (see the module); all where None. A model without
        counts in a bin that the reference visits and that has no pseudo-count gives infinity.
    """
    p, q = _add_floor(reference, inside), _add_floor(model, inside)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(p > 0, xlogy(p, p) - p * np.log(q), 0.0).sum(axis=-1))


def compute_js(reference: FloatArray, model: FloatArray) -> FloatArray:
    """Jensen-Shannon divergence in nats, 0 to ln 2, of counts (..., K) over the last axis."""
    p = reference / reference.sum(axis=-1, keepdims=True)
    q = model / model.sum(axis=-1, keepdims=True)
    middle = 0.5 * (p + q)
    entropy = 0.5 * (xlogy(p, p) + xlogy(q, q)) - xlogy(middle, middle)
    return np.asarray(np.maximum(entropy.sum(axis=-1), 0.0))


def split_blocks(walker: NDArray[np.int64], n_blocks: int) -> list[NDArray[np.intp]]:
    """Frame indices of at least ``n_blocks`` blocks, each a stretch of one walker, of similar length.

    With as many walkers as blocks, or more, every walker is one block: these are truly independent.
    """
    target = len(walker) / n_blocks
    blocks: list[NDArray[np.intp]] = []
    for w in dict.fromkeys(walker.tolist()):
        frames = np.flatnonzero(walker == w)
        # The small allowance keeps rounding from turning 2.0000001 blocks into 3.
        pieces = min(len(frames), max(1, int(np.ceil(len(frames) / target - 1e-9))))
        blocks += np.array_split(frames, pieces)
    return blocks


def jackknife(statistic: Statistic, *samples: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Value and standard error of a function of block totals, by leaving out one block at a time.

    Parameters
    ----------
    statistic : takes one array (..., K) of totals for each sample, returns (...) or (..., m)
    samples : (n_blocks, K) totals of the blocks of each independent sample

    Returns
    -------
    value, error : the statistic of everything; the root of the summed jackknife variances of the samples
        (Efron and Stein, Ann. Stat. 9, 586 (1981)). A sample of one block adds NaN: its error is not known.
    """
    totals = [sample.sum(axis=0) for sample in samples]
    value = np.asarray(statistic(*totals), dtype=np.float64)
    variance = np.zeros_like(value)
    for s, sample in enumerate(samples):
        n_blocks = len(sample)
        if n_blocks < 2:
            variance = variance + np.nan
            continue
        parts = [np.broadcast_to(total, sample.shape[:1] + total.shape) for total in totals]
        parts[s] = totals[s] - sample
        left_out = np.asarray(statistic(*parts), dtype=np.float64)
        variance = variance + (n_blocks - 1) * ((left_out - left_out.mean(axis=0)) ** 2).mean(axis=0)
    return value, np.sqrt(variance)


def estimate(statistic: Statistic, *samples: FloatArray) -> Estimate:
    """:func:`jackknife` of a scalar statistic."""
    value, error = jackknife(statistic, *samples)
    return Estimate(float(value), float(error))


def compute_sampling_floor(divergence: Statistic, blocks: FloatArray, seed: int = 0) -> float:
    """Mean divergence of one half of the reference's blocks from the other half: what sampling alone costs.

    All ways to halve the blocks are averaged, or ``MAX_SPLITS`` random ones where there are more. Halves hold
    half the frames, so the floor errs on the high side.

    Parameters
    ----------
    divergence : of two arrays of counts (..., K)
    blocks : (n_blocks, K) counts, at least 2 blocks
    seed : of the random splits
    """
    n_blocks = len(blocks)
    if n_blocks < 2:
        raise InputError("a sampling floor needs blocks to halve", expected="at least 2 blocks", got=n_blocks)
    half = n_blocks // 2
    if comb(n_blocks, half) <= MAX_SPLITS:
        chosen = [list(members) for members in itertools.combinations(range(n_blocks), half)]
    else:
        generator = np.random.default_rng(seed)
        chosen = [generator.permutation(n_blocks)[:half].tolist() for _ in range(MAX_SPLITS)]
    first = np.zeros((len(chosen), n_blocks))
    for row, members in enumerate(chosen):
        first[row, members] = 1.0
    one, other = first @ blocks, (1.0 - first) @ blocks
    return float(0.5 * (divergence(one, other) + divergence(other, one)).mean())


def _add_floor(counts: FloatArray, inside: NDArray[np.bool_] | None) -> FloatArray:
    mask = np.ones(counts.shape[-1], dtype=bool) if inside is None else inside.ravel()
    floor = mask / mask.sum()
    return np.asarray((counts + floor) / (counts.sum(axis=-1, keepdims=True) + 1.0))


def _widen(low: float, high: float) -> tuple[float, float]:
    """A range of usable width whose upper end lies strictly above the largest value."""
    least = MIN_RELATIVE_RANGE * max(abs(low), abs(high), 1e-9)
    if high - low < least:
        middle = 0.5 * (low + high)
        low, high = middle - 0.5 * least, middle + 0.5 * least
    margin = 1e-6 * (high - low)
    return low - margin, high + margin


def _count_extension(bins_beyond: float, n_bins: int) -> int:
    """Bins to add on one side: at least one, so that outliers never share a bin with the reference."""
    return int(np.clip(np.ceil(min(bins_beyond, n_bins)), 1, max(1, int(MAX_EXTENSION * n_bins))))
