"""From datasets to what training needs: splits, priors, labels without the priors' part, scales of the loss.

The priors do not change while the network learns, so their forces and HVPs are taken out of the labels once: with
``q' = q - F_prior`` and ``p' = p - H_prior v`` the residual ``d`` and the HVP target are the same as for the total
energy, and a step costs the network alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
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
from openmm_hvpcg.prior_terms import PriorParameters, build_prior_geometry
from openmm_hvpcg.training.batches import FrameGroup, MoleculeSize, MoleculeTensors, group_molecules
from openmm_hvpcg.training.covariance import PooledCovariance, count_soft_features
from openmm_hvpcg.training.dataset import LabelledFrames, split_by_time_blocks
from openmm_hvpcg.training.density import compute_density_labels
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.fit_priors import fit_priors
from openmm_hvpcg.training.hessian_ratio import HessianRatio, find_share
from openmm_hvpcg.training.labels.probes import ProbeLaw
from openmm_hvpcg.training.losses import LossScales, compute_hvp_target, restrict, whiten
from openmm_hvpcg.training.models.torsions import Bonded
from openmm_hvpcg.training.models.total import TotalEnergy
from openmm_hvpcg.training.projection import build_projector, list_links
from openmm_hvpcg.training.scratch import Memory, Storage
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

#: Frames differentiated at once.
CHUNK_FRAMES = 256
#: Numbers (in double) that sums over labels take at once.
CHUNK_VALUES = 2**19
#: Priors and pooled covariances are fitted to so many numbers of a molecule, evenly spaced, and to so many frames.
FIT_VALUES, FIT_FRAMES = 2**21, 20000


@dataclass(frozen=True)
class Prepared:
    """What training needs from the datasets.

    Attributes
    ----------
    molecules : tensors without the priors' part, views of those in ``groups``
    groups : molecules that share batches
    training, validation : frames of each molecule
    pooling : the training frames of each that pooled covariances are fitted to
    scales : of the loss, from the training frames
    prior_validation : force and HVP loss of the priors alone on the validation frames, normalised, with the first probe
        of each, as in training
    spec : priors, species, provenance
    beta : 1/kT, mol/kJ
    force_noise : variance a component of forces at held beads, from inner samples; None where labels are not averaged
    pooled : for each molecule its pooled covariance, fitted to what the priors leave; None where none is used
    ratios : for each molecule how its covariance follows the Hessian; None where it does not
    storage : where the tensors lie
    """

    molecules: list[MoleculeTensors]
    groups: list[FrameGroup]
    training: list[NDArray[np.int64]]
    validation: list[NDArray[np.int64]]
    pooling: list[NDArray[np.int64]]
    scales: LossScales
    prior_validation: tuple[float, float]
    spec: PotentialSpec
    beta: float
    force_noise: float | None
    pooled: list[PooledCovariance | None]
    ratios: list[HessianRatio | None]
    storage: Storage

    def pool_covariances(self, residuals: Sequence[Tensor]) -> None:
        """Fit the pooled covariances anew, to force residuals (F, B, 3) of the model of the day at ``pooling``."""
        terms = []
        for molecule, frames, pooled, ratio, residual in zip(
            self.molecules, self.pooling, self.pooled, self.ratios, residuals, strict=True
        ):
            if pooled is not None:
                positions = self.storage.gather(molecule.positions, torch.from_numpy(frames))
                left = pooled.fit(positions, residual)
                if ratio is not None:
                    terms.append(ratio.regress(pooled, positions, left))
        self.set_share(find_share(terms))
        self.apply_covariances()

    def get_share(self) -> float | None:
        """Of the Hessians' deviations, what the covariances follow; None where they do not."""
        return next((ratio.share for ratio in self.ratios if ratio is not None), None)

    def set_share(self, share: float) -> None:
        """Of the Hessians' deviations, what the covariances follow."""
        for ratio in self.ratios:
            if ratio is not None:
                ratio.share = share

    def apply_covariances(self) -> None:
        """Put the covariance times the probes of every frame into the tensors."""
        for molecule, pooled, ratio in zip(self.molecules, self.pooled, self.ratios, strict=True):
            if pooled is not None:
                apply_pooled(pooled, molecule, self.storage, ratio)


