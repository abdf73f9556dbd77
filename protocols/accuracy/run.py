"""The accuracy study: PMF errors of FM and of HVP arms by number of frames, with one command a molecule.

    python protocols/accuracy/run.py protocols/accuracy/protocol.yaml --out runs/accuracy/alanine

Everything is kept under ``--out`` and gone on with there: frames to train on and, from other walkers, to judge on;
the PMF reference; three sets of labels; a folder for each training. ``results.json`` holds what is finished so far.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from arms import ARMS, NAMES, Arm

from openmm_hvpcg.analysis.compare import compare_runs
from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import AveragingSettings, LabelSettings, Protocol, ReferenceSettings, load_protocol
from openmm_hvpcg.errors import UnstableSimulationError
from openmm_hvpcg.frames import load_frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.simulation import load_run, simulate
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.training.dataset import LabelledFrames, load_dataset
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import FitResult, fit_potential
from openmm_hvpcg.training.labels.label import label_frames
from openmm_hvpcg.training.reference import compute_reference, load_reference
from openmm_hvpcg.training.reference_errors import compute_reference_errors

SIZES = (250, 1000, 4000, 16000)
SEEDS = (1, 2, 3)
#: Frames labelled by conditional averaging, and how: the hidden atoms of the pentapeptide forget more slowly.
AVERAGED_FRAMES = 4000
AVERAGING = {
    "alanine": AveragingSettings(n_samples=20, stride=5, hvp_every=4),
    "pentapeptide": AveragingSettings(n_samples=20, stride=20, hvp_every=4),
}
AVERAGED_PROBES = 6
#: Seed of the walkers whose frames are judged on, and never trained on.
TEST_SEED = 101


@dataclass(frozen=True)
class Work:
    """One training: what it is, and where it goes."""

    arm: str
    size: int
    seed: int
    with_simulation: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--simulate-seeds", type=int, nargs="*", default=SEEDS[:1], help="seeds whose models are run")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    protocol = load_protocol(options.protocol)
    out: Path = options.out
    system, bead_map = prepare_data(protocol, out)
    work = [
        Work(arm, size, seed, simulated)
        # A first simulation round comes last: the errors against the reference are what the study is about.
        for simulated in (False, True)
        for seed in options.seeds
        for size in sorted(options.sizes)
        for arm in options.arms
        if size in ARMS[protocol.molecules[0].name][arm].pace and (not simulated or seed in options.simulate_seeds)
    ]
    run_all(protocol, out, bead_map, work, options.jobs)
    collect(protocol, out, bead_map, system.name)


def prepare_data(protocol: Protocol, out: Path) -> tuple[AtomisticSystem, BeadMap]:
    """Frames, reference and labels; what is there already is kept."""
    molecule = protocol.molecules[0]
    sampling = protocol.sampling
    system = build_atomistic_system(
        molecule.input,
        temperature_K=protocol.temperature_K,
        constraints=sampling.constraints,
        name=molecule.name,
    )
    if not isinstance(protocol.mapping.beads, str):
        raise SystemExit("this study takes a selection, not a JSON map")
    bead_map = build_bead_map(protocol.mapping.beads, system.topology, **protocol.mapping.naming)
    (out / "frames").mkdir(parents=True, exist_ok=True)
    (out / "labels").mkdir(exist_ok=True)
    for name, seed in (("train", sampling.seed), ("test", TEST_SEED)):
        sample_frames(system, sampling.model_copy(update={"seed": seed}), out / "frames" / f"{name}.zarr")
    test = load_frames(out / "frames" / "test.zarr")
    compute_reference(system, test, bead_map, protocol.reference or ReferenceSettings(), out / "reference.zarr")
    train = load_frames(out / "frames" / "train.zarr")
    for name, settings in list_labels(protocol).items():
        label_frames(system, train, bead_map, settings, out / "labels" / f"{name}.zarr")
    return system, bead_map


def list_labels(protocol: Protocol) -> dict[str, LabelSettings]:
    """The label sets of the study."""
    own = protocol.labels
    averaged = {
        "probes_per_frame": AVERAGED_PROBES,
        "averaging": AVERAGING[protocol.molecules[0].name],
        "max_frames": AVERAGED_FRAMES,
    }
    return {
        "slice": own.model_copy(update={"force_map": "slice", "probes_per_frame": 4}),
        "optimal": own,
        "averaged": own.model_copy(update=averaged),
    }


def run_all(protocol: Protocol, out: Path, bead_map: BeadMap, work: list[Work], jobs: int) -> None:
    """Trainings side by side, a core each; finished ones are skipped."""
    todo = [w for w in work if not result_path(out, w).exists()]
    logging.info("%d of %d pieces are done already", len(work) - len(todo), len(work))
    began = time.perf_counter()
    tasks = (joblib.delayed(run_one)(protocol, out, bead_map, w) for w in todo)
    for k, label in enumerate(joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks), start=1):
        logging.info("%s (%d of %d, %.0f s)", label, k, len(todo), time.perf_counter() - began)
        if k % 10 == 0:
            collect(protocol, out, bead_map, protocol.molecules[0].name)


def get_arm(protocol: Protocol, work: Work) -> Arm:
    return ARMS[protocol.molecules[0].name][work.arm]


def folder_of(out: Path, work: Work) -> Path:
    return out / "models" / f"{work.arm.replace(' ', '_')}-{work.size}-{work.seed}"


def result_path(out: Path, work: Work) -> Path:
    return folder_of(out, work) / ("simulation.json" if work.with_simulation else "errors.json")


def run_one(protocol: Protocol, out: Path, bead_map: BeadMap, work: Work) -> str:
    """Train and judge, or simulate and compare, one model."""
    torch.set_num_threads(1)
    (simulate_one if work.with_simulation else train_one)(protocol, out, bead_map, work)
    return f"{work.arm}, {work.size} frames, seed {work.seed}{', simulated' if work.with_simulation else ''}"


def select_frames(dataset: LabelledFrames, size: int, seed: int) -> LabelledFrames:
    """``size`` evenly spaced frames; another seed, another offset."""
    stride = dataset.n_frames // size
    offset = (stride * (seed - 1)) // len(SEEDS)
    return dataset.select(np.arange(size) * stride + offset)


def fit_model(protocol: Protocol, out: Path, bead_map: BeadMap, work: Work) -> tuple[FitResult, LabelledFrames]:
    """The trained model and its labels; a finished training is read back."""
    arm = get_arm(protocol, work)
    dataset = select_frames(load_dataset(out / "labels" / f"{arm.labels}.zarr", bead_map), work.size, work.seed)
    if arm.probes is not None:
        dataset = replace(dataset, probes=dataset.probes[:, : arm.probes], hvps=dataset.hvps[:, : arm.probes])
    epochs, learning_rate = arm.pace[work.size]
    pace = {"max_epochs": epochs, "learning_rate": learning_rate, "seed": work.seed}
    update = {**arm.settings, **arm.by_size.get(work.size, {}), **pace}
    training = protocol.training.model_copy(update=update)
    folder = folder_of(out, work) / "fit"
    fit = fit_potential([dataset], training, protocol.model, protocol.priors, folder, arm=work.arm, progress=False)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    return fit, dataset


def train_one(protocol: Protocol, out: Path, bead_map: BeadMap, work: Work) -> None:
    began = time.process_time()
    fit, _ = fit_model(protocol, out, bead_map, work)
    reference = load_reference(out / "reference.zarr", bead_map)
    errors = compute_reference_errors(reference, fit.spec, fit.network)
    priors = compute_reference_errors(reference, fit.spec, None)
    content = {
        "arm": work.arm,
        "n_frames": work.size,
        "seed": work.seed,
        "force_calls": count_calls(protocol, out, work),
        "training_cpu_s": time.process_time() - began,
        **{f"pmf_{k}": getattr(errors, k) for k in ("force_rmse", "force_rmse_error", "hvp_rmse", "hvp_rmse_error")},
        **{f"priors_{k}": getattr(priors, k) for k in ("force_rmse", "hvp_rmse")},
        **{k: fit.metrics[k] for k in ("network_share", "hvp_weight", "epochs", "best_epoch", "force_rmse_validation")},
    }
    write_json(result_path(out, work), content)


def count_calls(protocol: Protocol, out: Path, work: Work) -> int:
    """AA force calls of an arm: MD steps to sample its frames, and its labels."""
    arm = get_arm(protocol, work)
    if work.arm == "fm":
        labels = 1
    elif arm.labels == "averaged":
        labels = load_dataset(out / "labels" / "averaged.zarr").attributes["force_calls"]["labels"] // AVERAGED_FRAMES
    else:
        probes = arm.probes or list_labels(protocol)[arm.labels].probes_per_frame
        labels = 1 + 2 * probes
    return work.size * (protocol.sampling.stride + labels)


def simulate_one(protocol: Protocol, out: Path, bead_map: BeadMap, work: Work) -> None:
    folder = folder_of(out, work)
    fit, dataset = fit_model(protocol, out, bead_map, work)
    export_potential(fit.network, fit.spec, folder / "potential.pt", dataset.positions[:64])
    test = load_frames(out / "frames" / "test.zarr")
    reference = replace(
        test, positions=bead_map.map_positions(test.positions).astype(np.float32), topology=bead_map.to_topology()
    )
    settings = protocol.simulation.model_copy(update={"seed": work.seed, "platform": "Reference"})
    content: dict[str, Any] = {"arm": work.arm, "n_frames": work.size, "seed": work.seed, "stable": True}
    try:
        simulate(
            folder / "potential.pt",
            reference.positions,
            settings,
            folder / "cg",
            temperature_K=protocol.temperature_K,
            topology=bead_map,
            progress=False,
        )
        comparison = compare_runs(
            reference,
            {"arm": load_run(folder / "cg", reference.topology)},
            protocol.analysis,
            molecule=protocol.molecules[0].name,
        )
        landscape = comparison.tica1
        content |= {
            "kl_tica1": landscape.kl["arm"].value,
            "kl_tica1_error": landscape.kl["arm"].error,
            "kl_floor": landscape.kl_floor,
            "outside": landscape.outside["arm"],
        }
    except UnstableSimulationError as error:
        content |= {"stable": False, "message": str(error)}
    shutil.rmtree(folder / "cg", ignore_errors=True)
    write_json(result_path(out, work), content)


def collect(protocol: Protocol, out: Path, bead_map: BeadMap, name: str) -> None:
    """Everything finished so far, as one file."""
    reference = load_reference(out / "reference.zarr", bead_map)
    runs = {}
    for path in sorted((out / "models").glob("*/errors.json")):
        runs[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
        simulated = path.with_name("simulation.json")
        if simulated.exists():
            runs[path.parent.name]["simulation"] = json.loads(simulated.read_text(encoding="utf-8"))
    rms = lambda values: float(np.sqrt(np.mean(values**2)))  # noqa: E731
    content = {
        "molecule": name,
        "command": f"python protocols/accuracy/run.py PROTOCOL.yaml --out {out.name}",
        "reference": {
            "configurations": reference.n_frames,
            "force_rms": rms(reference.forces),
            "force_noise": rms(reference.force_errors),
        },
        "arms": {
            arm: {
                **{"labels": a.labels, "probes": a.probes, **a.settings, "epochs, learning rate": a.pace},
                **({"by number of frames": a.by_size} if a.by_size else {}),
            }
            for arm, a in ARMS[name].items()
        },
        "averaging": {**AVERAGING[name].model_dump(), "probes_per_frame": AVERAGED_PROBES},
        "runs": list(runs.values()),
    }
    write_json(out / "results.json", content)


if __name__ == "__main__":
    main()
