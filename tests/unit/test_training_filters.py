"""Filters with their derivatives written out, and the list of pairs, against automatic differentiation of the plain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.models.filters import HIGHEST_ORDER, compute_filters
from openmm_hvpcg.training.models.radial import RadialBasis, cutoff_envelope, list_pairs
from openmm_hvpcg.training.models.registry import build_base

CUTOFF = 0.9
BASIS = RadialBasis(10, CUTOFF).double()


def build_filters(kind: str) -> list[nn.Module]:
    torch.manual_seed(0)
    deep = [nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 7)) for _ in range(2)]
    flat = [nn.Linear(10, 3), nn.Linear(10, 5)]
    chosen: list[nn.Module] = [*(deep if kind != "flat" else []), *(flat if kind != "deep" else [])]
    return [f.double() for f in chosen]


def compute_plain(distance: Tensor, filters: list[nn.Module]) -> list[Tensor]:
    envelope = cutoff_envelope(distance / CUTOFF).unsqueeze(-1)
    return [f(BASIS(distance)) * envelope for f in filters]


def differentiate(values: list[Tensor], distance: Tensor, order: int) -> Tensor:
    """A weighted sum of all columns, derived ``order`` times."""
    joint = torch.cat(values, dim=1)
    found = (joint * torch.linspace(0.5, 1.5, joint.shape[1], dtype=torch.float64)).sum(1)
    for _ in range(order):
        (found,) = torch.autograd.grad(found.sum(), distance, create_graph=True)
    return found


@pytest.mark.parametrize("kind", ["deep", "flat", "both"])
@pytest.mark.parametrize("order", range(HIGHEST_ORDER + 1))
def test_derivatives_are_those_of_the_plain_filters(kind: str, order: int) -> None:
    """By the distance, beyond the cutoff too, and then by the weights: rounding in double, times 10^3 for the width of
    the basis to the third power."""
    filters = build_filters(kind)
    distance = torch.linspace(0.05, 1.1, 40, dtype=torch.float64).requires_grad_()
    found = differentiate(compute_filters(distance, BASIS, CUTOFF, filters), distance, order)
    expected = differentiate(compute_plain(distance, filters), distance, order)
    scale = float(expected.detach().abs().max())
    assert scale > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * scale)
    weights = [p for f in filters for p in f.parameters()]
    gradients = [torch.autograd.grad((e**2).sum(), weights, allow_unused=True) for e in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        if b is None:  # a bias is gone after one derivative, but for that of the envelope
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12 * scale**2)


def test_a_derivative_too_many_is_an_error_not_zero() -> None:
    distance = torch.tensor([0.3, 0.5], dtype=torch.float64).requires_grad_()
    with pytest.raises(NotImplementedError, match="3 derivatives by the distance"):
        differentiate(compute_filters(distance, BASIS, CUTOFF, build_filters("both")), distance, HIGHEST_ORDER + 1)


def test_a_derivative_asked_for_again_leads_to_the_weights() -> None:
    """First without a graph and then with one: what the first computed is kept, and must not lack it."""
    filters = build_filters("deep")
    distance = torch.tensor([0.3, 0.5], dtype=torch.float64).requires_grad_()
    joint = torch.cat(compute_filters(distance, BASIS, CUTOFF, filters), dim=1)
    (first,) = torch.autograd.grad(joint.sum(), distance, retain_graph=True)
    (second,) = torch.autograd.grad(joint.sum(), distance, create_graph=True)
    assert not first.requires_grad
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(second.sum(), filters[0].get_parameter("0.weight"))
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_a_graph(mode: type) -> None:
    filters, distance = build_filters("both"), torch.linspace(0.1, 0.8, 5, dtype=torch.float64)
    with mode():
        found, expected = compute_filters(distance, BASIS, CUTOFF, filters), compute_plain(distance, filters)
    for a, b in zip(found, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_pairs_beyond_the_cutoff_are_left_out_of_each_frame() -> None:
    """Three beads on a line, closer in the second frame; TorchScript lists all pairs."""
    positions = torch.tensor([[[0.0, 0, 0], [0.6, 0, 0], [1.2, 0, 0]], [[0.0, 0, 0], [0.4, 0, 0], [0.8, 0, 0]]])
    first, second, difference, distance = list_pairs(positions, CUTOFF)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (1, 2), (3, 4), (3, 5), (4, 5)]
    assert difference[:, 0].tolist() == pytest.approx([0.6, 0.6, 0.4, 0.8, 0.4])
    assert torch.equal(distance, difference[:, 0])
    first, second, _, _ = torch.jit.script(list_pairs)(positions, CUTOFF)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]


@pytest.mark.parametrize("kind", ModelSettings.KINDS)
def test_beads_that_see_no_other_feel_no_force(kind: str) -> None:
    network = build_base(2, ModelSettings(kind=kind, features=6, radial=5, cutoff_nm=CUTOFF), 1.0).double()
    nn.init.ones_(network.get_submodule("readout.2").get_parameter("weight"))
    positions = torch.tensor([[[0.0, 0, 0], [math.pi, 0, 0]]], dtype=torch.float64)
    forces = compute_forces(lambda x: network(x, torch.tensor([0, 1])), positions)
    assert torch.equal(forces, torch.zeros_like(positions))
