"""FM beside FM + HVP on peptides that neither was trained on, in pieces that can be run on different days and machines.

    python protocols/unseen_peptides/run.py systems SYSTEMS     systems and start structures, for sample_crowd.py
    python protocols/unseen_peptides/run.py label SAMPLES       labels of the sampled training frames  -> data/
    python protocols/unseen_peptides/run.py reference SAMPLES   beads of the sampled test peptides     -> data/
    python protocols/unseen_peptides/run.py study --out OUT     trains, simulates, compares, from what is in data/
    python protocols/unseen_peptides/run.py means OUT --out MEANS   the same of the mean of the networks of all seeds

With `--protocol .../many.yaml --labels LABELS` the study trains on seven times the peptides, a tenth of the frames of
each; their labels are made by sample_many.py. With `--protocol .../backbone.yaml --labels LABELS --unseen UNSEEN` it is
one of backbone beads, judged by those that the references have. With `--flat FLAT` it trains on frames of the same
peptides on barriers as well, which sample_many.py --flatten makes.

Every piece goes on where it was stopped. OUT/results.json holds what is finished; `report.py` makes tables and plots
of it.
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
import openmm
import torch
from judging import choose_beads, judge, judge_forces
from peptides import (
    LABELS,
    REFERENCES,
    build_map,
    build_system,
    choose_part,
    label_peptide,
    list_peptides,
    load_labelled,
    load_labels,
    load_reference,
    save_labels,
    save_references,
)
from sample_crowd import GRID_NM, STARTS

from openmm_hvpcg.config import ModelSettings, Protocol, TrainingSettings, load_protocol, resolve_arm
from openmm_hvpcg.errors import UnstableSimulationError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.simulation import load_run, simulate
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import fit_potential, load_fit
from openmm_hvpcg.training.models.committee import combine_networks

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "data" / "unseen_peptides"
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Work:
    """One training: arm, frames of each training peptide, seed."""

    arm: str
    size: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.size}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "protocol.yaml")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    pieces = parser.add_subparsers(dest="piece", required=True)
    pieces.add_parser("systems").add_argument("folder", type=Path)
    for name in ("label", "reference"):
        piece = pieces.add_parser(name)
        piece.add_argument("samples", type=Path, help="what sample_crowd.py wrote")
    pieces.choices["label"].add_argument("--scratch", type=Path, default=Path("runs/unseen_peptides/labels"))
    study = pieces.add_parser("study")
    study.add_argument("--out", type=Path, required=True)
    study.add_argument("--arms", nargs="+")
    study.add_argument("--sizes", type=int, nargs="+", help="frames of each peptide; all and a quarter of them")
    study.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    study.add_argument(
        "--flat", type=Path, help="as many more frames of the same peptides, trained on as molecules of their own"
    )
    means = pieces.add_parser("means")
    means.add_argument("source", type=Path, help="the --out of a study whose trainings are finished")
    means.add_argument("--out", type=Path, required=True)
    for piece in (study, means):
        piece.add_argument("--labels", type=Path, help=f"the archive to train on, if not {LABELS} of --data")
        piece.add_argument(
            "--unseen",
            type=Path,
            help="labelled frames of the unseen peptides (sample_many.py): forces are judged on them, runs start there",
        )
        piece.add_argument(
            "--peptides", nargs="+", help="the unseen ones, if not given; trained ones tell what is transfer"
        )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    protocol = load_protocol(options.protocol)
    if options.piece == "systems":
        write_systems(protocol, options.folder)
    elif options.piece == "label":
        make_labels(protocol, options.samples, options.scratch, options.data, options.jobs)
    elif options.piece == "reference":
        make_references(protocol, options.samples, options.data)
    else:
        options.labels = options.labels or options.data / LABELS
        options.peptides = options.peptides or [m.name for m in list_peptides(protocol, "test")]
        (run_study if options.piece == "study" else run_means)(protocol, options)


def write_systems(protocol: Protocol, folder: Path) -> None:
    """NAME.xml and NAME.npz of every peptide, see sample_crowd.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for molecule in protocol.molecules:
        systems = {start: build_system(protocol, molecule, start) for start in STARTS}
        system = systems["extended"]
        (folder / f"{molecule.name}.xml").write_text(openmm.XmlSerializer.serialize(system.system), encoding="utf-8")
        beads = build_map(protocol, system.topology).site_weights.argmax(axis=1)
        starts = {start: s.positions for start, s in systems.items()}
        np.savez(folder / f"{molecule.name}.npz", beads=beads, role=np.array(molecule.role), **starts)
        logging.info("%s: %d atoms, %d beads", molecule.name, system.n_atoms, len(beads))


