"""What a step of training costs, beside what the field's own way of writing it costs, in one run.

1. ``steps``: force matching (FM), and with Hessian-vector products by double backward and by forward over reverse, as
   ratios to FM. A step is the loss and its gradient by the weights. ``frames_repeated``: every frame once per probe
   instead of all its probes at once.
2. ``plain``: the FM step of a SchNet as PyTorch Geometric has it (edges both ways within the cutoff found in every
   step, a filter for each, sums by ``index_add``, one disconnected graph for the batch, gradients by ``backward()``),
   of the same width, depth, basis and cutoff on the same batch.
3. ``epoch``: share of a real training's epochs that is not losses, gradients and optimizer.
4. ``memory``: largest memory of tensors during a step, a frame.
5. ``padding``: molecules of several sizes in one padded and masked batch of the plain network's arithmetic made dense,
   beside batches of one size each.

Candidates take turns and the best of the rounds counts, in processor time of one thread, which other programs disturb
least. Usage: ``python benchmarks/training.py [--out benchmarks/results/training.json] [--device cuda]``.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.training import matching
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import HVPMethod, compute_forces, compute_forces_and_hvps
from openmm_hvpcg.training.fit import fit_potential
from openmm_hvpcg.training.losses import LossScales, force_loss, hvp_loss
from openmm_hvpcg.training.models.radial import cutoff_envelope
from openmm_hvpcg.training.models.registry import build_network

MODEL = ModelSettings(features=32, interactions=2, radial=60, cutoff_nm=1.2, torsions=False)
#: Beads, frames of a batch, probes of a frame.
CASES = ((5, 64, 1), (10, 64, 1), (10, 64, 4), (30, 32, 1), (80, 8, 1))
#: Sizes of the molecules of the mixed batch, and frames of each.
MIXTURE, MIXTURE_FRAMES = (5, 10, 20, 40), 16
#: Of the random chains, nm: a C-alpha chain has 0.38.
BOND_NM, LEAST_NM = 0.38, 0.45
SCALES, BETA, N_SPECIES = LossScales(1e5, 1e10), 0.4, 4

Step = Callable[[], None]


def draw_chains(n_beads: int, n_frames: int, seed: int = 0) -> Tensor:
    """Compact random chains (F, B, 3) nm: bonds of one length, steps drawn back to the middle, no close contacts."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((n_frames, n_beads, 3))
    for frame in frames:
        for b in range(1, n_beads):
            for _ in range(50):
                step = rng.normal(size=3) - 0.8 * (frame[b - 1] - frame[:b].mean(0))
                frame[b] = frame[b - 1] + BOND_NM * step / np.linalg.norm(step)
                if b < 2 or np.linalg.norm(frame[: b - 1] - frame[b], axis=1).min() > LEAST_NM:
                    break
    return torch.from_numpy(frames).float()


def build_batch(n_beads: int, n_frames: int, n_probes: int, device: str) -> dict[str, Tensor]:
    """Positions, species (F, B), and random labels and probes."""
    torch.manual_seed(0)
    shape = (n_frames, n_beads, 3)
    probes = torch.randint(0, 2, (n_frames, n_probes, n_beads, 3)) * 2.0 - 1.0
    batch = {
        "positions": draw_chains(n_beads, n_frames),
        "species": torch.randint(N_SPECIES, shape[:2]),
        "forces": 300 * torch.randn(shape),
        "probes": probes,
        "hvps": 1e5 * torch.randn_like(probes),
    }
    return {name: value.to(device) for name, value in batch.items()}


class PlainInteraction(nn.Module):
    """Continuous-filter convolution over directed edges."""

    def __init__(self, features: int, n_basis: int) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(n_basis, features), nn.Tanh(), nn.Linear(features, features))
        self.project = nn.Linear(features, features, bias=False)
        self.update = nn.Sequential(nn.Linear(features, features), nn.Tanh(), nn.Linear(features, features))

    def forward(self, h: Tensor, edge_index: Tensor, basis: Tensor, envelope: Tensor) -> Tensor:
        """Update of the features (N, C) from edges (2, E)."""
        source, target = edge_index
        message = self.project(h)[source] * self.filter(basis) * envelope[:, None]
        return self.update(torch.zeros_like(h).index_add(0, target, message))


