"""Filters of pairs with their derivatives by the distance written out, for training.

A filter is a small network of the distance alone. Its derivatives by it are as quick to compute as its values: one more
pass of the derivatives of the radial basis through the same weights. Backward passes through backward passes, which
forces and Hessian-vector products would take otherwise, drag tensors of pairs times radial functions through every one
of them. A derivative is computed when something asks for it, so forces pay for the first alone; all of them lead to
the filter's weights, and none to the positions but through the distance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_hvpcg.training.models.chirality import Chirality
from openmm_hvpcg.training.models.radial import RadialBasis, cutoff_envelope

#: Derivatives by the distance that are written out: forces take one, HVPs two, and the slope of their loss three.
HIGHEST_ORDER = 3


def list_filters(blocks: Iterable[nn.Module], chirality: Chirality | None) -> list[nn.Module]:
    """A network's filters in the order of all that use them: of its blocks in turn, then the two of its handedness."""
    filters = [block.get_submodule("filter") for block in blocks]
    return filters if chirality is None else [*filters, chirality.direct, chirality.filter]


def compute_filters(
    distance: Tensor, basis: RadialBasis, cutoff_nm: float, filters: Sequence[nn.Module]
) -> list[Tensor]:
    """Values (n, width) of each filter at the distances (n,) nm, times the envelope of the cutoff.

    Can be differentiated three times by the distance, and by the filters' weights.

    Parameters
    ----------
    distance : (n,) nm
    basis : the filters' input
    cutoff_nm : of the envelope
    filters : each a ``Sequential`` of ``Linear``, ``Tanh`` and ``Linear``, and after those, each a ``Linear``
    """
    if torch._C._are_functorch_transforms_active():  # forward mode differentiates by itself
        values, envelope = basis(distance), cutoff_envelope(distance / cutoff_nm).unsqueeze(-1)
        return [f(values) * envelope for f in filters]
    jets = _FilterJets(distance.detach(), basis, cutoff_nm, filters)
    return list(jets.follow(distance, 0).split(jets.widths, dim=1))


