"""HVPs per second of the label stage against raw force calls, measured in one run.

    python benchmarks/labels.py --out benchmarks/results/labels.json

Floor: setPositions and getState(forces) in a bare loop on one Context of the best platform, two calls an HVP, forces
read into an array without units. Floor and what is compared with it take turns, and the best round of each counts: what
else the machine does can only slow one down. Every rate is given twice: per second, which is right on a quiet machine,
and per second of processor time of all processes, which is nearly so on a busy one. Ratios near 1 are at the floor.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.platforms import PlatformChoice, choose_platform
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, LabelSettings
from openmm_hvpcg.cores import count_cores
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.labels.force_maps import build_force_map
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps
from openmm_hvpcg.training.labels.label import label_chunks
from openmm_hvpcg.training.labels.oracle import ForceOracle, find_active_atoms, find_rigid_clusters
from openmm_hvpcg.training.labels.probes import draw_probes

#: (sequence, frames of a whole stage): 22, 62 and 175 atoms in implicit solvent; 4000 frames are a protocol's default.
STAGES = (("A", 16000), ("AAAAA", 4000), ("YYDPETGTWY", 4000))
#: More sizes for cost against atoms; explicit solvent by padding, about 2,400 and 20,000 atoms.
LONGER = "A" * 33
PADDINGS_NM = (1.0, 2.5)
PROBES = 4
PROBE_COUNTS = (1, 2, 4, 8, 16, 32)
STEP_NM = 1e-5
BATCH_S = 0.2
ROUNDS = 6


@dataclass
class Best:
    """Least seconds a call so far: on the clock, and of processors."""

    wall_s: float = float("inf")
    processor_s: float = float("inf")

    def add(self, wall_s: float, processor_s: float) -> None:
        self.wall_s, self.processor_s = min(self.wall_s, wall_s), min(self.processor_s, processor_s)

    def over(self, floor: Best, name: str) -> dict[str, float]:
        return {
            f"{name}_over_floor": round(floor.wall_s / self.wall_s, 3),
            f"{name}_over_floor_processor_time": round(floor.processor_s / self.processor_s, 3),
        }


def read_processor_time() -> float:
    """Seconds of this process and of those that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def measure(run: Callable[[], int]) -> tuple[float, float]:
    """Seconds and processor seconds of each of the calls that ``run`` makes and counts."""
    began, began_processor = time.perf_counter(), read_processor_time()
    calls = run()
    return (time.perf_counter() - began) / calls, (read_processor_time() - began_processor) / calls


def alternate(runs: dict[str, Callable[[], int]], rounds: int = ROUNDS) -> dict[str, Best]:
    found = {name: Best() for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].add(*measure(run))
    return found


def loop_bare(context: openmm.Context, positions: NDArray[np.float64], calls: int) -> int:
    """The floor: ``calls`` raw force calls."""
    forces = np.empty_like(positions[0])
    what = openmm.State.Forces
    for k in range(calls):
        context.setPositions(positions[k % len(positions)])
        context.getState(getForces=True)._getVectorAsNumpy(what, forces)
    return calls


def loop_with_units(context: openmm.Context, positions: NDArray[np.float64], calls: int) -> int:
    """The same as OpenMM's own documentation has it."""
    for k in range(calls):
        context.setPositions(positions[k % len(positions)])
        context.getState(getForces=True).getForces(asNumpy=True)
    return calls


