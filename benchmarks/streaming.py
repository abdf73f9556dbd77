"""Training on labels held in memory and on labels read from files, of datasets of several sizes, side by side.

Each training runs in a process of its own, and what counts is the largest resident size of that process (``ru_maxrss``,
mapped pages included) above that of the same training on a fiftieth of the smallest dataset, which has the libraries
and the network in it. Streamed, it has to stay where it is while the dataset grows; and the curves have to be the same
to the bit. The labels are springs between all beads plus noise, written to a temporary folder. Usage:
``python benchmarks/streaming.py [--out benchmarks/results/streaming.json] [--folder /tmp/streaming]``.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.training.dataset import FORMAT_VERSION, KIND, load_dataset
from openmm_hvpcg.units import UNITS, compute_kt

N_BEADS, N_PROBES, CHUNK = 5, 16, 1000
SIZES = (50_000, 200_000, 400_000)
FEW = 1000
MEMORY_GB = 0.1
TEMPERATURE_K = 300.0
MODEL = ModelSettings(features=8, interactions=1, radial=8, cutoff_nm=1.0)
SETTINGS = TrainingSettings(
    hvp_weight="balanced", max_epochs=1, batch_size=256, accelerator="cpu", validation_fraction=0.1
)
STIFFNESS, NOISE = 2000.0, 100.0


def build_map() -> BeadMap:
    """A chain of one species."""
    bonds = np.stack([np.arange(N_BEADS - 1), np.arange(1, N_BEADS)], axis=1)
    names, residues = tuple(f"X{k}" for k in range(N_BEADS)), tuple(("MOL", k, 0) for k in range(N_BEADS))
    return BeadMap(np.eye(N_BEADS), ("A",) * N_BEADS, np.full(N_BEADS, 12.0), bonds, names, residues)


def write_dataset(path: Path, n_frames: int) -> None:
    """Labels as the label stage would write them, some frames at a time."""
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    group.attrs.update(
        {
            "format": f"openmm-hvpcg/{KIND}",
            "format_version": FORMAT_VERSION,
            "units": UNITS,
            "bead_map": json.dumps(build_map().to_dict()),
            "temperature_K": TEMPERATURE_K,
        }
    )
    shapes: dict[str, tuple[int, ...]] = {"positions": (N_BEADS, 3), "forces": (N_BEADS, 3)}
    shapes |= {"probes": (N_PROBES, N_BEADS, 3), "hvps": (N_PROBES, N_BEADS, 3)}
    arrays = {
        name: group.create_array(name, shape=(n_frames, *shape), dtype="float32", chunks=(CHUNK, *shape))
        for name, shape in shapes.items()
    }
    group.create_array("walker", shape=(n_frames,), dtype="int64", chunks=(n_frames,))[...] = 0
    group.create_array("done", shape=(n_frames,), dtype="uint8", chunks=(n_frames,))[...] = 1
    for start in range(0, n_frames, CHUNK):
        for name, values in draw_labels(CHUNK, seed=start).items():
            arrays[name][start : start + CHUNK] = values


def draw_labels(n_frames: int, seed: int) -> dict[str, np.ndarray]:
    """Harmonic labels about a helix, with force noise and what it adds to the HVPs."""
    rng = np.random.default_rng(seed)
    turn = 1.7 * np.arange(N_BEADS)
    rest = np.stack([0.23 * np.cos(turn), 0.23 * np.sin(turn), 0.15 * np.arange(N_BEADS)], axis=1)
    shift = 0.02 * rng.standard_normal((n_frames, N_BEADS, 3))
    probes = 2.0 * rng.integers(0, 2, (n_frames, N_PROBES, N_BEADS, 3)) - 1.0
    noise = NOISE * rng.standard_normal(shift.shape)
    along = np.einsum("tbx,tpbx->tp", noise, probes)
    return {
        "positions": rest + shift,
        "forces": noise - STIFFNESS * shift,
        "probes": probes,
        "hvps": STIFFNESS * probes + along[:, :, None, None] * noise[:, None] / compute_kt(TEMPERATURE_K),
    }


def train(dataset: Path, folder: Path, memory_gb: float | None) -> dict[str, Any]:
    """One training in this process: its peak memory, time and curves."""
    from openmm_hvpcg.training.fit import fit_potential

    logging.disable(logging.WARNING)
    began = time.perf_counter()
    settings = SETTINGS.model_copy(update={"memory_gb": memory_gb})
    labels = load_dataset(dataset, stream=memory_gb is not None)
    result = fit_potential([labels], settings, MODEL, PriorSettings(), folder, progress=False)
    return {
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": time.perf_counter() - began,
        "curves": result.curves,
        "hvp_rmse_validation": result.metrics["hvp_rmse_validation"],
    }


def train_apart(dataset: Path, folder: Path, memory_gb: float | None) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--train", str(dataset), "--folder", str(folder)]
    command += [] if memory_gb is None else ["--memory-gb", str(memory_gb)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def compare(folder: Path) -> dict[str, Any]:
    """All sizes, in memory and streamed."""
    write_dataset(folder / "few.zarr", FEW)
    base = {
        name: train_apart(folder / "few.zarr", folder / f"few-{name}", bound)["peak_mb"]
        for name, bound in (("in memory", None), ("streamed", 1e-6))
    }
    rows = []
    for n_frames in SIZES:
        path = folder / f"{n_frames}.zarr"
        write_dataset(path, n_frames)
        whole = train_apart(path, folder / f"{n_frames}-whole", None)
        parts = train_apart(path, folder / f"{n_frames}-parts", MEMORY_GB)
        same = all(whole[key] == parts[key] for key in ("curves", "hvp_rmse_validation"))
        row = {
            "frames": n_frames,
            "tensors_mb": n_frames * (2 + 3 * N_PROBES) * 3 * N_BEADS * 4 / 1e6,
            "in_memory_mb": whole["peak_mb"] - base["in memory"],
            "streamed_mb": parts["peak_mb"] - base["streamed"],
            "in_memory_s": whole["seconds"],
            "streamed_s": parts["seconds"],
            "same_to_the_bit": same,
        }
        rows.append(row)
        print({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        shutil.rmtree(path)
    return {"base_mb": base, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-gb", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        print(json.dumps(train(options.train, options.folder, options.memory_gb)))
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    try:
        found = compare(options.folder)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    found |= {
        "command": "python benchmarks/streaming.py",
        "date": date.today().isoformat(),
        "machine": platform.platform(),
        "beads": N_BEADS,
        "probes": N_PROBES,
        "memory_gb": MEMORY_GB,
        "settings": SETTINGS.model_dump(mode="json", exclude={"arms"}),
        "model": MODEL.model_dump(mode="json"),
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
