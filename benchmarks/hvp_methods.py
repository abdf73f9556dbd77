"""Training steps with Hessian-vector products by double backward and by forward over reverse, in one run.

A step is the loss and its gradient by the parameters. Floor: the force-matching step of the same network and batch; the
other steps come as ratios to it. ``frames repeated``: every frame once per probe instead of all its probes at once.
Methods take turns and the best of the rounds counts, so that a busy moment spoils none of them; on the CPU it is one
thread's processor time, which other programs disturb least. Usage:
``python benchmarks/hvp_methods.py [--out benchmarks/results/hvp_methods.json] [--device cuda]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.training.derivatives import HVPMethod, choose_hvp_method, compute_forces, compute_forces_and_hvps
from openmm_hvpcg.training.losses import LossScales, force_loss, hvp_loss
from openmm_hvpcg.training.models.registry import build_network

#: Beads, frames of a batch, probes of a frame.
CASES = ((6, 128, 1), (6, 128, 4), (10, 128, 1), (10, 128, 4), (30, 32, 1))
SCALES = LossScales(1e5, 1e10)
BETA = 0.4


def build_steps(n_beads: int, n_frames: int, n_probes: int, device: str) -> tuple[dict[str, Callable[[], None]], str]:
    """The steps by name, and the method that the package would choose."""
    torch.manual_seed(0)
    network = build_network(4, ModelSettings(), energy_scale=2.5).to(device)
    torch.nn.init.normal_(network.readout[-1].weight)
    species = torch.arange(n_beads, device=device) % 4
    shape = (n_frames, n_beads, 3)
    positions = 0.15 * torch.randn(shape, device=device).cumsum(1)
    forces = 300 * torch.randn(shape, device=device)
    probes = torch.randint(0, 2, (n_frames, n_probes, n_beads, 3), device=device) * 2.0 - 1.0
    hvps = 1e5 * torch.randn_like(probes)

    def energy(x: Tensor) -> Tensor:
        return network(x, species)

    def finish(loss: Tensor) -> None:
        network.zero_grad()
        loss.backward()

    def match_forces() -> None:
        finish(force_loss(compute_forces(energy, positions, create_graph=True), forces, SCALES))

    def match_hvps(method: HVPMethod, repeated: bool) -> None:
        x, q, v, p = positions, forces, probes, hvps
        if repeated:
            x, q = (a.repeat_interleave(n_probes, 0) for a in (x, q))
            v, p = (a.flatten(0, 1)[:, None] for a in (v, p))
        f, h = compute_forces_and_hvps(energy, x, v, True, method)
        finish(force_loss(f, q, SCALES) + hvp_loss(h, p, q - f, v, BETA, SCALES))

    steps: dict[str, Callable[[], None]] = {"force_matching": match_forces}
    names: dict[HVPMethod, str] = {"reverse": "double_backward", "forward": "forward_over_reverse"}
    for method, name in names.items():
        steps[name] = lambda method=method: match_hvps(method, repeated=False)
        if n_probes > 1:
            steps[f"{name}_frames_repeated"] = lambda method=method: match_hvps(method, repeated=True)
    return steps, choose_hvp_method(energy, positions, probes)


def measure(case: tuple[int, int, int], device: str, rounds: int) -> dict[str, object]:
    """Best time of each step, and its ratio to force matching."""
    steps, choice = build_steps(*case, device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    best = dict.fromkeys(steps, float("inf"))
    for k in range(rounds + 2):  # two to warm up
        for name, step in steps.items():
            began = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if k >= 2:
                best[name] = min(best[name], clock() - began)
    return {
        **dict(zip(("beads", "frames", "probes"), case, strict=True)),
        "force_matching_ms": round(1e3 * best["force_matching"], 2),
        **{f"{n}_ratio": round(t / best["force_matching"], 2) for n, t in best.items() if n != "force_matching"},
        "chosen": choice,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        rows.append(measure(case, arguments.device, arguments.rounds))
        print(json.dumps(rows[-1]))
    if arguments.out:
        content = {
            "command": "python benchmarks/hvp_methods.py",
            "date": date.today().isoformat(),
            "machine": platform.platform(),
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "threads": 1,
            "torch": torch.__version__,
            "rounds": arguments.rounds,
        }
        arguments.out.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
