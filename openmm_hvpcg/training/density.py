"""What the density of the frames tells of the mean force, as labels for the loss.

Frames R of an equilibrium ensemble, with density ``rho ~ exp(-beta W)``, know the mean force ``-grad W = kT grad ln
rho`` without a force label: for a vector field G(R), by parts,

    < G . (-grad W) > = kT ∫ G . grad rho = -kT < div G >

(implicit score matching: Hyvarinen, J. Mach. Learn. Res. 6, 695 (2005)). Of the force-matching loss ``|F - q|^2`` all
that a network learns from is ``-2 < F . q >``, so that ``2 (G . q + kT div G)``, zero on average, may be added for any
G made of F.

Projected forces scatter by hundreds of kJ/mol/nm; the divergence scatters by kT over the length that F varies on. Along
bonds that length is short, and forces tell more; in all other directions the density does. So G is what of F is left
without its components along the bonds, ``G = P F`` with the projector ``P = 1 - J^T (J J^T)^-1 J``, rows of J the
gradients of the bond lengths. With probes v, ``E[v v^T] = 1``, and the Hessian H of the network, ``F = -grad U``,

    G . q + kT div G = E_v[ F . (P q + kT (d_v P) v) - kT (P v) . H v ].

What stands beside F and beside H v does not know the network: it is computed once, before training. The HVPs are those
that Hessian matching takes anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Keeps J J^T regular where bonds are more than the directions they can span; its diagonal is 2.
RIDGE = 1e-9
#: Numbers in the matrices J J^T of the frames that are taken at once.
CHUNK_VALUES = 2**21


class BondProjector:
    """``P`` of frames (F, B, 3), without the directions along the bonds (n, 2); vectors are (F, P, B, 3)."""

    def __init__(self, positions: Tensor, bonds: Tensor) -> None:
        #: Which beads a bond joins, (n, B): -1 and 1.
        self.ends = positions.new_zeros(len(bonds), positions.shape[1])
        index = torch.arange(len(bonds), device=bonds.device)
        self.ends[index, bonds[:, 0]], self.ends[index, bonds[:, 1]] = -1.0, 1.0
        along = self._take_differences(positions)
        self.length = torch.linalg.vector_norm(along, dim=-1, keepdim=True)
        #: Unit vectors along the bonds: those and ``ends`` are J.
        self.unit = along / self.length
        gram = (self.ends @ self.ends.T) * (self.unit @ self.unit.transpose(1, 2))
        self.inverse = torch.linalg.inv(gram + RIDGE * torch.eye(len(bonds), dtype=gram.dtype, device=gram.device))

    def _take_differences(self, vectors: Tensor) -> Tensor:
        """Of the two beads of each bond, (F, ..., n, 3)."""
        return self.ends @ vectors

    def _find_shares(self, vectors: Tensor) -> Tensor:
        """``(J J^T)^-1 J w`` (F, P, n)."""
        return (self._take_differences(vectors) * self.unit[:, None]).sum(-1) @ self.inverse

    def _spread(self, shares: Tensor, directions: Tensor) -> Tensor:
        """To each bond its share (F, P, n) along a direction (F, P, n, 3): (F, P, B, 3)."""
        return self.ends.T @ (shares[..., None] * directions)

    def remove(self, vectors: Tensor) -> Tensor:
        """``P w``."""
        return vectors - self._spread(self._find_shares(vectors), self.unit[:, None])

    def turn(self, vectors: Tensor) -> Tensor:
        """``(d_v P) v``: what ``P v`` changes by where the beads move along v."""
        shares = self._find_shares(vectors)
        moved = self._take_differences(vectors)
        unit = self.unit[:, None]
        change = (moved - (moved * unit).sum(-1, keepdim=True) * unit) / self.length[:, None]
        spread = self._spread(shares, change)
        left = vectors - self._spread(shares, unit)
        rest = (self._take_differences(left) * change).sum(-1) - (self._take_differences(spread) * unit).sum(-1)
        return -spread - self._spread(rest @ self.inverse, unit)


def compute_density_labels(
    positions: Tensor, forces: Tensor, probes: Tensor, bonds: Tensor, kt: float
) -> tuple[Tensor, Tensor]:
    """``P q + kT (d_v P) v``, its mean over a frame's probes, (F, B, 3); and ``P v`` (F, P, B, 3).

    Parameters
    ----------
    positions, forces : (F, B, 3), the forces q with the priors' part
    probes : (F, P, B, 3), with E[v v^T] = 1
    bonds : (n, 2)
    kt : kJ/mol
    """
    if len(bonds) == 0:
        return forces, probes
    size = max(1, CHUNK_VALUES // len(bonds) ** 2)
    parts = []
    for x, q, v in zip(*(a.split(size) for a in (positions, forces, probes)), strict=True):
        projector = BondProjector(x, bonds)
        parts.append((projector.remove(q[:, None])[:, 0] + kt * projector.turn(v).mean(1), projector.remove(v)))
    density_forces, density_probes = zip(*parts, strict=True)
    return torch.cat(density_forces), torch.cat(density_probes)
