"""How good a trained network is: validation errors beside those of the priors and the noise of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_hvpcg.training.batches import MoleculeTensors
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.labels.probes import ProbeLaw
from openmm_hvpcg.training.losses import compute_density_excess, compute_hvp_target, restrict, whiten
from openmm_hvpcg.training.models.torsions import bind_network
from openmm_hvpcg.training.noise import LabelNoise, choose_frames, estimate_noise
from openmm_hvpcg.training.preparation import CHUNK_FRAMES, Prepared
from openmm_hvpcg.training.projection import build_projector

#: What is judged; see :class:`_Figures`.
TERMS = ("force", "hvp", "loss_force", "loss_hvp")
#: Probes of each frame, of the random ones it has, that are judged: more cost time, and the frames' scatter stays.
JUDGED_PROBES = 8
#: Stretches of the held-out frames behind standard errors.
N_STRETCHES = 10


def evaluate_network(
    network: torch.nn.Module, prepared: Prepared, datasets: Sequence[LabelledFrames]
) -> dict[str, Any]:
    """Errors with the first ``JUDGED_PROBES`` probes of a frame, over all molecules and, under ``molecules``, for each.

    Keys: ``force_rmse_validation``, ``force_rmse_priors``, ``force_rmse_training``, ``force_noise`` (kJ/mol/nm, rms per
    component); ``hvp_rmse_validation``, ``hvp_rmse_priors``, ``hvp_rmse_training``, ``hvp_noise`` (kJ/mol/nm^2);
    ``force_rmse_validation_error`` and ``hvp_rmse_validation_error``, standard errors over the held-out frames. Noise
    is None where too few frames pair. ``loss_terms``: ``force`` and ``hvp`` as the loss sees them (its HVP target, its
    whitening), what :class:`~openmm_hvpcg.training.diagnosis.TermFigures` holds.
    """
    found = {
        dataset.name: _judge(network, tensors, frames, dataset, prepared)
        for tensors, frames, dataset in zip(prepared.molecules, prepared.validation, datasets, strict=True)
    }
    figures = list(found.values())
    terms = {"force": _describe_term(figures, "loss_force"), "hvp": _describe_term(figures, "loss_hvp")}
    molecules = {name: _describe([f]) for name, f in found.items()}
    return {**_describe(figures), "loss_terms": terms, "molecules": molecules}


def choose_network_share(
    network: torch.nn.Module,
    prepared: Prepared,
    force_weight: float,
    hvp_weight: float,
    density: float = 0.0,
) -> float:
    """Share of the network's energy, 0 to 1, with the least loss on the validation frames.

    The loss is a parabola in the share (with the HVP targets held at those of the whole network), so that a potential
    scaled by it is never worse than the priors alone on the frames that are held out.
    """
    along, square = 0.0, 0.0
    for m, frames in zip(prepared.molecules, prepared.validation, strict=True):
        for part in np.array_split(frames, -(-len(frames) // CHUNK_FRAMES)):
            rows = torch.from_numpy(part)
            white = None if m.whitening is None else m.whitening[rows]
            energy = bind_network(network, m.species, m.bonded)
            f, h = compute_forces_and_hvps(energy, m.positions[rows], m.probes[rows])
            terms = [(f, m.forces[rows], force_weight / prepared.scales.force)]
            if hvp_weight > 0:
                target = compute_hvp_target(
                    m.hvps[rows], m.forces[rows] - f, m.probes[rows], prepared.beta, m.covariances[rows], m.own_share
                )
                projector = build_projector(m.positions[rows], m.links)
                h_matched, target = restrict(h, projector), restrict(target, projector)
                terms.append((h_matched, target, hvp_weight / prepared.scales.hvp / m.probes.shape[1]))
            for found, aim, weight in terms:
                found, aim = whiten(found, white).double(), whiten(aim, white).double()
                along += weight * float((found * aim).sum())
                square += weight * float((found**2).sum())
            if m.density_forces is not None and m.density_probes is not None:
                excess = compute_density_excess(f, h, m.density_forces[rows], m.density_probes[rows], prepared.beta)
                along -= density * force_weight / prepared.scales.force * float(excess.double().sum())
            prepared.storage.release()
    return float(np.clip(along / square, 0.0, 1.0)) if square > 0 else 0.0


@dataclass(frozen=True)
class _Figures:
    """Mean squares (2, T) of every frame, of the network's residuals and the priors', by term; and the noise.

    ``force`` and ``hvp`` are in physical units and free of bias, ``loss_force`` and ``loss_hvp`` as the loss sees them.
    """

    squares: dict[str, NDArray[np.float64]]
    noise: dict[str, float | None]
    n_components: int
    validation: NDArray[np.int64]

    @property
    def training(self) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(self.squares["force"].shape[1]), self.validation)


def _judge(
    network: torch.nn.Module,
    tensors: MoleculeTensors,
    validation: NDArray[np.int64],
    dataset: LabelledFrames,
    prepared: Prepared,
) -> _Figures:
    n_frames = len(tensors.positions)
    chosen = choose_frames(n_frames)
    # Places for what is kept, made first: small pieces kept from every chunk would hold the memory of the rest.
    squares = {name: np.zeros((2, n_frames)) for name in TERMS}
    kept = {name: _make_room(tensors.forces, chosen) for name in ("positions", "force", "loss_force")}
    kept |= {name: _make_room(tensors.hvps[:, :JUDGED_PROBES], chosen) for name in ("probes", "hvp", "loss_hvp")}
    for start in range(0, n_frames, CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        part = _take(tensors, rows)
        terms = _compute_terms(network, part, prepared.beta)
        first, last = np.searchsorted(chosen, [start, start + CHUNK_FRAMES])
        wanted = torch.from_numpy(chosen[first:last] - start)
        for name, both in terms.items():
            squares[name][:, rows] = np.stack([(r.double() ** 2).flatten(1).mean(1).numpy() for r in both])
            kept[name][first:last] = both[0][wanted].numpy()
        kept["positions"][first:last] = part.positions[wanted].numpy()
        kept["probes"][first:last] = part.probes[wanted].numpy()
        prepared.storage.release()
    noise = _estimate_noises(kept, chosen, tensors, dataset)
    return _Figures(
        squares,
        noise,
        tensors.forces[0].numel(),
        validation,
    )


def _make_room(tensor: Tensor, frames: NDArray[np.int64]) -> NDArray[np.float32]:
    """For rows like those of the tensor at some frames."""
    return np.zeros((len(frames), *tensor.shape[1:]), dtype=np.float32)


def _take(tensors: MoleculeTensors, rows: slice) -> MoleculeTensors:
    """Some of the frames, with the probes that are judged."""
    names = ["positions", "forces"] + ([] if tensors.whitening is None else ["whitening"])
    found = {name: getattr(tensors, name)[rows] for name in names}
    found |= {name: getattr(tensors, name)[rows, :JUDGED_PROBES] for name in ("probes", "hvps", "covariances")}
    return replace(tensors, **found)


def _compute_terms(network: torch.nn.Module, tensors: MoleculeTensors, beta: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Residuals of the network and of the priors, by term; see :class:`_Figures`."""
    energy = bind_network(network, tensors.species, tensors.bonded)
    forces, hvps = compute_forces_and_hvps(energy, tensors.positions, tensors.probes)
    residual, prior = tensors.forces - forces, tensors.forces

    def compute_excess(own_share: float) -> tuple[Tensor, Tensor]:
        """HVP residuals of the network and of the priors."""
        target, prior_target = (
            compute_hvp_target(tensors.hvps, d, tensors.probes, beta, tensors.covariances, own_share)
            for d in (residual, prior)
        )
        return target - hvps, prior_target

    # Errors are judged with nothing pooled in the target, which would bias them.
    own = compute_excess(0.0 if tensors.own_share == 0.0 else 1.0)
    trained = compute_excess(tensors.own_share) if _is_pooled(tensors) else own
    white, projector = tensors.whitening, build_projector(tensors.positions, tensors.links)
    trained = (restrict(trained[0], projector), restrict(trained[1], projector))
    return {
        "force": (residual, prior),
        "hvp": own,
        "loss_force": (whiten(residual, white), whiten(prior, white)),
        "loss_hvp": (whiten(trained[0], white), whiten(trained[1], white)),
    }


