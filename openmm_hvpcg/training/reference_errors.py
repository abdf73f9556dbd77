"""How far a potential is from the PMF reference: the one figure of merit that no noise in labels flatters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_hvpcg.errors import DataError, PotentialError
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.models.torsions import Bonded, bind_network
from openmm_hvpcg.training.models.total import TotalEnergy
from openmm_hvpcg.training.reference import TEMPERATURE_TOLERANCE_K, PMFReference

#: Configurations differentiated at once: the whole Hessian of each takes 3B backward passes.
CHUNK_FRAMES = 128
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class ReferenceErrors:
    """Errors of a potential against a PMF reference.

    All are root mean squares per Cartesian component of a bead: forces in kJ/mol/nm; HVPs in kJ/mol/nm^2 for probes
    with ``E[v v^T] = 1``, that is, the Frobenius norm of the Hessian (or of what is wrong with it) over sqrt(3B).

    Attributes
    ----------
    force_rmse, hvp_rmse : without the reference's own noise, 0 where it explains all
    force_rmse_error, hvp_rmse_error : standard errors; NaN with one configuration
    force_size, hvp_size : of the reference itself, without its noise
    force_noise, hvp_noise : standard errors of the reference
    n_frames : configurations
    """

    force_rmse: float
    force_rmse_error: float
    hvp_rmse: float
    hvp_rmse_error: float
    force_size: float
    hvp_size: float
    force_noise: float
    hvp_noise: float
    n_frames: int


def compute_reference_errors(
    reference: PMFReference, spec: PotentialSpec, network: torch.nn.Module | None
) -> ReferenceErrors:
    """Force and HVP errors of priors and network against the reference.

    Mean square differences less the mean squared standard errors of the reference: unbiased by its noise. Standard
    errors are the spread of the results over 1000 bootstrap samples of the configurations (drawn with replacement,
    seed fixed); they hold what differs between configurations, and the noise, but suppose that configurations are
    independent.

    Parameters
    ----------
    reference : see :func:`~openmm_hvpcg.training.reference.compute_reference`
    spec : priors and species of the potential
    network : energies (F,) from positions (F, B, 3) nm and species (B,), evaluated in the dtype of its weights; None:
        the priors alone, which are evaluated in double

    Raises
    ------
    PotentialError
        The potential does not know a species of the molecule, or gives NaN.
    DataError
        Potential and reference are of different temperatures, or all probes are zero.
    """
    if abs(spec.temperature_K - reference.temperature_K) > TEMPERATURE_TOLERANCE_K:
        raise DataError(
            "potential and reference are of different temperatures",
            expected=f"{spec.temperature_K:g} K (potential)",
            got=f"{reference.temperature_K:g} K",
            where=reference.name or None,
            hint="a PMF belongs to one temperature: make the reference at that of the potential",
        )
    scale = float(np.mean(reference.probes**2))
    if not scale > 0:
        raise DataError("all probes of the reference are zero", where=reference.name or None, hint="make it again")
    forces, hvps = _differentiate(reference, spec, network)
    force = _Squares.measure(forces, reference.forces, reference.force_errors)
    hvp = _Squares.measure(hvps, reference.hvps, reference.hvp_errors, scale)
    force_error, hvp_error = _bootstrap([force, hvp])
    return ReferenceErrors(
        force.rmse,
        force_error,
        hvp.rmse,
        hvp_error,
        _root(np.mean(force.size - force.noise)),
        _root(np.mean(hvp.size - hvp.noise)),
        _root(np.mean(force.noise)),
        _root(np.mean(hvp.noise)),
        reference.n_frames,
    )


@dataclass(frozen=True)
class _Squares:
    """Mean squares of each configuration (T,): of the difference, of the reference, of its standard error."""

    difference: NDArray[np.float64]
    size: NDArray[np.float64]
    noise: NDArray[np.float64]

    @classmethod
    def measure(
        cls,
        model: NDArray[np.float64],
        truth: NDArray[np.float64],
        errors: NDArray[np.float64],
        scale: float = 1.0,
    ) -> _Squares:
        return cls(*(np.mean(x**2, axis=tuple(range(1, x.ndim))) / scale for x in (model - truth, truth, errors)))

    @property
    def rmse(self) -> float:
        return _root(np.mean(self.difference - self.noise))


def _root(mean_square: np.floating) -> float:
    return float(np.sqrt(max(float(mean_square), 0.0)))


def _bootstrap(squares: list[_Squares]) -> list[float]:
    """Standard errors of the rmse, all from the same draws of configurations."""
    n_frames = len(squares[0].difference)
    if n_frames < 2:
        return [float("nan")] * len(squares)
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(n_frames, size=(BOOTSTRAP_SAMPLES, n_frames))
    means = [(s.difference - s.noise)[draws].mean(axis=1) for s in squares]
    return [float(np.sqrt(np.maximum(m, 0.0)).std(ddof=1)) for m in means]


def _differentiate(
    reference: PMFReference, spec: PotentialSpec, network: torch.nn.Module | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Forces (T, B, 3) and HVPs (T, P, B, 3) of the potential at the reference's configurations and probes."""
    bound = replace(spec, bead_map=reference.bead_map)
    priors = TotalEnergy(torch.nn.Identity(), bound).double()
    # Distances do not change with the origin, and float32 resolves them best near it.
    centred = reference.positions - reference.positions.mean(axis=1, keepdims=True)
    positions, probes = torch.from_numpy(centred), torch.from_numpy(reference.probes)
    forces, hvps = torch.zeros_like(positions), torch.zeros_like(probes)
    for start in range(0, len(positions), CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        parts = [compute_forces_and_hvps(priors.prior_energies, positions[rows], probes[rows])]
        if network is not None:
            parts.append(_differentiate_network(network, bound, positions[rows], probes[rows]))
        forces[rows], hvps[rows] = (torch.stack(values).sum(dim=0) for values in zip(*parts, strict=True))
    if not (torch.isfinite(forces).all() and torch.isfinite(hvps).all()):
        raise PotentialError("forces or HVPs of the potential are not finite", where=reference.name or None)
    return forces.numpy(), hvps.numpy()


def _differentiate_network(
    network: torch.nn.Module, spec: PotentialSpec, positions: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """In the dtype and on the device of the network's weights; double on the CPU comes back."""
    weights = next(network.parameters(), torch.zeros(0))
    species = torch.from_numpy(spec.compute_species_index()).to(weights.device)
    energy = bind_network(network, species, Bonded.find(spec.bead_map))
    forces, hvps = compute_forces_and_hvps(energy, positions.to(weights), probes.to(weights))
    return forces.double().cpu(), hvps.double().cpu()
