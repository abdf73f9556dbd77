"""A continuous-filter network on beads (CGSchNet type), written for small dense molecules.

Source: Schütt et al., J. Chem. Phys. 148, 241722 (2018); Husic et al., J. Chem. Phys. 153, 194101 (2020). Our choices: all
pairs of beads dense, so that a batch of frames is a handful of matrix products; tanh, so that every derivative is
continuous; an envelope on the filters with zero value, slope and curvature at the cutoff, so that the energy has a
continuous second derivative there, which Hessian matching needs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_hvpcg.config import ModelSettings


def cutoff_envelope(x: Tensor) -> Tensor:
    """``(1 - x^2)^3`` within x = r/cutoff < 1, else 0: C2 at the cutoff."""
    return torch.clamp(1.0 - x * x, min=0.0) ** 3


class RadialBasis(nn.Module):
    """Gaussians of the distance, evenly spaced from 0 to the cutoff, width one spacing."""

    def __init__(self, n_basis: int, cutoff_nm: float) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(0.0, cutoff_nm, n_basis))
        self.gamma = 0.5 * ((n_basis - 1) / cutoff_nm) ** 2

    def forward(self, distance: Tensor) -> Tensor:
        return torch.exp(-self.gamma * (distance.unsqueeze(-1) - self.centers) ** 2)


class Interaction(nn.Module):
    """One continuous-filter convolution with its update of the bead features."""

    def __init__(self, features: int, n_basis: int) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(n_basis, features), nn.Tanh(), nn.Linear(features, features))
        self.project = nn.Linear(features, features, bias=False)
        self.update = nn.Sequential(nn.Linear(features, features), nn.Tanh(), nn.Linear(features, features))

    def forward(self, h: Tensor, basis: Tensor, envelope: Tensor) -> Tensor:
        weights = self.filter(basis) * envelope.unsqueeze(-1)
        message = (weights * self.project(h).unsqueeze(-3)).sum(dim=-2)
        return self.update(message)


class SchNet(nn.Module):
    """Energy of a molecule from its beads' species and distances.

    Parameters
    ----------
    n_species : size of the embedding
    settings : width, depth, basis and cutoff
    energy_scale : kJ/mol, multiplies the output so that weights of order one give energies of the right size
    """

    def __init__(self, n_species: int, settings: ModelSettings, energy_scale: float = 1.0) -> None:
        super().__init__()
        self.cutoff_nm = settings.cutoff_nm
        self.embedding = nn.Embedding(n_species, settings.features)
        self.basis = RadialBasis(settings.radial, settings.cutoff_nm)
        self.interactions = nn.ModuleList(
            Interaction(settings.features, settings.radial) for _ in range(settings.interactions)
        )
        self.readout = nn.Sequential(
            nn.Linear(settings.features, settings.features), nn.Tanh(), nn.Linear(settings.features, 1)
        )
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm of one molecule with species (B,)."""
        difference = positions.unsqueeze(2) - positions.unsqueeze(1)
        # A bead has no distance to itself: 1 under the root keeps its derivatives finite, the mask removes it.
        self_pair = torch.eye(positions.shape[1], device=positions.device, dtype=positions.dtype)
        distance = torch.sqrt((difference**2).sum(dim=-1) + self_pair)
        basis = self.basis(distance)
        envelope = cutoff_envelope(distance / self.cutoff_nm) * (1.0 - self_pair)
        h = self.embedding(species).unsqueeze(0).expand(positions.shape[0], -1, -1)
        for interaction in self.interactions:
            h = h + interaction(h, basis, envelope)
        return self.energy_scale * self.readout(h).squeeze(-1).sum(dim=-1)


def build_network(n_species: int, settings: ModelSettings, energy_scale: float = 1.0) -> nn.Module:
    """The network that ``settings.kind`` names."""
    return {"schnet": SchNet}[settings.kind](n_species, settings, energy_scale)
