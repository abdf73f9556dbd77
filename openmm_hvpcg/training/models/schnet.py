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


def cutoff_envelope(x: Tensor) -> Tensor:
    """``(1 - x^2)^3`` within x = r/cutoff < 1, else 0: C2 at the cutoff."""
    return torch.clamp(1.0 - x * x, min=0.0) ** 3


class RadialBasis(nn.Module):
    """Gaussians of the distance, evenly spaced from 0 to the cutoff, width one spacing."""

    centers: Tensor

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

    def forward(self, h: Tensor, basis: Tensor, envelope: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Update (F, B, features) of the features ``h`` from pairs (first, second), each (n,), with basis (F, n, K)."""
        weights = self.filter(basis) * envelope.unsqueeze(-1)
        x = self.project(h)
        message = torch.zeros_like(x).index_add(1, first, weights * x.index_select(1, second))
        message = message.index_add(1, second, weights * x.index_select(1, first))
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
        last = nn.Linear(settings.features, 1)
        # The network starts as zero energy: training sets out from the priors, not from noise on top of them.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.readout = nn.Sequential(nn.Linear(settings.features, settings.features), nn.Tanh(), last)
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm of one molecule with species (B,)."""
        pairs = torch.triu_indices(positions.shape[1], positions.shape[1], 1, device=positions.device)
        first, second = pairs[0], pairs[1]
        difference = positions.index_select(1, second) - positions.index_select(1, first)
        distance = torch.sqrt((difference**2).sum(dim=-1))
        basis = self.basis(distance)
        envelope = cutoff_envelope(distance / self.cutoff_nm)
        h = self.embedding(species).unsqueeze(0).expand(positions.shape[0], -1, -1)
        for interaction in self.interactions:
            h = h + interaction(h, basis, envelope, first, second)
        return self.energy_scale * self.readout(h).squeeze(-1).sum(dim=-1)


def scale_energy(network: nn.Module, factor: float) -> None:
    """Multiply the network's energy by ``factor``, in place."""
    network.energy_scale.mul_(factor)  # type: ignore[operator]


def build_network(n_species: int, settings: ModelSettings, energy_scale: float = 1.0) -> nn.Module:
    """The network that ``settings.kind`` names."""
    return {"schnet": SchNet}[settings.kind](n_species, settings, energy_scale)