def _is_pooled(tensors: MoleculeTensors) -> bool:
    return 0.0 < tensors.own_share < 1.0


def _estimate_noises(
    arrays: dict[str, NDArray[np.float32]],
    chosen: NDArray[np.int64],
    tensors: MoleculeTensors,
    dataset: LabelledFrames,
) -> dict[str, float | None]:
    """Noise of each term from positions, probes and the network's residuals at the frames chosen for it."""
    law, walker = ProbeLaw.from_attributes(dataset.attributes), dataset.walker[chosen]

    def estimate(force: str, hvp: str) -> LabelNoise | None:
        return estimate_noise(arrays["positions"], walker, arrays[force], arrays["probes"], arrays[hvp], law, chosen)

    noise = estimate("force", "hvp")
    plain = tensors.whitening is None and tensors.links is None
    loss_noise = noise if plain and not _is_pooled(tensors) else estimate("loss_force", "loss_hvp")
    return {
        "force": noise.force if noise else None,
        "hvp": noise.hvp if noise else None,
        "loss_force": loss_noise.force if loss_noise else None,
        # Whitened or projected, the residual matrices are not symmetric, and the estimate does not hold.
        "loss_hvp": loss_noise.hvp if loss_noise and plain else None,
    }


def _describe(figures: list[_Figures]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("force", "hvp"):
        term = _describe_term(figures, name)
        rmse = float(np.sqrt(term["validation"]))
        found |= {
            f"{name}_rmse_validation": rmse,
            f"{name}_rmse_validation_error": 0.5 * term["validation_error"] / rmse if rmse > 0 else 0.0,
            f"{name}_rmse_priors": float(np.sqrt(term["priors_validation"])),
            f"{name}_rmse_training": float(np.sqrt(term["training"])),
            f"{name}_noise": None if term["noise"] is None else float(np.sqrt(term["noise"])),
        }
    return found


def _describe_term(figures: list[_Figures], name: str) -> dict[str, Any]:
    """Mean squares per component of one term over all molecules, a frame counting by its components."""
    weights = [np.full(f.squares[name].shape[1], f.n_components) for f in figures]

    def average(split: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means of network, priors and what the network takes off; and their standard errors."""
        rows = [getattr(f, split) for f in figures]
        squares = np.concatenate([f.squares[name][:, r] for f, r in zip(figures, rows, strict=True)], axis=1)
        n = np.concatenate([w[r] for w, r in zip(weights, rows, strict=True)])
        squares = np.vstack([squares, squares[1] - squares[0]])
        return np.average(squares, axis=1, weights=n), _compute_errors(squares * n / n.mean())

    (network, priors, _), errors = average("validation")
    (network_training, priors_training, _), _ = average("training")
    noise = _average([f.noise[name] for f in figures], [int(w.sum()) for w in weights])
    return {
        "training": float(network_training),
        "validation": float(network),
        "priors_training": float(priors_training),
        "priors_validation": float(priors),
        "noise": None if noise is None else noise**2,
        "validation_error": float(errors[0]),
        "gain_error": float(errors[2]),
    }


def _compute_errors(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard errors of means (n, T) from stretches of successive frames, which neighbours resemble."""
    stretches = np.array_split(values, min(N_STRETCHES, values.shape[1]), axis=1)
    if len(stretches) < 2:
        return np.abs(values.mean(axis=1))
    means = np.stack([part.mean(axis=1) for part in stretches])
    return np.asarray(means.std(axis=0, ddof=1) / np.sqrt(len(stretches)))


def _average(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Root of the weighted mean square of what is known, None of nothing."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    if not known:
        return None
    return float(np.sqrt(np.average(np.square([v for v, _ in known]), weights=[w for _, w in known])))
