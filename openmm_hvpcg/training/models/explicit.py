"""Parts of a network with their derivatives written out: updates, interactions and handedness over given filters."""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from openmm_hvpcg.training.models.chirality import Chirality
from openmm_hvpcg.training.models.neighbours import Block, add_up, sum_by_bead
from openmm_hvpcg.training.models.schnet import Interaction


def copy_weight(layer: Any) -> Tensor:
    """The weight of a linear layer, as a constant."""
    weight: Tensor = layer.weight.detach().clone()
    return weight


def copy_bias(layer: Any) -> Tensor:
    """Its bias."""
    bias: Tensor = layer.bias.detach().clone()
    return bias


class Maps(nn.Module):
    """A two-layer update with its derivative: weights in the layout each product reads in order."""

    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_back: Tensor

    def __init__(self, update: nn.Sequential) -> None:
        super().__init__()
        self.register_buffer("inner", copy_weight(update[0]))
        self.register_buffer("inner_bias", copy_bias(update[0]))
        self.register_buffer("outer", copy_weight(update[2]).t().contiguous())
        self.register_buffer("outer_back", copy_weight(update[2]))

    def activate(self, message: Tensor) -> Tensor:
        """The hidden layer (N, F) of messages (N, c)."""
        return linear(message, self.inner, self.inner_bias).tanh_()

    def add_to(self, h: Tensor, hidden: Tensor) -> Tensor:
        """Features ``h`` without the bias of the outer layer, plus the update."""
        return torch.addmm(h, hidden, self.outer)

    def backward(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """Gradient (N, c) by the messages of one (N, F) by the update."""
        return torch.mm(torch.ops.aten.tanh_backward(torch.mm(gradient, self.outer_back), hidden), self.inner)


class ExplicitInteraction(nn.Module):
    """What an :class:`Interaction` does, from values of its filter.

    Parameters
    ----------
    interaction : the trained one
    column : of the table, where its filter begins
    bias : (F,) what earlier layers add to the features of every bead; their outer biases are left to those who read
    """

    project: Tensor
    bias: Tensor

    def __init__(self, interaction: Interaction, column: int, bias: Tensor) -> None:
        super().__init__()
        weight = copy_weight(interaction.project)
        self.features, self.column = weight.shape[0], column
        self.register_buffer("project", weight)
        self.register_buffer("bias", torch.mv(weight, bias))
        self.maps = Maps(interaction.update)

    def forward(
        self, h: Tensor, filters: list[tuple[Tensor, Tensor]], blocks: list[Block], n_beads: int
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Changed features (N, F), what each bead of each block got sent (2, n, F), and the hidden layer (N, F)."""
        x = linear(h, self.project, self.bias)
        sent: list[Tensor] = []
        sums: list[Tensor] = []
        for k, block in enumerate(blocks):
            ends = x.index_select(0, block.partners).view(2, -1, self.features)
            values = filters[k][0].narrow(1, self.column, self.features)
            sums.append(sum_by_bead(block, (ends * values).view(-1, self.features)))
            sent.append(ends)
        hidden = self.maps.activate(add_up(sums, blocks, n_beads, self.features))
        return self.maps.add_to(h, hidden), sent, hidden


class InteractionGradient(nn.Module):
    """The derivative of an :class:`ExplicitInteraction`.

    Parameters
    ----------
    interaction : the trained one
    column : of the table, where its filter begins
    is_last : of the backward pass: features before it are constants, no gradient by them is needed
    """

    project: Tensor

    def __init__(self, interaction: Interaction, column: int, is_last: bool) -> None:
        super().__init__()
        weight = copy_weight(interaction.project)
        self.features, self.column, self.is_last = weight.shape[0], column, is_last
        self.register_buffer("project", weight)
        self.maps = Maps(interaction.update)

    def forward(
        self,
        gradient: Tensor,
        sent: list[Tensor],
        hidden: Tensor,
        filters: list[tuple[Tensor, Tensor]],
        blocks: list[Block],
        n_beads: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradient (N, F) by the features before, and slopes (n,) by each block's distances."""
        by_message = self.maps.backward(gradient, hidden)
        slopes: list[Tensor] = []
        sums: list[Tensor] = []
        for k, block in enumerate(blocks):
            by_ends = by_message.index_select(0, block.partners).view(2, -1, self.features)
            (first, second), (by_first, by_second) = sent[k].unbind(0), by_ends.unbind(0)
            both = (by_second * first).addcmul_(by_first, second)
            slopes.append(both.mul_(filters[k][1].narrow(1, self.column, self.features)).sum(1))
            if not self.is_last:
                values = filters[k][0].narrow(1, self.column, self.features)
                sums.append(sum_by_bead(block, (by_ends * values).view(-1, self.features)))
        if not self.is_last:
            gradient = torch.addmm(gradient, add_up(sums, blocks, n_beads, self.features), self.project)
        return gradient, slopes


class ExplicitChirality(nn.Module):
    """What :class:`Chirality` does, from values of its filters, and its derivative.

    Parameters
    ----------
    chirality : the trained one
    column : of the table, where its two filters begin
    """

    source: Tensor
    project: Tensor

    def __init__(self, chirality: Chirality, column: int) -> None:
        super().__init__()
        self.channels = chirality.source.weight.shape[0]
        self.column = column
        self.register_buffer("source", copy_weight(chirality.source).t().contiguous())
        self.register_buffer("project", copy_weight(chirality.project).t().contiguous())
        self.maps = Maps(chirality.update)

    def _split(self, looked_up: Tensor) -> tuple[Tensor, Tensor]:
        """Values, or slopes, (n, c) of the filters of directions and of volumes."""
        both = looked_up.narrow(1, self.column, 2 * self.channels)
        return both.narrow(1, 0, self.channels), both.narrow(1, self.channels, self.channels)

    def forward(
        self, h: Tensor, filters: list[tuple[Tensor, Tensor]], units: list[Tensor], blocks: list[Block], n_beads: int
    ) -> tuple[Tensor, Tensor]:
        """The vectors (N, 3 c) of beads with features (N, F), and the hidden layer (N, F) of the update."""
        c = self.channels
        x, y = torch.mm(h, self.source), torch.mm(h, self.project)
        sums: list[Tensor] = []
        for k, block in enumerate(blocks):
            weights, _ = self._split(filters[k][0])
            ends = x.index_select(0, block.partners).view(2, -1, 1, c)
            along = units[k].unsqueeze(2) * weights.unsqueeze(1)
            # The first bead sees its partner along the direction of the pair, the second against it.
            rows = torch.stack((along * ends[0], along * ends[1].neg()))
            sums.append(sum_by_bead(block, rows.view(-1, 3 * c)))
        vectors = add_up(sums, blocks, n_beads, 3 * c)
        sums = []
        for k, block in enumerate(blocks):
            _, weights = self._split(filters[k][0])
            v = vectors.index_select(0, block.pairs).view(2, -1, 3, c)
            volume = (torch.linalg.cross(v[0], v[1], dim=1) * units[k].unsqueeze(2)).sum(1)
            ends = y.index_select(0, block.partners).view(2, -1, c)
            sums.append(sum_by_bead(block, (ends * (weights * volume)).view(-1, c)))
        return vectors, self.maps.activate(add_up(sums, blocks, n_beads, c))

    def backward(
        self,
        gradient: Tensor,
        hidden: Tensor,
        h: Tensor,
        vectors: Tensor,
        filters: list[tuple[Tensor, Tensor]],
        units: list[Tensor],
        blocks: list[Block],
        n_beads: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Derivatives of the energy by the distances, (n,), and by the directions, (n, 3), of each block's pairs.

        ``gradient`` (N, F) is that by the features after the update; the features ``h`` before it are constants.
        """
        c = self.channels
        x, y = torch.mm(h, self.source), torch.mm(h, self.project)
        by_message = self.maps.backward(gradient, hidden)
        slopes: list[Tensor] = []
        by_units: list[Tensor] = []
        sums: list[Tensor] = []
        for k, block in enumerate(blocks):
            unit = units[k].unsqueeze(2)
            _, weights = self._split(filters[k][0])
            _, weight_slopes = self._split(filters[k][1])
            v = vectors.index_select(0, block.pairs).view(2, -1, 3, c)
            normal = torch.linalg.cross(v[0], v[1], dim=1)
            ends = y.index_select(0, block.partners).view(2, -1, c)
            by_ends = by_message.index_select(0, block.pairs).view(2, -1, c)
            by_filter = (ends * by_ends).sum(0)
            by_volume = (by_filter * weights).unsqueeze(1)
            slopes.append((by_filter * weight_slopes * (normal * unit).sum(1)).sum(1))
            by_units.append((by_volume * normal).sum(2))
            along = unit.expand_as(normal)
            rows = torch.stack((torch.linalg.cross(v[1], along, dim=1), torch.linalg.cross(along, v[0], dim=1)))
            sums.append(sum_by_bead(block, (rows * by_volume).view(-1, 3 * c)))
        by_vectors = add_up(sums, blocks, n_beads, 3 * c)
        for k, block in enumerate(blocks):
            weights, _ = self._split(filters[k][0])
            weight_slopes, _ = self._split(filters[k][1])
            ends = x.index_select(0, block.partners).view(2, -1, 1, c)
            by_ends = by_vectors.index_select(0, block.pairs).view(2, -1, 3, c)
            both = by_ends[0] * ends[0] - by_ends[1] * ends[1]
            by_units[k] = by_units[k] + (both * weights.unsqueeze(1)).sum(2)
            slopes[k] = slopes[k] + ((both * units[k].unsqueeze(2)).sum(1) * weight_slopes).sum(1)
        return slopes, by_units
