"""From datasets to what training needs: splits, priors, labels without the priors' part, scales of the loss.

The priors do not change while the network learns, so their forces and HVPs are taken out of the labels once: with
``q' = q - F_prior`` and ``p' = p - H_prior v`` the residual ``d`` and the HVP target are the same as for the total
energy, and a step costs the network alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_hvpcg._version import __version__
from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import DataError
from openmm_hvpcg.mapping import find_end_marks
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.prior_terms import PriorParameters
from openmm_hvpcg.training.batches import MoleculeTensors
from openmm_hvpcg.training.covariance import PooledCovariance
from openmm_hvpcg.training.dataset import LabelledFrames, split_by_time_blocks
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.fit_priors import fit_priors
from openmm_hvpcg.training.losses import LossScales, compute_hvp_target, whiten
from openmm_hvpcg.training.models.total import TotalEnergy
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

#: Frames differentiated at once.
CHUNK_FRAMES = 256


@dataclass(frozen=True)
class Prepared:
    """What training needs from the datasets.

    Attributes
    ----------
    molecules : tensors without the priors' part
    training, validation : frames of each molecule
    scales : of the loss, from the training frames
    prior_validation : force and HVP loss of the priors alone on the validation frames, normalised, with the first probe
        of each, as in training
    spec : priors, species, provenance
    beta : 1/kT, mol/kJ
    force_noise : variance a component of forces at held beads, from inner samples; None where labels are not averaged
    pooled : for each molecule its pooled covariance, fitted to what the priors leave; None where none is used
    """

    molecules: list[MoleculeTensors]
    training: list[NDArray[np.int64]]
    validation: list[NDArray[np.int64]]
    scales: LossScales
    prior_validation: tuple[float, float]
    spec: PotentialSpec
    beta: float
    force_noise: float | None
    pooled: list[PooledCovariance | None]

    def pool_covariances(self, residuals: Sequence[Tensor]) -> None:
        """Fit the pooled covariances anew, to the force residuals (T, B, 3) of the model of the day."""
        for molecule, frames, pooled, residual in zip(
            self.molecules, self.training, self.pooled, residuals, strict=True
        ):
            if pooled is not None:
                rows = torch.from_numpy(frames)
                pooled.fit(molecule.positions[rows], residual[rows])
                apply_pooled(pooled, molecule)


def prepare(
    datasets: Sequence[LabelledFrames],
    training: TrainingSettings,
    model: ModelSettings,
    priors: PriorSettings,
    made_from: dict[str, Any],
) -> Prepared:
    """Split, fit the priors on the training part alone, take them out of the labels, set the scales."""
    if not datasets:
        raise DataError("there is nothing to train on", expected="at least one dataset")
    temperatures = {d.temperature_K for d in datasets}
    if len(temperatures) > 1:
        raise DataError("datasets of different temperatures cannot train one potential", got=sorted(temperatures))
    temperature = temperatures.pop()
    splits = [
        split_by_time_blocks(d.walker, training.validation_fraction, training.validation_blocks) for d in datasets
    ]
    parameters = fit_priors(
        [(d.bead_map, d.positions[s[0]]) for d, s in zip(datasets, splits, strict=True)], priors, temperature
    )
    spec = _build_spec(datasets, parameters, model, temperature, made_from)
    molecules = [_remove_priors(d, spec) for d in datasets]
    pooled: list[PooledCovariance | None] = []
    for k, (dataset, (frames, _)) in enumerate(zip(datasets, splits, strict=True)):
        found = _choose_covariance(dataset, molecules[k], frames, training)
        molecules[k] = found[0]
        pooled.append(found[1])
    beta = 1.0 / compute_kt(temperature)
    scales = LossScales(*_mean_squares(molecules, [s[0] for s in splits], beta))
    if not (scales.force > 0 and scales.hvp > 0):
        raise DataError("the labels hold nothing to learn: forces or HVPs are all zero", where=datasets[0].name)
    prior_force, prior_hvp = _mean_squares(molecules, [s[1] for s in splits], beta, n_probes=1)
    return Prepared(
        molecules,
        [s[0] for s in splits],
        [s[1] for s in splits],
        scales,
        (prior_force / scales.force, prior_hvp / scales.hvp),
        spec,
        beta,
        _measure_noise(datasets, splits),
        pooled,
    )


def _measure_noise(
    datasets: Sequence[LabelledFrames], splits: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> float | None:
    """Mean variance of a force component at held beads, ``E[v . C v] / 3B`` for probes with E[v v^T] = 1."""
    total, count = 0.0, 0.0
    for dataset, (frames, _) in zip(datasets, splits, strict=True):
        if dataset.covariances is None:
            return None
        v = dataset.probes[frames].astype(np.float64)
        total += float((v * dataset.covariances[frames]).sum())
        count += float((v**2).sum())
    return total / count


def apply_pooled(pooled: PooledCovariance, molecule: MoleculeTensors) -> None:
    """Put the covariance times the probes of every frame into the molecule's tensors."""
    for start in range(0, len(molecule.positions), CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        molecule.covariances[rows] = pooled.apply(molecule.positions[rows], molecule.probes[rows])


def _choose_covariance(
    dataset: LabelledFrames, molecule: MoleculeTensors, frames: NDArray[np.int64], settings: TrainingSettings
) -> tuple[MoleculeTensors, PooledCovariance | None]:
    """The molecule with what its HVP target takes for the covariance, and the pooled covariance where one is used."""
    kind = settings.covariance
    if kind == "auto":
        kind = "pooled" if dataset.covariances is None else "sample"
    if (kind == "sample") != (dataset.covariances is not None):
        raise _explain_mismatch(kind, dataset.name)
    if kind == "sample":
        molecule = replace(molecule, covariances=torch.as_tensor(dataset.covariances), own_share=0.0)
    if kind != "pooled" and settings.whiten == "none":
        return molecule, None
    rows = torch.from_numpy(frames)
    try:
        pooled = PooledCovariance(molecule.positions[rows], settings.covariance_regions, settings.seed)
    except ValueError:
        if kind == "pooled" and settings.hvp_weight != 0:
            logger.warning("%s: beads on a line have no local axes: each frame's own covariance is used", dataset.name)
        if settings.whiten != "none":
            logger.warning("%s: beads on a line have no local axes: residuals are not whitened", dataset.name)
        return molecule, None
    pooled.fit(molecule.positions[rows], molecule.forces[rows])
    if settings.whiten == "noise":
        molecule = replace(molecule, whitening=pooled.whiten(molecule.positions))
    if kind != "pooled":
        return molecule, None
    share = len(frames) / (len(frames) + settings.covariance_frames)
    molecule = replace(molecule, own_share=share, covariances=torch.empty_like(molecule.hvps))
    apply_pooled(pooled, molecule)
    return molecule, pooled


def _explain_mismatch(kind: str, name: str) -> DataError:
    if kind == "sample":
        return DataError(
            "covariance: sample needs labels by conditional averaging",
            where=name,
            hint="set labels.averaging and label again, or covariance: pooled",
        )
    # Averaged forces scatter less than those of frames: their covariance is not the one of the target.
    return DataError(
        f"covariance: {kind} needs labels of frames, and these are conditional averages",
        where=name,
        hint="set covariance: auto or sample",
    )


def _build_spec(
    datasets: Sequence[LabelledFrames],
    parameters: PriorParameters,
    model: ModelSettings,
    temperature_K: float,
    made_from: dict[str, Any],
) -> PotentialSpec:
    species = sorted({s for d in datasets for s in d.bead_map.species})
    masses: dict[str, float] = {}
    sites: dict[str, str] = {}
    for d in datasets:
        m = d.bead_map
        marks = find_end_marks(m.residues)
        for mark, name, residue, kind, mass in zip(
            marks, m.names, m.residues, m.species, m.masses.tolist(), strict=True
        ):
            masses.setdefault(kind, mass)
            site = f"{residue[0]}:{name}"
            sites.setdefault(mark + site if mark and kind.startswith(mark) else site, kind)
    return PotentialSpec(
        tuple(species),
        datasets[0].bead_map,
        sites,
        masses,
        parameters,
        model.cutoff_nm,
        temperature_K,
        model.model_dump(mode="json"),
        {d.name: d.hash for d in datasets},
        {},
        {"made_from": made_from, "package_version": __version__, "torch_version": torch.__version__},
    )


def _remove_priors(dataset: LabelledFrames, spec: PotentialSpec) -> MoleculeTensors:
    """The dataset's tensors with the priors' forces and HVPs subtracted, in double, then float32."""
    bound = replace(spec, bead_map=dataset.bead_map)
    total = TotalEnergy(torch.nn.Identity(), bound).double()
    positions = torch.from_numpy(dataset.positions)
    probes = torch.from_numpy(dataset.probes)
    forces, hvps = torch.from_numpy(dataset.forces).clone(), torch.from_numpy(dataset.hvps).clone()
    for start in range(0, len(positions), CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        f, h = compute_forces_and_hvps(total.prior_energies, positions[rows].double(), probes[rows].double())
        forces[rows] = (forces[rows].double() - f).float()
        hvps[rows] = (hvps[rows].double() - h).float()
    species = torch.from_numpy(spec.compute_species_index(dataset.bead_map))
    # Without strides: no memory until a covariance from elsewhere takes its place.
    nothing = torch.zeros(1).expand(hvps.shape)
    return MoleculeTensors(positions, forces, probes, hvps, species, nothing)


def _mean_squares(
    molecules: Sequence[MoleculeTensors], frames: Sequence[NDArray[np.int64]], beta: float, n_probes: int | None = None
) -> tuple[float, float]:
    """Mean squares per component of what the priors leave of forces and of HVP targets, all or the first so many."""
    force, hvp, n_force, n_hvp = 0.0, 0.0, 0, 0
    for m, index in zip(molecules, frames, strict=True):
        rows = torch.from_numpy(index)
        d, p, v = m.forces[rows].double(), m.hvps[rows, :n_probes].double(), m.probes[rows, :n_probes].double()
        white = None if m.whitening is None else m.whitening[rows].double()
        target = compute_hvp_target(p, d, v, beta, m.covariances[rows, :n_probes].double(), m.own_share)
        force, n_force = force + float((whiten(d, white) ** 2).sum()), n_force + d.numel()
        hvp, n_hvp = hvp + float((whiten(target, white) ** 2).sum()), n_hvp + target.numel()
    return force / n_force, hvp / n_hvp