class Case:
    """A molecule, shaken frames, its force map and platform."""

    def __init__(self, sequence: str, n_frames: int, padding_nm: float | None = None) -> None:
        options: dict[str, Any] = {} if padding_nm is None else {"solvent": "explicit", "padding_nm": padding_nm}
        self.system: AtomisticSystem = build_atomistic_system(
            InputSettings(sequence=sequence, **options), temperature_K=300.0, name=sequence
        )
        rng = np.random.default_rng(0)
        noise = 0.002 * rng.standard_normal((n_frames, self.system.n_atoms, 3), dtype=np.float32)
        positions = self.system.positions.astype(np.float32) + noise
        box = None if self.system.box is None else np.repeat(self.system.box[None].astype(np.float32), n_frames, axis=0)
        self.frames = Frames(positions, self.system.topology, 300.0, np.zeros(n_frames, dtype=int), box=box)
        self.bead_map = build_bead_map("ca" if len(sequence) > 1 else "backbone", self.system.topology)
        self.choice = choose_platform(
            self.system.system, self.system.positions, purpose="labels", box=self.system.box, threads=1
        )
        self.weights = build_force_map(
            "harmonic",
            self.bead_map.site_weights,
            find_rigid_clusters(self.system.system),
            find_active_atoms(self.system.system, self.system.topology, self.bead_map.site_weights),
            np.zeros((1, self.system.n_atoms, 3)),
            np.array([(a.index, b.index) for a, b in self.system.topology.bonds]),
        ).weights

    def open_bare(self, choice: PlatformChoice | None = None) -> openmm.Context:
        context = (choice or self.choice).make_context(self.system.system, openmm.VerletIntegrator(0.001))
        if self.system.box is not None:
            context.setPeriodicBoxVectors(*self.system.box)
        return context

    def prepare_hvps(self, oracle: ForceOracle, n_frames: int, n_probes: int = PROBES) -> Callable[[], int]:
        """A function that computes the HVPs of some frames and returns how many force calls they took."""
        index = np.arange(n_frames)
        probes = draw_probes("rademacher", index, n_probes, self.bead_map.n_beads, 0)
        positions, box = self.frames.positions[index], None if self.frames.box is None else self.frames.box[index]

        def compute() -> int:
            compute_projected_hvps(oracle, positions, probes, self.weights, STEP_NM, box)
            return 2 * n_probes * n_frames

        return compute

    def doubles(self, n: int = 64) -> NDArray[np.float64]:
        return self.frames.positions[:n].astype(np.float64)


def measure_hvps(case: Case, rounds: int = ROUNDS) -> dict[str, Any]:
    """HVPs of one worker against the floor."""
    context, doubles = case.open_bare(), case.doubles()
    loop_bare(context, doubles, 2)
    call_s = min(measure(lambda: loop_bare(context, doubles, 2))[0] for _ in range(3))
    n_frames = int(np.clip(BATCH_S / (2 * PROBES * call_s), 1, min(64, case.frames.n_frames)))
    calls = 2 * PROBES * n_frames
    with ForceOracle(case.system.system, case.choice.name, case.choice.properties) as oracle:
        found = alternate(
            {
                "bare": lambda: loop_bare(context, doubles, calls),
                "hvps": case.prepare_hvps(oracle, n_frames),
                "with_units": lambda: loop_with_units(context, doubles, calls),
            },
            rounds * max(1, int(BATCH_S / (calls * call_s))),
        )
    return {
        "atoms": case.system.n_atoms,
        "platform": case.choice.name,
        "floor_hvps_per_s": round(0.5 / found["bare"].wall_s, 2),
        "hvps_per_s": round(0.5 / found["hvps"].wall_s, 2),
        **found["hvps"].over(found["bare"], "hvps"),
        "hvps_over_calls_with_units": round(found["with_units"].wall_s / found["hvps"].wall_s, 3),
    }


def measure_platforms(case: Case) -> dict[str, Any]:
    """What each platform that labels may use gives, in turns, beside the one chosen."""
    doubles = case.doubles()
    runs: dict[str, Callable[[], int]] = {}
    for name, rate in case.choice.calls_per_second.items():
        choice = PlatformChoice(name, {"Threads": "1"} if name == "CPU" else {})
        calls = max(2, int(0.1 * rate))
        context = case.open_bare(choice)
        runs[name] = functools.partial(loop_bare, context, doubles, calls)
    found = alternate(runs, 4)
    rates = {name: round(1 / best.wall_s, 1) for name, best in found.items()}
    fastest = max(rates, key=rates.__getitem__)
    return {"chosen": case.choice.name, "fastest": fastest, "force_calls_per_s": rates}