def prepare(
    datasets: Sequence[LabelledFrames],
    training: TrainingSettings,
    model: ModelSettings,
    priors: PriorSettings,
    made_from: dict[str, Any],
    *,
    mixed: bool = True,
    storage: Storage | None = None,
) -> Prepared:
    """Split, fit the priors on the training part alone, take them out of the labels, set the scales.

    Where ``mixed``, molecules of as many beads share batches. The tensors are put into ``storage``, by default memory.
    """
    storage = storage or Memory()
    if not datasets:
        raise DataError("there is nothing to train on", expected="at least one dataset")
    temperatures = {d.temperature_K for d in datasets}
    if len(temperatures) > 1:
        raise DataError("datasets of different temperatures cannot train one potential", got=sorted(temperatures))
    temperature = temperatures.pop()
    if training.density > 0:
        for dataset in datasets:
            _check_density(dataset)
    splits = [
        split_by_time_blocks(d.walker, training.validation_fraction, training.validation_blocks) for d in datasets
    ]
    parameters = fit_priors(
        [(d.bead_map, d.positions[thin_rows(s[0], count_pairs(d))]) for d, s in zip(datasets, splits, strict=True)],
        priors,
        temperature,
        [_find_log_densities(d) for d in datasets],
    )
    spec = _build_spec(datasets, parameters, model, temperature, made_from)
    groups, molecules = _allocate(datasets, spec, training, mixed, storage)
    for dataset, molecule in zip(datasets, molecules, strict=True):
        _remove_priors(dataset, spec, molecule, storage)
    pooled: list[PooledCovariance | None] = []
    ratios: list[HessianRatio | None] = [None] * len(datasets)
    pooling = [thin_rows(s[0], count_soft_features(d.bead_map.n_beads)) for s, d in zip(splits, datasets, strict=True)]
    for k, dataset in enumerate(datasets):
        molecules[k], own = _choose_covariance(dataset, molecules[k], splits[k][0], training, storage)
        pooled.append(own)
        if own is not None and training.covariance == "ratio" and training.hvp_weight != 0:
            ratios[k] = _find_ratio(dataset, molecules[k], own, pooling[k], training.seed, storage)
    for group in groups:
        group.own_share.copy_(torch.tensor([molecules[k].own_share for k in group.members], dtype=torch.float64))
    beta = 1.0 / compute_kt(temperature)
    scales = LossScales(*_mean_squares(molecules, [s[0] for s in splits], beta, storage))
    if not (scales.force > 0 and scales.hvp > 0):
        raise DataError("the labels hold nothing to learn: forces or HVPs are all zero", where=datasets[0].name)
    prior_force, prior_hvp = _mean_squares(molecules, [s[1] for s in splits], beta, storage, n_probes=1)
    return Prepared(
        molecules,
        groups,
        [s[0] for s in splits],
        [s[1] for s in splits],
        pooling,
        scales,
        (prior_force / scales.force, prior_hvp / scales.hvp),
        spec,
        beta,
        _measure_noise(datasets, splits),
        pooled,
        ratios,
        storage,
    )


def _check_density(dataset: LabelledFrames) -> None:
    """Whether the loss can take the density of the frames: they have to be distributed as the ensemble is."""
    law = ProbeLaw.from_attributes(dataset.attributes)
    if not law.is_isotropic:
        raise DataError(
            "training.density takes traces of Hessians, which soft probes do not give",
            where=dataset.name,
            expected="probes of the law rademacher or normal",
            got=law.name,
            hint="label again, or leave training.density out",
        )
    frames = dataset.attributes.get("frames", {})
    for is_so, words, hint in (
        (frames.get("choice", {}).get("kind") == "cluster", "chosen by cluster", "by time (trajectory_choice: time)"),
        ("bias" in frames, "sampled with a bias (sampling.flatten)", "without one"),
    ):
        if is_so:
            raise DataError(
                f"training.density needs frames that are distributed as the ensemble is, and these were {words}",
                where=dataset.name,
                hint=f"take frames {hint}, or leave training.density out",
            )