class PlainSchNet(nn.Module):
    """SchNet as it is written with PyTorch Geometric: one graph for the batch, its edges both ways."""

    offset: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.cutoff_nm = settings.cutoff_nm
        self.embedding = nn.Embedding(N_SPECIES, settings.features)
        self.register_buffer("offset", torch.linspace(0.0, settings.cutoff_nm, settings.radial))
        self.coeff = -0.5 / float(settings.cutoff_nm / (settings.radial - 1)) ** 2
        self.interactions = nn.ModuleList(
            PlainInteraction(settings.features, settings.radial) for _ in range(settings.interactions)
        )
        self.readout = nn.Sequential(nn.Linear(settings.features, settings.features), nn.Tanh())
        self.last = nn.Linear(settings.features, 1)

    def forward(self, pos: Tensor, z: Tensor, edge_index: Tensor, batch: Tensor, n_frames: int) -> Tensor:
        """Energies (F,) of nodes at ``pos`` (N, 3)."""
        source, target = edge_index
        distance = (pos[source] - pos[target]).norm(dim=-1)
        basis = torch.exp(self.coeff * (distance[:, None] - self.offset) ** 2)
        envelope = cutoff_envelope(distance / self.cutoff_nm)
        h = self.embedding(z)
        for interaction in self.interactions:
            h = h + interaction(h, edge_index, basis, envelope)
        energies = self.last(self.readout(h)).squeeze(-1)
        return energies.new_zeros(n_frames).index_add(0, batch, energies)


def find_edges(positions: Tensor, cutoff_nm: float) -> Tensor:
    """Directed edges (2, E) within the cutoff of frames (F, B, 3), nodes counted through the frames."""
    n_beads = positions.shape[1]
    close = torch.cdist(positions, positions) < cutoff_nm
    close.diagonal(dim1=1, dim2=2).fill_(False)
    frame, i, j = close.nonzero(as_tuple=True)
    return torch.stack((frame * n_beads + i, frame * n_beads + j))


def build_plain_step(batch: dict[str, Tensor]) -> Step:
    """FM as the field writes it."""
    network = PlainSchNet(MODEL).to(batch["positions"].device)
    n_frames, n_beads = batch["species"].shape
    of_frame = torch.arange(n_frames, device=batch["positions"].device).repeat_interleave(n_beads)
    z, labels = batch["species"].flatten(), batch["forces"].flatten(0, 1)

    def step() -> None:
        network.zero_grad()
        edges = find_edges(batch["positions"], MODEL.cutoff_nm)
        pos = batch["positions"].flatten(0, 1).clone().requires_grad_(True)
        energies = network(pos, z, edges, of_frame, n_frames)
        forces = -torch.autograd.grad(energies.sum(), pos, create_graph=True)[0]
        (((forces - labels) ** 2).mean() / SCALES.force).backward()

    return step


def build_steps(batch: dict[str, Tensor]) -> dict[str, Step]:
    """The package's steps by name."""
    torch.manual_seed(0)
    network = build_network(N_SPECIES, MODEL, energy_scale=2.5).to(batch["positions"].device)
    nn.init.normal_(network.get_submodule("readout.2").weight)  # type: ignore[arg-type]
    weights = list(network.parameters())

    def energy(x: Tensor) -> Tensor:
        return network(x, batch["species"])

    def match_forces() -> None:
        network.zero_grad()
        forces = compute_forces(energy, batch["positions"], create_graph=True)
        force_loss(forces, batch["forces"], SCALES).backward(inputs=weights)

    def match_hvps(method: HVPMethod, batch: dict[str, Tensor] = batch) -> None:
        network.zero_grad()
        f, h = compute_forces_and_hvps(
            lambda x: network(x, batch["species"]), batch["positions"], batch["probes"], True, method
        )
        loss = force_loss(f, batch["forces"], SCALES)
        loss = loss + hvp_loss(h, batch["hvps"], batch["forces"] - f, batch["probes"], BETA, SCALES)
        loss.backward(inputs=weights)

    n_probes = batch["probes"].shape[1]
    of_frames = ("positions", "species", "forces")
    repeated = {
        name: a.repeat_interleave(n_probes, 0) if name in of_frames else a.flatten(0, 1)[:, None]
        for name, a in batch.items()
    }

    return {
        "fm": match_forces,
        "double_backward": lambda: match_hvps("reverse"),
        "forward_over_reverse": lambda: match_hvps("forward"),
        "frames_repeated": lambda: match_hvps("reverse", repeated),
    }


