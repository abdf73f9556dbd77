"""Wall time of a production step with one torch thread and with one a core, beside what the package chooses by size.

    python benchmarks/threads.py --out benchmarks/results/threads.json

For a machine with nothing else to do: threads that wait for a busy core spin. Potentials as `production.py` makes them,
tables as by default; the best of several rounds counts, the candidates taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from production import build_globule, build_random_network, build_spec, build_stepper, build_tabulated  # isort: skip

import torch

from openmm_hvpcg.cores import choose_torch_threads, count_cores

#: Beads, replicas.
CASES = ((6, 16), (6, 64), (10, 32), (10, 64), (20, 32), (80, 1), (80, 8), (80, 32), (250, 1), (1000, 1), (4000, 1))
FEATURES = 32
ROUNDS, SECONDS = 5, 0.3


def measure(n_beads: int, replicas: int) -> dict[str, Any]:
    """Milliseconds a step by number of threads."""
    potential = build_tabulated(build_random_network(FEATURES, False), build_spec(n_beads))
    step = build_stepper(potential, build_globule(n_beads), replicas)
    best: dict[int, float] = {}
    for _ in range(ROUNDS):
        for threads in (1, count_cores()):
            torch.set_num_threads(threads)
            step(2)
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < SECONDS:
                step(5)
                steps += 5
            best[threads] = min(best.get(threads, float("inf")), (time.perf_counter() - began) / steps)
    one, all_cores = best[1], best[count_cores()]
    return {
        "beads": n_beads,
        "replicas": replicas,
        "ms": {str(threads): round(1e3 * seconds, 4) for threads, seconds in best.items()},
        "gain": round(one / all_cores, 2),
        "chosen": choose_torch_threads(n_beads, replicas),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    rows = []
    for n_beads, replicas in CASES:
        rows.append(measure(n_beads, replicas))
        print(json.dumps(rows[-1]), flush=True)
    content = {"command": "python benchmarks/threads.py", "cores": count_cores(), "features": FEATURES, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