class _Log(logging.Handler):
    """Keeps the rate of force calls that the stage says at its end."""

    rate = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if "force calls/s" in str(record.msg) and "%.0f" in str(record.msg):
            self.rate = float(record.args[-1])  # type: ignore[index,arg-type]


@dataclass
class Stage(Best):
    """Of a stage: ``wall_s`` and ``processor_s`` of all of it, seconds; ``call_s``, of a force call once labels flow;
    ``read_s``, reading the dataset back."""

    call_s: float = float("inf")
    read_s: float = float("inf")


def run_stage(case: Case, workers: int, stage: Stage, *, begin_only: bool = False) -> None:
    """Run the whole label stage, or only what it does once, before labels flow."""
    settings = LabelSettings(probes_per_frame=PROBES, platform=case.choice.name, workers=workers)
    log = _Log()
    logger = logging.getLogger("openmm_hvpcg.training.labels.label")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.zarr"
        chunks: list[int] | None = [] if begin_only else None

        def label() -> int:
            label_chunks(case.system, case.frames, case.bead_map, settings, path, chunks, progress=False)
            return 1

        stage.add(*measure(label))
        if not begin_only:
            stage.call_s = min(stage.call_s, 1.0 / log.rate)
            stage.read_s = min(stage.read_s, measure(lambda: int(load_dataset(path).n_frames > 0))[0])
    logger.removeHandler(log)


def loop_in_process(arguments: tuple[str, PlatformChoice, NDArray[np.float64], float]) -> float:
    """Force calls a second of a bare loop that runs beside others for some seconds, the best of slices."""
    xml, choice, positions, seconds = arguments
    context = choice.make_context(openmm.XmlSerializer.deserialize(xml), openmm.VerletIntegrator(0.001))
    loop_bare(context, positions, 8)
    calls = max(8, int(0.1 / measure(lambda: loop_bare(context, positions, 8))[0]))
    end, rates = time.perf_counter() + seconds, []
    while time.perf_counter() < end:
        rates.append(1.0 / measure(lambda: loop_bare(context, positions, calls))[0])
    return float(np.quantile(rates, 0.75))


def measure_stage(case: Case, rounds: int) -> dict[str, Any]:
    """The whole stage, with one worker and with all, and bare loops beside it.

    ``labels``: from the first chunk to the last, written; ``stage``: with what is done once (force maps, step scan).
    """
    n_frames, n_cores = case.frames.n_frames, count_cores()
    n_calls = n_frames * (1 + 2 * PROBES)
    context, doubles = case.open_bare(), case.doubles()
    slice_calls = max(8, int(BATCH_S * max(case.choice.calls_per_second.values())))
    bare, together, begin = Best(), 0.0, Stage()
    stages = {w: Stage() for w in dict.fromkeys((1, n_cores))}
    job = (openmm.XmlSerializer.serialize(case.system.system), case.choice, doubles, 1.0)
    for _ in range(rounds):
        run_stage(case, 1, begin, begin_only=True)
        for workers, stage in stages.items():
            for _ in range(3):
                bare.add(*measure(lambda: loop_bare(context, doubles, slice_calls)))
            run_stage(case, workers, stage)
        if n_cores > 1:
            with multiprocessing.get_context("spawn").Pool(n_cores) as pool:
                together = max(together, sum(pool.map(loop_in_process, [job] * n_cores, chunksize=1)))
    result: dict[str, Any] = {
        "atoms": case.system.n_atoms,
        "platform": case.choice.name,
        "frames": n_frames,
        "force_calls": n_calls,
        "floor_force_calls_per_s": round(1 / bare.wall_s, 1),
        "one_time_s": round(begin.wall_s, 2),
        "one_time_processor_s": round(begin.processor_s, 2),
        "read_back_s": round(stages[1].read_s, 2),
    }
    if together:
        result["bare_loops_on_all_cores_over_cores_x_floor"] = round(together * bare.wall_s / n_cores, 3)
    for workers, stage in stages.items():
        labels_processor_s = (stage.processor_s - begin.processor_s) / n_calls
        result[f"{workers}_workers"] = {
            "labels_force_calls_per_s": round(1 / stage.call_s, 1),
            "labels_over_floor": round(bare.wall_s / stage.call_s / workers, 3),
            "labels_over_floor_processor_time": round(bare.processor_s / labels_processor_s, 3),
            "stage_s": round(stage.wall_s, 2),
            "stage_over_floor": round(n_calls * bare.wall_s / workers / stage.wall_s, 3),
            "stage_over_floor_processor_time": round(n_calls * bare.processor_s / stage.processor_s, 3),
        }
        if workers > 1 and together:
            result[f"{workers}_workers"]["labels_over_bare_loops_on_all_cores"] = round(1 / stage.call_s / together, 3)
    return result


