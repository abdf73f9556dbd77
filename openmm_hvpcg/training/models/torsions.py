"""A small network of the dihedral angles along the bonds, beside any network of the beads.

The slow motions of a chain are turns about its bonds, and what a turn costs depends on the next one and on the residues
there. A network of distances has to piece this together from many of them, and knows no left from right; here it is
given. The energy is a sum over four bonded beads in a row, and over five, the two dihedrals of which then know of each
other: a learned counterpart of the dihedral and correction-map terms of atomistic force fields.

What goes in are products of unit vectors u along the bonds: ``u1 . u2``, the cosine of an angle, and with c = u1 x u2
and c' = u2 x u3 the products ``c . c'`` and ``u2 . (c x c')``, cosine and sine of the dihedral times the sines of its
two angles. They are smooth where an angle is straight, where the dihedral itself is not defined.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

from typing import NamedTuple

import torch
from torch import Tensor, nn

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.prior_terms import list_rows
from openmm_hvpcg.training.derivatives import EnergyFunction
from openmm_hvpcg.training.models.radial import build_readout

#: Width of the embedding of species.
EMBEDDING = 8


class Bonded(NamedTuple):
    """Beads in a row along the bonds of a molecule: four, ``torsions`` (n, 4), and five, ``chains`` (m, 5)."""

    torsions: Tensor
    chains: Tensor

    @classmethod
    def find(cls, bead_map: BeadMap) -> "Bonded":
        """Those of a molecule."""
        return cls(*(torch.from_numpy(list_rows(bead_map.bonds, bead_map.n_beads, k)) for k in (4, 5)))


def describe_turns(positions: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the network is given of rows of k bonded beads, ``index`` (m, k), in frames (F, B, 3) nm.

    Cosines of angles (F, m, k - 2), and cosines and sines of dihedrals (F, m, k - 3). They are to be joined with all
    else at once: TorchScript makes one of joins of joins, and a script that was first called without asking for forces
    then forgets that they hang on the positions.
    """
    beads = positions[:, index]
    bonds = beads[:, :, 1:] - beads[:, :, :-1]
    u = bonds / torch.sqrt((bonds * bonds).sum(dim=-1, keepdim=True))
    before, after = u[:, :, :-1], u[:, :, 1:]
    normals = torch.linalg.cross(before, after, dim=-1)
    first, second = normals[:, :, :-1], normals[:, :, 1:]
    cosines = (before * after).sum(dim=-1)
    turns = (first * second).sum(dim=-1)
    hands = (u[:, :, 1:-1] * torch.linalg.cross(first, second, dim=-1)).sum(dim=-1)
    # The factor brings products of unit vectors to order one.
    return 2.0 * cosines, 2.0 * turns, 2.0 * hands


def _build_layers(n_inputs: int, features: int) -> nn.Sequential:
    """Zero at first, as every network here."""
    return nn.Sequential(nn.Linear(n_inputs, features), nn.Tanh(), *build_readout(features, nn.Tanh()))


class TorsionEnergy(nn.Module):
    """Energy of a molecule from the dihedral angles along its bonds and the species on them.

    Parameters
    ----------
    n_species : size of the embedding
    features : width
    energy_scale : kJ/mol, multiplies the output so that weights of order one give energies of the right size
    """

    energy_scale: Tensor

    def __init__(self, n_species: int, features: int, energy_scale: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_species, EMBEDDING)
        self.single = _build_layers(4 + 2 * EMBEDDING, features)
        self.pair = _build_layers(7 + 3 * EMBEDDING, features)
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))

    def forward(self, positions: Tensor, species: Tensor, torsions: Tensor, chains: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm; ``species`` (B,) or (F, B), the others as in :class:`Bonded`."""
        kinds = self.embedding(species.expand(positions.shape[0], positions.shape[1]))
        inner = kinds[:, torsions[:, 1:3]].flatten(2)
        cosines, turns, hands = describe_turns(positions, torsions)
        energy = self.single(torch.cat((cosines, turns, hands, inner), dim=-1)).sum(dim=1)
        inner = kinds[:, chains[:, 1:4]].flatten(2)
        cosines, turns, hands = describe_turns(positions, chains)
        energy = energy + self.pair(torch.cat((cosines, turns, hands, inner), dim=-1)).sum(dim=1)
        return self.energy_scale * energy.squeeze(-1)


class WithTorsions(nn.Module):
    """A network of the beads, and one of the dihedrals beside it; energies add."""

    def __init__(self, base: nn.Module, torsions: TorsionEnergy) -> None:
        super().__init__()
        self.base = base
        self.torsions = torsions

    def forward(self, positions: Tensor, species: Tensor, torsions: Tensor, chains: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm."""
        return self.base(positions, species) + self.torsions(positions, species, torsions, chains)


def add_torsions(base: nn.Module, n_species: int, settings: ModelSettings, energy_scale: float) -> nn.Module:
    """The network with one of the dihedrals, where the settings ask for it."""
    if not settings.torsions:
        return base
    return WithTorsions(base, TorsionEnergy(n_species, settings.features, energy_scale))


def split_network(network: nn.Module) -> tuple[nn.Module, TorsionEnergy | None]:
    """The network of the beads and, where there is one, that of the dihedrals."""
    return (network.base, network.torsions) if isinstance(network, WithTorsions) else (network, None)


def bind_network(network: nn.Module, species: Tensor, bonded: Bonded) -> EnergyFunction:
    """The network as a function of positions (F, B, 3) nm alone; on the device of ``species``."""
    if not isinstance(network, WithTorsions):
        return lambda x: network(x, species)
    index = [rows.to(species.device) for rows in bonded]
    return lambda x: network(x, species, *index)
