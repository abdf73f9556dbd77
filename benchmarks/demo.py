"""Wall time of `make demo` by stage, and what of it is neither physics nor learning.

Physics and learning: MD, force calls, the training stage (priors, epochs, errors and noise of what was learnt) and CG
steps. The rest: start-up and imports, measuring platforms, force maps, writing, export with its checks, comparison and
report. A second, stricter share counts of the training its epochs alone. Also the time `openmm-hvpcg --help` takes.
Usage: ``python benchmarks/demo.py [--out benchmarks/results/demo.json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROTOCOL = Path(__file__).resolve().parents[1] / "protocols" / "alanine_dipeptide" / "protocol.yaml"
COMMAND = Path(sys.executable).with_name("openmm-hvpcg")
HELP_RUNS = 5
SECONDS_PER_DAY = 86400


def time_help() -> float:
    """Seconds, the best of some runs."""
    seconds = []
    for _ in range(HELP_RUNS):
        began = time.perf_counter()
        subprocess.run([COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def find_work(out: Path) -> dict[str, float]:
    """Seconds of physics in each stage, from what the package notes of its rates and times."""
    log = (out / "log.txt").read_text(encoding="utf-8")
    sampled = re.findall(r"walkers, ([\d.e+-]+) ns at ([\d.e+-]+) ns/day", log)
    calls = [n for path in sorted(out.rglob("*.zarr/zarr.json")) if (n := count_calls(path))]
    return {
        "sample": sum(SECONDS_PER_DAY * float(ns) / float(rate) for ns, rate in sampled),
        "label": sum(n / float(rate) for n, rate in zip(calls, re.findall(r": (\d+) force calls/s", log), strict=True)),
        "simulate": sum(read(path)["wall_time_s"] for path in out.rglob("result.json")),
    }


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def count_calls(path: Path) -> int:
    """Force calls of the labels of a dataset; none of other stores."""
    return int(read(path)["attributes"].get("force_calls", {}).get("labels", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        began = time.perf_counter()
        subprocess.run([COMMAND, "run", str(PROTOCOL), "--out", str(out), "--quiet"], check=True)
        total = time.perf_counter() - began
        stages = read(out / "stages" / "seconds.json")
        work = {**find_work(out), "train": stages["train"]}
        epochs = sum(read(path)["metrics"]["wall_time_s"] for path in out.rglob("training.json"))
    rows = {name: {"seconds": t, "work_s": round(work.get(name, 0.0), 1)} for name, t in stages.items()}
    rows["start-up"] = {"seconds": round(total - sum(stages.values()), 1), "work_s": 0.0}
    rest = 1.0 - sum(work.values()) / total
    strict = rest + (work["train"] - epochs) / total
    results = {
        "command": "python benchmarks/demo.py",
        "machine": platform.platform(),
        "load_average": os.getloadavg()[0],
        "total_s": round(total, 1),
        "stages": rows,
        "share_neither_physics_nor_learning": round(rest, 3),
        "share_if_of_training_epochs_alone_count": round(strict, 3),
        "help_s": round(time_help(), 2),
    }
    print(json.dumps(results, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
