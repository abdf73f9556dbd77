"""Training: force matching and force + HVP matching of a network on top of fixed priors, by Lightning.

The labels come without the priors' part (see :mod:`openmm_hvpcg.training.preparation`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from openmm_hvpcg.config import (
    MODEL_BEFORE,
    PRIORS_BEFORE,
    TRAINING_BEFORE,
    TRAINING_FREE,
    ModelSettings,
    PriorSettings,
    TrainingSettings,
)
from openmm_hvpcg.cores import choose_torch_threads, use_torch_threads
from openmm_hvpcg.errors import BackendError, DataError, PotentialError, StudyError
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.storage import describe_changes, explain_disk_errors, write_json
from openmm_hvpcg.training.averaging import pick_weights
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.diagnosis import diagnose
from openmm_hvpcg.training.evaluation import choose_network_share, evaluate_network
from openmm_hvpcg.training.loop import TRAINING_PAIRS, build_new_network
from openmm_hvpcg.training.matching import get_hvp_weight
from openmm_hvpcg.training.models.check import check_model, takes_many_molecules
from openmm_hvpcg.training.models.committee import combine_networks
from openmm_hvpcg.training.models.registry import build_base, describe_source, scale_energy
from openmm_hvpcg.training.preparation import CHUNK_FRAMES, Prepared, prepare
from openmm_hvpcg.training.processes import open_storage, train_in_processes

logger = logging.getLogger(__name__)

RESULT_NAME = "training.json"
#: Folder of the trainings of a committee.
MEMBERS = "members"


@dataclass(frozen=True)
class FitResult:
    """A trained potential: its network, its spec (priors, species, metrics) and the learning curves.

    ``metrics`` keys: ``force_rmse_validation``, ``force_rmse_priors``, ``force_noise`` (kJ/mol/nm);
    ``hvp_rmse_validation``, ``hvp_rmse_priors``, ``hvp_noise`` (kJ/mol/nm^2); all root mean squares per component;
    ``n_frames``, ``n_validation_frames``, ``epochs``, ``best_epoch``, ``wall_time_s``, ``peak_loss`` (largest training
    loss of an epoch over the validation loss of the priors alone), ``force_weight``,
    ``hvp_weight``; ``network_share``, what of the network's energy was kept (1: all, 0: the priors alone were
    as good on the held-out blocks); ``covariance_share``, of the Hessians' spread, what covariances follow (None
    where ``training.covariance`` is not ratio); ``molecules``, the errors and noise of each; ``diagnosis``, whether the
    labels do (:class:`~openmm_hvpcg.training.diagnosis.Diagnosis`); and more of
    :func:`~openmm_hvpcg.training.evaluation.evaluate_network`.
    """

    network: torch.nn.Module
    spec: PotentialSpec
    metrics: dict[str, Any]
    curves: list[dict[str, float]] = field(default_factory=list)


def fit_potential(
    datasets: Sequence[LabelledFrames],
    training: TrainingSettings,
    model: ModelSettings,
    priors: PriorSettings,
    folder: str | Path,
    *,
    arm: str = "",
    progress: bool = True,
) -> FitResult:
    """Train one arm; resume it where it was killed; return the stored result where it is finished.

    Parameters
    ----------
    datasets : labels of every training molecule, all at one temperature
    training, model, priors : settings, an arm's overrides applied
    folder : gets ``checkpoints/``, ``logs/`` (CSV and TensorBoard) and, at the end, ``training.json``; of a committee
        each network has such a folder in ``members/``
    arm : name of the arm, recorded
    progress : show a progress bar

    Raises
    ------
    DataError
        Datasets of different temperatures, too few frames.
    StudyError
        The folder holds a training with other settings or data.
    BackendError
        ``training.accelerator`` is cuda and there is none.
    ConfigError, PotentialError
        A network of one's own cannot be built, or does not keep the contract of
        :func:`~openmm_hvpcg.training.models.check.check_model`.
    """
    folder = Path(folder)
    made_from = {
        "arm": arm,
        "training": training.model_dump(mode="json", exclude={"arms", *TRAINING_FREE}),
        "model": model.model_dump(mode="json"),
        "priors": priors.limit_to(len(datasets)).model_dump(mode="json"),
        "datasets": {d.name: d.hash for d in datasets},
    }
    _check_folder(folder, made_from)
    if (folder / RESULT_NAME).exists():
        logger.info("%s: training is finished already", folder)
        return load_fit(folder)
    mixed = _check_foreign(datasets, model) if model.is_foreign else True
    _check_devices(training)
    members = None
    if training.committee > 1:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "made_from.json", made_from)
        members = _fit_members(datasets, training, model, priors, folder, arm, progress)
    datasets = [d.thin(training.frames_per_molecule) for d in datasets]
    threads = choose_torch_threads(max((d.bead_map.n_beads for d in datasets), default=1), CHUNK_FRAMES, TRAINING_PAIRS)
    with (
        explain_disk_errors(folder),
        use_torch_threads(threads),
        open_storage(datasets, training, folder) as storage,
    ):
        prepared = prepare(datasets, training, model, priors, made_from, mixed=mixed, storage=storage)
        if members is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "made_from.json", made_from)
            network, course, curves, best = _train_one(prepared, training, model, folder, progress)
        else:
            network, course, curves = _combine(members)
            best = None
        metrics = _judge(network, prepared, datasets, training, arm, course)
    spec = replace(prepared.spec, metrics=metrics, provenance=prepared.spec.provenance | describe_source(model))
    content = {
        "spec": json.loads(spec.to_json()),
        **({"best": best} if members is None else {"committee": len(members)}),
        "network_share": metrics["network_share"],
        "curves": curves,
        "metrics": metrics,
    }
    write_json(folder / RESULT_NAME, content)
    return FitResult(network, spec, metrics, curves)


def _train_one(
    prepared: Prepared, training: TrainingSettings, model: ModelSettings, folder: Path, progress: bool
) -> tuple[torch.nn.Module, dict[str, Any], list[dict[str, float]], str]:
    """The network of the best epoch, how the training went, its curves, and the name of the checkpoint."""
    began = time.perf_counter()
    trained = train_in_processes(prepared, training, model, folder, progress)
    first, *rest = trained.recorder.curves
    course = {
        "peak_loss": max(row["train_loss"] for row in rest) / first["val_loss"],
        "epochs": trained.n_epochs,
        "best_epoch": int(torch.load(trained.best, weights_only=True)["epoch"]),
        "wall_time_s": trained.recorder.seconds_before + time.perf_counter() - began,
    }
    network = _load_network(trained.best, prepared.spec, model)
    return network, course, trained.recorder.curves, trained.best.name


def _fit_members(
    datasets: Sequence[LabelledFrames],
    training: TrainingSettings,
    model: ModelSettings,
    priors: PriorSettings,
    folder: Path,
    arm: str,
    progress: bool,
) -> list[FitResult]:
    """The networks of a committee, each a training of its own in a folder of its own."""
    found = []
    for k in range(training.committee):
        alone = training.model_copy(update={"committee": 1, "seed": training.seed + k})
        place = folder / MEMBERS / str(k)
        logger.info("%s: network %d of %d", arm or folder.name, k + 1, training.committee)
        found.append(fit_potential(datasets, alone, model, priors, place, arm=arm, progress=progress))
    return found


def _combine(members: Sequence[FitResult]) -> tuple[torch.nn.Module, dict[str, Any], list[dict[str, Any]]]:
    """The mean of the networks, how their trainings went, and the means of their curves over the epochs all had."""
    metrics = [m.metrics for m in members]
    course = {key: max(m[key] for m in metrics) for key in ("peak_loss", "epochs", "best_epoch")}
    curves = [_average_rows(rows) for rows in zip(*(m.curves for m in members), strict=False)]
    course["wall_time_s"] = sum(m["wall_time_s"] for m in metrics)
    return combine_networks([m.network for m in members]), course, curves


def _average_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean row of learning curves; of the priors alone, the first row, there is no training loss."""
    return {k: None if rows[0][k] is None else sum(row[k] for row in rows) / len(rows) for k in rows[0]}


