"""The PMF reference against known truths: harmonic networks, known series, and its own identity on a real molecule."""

from __future__ import annotations

from pathlib import Path

import mdtraj as md
import numpy as np
import openmm
import pytest
from harmonic import KT, TEMPERATURE, build_network, slice_map
from openmm import app

from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import InputSettings, ReferenceSettings, SamplingSettings
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, HeldSamples, Starts
from openmm_hvpcg.training.reference import average_samples, compute_reference

N_ATOMS = 8
BEADS = [1, 4, 6]
MAP = slice_map(N_ATOMS, BEADS)
#: Hidden modes of the network relax in 0.2 ps at 10/ps: blocks of 2 ps hold ten correlation times. The integrator's
#: positions are exact for harmonic energies at any stable time step.
SETTINGS = ReferenceSettings(
    n_samples=400, stride=10, hvp_every=4, timestep_fs=5.0, friction_per_ps=10.0, platform="Reference", workers=1
)
CHAINS = Chains(400, 10, 4, 5.0, 10.0, TEMPERATURE)


@pytest.fixture(scope="module")
def network():
    return build_network(N_ATOMS)


@pytest.fixture(scope="module")
def molecule(network) -> AtomisticSystem:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.element.carbon, residue) for i in range(N_ATOMS)]
    springs = next(f for f in network.system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    for k in range(springs.getNumBonds()):
        i, j = springs.getBondParameters(k)[:2]
        topology.addBond(atoms[i], atoms[j])
    positions = network.sample(1, seed=0)[0]
    return AtomisticSystem(md.Topology.from_openmm(topology), topology, network.system, positions, TEMPERATURE, {})


@pytest.fixture(scope="module")
def bead_map() -> BeadMap:
    n = len(BEADS)
    names = tuple(f"X{b}" for b in range(n))
    return BeadMap(MAP, names, np.full(n, 12.0), np.empty((0, 2), int), names, (("MOL", 1, 0),) * n)


def test_reference_of_a_harmonic_network_is_the_schur_complement(network, molecule, bead_map, tmp_path):
    """Mean forces and the whole Hessian, through the reference stage itself.

    Deviations averaged over 24 configurations against their standard errors: 9 force components and 81 elements (45
    distinct) at 5 standard errors with 24 * 9 degrees of freedom: false-alarm rate 1e-4.
    """
    frames = Frames(network.sample(300, seed=1).astype(np.float32), molecule.topology, TEMPERATURE, np.zeros(300, int))
    settings = SETTINGS.model_copy(update={"n_frames": 24})
    found = compute_reference(molecule, frames, bead_map, settings, tmp_path / "x.zarr", progress=False)
    exact = network.compute_cg_stiffness(MAP)
    forces = -np.einsum("bc,tcx->tbx", exact, found.positions)
    hessian = np.kron(exact, np.eye(3)).reshape(9, 3, 3)
    for value, error, truth in (
        (found.forces, found.force_errors, forces),
        (found.hvps, found.hvp_errors, hessian),
    ):
        mean = (value - truth).mean(axis=0)
        spread = np.sqrt((error**2).sum(axis=0)) / len(value)
        # The floor: finite differences of double-precision forces, and elements without any noise (xy and the like).
        assert (np.abs(mean) < 5 * spread + 1e-6 * np.abs(truth).max()).all()
        # Sharp enough to notice a wrong sign or a missing term: noise far below the signal.
        assert np.sqrt(np.mean(spread**2)) < 0.01 * np.sqrt(np.mean(truth**2))


def test_standard_errors_are_honest(network, molecule, bead_map):
    """Squared deviations from the truth over squared standard errors, with a noisy map (``slice``): 1 on average.

    40 configurations give at least 120 independent squares (x, y, z) over squared errors of 9 blocks each: the 4e-6
    and 2.4e-5 tails of F(120, 1080) are the bounds, for the forces and for the Hessian.
    """
    positions = network.sample(40, seed=2)
    probes = np.tile(np.eye(9).reshape(9, 3, 3), (40, 1, 1, 1))
    sampler = HeldSampler(molecule, bead_map, "Reference", {}, step_nm=1e-4, seed=3, workers=1)
    (found,) = sampler.sample([Starts(np.arange(40), positions, probes, MAP)], CHAINS)
    forces, force_errors, hvps, hvp_errors = (
        np.array(values) for values in zip(*(average_samples(s, probes[0], 1 / KT, 10) for s in found), strict=True)
    )
    exact = network.compute_cg_stiffness(MAP)
    truth = -np.einsum("bc,tcx->tbx", exact, positions[:, BEADS])
    hessian = np.kron(exact, np.eye(3)).reshape(9, 3, 3)
    for value, error, expected in ((forces, force_errors, truth), (hvps, hvp_errors, hessian)):
        ratio = np.mean((value - expected) ** 2) / np.mean(error**2)
        assert 0.5 < ratio < 1.7


def test_chains_from_equilibrium_frames_are_stationary(network, molecule, bead_map):
    """The variance of the projected force about its known mean is the known one from the first sample on.

    400 chains, 3 beads, 3 components; 12 variances at 5 standard errors of 1200 independent squares: false-alarm rate
    below 1e-4 (the upper tail of chi-square is heavier than the normal one's).
    """
    positions = network.sample(400, seed=4)
    exact = network.compute_cg_stiffness(MAP)
    mean = -np.einsum("bc,tcx->tbx", exact, positions[:, BEADS])
    hidden = [a for a in range(N_ATOMS) if a not in BEADS]
    coupling = network.stiffness[np.ix_(BEADS, hidden)]
    rigidity = network.stiffness[np.ix_(hidden, hidden)]
    variance = KT * np.diag(coupling @ np.linalg.inv(rigidity) @ coupling.T)
    sampler = HeldSampler(molecule, bead_map, "Reference", {}, step_nm=1e-4, seed=5, workers=1)
    chains = Chains(4, 5, 1, 5.0, 10.0, TEMPERATURE)

    def measure(start: np.ndarray) -> np.ndarray:
        starts = Starts(np.arange(400), start, np.empty((400, 0, 3, 3)), MAP)
        (found,) = sampler.sample([starts], chains)
        residual = np.array([s.forces for s in found]) - mean[:, None]
        return (residual**2).mean(axis=(0, 3)) / variance

    error = np.sqrt(2 / 1200)
    assert (np.abs(measure(positions) - 1) < 5 * error).all()
    # Hidden atoms that start in their minimum are not in equilibrium after 25 fs: the test can tell.
    relaxed = positions.copy()
    relaxed[:, hidden] = -np.einsum("hi,bi,tbx->thx", np.linalg.inv(rigidity), coupling, positions[:, BEADS])
    assert (measure(relaxed)[0] < 1 - 5 * error).all()


def test_jackknife_takes_out_the_bias_of_the_covariance():
    """400 short correlated series (AR(1), coefficient 1/2, 60 samples) of known covariance, 3600 components in all.

    The plain covariance is 4.9 % short (12 standard errors); the jackknife over 3 blocks leaves 0.3 %, which is below
    one standard error: the false-alarm rate is 1e-5 (normal, at 5 standard errors less the known remainder).
    """
    n_series, n_samples, memory = 400, 60, 0.5
    rng = np.random.default_rng(6)
    noise = rng.standard_normal((n_samples, n_series, 3, 3)) * np.sqrt(1 - memory**2)
    series = np.empty_like(noise)
    series[0] = rng.standard_normal((n_series, 3, 3))
    for n in range(1, n_samples):
        series[n] = memory * series[n - 1] + noise[n]
    probes = np.eye(9).reshape(9, 3, 3)
    no_hvps = np.zeros((15, 9, 3, 3))
    corrected = [
        -average_samples(HeldSamples(series[:, s] + 50.0, no_hvps), probes, 1.0, 3)[2].reshape(9, 9).diagonal()
        for s in range(n_series)
    ]
    plain = series.var(axis=0)
    for values, biased in ((np.array(corrected), False), (plain, True)):
        z = (values.mean() - 1.0) / (values.std() / np.sqrt(values.size))
        assert z < -5 if biased else abs(z) < 5


def test_hvps_are_the_slope_of_mean_forces(tmp_path: Path):
    """Identity 2 on capped alanine: ``(grad grad W) v`` against ``-[<f>(R + h v) - <f>(R - h v)] / 2h``.

    Two configurations, a Rademacher probe each. Displaced configurations are reached by Q^T v and relaxed for 1 ps.
    36 components at 6 standard errors with at least 38 degrees of freedom: false-alarm rate 2e-5.
    """
    system = build_atomistic_system(
        InputSettings(sequence="A", hydrogen_mass_amu=3.0), temperature_K=300.0, constraints="none"
    )
    bead_map = build_bead_map("backbone", system.topology)
    sampling = SamplingSettings(n_frames=40, stride=100, walkers=1, equilibration_steps=2000, platform="Reference")
    frames = sample_frames(system, sampling, tmp_path / "frames.zarr", progress=False).read()
    settings = ReferenceSettings(
        n_frames=2, n_samples=1200, hvp_every=3, probes=1, blocks=20, platform="Reference", seed=8
    )
    found = compute_reference(system, frames, bead_map, settings, tmp_path / "x.zarr", progress=False)
    step = 1e-3
    shift = step * np.matmul(found.force_map.T, found.probes[:, 0])
    start = frames.positions[found.frame].astype(np.float64)
    chains = Chains(1200, 5, 1200, 2.0, 5.0, 300.0, equilibration_steps=500)
    sampler = HeldSampler(system, bead_map, "Reference", {}, step_nm=1e-5, seed=9)
    none = np.empty((1, 0, bead_map.n_beads, 3))
    moved = [start[0] + shift[0], start[0] - shift[0], start[1] + shift[1], start[1] - shift[1]]
    parts = [Starts(np.array([k]), x[None], none, found.force_map) for k, x in enumerate(moved)]
    samples = [s.forces.reshape(20, 60, -1, 3).mean(axis=1) for (s,) in sampler.sample(parts, chains)]
    forces = np.array([blocks.mean(axis=0) for blocks in samples])
    errors = np.array([blocks.std(axis=0, ddof=1) / np.sqrt(20) for blocks in samples])
    slope = -(forces[0::2] - forces[1::2]) / (2 * step)
    slope_error = np.hypot(errors[0::2], errors[1::2]) / (2 * step)
    hvps, error = found.hvps[:, 0], np.hypot(found.hvp_errors[:, 0], slope_error)
    # Bonds change by up to 2 * sqrt(3) * step, 2 % of their length: truncation, of second order, is below 0.1 %.
    floor = 1e-3 * np.abs(hvps).max()
    assert (np.abs(hvps - slope) < 6 * error + floor).all()
    # Both sides are known to a tenth of what they are about.
    assert np.sqrt(np.mean(error**2)) < 0.1 * np.sqrt(np.mean(hvps**2))
