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

from openmm_hvpcg.training.projection import LinkProjector

#: Numbers in the matrices J J^T of the frames that are taken at once.
CHUNK_VALUES = 2**21


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
        projector = LinkProjector(x, bonds)
        parts.append((projector.remove(q[:, None])[:, 0] + kt * projector.turn(v).mean(1), projector.remove(v)))
    density_forces, density_probes = zip(*parts, strict=True)
    return torch.cat(density_forces), torch.cat(density_probes)
