"""How good a trained network is: validation errors beside those of the priors and the noise of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_hvpcg.training.batches import MoleculeTensors
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.losses import compute_hvp_target
from openmm_hvpcg.training.noise import LabelNoise, estimate_noise
from openmm_hvpcg.training.preparation import CHUNK_FRAMES, Prepared


def evaluate_network(
    network: torch.nn.Module, prepared: Prepared, datasets: Sequence[LabelledFrames]
) -> dict[str, Any]:
    """Errors with all probes, over all molecules and, under ``molecules``, for each.

    Keys: ``force_rmse_validation``, ``force_rmse_priors``, ``force_noise`` (kJ/mol/nm, rms per component);
    ``hvp_rmse_validation``, ``hvp_rmse_priors``, ``hvp_noise`` (kJ/mol/nm^2). Noise is None where too few frames pair.
    """
    found = {
        dataset.name: _judge(network, tensors, frames, dataset, prepared.beta)
        for tensors, frames, dataset in zip(prepared.molecules, prepared.validation, datasets, strict=True)
    }
    return {**_describe(list(found.values())), "molecules": {name: _describe([f]) for name, f in found.items()}}


@dataclass(frozen=True)
class _Figures:
    """Sums of squares of (force, prior force, HVP, prior HVP) residuals, their counts, and the noise."""

    squares: NDArray[np.float64]
    counts: NDArray[np.float64]
    noise: LabelNoise | None
    n_frames: int


def _judge(
    network: torch.nn.Module,
    tensors: MoleculeTensors,
    validation: NDArray[np.int64],
    dataset: LabelledFrames,
    beta: float,
) -> _Figures:
    residual, excess = _compute_residuals(network, tensors, beta)
    prior = compute_hvp_target(tensors.hvps, tensors.forces, tensors.probes, beta)
    rows = torch.from_numpy(validation)
    held_out = [values[rows].double() for values in (residual, tensors.forces, excess, prior)]
    return _Figures(
        np.array([float((values**2).sum()) for values in held_out]),
        np.array([float(values.numel()) for values in held_out]),
        estimate_noise(dataset.positions, dataset.walker, residual.numpy(), dataset.probes, excess.numpy()),
        len(dataset.positions),
    )


def _describe(figures: list[_Figures]) -> dict[str, Any]:
    rmse = np.sqrt(sum(f.squares for f in figures) / sum(f.counts for f in figures))
    known = [(f.noise, f.n_frames) for f in figures if f.noise is not None]
    weights = [n for _, n in known]
    return {
        "force_rmse_validation": float(rmse[0]),
        "force_rmse_priors": float(rmse[1]),
        "force_noise": _average([noise.force for noise, _ in known], weights),
        "hvp_rmse_validation": float(rmse[2]),
        "hvp_rmse_priors": float(rmse[3]),
        "hvp_noise": _average([noise.hvp for noise, _ in known], weights),
    }


def _average(values: list[float], weights: list[int]) -> float | None:
    """Root of the weighted mean square, None of nothing."""
    return float(np.sqrt(np.average(np.square(values), weights=weights))) if values else None


def _compute_residuals(network: torch.nn.Module, tensors: MoleculeTensors, beta: float) -> tuple[Tensor, Tensor]:
    """Force residuals (T, B, 3) and HVP residuals ``t(v) - H v`` (T, P, B, 3) of all frames."""
    forces, hvps = [], []
    for start in range(0, len(tensors.positions), CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        f, h = compute_forces_and_hvps(
            lambda x: network(x, tensors.species), tensors.positions[rows], tensors.probes[rows]
        )
        d = tensors.forces[rows] - f
        forces.append(d)
        hvps.append(compute_hvp_target(tensors.hvps[rows], d, tensors.probes[rows], beta) - h)
    return torch.cat(forces), torch.cat(hvps)
