"""Sample and label peptides of a study on CPUs, a core each: many.yaml's many peptides, or backbone.yaml's.

    python protocols/unseen_peptides/sample_many.py --scratch runs/many/labels --out runs/many/labels.zip
    python protocols/unseen_peptides/sample_many.py --protocol protocols/unseen_peptides/backbone.yaml \\
        --role test --frames 160 --scratch runs/backbone/unseen --out runs/backbone/unseen.zip

Force labels are right at whatever beads they are taken, as long as the hidden atoms are in equilibrium, so nothing has
to be sampled for long: half of a peptide's walkers start extended and half helical, are shaken at a high temperature,
which scatters backbone and side chains, cooled, and give frames a picosecond apart. They are no equilibrium ensemble of
the beads: `training.density` does not fit them. A peptide that is finished is not done again; one in the middle is.

With `--flatten 0.7 --seen LABELS` a bias takes that share of the PMF of each dihedral of beads away, as the frames of
LABELS tell it (openmm_hvpcg/atomistic/flattening.py); labels are made without it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import unit
from peptides import build_system, label_peptide, list_peptides, load_labelled, save_labels
from run import count_frames
from sample_crowd import STARTS

from openmm_hvpcg.atomistic.flattening import DihedralBias
from openmm_hvpcg.atomistic.periodic import recentre
from openmm_hvpcg.config import MoleculeSettings, Protocol, load_protocol
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.training.dataset import load_dataset

HERE = Path(__file__).resolve().parent
TIMESTEP_PS = 0.004
SHAKING_K, SHAKING_STEPS, COOLING_STEPS, STRIDE = 600.0, 5000, 2500, 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "many.yaml")
    parser.add_argument("--role", choices=("train", "test"), default="train")
    parser.add_argument("--frames", type=int, help="of each peptide, if not labels.max_frames of the protocol")
    parser.add_argument("--walkers", type=int, default=4, help="of each peptide, shaken one by one")
    parser.add_argument(
        "--flatten", type=float, default=0.0, help="share of the PMF of each dihedral of beads that a bias takes away"
    )
    parser.add_argument("--seen", type=Path, help="labels.zip whose frames tell these PMFs")
    parser.add_argument("--scratch", type=Path, required=True, help="labels of each peptide")
    parser.add_argument("--out", type=Path, required=True, help="archive of all labels, for run.py --labels")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if (options.flatten > 0) != (options.seen is not None):
        parser.error("--flatten and --seen go together")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    protocol = load_protocol(options.protocol)
    options.scratch.mkdir(parents=True, exist_ok=True)
    molecules = list_peptides(protocol, options.role)
    each = (options.frames or count_frames(protocol)) // options.walkers
    # Longest first, so that no core is left with one at the end.
    todo = sorted(range(len(molecules)), key=lambda k: -len(molecules[k].name))
    todo = [k for k in todo if not (options.scratch / f"{molecules[k].name}.zarr").exists()]
    logging.info("%d of %d peptides are done already", len(molecules) - len(todo), len(molecules))
    tasks = (joblib.delayed(make_one)(protocol, molecules[k], k, each, options) for k in todo)
    for n, line in enumerate(joblib.Parallel(n_jobs=options.jobs, return_as="generator_unordered")(tasks), start=1):
        logging.info("%s (%d of %d)", line, n, len(todo))
    facts = {
        "command": shlex.join(["python", "protocols/unseen_peptides/sample_many.py", *sys.argv[1:]]),
        "interval_ps": STRIDE * TIMESTEP_PS,
        "sampling": {"frames_a_copy": each, "walkers": options.walkers, "flatten": options.flatten},
    }
    save_labels(options.out, [load_dataset(options.scratch / f"{m.name}.zarr") for m in molecules], facts)
    logging.info("%s: %d peptides, %.1f MB", options.out, len(molecules), options.out.stat().st_size / 1e6)


def make_one(protocol: Protocol, molecule: MoleculeSettings, seed: int, each: int, options: argparse.Namespace) -> str:
    """Sample and label one peptide: so many frames of each walker."""
    walkers, scratch = options.walkers, options.scratch
    torch.set_num_threads(1)
    began = time.perf_counter()
    systems = {start: build_system(protocol, molecule, start) for start in STARTS}
    system = systems[STARTS[0]]
    integrator = openmm.LangevinMiddleIntegrator(protocol.temperature_K, 1.0, TIMESTEP_PS)
    integrator.setRandomNumberSeed(seed + 1)
    bias = None
    if options.seen is not None:
        seen, bead_map = load_labelled(options.seen, molecule.name)
        bias = DihedralBias.fit(seen.positions, bead_map, options.flatten)
    sampled = system.system if bias is None else bias.add_to(system.system, system.temperature_K)
    context = openmm.Context(sampled, integrator, openmm.Platform.getPlatformByName("Reference"))
    positions: list[NDArray[np.float64]] = []
    for walker in range(walkers):
        context.setPositions(systems[STARTS[walker % 2]].positions)
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, 100)
        context.setVelocitiesToTemperature(SHAKING_K, 1000 * (seed + 1) + walker)
        integrator.setTemperature(SHAKING_K)
        integrator.step(SHAKING_STEPS)
        integrator.setTemperature(protocol.temperature_K)
        integrator.step(COOLING_STEPS)
        for _ in range(each):
            integrator.step(STRIDE)
            x = context.getState(getPositions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
            positions.append(recentre(x))
    frames = Frames(
        np.stack(positions).astype(np.float32),
        system.topology,
        system.temperature_K,
        np.repeat(np.arange(walkers), each),
        interval_ps=STRIDE * TIMESTEP_PS,
        provenance={"system_hash": system.system_hash, "sampling": "sample_many.py", "seed": seed + 1}
        | ({} if bias is None else {"bias": bias.describe()}),
    )
    unfinished, path = scratch / f"{molecule.name}.part.zarr", scratch / f"{molecule.name}.zarr"
    shutil.rmtree(unfinished, ignore_errors=True)
    label_peptide(protocol, system, frames, unfinished)
    unfinished.rename(path)
    return f"{molecule.name}: {system.n_atoms} atoms, {time.perf_counter() - began:.0f} s"


if __name__ == "__main__":
    main()
