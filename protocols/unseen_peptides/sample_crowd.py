"""Sample all peptides of the study at once, as one crowd of copies in one OpenMM System: for a machine with a GPU.

    python protocols/unseen_peptides/sample_crowd.py SYSTEMS OUT --seconds 480

SYSTEMS holds, for each peptide, NAME.xml (openmm.System) and NAME.npz (start structures, bead atoms, role), as
`run.py systems` writes them. Needs openmm, numpy and scipy alone. Half of a peptide's copies start extended and half
helical, so that the two halves of what is sampled agree only where it is converged. OUT gets frames of training
peptides with all atoms (train_K.npz) and the beads of the peptides to test on (reference.npz), each with the copy of
every frame.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from openmm_hvpcg.atomistic.crowd import Crowd, build_crowd
from openmm_hvpcg.units import BOLTZMANN

STARTS = ("extended", "helix")
#: Positions of reference beads are kept as multiples of this, nm: a hundredth of the width of a bond between beads.
GRID_NM = 1e-4
#: Steps between looks at where the molecules are while they equilibrate.
LOOK_STEPS = 2500
#: A file of training frames holds at most so many bytes.
FILE_BYTES = 14_000_000


@dataclass
class Peptide:
    """A peptide of the crowd and the frames of it so far: ``frames[k]`` are those of its copy ``k``."""

    name: str
    role: str
    system: openmm.System
    starts: dict[str, NDArray[np.float64]]
    beads: NDArray[np.int64]
    copies: int = 0
    frames: list[list[NDArray[Any]]] = field(default_factory=list)

    def add(self, copy: int, positions: NDArray[np.float64]) -> None:
        while len(self.frames) <= copy:
            self.frames.append([])
        centred = positions - positions.mean(axis=0)
        if self.role == "test":
            centred = np.round(centred[self.beads] / GRID_NM).astype(np.int16)
        self.frames[copy].append(centred.astype(np.int16 if self.role == "test" else np.float32))

    def pick(self, n_frames: int) -> dict[str, NDArray[Any]]:
        """So many frames a copy, evenly spaced, copy by copy."""
        rows = np.linspace(0, len(self.frames[0]) - 1, n_frames).round().astype(int)
        return {
            f"{self.name}/positions": np.concatenate([np.stack(f)[rows] for f in self.frames]),
            f"{self.name}/walker": np.repeat(np.arange(self.copies), n_frames).astype(np.int16),
        }


def load_peptides(folder: Path, copies: dict[str, int]) -> list[Peptide]:
    peptides = []
    for path in sorted(folder.glob("*.xml")):
        content = np.load(path.with_suffix(".npz"))
        role = str(content["role"])
        peptides.append(
            Peptide(
                path.stem,
                role,
                openmm.XmlSerializer.deserialize(path.read_text()),
                {start: content[start] for start in STARTS},
                content["beads"],
                copies[role],
            )
        )
    return peptides


class Run:
    """The crowd in motion."""

    def __init__(self, peptides: list[Peptide], args: argparse.Namespace) -> None:
        self.peptides = peptides
        self.owners = [(p, k) for p in peptides for k in range(p.copies)]
        self.crowd: Crowd = build_crowd([p.system for p, _ in self.owners])
        integrator = openmm.LangevinMiddleIntegrator(args.temperature_K, args.friction_per_ps, args.timestep_fs * 1e-3)
        integrator.setRandomNumberSeed(args.seed)
        platform = openmm.Platform.getPlatformByName(args.platform)
        properties = {"Precision": "mixed"} if args.platform in ("CUDA", "OpenCL", "HIP") else {}
        self.context = openmm.Context(self.crowd.system, integrator, platform, properties)
        self.integrator = integrator
        self.context.setPositions(self.crowd.place([p.starts[STARTS[k % 2]] for p, k in self.owners]))
        openmm.LocalEnergyMinimizer.minimize(self.context, 10.0, 100)
        self.context.setVelocitiesToTemperature(args.temperature_K, args.seed)
        self.steps = 0

    def advance(self, steps: int) -> list[NDArray[np.float64]]:
        """Positions of every molecule after so many steps more."""
        while steps > LOOK_STEPS:
            self.advance(LOOK_STEPS)
            steps -= LOOK_STEPS
        self.integrator.step(steps)
        self.steps += steps
        state = self.context.getState(getPositions=True)
        positions = np.asarray(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        parts = self.crowd.split(positions)
        if self.crowd.find_drifted(positions):
            self.context.setPositions(self.crowd.place(parts))
        return parts

    def measure_temperature(self) -> float:
        """Kinetic temperature, K."""
        kinetic = self.context.getState(getEnergy=True).getKineticEnergy().value_in_unit(unit.kilojoule_per_mole)
        dof = 3 * self.crowd.system.getNumParticles() - self.crowd.system.getNumConstraints()
        return float(2 * kinetic / dof / BOLTZMANN)


def sample(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Equilibrate for a share of the time, then take frames evenly over the rest; figures of the run.

    With ``--stride`` the steps are given instead of the time.
    """
    began = time.perf_counter()
    equilibration_s = args.seconds * args.equilibration_share
    run.advance(LOOK_STEPS if args.stride is None else args.equilibration_steps)  # compiles kernels
    first = time.perf_counter()
    while args.stride is None and time.perf_counter() - began < equilibration_s:
        run.advance(LOOK_STEPS)
    equilibration_steps = run.steps
    stride = args.stride
    if stride is None:
        speed = (run.steps - LOOK_STEPS) / (time.perf_counter() - first)
        stride = max(1, int(speed * (args.seconds - equilibration_s) / args.frames))
    logging.info("stride %d, %d steps of equilibration", stride, equilibration_steps)
    for _ in range(args.frames):
        for (peptide, k), positions in zip(run.owners, run.advance(stride), strict=True):
            peptide.add(k, positions)
        if args.stride is None and time.perf_counter() - began > args.seconds * 1.05:
            break
    wall_s = time.perf_counter() - began
    return {
        "molecules": len(run.owners),
        "atoms": int(run.crowd.offsets[-1]),
        "cutoff_nm": run.crowd.cutoff_nm,
        "equilibration_steps": equilibration_steps,
        "stride": stride,
        "frames_a_copy": len(run.peptides[0].frames[0]),
        "steps": run.steps,
        "wall_s": wall_s,
        "steps_per_s": run.steps / wall_s,
        "ns_a_copy": run.steps * args.timestep_fs * 1e-6,
        "total_ns": run.steps * args.timestep_fs * 1e-6 * len(run.owners),
        "kinetic_temperature_K": run.measure_temperature(),
    }


