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
from openmm_hvpcg.training.derivatives import EnergyFunction, compute_forces_and_hvps
from openmm_hvpcg.training.labels.probes import ProbeLaw
from openmm_hvpcg.training.losses import compute_hvp_target, whiten
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


def choose_network_share(network: torch.nn.Module, prepared: Prepared, force_weight: float, hvp_weight: float) -> float:
    """Share of the network's energy, 0 to 1, with the least loss on the validation frames.

    The loss is a parabola in the share (with the HVP targets held at those of the whole network), so that a potential
    scaled by it is never worse than the priors alone on the frames that are held out.
    """
    along, square = 0.0, 0.0
    for m, frames in zip(prepared.molecules, prepared.validation, strict=True):
        for part in np.array_split(frames, -(-len(frames) // CHUNK_FRAMES)):
            rows = torch.from_numpy(part)
            white = None if m.whitening is None else m.whitening[rows]
            f, h = compute_forces_and_hvps(_bind(network, m.species), m.positions[rows], m.probes[rows])
            terms = [(f, m.forces[rows], force_weight / prepared.scales.force)]
            if hvp_weight > 0:
                target = compute_hvp_target(
                    m.hvps[rows], m.forces[rows] - f, m.probes[rows], prepared.beta, m.covariances[rows], m.own_share
                )
                terms.append((h, target, hvp_weight / prepared.scales.hvp / m.probes.shape[1]))
            for found, aim, weight in terms:
                found, aim = whiten(found, white).double(), whiten(aim, white).double()
                along += weight * float((found * aim).sum())
                square += weight * float((found**2).sum())
    return float(np.clip(along / square, 0.0, 1.0)) if square > 0 else 0.0


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
    own = get_own_covariance(tensors)
    prior = compute_hvp_target(tensors.hvps, tensors.forces, tensors.probes, beta, *own)
    rows = torch.from_numpy(validation)
    held_out = [values[rows].double() for values in (residual, tensors.forces, excess, prior)]
    return _Figures(
        np.array([float((values**2).sum()) for values in held_out]),
        np.array([float(values.numel()) for values in held_out]),
        estimate_noise(
            dataset.positions,
            dataset.walker,
            residual.numpy(),
            dataset.probes,
            excess.numpy(),
            ProbeLaw.from_attributes(dataset.attributes),
        ),
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


def _bind(network: torch.nn.Module, species: Tensor) -> EnergyFunction:
    return lambda x: network(x, species)


def _average(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Root of the weighted mean square of what is known, None of nothing."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    if not known:
        return None
    return float(np.sqrt(np.average(np.square([v for v, _ in known]), weights=[w for _, w in known])))


def get_own_covariance(tensors: MoleculeTensors) -> tuple[Tensor | None, float]:
    """Arguments of :func:`compute_hvp_target` that leave nothing pooled in it: errors are judged without that bias."""
    return (tensors.covariances, 0.0) if tensors.own_share == 0.0 else (None, 1.0)


def _compute_residuals(network: torch.nn.Module, tensors: MoleculeTensors, beta: float) -> tuple[Tensor, Tensor]:
    """Force residuals (T, B, 3) and HVP residuals ``t(v) - H v`` (T, P, B, 3) of all frames."""
    own = get_own_covariance(tensors)
    forces, hvps = [], []
    for start in range(0, len(tensors.positions), CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        f, h = compute_forces_and_hvps(_bind(network, tensors.species), tensors.positions[rows], tensors.probes[rows])
        d = tensors.forces[rows] - f
        forces.append(d)
        covariances, share = own
        part = None if covariances is None else covariances[rows]
        hvps.append(compute_hvp_target(tensors.hvps[rows], d, tensors.probes[rows], beta, part, share) - h)
    return torch.cat(forces), torch.cat(hvps)