def _find_log_densities(dataset: LabelledFrames) -> NDArray[np.float64] | None:
    """``ln p`` of each dihedral (D, 2, n), as frames without the bias told it; None where there was no bias."""
    bias = dataset.attributes.get("frames", {}).get("bias")
    if bias is None:
        return None
    rows = build_prior_geometry(dataset.bead_map.bonds, dataset.bead_map.n_beads).dihedrals.tolist()
    # A dihedral is the same from either end.
    told = [row if row in rows else row[::-1] for row in bias["dihedrals"]]
    if sorted(told) != sorted(rows):
        raise DataError(
            "the frames were sampled with a bias along dihedrals of other beads",
            where=dataset.name,
            expected=f"the dihedrals of this map, {sorted(rows)}",
            got=sorted(bias["dihedrals"]),
            hint="label frames that were sampled with a bias with the bead map that they were sampled with",
        )
    order = [told.index(row) for row in rows]
    return np.asarray(bias["log_densities"], dtype=np.float64)[order]


def thin_rows(frames: NDArray[np.int64], n_values: int) -> NDArray[np.int64]:
    """The frames, or evenly spaced ones of them, so that a fit with ``n_values`` numbers of each stays small."""
    most = max(FIT_FRAMES, FIT_VALUES // max(1, n_values))
    return frames if len(frames) <= most else frames[np.linspace(0, len(frames) - 1, most).astype(np.int64)]


def count_pairs(dataset: LabelledFrames) -> int:
    """Pairs of beads."""
    n_beads = dataset.bead_map.n_beads
    return n_beads * (n_beads - 1) // 2


def _split_rows(frames: NDArray[np.int64], n_values: int) -> Iterator[NDArray[np.int64]]:
    """The frames in parts of about ``CHUNK_VALUES`` numbers, of which a frame has so many."""
    size = max(1, CHUNK_VALUES // n_values)
    return (frames[start : start + size] for start in range(0, len(frames), size))


def _measure_noise(
    datasets: Sequence[LabelledFrames], splits: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> float | None:
    """Mean variance of a force component at held beads, ``E[v . C v] / 3B`` for probes with E[v v^T] = 1."""
    total, count = 0.0, 0.0
    for dataset, (frames, _) in zip(datasets, splits, strict=True):
        if dataset.covariances is None:
            return None
        for rows in _split_rows(frames, 3 * dataset.n_probes * dataset.bead_map.n_beads):
            v = dataset.probes[rows].astype(np.float64)
            total += float((v * dataset.covariances[rows]).sum())
            count += float((v**2).sum())
    return total / count


def apply_pooled(
    pooled: PooledCovariance,
    molecule: MoleculeTensors,
    storage: Storage,
    ratio: HessianRatio | None = None,
) -> None:
    """Put the covariance times the probes of every frame into the molecule's tensors."""
    for start in range(0, len(molecule.positions), CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        found = pooled.apply(molecule.positions[rows], molecule.probes[rows])
        if ratio is not None and ratio.everywhere is not None and ratio.share > 0:
            found += ratio.compute_change(pooled, molecule.positions[rows], ratio.everywhere[rows])
        molecule.covariances[rows] = found
        storage.release()


def _find_ratio(
    dataset: LabelledFrames,
    molecule: MoleculeTensors,
    pooled: PooledCovariance,
    frames: NDArray[np.int64],
    seed: int,
    storage: Storage,
) -> HessianRatio:
    """How the covariance of a molecule follows its Hessian, with what all its HVPs are off their regions' means.

    The Hessian is the whole one, with the priors' part.
    """
    law = ProbeLaw.from_attributes(dataset.attributes)
    if not law.is_isotropic:
        raise DataError(
            f"covariance: ratio cannot put a Hessian together from {law.name} probes",
            where=dataset.name,
            hint="label with probe_law: rademacher or normal, or take covariance: pooled",
        )
    rows = torch.from_numpy(frames)
    positions, probes = storage.gather(molecule.positions, rows), storage.gather(molecule.probes, rows)
    ratio = HessianRatio.build(pooled, positions, probes, torch.from_numpy(np.asarray(dataset.hvps[frames])), seed)
    deviations = storage.allocate(f"deviations-{dataset.name}", tuple(molecule.hvps.shape))
    for start in range(0, len(deviations), CHUNK_FRAMES):
        some = slice(start, start + CHUNK_FRAMES)
        hvps = torch.from_numpy(np.array(dataset.hvps[some]))
        deviations[some] = ratio.subtract_means(pooled, molecule.positions[some], molecule.probes[some], hvps).float()
        storage.release()
    ratio.everywhere = deviations
    return ratio


def _choose_covariance(
    dataset: LabelledFrames,
    molecule: MoleculeTensors,
    frames: NDArray[np.int64],
    settings: TrainingSettings,
    storage: Storage,
) -> tuple[MoleculeTensors, PooledCovariance | None]:
    """The molecule with what its HVP target takes for the covariance, and the pooled covariance where one is used."""
    kind = settings.covariance
    if kind == "auto":
        kind = "pooled" if dataset.covariances is None else "sample"
    if (kind == "sample") != (dataset.covariances is not None):
        raise _explain_mismatch(kind, dataset.name)
    if kind == "sample":
        _copy_covariances(dataset, molecule, storage)
        molecule = replace(molecule, own_share=0.0)
    is_pooled = kind in ("pooled", "ratio")
    if not is_pooled and settings.whiten == "none":
        return molecule, None
    rows = torch.from_numpy(thin_rows(frames, count_soft_features(dataset.bead_map.n_beads)))
    try:
        positions, forces = storage.gather(molecule.positions, rows), storage.gather(molecule.forces, rows)
        pooled = PooledCovariance(positions, settings.covariance_regions, settings.seed)
    except ValueError:
        if is_pooled and settings.hvp_weight != 0:
            logger.warning("%s: beads on a line have no local axes: each frame's own covariance is used", dataset.name)
        if settings.whiten != "none":
            logger.warning("%s: beads on a line have no local axes: residuals are not whitened", dataset.name)
        if molecule.whitening is not None:
            molecule.whitening.copy_(torch.eye(molecule.whitening.shape[-1]))
        return replace(molecule, whitening=None), None
    pooled.fit(positions, forces)
    if molecule.whitening is not None:
        pooled.whiten(molecule.positions, molecule.whitening, storage.release)
    if not is_pooled:
        return molecule, None
    share = len(frames) / (len(frames) + settings.covariance_frames)
    molecule = replace(molecule, own_share=share)
    apply_pooled(pooled, molecule, storage)
    return molecule, pooled


def _copy_covariances(dataset: LabelledFrames, molecule: MoleculeTensors, storage: Storage) -> None:
    for start in range(0, dataset.n_frames, CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        if dataset.covariances is not None:
            molecule.covariances[rows] = torch.from_numpy(np.array(dataset.covariances[rows]))
        storage.release()


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
        made_from.get("datasets") or {d.name: d.hash for d in datasets},
        {},
        {"made_from": made_from, "package_version": __version__, "torch_version": torch.__version__},
    )


def _allocate(
    datasets: Sequence[LabelledFrames], spec: PotentialSpec, settings: TrainingSettings, mixed: bool, storage: Storage
) -> tuple[list[FrameGroup], list[MoleculeTensors]]:
    """Room for the tensors of all molecules, in groups that share batches."""
    sizes = [
        MoleculeSize(
            d.n_frames,
            d.n_probes,
            torch.from_numpy(spec.compute_species_index(d.bead_map)),
            Bonded.find(d.bead_map),
            _find_links(d, settings),
        )
        for d in datasets
    ]
    groups = [
        FrameGroup.allocate(
            members,
            sizes,
            whitened=settings.whiten == "noise",
            dense=settings.density > 0,
            storage=storage,
        )
        for members in group_molecules(sizes, mixed)
    ]
    molecules = {k: group.get_molecule(i) for group in groups for i, k in enumerate(group.members)}
    return groups, [molecules[k] for k in range(len(datasets))]


def _find_links(dataset: LabelledFrames, settings: TrainingSettings) -> torch.Tensor | None:
    """The links along which HVPs are matched, None where they are matched in all directions."""
    if settings.hvp_along == "all":
        return None
    if settings.hvp_weight != 0 and len(dataset.bead_map.bonds) == 0:
        raise DataError(
            "training.hvp_along matches HVPs along bonds, and there are none",
            where=dataset.name,
            expected="beads with bonds",
            got=f"{dataset.bead_map.n_beads} beads without",
            hint="set training.hvp_along: all",
        )
    return torch.from_numpy(list_links(dataset.bead_map.bonds, settings.hvp_along))


def _remove_priors(dataset: LabelledFrames, spec: PotentialSpec, molecule: MoleculeTensors, storage: Storage) -> None:
    """Fill the molecule's tensors, the priors' forces and HVPs subtracted in double, then float32.

    What the density tells is of forces with the priors' part.
    """
    bound = replace(spec, bead_map=dataset.bead_map)
    total = TotalEnergy(torch.nn.Identity(), bound).double()
    kt, bonds = compute_kt(spec.temperature_K), torch.from_numpy(dataset.bead_map.bonds).long()
    for start in range(0, dataset.n_frames, CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        positions, forces, probes, hvps = (
            torch.from_numpy(np.array(a[rows]))
            for a in (dataset.positions, dataset.forces, dataset.probes, dataset.hvps)
        )
        f, h = compute_forces_and_hvps(total.prior_energies, positions.double(), probes.double())
        molecule.positions[rows], molecule.probes[rows] = positions, probes
        molecule.forces[rows] = (forces.double() - f).float()
        molecule.hvps[rows] = (hvps.double() - h).float()
        if molecule.density_forces is not None and molecule.density_probes is not None:
            labels = compute_density_labels(positions.double(), forces.double(), probes.double(), bonds, kt)
            molecule.density_forces[rows], molecule.density_probes[rows] = (a.float() for a in labels)
        storage.release()


def _mean_squares(
    molecules: Sequence[MoleculeTensors],
    frames: Sequence[NDArray[np.int64]],
    beta: float,
    storage: Storage,
    n_probes: int | None = None,
) -> tuple[float, float]:
    """Mean squares per component of what the priors leave of forces and of HVP targets, all or the first so many."""
    force, hvp, n_force, n_hvp = 0.0, 0.0, 0, 0
    parts = ((m, p) for m, f in zip(molecules, frames, strict=True) for p in _split_rows(f, m.hvps[0].numel()))
    for m, index in parts:
        rows = torch.from_numpy(index)
        d, p, v = m.forces[rows].double(), m.hvps[rows, :n_probes].double(), m.probes[rows, :n_probes].double()
        white = None if m.whitening is None else m.whitening[rows].double()
        target = compute_hvp_target(p, d, v, beta, m.covariances[rows, :n_probes].double(), m.own_share)
        force, n_force = force + float((whiten(d, white) ** 2).sum()), n_force + d.numel()
        matched = whiten(restrict(target, build_projector(m.positions[rows].double(), m.links)), white)
        hvp, n_hvp = hvp + float((matched**2).sum()), n_hvp + target.numel()
        storage.release()
    return force / n_force, hvp / n_hvp
