"""The covariance that follows the Hessian: against known ones, where it does and where it only seems to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from test_training_covariance import N, add_noise, build_covariance, sample_beads
from torch import Tensor

from openmm_hvpcg.training.covariance import PooledCovariance, choose_axes
from openmm_hvpcg.training.hessian_ratio import HessianRatio, find_share

BETA = 0.4
N_FRAMES, N_PROBES = 6000, 2
#: Of the Hessian, what hidden atoms take away from the curvature.
TAKEN = 0.8


class Sample:
    """Frames whose Hessian grows with a soft coordinate, and has a part that the beads do not tell.

    In local axes it is ``g h P``, with g from 0.5 to 1.5 along the soft coordinate, and h by chance; the covariance is
    ``TAKEN g^power h P / beta``: frames that happen to be stiffer have larger forces, whatever the beads do.
    """

    def __init__(self, power: float, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        soft = rng.uniform(-1.0, 1.0, N_FRAMES)
        self.positions = sample_beads(N_FRAMES, seed, switch=0.1 * soft)
        self.axes = choose_axes(self.positions[:2000])(self.positions)
        self.told, chance = torch.from_numpy(1.0 + 0.5 * soft), torch.from_numpy(rng.uniform(0.4, 1.6, N_FRAMES))
        self.hessian = build_covariance(2, 20.0)
        self.covariance = TAKEN / BETA * self.told[:, None, None] ** power * self.hessian
        self.residuals = add_noise(self.axes, chance[:, None, None] * self.covariance, seed + 1)
        signs = torch.from_numpy(2.0 * rng.integers(0, 2, (N_FRAMES, N_PROBES, N)) - 1.0)
        self.probes = self.turn_back(signs)
        self.hvps = self.turn_back((self.told * chance)[:, None, None] * (signs @ self.hessian))

    def turn_back(self, local: Tensor) -> Tensor:
        return torch.einsum("tbix,tpbi->tpbx", self.axes, local.reshape(N_FRAMES, -1, N // 3, 3))

    def expect(self) -> Tensor:
        """The covariance times the probes."""
        local = torch.einsum("tbix,tpbx->tpbi", self.axes, self.probes).flatten(2)
        return self.turn_back(local @ self.covariance)


def pool(sample: Sample) -> tuple[PooledCovariance, HessianRatio, float]:
    """Pooled over one region; how it follows the Hessian; and the share that is found, whatever it is."""
    pooled = PooledCovariance(sample.positions, 1, seed=0)
    left = pooled.fit(sample.positions, sample.residuals)
    ratio = HessianRatio.build(pooled, sample.positions, sample.probes, sample.hvps, seed=0)
    top, bottom = ratio.regress(pooled, sample.positions, left)
    ratio.share = find_share([(top, bottom)])
    return pooled, ratio, top / bottom


def compute_change(sample: Sample, pooled: PooledCovariance, ratio: HessianRatio) -> Tensor:
    off = ratio.subtract_means(pooled, sample.positions, sample.probes, sample.hvps)
    return ratio.compute_change(pooled, sample.positions, off)


def measure_error(sample: Sample, pooled: PooledCovariance, products: Tensor) -> float:
    """Relative error of the mean covariance of each tenth along the soft coordinate, from covariances times probes."""
    v = pooled.turn(sample.positions, sample.probes)
    error, exact = (
        torch.einsum("tpi,tpj->tij", pooled.turn(sample.positions, a), v) / N_PROBES
        for a in (products - sample.expect(), sample.expect())
    )
    tenths = torch.argsort(sample.told).chunk(10)
    both = [torch.stack([a[rows].mean(0) for rows in tenths]).norm() for a in (error, exact)]
    return float(both[0] / both[1])


def test_covariance_follows_the_hessian_that_the_beads_tell():
    """Twelve seeds gave shares of 1.00 +- 0.06, and errors of 28 % (the spread of g) and 6.8 +- 0.5 %: 5 sigma."""
    sample = Sample(1.0)
    pooled, ratio, share = pool(sample)
    assert share == pytest.approx(1.0, abs=0.33)
    plain = pooled.apply(sample.positions, sample.probes)
    assert measure_error(sample, pooled, plain) > 0.25
    assert measure_error(sample, pooled, plain + compute_change(sample, pooled, ratio)) < 0.1


def test_stiffness_that_the_beads_do_not_tell_is_no_reason():
    """Twelve seeds gave 0.02 +- 0.07: 5 sigma; and the slope along all of the Hessian's spread would be 0.6."""
    sample = Sample(0.0)
    pooled, ratio, share = pool(sample)
    assert abs(share) < 0.37
    left = pooled.fit(sample.positions, sample.residuals)
    ratio.told = ratio.deviations
    assert find_share([ratio.regress(pooled, sample.positions, left)]) > 0.45


def test_change_turns_with_the_molecule_and_grows_with_the_share():
    sample = Sample(1.0)
    pooled, ratio, _ = pool(sample)
    ratio.share = 1.0
    x, v = sample.positions[:50], sample.probes[:50]
    rotation = torch.from_numpy(Rotation.random(rng=np.random.default_rng(3)).as_matrix())
    found = ratio.compute_change(pooled, x, v)
    assert float(found.abs().max()) > 0
    # Double-precision rounding.
    turned = ratio.compute_change(pooled, x @ rotation + 2.0, v @ rotation)
    torch.testing.assert_close(turned, found @ rotation, rtol=0, atol=1e-9 * float(found.abs().max()))
    ratio.share = 0.25
    torch.testing.assert_close(ratio.compute_change(pooled, x, v), 0.25 * found)
    # With a share of one the covariance is that of the Hessian's size: D takes the mean Hessian to the mean covariance.
    matrices = ratio.compute_matrices(pooled)
    torch.testing.assert_close(matrices @ ratio.means, pooled.regions, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("terms", "share"),
    [([(1.0, 2.0), (2.0, 4.0)], 0.5), ([(9.0, 2.0)], 1.0), ([(-1.0, 2.0)], 0.0), ([(1.0, 0.0)], 0.0), ([], 0.0)],
)
def test_share_is_of_all_molecules_together(terms, share):
    assert find_share(terms) == share
