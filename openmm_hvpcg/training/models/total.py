"""Priors + network as one module, in the form that is exported and simulated."""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import torch
from torch import Tensor, nn

from openmm_hvpcg.potential import PotentialSpec, compute_buffers
from openmm_hvpcg.training.models.priors import (
    angle_energy,
    bond_energy,
    dihedral_energy,
    improper_energy,
    repulsion_energy,
)


class TotalEnergy(nn.Module):
    """Energy of K copies of the molecule of ``spec``: the module of a potential file.

    Parameters
    ----------
    network : energies (F,) from positions (F, B, 3) and species (B,)
    spec : species and prior parameters; its ``bead_map`` is the molecule the module is bound to
    """

    precision: Tensor
    species: Tensor
    bond_index: Tensor
    bond_parameters: Tensor
    angle_index: Tensor
    angle_parameters: Tensor
    dihedral_index: Tensor
    dihedral_parameters: Tensor
    improper_index: Tensor
    improper_parameters: Tensor
    pair_index: Tensor
    pair_parameters: Tensor

    def __init__(self, network: nn.Module, spec: PotentialSpec) -> None:
        super().__init__()
        self.network = network
        # Empty: its dtype is the one the network computes in, and follows .double() as the weights do.
        self.register_buffer("precision", torch.zeros(0))
        self.include_priors = True
        self.repulsion_epsilon = float(spec.priors.repulsion_epsilon)
        for name, value in compute_buffers(spec).items():
            self.register_buffer(name, value)

    def prior_energies(self, positions: Tensor) -> Tensor:
        """Prior energies (F,) kJ/mol of frames (F, B, 3) nm."""
        energy = bond_energy(positions, self.bond_index, self.bond_parameters.to(positions))
        energy = energy + angle_energy(positions, self.angle_index, self.angle_parameters.to(positions))
        energy = energy + dihedral_energy(positions, self.dihedral_index, self.dihedral_parameters.to(positions))
        energy = energy + improper_energy(positions, self.improper_index, self.improper_parameters.to(positions))
        return energy + repulsion_energy(
            positions, self.pair_index, self.pair_parameters.to(positions), self.repulsion_epsilon
        )

    def frame_energies(self, positions: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm; the network runs in the dtype of its weights."""
        # Distances do not change with the origin, and float32 resolves them best near it.
        centred = positions - positions.mean(dim=1, keepdim=True)
        energy = self.network(centred.to(self.precision.dtype), self.species).to(positions.dtype)
        if self.include_priors:
            energy = energy + self.prior_energies(positions)
        return energy

    def forward(self, positions: Tensor) -> Tensor:
        """Summed energy, kJ/mol, of K copies given as positions (K*B, 3) nm."""
        return self.frame_energies(positions.reshape(-1, self.species.shape[0], 3)).sum()
