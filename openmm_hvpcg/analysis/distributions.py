"""Distributions of reference and arms over common state bins: densities, free energies, divergences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.analysis.divergences import (
    Estimate,
    StateBins,
    build_bins,
    compute_js,
    compute_kl,
    compute_sampling_floor,
    estimate,
    jackknife,
)
from openmm_hvpcg.units import compute_kt

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Values (n,) or (n, d) of a data set's frames, and the frame indices of its time blocks.

    ``weights`` (n,), where frames do not count alike, sum to the number of frames of equal weight that would do as
    well: divergences treat sums of weights as counts.
    """

    values: FloatArray
    blocks: Sequence[NDArray[np.intp]]
    weights: FloatArray | None = None

    def with_values(self, values: FloatArray) -> Sample:
        return Sample(values, self.blocks, self.weights)

    @property
    def counted(self) -> FloatArray:
        """What each frame counts: its weight, or 1."""
        return np.ones(len(self.values)) if self.weights is None else self.weights


@dataclass(frozen=True)
class Density:
    """Probability density of each cell and its standard error, in the cells' shape."""

    values: FloatArray
    errors: FloatArray

    def compute_free_energy(self, temperature_K: float) -> tuple[FloatArray, FloatArray]:
        """Free energy -kT ln(density) above its minimum, and its error, kJ/mol; NaN in empty cells."""
        kt = compute_kt(temperature_K)
        density = np.where(self.values > 0, self.values, np.nan)
        energy = -kt * np.log(density)
        return energy - np.nanmin(energy), kt * self.errors / density


