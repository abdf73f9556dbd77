"""Labels per second against raw force calls, measured in one run.

Floor: setPositions + getState(forces) in a bare loop on the same platform, two calls a HVP. Usage:
``python benchmarks/labels.py [--out benchmarks/results/labels.json]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import openmm

from openmm_hvpcg.atomistic.platforms import choose_platform
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, LabelSettings
from openmm_hvpcg.cores import count_cores
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.training.labels.label import label_frames

SEQUENCES = ("A", "AAAAA", "GYDPETGTWG")
PROBES = 4


def measure(sequence: str, n_frames: int) -> dict[str, object]:
    """Raw calls/s with one Context, and force calls/s of the whole label stage with 1 and with all workers."""
    system = build_atomistic_system(InputSettings(sequence=sequence), temperature_K=300.0, name=sequence)
    noise = 0.002 * np.random.default_rng(0).standard_normal((n_frames, system.n_atoms, 3))
    positions = (system.positions + noise).astype(np.float32)
    frames = Frames(positions, system.topology, 300.0, np.zeros(n_frames, dtype=int))
    choice = choose_platform(system.system, system.positions, purpose="labels", threads=1)
    context = choice.make_context(system.system, openmm.VerletIntegrator(0.001))
    doubles = positions.astype(np.float64)
    n_calls = n_frames * (1 + 2 * PROBES)
    began = time.perf_counter()
    for k in range(n_calls):
        context.setPositions(doubles[k % n_frames])
        context.getState(getForces=True).getForces(asNumpy=True)
    floor = n_calls / (time.perf_counter() - began)
    result: dict[str, object] = {
        "sequence": sequence,
        "atoms": system.n_atoms,
        "platform": choice.name,
        "floor_force_calls_per_s": round(floor, 1),
    }
    for workers in dict.fromkeys((1, count_cores())):
        settings = LabelSettings(
            probes_per_frame=PROBES, platform=choice.name, workers=workers, step_nm=1e-5, max_frames=n_frames
        )
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            bead_map = build_bead_map("ca" if len(sequence) > 1 else "backbone", system.topology)
            label_frames(system, frames, bead_map, settings, Path(folder) / "x.zarr", progress=False)
            rate = n_calls / (time.perf_counter() - began)
        result[f"stage_force_calls_per_s_{workers}_workers"] = round(rate, 1)
        result[f"stage_over_floor_{workers}_workers"] = round(rate / floor, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--frames", type=int, default=1500)
    arguments = parser.parse_args()
    rows = []
    for sequence in SEQUENCES:
        # About the same time for each size: the cost of a call grows at least as the number of atoms.
        rows.append(measure(sequence, max(200, arguments.frames // len(sequence))))
        print(json.dumps(rows[-1]))
    if arguments.out:
        content = {"command": "python benchmarks/labels.py", "machine": platform.platform(), "cores": count_cores()}
        arguments.out.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
