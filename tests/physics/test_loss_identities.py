"""The whole loss against what the theory note says of it: gradient, expectation over probes, bias."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from harmonic import KT, build_network, slice_map
from torch import Tensor

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.training import density as density_module
from openmm_hvpcg.training.density import compute_density_labels
from openmm_hvpcg.training.derivatives import compute_forces, compute_forces_and_hvps
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.training.losses import (
    LossScales,
    compute_density_excess,
    compute_hvp_target,
    density_loss,
    force_loss,
    hvp_loss,
)
from openmm_hvpcg.training.models.registry import build_base as build_schnet
from openmm_hvpcg.training.projection import LinkProjector

BETA = 0.4
SCALES = LossScales(force=300.0, hvp=2e5)
METHODS = ["reverse", "forward"]
EnergyFunction = Callable[[Tensor], Tensor]


def build_energy(n_beads: int) -> tuple[torch.nn.Module, EnergyFunction]:
    """A small random SchNet in double."""
    torch.manual_seed(3)
    network = build_schnet(2, ModelSettings(features=3, interactions=1, radial=4, cutoff_nm=0.6), 2.5).double()
    for parameter in network.readout[-1].parameters():
        torch.nn.init.normal_(parameter)
    species = torch.arange(n_beads) % 2
    return network, lambda x: network(x, species)


def draw_labels(n_frames: int, n_probes: int, n_beads: int) -> tuple[Tensor, ...]:
    """Positions, projected forces, probes and HVPs of symmetric matrices, all random; and the matrices."""
    rng = np.random.default_rng(4)
    line = np.cumsum(0.15 + 0.02 * rng.standard_normal((n_frames, n_beads, 3)), axis=1)
    forces = 20 * rng.standard_normal((n_frames, n_beads, 3))
    probes = rng.standard_normal((n_frames, n_probes, n_beads, 3))
    n = 3 * n_beads
    matrices = 300 * rng.standard_normal((n_frames, n, n))
    matrices = matrices + matrices.transpose(0, 2, 1)
    hvps = np.einsum("fij,fpj->fpi", matrices, probes.reshape(n_frames, n_probes, n)).reshape(probes.shape)
    return tuple(torch.from_numpy(a) for a in (line, forces, probes, hvps, matrices))


def test_gradient_of_the_whole_loss_by_every_parameter():
    """Central differences in double, with the correction held at the central parameters as the stop-gradient says."""
    network, energy = build_energy(3)
    x, q, v, p, _ = draw_labels(2, 2, 3)
    parameters = list(network.parameters())
    held = q - compute_forces(energy, x)

    def loss(residual: Tensor | None = None, create_graph: bool = False, method: str = "reverse") -> Tensor:
        forces, hvps = compute_forces_and_hvps(energy, x, v, create_graph, method)
        d = q - forces if residual is None else residual
        return 0.7 * force_loss(forces, q, SCALES) + 1.3 * hvp_loss(hvps, p, d, v, BETA, SCALES)

    def differentiate(residual: Tensor | None) -> Tensor:
        h, slopes = 1e-5, []
        for parameter in parameters:
            flat = parameter.data.view(-1)
            for k in range(len(flat)):
                old, values = float(flat[k]), []
                for step in (h, -h):
                    flat[k] = old + step
                    values.append(float(loss(residual)))
                flat[k] = old
                slopes.append((values[0] - values[1]) / (2 * h))
        return torch.tensor(slopes, dtype=torch.float64)

    held_differences, free_differences = differentiate(held), differentiate(None)
    size = float(held_differences.abs().max())
    for method in METHODS:
        exact = torch.autograd.grad(loss(create_graph=True, method=method), parameters, allow_unused=True)
        # The last bias is a constant energy: no gradient at all.
        gradient = torch.cat([torch.zeros(1) if g is None else g.flatten() for g in exact])
        # Step 1e-5: truncation 1e-10 of the third derivative, rounding 1e-16 / 1e-5 of a loss of order one. Both are
        # far below 1e-7 of the largest component.
        torch.testing.assert_close(gradient, held_differences, rtol=0.0, atol=1e-7 * size)
        # Without the hold the differences see the correction move: the test would notice a lost stop-gradient.
        assert float((gradient - free_differences).abs().max()) > 1e-2 * size


def compute_full_loss(energy: EnergyFunction, x: Tensor, q: Tensor, matrices: Tensor) -> Tensor:
    """``mean_F |grad grad U - (Q H Q^T - beta d d^T)|_F^2 / n / scale`` with the whole matrices, d without gradient."""
    n = x[0].numel()
    hessians = [
        torch.autograd.functional.hessian(lambda y: energy(y.reshape(1, -1, 3)).sum(), frame.flatten(), True)
        for frame in x
    ]
    d = (q - compute_forces(energy, x)).flatten(1)
    target = matrices - BETA * d[:, :, None] * d[:, None]
    return ((torch.stack(hessians) - target) ** 2).sum((1, 2)).mean() / n / SCALES.hvp


def estimate(energy: EnergyFunction, x: Tensor, q: Tensor, matrices: Tensor, v: Tensor, method: str) -> Tensor:
    """The HVP loss on probes ``v``."""
    p = torch.einsum("fij,fpj->fpi", matrices, v.flatten(2)).reshape(v.shape)
    forces, hvps = compute_forces_and_hvps(energy, x, v, True, method)
    return hvp_loss(hvps, p, q - forces, v, BETA, SCALES)


@pytest.mark.parametrize("method", METHODS)
def test_rademacher_probes_estimate_the_full_hessian_loss(method):
    """All 2^6 sign vectors of two beads: value and gradient are those of the full matrices, to rounding."""
    network, energy = build_energy(2)
    x, q, _, _, matrices = draw_labels(3, 1, 2)
    signs = 2.0 * ((torch.arange(64)[:, None] >> torch.arange(6)) & 1) - 1.0
    v = signs.double().reshape(1, 64, 2, 3).expand(3, -1, -1, -1)
    assert len({tuple(s.tolist()) for s in signs}) == 64
    full = compute_full_loss(energy, x, q, matrices)
    average = estimate(energy, x, q, matrices, v, method)
    torch.testing.assert_close(average, full, rtol=1e-12, atol=0.0)
    parameters = [p for n, p in network.named_parameters() if n != "readout.2.bias"]  # a constant energy
    for a, b in zip(torch.autograd.grad(average, parameters), torch.autograd.grad(full, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # The average is over probes that differ: one alone would not do.
    assert abs(float((estimate(energy, x, q, matrices, v[:, :1], method) / full).detach()) - 1) > 0.01


def test_normal_probes_estimate_the_full_hessian_loss():
    """z-test of one mean over 4000 probes at 4.5 standard errors: false-alarm rate below 1e-5."""
    _, energy = build_energy(2)
    x, q, _, _, matrices = draw_labels(1, 1, 2)
    v = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 4000, 2, 3)))
    values = []
    p = torch.einsum("fij,fpj->fpi", matrices, v.flatten(2)).reshape(v.shape)
    forces, hvps = compute_forces_and_hvps(energy, x, v, method="forward")
    for k in range(v.shape[1]):
        one = slice(k, k + 1)
        values.append(float(hvp_loss(hvps[:, one], p[:, one], q - forces, v[:, one], BETA, SCALES)))
    error = np.std(values) / np.sqrt(len(values))
    full = float(compute_full_loss(energy, x, q, matrices).detach())
    # The test has teeth: the error is a small part of the value.
    assert error < 0.03 * full
    assert abs(np.mean(values) - full) < 4.5 * error


class ConditionalEnsemble:
    """Labels of a harmonic network at one configuration R of its beads, with the rest averaged over.

    The rest is normal around its conditional mean, so the points ``mean +- sqrt(n) L_k`` (L: Cholesky factor of the
    covariance of its n coordinates) have the mean and covariance of the ensemble. The target is quadratic in them: its
    mean over these points is the ensemble's, exactly.
    """

    BEADS = (1, 4, 6)

    def __init__(self) -> None:
        network = build_network(8)
        rest = np.setdiff1d(np.arange(8), self.BEADS)
        rng = np.random.default_rng(6)
        beads = 0.05 * rng.standard_normal((3, 3))
        soft = network.stiffness[np.ix_(rest, rest)]
        mean = -np.linalg.solve(soft, network.stiffness[np.ix_(rest, self.BEADS)] @ beads)
        factor = np.kron(np.linalg.cholesky(KT * np.linalg.inv(soft)), np.eye(3))
        n = len(factor)
        offsets = np.sqrt(n) * np.concatenate([factor.T, -factor.T]).reshape(2 * n, len(rest), 3)
        positions = np.zeros((2 * n, 8, 3))
        positions[:, list(self.BEADS)] = beads
        positions[:, rest] = mean + offsets
        weights = slice_map(8, list(self.BEADS))
        probes = np.broadcast_to(rng.standard_normal((1, 2, 3, 3)), (2 * n, 2, 3, 3))
        with ForceOracle(network.system, "Reference") as oracle:
            forces = weights @ oracle(positions)
            hvps = compute_projected_hvps(oracle, positions, probes, weights, 1e-3)
        exact = network.compute_cg_stiffness(weights)
        self.error = torch.from_numpy(rng.standard_normal((3, 3)))
        self.forces, self.probes, self.hvps = (torch.from_numpy(np.array(a)) for a in (forces, probes, hvps))
        self.true_force = torch.from_numpy(-exact @ beads)
        self.expected = torch.from_numpy(np.einsum("bc,pcx->pbx", exact, probes[0]))

    def compute_bias(self, error: Tensor) -> Tensor:
        """Mean target minus the PMF's HVP (P, B, 3) for a model whose force lacks ``error`` of the mean force."""
        residual = self.forces - (self.true_force - error)
        return compute_hvp_target(self.hvps, residual, self.probes, 1 / KT).mean(0) - self.expected


