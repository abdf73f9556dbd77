"""Training: force matching and force + HVP matching of a network on top of fixed priors, by Lightning.

The labels come without the priors' part (see :mod:`openmm_hvpcg.training.preparation`).
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from openmm_hvpcg.config import TRAINING_BEFORE, ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.cores import choose_torch_threads, use_torch_threads
from openmm_hvpcg.errors import BackendError, DataError, PotentialError, StudyError
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.progress import track
from openmm_hvpcg.storage import describe_changes, explain_disk_errors, write_json
from openmm_hvpcg.training.batches import BatchSampler, FrameBatches
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.diagnosis import diagnose
from openmm_hvpcg.training.evaluation import choose_network_share, evaluate_network
from openmm_hvpcg.training.losses import LossScales
from openmm_hvpcg.training.matching import MatchingModule, get_hvp_weight
from openmm_hvpcg.training.models.check import check_model
from openmm_hvpcg.training.models.registry import build_network, describe_source, scale_energy
from openmm_hvpcg.training.preparation import CHUNK_FRAMES, Prepared, prepare
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

RESULT_NAME = "training.json"
#: Pairs of beads in a batch that give a second thread enough to do.
TRAINING_PAIRS = 8000


@dataclass(frozen=True)
class FitResult:
    """A trained potential: its network, its spec (priors, species, metrics) and the learning curves.

    ``metrics`` keys: ``force_rmse_validation``, ``force_rmse_priors``, ``force_noise`` (kJ/mol/nm);
    ``hvp_rmse_validation``, ``hvp_rmse_priors``, ``hvp_noise`` (kJ/mol/nm^2); all root mean squares per component;
    ``n_frames``, ``n_validation_frames``, ``epochs``, ``best_epoch``, ``wall_time_s``, ``force_weight``,
    ``hvp_weight``; ``network_share``, what of the network's energy was kept (1: all, 0: the priors alone were
    as good on the held-out blocks); ``molecules``, the errors and noise of each; ``diagnosis``, whether the labels do
    (:class:`~openmm_hvpcg.training.diagnosis.Diagnosis`); and more of
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
    folder : gets ``checkpoints/``, ``logs/`` (CSV and TensorBoard) and, at the end, ``training.json``
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
        "training": training.model_dump(mode="json", exclude={"arms"}),
        "model": model.model_dump(mode="json"),
        "priors": priors.model_dump(mode="json"),
        "datasets": {d.name: d.hash for d in datasets},
    }
    _check_folder(folder, made_from)
    if (folder / RESULT_NAME).exists():
        logger.info("%s: training is finished already", folder)
        return load_fit(folder)
    if model.is_foreign:
        _check_foreign(datasets, model)
    prepared = prepare(datasets, training, model, priors, made_from)
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "made_from.json", made_from)
        began = time.perf_counter()
        threads = choose_torch_threads(max(d.bead_map.n_beads for d in datasets), training.batch_size, TRAINING_PAIRS)
        with use_torch_threads(threads):
            recorder, checkpoint, trainer = _train(prepared, training, model, folder, progress)
    best = Path(checkpoint.best_model_path)
    network = _load_network(best, prepared.spec, model)
    hvp_weight = get_hvp_weight(training, prepared)
    share = choose_network_share(network, prepared, training.force_weight, hvp_weight)
    scale_energy(network, share)
    metrics = evaluate_network(network, prepared, datasets)
    metrics |= {
        "n_frames": int(sum(len(t) for t in prepared.training)),
        "n_validation_frames": int(sum(len(v) for v in prepared.validation)),
        "epochs": int(trainer.current_epoch),
        "best_epoch": int(torch.load(best, weights_only=True)["epoch"]),
        "wall_time_s": recorder.seconds_before + time.perf_counter() - began,
        "force_weight": training.force_weight,
        "hvp_weight": hvp_weight,
        "network_share": share,
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
    spec = replace(prepared.spec, metrics=metrics, provenance=prepared.spec.provenance | describe_source(model))
    content = {
        "spec": json.loads(spec.to_json()),
        "best": best.name,
        "network_share": share,
        "curves": recorder.curves,
        "metrics": metrics,
    }
    write_json(folder / RESULT_NAME, content)
    return FitResult(network, spec, metrics, recorder.curves)


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
        model = ModelSettings.model_validate(spec.model)
        _warn_of_changed_source(spec, model, path)
        network = _load_network(Path(folder) / "checkpoints" / content["best"], spec, model)
        scale_energy(network, content.get("network_share", 1.0))
        return FitResult(network, spec, content["metrics"], content["curves"])
    except (KeyError, ValueError, OSError, RuntimeError, PotentialError) as error:
        raise DataError(
            f"the training result is damaged ({error})", where=path, hint="delete it and train again"
        ) from error


class _Patience(EarlyStopping):
    """Does not count while forces are alone, nor with a cosine: what is to come still has to have its turn."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if isinstance(pl_module, MatchingModule) and not pl_module.has_more_to_come:
            super().on_train_epoch_end(trainer, pl_module)


class _Recorder(Callback):
    """Learning curves in physical units, kept in the checkpoint; a progress bar; the time spent."""

    def __init__(
        self, scales: LossScales, prior_validation: tuple[float, float], force_weight: float, hvp_weight: float
    ) -> None:
        self.scales = scales
        force, hvp = prior_validation
        self.curves: list[dict[str, float]] = [self._row(0, None, force, hvp, force_weight * force + hvp_weight * hvp)]
        self.seconds_before = 0.0
        self.advance: Any = lambda n: None

    def _row(self, epoch: int, train: float | None, force: float, hvp: float, loss: float) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "train_loss": train,
            "val_loss": loss,
            "val_force_rmse": (force * self.scales.force) ** 0.5,
            "val_hvp_rmse": (hvp * self.scales.hvp) ** 0.5,
        }

    def on_train_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        metric = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.curves.append(
            self._row(
                trainer.current_epoch + 1,
                metric["train_loss"],
                metric["val_force"],
                metric["val_hvp"],
                metric["val_loss"],
            )
        )
        self.advance(1)

    def state_dict(self) -> dict[str, Any]:
        # As text: hundreds of rows of Python numbers would take most of the time of writing a checkpoint.
        seconds = self.seconds_before + time.perf_counter() - self._began
        return {"curves": json.dumps(self.curves), "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        curves = state_dict["curves"]
        self.curves = json.loads(curves) if isinstance(curves, str) else curves
        self.seconds_before = state_dict["seconds"]


def _check_folder(folder: Path, made_from: dict[str, Any]) -> None:
    path = folder / "made_from.json"
    if not path.exists():
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    changed = []
    for section, new in made_from.items():
        if isinstance(new, dict):
            before = TRAINING_BEFORE if section == "training" else {}
            changed += describe_changes(section, {**before, **old.get(section, {})}, new)
        elif old.get(section) != new:
            changed.append(f"{section} ({old.get(section)} -> {new})")
    if changed:
        raise StudyError(
            f"the training there was made from other settings: {', '.join(changed)}",
            where=folder,
            hint="choose another output folder, or delete this one to train again",
        )


def _train(
    prepared: Prepared, settings: TrainingSettings, model: ModelSettings, folder: Path, progress: bool
) -> tuple[_Recorder, ModelCheckpoint, lightning.Trainer]:
    """Run Lightning to the end, from its last checkpoint where there is one."""
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise BackendError("training on cuda was asked for, and torch sees no GPU", hint="use accelerator: auto")
    torch.manual_seed(settings.seed)
    network = _new_network(prepared.spec, model)
    module = MatchingModule(network, settings, prepared)
    n_probes = [m.probes.shape[1] for m in prepared.molecules]
    batches = FrameBatches(prepared.molecules)
    loaders = [
        DataLoader(
            batches,
            batch_size=None,
            sampler=BatchSampler(frames, n_probes, size, shuffle=shuffle, seed=settings.seed),
        )
        for frames, size, shuffle in (
            (prepared.training, settings.batch_size, True),
            (prepared.validation, CHUNK_FRAMES, False),
        )
    ]
    checkpoints = folder / "checkpoints"
    # At the end of the epoch, after the recorder and the learning-rate schedule, so that a resumed run lacks nothing.
    checkpoint = ModelCheckpoint(
        checkpoints, "best-{epoch}", monitor="val_loss", save_last=True, save_on_train_epoch_end=True
    )
    recorder = _Recorder(prepared.scales, prepared.prior_validation, settings.force_weight, module.hvp_weight)
    last = checkpoints / "last.ckpt"
    resume, done = None, 0
    if last.exists():
        resume, done = str(last), int(torch.load(last, map_location="cpu", weights_only=True)["epoch"]) + 1
        # Lightning sets the epoch of a sampler from the second epoch on only.
        loaders[0].sampler.set_epoch(done)  # type: ignore[attr-defined]
        logger.info("%s: training resumes after epoch %d", folder.name, done)
    bar = track(f"train {folder.name}", settings.max_epochs, "epochs", done=done, show=progress)
    with _quiet_lightning(), bar as advance:
        recorder.advance = advance
        trainer = lightning.Trainer(
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[settings.accelerator],
            devices=1,
            max_epochs=settings.max_epochs,
            gradient_clip_val=settings.gradient_clip,
            callbacks=[recorder, _Patience("val_loss", patience=settings.patience), checkpoint],
            logger=[
                CSVLogger(folder / "logs", name="", version="csv"),
                TensorBoardLogger(folder / "logs", name="", version="tensorboard"),
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            inference_mode=False,  # validation needs gradients: forces and HVPs
            use_distributed_sampler=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, loaders[0], loaders[1], ckpt_path=resume, weights_only=True)
    return recorder, checkpoint, trainer


def _warn_of_changed_source(spec: PotentialSpec, model: ModelSettings, where: Path) -> None:
    then, now = spec.provenance.get("network_sha256"), describe_source(model).get("network_sha256")
    if then != now:
        logger.warning("%s: the code of %s has changed since it was trained", where, model.kind)


def _check_foreign(datasets: Sequence[LabelledFrames], model: ModelSettings) -> None:
    """Try a network of someone's own on the species of the largest molecule, before time goes into training it."""
    species = sorted({s for d in datasets for s in d.bead_map.species})
    largest = max((d.bead_map for d in datasets), key=lambda bead_map: bead_map.n_beads)
    index = torch.tensor([species.index(s) for s in largest.species])
    check_model(build_network(len(species), model), index, model.cutoff_nm, name=model.kind)


def _new_network(spec: PotentialSpec, model: ModelSettings) -> torch.nn.Module:
    return build_network(len(spec.species), model, energy_scale=compute_kt(spec.temperature_K))


def _load_network(checkpoint: Path, spec: PotentialSpec, model: ModelSettings) -> torch.nn.Module:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    network = _new_network(spec, model)
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    return network.eval()


class _quiet_lightning(warnings.catch_warnings):
    """Hide Lightning's banners and its advice on data-loader workers: the data sit in memory."""

    def __enter__(self) -> Any:
        result = super().__enter__()
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", module="torch.optim.lr_scheduler")
        for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return result