def fit_exponent(x: list[float], y: list[float]) -> float:
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 2)


def measure_probes(case: Case) -> dict[str, Any]:
    """Cost of the labels of a frame, and of each HVP, against the number of probes."""
    with ForceOracle(case.system.system, case.choice.name, case.choice.properties) as oracle:
        runs = {str(n): case.prepare_hvps(oracle, max(1, 128 // n), n) for n in PROBE_COUNTS}
        seconds = {name: best.wall_s * 2 * int(name) for name, best in alternate(runs, 5).items()}
    return {
        "atoms": case.system.n_atoms,
        "probes": list(PROBE_COUNTS),
        "ms_per_frame": [round(1e3 * s, 4) for s in seconds.values()],
        "exponent": fit_exponent([float(n) for n in PROBE_COUNTS], list(seconds.values())),
    }


def measure_atoms(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Cost of an HVP against atoms, with its exponent: implicit solvent has no cutoff, explicit solvent has PME."""
    found: dict[str, Any] = {}
    for name, own in (
        ("implicit", [r for r in rows if not r["explicit"]]),
        ("explicit", [r for r in rows if r["explicit"]]),
    ):
        seconds = [1 / r["hvps_per_s"] for r in own]
        found[name] = {
            "atoms": [r["atoms"] for r in own],
            "ms_per_hvp": [round(1e3 * s, 4) for s in seconds],
            "exponent": fit_exponent([r["atoms"] for r in own], seconds),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="of the whole stages")
    arguments = parser.parse_args()
    began = time.perf_counter()
    content: dict[str, Any] = {
        "command": "python benchmarks/labels.py",
        "machine": platform.platform(),
        "cores": count_cores(),
        "load_average": os.getloadavg(),
        "openmm": openmm.version.version,
        "probes": PROBES,
        "floor": "setPositions + getState(forces) in a bare loop, one Context, two calls an HVP",
        "hvps": [],
        "platforms": [],
        "stages": [],
    }
    for sequence, n_frames in STAGES:
        case = Case(sequence, n_frames)
        content["hvps"].append({"sequence": sequence, "explicit": False, **measure_hvps(case)})
        content["platforms"].append({"atoms": case.system.n_atoms, **measure_platforms(case)})
        if sequence == STAGES[1][0]:
            content["probes_curve"] = measure_probes(case)
        content["stages"].append({"sequence": sequence, **measure_stage(case, arguments.rounds)})
        for part in ("hvps", "platforms", "stages"):
            print(json.dumps(content[part][-1]), flush=True)
    for sequence, padding_nm in ((LONGER, None), *(("A", padding) for padding in PADDINGS_NM)):
        case = Case(sequence, 64 if padding_nm is None else 4, padding_nm)
        row = {"sequence": sequence, "explicit": padding_nm is not None, **measure_hvps(case, 3)}
        content["hvps"].append(row)
        content["platforms"].append({"atoms": case.system.n_atoms, **measure_platforms(case)})
        print(json.dumps(row), json.dumps(content["platforms"][-1]), flush=True)
    content["atoms_curve"] = measure_atoms(content["hvps"])
    print(json.dumps(content["probes_curve"]), json.dumps(content["atoms_curve"]))
    content["took_s"] = round(time.perf_counter() - began, 1)
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
