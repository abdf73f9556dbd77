"""Handedness of pairs of beads: what a network of distances, or of scalar products, cannot see.

The energy of a chiral molecule is not that of its mirror image, and not only term by term: whether one turn of a chain
is right-handed decides what the next turn prefers. Distances, and the vectors of equivariant networks, give both images
one energy (Pozdnyakov & Ceriotti, Mach. Learn.: Sci. Technol. 3, 045020, 2022, on what such features miss), so that
all of it would be left to the dihedral priors. Here each bead gets vectors, weighted sums of the directions to its
neighbours, and each pair the triple product of its direction with the vectors of its two beads: the volume
that changes sign in the mirror, large for four beads of a twisted chain, zero for planar ones.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import torch
from torch import Tensor, nn


class Chirality(nn.Module):
    """Changes of bead features by the handedness of the pairs that a bead belongs to.

    For a bead i with features h_i, and unit vectors r_ij to its neighbours, each channel has
    ``v_i = sum_j f(r_ij) (A h_j) r_ij`` and ``chi_ij = r_ij . (v_i x v_j)``, the same for (i, j) and (j, i); the
    change is an update network of ``sum_j g(r_ij) chi_ij (C h_j)``, f and g being linear in the radial basis.

    Parameters
    ----------
    features : width of the bead features
    n_basis : of the radial basis
    channels : how many vectors each bead gets
    """

    def __init__(self, features: int, n_basis: int, channels: int) -> None:
        super().__init__()
        self.direct = nn.Linear(n_basis, channels)
        self.source = nn.Linear(features, channels, bias=False)
        self.filter = nn.Linear(n_basis, channels)
        self.project = nn.Linear(features, channels, bias=False)
        self.update = nn.Sequential(nn.Linear(channels, features), nn.Tanh(), nn.Linear(features, features))

    def forward(
        self, h: Tensor, direct: Tensor, weights: Tensor, unit: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """Changes (N, features) of the features ``h`` from pairs (first, second), each (n,).

        ``direct`` and ``weights`` (n, channels) are the two filters of the distances with the envelope of the cutoff,
        ``unit`` (n, 3) the directions from first to second.
        """
        along, x = unit.unsqueeze(-1), self.source(h)
        to_first = (direct * x.index_select(0, second)).unsqueeze(1) * along
        to_second = (direct * x.index_select(0, first)).unsqueeze(1) * along
        v = x.new_zeros(x.shape[0], 3, x.shape[1])
        v = v.index_add(0, first, to_first).index_add(0, second, -to_second)
        volume = torch.linalg.cross(v.index_select(0, first), v.index_select(0, second), dim=1)
        weights = weights * (volume * along).sum(dim=1)
        y = self.project(h)
        message = torch.zeros_like(y).index_add(0, first, weights * y.index_select(0, second))
        message = message.index_add(0, second, weights * y.index_select(0, first))
        return self.update(message)
