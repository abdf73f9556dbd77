"""Priors + network as one module, in the form that is exported and simulated."""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

from typing import Optional, Union

import torch
from torch import Tensor, nn

from openmm_hvpcg.potential import PotentialSpec, compute_buffers
from openmm_hvpcg.training.models.explicit_torsions import ExplicitTorsions
from openmm_hvpcg.training.models.priors import (
    angle_energy,
    bond_energy,
    dihedral_energy,
    improper_energy,
    repulsion_energy,
)
from openmm_hvpcg.training.models.tabulated import TabulatedSchNet
from openmm_hvpcg.training.models.torsions import TorsionEnergy, split_network


class Molecule(nn.Module):
    """What ties a module to a molecule: its species and prior terms, and the energies of these.

    Parameters
    ----------
    spec : species and prior parameters; its ``bead_map`` is the molecule the module is bound to
    """

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
    torsion_index: Tensor
    chain_index: Tensor

    def __init__(self, spec: PotentialSpec) -> None:
        super().__init__()
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


class TotalEnergy(Molecule):
    """Energy of K copies of the molecule of ``spec``: the module of a potential file.

    Parameters
    ----------
    network : energies (F,) from positions (F, B, 3) and species (B,), or with the rows of bonded beads beside them
    spec : species and prior parameters; its ``bead_map`` is the molecule the module is bound to
    """

    precision: Tensor

    def __init__(self, network: nn.Module, spec: PotentialSpec) -> None:
        super().__init__(spec)
        self.network, self.torsions = split_network(network)
        # Empty: its dtype is the one the network computes in, and follows .double() as the weights do.
        self.register_buffer("precision", torch.zeros(0))

    def frame_energies(self, positions: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm; the network runs in the dtype of its weights."""
        # Distances do not change with the origin, and float32 resolves them best near it.
        centred = positions - positions.mean(dim=1, keepdim=True)
        centred = centred.to(self.precision.dtype)
        energy = self.network(centred, self.species)
        if self.torsions is not None:
            energy = energy + self.torsions(centred, self.species, self.torsion_index, self.chain_index)
        energy = energy.to(positions.dtype)
        if self.include_priors:
            energy = energy + self.prior_energies(positions)
        return energy

    def forward(self, positions: Tensor) -> Tensor:
        """Summed energy, kJ/mol, of K copies given as positions (K*B, 3) nm."""
        return self.frame_energies(positions.reshape(-1, self.species.shape[0], 3)).sum()


class TotalEnergyAndForces(Molecule):
    """The same contract, of a network that gives energies together with their gradient.

    Called as it is, it returns the energy, whose first derivative by the positions automatic differentiation knows; the
    second derivative is not there. With ``outputs_forces`` set it returns energy and forces, without that detour.

    Parameters
    ----------
    network : positions (K*B, 3) nm, species (B,) -> energies (K,) kJ/mol, their gradient (K*B, 3)
    spec : as for :class:`TotalEnergy`
    torsions : the trained network of the dihedrals, where there is one
    """

    def __init__(
        self,
        network: TabulatedSchNet,
        spec: PotentialSpec,
        torsions: Optional[TorsionEnergy] = None,  # noqa: UP045
    ) -> None:
        super().__init__(spec)
        self.network = network
        self.torsions = None if torsions is None else ExplicitTorsions(torsions)
        self.outputs_forces = False

    @torch.jit.export
    def forget_pairs(self) -> None:
        """Drop what the networks remember of the molecule and of where its beads were."""
        self.network.forget()
        if self.torsions is not None:
            self.torsions.forget()

    def compute_networks(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (K,) of the networks and their gradient (K*B, 3) of positions (K*B, 3) nm."""
        with torch.no_grad():
            energies, gradient = self.network(positions, self.species)
            if self.torsions is not None:
                more, by_turns = self.torsions(positions, self.species, self.torsion_index, self.chain_index)
                energies, gradient = energies + more, gradient + by_turns
            return energies.to(positions.dtype), gradient.to(positions.dtype)

    def frame_energies(self, positions: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm."""
        energies, gradient = self.compute_networks(positions.reshape(-1, 3))
        if positions.requires_grad:
            # Adds nothing but the gradient.
            moves = positions - positions.detach()
            energies = energies + (gradient.view(positions.shape) * moves).sum(dim=2).sum(dim=1)
        if self.include_priors:
            energies = energies + self.prior_energies(positions)
        return energies

    def energy_and_forces(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Summed energy kJ/mol and forces (K*B, 3) kJ/mol/nm of K copies given as positions (K*B, 3) nm."""
        energies, gradient = self.compute_networks(positions)
        energy, forces = energies.sum(), gradient.neg()
        if self.include_priors:
            frames = positions.detach().view(-1, self.species.shape[0], 3).requires_grad_(True)
            priors = self.prior_energies(frames).sum()
            by_frames = torch.autograd.grad([priors], [frames], allow_unused=True)[0]
            energy = energy + priors.detach()
            if by_frames is not None:
                forces = forces - by_frames.view(-1, 3)
        return energy, forces

    def forward(self, positions: Tensor) -> Union[Tensor, tuple[Tensor, Tensor]]:  # noqa: UP007
        """Energy, or energy and forces, of K copies given as positions (K*B, 3) nm."""
        if self.outputs_forces:
            return self.energy_and_forces(positions)
        return self.frame_energies(positions.reshape(-1, self.species.shape[0], 3)).sum()