def write(peptides: list[Peptide], out: Path, figures: dict[str, Any], args: argparse.Namespace) -> None:
    out.mkdir(parents=True, exist_ok=True)
    n = figures["frames_a_copy"]
    reference: dict[str, NDArray[Any]] = {}
    for p in peptides:
        if p.role == "test":
            reference |= p.pick(n)
    np.savez_compressed(out / "reference.npz", **reference)
    batch: dict[str, NDArray[Any]] = {}
    number = 0
    for p in [p for p in peptides if p.role == "train"]:
        new = p.pick(min(n, max(1, args.training_frames // p.copies)))
        if sum(a.nbytes for a in (batch | new).values()) > FILE_BYTES:
            np.savez_compressed(out / f"train_{number}.npz", **batch)
            batch, number = {}, number + 1
        batch |= new
    np.savez_compressed(out / f"train_{number}.npz", **batch)
    (out / "sampling.json").write_text(json.dumps({**figures, "arguments": vars(args) | {"systems": "", "out": ""}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems")
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--equilibration-share", type=float, default=0.2)
    parser.add_argument("--stride", type=int, help="steps between frames, instead of --seconds")
    parser.add_argument("--equilibration-steps", type=int, default=250000, help="with --stride")
    parser.add_argument("--copies-train", type=int, default=16)
    parser.add_argument("--copies-test", type=int, default=64)
    parser.add_argument("--frames", type=int, default=320, help="frames a copy")
    parser.add_argument("--training-frames", type=int, default=1600, help="frames kept of a training peptide")
    parser.add_argument("--temperature-K", type=float, default=350.0, dest="temperature_K")
    parser.add_argument("--friction-per-ps", type=float, default=1.0)
    parser.add_argument("--timestep-fs", type=float, default=4.0)
    parser.add_argument("--platform", default="CUDA")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    peptides = load_peptides(Path(args.systems), {"train": args.copies_train, "test": args.copies_test})
    run = Run(peptides, args)
    figures = sample(run, args)
    write(peptides, Path(args.out), figures, args)
    logging.info("%s", json.dumps(figures))


if __name__ == "__main__":
    main()
