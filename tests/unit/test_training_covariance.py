"""Covariances pooled in local axes: the axes, the estimate against known covariances, and the whitening."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from training_cases import REST

from openmm_hvpcg.training.covariance import PooledCovariance, choose_axes

N = 3 * len(REST)


def turn(x: Tensor, seed: int) -> Tensor:
    """Each frame turned about the origin its own way."""
    return x @ torch.from_numpy(Rotation.random(len(x), rng=np.random.default_rng(seed)).as_matrix())


def sample_beads(n_frames: int, seed: int = 0, switch: np.ndarray | float = 0.0) -> Tensor:
    """Frames of the test molecule (F, 5, 3), each turned; ``switch`` nm moves bead 4, a soft coordinate."""
    rng = np.random.default_rng(seed)
    x = REST + 0.01 * rng.standard_normal((n_frames, *REST.shape))
    x[:, 4, 2] += switch
    return turn(torch.from_numpy(x), seed)


def build_covariance(seed: int, condition: float) -> Tensor:
    """Symmetric (15, 15) with eigenvalues from 1e4 to ``condition`` times that, (kJ/mol/nm)^2."""
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((N, N)))[0]
    return torch.from_numpy((q * 1e4 * np.geomspace(1, condition, N)) @ q.T)


def add_noise(axes: Tensor, covariances: Tensor, seed: int) -> Tensor:
    """Force residuals (F, B, 3) with covariance (15, 15) or (F, 15, 15) in axes (F, B, 3, 3)."""
    z = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(axes), N, 1)))
    local = (torch.linalg.cholesky(covariances) @ z).reshape(len(axes), -1, 3)
    return torch.einsum("tbix,tbi->tbx", axes, local)


def get_matrices(pooled: PooledCovariance, x: Tensor, axes: Tensor) -> Tensor:
    """What ``apply`` applies, in local axes (F, 15, 15)."""
    unit = torch.eye(N, dtype=torch.float64).reshape(1, N, -1, 3)
    probes = torch.einsum("tbix,kpbi->tpbx", axes, unit)
    return torch.einsum("tbix,tpbx->tpbi", axes, pooled.apply(x, probes)).flatten(2)


def test_axes_are_right_handed_and_turn_with_the_molecule():
    x = sample_beads(50)
    axes = choose_axes(x)
    found = axes(x)
    # Products of unit vectors in double precision.
    unit = torch.eye(3, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found @ found.transpose(-1, -2), unit, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(50, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    rotation = torch.from_numpy(Rotation.random(rng=np.random.default_rng(3)).as_matrix())
    torch.testing.assert_close(axes(x @ rotation + 7.0), found @ rotation, rtol=0, atol=1e-12)


def test_mirror_image_is_another_molecule():
    """The first two axes are mirrored, the third is not: what points to the left of the molecule points right."""
    x = sample_beads(50)
    axes = choose_axes(x)
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    found, mirrored = axes(x), axes(x @ mirror)
    torch.testing.assert_close(torch.linalg.det(mirrored), torch.ones(50, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(mirrored[:, :, :2], found[:, :, :2] @ mirror, rtol=0, atol=1e-12)
    torch.testing.assert_close(mirrored[:, :, 2], -found[:, :, 2] @ mirror, rtol=0, atol=1e-12)
    # A covariance that couples the third axis to the others is told apart.
    pooled = PooledCovariance(x, 1, seed=0)
    pooled.fit(x, add_noise(found, build_covariance(0, 30.0), 1))
    v = torch.from_numpy(np.random.default_rng(2).standard_normal((50, 1, 5, 3)))
    confused = pooled.apply(x, v) @ mirror
    assert float((pooled.apply(x @ mirror, v @ mirror) - confused).norm()) > 0.1 * float(confused.norm())


def test_axes_stay_clear_of_lines():
    rng = np.random.default_rng(0)
    shake = 0.001 * rng.standard_normal((100, 4, 3))
    line = np.array([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.3, 0, 0]])
    # 0.001 nm in 0.1 nm: sines of 0.01, below the least that counts.
    assert choose_axes(torch.from_numpy(line + shake)) is None
    assert choose_axes(torch.from_numpy((line + shake)[:, :2])) is None
    bent = line.copy()
    bent[3, 1] = 0.1
    axes = choose_axes(torch.from_numpy(bent + shake))
    # Beads 0, 1 and 2 are on a line: none of them is seen from the other two alone.
    assert all(3 in (int(axes.first[b]), int(axes.second[b])) for b in range(3))
    for frames in (line + shake, shake[:, :2]):
        with pytest.raises(ValueError, match="no local axes"):
            PooledCovariance(torch.from_numpy(frames), 2, seed=0)


def test_frame_on_a_line_by_chance_is_not_nan():
    x = sample_beads(200)
    x[7] = torch.tensor([[0.125 * k, 0.0, 0.0] for k in range(5)])
    axes = choose_axes(x)
    pooled = PooledCovariance(x, 2, seed=0)
    pooled.fit(x, torch.from_numpy(np.random.default_rng(0).standard_normal((200, 5, 3))))
    assert axes(x).isfinite().all()
    assert pooled.regions.isfinite().all()
    assert pooled.apply(x, torch.ones(200, 1, 5, 3)).isfinite().all()
    assert pooled.whiten(x).isfinite().all()


@pytest.mark.parametrize("error", [0.0, 1e4], ids=["exact model", "model with an error"])
@pytest.mark.parametrize("n_regions", [1, 4])
def test_covariance_constant_in_local_axes_is_recovered(n_regions, error):
    """From 3000 turned frames, with and without a model error a hundred times the noise that is linear in distances.

    120 distinct elements, normal noise: each within 5.5 standard errors sqrt((C_ii C_jj + C_ij^2) / n): false-alarm
    rate 5e-6. The regression takes at most 19 of the 3000 degrees of freedom: 0.3 % of n. A frame's weights in four
    regions change with its vibration, so that n is 3000 on average over the frames, not for each: twice the error.
    """
    n_frames = 3000
    x = sample_beads(n_frames)
    axes = choose_axes(x)(x)
    exact = build_covariance(1, 30.0)
    residual = add_noise(axes, exact, 2)
    distances = torch.cdist(x, x).flatten(1)
    distances = (distances - distances.mean(0)) / distances.std(0).clamp(min=1e-9)
    slopes = error * torch.from_numpy(np.random.default_rng(3).standard_normal((25, N))) / 5.0
    residual = residual + torch.einsum("tbix,tbi->tbx", axes, (distances @ slopes).reshape(n_frames, 5, 3))
    pooled = PooledCovariance(x, n_regions, seed=0)
    assert len(pooled.regions) == n_regions
    pooled.fit(x, residual)
    found = get_matrices(pooled, x[::30], axes[::30]).mean(0)
    variances = exact.diagonal()
    spread = torch.sqrt((variances[:, None] * variances + exact**2) / n_frames)
    assert float(((found - exact).abs() / spread).max()) < (5.5 if n_regions == 1 else 11.0)
    # The size as a whole: the trace has a relative error of sqrt(2 |C|^2 / n) / tr C = 1 %.
    size = float(torch.sqrt(2 * (exact**2).sum() / n_frames) / exact.trace())
    assert abs(float(found.trace() / exact.trace()) - 1) < 5 * size < 0.06


def test_covariance_turns_with_the_molecule_and_is_symmetric():
    x = sample_beads(300)
    pooled = PooledCovariance(x, 3, seed=0)
    pooled.fit(x, torch.from_numpy(np.random.default_rng(1).standard_normal((300, 5, 3))))
    u, v = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 300, 4, 5, 3)))
    found = pooled.apply(x, v)
    rotation = torch.from_numpy(Rotation.random(rng=np.random.default_rng(3)).as_matrix())
    # Double-precision rounding of numbers of size 1.
    torch.testing.assert_close(pooled.apply(x @ rotation + 2.0, v @ rotation), found @ rotation, rtol=0, atol=1e-10)
    torch.testing.assert_close((u * found).sum((2, 3)), (v * pooled.apply(x, u)).sum((2, 3)), rtol=0, atol=1e-10)
    assert ((v * found).sum((2, 3)) > 0).all()
    white = pooled.whiten(x)
    torch.testing.assert_close(white, white.transpose(1, 2), rtol=0, atol=1e-10)
    turned = pooled.whiten(x @ rotation + 2.0)
    both = torch.block_diag(*[rotation] * 5)
    torch.testing.assert_close(turned, both.T @ white @ both, rtol=0, atol=1e-10)
    # Labels are float32, and stay so.
    assert pooled.apply(x.float(), v.float()).dtype == pooled.whiten(x.float()).dtype == torch.float32


def test_regions_follow_a_soft_coordinate():
    """Two states 0.2 nm apart, with covariances that differ by a factor of nine: four regions know which is where.

    An estimate from 2000 frames has a relative error (Frobenius) of sqrt(((tr C)^2 / |C|^2 + 1) / 2000) = 7 %, and two
    such regions, or one split in three, hold 50 of 2050 or of 720 frames of the overall mean, which is 4.3 times the
    weak covariance off: 10 to 30 %. One region has the mean of both everywhere.
    """
    n_frames = 4000
    state = np.random.default_rng(5).integers(0, 2, n_frames)
    x = sample_beads(n_frames, switch=0.2 * state)
    axes = choose_axes(x)(x)
    weak, strong = build_covariance(1, 10.0), 9 * build_covariance(2, 10.0)
    covariances = torch.stack([weak, strong])[torch.from_numpy(state)]
    some, is_weak = slice(0, None, 40), torch.from_numpy(state[::40] == 0)
    errors = {}
    for n_regions in (1, 4):
        pooled = PooledCovariance(x, n_regions, seed=0)
        pooled.fit(x, add_noise(axes, covariances, 6))
        off = get_matrices(pooled, x[some], axes[some]) - covariances[some]
        errors[n_regions] = off.flatten(1).norm(dim=1) / covariances[some].flatten(1).norm(dim=1)
    assert float(errors[4].max()) < 0.35
    assert float(errors[1][is_weak].min()) > 2.0
    assert float(errors[1][~is_weak].min()) > 0.4


def test_whitening_whitens():
    """Fresh noise of condition 10, whitened: equal variances without correlation, but for the floor.

    The floor leaves a direction of variance w (in units of the mean) w / (w + 0.1): 0.72 to 0.96 here. 3000 frames add
    sqrt(15 / 3000) = 7 % to the extreme eigenvalues on either side, and as much comes from the fit.
    """
    exact = build_covariance(1, 10.0)
    x, fresh = sample_beads(3000), sample_beads(3000, seed=9)
    pooled = PooledCovariance(x, 1, seed=0)
    axes = pooled.axes(fresh)
    pooled.fit(x, add_noise(pooled.axes(x), exact, 2))
    white = pooled.whiten(fresh)
    residual = add_noise(axes, exact, 10)
    # "Mean diagonal of its square 1": exact, so that whitened residuals are as large as they were on the whole.
    assert float((white @ white).diagonal(dim1=1, dim2=2).mean()) == pytest.approx(1.0, rel=1e-9)
    whitened = (white @ residual.flatten(1)[:, :, None]).reshape(3000, 5, 3)
    local = torch.einsum("tbix,tbx->tbi", axes, whitened).flatten(1)
    values = torch.linalg.eigvalsh(local.T @ local / len(local))
    assert float(values[-1] / values[0]) < 0.96 / 0.72 * 1.3 < 2.0
    raw = torch.einsum("tbix,tbx->tbi", axes, residual).flatten(1)
    assert float(torch.linalg.cond(raw.T @ raw)) > 7.0
    mean = exact.trace() / N
    shares = torch.linalg.eigvalsh(exact) / mean
    expected = mean * (shares / (shares + 0.1)).mean() / (1 / (shares + 0.1)).mean()
    # Two traces of 15 * 3000 squares each: 1 %.
    assert float(values.mean()) == pytest.approx(float(expected), rel=0.05)


def test_regions_are_the_same_for_the_same_seed():
    x = sample_beads(500)
    centres = [PooledCovariance(x, 4, seed=s).centres for s in (1, 1, 2)]
    assert torch.equal(centres[0], centres[1])
    assert not torch.equal(centres[0], centres[2])
    # Twenty frames a region at the least.
    assert len(PooledCovariance(x[:45], 4, seed=0).centres) == 2