@pytest.fixture(scope="module")
def ensemble() -> ConditionalEnsemble:
    return ConditionalEnsemble()


def test_exact_model_has_an_unbiased_target(ensemble):
    # Forces of 1e3 in double over a step of 1e-3 nm: HVPs right to about 1e-9 of their size.
    torch.testing.assert_close(ensemble.forces.mean(0), ensemble.true_force, rtol=0.0, atol=1e-8)
    bias = ensemble.compute_bias(torch.zeros(3, 3))
    assert float(bias.abs().max()) < 1e-8 * float(ensemble.expected.abs().max())
    # Both parts of the target take part: the correction is no small thing here.
    correction = (ensemble.hvps.mean(0) - ensemble.expected).abs().max()
    assert float(correction) > 0.1 * float(ensemble.expected.abs().max())


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0, 1000.0])
def test_bias_is_second_order_in_the_force_error(ensemble, size):
    """``E[t(v) | R] - grad grad W v = -beta e (e . v)``: one formula over three decades of |e|, kJ/mol/nm."""
    e = size * ensemble.error
    expected = -(1 / KT) * (ensemble.probes[0] * e).sum((1, 2))[:, None, None] * e
    # The HVPs' error above, 1e-8 of some 1e4 kJ/mol/nm^2, is what the smallest bias (about 0.4) has to stand out from.
    torch.testing.assert_close(ensemble.compute_bias(e), expected, rtol=1e-6, atol=1e-4)
    # A first-order term would be odd in e.
    torch.testing.assert_close(ensemble.compute_bias(-e), expected, rtol=1e-6, atol=1e-4)


