"""What every network here builds on: pairs of a small dense molecule, radial basis, envelope of the cutoff, readout."""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import torch
from torch import Tensor, nn


def cutoff_envelope(x: Tensor) -> Tensor:
    """``(1 - x^2)^3`` within x = r/cutoff < 1, else 0: C2 at the cutoff."""
    return torch.clamp(1.0 - x * x, min=0.0) ** 3


def list_pairs(positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All pairs of beads of frames (F, B, 3) nm, each once.

    Returns
    -------
    first, second : (n,) beads of each pair
    difference : (F, n, 3) nm, from the first to the second
    distance : (F, n) nm
    """
    pairs = torch.triu_indices(positions.shape[1], positions.shape[1], 1, device=positions.device)
    first, second = pairs[0], pairs[1]
    difference = positions.index_select(1, second) - positions.index_select(1, first)
    return first, second, difference, torch.sqrt((difference**2).sum(dim=-1))


class RadialBasis(nn.Module):
    """Gaussians of the distance, evenly spaced from 0 to the cutoff, width one spacing."""

    centers: Tensor

    def __init__(self, n_basis: int, cutoff_nm: float) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(0.0, cutoff_nm, n_basis))
        self.gamma = 0.5 * ((n_basis - 1) / cutoff_nm) ** 2

    def forward(self, distance: Tensor) -> Tensor:
        return torch.exp(-self.gamma * (distance.unsqueeze(-1) - self.centers) ** 2)


def build_readout(features: int, activation: nn.Module) -> nn.Sequential:
    """Energy of a bead from its features; zero at first: training sets out from the priors, not from noise on top."""
    last = nn.Linear(features, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, features), activation, last)
