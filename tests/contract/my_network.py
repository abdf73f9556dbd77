"""The example of the README, "Your own network": what a user would write, in a module of their own."""

import torch
from torch import Tensor, nn


class MyNetwork(nn.Module):
    """Energies from all pair distances within the cutoff, one small network for every pair of species."""

    def __init__(self, n_species: int, settings, width: int = 32) -> None:
        super().__init__()
        self.cutoff_nm: float = settings.cutoff_nm
        self.embedding = nn.Embedding(n_species, width)
        self.inner = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width))
        self.outer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        nn.init.zeros_(self.outer[-1].weight)  # start from the priors alone
        nn.init.zeros_(self.outer[-1].bias)

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Energies (F,) in kT of frames (F, B, 3) nm of a molecule with species (B,)."""
        n = positions.shape[1]
        pairs = torch.triu_indices(n, n, 1, device=positions.device)
        x = torch.linalg.vector_norm(positions[:, pairs[0]] - positions[:, pairs[1]], dim=-1) / self.cutoff_nm
        kinds = self.embedding(species[pairs[0]]) * self.embedding(species[pairs[1]])
        energies = self.outer(self.inner(x.unsqueeze(-1)) * kinds).squeeze(-1)
        return (energies * torch.clamp(1 - x * x, min=0.0) ** 3).sum(dim=-1)
