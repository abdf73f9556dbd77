"""What every network here builds on: pairs of a small dense molecule, radial basis, envelope of the cutoff, readout."""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import math

import torch
from torch import Tensor, nn


def cutoff_envelope(x: Tensor) -> Tensor:
    """``(1 - x^2)^3`` within x = r/cutoff < 1, else 0: C2 at the cutoff."""
    inside = torch.clamp(1.0 - x * x, min=0.0)
    return inside * inside * inside


def list_pairs(positions: Tensor, cutoff_nm: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of beads of frames (F, B, 3) nm within the cutoff, each once; TorchScript and torch.func get all of them.

    Beads are counted through the frames, bead b of frame f being ``f B + b``, so that pairs need no padding.

    Returns
    -------
    first, second : (n,) beads of each pair
    difference : (n, 3) nm, from the first to the second
    distance : (n,) nm
    """
    n_frames, n_beads = positions.shape[0], positions.shape[1]
    of_frame = torch.triu_indices(n_beads, n_beads, 1, device=positions.device)
    starts = n_beads * torch.arange(n_frames, device=positions.device)
    pairs = (of_frame.unsqueeze(1) + starts.unsqueeze(-1)).flatten(1)
    x = positions.flatten(0, 1)
    if torch.jit.is_scripting():
        pass
    elif not torch._C._are_functorch_transforms_active():
        pairs = _keep_close(x.detach(), pairs, cutoff_nm)
    first, second = pairs[0], pairs[1]
    difference = x.index_select(0, second) - x.index_select(0, first)
    return first, second, difference, torch.sqrt((difference * difference).sum(dim=-1))


def _keep_close(x: Tensor, pairs: Tensor, cutoff_nm: float) -> Tensor:
    """Those pairs (2, n) of beads ``x`` (F B, 3) that are not beyond the cutoff, where the envelope is zero."""
    difference = x.index_select(0, pairs[1]) - x.index_select(0, pairs[0])
    close = (difference * difference).sum(dim=-1) <= cutoff_nm**2
    return pairs.index_select(1, close.nonzero().squeeze(-1))


class RadialBasis(nn.Module):
    """Gaussians of the distance, evenly spaced from 0 to the cutoff, width one spacing."""

    centers: Tensor

    def __init__(self, n_basis: int, cutoff_nm: float) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(0.0, cutoff_nm, n_basis))
        self.gamma = 0.5 * ((n_basis - 1) / cutoff_nm) ** 2
        # Far from a center exp is many times slower than exp2 on a CPU: it takes care of results that underflow.
        self.exponent = -self.gamma / math.log(2.0)

    def forward(self, distance: Tensor) -> Tensor:
        offset = distance.unsqueeze(-1) - self.centers
        return torch.exp2(self.exponent * offset * offset)


def build_readout(features: int, activation: nn.Module) -> nn.Sequential:
    """Energy of a bead from its features; zero at first: training sets out from the priors, not from noise on top."""
    last = nn.Linear(features, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, features), activation, last)
