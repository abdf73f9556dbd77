"""Forces and Hessian-vector products of any energy function, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Energies (F,) kJ/mol of positions (F, B, 3) nm; frame f's energy depends on frame f alone.
EnergyFunction = Callable[[Tensor], Tensor]


def compute_forces(energy: EnergyFunction, positions: Tensor, create_graph: bool = False) -> Tensor:
    """Forces ``-grad U`` (F, B, 3), kJ/mol/nm, of frames (F, B, 3) nm."""
    with torch.enable_grad():
        x = positions.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=create_graph)
    return -gradient


def compute_forces_and_hvps(
    energy: EnergyFunction, positions: Tensor, probes: Tensor, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Forces (F, B, 3) and HVPs ``+(grad grad U) v`` (F, P, B, 3) by double backward.

    Parameters
    ----------
    energy : see :data:`EnergyFunction`
    positions : (F, B, 3) nm
    probes : (F, P, B, 3)
    create_graph : keep the graph, for a loss on the results
    """
    with torch.enable_grad():
        x = positions.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        n_probes = probes.shape[1]
        products = [
            torch.autograd.grad(
                (gradient * probes[:, p]).sum(),
                x,
                create_graph=create_graph,
                retain_graph=create_graph or p < n_probes - 1,
            )[0]
            for p in range(n_probes)
        ]
    forces, hvps = -gradient, torch.stack(products, dim=1)
    return (forces, hvps) if create_graph else (forces.detach(), hvps.detach())