def load_fit(folder: str | Path) -> FitResult:
    """Read a finished training back.

    Raises
    ------
    DataError
        The folder holds none, or a damaged one.
    """
    path = Path(folder) / RESULT_NAME
    if not path.exists():
        raise DataError("no finished training", where=folder, hint="run the train stage; it resumes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        spec = PotentialSpec.from_json(json.dumps(content["spec"]), where=path)
        model = ModelSettings.model_validate({**MODEL_BEFORE, **spec.model})
        _warn_of_changed_source(spec, model, path)
        if "committee" in content:
            members = [load_fit(Path(folder) / MEMBERS / str(k)).network for k in range(content["committee"])]
            network = combine_networks(members)
        else:
            network = _load_network(Path(folder) / "checkpoints" / content["best"], spec, model)
        scale_energy(network, content.get("network_share", 1.0))
        return FitResult(network, spec, content["metrics"], content["curves"])
    except (KeyError, ValueError, OSError, RuntimeError, PotentialError) as error:
        raise DataError(
            f"the training result is damaged ({error})", where=path, hint="delete it and train again"
        ) from error


def _check_folder(folder: Path, made_from: dict[str, Any]) -> None:
    path = folder / "made_from.json"
    if not path.exists():
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    changed = []
    for section, new in made_from.items():
        if isinstance(new, dict):
            before = {"training": TRAINING_BEFORE, "model": MODEL_BEFORE, "priors": PRIORS_BEFORE}.get(section, {})
            changed += describe_changes(section, {**before, **old.get(section, {})}, new)
        elif old.get(section) != new:
            changed.append(f"{section} ({old.get(section)} -> {new})")
    if changed:
        raise StudyError(
            f"the training there was made from other settings: {', '.join(changed)}",
            where=folder,
            hint="choose another output folder, or delete this one to train again",
        )


def _judge(
    network: torch.nn.Module,
    prepared: Prepared,
    datasets: Sequence[LabelledFrames],
    training: TrainingSettings,
    arm: str,
    course: dict[str, Any],
) -> dict[str, Any]:
    """Scale the network to its best share, in place; measure its errors, and say what is to be said of them.

    ``course`` is how the training went, for the metrics.
    """
    hvp_weight = get_hvp_weight(training, prepared)
    share = choose_network_share(network, prepared, training.force_weight, hvp_weight, training.density)
    scale_energy(network, share)
    metrics = evaluate_network(network, prepared, datasets)
    metrics |= {
        "n_frames": int(sum(len(t) for t in prepared.training)),
        "n_validation_frames": int(sum(len(v) for v in prepared.validation)),
        **course,
        "force_weight": training.force_weight,
        "hvp_weight": hvp_weight,
        "network_share": share,
        "covariance_share": prepared.get_share(),
    }
    if share == 0.0:
        logger.warning(
            "%s: on the held-out blocks no share of the network is better than the priors alone, so the potential is"
            " the priors; more frames, or a smaller network, may help",
            arm,
        )
    own_shares = {d.name: m.own_share for d, m in zip(datasets, prepared.molecules, strict=True)}
    diagnosis = diagnose(metrics, training, own_shares)
    metrics["diagnosis"] = diagnosis.to_dict()
    if diagnosis.warning:
        logger.warning("%s: %s", arm, diagnosis.warning)
    return metrics


def _check_devices(training: TrainingSettings) -> None:
    if training.accelerator == "cuda" and not torch.cuda.is_available():
        raise BackendError("training on cuda was asked for, and torch sees no GPU", hint="use accelerator: auto")
    on_gpu = training.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu and training.devices > torch.cuda.device_count():
        raise BackendError(
            "there are fewer GPUs than training.devices",
            expected=training.devices,
            got=torch.cuda.device_count(),
            hint="set training.devices to what there is, or accelerator: cpu",
        )


def _warn_of_changed_source(spec: PotentialSpec, model: ModelSettings, where: Path) -> None:
    then, now = spec.provenance.get("network_sha256"), describe_source(model).get("network_sha256")
    if then != now:
        logger.warning("%s: the code of %s has changed since it was trained", where, model.kind)


def _check_foreign(datasets: Sequence[LabelledFrames], model: ModelSettings) -> bool:
    """Try a network of someone's own on the species of the largest molecule, before time goes into training it.

    Returns whether its batches may mix molecules.
    """
    species = sorted({s for d in datasets for s in d.bead_map.species})
    largest = max((d.bead_map for d in datasets), key=lambda bead_map: bead_map.n_beads)
    index = torch.tensor([species.index(s) for s in largest.species])
    network = build_base(len(species), model)
    check_model(network, index, model.cutoff_nm, name=model.kind)
    return len(datasets) == 1 or takes_many_molecules(
        network, len(index), len(species), model.cutoff_nm, name=model.kind
    )


def _load_network(checkpoint: Path, spec: PotentialSpec, model: ModelSettings) -> torch.nn.Module:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    network = build_new_network(spec, model)
    network.load_state_dict(pick_weights(state))
    return network.eval()
