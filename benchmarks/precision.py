"""Errors of forces and HVPs of a trained network whose matrix products take rounded inputs, as tensor cores do.

    python benchmarks/precision.py runs/demo/models/hvp runs/demo/datasets/ala.zarr --out FILE

tf32 keeps 10 bits of the mantissas of what is multiplied, bf16 keeps 7; sums are in float32 in both. Both are emulated
by rounding the inputs of every matrix product, of the forward pass and of all backward passes, so that no GPU is
needed. The reference is the same network in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_hvpcg.training.dataset import LabelledFrames, load_dataset
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.fit import FitResult, load_fit
from openmm_hvpcg.training.models.torsions import Bonded, bind_network

FRAMES = 512
MANTISSA_BITS = {"float32": None, "tf32": 10, "bf16": 7}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class RoundProducts(TorchDispatchMode):
    """Rounds the inputs of matrix products to so many bits of the mantissa."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.dropped = 23 - bits
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.calls += 1
            # The first of addmm and baddbmm is added, not multiplied.
            args = (*args[:-2], *(self.round(a) for a in args[-2:]))
        return func(*args, **(kwargs or {}))

    def round(self, values: Tensor) -> Tensor:
        raw = values.contiguous().view(torch.int32)
        half = 1 << (self.dropped - 1)
        return ((raw + half) & -(1 << self.dropped)).view(torch.float32)


def evaluate(fit: FitResult, data: LabelledFrames, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = np.linspace(0, data.n_frames - 1, min(FRAMES, data.n_frames)).astype(int)
    species = torch.from_numpy(fit.spec.compute_species_index(data.bead_map))
    energy = bind_network(copy.deepcopy(fit.network).to(dtype), species, Bonded.find(data.bead_map))
    positions, probes = (torch.from_numpy(a[rows]).to(dtype) for a in (data.positions, data.probes))
    return compute_forces_and_hvps(energy, positions, probes)


def measure(fit: FitResult, data: LabelledFrames) -> dict[str, Any]:
    exact = evaluate(fit, data, torch.float64)
    found: dict[str, Any] = {
        "molecule": data.name,
        "rms_forces": round(float(exact[0].square().mean().sqrt()), 2),
        "rms_hvps": round(float(exact[1].square().mean().sqrt()), 1),
        "noise_forces": fit.metrics["force_noise"],
        "noise_hvps": fit.metrics["hvp_noise"],
    }
    for name, bits in MANTISSA_BITS.items():
        mode = nullcontext() if bits is None else RoundProducts(bits)
        with mode:
            rounded = evaluate(fit, data, torch.float32)
        if bits is not None and not mode.calls:  # type: ignore[union-attr]
            raise SystemExit("no matrix product was seen: this emulation does not fit the network")
        errors = [(a.double() - b).square().mean().sqrt() for a, b in zip(rounded, exact, strict=True)]
        found[name] = {
            "forces": float(f"{errors[0]:.3g}"),
            "hvps": float(f"{errors[1]:.3g}"),
            "forces_relative": float(f"{errors[0] / exact[0].square().mean().sqrt():.2g}"),
            "hvps_relative": float(f"{errors[1] / exact[1].square().mean().sqrt():.2g}"),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fit", type=Path, help="the folder of a training")
    parser.add_argument("labels", type=Path, nargs="+", help="datasets of its molecules")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    fit = load_fit(arguments.fit)
    rows = [measure(fit, load_dataset(path)) for path in arguments.labels]
    content = {"command": "python benchmarks/precision.py FIT LABELS", "frames": FRAMES, "rows": rows}
    print(json.dumps(content, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