def read_samples(folder: Path, pattern: str) -> tuple[dict[str, Path], dict[str, Any]]:
    """File of each peptide, and the figures of the run."""
    files = {key.split("/")[0]: path for path in sorted(folder.glob(pattern)) for key in np.load(path)}
    if not files:
        raise SystemExit(f"{folder}: no {pattern} there. Run sample_crowd.py first")
    return files, json.loads((folder / "sampling.json").read_text(encoding="utf-8"))


def describe_sampling(figures: dict[str, Any]) -> dict[str, Any]:
    arguments = figures["arguments"]
    interval_ps = figures["stride"] * arguments["timestep_fs"] * 1e-3
    command = "python protocols/unseen_peptides/sample_crowd.py SYSTEMS SAMPLES"
    return {"sampling": figures, "interval_ps": interval_ps, "temperature_K": arguments["temperature_K"]} | {
        "sampling_command": command + "".join(f" --{k.replace('_', '-')} {v}" for k, v in arguments.items() if v != "")
    }


def make_labels(protocol: Protocol, samples: Path, scratch: Path, data: Path, jobs: int) -> None:
    files, figures = read_samples(samples, "train_*.npz")
    facts = describe_sampling(figures)
    scratch.mkdir(parents=True, exist_ok=True)
    tasks = (
        joblib.delayed(label_one)(protocol, m.name, files[m.name], facts, scratch)
        for m in list_peptides(protocol, "train")
    )
    datasets = joblib.Parallel(n_jobs=jobs)(tasks)
    command = "python protocols/unseen_peptides/run.py label SAMPLES"
    save_labels(data / LABELS, datasets, {"command": command, **facts})
    logging.info("%s: %d peptides, %.1f MB", data / LABELS, len(datasets), (data / LABELS).stat().st_size / 1e6)


def label_one(protocol: Protocol, name: str, samples: Path, facts: dict[str, Any], scratch: Path) -> Any:
    torch.set_num_threads(1)
    molecule = next(m for m in protocol.molecules if m.name == name)
    system = build_system(protocol, molecule)
    content = np.load(samples)
    frames = Frames(
        content[f"{name}/positions"],
        system.topology,
        system.temperature_K,
        content[f"{name}/walker"].astype(np.int64),
        interval_ps=facts["interval_ps"],
        provenance={"system_hash": system.system_hash, "sampling": facts["sampling"]},
    )
    # sample_crowd.py kept as many frames as are labelled.
    return label_peptide(protocol, system, frames, scratch / f"{name}.zarr")


def make_references(protocol: Protocol, samples: Path, data: Path) -> None:
    files, figures = read_samples(samples, "reference.npz")
    references = {}
    for molecule in list_peptides(protocol, "test"):
        content = np.load(files[molecule.name])
        bead_map = build_map(protocol, build_system(protocol, molecule).topology)
        references[molecule.name] = (
            content[f"{molecule.name}/positions"],
            content[f"{molecule.name}/walker"],
            bead_map,
        )
    command = "python protocols/unseen_peptides/run.py reference SAMPLES"
    facts = {"command": command, "grid_nm": GRID_NM, "starts": list(STARTS), **describe_sampling(figures)}
    save_references(data / REFERENCES, references, facts)
    logging.info("%s: %d peptides, %.1f MB", data / REFERENCES, len(files), (data / REFERENCES).stat().st_size / 1e6)


