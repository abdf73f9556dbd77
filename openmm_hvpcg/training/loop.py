"""The training loop: Lightning with our schedule, checkpoints, curves and logs."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from openmm_hvpcg.config import ModelSettings, TrainingSettings
from openmm_hvpcg.cores import choose_torch_threads, count_cores, use_torch_threads
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.progress import track
from openmm_hvpcg.training.batches import BatchSampler
from openmm_hvpcg.training.losses import LossScales
from openmm_hvpcg.training.matching import MatchingModule
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.places import ALONE, Place, ProcessPlace, SharedStrategy
from openmm_hvpcg.training.preparation import CHUNK_FRAMES, Prepared
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

#: Folders of the loggers.
LOGS = ("csv", "tensorboard")
#: Pairs of beads in a batch that give a second thread enough to do.
TRAINING_PAIRS = 8000


class _Patience(EarlyStopping):
    """Does not count while forces are alone, nor with a cosine: what is to come still has to have its turn."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if isinstance(pl_module, MatchingModule) and not pl_module.has_more_to_come:
            super().on_train_epoch_end(trainer, pl_module)


class Recorder(Callback):
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

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metric = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.curves.append(
            self._row(
                trainer.current_epoch + 1,
                float(pl_module.train_loss),  # type: ignore[arg-type]
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


@dataclass(frozen=True)
class Trained:
    """What a training leaves: its curves and times, the file of the best epoch, and how many epochs it had."""

    recorder: Recorder
    best: Path
    n_epochs: int


def train_network(
    prepared: Prepared,
    settings: TrainingSettings,
    model: ModelSettings,
    folder: Path,
    place: Place = ALONE,
    *,
    progress: bool = False,
) -> Trained:
    """Run Lightning to the end, from its last checkpoint where there is one.

    Every process of a training calls this with its own ``place``; the first one writes.
    """
    n_beads = max(group.positions.shape[1] for group in prepared.groups)
    share = -(-settings.batch_size // place.n_ranks)
    threads = min(choose_torch_threads(n_beads, share, TRAINING_PAIRS), max(1, count_cores() // place.n_devices))
    with use_torch_threads(threads):
        return _run_lightning(prepared, settings, model, folder, place, progress)


def build_new_network(spec: PotentialSpec, model: ModelSettings) -> torch.nn.Module:
    """The network of a training, untrained."""
    return build_network(len(spec.species), model, energy_scale=compute_kt(spec.temperature_K))


def _run_lightning(
    prepared: Prepared, settings: TrainingSettings, model: ModelSettings, folder: Path, place: Place, progress: bool
) -> Trained:
    torch.manual_seed(settings.seed)
    training, validation = _build_samplers(prepared, settings, place)
    module = MatchingModule(build_new_network(prepared.spec, model), settings, prepared)
    epochs: DataLoader[Any] = DataLoader([training], batch_size=None)  # type: ignore[arg-type]  # each one step to it
    loader = DataLoader(module.batches, batch_size=None, sampler=validation)
    checkpoints = folder / "checkpoints"
    # At the end of the epoch, after the recorder and the learning-rate schedule, so that a resumed run lacks nothing.
    # Two of them: with ``save_last`` Lightning would write the last epoch only where it is the best one, too.
    best = ModelCheckpoint(checkpoints, "best-{epoch}", monitor="val_loss", save_on_train_epoch_end=True)
    every = ModelCheckpoint(checkpoints, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    recorder = Recorder(prepared.scales, prepared.prior_validation, settings.force_weight, module.hvp_weight)
    last = checkpoints / "last.ckpt"
    resume, done = None, 0
    if last.exists():
        resume, done = str(last), int(torch.load(last, map_location="cpu", weights_only=True)["epoch"]) + 1
        logger.info("%s: training resumes after epoch %d", folder.name, done)
    elif place.rank == 0:
        # Of a training that was killed in its first epoch; the columns of its table may be others.
        for name in LOGS:
            shutil.rmtree(folder / "logs" / name, ignore_errors=True)
    bar = track(f"train {folder.name}", settings.max_epochs, "epochs", done=done, show=progress)
    with _quiet_lightning(), bar as advance:
        recorder.advance = advance
        trainer = lightning.Trainer(
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[settings.accelerator],
            devices=place.n_devices,
            num_nodes=place.n_machines,
            strategy="auto" if place.n_ranks == 1 else SharedStrategy(),
            plugins=None if place.n_ranks == 1 else [ProcessPlace(place)],
            max_epochs=settings.max_epochs,
            callbacks=[recorder, _Patience("val_loss", patience=settings.patience), best, every],
            logger=[
                CSVLogger(folder / "logs", name="", version=LOGS[0]),
                TensorBoardLogger(folder / "logs", name="", version=LOGS[1]),
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            inference_mode=False,  # validation needs gradients: forces and HVPs
            use_distributed_sampler=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, epochs, loader, ckpt_path=resume, weights_only=True)
    return Trained(recorder, Path(best.best_model_path), int(trainer.current_epoch))


def _build_samplers(prepared: Prepared, settings: TrainingSettings, place: Place) -> list[BatchSampler]:
    """Of training and validation batches, this process's part of each."""
    n_probes = [m.probes.shape[1] for m in prepared.molecules]
    groups = [group.members for group in prepared.groups]
    return [
        BatchSampler(
            frames,
            n_probes,
            size,
            shuffle=shuffle,
            seed=settings.seed,
            groups=groups,
            rank=place.rank,
            n_ranks=place.n_ranks,
        )
        for frames, size, shuffle in (
            (prepared.training, settings.batch_size, True),
            (prepared.validation, CHUNK_FRAMES, False),
        )
    ]


class _quiet_lightning(warnings.catch_warnings):
    """Hide Lightning's banners and its advice on data-loader workers: a batch is quick to gather."""

    def __enter__(self) -> Any:
        result = super().__enter__()
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", module="torch.optim.lr_scheduler")
        for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return result
