"""A continuous-filter network on beads (CGSchNet type), written for small dense molecules.

Source: Schütt et al., J. Chem. Phys. 148, 241722 (2018); Husic et al., J. Chem. Phys. 153, 194101 (2020). Our choices:
one filter a pair, used in both directions; tanh, so that every derivative is continuous; an envelope on the filters
with zero value, slope and curvature at the cutoff, so that the energy has a continuous second derivative there, which
Hessian matching needs.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import torch
from torch import Tensor, nn

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.training.models.chirality import Chirality
from openmm_hvpcg.training.models.filters import compute_filters, list_filters
from openmm_hvpcg.training.models.radial import RadialBasis, build_readout, cutoff_envelope, list_pairs


class Interaction(nn.Module):
    """One continuous-filter convolution with its update of the bead features."""

    def __init__(self, features: int, n_basis: int) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(n_basis, features), nn.Tanh(), nn.Linear(features, features))
        self.project = nn.Linear(features, features, bias=False)
        self.update = nn.Sequential(nn.Linear(features, features), nn.Tanh(), nn.Linear(features, features))

    def forward(self, h: Tensor, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Update (N, features) of the features ``h`` from pairs (first, second), each (n,), with their filters."""
        x = self.project(h)
        message = torch.zeros_like(x).index_add(0, first, weights * x.index_select(0, second))
        message = message.index_add(0, second, weights * x.index_select(0, first))
        return self.update(message)


class SchNet(nn.Module):
    """Energy of a molecule from its beads' species and distances.

    Parameters
    ----------
    n_species : size of the embedding
    settings : width, depth, basis and cutoff
    energy_scale : kJ/mol, multiplies the output so that weights of order one give energies of the right size
    """

    energy_scale: Tensor

    def __init__(self, n_species: int, settings: ModelSettings, energy_scale: float = 1.0) -> None:
        super().__init__()
        self.cutoff_nm = settings.cutoff_nm
        self.embedding = nn.Embedding(n_species, settings.features)
        self.basis = RadialBasis(settings.radial, settings.cutoff_nm)
        self.interactions = nn.ModuleList(
            Interaction(settings.features, settings.radial) for _ in range(settings.interactions)
        )
        channels = settings.chiral_channels
        self.chirality = Chirality(settings.features, settings.radial, channels) if channels else None
        self.readout = build_readout(settings.features, nn.Tanh())
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm with species (B,), or (F, B) of each frame."""
        first, second, difference, distance = list_pairs(positions, self.cutoff_nm)
        weights = self._compute_filters(distance)
        h = self.embedding(species.expand(positions.shape[0], positions.shape[1]).flatten())
        if self.chirality is not None:
            unit = difference / distance.unsqueeze(-1)
            h = h + self.chirality(h, weights[-2], weights[-1], unit, first, second)
        for i, interaction in enumerate(self.interactions):
            h = h + interaction(h, weights[i], first, second)
        energies = self.readout(h).reshape(positions.shape[0], positions.shape[1]).sum(dim=-1)
        return self.energy_scale * energies

    def _compute_filters(self, distance: Tensor) -> list[Tensor]:
        """Filters (n, width) of the interactions, and the two of the handedness."""
        if torch.jit.is_scripting():
            basis = self.basis(distance)
            envelope = cutoff_envelope(distance / self.cutoff_nm).unsqueeze(-1)
            weights: list[Tensor] = []
            for interaction in self.interactions:
                weights.append(interaction.filter(basis) * envelope)  # type: ignore[operator]
            if self.chirality is not None:
                weights.append(self.chirality.direct(basis) * envelope)
                weights.append(self.chirality.filter(basis) * envelope)
            return weights
        else:  # TorchScript leaves out this branch only where it is one
            filters = list_filters(self.interactions, self.chirality)
            return compute_filters(distance, self.basis, self.cutoff_nm, filters)