def run_study(protocol: Protocol, options: argparse.Namespace) -> None:
    arms = options.arms or [arm.name for arm in protocol.training.arms]
    sizes = options.sizes or (count_frames(protocol), count_frames(protocol) // 4)
    work = [Work(a, size, seed) for seed in options.seeds for size in sizes for a in arms]
    run_all(protocol, options, work, [None])
    run_all(protocol, options, work, options.peptides)
    collect(protocol, options.out)


def run_means(protocol: Protocol, options: argparse.Namespace) -> None:
    """A committee for each arm and number of frames of a study: seed 0 stands for all of its seeds."""
    finished = [path.parent.name.rsplit("-", 2) for path in sorted((options.source / "models").glob("*/fit.json"))]
    work = [Work(arm, int(size), 0) for arm, size in dict.fromkeys((arm, size) for arm, size, _ in finished)]
    run_all(protocol, options, work, [None])
    run_all(protocol, options, work, options.peptides)
    collect(protocol, options.out)


def count_frames(protocol: Protocol) -> int:
    """Labelled frames of each training peptide."""
    if protocol.labels.max_frames is None:
        raise SystemExit("this study says in labels.max_frames how many frames of each peptide are labelled")
    return protocol.labels.max_frames


def run_all(protocol: Protocol, options: argparse.Namespace, work: list[Work], peptides: list[Any]) -> None:
    """Trainings (no peptide) or simulations side by side, a core each; finished ones are skipped."""
    todo = [(w, p) for w in work for p in peptides if not result_path(options.out, w, p).exists()]
    logging.info("%d of %d pieces are done already", len(work) * len(peptides) - len(todo), len(work) * len(peptides))
    began = time.perf_counter()
    tasks = (joblib.delayed(run_one)(protocol, options, w, p) for w, p in todo)
    for k, label in enumerate(joblib.Parallel(n_jobs=options.jobs, return_as="generator_unordered")(tasks), start=1):
        logging.info("%s (%d of %d, %.0f s)", label, k, len(todo), time.perf_counter() - began)
        if k % 10 == 0:
            collect(protocol, options.out)


def result_path(out: Path, work: Work, peptide: str | None) -> Path:
    folder = out / "models" / work.name
    return folder / "fit.json" if peptide is None else folder / "peptides" / f"{peptide}.json"


def run_one(protocol: Protocol, options: argparse.Namespace, work: Work, peptide: str | None) -> str:
    torch.set_num_threads(1)
    if peptide is None:
        (train_one if options.piece == "study" else combine_one)(protocol, options, work)
    else:
        simulate_one(protocol, options, work, peptide)
    return f"{work.name} {peptide or 'trained'}"


def choose_settings(protocol: Protocol, work: Work, n_more: int) -> tuple[TrainingSettings, ModelSettings]:
    """A quarter of the frames is trained on for as many steps as all of them: the budget is the same.

    Every seed has a quarter of its own, the fifth the first one again. ``n_more`` frames of each peptide come from
    elsewhere.
    """
    training, model = resolve_arm(protocol, work.arm)
    epochs = max(1, training.max_epochs * count_frames(protocol) // (work.size + n_more))
    few = {"seed": work.seed, "frames_per_molecule": max(work.size, n_more), "max_epochs": epochs}
    return training.model_copy(update=few), model


def train_one(protocol: Protocol, options: argparse.Namespace, work: Work) -> None:
    began = time.process_time()
    folder = options.out / "models" / work.name
    n_parts = max(1, count_frames(protocol) // work.size)
    datasets = [choose_part(d, n_parts, work.seed - 1) for d in load_labels(options.labels)]
    priors = protocol.priors
    more = load_flat(options.flat, work) if options.flat else []
    if more:
        # A peptide is two molecules then: a term of one peptide alone is still no term of two.
        priors = priors.model_copy(update={"min_molecules": 2 * priors.min_molecules - 1})
    n_flat = max((d.n_frames for d in more), default=0)
    training, model = choose_settings(protocol, work, n_flat)
    fit = fit_potential([*datasets, *more], training, model, priors, folder / "fit", arm=work.arm, progress=False)
    shutil.rmtree(folder / "fit" / "logs", ignore_errors=True)
    export_potential(fit.network, fit.spec, folder / "potential.pt", datasets[0].positions[:64])
    keys = (
        *("n_frames", "network_share", "hvp_weight", "epochs", "best_epoch", "wall_time_s"),
        *(f"{term}_{what}" for term in ("force_rmse", "hvp_rmse") for what in ("validation", "priors")),
        *("force_noise", "hvp_noise"),
    )
    content = {k: fit.metrics[k] for k in keys} | {"training_cpu_s": time.process_time() - began}
    content |= {"n_frames_flat": n_flat, "unseen_forces": judge_unseen(options, fit.network, fit.spec)}
    write_json(result_path(options.out, work, None), content)


def load_flat(archive: Path, work: Work) -> list[LabelledFrames]:
    """As many frames of each peptide as of the others are trained on, or all; as molecules of their own."""
    parts = (choose_part(d, max(1, d.n_frames // work.size), work.seed - 1) for d in load_labels(archive))
    return [replace(d, name=f"{d.name}_flat") for d in parts]


def combine_one(protocol: Protocol, options: argparse.Namespace, work: Work) -> None:
    """The mean of the networks of all seeds; its figures are the means of theirs, its cost the sum."""
    places = sorted(path.parent for path in (options.source / "models").glob(f"{work.arm}-{work.size}-*/fit.json"))
    fits = [load_fit(place / "fit") for place in places]
    network = combine_networks([fit.network for fit in fits])
    folder = options.out / "models" / work.name
    folder.mkdir(parents=True, exist_ok=True)
    positions = load_labels(options.labels)[0].positions[:64]
    export_potential(network, fits[0].spec, folder / "potential.pt", positions)
    found = [json.loads((place / "fit.json").read_text("utf-8")) for place in places]
    numbers = [k for k, value in found[0].items() if not isinstance(value, dict)]
    content = {k: None if found[0][k] is None else float(np.mean([f[k] for f in found])) for k in numbers}
    content["unseen_forces"] = judge_unseen(options, network, fits[0].spec)
    content |= {"networks": len(found), "training_cpu_s": sum(f["training_cpu_s"] for f in found)}
    write_json(result_path(options.out, work, None), content)


def judge_unseen(options: argparse.Namespace, network: torch.nn.Module, spec: PotentialSpec) -> dict[str, Any]:
    """What is left of the force labels of each unseen peptide, where there are such."""
    return {d.name: judge_forces(network, spec, d) for d in load_labels(options.unseen)} if options.unseen else {}


def simulate_one(protocol: Protocol, options: argparse.Namespace, work: Work, peptide: str) -> None:
    unseen = peptide in [m.name for m in list_peptides(protocol, "test")]
    reference, bead_map = (
        load_reference(options.data / REFERENCES, peptide) if unseen else load_labelled(options.labels, peptide)
    )
    starts, analysis = reference.positions, protocol.analysis
    if unseen and options.unseen:
        frames, bead_map = load_labelled(options.unseen, peptide)
        starts = frames.positions
    if not unseen:
        # Fewer frames were kept of these, three times as far apart.
        analysis = analysis.model_copy(update={"lag_frames": max(1, analysis.lag_frames // 3)})
    folder = options.out / "models" / work.name
    run = folder / "cg" / peptide
    settings = protocol.simulation.model_copy(update={"seed": work.seed, "platform": "Reference"})
    try:
        result = simulate(
            folder / "potential.pt",
            starts,
            settings,
            run,
            temperature_K=protocol.temperature_K,
            topology=bead_map,
            progress=False,
        )
        frames = choose_beads(load_run(run, bead_map.to_topology()), reference.topology)
        content = judge(reference, frames, analysis, peptide)
        content |= {"stable": True, "steps_per_second": result.steps_per_second}
    except UnstableSimulationError as error:
        content = {"stable": False, "message": str(error)}
    path = result_path(options.out, work, peptide)
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)
    shutil.rmtree(run, ignore_errors=True)


def collect(protocol: Protocol, out: Path) -> None:
    """Everything finished so far, as one file."""
    runs = []
    unseen = {m.name for m in list_peptides(protocol, "test")}
    for path in sorted((out / "models").glob("*/fit.json")):
        arm, size, seed = path.parent.name.rsplit("-", 2)
        peptides = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(path.parent.glob("peptides/*.json"))}
        fit = json.loads(path.read_text("utf-8"))
        runs.append(
            {
                "arm": arm,
                "n_frames": int(size),
                "seed": int(seed),
                "fit": fit,
                "peptides": {name: figures for name, figures in peptides.items() if name in unseen},
                "trained peptides": {name: figures for name, figures in peptides.items() if name not in unseen},
            }
        )
    content = {
        "command": "python protocols/unseen_peptides/run.py study --out OUT",
        "protocol": protocol.model_dump(mode="json", exclude={"molecules"}),
        "training peptides": [m.name for m in list_peptides(protocol, "train")],
        "test peptides": [m.name for m in list_peptides(protocol, "test")],
        "runs": runs,
    }
    write_json(out / "results.json", content)


if __name__ == "__main__":
    main()
