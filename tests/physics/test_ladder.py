"""Replica exchange with the beads held, against a hidden double well whose populations are known by quadrature."""

from __future__ import annotations

import mdtraj as md
import numpy as np
import openmm
import pytest
from openmm import app

from openmm_hvpcg.atomistic.systems import AtomisticSystem
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, Starts
from openmm_hvpcg.units import compute_kt

TEMPERATURE = 300.0
#: Two wells at -0.1 and +0.1 nm, behind a barrier of 30 kJ/mol (12 kT); the second lies 4 kJ/mol above the first.
BARRIER, WIDTH_NM, SLOPE, SPRING = 30.0, 0.1, 20.0, 100.0
LADDER = (450.0, 700.0, 1100.0)


@pytest.fixture(scope="module")
def molecule() -> AtomisticSystem:
    """A bead at the origin and a hidden atom in the double well, on a spring between them that the bead feels."""
    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    well = openmm.CustomExternalForce(f"{BARRIER}*((x/{WIDTH_NM})^2-1)^2 + {SLOPE}*x + 2000*(y^2+z^2)")
    well.addParticle(1, [])
    system.addForce(well)
    spring = openmm.HarmonicBondForce()
    spring.addBond(0, 1, 0.0, SPRING)
    system.addForce(spring)
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for name in ("C1", "C2"):
        topology.addAtom(name, app.element.carbon, residue)
    # It starts in the upper well.
    positions = np.array([[0.0, 0, 0], [WIDTH_NM, 0, 0]])
    return AtomisticSystem(md.Topology.from_openmm(topology), topology, system, positions, TEMPERATURE, {})


def compute_mean_x() -> float:
    x = np.linspace(-0.25, 0.25, 20001)
    energy = BARRIER * ((x / WIDTH_NM) ** 2 - 1) ** 2 + SLOPE * x + 0.5 * SPRING * x**2
    weight = np.exp(-(energy - energy.min()) / compute_kt(TEMPERATURE))
    return float((x * weight).sum() / weight.sum())


def sample_mean_x(molecule: AtomisticSystem, ladder: tuple[float, ...]) -> tuple[np.ndarray, float | None]:
    """Mean of x over each of 24 chains of 48 ps, from the force on the bead, and the share of accepted exchanges."""
    bead_map = BeadMap(
        np.array([[1.0, 0.0]]), ("X",), np.full(1, 12.0), np.empty((0, 2), int), ("X",), (("MOL", 1, 0),)
    )
    sampler = HeldSampler(molecule, bead_map, "Reference", {}, step_nm=1e-4, seed=3, workers=1)
    starts = Starts(
        np.arange(24), np.tile(molecule.positions, (24, 1, 1)), np.empty((24, 0, 1, 3)), np.array([[1.0, 0.0]])
    )
    chains = Chains(1200, 10, 1200, 4.0, 5.0, TEMPERATURE, equilibration_steps=10000, ladder_K=ladder)
    (found,) = sampler.sample([starts], chains)
    return np.array([s.forces[:, 0, 0].mean() / SPRING for s in found]), found[-1].accepted


def test_a_ladder_brings_hidden_states_into_balance(molecule):
    """Mean over chains at 5 of its standard errors (23 degrees of freedom: false-alarm rate 5e-5; seeded)."""
    exact = compute_mean_x()
    found, accepted = sample_mean_x(molecule, LADDER)
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean() - exact) < 5 * error
    # Sharp enough to tell the right populations from equal ones, and from chains that stayed where they were.
    assert error < 0.2 * abs(exact)
    assert accepted is not None
    assert 0.2 < accepted < 0.9


def test_one_chain_stays_where_it_starts(molecule):
    """48 ps at 12 kT: without the ladder the force is that of the upper well, and its scatter hardly tells."""
    found, accepted = sample_mean_x(molecule, ())
    assert accepted is None
    assert found.mean() > 0.5 * WIDTH_NM > 0 > compute_mean_x()


def test_the_same_seed_gives_the_same_samples(molecule):
    first, second = (sample_mean_x(molecule, LADDER[:1])[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_force_calls_count_every_chain():
    chains = Chains(10, 5, 5, 2.0, 5.0, TEMPERATURE, equilibration_steps=20, ladder_K=LADDER)
    assert chains.count_force_calls(3) == 4 * (20 + 50) + 10 + 2 * 3 * 2
