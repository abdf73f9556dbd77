"""Replica exchange against quadrature: a barrier that plain dynamics does not cross in the time, and exchange does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import torch

from openmm_hvpcg.analysis.reweighting import compute_weights
from openmm_hvpcg.config import SimulationSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.prior_terms import PriorParameters
from openmm_hvpcg.simulation import CGPotential, load_ladder, load_run, simulate
from openmm_hvpcg.units import compute_kt

TEMPERATURE = 300.0
#: Wells at MIDDLE -+ HALF nm, the barrier between them 16 kT high at 300 K (4 kT at 1200 K), the far well deeper.
MIDDLE, HALF, BARRIER, TILT = 0.4, 0.1, 40.0, -2.0
ENERGY = f"{BARRIER}*(((r-{MIDDLE})/{HALF})^2-1)^2 + {TILT}*(r-{MIDDLE})/{HALF}"
MOLECULE = BeadMap(
    np.eye(2), ("A", "A"), np.array([20.0, 20.0]), np.array([[0, 1]]), ("A1", "A2"), (("DIM", 1, 0), ("DIM", 1, 0))
)


class DoubleWell(CGPotential):
    """Two beads in a double well of their distance, as a plain OpenMM force: quick enough to sample well."""

    def createSystem(self, topology: Any = None, replicas: int = 1, *_: Any) -> openmm.System:
        system, force = openmm.System(), openmm.CustomBondForce(ENERGY)
        for bead in range(2 * replicas):
            system.addParticle(20.0)
            if bead % 2:
                force.addBond(bead - 1, bead, [])
        system.addForce(force)
        return system


def build_double_well() -> DoubleWell:
    spec = PotentialSpec(("A",), MOLECULE, {}, {"A": 20.0}, PriorParameters(), 1.0, TEMPERATURE)
    return DoubleWell(torch.jit.script(torch.nn.Identity()), spec)


def integrate(temperature_K: float) -> tuple[float, float]:
    """Share of the far well and mean energy by quadrature; the volume element of a distance is r^2."""
    r = np.linspace(0.15, 0.65, 20001)
    x = (r - MIDDLE) / HALF
    energy = BARRIER * (x**2 - 1) ** 2 + TILT * x
    weight = r**2 * np.exp(-energy / compute_kt(temperature_K))
    return float(weight[r > MIDDLE].sum() / weight.sum()), float((weight * energy).sum() / weight.sum())


def run(folder: Path, **settings: Any) -> tuple[np.ndarray, Any]:
    """Whether each frame (K, T) lies in the far well, of a run that starts in the near one; and its ladder."""
    shared = {"save_every": 50, "timestep_fs": 4.0, "friction_per_ps": 5.0, "platform": "Reference"}
    start = np.array([[[0.0, 0.0, 0.0], [MIDDLE - HALF, 0.0, 0.0]]])
    chosen = SimulationSettings.model_validate({**shared, **settings})
    result = simulate(build_double_well(), start, chosen, folder, progress=False)
    frames = load_run(folder, MOLECULE.to_topology())
    r = md.compute_distances(frames.to_mdtraj(), [[0, 1]], periodic=False)[:, 0]
    return (r > MIDDLE).reshape(result.replicas, -1), load_ladder(folder)


def test_exchange_finds_the_populations_that_plain_dynamics_misses(tmp_path: Path) -> None:
    """All replicas start in the near well; the truth is 0.93 in the far one.

    Plain dynamics: at 300 K a replica crosses some 5 times a microsecond (attempts at 6 per ps times exp(-16)); 8
    replicas of 40 ps leave with a probability of 2e-3. Exchange: shares and energies of 16 time blocks of all
    replicas, the start left out, each block weighted by itself; their means lie within 5 of their standard errors,
    which by Student's law with 15 degrees of freedom one change of the noise in 6,000 exceeds, for six figures one in
    1,000.
    """
    plain, _ = run(tmp_path / "plain", replicas=8, n_steps=10000)
    assert not plain.any()
    exchange = {"hottest_K": 1200.0, "temperatures": 5, "every": 50}
    far, ladder = run(tmp_path / "exchange", exchange=exchange, n_steps=170000, seed=7)
    assert ladder.temperatures_K[0] == TEMPERATURE
    n_blocks, n_start = 16, 200
    blocks = np.array_split(np.arange(n_start, far.shape[1]), n_blocks)
    for temperature in (TEMPERATURE, 500.0, 1200.0):  # the second was not simulated
        found = []
        for block in blocks:
            energies, states = ladder.energies[:, block].ravel(), ladder.states[:, block].ravel()
            weights = compute_weights(energies, states, ladder.temperatures_K, temperature)
            found.append(((weights * far[:, block].ravel()).sum(), (weights * energies).sum()))
        error = np.std(found, axis=0, ddof=1) / np.sqrt(n_blocks)
        # Small enough that the frames of another temperature, or all unweighted, would fail.
        assert error[0] < 0.04
        assert error[1] < 0.25  # of energies that rise by 1 kJ/mol in 100 K
        assert (np.abs(np.mean(found, axis=0) - integrate(temperature)) < 5 * error).all()
