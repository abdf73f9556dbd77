"""An equivariant network on beads (PaiNN type), written for small dense molecules.

Beside its scalar features every bead carries vectors, which turn with the molecule. They hold what distances to single
neighbours do not: one interaction sees angles, two see dihedral angles (but not their sign: the energy is the same for
the mirror image).

Source: Schütt, Unke, Gastegger, ICML 2021 (arXiv:2102.03150), eqs. 7 to 10. Our choices: one filter a pair, used in
both directions; Gaussians for the radial basis and the envelope of :mod:`~openmm_hvpcg.training.models.radial`, so that
the energy has a continuous second derivative at the cutoff, which Hessian matching needs; norms of vectors softened, so
that it has one where a vector vanishes too; no parameters for vectors that are zero before the first interaction, or
that nothing reads after the last.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import torch
from torch import Tensor, nn

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.training.models.chirality import Chirality
from openmm_hvpcg.training.models.filters import compute_filters, list_filters
from openmm_hvpcg.training.models.radial import RadialBasis, build_readout, cutoff_envelope, list_pairs


def soft_norm(v: Tensor, softness: float = 0.1) -> Tensor:
    """``sqrt(|v|^2 + e^2) - e`` over the second-last axis, e the softness: zero at zero, and smooth there.

    Vectors much shorter than e count by their square, much longer ones by their length; features are of order one.
    """
    return torch.sqrt((v**2).sum(dim=-2) + softness**2) - softness


class Message(nn.Module):
    """What the neighbours tell a bead: scalars, vectors along the pair, and their own vectors, if they have any."""

    def __init__(self, features: int, n_basis: int, has_vectors: bool) -> None:
        super().__init__()
        self.features = features
        self.has_vectors = has_vectors
        width = (3 if has_vectors else 2) * features
        self.project = nn.Sequential(nn.Linear(features, features), nn.SiLU(), nn.Linear(features, width))
        self.filter = nn.Linear(n_basis, width)

    def forward(
        self, s: Tensor, v: Tensor, weights: Tensor, unit: Tensor, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Changes of scalars (N, features) and vectors (N, 3, features) from pairs (first, second), each (n,).

        ``weights`` (n, width) are the filters of the distances, ``unit`` (n, 3) the directions from first to second.
        """
        x = self.project(s)
        to_first, to_second = weights * x.index_select(0, second), weights * x.index_select(0, first)
        n = self.features
        scalars = torch.zeros_like(s).index_add(0, first, to_first[:, :n])
        scalars = scalars.index_add(0, second, to_second[:, :n])
        along = unit.unsqueeze(-1)
        vectors_first = to_first[:, n : 2 * n].unsqueeze(1) * along
        vectors_second = -to_second[:, n : 2 * n].unsqueeze(1) * along
        if self.has_vectors:
            vectors_first = vectors_first + to_first[:, 2 * n :].unsqueeze(1) * v.index_select(0, second)
            vectors_second = vectors_second + to_second[:, 2 * n :].unsqueeze(1) * v.index_select(0, first)
        vectors = torch.zeros_like(v).index_add(0, first, vectors_first).index_add(0, second, vectors_second)
        return scalars, vectors


class Update(nn.Module):
    """What a bead makes of its scalars and vectors; of its vectors only if a later interaction reads them."""

    def __init__(self, features: int, keeps_vectors: bool) -> None:
        super().__init__()
        self.features = features
        self.keeps_vectors = keeps_vectors
        width = (3 if keeps_vectors else 2) * features
        self.mix = nn.Linear(features, 2 * features, bias=False)
        self.weigh = nn.Sequential(nn.Linear(2 * features, features), nn.SiLU(), nn.Linear(features, width))

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Changes of scalars (N, features) and vectors (N, 3, features)."""
        n = self.features
        mixed = self.mix(v)
        left, right = mixed[..., :n], mixed[..., n:]
        weights = self.weigh(torch.cat((s, soft_norm(right)), dim=-1))
        scalars = weights[..., :n] + weights[..., n : 2 * n] * (left * right).sum(dim=1)
        if self.keeps_vectors:
            return scalars, weights[..., 2 * n :].unsqueeze(1) * left
        return scalars, torch.zeros_like(v)


class PaiNN(nn.Module):
    """Energy of a molecule from its beads' species, distances and directions.

    Parameters
    ----------
    n_species : size of the embedding
    settings : width, depth, basis and cutoff
    energy_scale : kJ/mol, multiplies the output so that weights of order one give energies of the right size
    """

    energy_scale: Tensor

    def __init__(self, n_species: int, settings: ModelSettings, energy_scale: float = 1.0) -> None:
        super().__init__()
        features, depth = settings.features, settings.interactions
        self.cutoff_nm = settings.cutoff_nm
        self.embedding = nn.Embedding(n_species, features)
        self.basis = RadialBasis(settings.radial, settings.cutoff_nm)
        self.messages = nn.ModuleList(Message(features, settings.radial, has_vectors=i > 0) for i in range(depth))
        self.updates = nn.ModuleList(Update(features, keeps_vectors=i < depth - 1) for i in range(depth))
        channels = settings.chiral_channels
        self.chirality = Chirality(features, settings.radial, channels) if channels else None
        self.readout = build_readout(features, nn.SiLU())
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm with species (B,), or (F, B) of each frame."""
        first, second, difference, distance = list_pairs(positions, self.cutoff_nm)
        unit = difference / distance.unsqueeze(-1)
        weights = self._compute_filters(distance)
        s = self.embedding(species.expand(positions.shape[0], positions.shape[1]).flatten())
        if self.chirality is not None:
            s = s + self.chirality(s, weights[-2], weights[-1], unit, first, second)
        v = s.new_zeros(s.shape[0], 3, s.shape[1])
        for i, (message, update) in enumerate(zip(self.messages, self.updates)):  # noqa: B905  TorchScript has no strict
            scalars, vectors = message(s, v, weights[i], unit, first, second)
            s, v = s + scalars, v + vectors
            scalars, vectors = update(s, v)
            s, v = s + scalars, v + vectors
        energies = self.readout(s).reshape(positions.shape[0], positions.shape[1]).sum(dim=-1)
        return self.energy_scale * energies

    def _compute_filters(self, distance: Tensor) -> list[Tensor]:
        """Filters (n, width) of the interactions, and the two of the handedness."""
        if torch.jit.is_scripting():
            basis = self.basis(distance)
            envelope = cutoff_envelope(distance / self.cutoff_nm).unsqueeze(-1)
            weights: list[Tensor] = []
            for message in self.messages:
                weights.append(message.filter(basis) * envelope)  # type: ignore[operator]
            if self.chirality is not None:
                weights.append(self.chirality.direct(basis) * envelope)
                weights.append(self.chirality.filter(basis) * envelope)
            return weights
        else:  # TorchScript leaves out this branch only where it is one
            filters = list_filters(self.messages, self.chirality)
            return compute_filters(distance, self.basis, self.cutoff_nm, filters)
