"""Directions along links of beads, as bonds are, and all others: ``1 - P`` and ``P``.

``P = 1 - J^T (J J^T)^-1 J``, rows of J the gradients of the links' lengths.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_hvpcg.prior_terms import build_prior_geometry

#: Keeps J J^T regular where links are more than the directions they can span; its diagonal is 2.
RIDGE = 1e-9
#: The same for HVPs, in float32 and with more links than directions.
SOFT_RIDGE = 1e-4


def list_links(bonds: NDArray[np.int64], along: str) -> NDArray[np.int64]:
    """Pairs (n, 2) of beads between which curvature is large: ``bonds``; with ``angles`` ends of two in a row, too."""
    links = [tuple(bond) for bond in bonds.tolist()]
    if along == "angles":
        angles = build_prior_geometry(bonds, int(bonds.max(initial=-1)) + 1).angles
        known = {tuple(sorted(link)) for link in links}
        links += [ends for ends in dict.fromkeys((a, b) for a, _, b in angles.tolist()) if ends not in known]
    return np.array(links, dtype=np.int64).reshape(-1, 2)


class LinkProjector:
    """``P`` of frames (F, B, 3), without the directions along links (n, 2) of beads; vectors are (F, P, B, 3).

    Parameters
    ----------
    positions : (F, B, 3)
    links : (n, 2), pairs of beads
    ridge : added to the diagonal of J J^T, which is 2. A combination of links that hardly moves a bead, such as those
        around a flat centre, is let go of where its square is below it
    """

    def __init__(self, positions: Tensor, links: Tensor, ridge: float = RIDGE) -> None:
        #: Which beads a link joins, (n, B): -1 and 1.
        self.ends = positions.new_zeros(len(links), positions.shape[1])
        index = torch.arange(len(links), device=links.device)
        self.ends[index, links[:, 0]], self.ends[index, links[:, 1]] = -1.0, 1.0
        along = self._take_differences(positions)
        self.length = torch.linalg.vector_norm(along, dim=-1, keepdim=True)
        #: Unit vectors along the links: those and ``ends`` are J.
        self.unit = along / self.length
        gram = (self.ends @ self.ends.T) * (self.unit @ self.unit.transpose(1, 2))
        self.inverse = torch.linalg.inv(gram + ridge * torch.eye(len(links), dtype=gram.dtype, device=gram.device))

    def _take_differences(self, vectors: Tensor) -> Tensor:
        """Of the two beads of each link, (F, ..., n, 3)."""
        return self.ends @ vectors

    def _find_shares(self, vectors: Tensor) -> Tensor:
        """``(J J^T)^-1 J w`` (F, P, n)."""
        return (self._take_differences(vectors) * self.unit[:, None]).sum(-1) @ self.inverse

    def _spread(self, shares: Tensor, directions: Tensor) -> Tensor:
        """To each link its share (F, P, n) along a direction (F, P, n, 3): (F, P, B, 3)."""
        return self.ends.T @ (shares[..., None] * directions)

    def remove(self, vectors: Tensor) -> Tensor:
        """``P w``."""
        return vectors - self.keep(vectors)

    def keep(self, vectors: Tensor) -> Tensor:
        """``(1 - P) w``: what is along the links."""
        return self._spread(self._find_shares(vectors), self.unit[:, None])

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


def build_projector(positions: Tensor, links: Tensor | None) -> LinkProjector | None:
    """Of frames (F, B, 3), for HVPs that are matched along links; None where they are matched everywhere."""
    return None if links is None else LinkProjector(positions, links, SOFT_RIDGE)
