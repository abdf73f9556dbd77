"""Training: force matching and force + HVP matching of a network on top of fixed priors, by Lightning.

The labels come without the priors' part (see :mod:`openmm_hvpcg.training.preparation`).
"""

from __future__ import annotations

import functools
import json
import logging
import math
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
from torch import Tensor
from torch.utils.data import DataLoader

from openmm_hvpcg.config import TRAINING_BEFORE, ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.cores import choose_torch_threads, use_torch_threads
from openmm_hvpcg.errors import BackendError, DataError, PotentialError, StudyError
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.progress import track
from openmm_hvpcg.storage import describe_changes, explain_disk_errors, write_json
from openmm_hvpcg.training.batches import Batch, BatchSampler, FrameBatches
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import (
    EnergyFunction,
    HVPMethod,
    choose_hvp_method,
    compute_forces,
    compute_forces_and_hvps,
)
from openmm_hvpcg.training.diagnosis import diagnose
from openmm_hvpcg.training.evaluation import choose_network_share, evaluate_network
from openmm_hvpcg.training.losses import LossScales, force_loss, hvp_loss
from openmm_hvpcg.training.models.schnet import build_network, scale_energy
from openmm_hvpcg.training.preparation import CHUNK_FRAMES, Prepared, apply_pooled, prepare
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