#: Beads that each move in a quadratic well of their own, kJ/mol/nm^2, around these places.
WELL = 2000.0
PLACES = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0], [0.1, 0.2, 0.05]], dtype=torch.float64)


def draw_from_wells(n_frames: int, heat: float = 1.0) -> tuple[Tensor, Tensor]:
    """Positions with density exp(-W / heat kT), exactly, and their mean forces -grad W."""
    rng = np.random.default_rng(7)
    moved = torch.from_numpy(rng.standard_normal((n_frames, 3, 3))) * (heat / BETA / WELL) ** 0.5
    return PLACES + moved, -WELL * moved


BONDS = torch.tensor([[0, 1], [1, 2]])


def test_bonds_are_removed_and_nothing_else():
    """The projector is symmetric and idempotent, takes out as many directions as there are bonds, and leaves turns."""
    x, _ = draw_from_wells(4)
    unit = torch.eye(9, dtype=torch.float64).reshape(1, 9, 3, 3).expand(4, -1, -1, -1)
    p = LinkProjector(x, BONDS).remove(unit).flatten(2)
    # The ridge of 1e-9 beside a diagonal of 2.
    torch.testing.assert_close(p @ p, p, rtol=0.0, atol=1e-8)
    torch.testing.assert_close(p, p.transpose(1, 2), rtol=0.0, atol=1e-12)
    assert torch.allclose(p.diagonal(dim1=1, dim2=2).sum(1), torch.tensor(7.0, dtype=torch.float64), atol=1e-7)
    turn = torch.linalg.cross(torch.tensor([0.3, -1.0, 0.2], dtype=torch.float64).expand_as(x), x, dim=-1)[:, None]
    torch.testing.assert_close(LinkProjector(x, BONDS).remove(turn), turn, rtol=0.0, atol=1e-9)
    # Three bonds in a triangle and one of them again: more than the directions they span.
    again = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0]])
    left = LinkProjector(x, again).remove(unit).flatten(2).diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(left, torch.tensor(6.0, dtype=torch.float64), atol=1e-6)


