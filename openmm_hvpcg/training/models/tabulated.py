"""SchNet for production: its filters as splines, its forces written out, near pairs alone.

The filters of a trained :class:`~openmm_hvpcg.training.models.schnet.SchNet` are functions of one distance, so they
can be tabulated once for all. What is left of the network are sums over pairs and small matrix products of beads; their
derivative by the positions is written out here, which spares the overhead of automatic differentiation.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from openmm_hvpcg.training.models.explicit import (
    ExplicitChirality,
    ExplicitInteraction,
    InteractionGradient,
    copy_bias,
    copy_weight,
)
from openmm_hvpcg.training.models.filters import list_filters
from openmm_hvpcg.training.models.neighbours import Block, PairList, add_up, sum_differences
from openmm_hvpcg.training.models.radial import cutoff_envelope
from openmm_hvpcg.training.models.schnet import SchNet
from openmm_hvpcg.training.models.spline import RadialTable, fit_spline


def build_filters(network: SchNet) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """The radial functions of a network, envelope included: distances (n,) nm -> values (n, C).

    Columns are those of each interaction in turn, then those of the directions and of the volumes of its chirality.
    """
    exact = copy.deepcopy(network).cpu().double()
    filters = list_filters(exact.interactions, exact.chirality)

    def compute(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        r = torch.from_numpy(distances)
        with torch.no_grad():
            basis = exact.basis(r)
            columns = torch.cat([f(basis) for f in filters], 1)
            values: NDArray[np.float64] = (columns * cutoff_envelope(r / exact.cutoff_nm)[:, None]).numpy()
        return values

    return compute


class TabulatedSchNet(nn.Module):
    """Energies of copies of a molecule, and their derivatives by the positions.

    Parameters
    ----------
    network : trained
    per_nm : intervals of the splines in a nanometre
    skin_nm : of the pair list
    """

    embedding: Tensor
    readout: Tensor
    readout_bias: Tensor
    energy_weights: Tensor
    energy_bias: Tensor
    start: Tensor

    def __init__(self, network: SchNet, per_nm: int, skin_nm: float) -> None:
        super().__init__()
        features = network.embedding.weight.shape[1]
        coefficients = fit_spline(build_filters(network), network.cutoff_nm, per_nm)
        self.features = features
        self.table = RadialTable(coefficients, network.cutoff_nm, per_nm)
        self.pair_list = PairList(network.cutoff_nm, skin_nm)
        interactions: list[Any] = list(network.interactions)
        bias, chirality = torch.zeros(features), network.chirality
        column = features * len(interactions)
        self.chirality = None if chirality is None else ExplicitChirality(chirality, column)
        if chirality is not None:
            bias = copy_bias(chirality.update[2])
        layers, gradients = [], []
        for k, interaction in enumerate(interactions):
            is_last = k == 0 and chirality is None
            layers.append(ExplicitInteraction(interaction, k * features, bias))
            gradients.append(InteractionGradient(interaction, k * features, is_last))
            bias = bias + copy_bias(interaction.update[2])
        self.layers = nn.ModuleList(layers)
        self.gradients = nn.ModuleList(reversed(gradients))
        inner, outer, scale = network.readout[0], network.readout[2], network.energy_scale.detach()
        self.register_buffer("embedding", copy_weight(network.embedding))
        self.register_buffer("readout", copy_weight(inner))
        self.register_buffer("readout_bias", copy_bias(inner) + torch.mv(copy_weight(inner), bias))
        self.register_buffer("energy_weights", copy_weight(outer)[0] * scale)
        self.register_buffer("energy_bias", copy_bias(outer)[0] * scale)
        self.register_buffer("start", torch.zeros(0))

    def forward(self, positions: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (K,) kJ/mol and their gradient (K*B, 3) of positions (K*B, 3) nm with species (B,)."""
        n_beads = species.shape[0]
        if self.pair_list.update(positions, n_beads):
            self.start = self.embedding.index_select(0, species).repeat(positions.shape[0] // n_beads, 1)
        bounds = self.pair_list.group_bounds
        if len(bounds) == 2:
            each, gradient = self.compute(positions, self.start, self.pair_list.list_blocks(0), bounds[1])
            return each.view(-1, n_beads).sum(1), gradient
        energies: list[Tensor] = []
        gradients: list[Tensor] = []
        for group in range(len(bounds) - 1):
            first, n = bounds[group], bounds[group + 1] - bounds[group]
            x, start = positions.narrow(0, first, n), self.start.narrow(0, first, n)
            each, gradient = self.compute(x, start, self.pair_list.list_blocks(group), n)
            energies.append(each)
            gradients.append(gradient)
        return torch.cat(energies).view(-1, n_beads).sum(1), torch.cat(gradients)

    def compute(self, positions: Tensor, start: Tensor, blocks: list[Block], n: int) -> tuple[Tensor, Tensor]:
        """Energies (n,) of the beads of a group, which start with features (n, F), and their gradient (n, 3)."""
        distances: list[Tensor] = []
        units: list[Tensor] = []
        filters: list[tuple[Tensor, Tensor]] = []
        for block in blocks:
            ends = positions.index_select(0, block.pairs).view(2, -1, 3)
            # Taken before rounding: where the molecule is does not matter.
            first, second = ends.unbind(0)
            difference = (second - first).to(self.embedding.dtype)
            distance = torch.linalg.vector_norm(difference, 2, [1], True)
            units.append(difference / distance)
            distances.append(distance)
            filters.append(self.table(distance.squeeze(1)))
        h, vectors, turned = start, start, start
        if self.chirality is not None:
            vectors, turned = self.chirality(h, filters, units, blocks, n)
            h = self.chirality.maps.add_to(h, turned)
        sent: list[list[Tensor]] = []
        hidden: list[Tensor] = []
        for layer in self.layers:
            h, messages, y = layer(h, filters, blocks, n)
            sent.append(messages)
            hidden.append(y)
        energies, gradient = self.read_out(h)
        slopes: list[list[Tensor]] = []
        for layer in self.gradients:
            gradient, along = layer(gradient, sent.pop(), hidden.pop(), filters, blocks, n)
            slopes.append(along)
        across: list[Tensor] = []
        if self.chirality is not None:
            along, across = self.chirality.backward(gradient, turned, start, vectors, filters, units, blocks, n)
            slopes.append(along)
        sums: list[Tensor] = []
        for k, block in enumerate(blocks):
            slope = slopes[0][k]
            for other in slopes[1:]:
                slope = slope + other[k]
            rows = units[k] * slope.unsqueeze(1)
            if self.chirality is not None:
                turning = across[k] / distances[k]
                rows = rows + turning - units[k] * (turning * units[k]).sum(1, keepdim=True)
            sums.append(sum_differences(block, rows))
        return energies, add_up(sums, blocks, n, 3)

    def forget(self) -> None:
        """Drop what is remembered of the molecule and of which beads are near."""
        self.pair_list.forget()
        self.table.forget()
        self.start = self.start.new_zeros(0)

    def read_out(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (N,) of beads with features (N, F), and their gradient (N, F)."""
        z = linear(h, self.readout, self.readout_bias).tanh_()
        energies = torch.mv(z, self.energy_weights) + self.energy_bias
        by_hidden = torch.ops.aten.tanh_backward(self.energy_weights.expand_as(z), z)
        return energies, torch.mm(by_hidden, self.readout)
