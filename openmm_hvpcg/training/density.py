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


def remove_bonds(positions: Tensor, vectors: Tensor, bonds: Tensor) -> Tensor:
    """``P w``: vectors (F, ..., B, 3) at frames (F, B, 3) without their components along the bonds (n, 2)."""
    if len(bonds) == 0:
        return vectors
    shape, n_frames = vectors.shape, len(positions)
    unit = torch.nn.functional.normalize(positions[:, bonds[:, 1]] - positions[:, bonds[:, 0]], dim=-1)
    index = torch.arange(len(bonds))
    rows = positions.new_zeros(n_frames, len(bonds), *positions.shape[1:])
    rows[:, index, bonds[:, 1]] = unit
    rows[:, index, bonds[:, 0]] = -unit
    rows = rows.flatten(2)
    flat = vectors.reshape(n_frames, -1, rows.shape[-1])
    gram = rows @ rows.transpose(1, 2) + RIDGE * torch.eye(len(bonds), dtype=rows.dtype, device=rows.device)
    along = torch.linalg.solve(gram, rows @ flat.transpose(1, 2))
    return (flat - along.transpose(1, 2) @ rows).reshape(shape)


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
    turn = torch.zeros_like(forces)
    for v in probes.unbind(1):
        _, change = torch.func.jvp(lambda x, v=v: remove_bonds(x, v, bonds), (positions,), (v,))
        turn = turn + change / probes.shape[1]
    return remove_bonds(positions, forces, bonds) + kt * turn, remove_bonds(positions, probes, bonds)
