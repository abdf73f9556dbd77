"""Several networks as one, whose energy is the mean of theirs.

Networks that were trained alike but for the seed differ by what the labels do not decide, and their mean is off by
less than each. Two SchNets side by side are one of twice the width, whose layers are blocks: so a committee of them is
exported, tabulated and simulated like any other. Other networks stay what they are and are evaluated in turn.

Krogh & Vedelsby, Adv. Neural Inf. Process. Syst. 7, 231 (1995); as potentials: Schran, Brezina & Marsalek, J. Chem.
Phys. 153, 104105 (2020).
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_hvpcg.training.models.chirality import Chirality
from openmm_hvpcg.training.models.schnet import SchNet
from openmm_hvpcg.training.models.torsions import TorsionEnergy, WithTorsions, split_network


class Committee(nn.Module):
    """The mean of the energies of several networks of the beads."""

    energy_scale: Tensor

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("energy_scale", torch.tensor(1.0))

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm with species (B,), or (F, B) where the members take them."""
        total = torch.zeros(positions.shape[0], dtype=positions.dtype, device=positions.device)
        for member in self.members:
            total = total + member(positions, species)
        return self.energy_scale * total / len(self.members)


def combine_networks(networks: Sequence[nn.Module]) -> nn.Module:
    """One network whose energy is the mean of those of trained ones of one kind, with dihedrals or without."""
    parts = [split_network(network) for network in networks]
    bases = [base for base, _ in parts]
    base = _merge_schnets(bases) if all(type(b) is SchNet for b in bases) else Committee(copy.deepcopy(bases))
    torsions = [t for _, t in parts if t is not None]
    return WithTorsions(base, _merge_torsions(torsions)) if torsions else base


def _merge_schnets(networks: Sequence[Any]) -> SchNet:
    """SchNets side by side, as one."""
    merged = copy.deepcopy(networks[0])
    _widen_embedding(merged.embedding, [n.embedding for n in networks])
    for k, interaction in enumerate(merged.interactions):
        found = [n.interactions[k] for n in networks]
        _join_first(interaction.filter[0], [i.filter[0] for i in found])
        _join(interaction.filter[2], [i.filter[2] for i in found])
        _join(interaction.project, [i.project for i in found])
        for layer in (0, 2):
            _join(interaction.update[layer], [i.update[layer] for i in found])
    if isinstance(merged.chirality, Chirality):
        hands = [n.chirality for n in networks]
        for name, join in (("direct", _join_first), ("filter", _join_first), ("source", _join), ("project", _join)):
            join(getattr(merged.chirality, name), [getattr(h, name) for h in hands])
        for layer in (0, 2):
            _join(merged.chirality.update[layer], [h.update[layer] for h in hands])
    _join_readouts(merged, [n.readout for n in networks], [n.energy_scale for n in networks], merged.readout)
    return merged


def _merge_torsions(networks: Sequence[TorsionEnergy]) -> TorsionEnergy:
    """Networks of the dihedrals side by side, as one."""
    merged: Any = copy.deepcopy(networks[0])
    width = merged.embedding.embedding_dim
    _widen_embedding(merged.embedding, [n.embedding for n in networks])
    for name in ("single", "pair"):
        layers, found = getattr(merged, name), [getattr(n, name) for n in networks]
        weights = [f[0].weight for f in found]
        n_beads = 2 if name == "single" else 3
        n_angles = weights[0].shape[1] - n_beads * width
        # What describes the angles goes to all; of each bead's kind, each network has its own columns.
        columns = [torch.cat([w[:, :n_angles] for w in weights])]
        for k in range(n_beads):
            at = n_angles + k * width
            columns.append(torch.block_diag(*(w[:, at : at + width] for w in weights)))
        _set(layers[0], torch.cat(columns, dim=1), torch.cat([f[0].bias for f in found]))
        _join_readouts(merged, [f[2:] for f in found], [n.energy_scale for n in networks], layers[2:])
    return merged


def _set(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Put weights into a layer, whatever its size was."""
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.out_features, layer.in_features = weight.shape
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())


def _widen_embedding(embedding: nn.Embedding, found: Sequence[nn.Embedding]) -> None:
    embedding.weight = nn.Parameter(torch.cat([e.weight for e in found], dim=1).detach().clone())
    embedding.embedding_dim = embedding.weight.shape[1]


def _join_first(layer: Any, found: Sequence[Any]) -> None:
    """Layers of the same input."""
    _set(layer, torch.cat([f.weight for f in found]), torch.cat([f.bias for f in found]))


def _join(layer: Any, found: Sequence[Any]) -> None:
    """Layers each of an input of its own."""
    bias = None if layer.bias is None else torch.cat([f.bias for f in found])
    _set(layer, torch.block_diag(*(f.weight for f in found)), bias)


def _join_readouts(merged: Any, found: Sequence[Any], scales: Sequence[Tensor], layers: Any) -> None:
    """A hidden layer of each, and the mean of the energies, at the energy scale of the first."""
    _join(layers[0], [f[0] for f in found])
    shares = [scale / (len(found) * merged.energy_scale) for scale in scales]
    weight = torch.cat([share * f[2].weight for share, f in zip(shares, found, strict=True)], dim=1)
    bias = torch.stack([share * f[2].bias for share, f in zip(shares, found, strict=True)]).sum(dim=0)
    _set(layers[2], weight, bias)