def test_density_labels_give_the_divergence(monkeypatch):
    """``G . q + kT div G``, G the network's forces without bonds, by automatic differentiation and by the labels.

    All 2^9 sign vectors of three beads: the mean over probes is exact, to rounding and the ridge.
    """
    _, energy = build_energy(3)
    x, q, *_ = draw_labels(3, 1, 3)
    signs = 2.0 * ((torch.arange(512)[:, None] >> torch.arange(9)) & 1) - 1.0
    v = signs.double().reshape(1, 512, 3, 3).expand(3, -1, -1, -1)
    density_forces, density_probes = compute_density_labels(x, q, v, BONDS[:1], 1 / BETA)
    monkeypatch.setattr(density_module, "CHUNK_VALUES", 1)
    for whole, part in zip(
        (density_forces, density_probes), compute_density_labels(x, q, v, BONDS[:1], 1 / BETA), strict=True
    ):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)  # frame by frame
    forces, hvps = compute_forces_and_hvps(energy, x, v)
    excess = compute_density_excess(forces, hvps, density_forces, density_probes, BETA).detach()
    forces = forces.detach()

    def field(flat: Tensor) -> Tensor:
        y = flat.reshape(1, 3, 3)
        (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
        return LinkProjector(y, BONDS[:1]).remove(-gradient[:, None]).flatten()

    for k in range(3):
        flat = x[k].flatten().requires_grad_(True)
        divergence = torch.autograd.functional.jacobian(field, flat).trace()
        along = (field(flat) * q[k].flatten()).sum()
        expected = float((along + divergence / BETA).detach())
        assert float(excess[k]) == pytest.approx(expected, rel=1e-7, abs=1e-7 * float(along.detach().abs()))
    # The turning of the bond takes part.
    still = excess - (forces * (density_forces - LinkProjector(x, BONDS[:1]).remove(q[:, None])[:, 0])).sum((1, 2))
    assert float((still / excess - 1.0).abs().max()) > 1e-3


@pytest.mark.parametrize("bonds", [BONDS[:0], BONDS], ids=["no bonds", "bonds"])
def test_density_and_forces_tell_the_same(bonds):
    """``< G . q + kT div G > = 0`` for a network that has nothing to do with the ensemble, with noise on the forces.

    z-test of one mean over 20,000 frames at 4.5 standard errors: false-alarm rate below 1e-5.
    """
    _, energy = build_energy(3)
    rng = np.random.default_rng(8)

    def measure(heat: float) -> float:
        x, mean_force = draw_from_wells(20000, heat)
        q = mean_force + 50.0 * torch.from_numpy(rng.standard_normal(x.shape))
        v = torch.from_numpy(2.0 * rng.integers(0, 2, (len(x), 2, 3, 3)) - 1.0)
        forces, hvps = compute_forces_and_hvps(energy, x, v)
        labels = compute_density_labels(x, q, v, bonds, 1 / BETA)
        excess = compute_density_excess(forces, hvps, *labels, BETA)
        assert float(density_loss(forces, hvps, *labels, BETA, SCALES)) == pytest.approx(
            2.0 * float(excess.mean()) / 9 / SCALES.force
        )
        return float(excess.mean() / excess.std()) * len(x) ** 0.5

    assert abs(measure(1.0)) < 4.5
    # Frames of an ensemble of half as much heat again are no such frames, and the term shows it.
    assert abs(measure(1.5)) > 9.0


def test_density_alone_finds_the_stiffness():
    """Labels of zero force, all of the cross term from the density: the loss is least at the wells' stiffness.

    It is a parabola in the stiffness t, ``t^2 a - 2 t b`` with ``b`` exact: least at ``b / a``, where ``a`` is a mean
    of 180,000 squares, right to ``sqrt(2 / 180,000)`` = 0.3 %; 4.5 of that are 1.5 % (false alarms below 1e-5).
    """
    x, mean_force = draw_from_wells(20000)
    v = torch.ones(len(x), 1, 3, 3, dtype=torch.float64)
    zero = torch.zeros_like(x)
    labels = compute_density_labels(x, zero, v, BONDS[:0], 1 / BETA)

    def loss(stiffness: float) -> float:
        forces = mean_force * (stiffness / WELL)
        return float(force_loss(forces, zero, SCALES) + density_loss(forces, stiffness * v, *labels, BETA, SCALES))

    low, middle, high = (loss(k) for k in (0.0, WELL, 2 * WELL))
    least = WELL * (1.0 + 0.5 * (low - high) / (low + high - 2.0 * middle))
    assert least == pytest.approx(WELL, rel=0.015)