@dataclass(frozen=True)
class Landscape:
    """One or two coordinates seen through common state bins.

    Attributes
    ----------
    axes, units : name and unit of each coordinate
    bins : the cells
    reference, arms : densities
    kl, js : KL(reference || arm) and Jensen-Shannon, nats
    outside : share of each arm's frames beyond the range of the reference
    kl_floor, js_floor : the same divergences of one half of the reference from the other
    """

    axes: tuple[str, ...]
    units: tuple[str, ...]
    bins: StateBins
    reference: Density
    arms: dict[str, Density]
    kl: dict[str, Estimate]
    js: dict[str, Estimate]
    outside: dict[str, float]
    kl_floor: float
    js_floor: float


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (of angles: circular), with block errors."""

    mean: Estimate
    std: Estimate


@dataclass(frozen=True)
class Observable:
    """A scalar with its distribution and moments in every data set."""

    kind: str
    label: str
    unit: str
    landscape: Landscape
    reference: Moments
    arms: dict[str, Moments] = field(default_factory=dict)

    @property
    def largest_js(self) -> float:
        return max((js.value for js in self.landscape.js.values()), default=0.0)


def compare_samples(
    axes: tuple[str, ...],
    units: tuple[str, ...],
    reference: Sample,
    arms: Mapping[str, Sample],
    n_bins: int,
    *,
    period: tuple[float, float] | None = None,
    seed: int = 0,
) -> Landscape:
    """Histogram all data sets, values (n, d), over common bins; measure the arms against the reference."""
    bins = build_bins(reference.values, [arm.values for arm in arms.values()], n_bins, period)
    counts = bins.count_blocks(reference.values, reference.blocks, reference.weights)
    arm_counts = {name: bins.count_blocks(arm.values, arm.blocks, arm.weights) for name, arm in arms.items()}

    def kl(p: FloatArray, q: FloatArray) -> FloatArray:
        return compute_kl(p, q, bins.inside)

    beyond = ~bins.inside.ravel()
    return Landscape(
        axes,
        units,
        bins,
        _compute_density(bins, counts),
        {name: _compute_density(bins, found) for name, found in arm_counts.items()},
        {name: estimate(kl, counts, found) for name, found in arm_counts.items()},
        {name: estimate(compute_js, counts, found) for name, found in arm_counts.items()},
        {name: float(found[:, beyond].sum() / found.sum()) for name, found in arm_counts.items()},
        compute_sampling_floor(kl, counts, seed),
        compute_sampling_floor(compute_js, counts, seed),
    )


def compare_observable(
    kind: str,
    label: str,
    unit: str,
    reference: Sample,
    arms: Mapping[str, Sample],
    n_bins: int,
    *,
    seed: int = 0,
) -> Observable:
    """Distribution and moments of one scalar, values (n,) each; a ``dihedral`` in degrees is periodic."""
    columns = {name: arm.with_values(arm.values[:, None]) for name, arm in arms.items()}
    landscape = compare_samples(
        (label,),
        (unit,),
        reference.with_values(reference.values[:, None]),
        columns,
        n_bins,
        period=(-180.0, 180.0) if kind == "dihedral" else None,
        seed=seed,
    )
    compute = _compute_circular_moments if kind == "dihedral" else _compute_moments
    moments = {name: compute(arm) for name, arm in arms.items()}
    return Observable(kind, label, unit, landscape, compute(reference), moments)


def compute_shares(assignment: Sample, n_states: int) -> list[Estimate]:
    """Share of frames in each of ``n_states`` states (values: state indices), with block errors."""
    states, counted = assignment.values.astype(np.intp), assignment.counted
    counts = np.array([np.bincount(states[block], counted[block], n_states) for block in assignment.blocks])
    values, errors = jackknife(lambda n: n / n.sum(axis=-1, keepdims=True), counts)
    return [Estimate(float(v), float(e)) for v, e in zip(values, errors, strict=True)]


def _compute_density(bins: StateBins, counts: FloatArray) -> Density:
    volume = bins.volume.ravel()
    values, errors = jackknife(lambda n: n / (n.sum(axis=-1, keepdims=True) * volume), counts)
    return Density(values.reshape(bins.shape), errors.reshape(bins.shape))


def _sum_blocks(sample: Sample, *columns: FloatArray) -> FloatArray:
    counted = sample.counted
    weighted = [counted, *(counted * column for column in columns)]
    return np.array([[column[block].sum() for column in weighted] for block in sample.blocks])


def _compute_moments(sample: Sample) -> Moments:
    # Centred first: the variance from sums of squares would lose digits of a narrow distribution.
    centre = float(np.average(sample.values, weights=sample.weights))
    shifted = sample.values - centre
    totals = _sum_blocks(sample, shifted, shifted**2)

    def mean(t: FloatArray) -> FloatArray:
        return np.asarray(centre + t[..., 1] / t[..., 0])

    def std(t: FloatArray) -> FloatArray:
        return np.asarray(np.sqrt(np.maximum(t[..., 2] / t[..., 0] - (t[..., 1] / t[..., 0]) ** 2, 0.0)))

    return Moments(estimate(mean, totals), estimate(std, totals))


def _compute_circular_moments(sample: Sample) -> Moments:
    """Mean direction and circular deviation sqrt(-2 ln R) of angles in degrees (Mardia and Jupp, 2000)."""
    angles = np.radians(sample.values)
    centre = float(np.angle(np.average(np.exp(1j * angles), weights=sample.weights)))
    # Measured from the mean direction, so that leaving a block out never crosses the cut at 180 degrees.
    totals = _sum_blocks(sample, np.cos(angles - centre), np.sin(angles - centre))

    def offset(t: FloatArray) -> FloatArray:
        return np.asarray(np.degrees(np.arctan2(t[..., 2], t[..., 1])))

    def std(t: FloatArray) -> FloatArray:
        length = np.clip(np.hypot(t[..., 1], t[..., 2]) / t[..., 0], 1e-12, 1.0)
        return np.asarray(np.degrees(np.sqrt(-2.0 * np.log(length))))

    return Moments(Estimate(float(np.degrees(centre)), estimate(offset, totals).error), estimate(std, totals))
