from __future__ import annotations

import json
from dataclasses import replace

import mdtraj as md
import numpy as np
import openmm
import pytest
from openmm import unit
from training_cases import build_map

from openmm_hvpcg.atomistic.flattening import ORDER, DihedralBias, fit_log_density
from openmm_hvpcg.errors import MappingError
from openmm_hvpcg.units import compute_kt

TEMPERATURE = 310.0
KT = compute_kt(TEMPERATURE)
#: ln p of two dihedrals: coefficients of cosines and of sines.
DENSITIES = np.array([[[0.9, -0.5, 0.3, 0.0], [0.4, 0.2, 0.0, -0.3]], [[-1.0, 0.0, 0.2, 0.1], [0.0, 0.6, 0.0, 0.0]]])
CHAIN = [[0, 1], [1, 2], [2, 3]]
GRID = np.linspace(-np.pi, np.pi, 60, endpoint=False)


def sum_terms(coefficients: np.ndarray, angles: np.ndarray) -> np.ndarray:
    orders = np.arange(1, ORDER + 1)
    both = np.cos(orders * angles[:, None]), np.sin(orders * angles[:, None])
    return np.asarray(both[0] @ coefficients[0] + both[1] @ coefficients[1])


def draw(coefficients: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Angles distributed as exp(ln p), by rejection."""
    rng = np.random.default_rng(seed)
    top = sum_terms(coefficients, np.linspace(-np.pi, np.pi, 3601)).max()
    angles = rng.uniform(-np.pi, np.pi, 40 * n)
    kept = angles[np.log(rng.random(len(angles))) < sum_terms(coefficients, angles) - top]
    assert len(kept) >= n
    return kept[:n]


@pytest.mark.parametrize("coefficients", DENSITIES, ids=["one", "other"])
def test_density_is_found_in_its_samples(coefficients):
    """Each coefficient of 40,000 angles to 5 standard errors of a mean cosine (variance at least 0.15): p < 1e-5."""
    found = fit_log_density(draw(coefficients, 40_000, seed=3))
    np.testing.assert_allclose(found, coefficients, atol=5 * np.sqrt(2 / 0.3 / 40_000))


def test_what_was_never_seen_stays_bounded():
    """200 frames in a tenth of the circle: the rest is as unlikely as such a sample can say, not infinitely so."""
    angles = np.random.default_rng(1).uniform(-0.3, 0.3, 200)
    values = sum_terms(fit_log_density(angles), GRID)
    assert 3.0 < np.ptp(values) < 15.0
    assert np.isfinite(fit_log_density(angles[:1])).all()


def rotate(angle: float) -> np.ndarray:
    """Four particles with this dihedral, nm."""
    first = [-0.05, 0.1 * np.cos(angle), 0.1 * np.sin(angle)]
    return np.array([first, [0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.2, 0.1, 0.0]])


def build_system() -> openmm.System:
    """Four particles whose dihedral has the energy -kT ln p of the first density, and nothing else."""
    system = openmm.System()
    for _ in range(4):
        system.addParticle(12.0)
    force = openmm.PeriodicTorsionForce()
    for n in range(1, ORDER + 1):
        a, b = DENSITIES[0, 0, n - 1], DENSITIES[0, 1, n - 1]
        # a cos(n phi) + b sin(n phi) = k (1 + cos(n phi - phase)) - k
        force.addTorsion(0, 1, 2, 3, n, float(np.arctan2(-b, -a)), float(KT * np.hypot(a, b)))
    system.addForce(force)
    return system


def compute_energies(system: openmm.System) -> np.ndarray:
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    found = []
    for angle in GRID:
        context.setPositions(rotate(angle))
        found.append(context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
    return np.array(found)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_share_of_the_pmf_is_taken_away(share):
    """Deterministic: the energy of a System that is its dihedral's PMF alone, signs of sines included."""
    system = build_system()
    before = compute_energies(system)
    assert np.ptp(before) > 3 * KT
    bias = DihedralBias(build_map("AAAA", CHAIN), np.array([[0, 1, 2, 3]]), DENSITIES[:1], share, 100)
    after = compute_energies(bias.add_to(system, TEMPERATURE))
    expected = (1 - share) * (before - before.mean())
    np.testing.assert_allclose(after - after.mean(), expected, atol=1e-6)
    assert system.getNumForces() == 1, "labels are made with the System as it was"


def test_bias_of_frames_flattens_what_they_show():
    """Frames whose dihedral is distributed as the System's, so that a whole share leaves next to nothing of its PMF."""
    angles = draw(DENSITIES[0], 20_000, seed=5)
    # The first particle turns about the second bond; its dihedral is the negative of that turn or the turn itself.
    frames = np.stack([rotate(a) for a in angles])
    bias = DihedralBias.fit(frames, build_map("AAAA", CHAIN), 1.0)
    assert bias.n_frames == 20_000
    sign = np.sign(md.compute_dihedrals(md.Trajectory(rotate(1.0)[None], None), [[0, 1, 2, 3]])[0, 0])
    # By the sign of what turns: the sines change theirs with it. Five standard errors, as above.
    expected = DENSITIES[0] * np.array([[1.0], [sign]])
    np.testing.assert_allclose(bias.log_densities[0], expected, atol=5 * np.sqrt(2 / 0.3 / 20_000))
    json.dumps(bias.describe())


def test_beads_of_several_atoms_are_moved_by_their_sites():
    """Forces of the bias on the atoms are those on the site, shared by weight; none on atoms that carry no bead."""
    weights = np.zeros((4, 7))
    weights[[0, 1, 2], [0, 2, 4]], weights[3, [5, 6]] = 1.0, [0.25, 0.75]
    bead_map = replace(build_map("AAAA", CHAIN), site_weights=weights)
    system = openmm.System()
    for _ in range(7):
        system.addParticle(12.0)
    bias = DihedralBias(bead_map, np.array([[0, 1, 2, 3]]), DENSITIES[:1], 0.5, 100)
    context = openmm.Context(
        bias.add_to(system, TEMPERATURE),
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    positions = np.random.default_rng(2).normal(size=(7, 3))
    context.setPositions(positions)
    forces = context.getState(getForces=True).getForces(asNumpy=True)._value
    assert np.abs(forces[[1, 3]]).max() == 0
    np.testing.assert_allclose(forces[5] * 3, forces[6], rtol=1e-9)
    assert np.abs(forces[6]).max() > 0.1
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-9)


def test_beads_without_a_dihedral_are_refused():
    with pytest.raises(MappingError, match="no four of them are bonded in a row"):
        DihedralBias.fit(np.zeros((20, 3, 3)), build_map("AAA", CHAIN[:2]), 0.5)
