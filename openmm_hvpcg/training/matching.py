"""What a step of training does: force and HVP matching of a network, the schedule, and what a resumed run needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from openmm_hvpcg.config import TrainingSettings
from openmm_hvpcg.training.averaging import average_weights
from openmm_hvpcg.training.batches import Batch, BatchSampler, FrameBatches
from openmm_hvpcg.training.derivatives import (
    EnergyFunction,
    HVPMethod,
    choose_hvp_method,
    compute_forces,
    compute_forces_and_hvps,
)
from openmm_hvpcg.training.losses import density_loss, force_loss, hvp_loss
from openmm_hvpcg.training.models.torsions import bind_network
from openmm_hvpcg.training.preparation import CHUNK_FRAMES, Prepared
from openmm_hvpcg.training.projection import build_projector

#: Times a training pools the covariances of the HVP target anew.
POOLINGS = 10
#: Cosine schedule: steps to reach the full learning rate, and the share of it that is left at the end.
WARMUP_STEPS = 50
FINAL_RATE = 1e-3


class Losses(NamedTuple):
    """Terms of the loss, each divided by what the priors leave of it; None where it is not asked for."""

    force: Tensor
    hvp: Tensor | None
    density: Tensor | None


def get_hvp_weight(settings: TrainingSettings, prepared: Prepared) -> float:
    """The weight of the HVP term as a number."""
    if settings.hvp_weight == "balanced":
        return prepared.scales.balance(prepared.beta, prepared.force_noise) * settings.force_weight
    return float(settings.hvp_weight)


class MatchingModule(lightning.LightningModule):
    """Force and HVP matching of a network against labels without the priors' part."""

    def __init__(self, network: torch.nn.Module, settings: TrainingSettings, prepared: Prepared) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        decay = settings.weight_averaging
        self.averaged = average_weights(network, decay) if decay > 0 else None
        self.batches = FrameBatches(prepared.groups, prepared.storage)
        self.train_loss = math.nan
        self.settings = settings
        self.prepared = prepared
        self.scales, self.beta = prepared.scales, prepared.beta
        self.hvp_weight = get_hvp_weight(settings, prepared)
        self._pools = any(pooled is not None for pooled in prepared.pooled)
        self._method: HVPMethod | None = None
        self._schedule_state: dict[str, Any] | None = None

    @property
    def kept(self) -> torch.nn.Module:
        """The network that is judged and kept: the one that is trained, or the mean of its weights."""
        return self.network if self.averaged is None else self.averaged.module

    def compute_losses(self, network: torch.nn.Module, batch: Batch, with_hvps: bool, create_graph: bool) -> Losses:
        """Normalised terms (see :mod:`openmm_hvpcg.training.losses`)."""
        energy = bind_network(network, batch.species, batch.bonded)
        density = None
        if not with_hvps and self.settings.density == 0:
            forces = compute_forces(energy, batch.positions, create_graph)
            return Losses(force_loss(forces, batch.forces, self.scales, batch.whitening), None, None)
        method = self._choose_method(energy, batch)
        forces, hvps = compute_forces_and_hvps(energy, batch.positions, batch.probes, create_graph, method)
        force = force_loss(forces, batch.forces, self.scales, batch.whitening)
        if batch.density_forces is not None and batch.density_probes is not None:
            density = density_loss(forces, hvps, batch.density_forces, batch.density_probes, self.beta, self.scales)
        if not with_hvps:
            return Losses(force, None, density)
        hvp = hvp_loss(
            hvps,
            batch.hvps,
            batch.forces - forces,
            batch.probes,
            self.beta,
            self.scales,
            batch.covariances,
            batch.own_share,
            batch.whitening,
            build_projector(batch.positions, batch.links),
        )
        return Losses(force, hvp, density)

    def _choose_method(self, energy: EnergyFunction, batch: Batch) -> HVPMethod:
        """Measured once on a GPU and kept in the checkpoint; on a CPU double backward always won."""
        if self._method is not None:
            return self._method
        on_cpu = batch.positions.device.type == "cpu"
        method: HVPMethod = "reverse" if on_cpu else choose_hvp_method(energy, batch.positions, batch.probes)
        if self.is_shared:
            method = self.trainer.strategy.broadcast(method)
        self._method = method
        return method

    def combine(self, losses: Losses) -> Tensor:
        """The loss. The density term, with its share, is part of that of the forces."""
        force = losses.force
        if losses.density is not None:
            force = force + self.settings.density * losses.density
        loss = self.settings.force_weight * force
        return loss if losses.hvp is None else loss + self.hvp_weight * losses.hvp

    @property
    def is_shared(self) -> bool:
        """Whether other processes train with this one."""
        return self._trainer is not None and self.trainer.world_size > 1

    @property
    def first_hvp_epoch(self) -> int:
        return round(self.settings.hvp_start * self.settings.max_epochs)

    @property
    def has_more_to_come(self) -> bool:
        """Whether stopping now would miss a part of the training: the HVPs, or the end of the cosine."""
        return self.settings.schedule == "cosine" or self.current_epoch < self.first_hvp_epoch

    def on_train_epoch_start(self) -> None:
        """Pool the covariances anew a few times, from the residuals of the model of the day.

        Where processes share the tensors, the one that can do it does it for all.
        """
        since = self.current_epoch - self.first_hvp_epoch
        every = max(1, self.settings.max_epochs // POOLINGS)
        self.trainer.strategy.barrier()
        if self.hvp_weight > 0 and self._pools and since >= 0 and since % every == 0:
            self.prepared.pool_covariances(self._compute_residuals())
            if self.trainer.num_nodes > 1:
                self.prepared.storage.publish()
        self.trainer.strategy.barrier()
        if self.trainer.num_nodes > 1:
            self.prepared.storage.refresh()

    def _compute_residuals(self) -> list[Tensor]:
        """Force residuals (F, B, 3) of every molecule at the frames that covariances are fitted to."""
        found = []
        for m, frames in zip(self.prepared.molecules, self.prepared.pooling, strict=True):
            energy = bind_network(self.kept, m.species.to(self.device), m.bonded)
            wanted = torch.zeros(len(m.positions), dtype=torch.bool)
            wanted[torch.from_numpy(frames)] = True
            residuals, done = torch.zeros(len(frames), *m.forces.shape[1:]), 0
            for start in range(0, len(wanted), CHUNK_FRAMES):
                rows = slice(start, start + CHUNK_FRAMES)
                n = int(wanted[rows].sum())
                if n > 0:
                    forces = compute_forces(energy, m.positions[rows].to(self.device)).cpu()
                    residuals[done : done + n] = (m.forces[rows] - forces)[wanted[rows]]
                    done += n
                    self.prepared.storage.release()
            found.append(residuals)
        return found

    def training_step(self, sampler: BatchSampler, _: int) -> None:
        """The steps of one epoch. Lightning has the epochs; around every step it would take up to a third of it."""
        sampler.set_epoch(self.current_epoch)
        self._n_steps = len(sampler)
        summed = torch.zeros(2, dtype=torch.float64, device=self.device)
        for k, index in enumerate(sampler):
            batch = self.batches[index].to(self.device)
            loss = self.take_step(batch, k)
            if batch.weight > 0:
                summed[0] += len(batch.positions) * loss
                summed[1] += len(batch.positions)
        total, n_frames = self.trainer.strategy.reduce(summed, reduce_op="sum")
        self.train_loss = float(total / n_frames)

    def take_step(self, batch: Batch, k: int) -> Tensor:
        """The ``k``-th step of an epoch; its loss."""
        self._set_rate(self.current_epoch * self._n_steps + k)
        self._optimizer.zero_grad()
        with_hvps = self.hvp_weight > 0 and self.current_epoch >= self.first_hvp_epoch
        loss = self.combine(self.compute_losses(self.network, batch, with_hvps, create_graph=True))
        self._step_back(loss * batch.weight)
        # The last one through Lightning, which saves no checkpoint where it has counted no step.
        (self._optimizer if k < self._n_steps - 1 else self.optimizers()).step()  # type: ignore[union-attr]
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        return loss.detach()

    def _step_back(self, loss: Tensor) -> None:
        """The gradient by the weights alone, clipped: the graph leads on to the positions, a tenth of a step."""
        if self.is_shared:
            self.manual_backward(loss, inputs=self._weights)
        else:
            loss.backward(inputs=self._weights)
        torch.nn.utils.clip_grad_norm_(self._weights, self.settings.gradient_clip)

    def _count_frames(self, batch: Batch) -> int:
        """What the batch counts in means over an epoch: its frames, or where they are shared a multiple of them.

        Lightning averages this number over the processes, and cuts off what is behind the point.
        """
        return len(batch.positions) * self.trainer.world_size if batch.weight > 0 else 0

    def validation_step(self, batch: Batch, _: int) -> None:
        losses = self.compute_losses(self.kept, batch, True, create_graph=False)
        values = {"val_force": losses.force, "val_hvp": losses.hvp, "val_loss": self.combine(losses)}
        self.log_dict(values, batch_size=self._count_frames(batch), sync_dist=self.is_shared)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self._weights = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self._weights,
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=True,  # one operation for all weights
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=max(1, self.settings.patience // 4)
        )
        self._optimizer = optimizer
        if self._schedule_state is not None:
            self.schedule.load_state_dict(self._schedule_state)
        return optimizer

    def _set_rate(self, step: int) -> None:
        """Cosine: the learning rate goes up over the first steps, then down half a cosine to the last."""
        if self.settings.schedule != "cosine":
            return
        last = self.settings.max_epochs * self._n_steps
        share = min(1.0, (step + 1) / WARMUP_STEPS) * max(0.5 * (1.0 + math.cos(math.pi * step / last)), FINAL_RATE)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * share

    # Lightning would step the schedule after the epoch's checkpoint, and a resumed run would miss that step.
    def on_train_epoch_end(self) -> None:
        self.log("train_loss", self.train_loss)
        if self.settings.schedule == "plateau":
            self.schedule.step(float(self.trainer.callback_metrics["val_loss"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["schedule"] = self.schedule.state_dict()
        checkpoint["hvp_method"] = self._method
        checkpoint["regions"] = [None if p is None else p.regions for p in self.prepared.pooled]
        checkpoint["covariance_share"] = self.prepared.get_share() or 0.0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._schedule_state = checkpoint["schedule"]
        self._method = checkpoint.get("hvp_method")
        for pooled, regions in zip(self.prepared.pooled, checkpoint.get("regions", []), strict=False):
            if pooled is not None and regions is not None:
                pooled.regions = regions.cpu()
        self.prepared.set_share(checkpoint.get("covariance_share", 0.0))
        self.prepared.apply_covariances()
