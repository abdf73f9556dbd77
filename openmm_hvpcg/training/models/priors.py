"""The prior energy in torch: the forms of :mod:`openmm_hvpcg.prior_terms` on batches of frames.

Every function takes positions (F, B, 3) nm, indices (n, k) and parameters (n, p), and returns energies (F,) kJ/mol.
They are TorchScript-compatible and twice differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bond_energy(positions: Tensor, index: Tensor, parameters: Tensor) -> Tensor:
    """``k/2 (r - r0)^2``; parameters (n, 2): k, r0."""
    r = torch.linalg.vector_norm(positions[:, index[:, 1]] - positions[:, index[:, 0]], dim=-1)
    return (0.5 * parameters[:, 0] * (r - parameters[:, 1]) ** 2).sum(dim=-1)


def angle_energy(positions: Tensor, index: Tensor, parameters: Tensor) -> Tensor:
    """``k/2 (cos(theta) - c0)^2``, and ``h ((s - cos(theta))/(1 + s))^3`` below s; parameters (n, 4): k, c0, h, s."""
    a = positions[:, index[:, 0]] - positions[:, index[:, 1]]
    b = positions[:, index[:, 2]] - positions[:, index[:, 1]]
    cosine = (a * b).sum(dim=-1) / (torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1))
    beyond = torch.clamp((parameters[:, 3] - cosine) / (1.0 + parameters[:, 3]), min=0.0)
    return (0.5 * parameters[:, 0] * (cosine - parameters[:, 1]) ** 2 + parameters[:, 2] * beyond**3).sum(dim=-1)


def dihedral_angle(positions: Tensor, index: Tensor) -> Tensor:
    """Dihedral angles (F, n) in radians, IUPAC sign, as OpenMM and mdtraj have it."""
    b1 = positions[:, index[:, 1]] - positions[:, index[:, 0]]
    b2 = positions[:, index[:, 2]] - positions[:, index[:, 1]]
    b3 = positions[:, index[:, 3]] - positions[:, index[:, 2]]
    normal1 = torch.linalg.cross(b1, b2)
    normal2 = torch.linalg.cross(b2, b3)
    sine = (b1 * normal2).sum(dim=-1) * torch.linalg.vector_norm(b2, dim=-1)
    return torch.atan2(sine, (normal1 * normal2).sum(dim=-1))


def dihedral_energy(positions: Tensor, index: Tensor, parameters: Tensor) -> Tensor:
    """``sum_n a_n cos(n phi) + b_n sin(n phi)``; parameters (n, 2N): a_1..a_N, b_1..b_N."""
    order = parameters.shape[1] // 2
    n = torch.arange(1, order + 1, device=positions.device, dtype=positions.dtype)
    angles = dihedral_angle(positions, index).unsqueeze(-1) * n
    return (parameters[:, :order] * torch.cos(angles) + parameters[:, order:] * torch.sin(angles)).sum(dim=(1, 2))


def improper_energy(positions: Tensor, index: Tensor, parameters: Tensor) -> Tensor:
    """``k (1 - cos(phi - phi0))``; parameters (n, 2): k, phi0."""
    phi = dihedral_angle(positions, index)
    return (parameters[:, 0] * (1.0 - torch.cos(phi - parameters[:, 1]))).sum(dim=-1)


def repulsion_energy(positions: Tensor, index: Tensor, parameters: Tensor, epsilon: float) -> Tensor:
    """``epsilon ((sigma/r)^4 - 1)^3`` within sigma; parameters (n, 1): sigma."""
    difference = positions[:, index[:, 1]] - positions[:, index[:, 0]]
    ratio = parameters[:, 0] ** 2 / (difference**2).sum(dim=-1)
    return (epsilon * torch.clamp(ratio**2 - 1.0, min=0.0) ** 3).sum(dim=-1)
