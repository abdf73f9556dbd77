"""HVPs of a molecule a second: one by one, and for many copies at once in one System (`atomistic/crowd.py`).

    python benchmarks/crowd.py SYSTEM.xml POSITIONS.npz --platform CUDA --out benchmarks/results/crowd.json

The floor is a bare loop of setPositions and getState on one Context, two force calls an HVP. The error is that of the
HVPs against the Reference platform, which computes in double precision, as a share of their root mean square.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from openmm_hvpcg.atomistic.crowd import build_crowd

STEP_NM = 1e-3


def make_context(system: openmm.System, platform: str, precision: str) -> openmm.Context:
    properties = {"Precision": precision} if platform in ("CUDA", "OpenCL", "HIP") else {}
    return openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform), properties
    )


def compute_forces(context: openmm.Context, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    context.setPositions(positions)
    forces = context.getState(getForces=True).getForces(asNumpy=True)
    return np.asarray(forces.value_in_unit(unit.kilojoule_per_mole / unit.nanometer))


def compute_hvp(
    context: openmm.Context, positions: NDArray[np.float64], lifted: NDArray[np.float64]
) -> NDArray[np.float64]:
    plus, minus = (compute_forces(context, positions + sign * STEP_NM * lifted) for sign in (1, -1))
    return -(plus - minus) / (2 * STEP_NM)


def time_hvps(
    context: openmm.Context, positions: NDArray[np.float64], lifted: NDArray[np.float64], seconds: float
) -> float:
    """Calls a second."""
    compute_hvp(context, positions, lifted)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        compute_hvp(context, positions, lifted)
        calls += 1
    return calls / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system")
    parser.add_argument("positions", help="npz with an array 'extended'")
    parser.add_argument("--platform", default="CUDA")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    system = openmm.XmlSerializer.deserialize(Path(args.system).read_text())
    start = np.load(args.positions)["extended"]
    rng = np.random.default_rng(1)
    lifted = rng.normal(size=start.shape)
    lifted /= np.abs(lifted).max()
    exact = compute_hvp(make_context(system, "Reference", ""), start, lifted)
    scale = float(np.sqrt((exact**2).mean()))
    rows: list[dict[str, Any]] = []
    for precision in ("mixed", "double") if args.platform == "CUDA" else ("",):
        context = make_context(system, args.platform, precision)
        floor = time_hvps(context, start, lifted, args.seconds)
        error = float(np.sqrt(((compute_hvp(context, start, lifted) - exact) ** 2).mean())) / scale
        rows.append({"precision": precision, "copies": 0, "hvps_per_s": floor, "ratio": 1.0, "error": error})
        del context
        for copies in args.copies:
            crowd = build_crowd([system] * copies)
            context = make_context(crowd.system, args.platform, precision)
            x, v = crowd.place([start] * copies), np.tile(lifted, (copies, 1))
            rate = copies * time_hvps(context, x, v, args.seconds)
            found = crowd.split(compute_hvp(context, x, v))
            error = max(float(np.sqrt(((h - exact) ** 2).mean())) / scale for h in found)
            rows.append(
                {"precision": precision, "copies": copies, "hvps_per_s": rate, "ratio": rate / floor, "error": error}
            )
            del context
    content = {
        "platform": args.platform,
        "atoms": len(start),
        "step_nm": STEP_NM,
        "openmm": openmm.version.version,
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(content, indent=1))
    for row in rows:
        print(
            f"{row['precision']:>7} {row['copies']:>6} copies {row['hvps_per_s']:>10.0f} HVPs/s"
            f" {row['ratio']:>7.2f} x, relative error {row['error']:.1e}"
        )


if __name__ == "__main__":
    main()
