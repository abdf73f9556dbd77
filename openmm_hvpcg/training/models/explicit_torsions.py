"""The network of the dihedrals for production: its forces written out.

Four bonded beads in a row have three unit vectors u1, u2, u3 along their bonds, and what the network is given of them
follows from their scalar products and their volume: with c = u1 x u2 and c' = u2 x u3, ``c . c'`` is
``(u1 . u2)(u2 . u3) - u1 . u3``, and ``u2 . (c x c')`` is ``u1 . (u2 x u3)``. Five beads are two such rows.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from openmm_hvpcg.training.models.explicit import copy_bias, copy_weight
from openmm_hvpcg.training.models.torsions import TorsionEnergy

#: Columns of two rows of four (cosine, cosine, turn, hand; twice) -> those of the five beads; one cosine is in both.
COLUMNS_OF_FIVE = (0, 1, 3, 5, -1, 2, 4, 6)
#: The factor of :func:`~openmm_hvpcg.training.models.torsions.describe_turns`.
INPUT_SCALE = 2.0
#: Numbers that describe a row of four.
PER_ROW = 4


class ExplicitLayers(nn.Module):
    """Two hidden layers and an energy, with the derivative by the first inputs; the others are constants.

    Parameters
    ----------
    layers : the trained ones
    columns : of their inputs, which come in this order; -1 for one that they do not have
    scale : of the energy
    """

    first: Tensor
    first_back: Tensor
    kinds: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    energy_weights: Tensor
    energy_bias: Tensor

    def __init__(self, layers: Any, columns: tuple[int, ...], scale: Tensor) -> None:
        super().__init__()
        weight, n_inputs = copy_weight(layers[0]), max(columns) + 1
        own = torch.stack([weight[:, c] if c >= 0 else torch.zeros_like(weight[:, 0]) for c in columns], dim=1)
        self.register_buffer("first", INPUT_SCALE * own.t().contiguous())
        self.register_buffer("first_back", INPUT_SCALE * own)
        self.register_buffer("kinds", weight[:, n_inputs:].clone())
        self.register_buffer("first_bias", copy_bias(layers[0]))
        self.register_buffer("second", copy_weight(layers[2]))
        self.register_buffer("second_bias", copy_bias(layers[2]))
        self.register_buffer("energy_weights", copy_weight(layers[4])[0] * scale)
        self.register_buffer("energy_bias", copy_bias(layers[4]) * scale)

    def describe(self, kinds: Tensor) -> Tensor:
        """What the constant inputs (n, c) add to the first layer, (n, F)."""
        return linear(kinds, self.kinds, self.first_bias)

    def forward(self, inputs: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (n,) and their gradient by the inputs (n, columns)."""
        y = torch.mm(inputs, self.first).add_(constants).tanh_()
        z = linear(y, self.second, self.second_bias).tanh_()
        gradient = torch.ops.aten.tanh_backward(self.energy_weights.expand_as(z), z)
        gradient = torch.ops.aten.tanh_backward(torch.mm(gradient, self.second), y)
        return torch.mv(z, self.energy_weights) + self.energy_bias, torch.mm(gradient, self.first_back)


