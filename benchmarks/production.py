"""Steps of production against the model alone: eager, exported as it is, exported with tables; one core.

Every figure is the best of several rounds in processor time, the candidates taking turns; ratios are what counts. The
networks are random ones of trained size: what their weights are does not change the cost. Beads form a globule of the
density of a protein with one bead a residue.

    python benchmarks/production.py --out benchmarks/results/production.json
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.prior_terms import PriorParameters
from openmm_hvpcg.simulation.backends import evaluate_script
from openmm_hvpcg.simulation.system import CGPotential
from openmm_hvpcg.training.export import script_network, script_potential
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.models.tabulated import TabulatedSchNet
from openmm_hvpcg.training.models.torsions import split_network
from openmm_hvpcg.training.models.total import TotalEnergy, TotalEnergyAndForces
from openmm_hvpcg.training.tabulation import SKIN_NM

CUTOFF_NM = 1.2
PER_NM = 320
#: nm, of a cube that holds one bead.
SPACING_NM = 0.5
SIZES = (10, 20, 80, 250, 1000, 2000, 4000)
#: Above, only the tabulated model is run: the others look at all pairs.
LARGEST_EAGER, LARGEST_PLAIN = 1000, 250
#: Sizes that are measured with the network of the dihedrals, too.
WITH_TORSIONS = (20, 80)
ROUNDS = 5
REPLICAS = 32


def build_spec(n_beads: int) -> PotentialSpec:
    """A chain without priors: what is measured is the network."""
    bonds = np.array([[i, i + 1] for i in range(n_beads - 1)])
    residues = tuple(("CG", b, 0) for b in range(n_beads))
    names = tuple(f"X{b}" for b in range(n_beads))
    kinds = tuple(("ABCDE" * n_beads)[:n_beads])
    beads = BeadMap(np.eye(n_beads), kinds, np.full(n_beads, 50.0), bonds, names, residues)
    masses = dict.fromkeys("ABCDE", 50.0)
    return PotentialSpec(tuple("ABCDE"), beads, {}, masses, PriorParameters(), CUTOFF_NM, 300.0)


def build_random_network(features: int, torsions: bool) -> torch.nn.Module:
    settings = {"features": features, "interactions": 2, "radial": 60, "cutoff_nm": CUTOFF_NM, "torsions": torsions}
    torch.manual_seed(0)
    network = build_network(5, ModelSettings.model_validate(settings), 1.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


def build_globule(n_beads: int) -> np.ndarray:
    """Positions (B, 3) nm of beads on a jittered lattice in a ball."""
    n = int(np.ceil((2 * n_beads) ** (1 / 3))) + 1
    grid = SPACING_NM * (np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3) - (n - 1) / 2)
    ball = grid[np.argsort((grid**2).sum(1), kind="stable")[:n_beads]]
    return ball + 0.04 * np.random.default_rng(0).normal(size=ball.shape)


def build_stepper(potential: CGPotential, x: np.ndarray, replicas: int = 1) -> Callable[[int], None]:
    """Steps of Langevin dynamics at 300 K of beads of 50 amu, 4 fs each, with lists of pairs made anew as they move."""
    system = potential.createSystem(replicas=replicas, backend="torchforce")
    tether = openmm.CustomExternalForce("5*((x-x0)^2+(y-y0)^2+(z-z0)^2)")  # keeps the globule a globule
    for name in ("x0", "y0", "z0"):
        tether.addPerParticleParameter(name)
    for i, place in enumerate(np.tile(x, (replicas, 1))):
        tether.addParticle(i, place)
    system.addForce(tether)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.004)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(np.tile(x, (replicas, 1)))
    context.setVelocitiesToTemperature(300.0, 1)
    integrator.step(6)

    def step(n: int, kept: openmm.Context = context) -> None:
        kept.getIntegrator().step(n)

    return step


def repeat(function: Callable[[], Any]) -> Callable[[int], None]:
    def run(n: int) -> None:
        for _ in range(n):
            function()

    return run


def measure(candidates: dict[str, Callable[[int], None]], seconds: float) -> dict[str, float]:
    """Processor seconds of one call of each candidate, best of ``ROUNDS`` turns of about ``seconds`` each."""
    counts, best = {}, dict.fromkeys(candidates, float("inf"))
    for name, run in candidates.items():
        run(2)
        start = time.process_time()
        run(2)
        counts[name] = max(2, int(2 * seconds / max(time.process_time() - start, 1e-6)))
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            start = time.process_time()
            run(counts[name])
            best[name] = min(best[name], (time.process_time() - start) / counts[name])
    return best


def build_tabulated(network: torch.nn.Module, spec: PotentialSpec) -> CGPotential:
    base, torsions = split_network(network)
    module = TotalEnergyAndForces(TabulatedSchNet(base, PER_NM, SKIN_NM), spec, torsions)
    return CGPotential(script_network(module.eval()), spec)


def count_bytes(script: torch.jit.ScriptModule) -> int:
    """Of the tensors that a script keeps: weights, tables, and the list of pairs."""
    return sum(t.numel() * t.element_size() for t in (*script.buffers(), *script.parameters()))


def measure_size(features: int, n_beads: int, torsions: bool, seconds: float) -> dict[str, Any]:
    network, spec, x = build_random_network(features, torsions), build_spec(n_beads), build_globule(n_beads)
    tabulated = build_tabulated(network, spec)
    bare = tabulated.bind()[0]
    bare.outputs_forces, bare.include_priors = True, False
    place = torch.from_numpy(x)
    candidates: dict[str, Callable[[int], None]] = {
        "tabulated model": repeat(lambda: bare(place)),
        "TorchForce tabulated": build_stepper(tabulated, x),
    }
    if n_beads <= LARGEST_EAGER:
        eager = TotalEnergy(network, spec)
        eager.include_priors = False
        candidates["eager model"] = repeat(lambda: evaluate_script(eager, x))
    if n_beads <= LARGEST_PLAIN:
        plain = CGPotential(script_potential(TotalEnergy(network, spec)), spec)
        plain_bare = plain.bind()[0]
        plain_bare.include_priors = False
        candidates["exported model"] = repeat(lambda: evaluate_script(plain_bare, x))
        candidates["TorchForce"] = build_stepper(plain, x)
    best = measure(candidates, seconds)
    row: dict[str, Any] = {
        "features": features,
        "beads": n_beads,
        "microseconds": {k: 1e6 * v for k, v in best.items()},
    }
    fast = best["TorchForce tabulated"]
    row["OpenMM over the tabulated model"] = fast / best["tabulated model"] - 1
    if "eager model" in best:
        row["steps/s tabulated over eager model"] = best["eager model"] / fast
    if "TorchForce" in best:
        row["OpenMM over the exported model"] = best["TorchForce"] / best["exported model"] - 1
        row["TorchForce over eager model"] = best["TorchForce"] / best["eager model"] - 1
        row["steps/s tabulated over untabulated"] = best["TorchForce"] / fast
    row["microseconds a bead"] = 1e6 * fast / n_beads
    row["kept bytes a bead"] = count_bytes(bare) / n_beads
    gc.collect()
    return row


def measure_replicas(features: int, n_beads: int, seconds: float) -> dict[str, Any]:
    network, spec, x = build_random_network(features, False), build_spec(n_beads), build_globule(n_beads)
    potential = build_tabulated(network, spec)
    best = measure({str(n): build_stepper(potential, x, n) for n in (1, REPLICAS)}, seconds)
    return {
        "features": features,
        "beads": n_beads,
        "replicas": REPLICAS,
        "copy-steps/s over those of one": REPLICAS * best["1"] / best[str(REPLICAS)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.05, help="of one turn of one candidate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, replicas = [], []
    for n_beads in SIZES:
        variants = [(32, False), (64, False)] + ([(32, True)] if n_beads in WITH_TORSIONS else [])
        for features, torsions in variants:
            rows.append(measure_size(features, n_beads, torsions, arguments.seconds))
            print(json.dumps(rows[-1]), flush=True)
    for n_beads in (10, 20, 80):
        replicas.append(measure_replicas(32, n_beads, arguments.seconds))
        print(json.dumps(replicas[-1]), flush=True)
    result = {
        "command": "python benchmarks/production.py --out benchmarks/results/production.json",
        "torch": torch.__version__,
        "OpenMM": openmm.Platform.getOpenMMVersion(),
        "processor": platform.processor() or platform.machine(),
        "sizes": rows,
        "replicas": replicas,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