RESULT_NAME = "training.json"
#: Pairs of beads in a batch that give a second thread enough to do.
TRAINING_PAIRS = 8000
#: Times a training pools the covariances of the HVP target anew.
POOLINGS = 10
#: Cosine schedule: steps to reach the full learning rate, and the share of it that is left at the end.
WARMUP_STEPS = 50
FINAL_RATE = 1e-3


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
    share = choose_network_share(network, prepared, training.force_weight, get_hvp_weight(training, prepared))
    scale_energy(network, share)
    metrics = evaluate_network(network, prepared, datasets)
    metrics |= {
        "n_frames": int(sum(len(t) for t in prepared.training)),
        "n_validation_frames": int(sum(len(v) for v in prepared.validation)),
        "epochs": int(trainer.current_epoch),
        "best_epoch": int(torch.load(best, weights_only=True)["epoch"]),
        "wall_time_s": recorder.seconds_before + time.perf_counter() - began,
        "force_weight": training.force_weight,
        "hvp_weight": get_hvp_weight(training, prepared),
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
    spec = replace(prepared.spec, metrics=metrics)
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
        network = _load_network(Path(folder) / "checkpoints" / content["best"], spec, model)
        scale_energy(network, content.get("network_share", 1.0))
        return FitResult(network, spec, content["metrics"], content["curves"])
    except (KeyError, ValueError, OSError, RuntimeError, PotentialError) as error:
        raise DataError(
            f"the training result is damaged ({error})", where=path, hint="delete it and train again"
        ) from error


def get_hvp_weight(settings: TrainingSettings, prepared: Prepared) -> float:
    """The weight of the HVP term as a number."""
    if settings.hvp_weight == "balanced":
        return prepared.scales.balance(prepared.beta, prepared.force_noise) * settings.force_weight
    return float(settings.hvp_weight)


class MatchingModule(lightning.LightningModule):
    """Force and HVP matching of a network against labels without the priors' part."""

    def __init__(self, network: torch.nn.Module, settings: TrainingSettings, prepared: Prepared) -> None:
        super().__init__()
        self.network = network
        self.settings = settings
        self.prepared = prepared
        self.scales, self.beta = prepared.scales, prepared.beta
        self.hvp_weight = get_hvp_weight(settings, prepared)
        self._pools = any(pooled is not None for pooled in prepared.pooled)
        self._method: HVPMethod | None = None
        self._schedule_state: dict[str, Any] | None = None

    def compute_losses(self, batch: Batch, with_hvps: bool, create_graph: bool) -> tuple[Tensor, Tensor | None]:
        """Normalised force and HVP terms (see :mod:`openmm_hvpcg.training.losses`)."""

        def energy(x: Tensor) -> Tensor:
            return self.network(x, batch.species)

        if not with_hvps:
            forces = compute_forces(energy, batch.positions, create_graph)
            return force_loss(forces, batch.forces, self.scales, batch.whitening), None
        method = self._choose_method(energy, batch)
        forces, hvps = compute_forces_and_hvps(energy, batch.positions, batch.probes, create_graph, method)
        residual = batch.forces - forces
        return (
            force_loss(forces, batch.forces, self.scales, batch.whitening),
            hvp_loss(
                hvps,
                batch.hvps,
                residual,
                batch.probes,
                self.beta,
                self.scales,
                batch.covariances,
                batch.own_share,
                batch.whitening,
            ),
        )

    def _choose_method(self, energy: EnergyFunction, batch: Batch) -> HVPMethod:
        """Measured once on a GPU and kept in the checkpoint; on a CPU double backward always won."""
        if self._method is None:
            on_cpu = batch.positions.device.type == "cpu"
            self._method = "reverse" if on_cpu else choose_hvp_method(energy, batch.positions, batch.probes)
        return self._method

    def combine(self, force: Tensor, hvp: Tensor | None) -> Tensor:
        loss = self.settings.force_weight * force
        return loss if hvp is None else loss + self.hvp_weight * hvp

    @property
    def first_hvp_epoch(self) -> int:
        return round(self.settings.hvp_start * self.settings.max_epochs)

    @property
    def has_more_to_come(self) -> bool:
        """Whether stopping now would miss a part of the training: the HVPs, or the end of the cosine."""
        return self.settings.schedule == "cosine" or self.current_epoch < self.first_hvp_epoch

    def on_train_epoch_start(self) -> None:
        """Pool the covariances anew a few times, from the residuals of the model of the day."""
        since = self.current_epoch - self.first_hvp_epoch
        every = max(1, self.settings.max_epochs // POOLINGS)
        if self.hvp_weight > 0 and self._pools and since >= 0 and since % every == 0:
            self.prepared.pool_covariances(self._compute_residuals())

    def _compute_residuals(self) -> list[Tensor]:
        """Force residuals of every frame of every molecule."""
        found = []
        for m in self.prepared.molecules:
            energy = functools.partial(self.network, species=m.species.to(self.device))
            chunks = [compute_forces(energy, part.to(self.device)).cpu() for part in m.positions.split(CHUNK_FRAMES)]
            found.append(m.forces - torch.cat(chunks))
        return found

    def training_step(self, batch: Batch, _: int) -> Tensor:
        with_hvps = self.hvp_weight > 0 and self.current_epoch >= self.first_hvp_epoch
        loss = self.combine(*self.compute_losses(batch, with_hvps, create_graph=True))
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.positions))
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        force, hvp = self.compute_losses(batch, True, create_graph=False)
        n = len(batch.positions)
        self.log("val_force", force, batch_size=n)
        self.log("val_hvp", hvp, batch_size=n)  # type: ignore[arg-type]
        self.log("val_loss", self.combine(force, hvp), batch_size=n)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=max(1, self.settings.patience // 4)
        )
        self._optimizer = optimizer
        if self._schedule_state is not None:
            self.schedule.load_state_dict(self._schedule_state)
        return optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.settings.schedule == "cosine":
            rate = self.settings.learning_rate * self._compute_cosine()
            for group in self._optimizer.param_groups:
                group["lr"] = rate

    def _compute_cosine(self) -> float:
        """Share of the learning rate at this step: up over the first ones, then a half cosine to the last."""
        step, last = self.global_step, self.settings.max_epochs * self.trainer.num_training_batches
        return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.5 * (1.0 + math.cos(math.pi * step / last)), FINAL_RATE)

    # Lightning would step the schedule after the epoch's checkpoint, and a resumed run would miss that step.
    def on_train_epoch_end(self) -> None:
        if self.settings.schedule == "plateau":
            self.schedule.step(float(self.trainer.callback_metrics["val_loss"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["schedule"] = self.schedule.state_dict()
        checkpoint["hvp_method"] = self._method
        checkpoint["regions"] = [None if p is None else p.regions for p in self.prepared.pooled]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._schedule_state = checkpoint["schedule"]
        self._method = checkpoint.get("hvp_method")
        for pooled, regions, molecule in zip(
            self.prepared.pooled, checkpoint.get("regions", []), self.prepared.molecules, strict=False
        ):
            if pooled is not None and regions is not None:
                pooled.regions = regions.cpu()
                apply_pooled(pooled, molecule)


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