class _FilterJets:
    """The filters' derivatives at fixed distances (n,), all beside each other; each is computed once."""

    def __init__(self, distance: Tensor, basis: RadialBasis, cutoff_nm: float, filters: Sequence[nn.Module]) -> None:
        # Not that of the moment when a derivative is asked for first: it may be asked for again.
        self.with_graph = torch.is_grad_enabled()
        self.curvature = 2.0 * basis.gamma
        self.offset = distance.unsqueeze(-1) - basis.centers
        self.x = distance.unsqueeze(-1) / cutoff_nm
        self.inside = torch.clamp(1.0 - self.x * self.x, min=0.0)
        self.cutoff_nm = cutoff_nm
        self.envelope: list[Tensor] = []
        self.basis = [torch.exp2(basis.exponent * (self.offset * self.offset))]
        first = [_get_linear(f[0] if isinstance(f, nn.Sequential) else f) for f in filters]
        self.last = [_get_linear(f[2]) for f in filters if isinstance(f, nn.Sequential)]
        self.widths = [layer.out_features for layer in (*self.last, *first[len(self.last) :])]
        self.hidden_widths = [layer.out_features for layer in first[: len(self.last)]]
        self.weight = torch.cat([layer.weight for layer in first]).t()
        self.bias = torch.cat([layer.bias for layer in first])
        self.hidden: list[Tensor] = []
        self.values: list[Tensor] = []

    def follow(self, distance: Tensor, k: int) -> Tensor:
        """The ``k``-th derivative (n, all widths) as a function of ``distance``, where these distances are."""
        with torch.set_grad_enabled(self.with_graph):
            while len(self.values) <= k:
                self._derive(len(self.values))
        value = self.values[k] * self.envelope[0]
        for j in range(1, k + 1):
            value = torch.addcmul(value, self.values[k - j], self.envelope[j], value=math.comb(k, j))
        if k == HIGHEST_ORDER:
            return value
        slope: Tensor = _Slope.apply(distance, self, k, value.shape[1])
        return value + slope

    def _derive(self, k: int) -> None:
        """The ``k``-th derivative without the envelope, and that of the envelope."""
        self.envelope.append(self._derive_envelope(k))
        if k > 0:
            self.basis.append(self._derive_basis(k))
        a = self.basis[k] @ self.weight if k else torch.addmm(self.bias, self.basis[0], self.weight)
        n, parts = sum(self.hidden_widths), []
        if n > 0:
            hidden = self._activate(a[:, :n] if n < a.shape[1] else a, k)
            for t, last in zip(hidden.split(self.hidden_widths, dim=1), self.last, strict=True):
                parts.append(nn.functional.linear(t, last.weight, last.bias if k == 0 else None))
        if n < a.shape[1]:
            parts.append(a[:, n:])
        self.values.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])

    def _derive_envelope(self, k: int) -> Tensor:
        """Of ``(1 - x^2)^3`` within the cutoff, by the distance."""
        x, inside = self.x, self.inside
        if k == 0:
            return inside * inside * inside
        if k == 1:
            return (-6.0 / self.cutoff_nm) * x * inside * inside
        if k == 2:
            return (6.0 / self.cutoff_nm**2) * inside * (5.0 * x * x - 1.0)
        return (24.0 / self.cutoff_nm**3) * x * (inside > 0) * (3.0 - 5.0 * x * x)

    def _derive_basis(self, k: int) -> Tensor:
        """Of ``exp(-g d^2)``, by Hermite's recurrence: ``-2 g`` times (d times the last, k - 1 times that before)."""
        value = self.offset * self.basis[k - 1]
        if k > 1:
            value.add_(self.basis[k - 2], alpha=k - 1)
        return value.mul_(-self.curvature)

    def _activate(self, a: Tensor, k: int) -> Tensor:
        """The ``k``-th derivative of ``t = tanh a`` from that of a, ``a_k``.

        With ``s = 1 - t^2``: ``s a_1``; ``s (a_2 - 2 t a_1^2)``; ``s (a_3 - 6 t a_1 a_2 + (4 t^2 - 2 s) a_1^3)``.
        """
        if k == 0:
            # A sigmoid takes a tenth of the time of a tanh on a CPU.
            t = torch.sigmoid(2.0 * a).mul(2.0).sub_(1.0)
            self.hidden = [t, 1.0 - t * t]
            return t
        self.hidden.append(a)
        t, s, first = self.hidden[:3]
        if k == 1:
            return s * first
        if k == 2:
            return s * torch.addcmul(a, t * first, first, value=-2.0)
        return s * (a - 6.0 * t * first * self.hidden[3] + (4.0 * t * t - 2.0 * s) * first**3)


def _get_linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"a filter's layer: expected Linear, got {type(module).__name__}")
    return module


class _Slope(torch.autograd.Function):
    """Zeros (n, width) with the derivative by the distance that the filters have.

    Apart from the filters' values, so that a backward pass that does not ask for positions leaves it out.
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, jets: _FilterJets, k: int, width: int) -> Tensor:
        ctx.save_for_backward(distance)
        ctx.jets, ctx.k = jets, k
        return distance.new_zeros(1).expand(len(distance), width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (distance,) = ctx.saved_tensors
        order = ctx.k + 1
        slope = (gradient * ctx.jets.follow(distance, order)).sum(dim=-1)
        if order == HIGHEST_ORDER:
            slope = slope + _End.apply(distance)
        return slope, None, None, None


class _End(torch.autograd.Function):
    """Zeros (n,) without a derivative: to ask for it is an error, not zero."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor) -> Tensor:
        return torch.zeros_like(distance)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError(f"filters have {HIGHEST_ORDER} derivatives by the distance, and no more")