def time_steps(steps: dict[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Best time of each in seconds, the steps taking turns; two rounds to warm up."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    best = dict.fromkeys(steps, float("inf"))
    for k in range(rounds + 2):
        for name, step in steps.items():
            began = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if k >= 2:
                best[name] = min(best[name], clock() - began)
    return best


def measure_memory(step: Step, device: str) -> float:
    """Largest sum of the tensors' memory during a step above what is there before, MB."""
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    changes = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return float(np.cumsum([e.nbytes() for e in changes]).max()) / 1e6


def measure_case(case: tuple[int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """Steps of one size, with the plain network's and the memory of a frame."""
    n_beads, n_frames, _ = case
    batch = build_batch(*case, device)
    steps = build_steps(batch) | {"plain": build_plain_step(batch)}
    if case[2] == 1:
        del steps["frames_repeated"]
    best = time_steps(steps, rounds, device)
    n_edges = find_edges(batch["positions"], MODEL.cutoff_nm).shape[1]
    return {
        **dict(zip(("beads", "frames", "probes"), case, strict=True)),
        "pairs_within_cutoff": round(n_edges / (n_frames * n_beads * (n_beads - 1)), 2),
        "fm_ms": round(1e3 * best["fm"], 2),
        "double_backward_ratio": round(best["double_backward"] / best["fm"], 2),
        "forward_over_reverse_ratio": round(best["forward_over_reverse"] / best["fm"], 2),
        **({"frames_repeated_ratio": round(best["frames_repeated"] / best["fm"], 2)} if case[2] > 1 else {}),
        "fm_frames_per_s": round(n_frames / best["fm"]),
        "plain_frames_per_s": round(n_frames / best["plain"]),
        "fm_speed_over_plain": round(best["plain"] / best["fm"], 2),
        "memory_mb_per_frame": {
            name: round(measure_memory(steps[name], device) / n_frames, 3)
            for name in ("fm", "double_backward", "plain")
        },
    }


def measure_padding(rounds: int, device: str) -> dict[str, Any]:
    """FM over molecules of several sizes: one batch padded to the largest and masked, or one batch for each size."""
    batches = [build_batch(n, MIXTURE_FRAMES, 1, device) for n in MIXTURE]
    grouped = [build_steps(batch)["fm"] for batch in batches]

    def run_grouped() -> None:
        for step in grouped:
            step()

    best = time_steps({"padded": build_padded_step(batches), "grouped": run_grouped}, rounds, device)
    return {
        "beads": MIXTURE,
        "frames_of_each": MIXTURE_FRAMES,
        **{f"{name}_ms": round(1e3 * t, 2) for name, t in best.items()},
        "padded_over_grouped": round(best["padded"] / best["grouped"], 2),
        "faster": min(best, key=lambda name: best[name]),
    }


def build_padded_step(batches: list[dict[str, Tensor]]) -> Step:
    """FM of all batches as one: beads added far away, where no pair is within the cutoff, and masked in the sums.

    Each pair of beads of the padded molecule is computed once, as a dense network does, whether it is real or not.
    """
    n_beads = max(b["positions"].shape[1] for b in batches)
    pad = lambda x, value=0.0: nn.functional.pad(x, (0, 0, 0, n_beads - x.shape[1]), value=value)  # noqa: E731
    positions = torch.cat([pad(b["positions"]) for b in batches])
    forces = torch.cat([pad(b["forces"]) for b in batches])
    species = torch.cat([nn.functional.pad(b["species"], (0, n_beads - b["species"].shape[1])) for b in batches])
    mask = torch.cat([pad(torch.ones_like(b["forces"][..., :1])) for b in batches])
    network = PlainSchNet(MODEL).to(positions.device)
    layers = [layer for layer in network.interactions if isinstance(layer, PlainInteraction)]
    first, second = torch.triu_indices(n_beads, n_beads, 1, device=positions.device)
    both = mask[:, first] * mask[:, second]

    def energy(x: Tensor) -> Tensor:
        difference = x.index_select(1, second) - x.index_select(1, first)
        distance = torch.sqrt((difference**2).sum(-1) + (1.0 - both[..., 0]))
        basis = torch.exp2(network.coeff / np.log(2.0) * (distance[..., None] - network.offset) ** 2)
        envelope = cutoff_envelope(distance / MODEL.cutoff_nm)[..., None] * both
        h = network.embedding(species)
        for layer in layers:
            weights, y = layer.filter(basis) * envelope, layer.project(h)
            message = torch.zeros_like(y).index_add(1, first, weights * y.index_select(1, second))
            h = h + layer.update(message.index_add(1, second, weights * y.index_select(1, first)))
        return (network.last(network.readout(h)) * mask).sum((1, 2))

    weights = list(network.parameters())

    def step() -> None:
        network.zero_grad()
        residual = (compute_forces(energy, positions, create_graph=True) - forces) * mask
        ((residual**2).sum() / (3.0 * mask.sum()) / SCALES.force).backward(inputs=weights)

    return step


def build_labels(n_beads: int, n_frames: int, n_probes: int = 4) -> LabelledFrames:
    """Random labels of random chains: what they say does not matter to the time."""
    rng = np.random.default_rng(1)
    positions = draw_chains(n_beads, 50).numpy()[rng.integers(0, 50, n_frames)]
    positions = positions + 0.02 * rng.standard_normal(positions.shape)
    probes = 2.0 * rng.integers(0, 2, (n_frames, n_probes, n_beads, 3)) - 1.0
    species = tuple("ABCD"[b % 4] for b in range(n_beads))
    bonds = np.stack([np.arange(n_beads - 1), np.arange(1, n_beads)], axis=1)
    names, residues = tuple(f"X{b}" for b in range(n_beads)), tuple(("MOL", b, 0) for b in range(n_beads))
    return LabelledFrames(
        positions.astype(np.float32),
        (300 * rng.standard_normal(positions.shape)).astype(np.float32),
        probes.astype(np.float32),
        (1e4 * rng.standard_normal(probes.shape)).astype(np.float32),
        np.zeros(n_frames, dtype=np.int64),
        BeadMap(np.eye(n_beads), species, np.full(n_beads, 12.0), bonds, names, residues),
        300.0,
        {},
        "mol",
    )


def measure_epoch(n_beads: int, hvp_weight: float, device: str, n_frames: int = 4000) -> dict[str, Any]:
    """Time of losses, gradients and optimizer of a training, and of the rest of the time from step to step.

    ``overhead_of_a_step`` is that of the median step, which loads a batch but has no end of an epoch;
    ``overhead_of_an_epoch`` includes checkpoints, logs and callbacks, and not validation nor the pooling of
    covariances, which are told apart. That is done ten times a training: in each of these few epochs.
    """
    spent: dict[str, list[tuple[float, float]]] = {}
    clock = time.perf_counter if device == "cuda" else time.thread_time

    def watch(owner: Any, name: str) -> Callable[[], None]:
        original = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = clock()
            result = original(*arguments, **options)
            spent.setdefault(name, []).append((began, clock()))
            return result

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, original)

    module = matching.MatchingModule
    undo = [watch(module, "compute_losses"), watch(module, "_step_back"), watch(torch.optim.AdamW, "step")]
    undo += [watch(module, "validation_step"), watch(module, "on_train_epoch_start")]
    settings = TrainingSettings(hvp_weight=hvp_weight, max_epochs=5, batch_size=64, accelerator=device, patience=100)
    priors = PriorSettings(bonds=False, angles=False, dihedrals=False, repulsion=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            fit_potential(
                [build_labels(n_beads, n_frames)], settings, MODEL, priors, Path(folder) / "a", progress=False
            )
    finally:
        for restore in undo:
            restore()
    steps, back = np.array(spent["step"]), np.array(spent["_step_back"])
    # Training's losses are those that end right before a backward pass; the others are validation's.
    losses = np.array(spent["compute_losses"])
    losses = losses[np.searchsorted(losses[:, 1], back[:, 0]) - 1]
    working = sum(x[:, 1] - x[:, 0] for x in (losses, back, steps))
    per_epoch = len(steps) // 5
    inside = np.arange(1, len(steps)) % per_epoch != 0
    between = np.diff(steps[:, 1])
    share = 1.0 - working[1:][inside] / between[inside]
    # From the second epoch on: the first one also pays for starting.
    begin, end = steps[per_epoch - 1, 1], steps[-1, 1]
    judged, pooled = (
        sum(b - a for a, b in spent[name] if begin <= a and b <= end)
        for name in ("validation_step", "on_train_epoch_start")
    )
    return {
        "beads": n_beads,
        "frames_of_a_batch": 64,
        "steps_of_an_epoch": per_epoch,
        "hvps": hvp_weight > 0,
        "step_ms": round(1e3 * float(np.median(between[inside])), 2),
        "overhead_of_a_step": round(float(np.median(share)), 3),
        "validation_of_an_epoch": round(float(judged / (end - begin - pooled)), 3),
        "overhead_of_an_epoch": round(1.0 - float((working[per_epoch:].sum() + judged) / (end - begin - pooled)), 3),
        "pooling_in_epochs": round(float(pooled / (end - begin - pooled)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("openmm_hvpcg").setLevel(logging.ERROR)
    device, rounds = arguments.device, arguments.rounds
    content: dict[str, Any] = {
        "command": "python benchmarks/training.py",
        "date": date.today().isoformat(),
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": 1,
        "torch": torch.__version__,
        "rounds": rounds,
        "model": {"features": MODEL.features, "interactions": MODEL.interactions, "radial": MODEL.radial},
    }
    content["steps"] = [measure_case(case, rounds, device) for case in CASES]
    content["padding"] = measure_padding(rounds, device)
    content["epoch"] = [measure_epoch(n, weight, device) for n in (5, 10) for weight in (0.0, 1e-6)]
    print(json.dumps(content, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