class ExplicitTorsions(nn.Module):
    """Energies of the dihedrals of copies of a molecule, and their derivatives by the positions.

    Parameters
    ----------
    torsions : trained
    """

    embedding: Tensor
    next_bond: Tensor
    products: Tensor
    places: Tensor
    differences: Tensor
    rows: Tensor
    order: Tensor
    starts: Tensor
    constants: Tensor
    pair_constants: Tensor

    def __init__(self, torsions: TorsionEnergy) -> None:
        super().__init__()
        scale = torsions.energy_scale.detach()
        self.single = ExplicitLayers(torsions.single, tuple(range(PER_ROW)), scale)
        self.pair = ExplicitLayers(torsions.pair, COLUMNS_OF_FIVE, scale)
        self.register_buffer("embedding", copy_weight(torsions.embedding))
        self.register_buffer("next_bond", torch.tensor([1, 2, 0]))
        # u1 . u2, u2 . u3 and u1 . u3 among the nine products; and where their gradients, and zero, go among the nine.
        self.register_buffer("products", torch.tensor([1, 5, 2]))
        self.register_buffer("places", torch.tensor([3, 0, 2, 0, 3, 1, 2, 1, 3]))
        self.register_buffer("differences", torch.tensor([[-1.0, 0, 0], [1, -1, 0], [0, 1, -1], [0, 0, 1]]))
        for name in ("rows", "order", "starts"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))
        for name in ("constants", "pair_constants"):
            self.register_buffer(name, torch.zeros(0))
        self.n_known, self.n_single, self.n_pair = 0, 0, 0

    def forget(self) -> None:
        """Drop what is remembered of the molecule."""
        self.n_known, self.n_single, self.n_pair = 0, 0, 0
        self.rows, self.order, self.starts = self.rows.new_zeros(0), self.rows.new_zeros(0), self.rows.new_zeros(0)
        self.constants, self.pair_constants = self.constants.new_zeros(0), self.constants.new_zeros(0)

    def remember(self, n: int, species: Tensor, torsions: Tensor, chains: Tensor) -> None:
        """Lay out the rows of four beads of all copies: the single ones, then two for each row of five."""
        n_beads = species.shape[0]
        n_copies = n // n_beads
        shifts = (n_beads * torch.arange(n_copies, device=species.device)).view(n_copies, 1, 1)
        single = (torsions + shifts).view(-1, 4)
        pair = torch.stack((chains[:, :4], chains[:, 1:]), dim=1).view(-1, 4)
        self.rows = torch.cat((single, (pair + shifts).view(-1, 4))).flatten()
        beads, self.order = torch.sort(self.rows, stable=True)
        self.starts = torch.searchsorted(beads, torch.arange(n, device=species.device))
        kinds = self.embedding.index_select(0, species)
        inner = self.single.describe(kinds[torsions[:, 1:3]].flatten(1))
        self.constants = inner.repeat(n_copies, 1)
        self.pair_constants = self.pair.describe(kinds[chains[:, 1:4]].flatten(1)).repeat(n_copies, 1)
        self.n_single, self.n_pair = n_copies * torsions.shape[0], n_copies * chains.shape[0]
        self.n_known = n

    def forward(self, positions: Tensor, species: Tensor, torsions: Tensor, chains: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (K,) kJ/mol and their gradient (K*B, 3) of positions (K*B, 3) nm.

        ``species`` (B,), and the rows of bonded beads ``torsions`` (n, 4) and ``chains`` (m, 5), of one copy.
        """
        n = positions.shape[0]
        if self.n_known != n:
            self.remember(n, species, torsions, chains)
        n_copies, n_rows = n // species.shape[0], self.n_single + 2 * self.n_pair
        beads = positions.index_select(0, self.rows).view(n_rows, 4, 3)
        bonds = (beads.narrow(1, 1, 3) - beads.narrow(1, 0, 3)).to(self.embedding.dtype)
        lengths = torch.linalg.vector_norm(bonds, 2, [2], True)
        u = bonds / lengths
        # u1 x u2, u2 x u3, u3 x u1, and from there on u2 x u3, u3 x u1, u1 x u2: each the derivative of the volume.
        by_volume = torch.linalg.cross(u, u.index_select(1, self.next_bond), dim=2).index_select(1, self.next_bond)
        products = torch.bmm(u, u.transpose(1, 2)).view(n_rows, 9).index_select(1, self.products)
        first, second, across = products.unbind(1)
        hand = (by_volume.select(1, 0) * u.select(1, 0)).sum(1)
        inputs = torch.stack((first, second, first * second - across, hand), 1)
        energies, gradient = self.single(inputs.narrow(0, 0, self.n_single), self.constants)
        pairs = inputs.narrow(0, self.n_single, 2 * self.n_pair).view(self.n_pair, 2 * 4)
        pair_energies, pair_gradient = self.pair(pairs, self.pair_constants)
        total = energies.view(n_copies, self.n_single // n_copies).sum(1)
        total = total + pair_energies.view(n_copies, self.n_pair // n_copies).sum(1)
        by_first, by_second, by_turn, by_hand = torch.cat((gradient, pair_gradient.view(2 * self.n_pair, 4))).unbind(1)
        by_products = torch.stack(
            (by_first + by_turn * second, by_second + by_turn * first, by_turn.neg(), torch.zeros_like(by_turn)), 1
        )
        by_u = torch.bmm(by_products.index_select(1, self.places).view(n_rows, 3, 3), u)
        by_u = by_u + by_volume * by_hand.view(n_rows, 1, 1)
        by_bonds = (by_u - u * (u * by_u).sum(2, keepdim=True)) / lengths
        by_beads = torch.matmul(self.differences, by_bonds).view(n_rows * 4, 3)
        return total, torch.embedding_bag(by_beads, self.order, self.starts)[0]
