"""Networks that break the contract in one way each, for the tests of the check that has to find it."""

import torch
from my_network import MyNetwork
from torch import Tensor, nn


class Bad(nn.Module):
    """Holds a good network to spoil."""

    def __init__(self, n_species: int, settings) -> None:
        super().__init__()
        self.good = MyNetwork(n_species, settings, width=8)


class Columns(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(positions, species).unsqueeze(-1)


class Total(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(positions, species).sum()


class Pinned(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(positions, species) + positions.square().sum(dim=(1, 2))


class Oriented(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        centred = positions - positions.mean(dim=1, keepdim=True)
        return self.good(positions, species) + centred[:, :, 0].square().sum(dim=1)


class Lambda(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        double = lambda energy: 2 * energy  # noqa: E731
        return double(self.good(positions, species))


class Detached(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(positions, species).detach()


class PartlyDetached(Bad):
    """The derivative misses a factor's part."""

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        energies = self.good(positions, species)
        return energies * energies.detach()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Once(Bad):
    """Torch leaves out what it may not differentiate, and says nothing."""

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return _Once.apply(self.good(positions, species))


class Cdist(Bad):
    """Differentiable once, and torch says so."""

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        distances = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
        return self.good(positions, species) + distances.sum(dim=(1, 2))


class Dropout(Bad):
    def __init__(self, n_species: int, settings) -> None:
        super().__init__(n_species, settings)
        self.dropout = nn.Dropout(0.5)

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.dropout(self.good(positions, species))


class Mixing(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        energies = self.good(positions, species)
        return energies - 0.5 * energies.mean()


class SingleOnly(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(positions, species).float()


class DoubleConstant(Bad):
    """Works in double precision alone."""

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(positions, species) * torch.ones(1, dtype=torch.float64)


class Failing(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        raise RuntimeError("out of ideas")


class NotFinite(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(positions, species) + torch.log(-positions.square().sum(dim=(1, 2)))


class Indifferent(Bad):
    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return self.good(torch.zeros_like(positions) + torch.arange(positions.shape[1])[:, None], species)


class Springs(nn.Module):
    """Nothing to train."""

    def __init__(self, n_species: int, settings) -> None:
        super().__init__()

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        return (positions[:, 1:] - positions[:, :-1]).square().sum(dim=(1, 2))


class Pairs(nn.Module):
    """A sum over pairs of a network of the distance, ``activation``, times a function of distance/cutoff, ``end``."""

    def __init__(self, n_species: int, settings) -> None:
        super().__init__()
        self.cutoff_nm: float = settings.cutoff_nm
        self.inner = nn.Sequential(nn.Linear(1, 16), self.activation(), nn.Linear(16, 1))

    def activation(self) -> nn.Module:
        return nn.Tanh()

    def end(self, x: Tensor) -> Tensor:
        return torch.clamp(1 - x * x, min=0.0) ** 3

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        n = positions.shape[1]
        pairs = torch.triu_indices(n, n, 1, device=positions.device)
        x = torch.linalg.vector_norm(positions[:, pairs[0]] - positions[:, pairs[1]], dim=-1) / self.cutoff_nm
        return (self.inner(x.unsqueeze(-1)).squeeze(-1) * self.end(x)).sum(dim=-1)


class Kinked(Pairs):
    def activation(self) -> nn.Module:
        return nn.ReLU()


class Cut(Pairs):
    def end(self, x: Tensor) -> Tensor:
        return (x < 1).to(x.dtype)


class SlopeCut(Pairs):
    def end(self, x: Tensor) -> Tensor:
        return torch.clamp(1 - x, min=0.0)


class CosineCut(Pairs):
    """The cutoff of SchNet and PaiNN as published: zero value and slope, but a jump of the curvature."""

    def end(self, x: Tensor) -> Tensor:
        return torch.where(x < 1, 0.5 * (torch.cos(torch.pi * x) + 1), torch.zeros_like(x))
