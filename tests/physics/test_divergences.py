"""Divergences, block errors and slow modes against values known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from openmm_hvpcg.analysis.distributions import Sample, compare_samples
from openmm_hvpcg.analysis.divergences import (
    build_bins,
    compute_js,
    compute_kl,
    compute_sampling_floor,
    estimate,
    jackknife,
    split_blocks,
)
from openmm_hvpcg.analysis.slow_modes import fit_slow_modes
from openmm_hvpcg.errors import InputError


def one_block(values: np.ndarray) -> list[np.ndarray]:
    return [np.arange(len(values))]


def simulate_ou(n_frames: int, correlation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Independent AR(1) columns of unit variance; their lag-one correlation is exact."""
    x = rng.normal(size=(n_frames, len(correlation)))
    for t in range(1, n_frames):
        x[t] = correlation * x[t - 1] + np.sqrt(1 - correlation**2) * x[t]
    return x


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (1.0, 1.0), (0.3, 1.5)])
def test_gaussians(shift: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    reference, model = rng.normal(size=(n, 1)), shift + scale * rng.normal(size=(n, 1))
    bins = build_bins(reference, [model], 60)
    p, q = (bins.count_blocks(v, one_block(v))[0] for v in (reference, model))
    kl = np.log(scale) + (1 + shift**2) / (2 * scale**2) - 0.5

    def js_density(x: float) -> float:
        a, b = norm.pdf(x), norm.pdf(x, shift, scale)
        return 0.5 * (a * np.log(2 * a / (a + b)) + b * np.log(2 * b / (a + b)))

    js = quad(js_density, -8, 8)[0]
    # Bins of 0.15 standard deviations lose a share of about width^2 / 12 = 0.2 %; the sampling error is
    # sqrt(2 KL / n) = 0.003 at most (5 times the standard error of the log ratio's mean is 0.01) and the bias
    # of 60 bins is 60 / n = 3e-4: together below 0.012. The seed is fixed.
    assert compute_kl(p, q, bins.inside.ravel()) == pytest.approx(kl, abs=0.012)
    assert compute_js(p, q) == pytest.approx(js, abs=0.004)


def test_equal_counts_have_no_divergence() -> None:
    counts = np.random.default_rng(1).integers(0, 50, size=40).astype(float)
    # Rounding of sums of 40 terms of order one.
    assert compute_kl(counts, counts) == pytest.approx(0.0, abs=1e-14)
    assert compute_js(counts, counts) == pytest.approx(0.0, abs=1e-14)
    assert compute_kl(counts, 3 * counts) < 1e-3  # other sizes, same distribution: only the pseudo-count differs


def test_kl_stays_finite_and_js_is_bounded() -> None:
    p, q = np.array([100.0, 0.0]), np.array([0.0, 100.0])
    floor = 0.5 / 101  # one pseudo-frame shared by two bins
    expected = (1 - floor) * np.log((1 - floor) / floor) + floor * np.log(floor / (1 - floor))
    # Exact formulas: rounding only.
    assert compute_kl(p, q) == pytest.approx(expected, rel=1e-12)
    assert compute_js(p, q) == pytest.approx(np.log(2), rel=1e-12)


def test_samples_beyond_the_reference_are_counted() -> None:
    rng = np.random.default_rng(2)
    reference = rng.uniform(size=(5000, 1))
    model = np.concatenate([reference[:2500], np.full((2400, 1), 1.3), np.full((100, 1), 1e6)])
    bins = build_bins(reference, [model], 20)
    counts = bins.count_blocks(model, one_block(model))[0]
    assert counts.sum() == len(model)
    assert counts[~bins.inside].sum() == 2500
    assert bins.inside.sum() == 20
    assert len(bins.inside) <= 20 + 2 * 10  # the range of a runaway model does not grow without end
    p = bins.count_blocks(reference, one_block(reference))[0]
    # Half of the model is elsewhere, the other half is right: KL = ln 2, JS = that of p against (p + p') / 2
    # with p' disjoint. Sampling of 2500 frames over 20 bins adds 20 / 2500 = 0.008 at most.
    assert compute_kl(p, counts, bins.inside) == pytest.approx(np.log(2), abs=0.01)
    js = 0.5 * (np.log(1 / 0.75) + 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(2))
    assert compute_js(p, counts) == pytest.approx(js, abs=0.01)


def test_an_arm_does_not_change_with_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    walker = np.repeat(np.arange(4), 250)
    blocks = split_blocks(walker, 4)
    reference = Sample(rng.normal(size=(1000, 2)), blocks)
    good, runaway = (Sample(rng.normal(size=(1000, 2)) * s, blocks) for s in (1.1, 40.0))
    alone = compare_samples(("x", "y"), ("", ""), reference, {"good": good}, 15)
    both = compare_samples(("x", "y"), ("", ""), reference, {"good": good, "bad": runaway}, 15)
    # The same counts in more, empty, cells: rounding only.
    assert both.kl["good"].value == pytest.approx(alone.kl["good"].value, rel=1e-10)
    assert both.js["good"].value == pytest.approx(alone.js["good"].value, rel=1e-10)
    assert both.kl_floor == pytest.approx(alone.kl_floor, rel=1e-10)
    assert both.outside["bad"] > 0.9


def test_jackknife_of_a_mean_is_the_standard_error() -> None:
    blocks = np.random.default_rng(4).normal(size=10)
    totals = np.stack([np.ones(10), blocks], axis=1)
    value, error = jackknife(lambda t: t[..., 1] / t[..., 0], totals)
    # An identity for equal blocks: rounding only.
    assert value == pytest.approx(blocks.mean(), rel=1e-12)
    assert error == pytest.approx(blocks.std(ddof=1) / np.sqrt(10), rel=1e-12)


def test_one_block_has_no_known_error() -> None:
    assert np.isnan(estimate(lambda t: t[..., 1] / t[..., 0], np.array([[4.0, 2.0]])).error)


def test_block_errors_agree_with_independent_repeats() -> None:
    """The mean block error of KL and JS against their spread over 60 repeats of correlated samples."""
    rng = np.random.default_rng(5)
    walker, n_repeats = np.repeat(np.arange(8), 400), 60
    blocks = split_blocks(walker, 8)
    found = []
    for _ in range(n_repeats):
        # 16 series of 400 frames with a correlation time of 5 frames, the model's shifted by 0.6.
        x = simulate_ou(400, np.full(16, np.exp(-0.2)), rng)
        reference, model = (Sample(part.T.reshape(-1, 1), blocks) for part in (x[:, :8], 0.6 + x[:, 8:]))
        landscape = compare_samples(("x",), ("",), reference, {"m": model}, 15)
        found.append([landscape.kl["m"], landscape.js["m"]])
    for k in range(2):
        values = np.array([row[k].value for row in found])
        errors = np.array([row[k].error for row in found])
        # The spread of 60 repeats is known to 9 % and the mean of 60 errors of 7 degrees of freedom to 4 %;
        # the jackknife itself is good to some 20 % on a nonlinear figure. 0.6 to 1.6 leaves 4 standard
        # errors: the false-alarm rate is below 1e-3 (and the seed is fixed).
        assert 0.6 < np.sqrt((errors**2).mean()) / values.std(ddof=1) < 1.6


def test_blocks_are_contiguous_and_stay_in_one_walker() -> None:
    walker = np.repeat([7, 3], [60, 40])
    blocks = split_blocks(walker, 5)
    assert len(blocks) == 5
    assert sorted(np.concatenate(blocks).tolist()) == list(range(100))
    for block in blocks:
        assert len(set(walker[block].tolist())) == 1
        assert (np.diff(block) == 1).all()
    assert [len(b) for b in split_blocks(np.repeat(np.arange(8), 10), 5)] == [10] * 8


def test_sampling_floor_sees_a_stuck_walker() -> None:
    mixed = np.full((6, 2), 50.0)
    stuck = np.array([[100.0, 0.0]] * 3 + [[0.0, 100.0]] * 3)
    assert compute_sampling_floor(compute_kl, mixed) == pytest.approx(0.0, abs=1e-12)  # equal halves: rounding
    assert compute_sampling_floor(compute_kl, stuck) > 0.3
    many = np.random.default_rng(6).integers(1, 50, size=(20, 10)).astype(float)
    assert compute_sampling_floor(compute_kl, many, 1) == compute_sampling_floor(compute_kl, many, 1)
    with pytest.raises(InputError, match="at least 2 blocks"):
        compute_sampling_floor(compute_kl, np.ones((1, 4)))


def test_tica_finds_the_slow_coordinate_and_its_timescale() -> None:
    rng = np.random.default_rng(7)
    interval_ps, timescale_ps = 0.5, 20.0
    fast = np.exp(-interval_ps / np.array([2.0, 1.0, 0.5]))
    rates = np.concatenate([[np.exp(-interval_ps / timescale_ps)], fast])
    trajectories = [simulate_ou(10_000, rates, rng) for _ in range(2)]
    mixing = rng.normal(size=(4, 7))  # seven redundant features of four coordinates
    mixing[0] *= 0.2  # the slow one is not the one of largest variance
    constant = np.full((10_000, 1), 3.0)
    features = [np.hstack([x @ mixing, constant]) for x in trajectories]
    modes = fit_slow_modes(features, 4, interval_ps)
    assert modes.n_dimensions == 4
    projected = modes.project(np.concatenate(features))
    truth = np.concatenate(trajectories)[:, 0]
    # 250 correlation times of 40 frames each: a direction is off by about (fast/slow) / sqrt(250) < 0.03.
    assert abs(np.corrcoef(projected[:, 0], truth)[0, 1]) > 0.99
    # Unit variance up to the first and last lag frames, which weigh half: 4 / 10000.
    assert projected.std(axis=0) == pytest.approx([1.0, 1.0], abs=2e-3)
    # The rate of an OU process from N correlation times is known to sqrt(2 / N) with N = 500: 6 %; 4 sigma.
    assert modes.timescales_ps[0] == pytest.approx(timescale_ps, rel=0.25)
    assert modes.timescales_ps[1] == pytest.approx(2.0, rel=0.25)


def test_tica_of_a_two_state_jump_process() -> None:
    rng = np.random.default_rng(8)
    leave = np.array([0.02, 0.01])
    state, states = 0, np.empty(40_000, dtype=int)
    for t, u in enumerate(rng.random(len(states))):
        state = 1 - state if u < leave[state] else state
        states[t] = state
    features = states[:, None] * np.array([1.0, -0.5]) + 0.3 * rng.normal(size=(len(states), 2))
    modes = fit_slow_modes([features], 10, 1.0)
    # The jump matrix has eigenvalue 1 - 0.03; noise in the features lowers the eigenvalue by the share of the
    # mode's variance that is noise, s = 0.09 / (0.09 + 1.25 * 2/9) = 0.245, so that -lag / ln((1 - s)
    # lambda^lag):
    noise = 0.09 / (0.09 + 1.25 * leave[0] * leave[1] / leave.sum() ** 2)
    expected = -10 / np.log((1 - noise) * (1 - leave.sum()) ** 10)
    # 400 transitions each way: the eigenvalue's rate is known to 5 %; 4 sigma.
    assert modes.timescales_ps[0] == pytest.approx(expected, rel=0.2)
    projected = modes.project(features)[:, 0]
    gap = abs(projected[states == 1].mean() - projected[states == 0].mean())
    assert gap > 1.5  # unit variance, two wells: far more apart than the noise within each


def test_lag_never_crosses_walkers() -> None:
    """Walkers that sit still at different places: pairs across walkers alone would show decay."""
    rng = np.random.default_rng(9)
    trajectories = [np.full((12, 1), float(w)) + 1e-3 * rng.normal(size=(12, 1)) for w in range(30)]
    modes = fit_slow_modes(trajectories, 10, 1.0)
    assert modes.n_pairs == 60
    # Within a walker the lagged correlation is 1 - 1e-6 / 75, so the timescale is above 1e8 ps; pairs across
    # walkers (290 of 350 pairs) would bring it to a few thousand ps.
    assert np.isnan(modes.timescales_ps[0]) or modes.timescales_ps[0] > 1e6


@pytest.mark.parametrize("lengths", [[10, 10], [15, 14]])
def test_reference_too_short_for_the_lag(lengths: list[int]) -> None:
    rng = np.random.default_rng(10)
    with pytest.raises(InputError, match=r"too short for the TICA lag.*lag_frames"):
        fit_slow_modes([rng.normal(size=(n, 3)) for n in lengths], 10, 1.0)


def test_few_frames_reduce_the_dimension() -> None:
    rng = np.random.default_rng(11)
    modes = fit_slow_modes([rng.normal(size=(60, 40))], 10, 1.0)
    assert modes.n_dimensions == 5  # 50 pairs, ten for each dimension


def test_constant_features_are_refused() -> None:
    with pytest.raises(InputError, match="no feature of the reference varies"):
        fit_slow_modes([np.ones((100, 3))], 5, 1.0)
