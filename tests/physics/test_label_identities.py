"""The identities of the theory note, on systems where both sides are known."""

from __future__ import annotations

import mdtraj as md
import numpy as np
import openmm
import pytest
import torch
from harmonic import KT, TEMPERATURE, build_network, slice_map
from openmm import app

from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import AveragingSettings, InputSettings, LabelSettings
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.training.labels.force_maps import METHODS, build_force_map, fit_force_maps, split_in_blocks
from openmm_hvpcg.training.labels.frame_maps import FrameMaps
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps, scan_step
from openmm_hvpcg.training.labels.label import label_frames
from openmm_hvpcg.training.labels.oracle import ForceOracle, find_active_atoms, find_rigid_clusters
from openmm_hvpcg.training.labels.probes import ProbeLaw, draw_probes
from openmm_hvpcg.training.losses import compute_correction, compute_hvp_target

N_ATOMS = 8
BEADS = [1, 4, 6]
#: A map whose beads are averages of atoms that overlap: nothing about it is a slice.
LINEAR = np.array([[0.5, 0.3, 0.2, 0, 0, 0, 0, 0], [0, 0, 0.25, 0.5, 0.25, 0, 0, 0], [0, 0, 0, 0, 0, 0.6, 0, 0.4]])
MAPS = {"slice of atoms": slice_map(N_ATOMS, BEADS), "linear": LINEAR}
LAWS = {
    "rademacher": ProbeLaw(),
    "normal": ProbeLaw("normal"),
    "soft": ProbeLaw("soft"),
    "two soft modes": ProbeLaw("soft", n_modes=2),
    "rademacher, no translations": ProbeLaw(translations="remove"),
    "normal, no translations": ProbeLaw("normal", translations="remove"),
}
BONDS = np.array([(i, i + 1) for i in range(N_ATOMS - 1)] + [(0, 3), (2, 6), (1, 5)])
FREE = np.arange(N_ATOMS)
ALL = np.ones(N_ATOMS, dtype=bool)


@pytest.fixture(scope="module")
def network():
    return build_network(N_ATOMS)


@pytest.fixture(scope="module")
def alanine():
    return build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0)


def test_hvp_of_harmonic_network_is_k_v(network):
    positions = network.sample(5, seed=1)
    probes = np.random.default_rng(2).standard_normal((5, 3, N_ATOMS, 3))
    with ForceOracle(network.system, "Reference") as oracle:
        hvps = compute_projected_hvps(oracle, positions, probes, np.eye(N_ATOMS), 1e-3)
    expected = np.einsum("ab,tpbx->tpax", network.stiffness, probes)
    # A quadratic energy has no truncation error; rounding of forces (1e-16 * 1e3) over 2 * 1e-3 nm is below 1e-9.
    np.testing.assert_allclose(hvps, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MAPS)
def test_mean_target_is_the_schur_complement(network, name, method):
    """``<t(v)> = [M K^-1 M^T]^-1 v`` for every admissible map, sampled through the real label code.

    All B*3 components of 3 probes (27) are z-tested at 5 standard errors: false-alarm rate below 2e-5.
    """
    site_weights = MAPS[name]
    positions = network.sample(4000, seed=3)
    with ForceOracle(network.system, "Reference", workers=2) as oracle:
        forces = oracle(positions)
        force_map = build_force_map(method, site_weights, FREE, ALL, forces[:500], BONDS)
        probes = np.broadcast_to(np.random.default_rng(4).choice([-1.0, 1.0], (1, 3, 3, 3)), (4000, 3, 3, 3))
        hvps = compute_projected_hvps(oracle, positions, probes, force_map.weights, 1e-3)
    exact = network.compute_cg_stiffness(site_weights)
    model_forces = -np.einsum("bc,tcx->tbx", exact, np.einsum("ba,tax->tbx", site_weights, positions))
    residual = force_map.project(forces) - model_forces
    targets = compute_hvp_target(*(torch.from_numpy(np.array(x)) for x in (hvps, residual, probes)), 1 / KT).numpy()
    expected = np.einsum("bc,pcx->pbx", exact, probes[0])
    error = targets.std(axis=0) / np.sqrt(len(targets))
    # The floor covers the harmonic case in which the noise vanishes and only rounding is left.
    assert (np.abs(targets.mean(axis=0) - expected) < 5 * error + 1e-6 * np.abs(expected).max()).all()


@pytest.mark.parametrize("method", METHODS)
def test_probes_of_every_law_give_the_cg_hessian(network, method):
    """``E[v t(v)^T - S H] = 0`` with S(R) of each frame, for every law, map and fold of frames.

    Labels of frames by maps cross-fitted to the same frames, as the label stage makes them. 6 laws of 81 entries for
    each of 4 maps are z-tested at 6 standard errors of 1500 independent frames: false-alarm rate 4e-6.
    """
    site_weights = LINEAR
    positions = network.sample(1500, seed=8)
    beads = np.einsum("ba,tax->tbx", site_weights, positions)
    exact = network.compute_cg_stiffness(site_weights)
    hessian = np.kron(exact, np.eye(3))
    fold = split_in_blocks(1500)
    with ForceOracle(network.system, "Reference") as oracle:
        forces = oracle(positions)
        maps = FrameMaps(fit_force_maps(method, site_weights, FREE, ALL, forces, BONDS, fold)[1], fold)
        residual = maps.project(forces) + np.einsum("bc,tcx->tbx", exact, beads)
        for law_name, law in LAWS.items():
            probes = draw_probes(law, np.arange(1500), 1, 3, 9, beads).astype(np.float64)
            hvps = maps.compute_hvps(oracle, positions, probes, 1e-3)
            targets = compute_hvp_target(*map(torch.from_numpy, (hvps, residual, probes)), 1 / KT).numpy()
            v, t = probes.reshape(1500, 9), targets.reshape(1500, 9)
            excess = v[:, :, None] * t[:, None, :] - law.compute_second_moments(beads) @ hessian
            error = excess.std(axis=0) / np.sqrt(1500)
            # Float32 probes: 1e-7 of the products, far below the noise; the floor is for entries without any.
            floor = 1e-6 * np.abs(hessian).max()
            assert (np.abs(excess.mean(axis=0)) < 6 * error + floor).all(), law_name


@pytest.mark.parametrize("n_samples", [10, 11])
def test_averaged_labels_give_force_covariance_and_schur_complement(network, tmp_path, n_samples):
    """Conditional averaging through the label stage itself, noisy map: mean force, covariance, HVP target.

    Deviations from the truth at 300 frames: 9 force components, 9 diagonal and 18 other elements of each matrix that
    couple like Cartesian components, at 5 standard errors over frames: false-alarm rate 4e-5. Samples are 0.2 ps apart,
    the time in which the slowest hidden mode relaxes: halves of five samples then share exp(-1) / (1 - exp(-1))^2 / 25
    = 3.7 % of its covariance, which is missing.
    """
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for k in range(N_ATOMS):
        topology.addAtom(f"C{k}", app.element.carbon, residue)
    x = network.sample(300, seed=21)
    molecule = AtomisticSystem(md.Topology.from_openmm(topology), topology, network.system, x[0], TEMPERATURE, {})
    names, site_weights = ("X0", "X1", "X2"), MAPS["slice of atoms"]
    bead_map = BeadMap(site_weights, names, np.full(3, 12.0), np.empty((0, 2), int), names, (("MOL", 1, 0),) * 3)
    frames = Frames(x.astype(np.float32), molecule.topology, TEMPERATURE, np.zeros(300, int))
    # The integrator's positions are exact for harmonic energies at any stable time step.
    averaging = AveragingSettings(n_samples=n_samples, stride=40, hvp_every=5, timestep_fs=5.0, friction_per_ps=10.0)
    settings = LabelSettings(
        force_map="slice", probes_per_frame=4, averaging=averaging, platform="Reference", workers=1, seed=3
    )
    data = label_frames(molecule, frames, bead_map, settings, tmp_path / "x.zarr", progress=False)
    exact = network.compute_cg_stiffness(site_weights)
    hidden = [a for a in range(N_ATOMS) if a not in BEADS]
    coupling = network.stiffness[np.ix_(BEADS, hidden)]
    covariance = KT * coupling @ np.linalg.inv(network.stiffness[np.ix_(hidden, hidden)]) @ coupling.T
    forces = data.forces + np.einsum("bc,tcx->tbx", exact, data.positions)
    assert_vanishes(forces.reshape(300, -1), 1e-4 * np.abs(data.forces).max())
    targets = data.hvps - data.covariances / KT
    for values, matrix, floor in (
        (data.covariances, covariance, 0.037 * np.abs(covariance).max()),
        (targets, exact, 0.037 * np.abs(covariance).max() / KT),
    ):
        # Each component apart: the matrix is the same for x, y and z.
        excess = values - np.einsum("bc,tpcx->tpbx", matrix, data.probes)
        products = np.einsum("tpbx,tpcx->tbc", excess, data.probes) / 12
        assert_vanishes(products.reshape(300, -1), floor)
        # The covariance is no small thing beside that, in its own estimate and in the target.
        error = products.std(axis=0).max() / np.sqrt(300)
        assert error < 0.03 * np.abs(covariance).max() / (1.0 if values is data.covariances else KT)


def assert_vanishes(values: np.ndarray, floor: float) -> None:
    """Means over the frames (T, n), within 5 standard errors and what is known to be missing."""
    error = values.std(axis=0) / np.sqrt(len(values))
    assert (np.abs(values.mean(axis=0)) < 5 * error + floor).all()


@pytest.mark.parametrize("name", MAPS)
def test_optimal_map_is_nearly_free_of_noise(network, name):
    """The conditional-minimum response makes q = -grad W exactly; a finite sample comes close, a slice map does not."""
    site_weights = MAPS[name]
    with ForceOracle(network.system, "Reference") as oracle:
        forces = oracle(network.sample(2000, seed=5))
    exact = network.compute_cg_stiffness(site_weights)
    response = exact @ site_weights @ np.linalg.inv(network.stiffness)
    optimal = build_force_map("optimal", site_weights, FREE, ALL, forces)
    plain = build_force_map("slice", site_weights, FREE, ALL, forces)
    # 6000 samples of 8 components fix the weights to about 1/sqrt(6000) = 0.013 of their size.
    assert np.abs(optimal.weights - response).max() < 0.06
    noise = [np.mean((m.project(forces) - np.matmul(response, forces)) ** 2) for m in (optimal, plain)]
    assert noise[0] < 0.01 * noise[1]


def test_finite_differences_are_second_order(alanine):
    positions = alanine.positions[None]
    bead_map = build_bead_map("heavy", alanine.topology)
    probes = draw_probes("rademacher", np.array([0]), 2, bead_map.n_beads, seed=1)
    clusters = find_rigid_clusters(alanine.system)
    active = find_active_atoms(alanine.system, alanine.topology, bead_map.site_weights)
    with ForceOracle(alanine.system, "Reference") as oracle:
        weights = build_force_map("slice", bead_map.site_weights, clusters, active, oracle(positions)).weights
        exact = compute_projected_hvps(oracle, positions, probes, weights, 1e-6)
        errors = [
            np.linalg.norm(compute_projected_hvps(oracle, positions, probes, weights, h) - exact) for h in (3e-4, 3e-5)
        ]
        scan = scan_step(oracle, positions, probes, weights)
    # The reference's own error is (1e-6 / 3e-5)^2 = 0.1 % of the smaller one: 0.001 in the logarithm.
    assert np.log10(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.01)
    assert 1e-7 <= scan.step_nm <= 1e-4
    # Measured on the Reference platform (theory note): about 1e-8 and better between 1e-5 and 1e-7 nm.
    assert scan.relative_error < 1e-7


def test_projected_hessian_is_symmetric_and_blind_to_translation(alanine):
    bead_map = build_bead_map("heavy", alanine.topology)
    positions = np.repeat(alanine.positions[None], 2, axis=0)
    rng = np.random.default_rng(3)
    probes = rng.standard_normal((2, 4, bead_map.n_beads, 3))
    probes[:, 3] = rng.standard_normal(3)
    clusters = find_rigid_clusters(alanine.system)
    active = find_active_atoms(alanine.system, alanine.topology, bead_map.site_weights)
    with ForceOracle(alanine.system, "Reference") as oracle:
        forces = oracle(positions)
        force_map = build_force_map("slice", bead_map.site_weights, clusters, active, forces)
        hvps = compute_projected_hvps(oracle, positions, probes, force_map.weights, 1e-6)
    scale = np.abs(hvps[:, :3]).max()
    bilinear = np.einsum("tpbx,tqbx->tpq", probes[:, :3], hvps[:, :3])
    # Finite differences of double-precision forces are right to about 1e-8 of the HVP.
    np.testing.assert_allclose(bilinear, bilinear.transpose(0, 2, 1), atol=1e-6 * scale)
    # Heavy atoms with their hydrogens are all atoms, so the columns of Q sum to 1 and a translation costs nothing.
    np.testing.assert_allclose(force_map.weights.sum(axis=0), 1.0, atol=1e-12)
    assert np.abs(hvps[:, 3]).max() < 1e-6 * scale
    assert np.abs(force_map.project(forces).sum(axis=1)).max() < 1e-6 * np.abs(forces).max()


def test_lifted_displacement_keeps_constraints(alanine):
    bead_map = build_bead_map("backbone", alanine.topology)
    clusters = find_rigid_clusters(alanine.system)
    active = find_active_atoms(alanine.system, alanine.topology, bead_map.site_weights)
    rng = np.random.default_rng(0)
    positions = alanine.positions + 0.005 * rng.standard_normal((50, alanine.n_atoms, 3))
    with ForceOracle(alanine.system, "Reference") as oracle:
        forces = oracle(positions)
    bonds = np.array([(a.index, b.index) for a, b in alanine.topology.bonds])
    for method in METHODS:
        force_map = build_force_map(method, bead_map.site_weights, clusters, active, forces, bonds)
        lifted = force_map.lift(rng.standard_normal((bead_map.n_beads, 3)))
        for k in range(alanine.system.getNumConstraints()):
            i, j, _ = alanine.system.getConstraintParameters(k)
            # Equal columns are built as copies of one weight: equal to the last bit or two.
            np.testing.assert_allclose(lifted[i], lifted[j], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_probes_give_the_full_matrix_on_average(network, law):
    """Mean of ``v (H v)^T`` is S H; 576 entries z-tested at 6 standard errors: false-alarm rate below 2e-6."""
    hessian = np.kron(network.stiffness, np.eye(3))
    frames = np.arange(2000)
    positions = np.repeat(network.sample(1, seed=12), 2000, axis=0)
    v = draw_probes(law, frames, 4, N_ATOMS, 6, positions).astype(np.float64).reshape(8000, 3 * N_ATOMS)
    products = v[:, :, None] * (v @ hessian)[:, None, :]
    error = products.std(axis=0) / np.sqrt(len(v))
    expected = law.compute_second_moments(positions[:1])[0] @ hessian
    assert (np.abs(products.mean(axis=0) - expected) < 6 * error + 1e-6 * np.abs(hessian).max()).all()


def test_bias_of_the_centred_correction_is_second_order():
    """``<c(v)> = beta (Cov + e e^T) v``: doubling the force error e quadruples the bias, and no first order shows."""
    rng = np.random.default_rng(7)
    half = torch.from_numpy(rng.standard_normal((200, 3, 3)))
    noise = torch.cat([half, -half])  # mean exactly zero: what is left is exact, not statistical
    probes = torch.from_numpy(rng.standard_normal((1, 2, 3, 3))).expand(400, -1, -1, -1)
    error = torch.from_numpy(rng.standard_normal((3, 3)))

    def bias(scale: float) -> torch.Tensor:
        unbiased = compute_correction(noise, probes, 0.4).mean(0)
        return compute_correction(noise + scale * error, probes, 0.4).mean(0) - unbiased

    expected = 0.4 * (error * probes[0]).sum((1, 2))[:, None, None] * error
    # Antithetic noise cancels in double precision: only rounding separates the two sides.
    torch.testing.assert_close(bias(1.0), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias(2.0), 4 * bias(1.0), rtol=1e-9, atol=1e-9)


def test_virtual_sites_move_with_their_parents():
    """Forces on real atoms are the gradient of the energy as a function of real atoms alone."""
    system = openmm.System()
    for mass in (12.0, 12.0, 0.0, 16.0):
        system.addParticle(mass)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.7, 0.3))
    bonds = openmm.HarmonicBondForce()
    bonds.addBond(0, 1, 0.15, 5000.0)
    bonds.addBond(2, 3, 0.25, 3000.0)
    system.addForce(bonds)
    positions = np.array([[0, 0, 0], [0.16, 0, 0], [9, 9, 9], [0.05, 0.27, 0.1]], dtype=float)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))

    def energy(x: np.ndarray) -> float:
        context.setPositions(x)
        context.computeVirtualSites()
        return context.getState(getEnergy=True).getPotentialEnergy()._value

    with ForceOracle(system, "Reference") as oracle:
        forces = oracle(positions[None])[0]
    assert (forces[2] == 0).all()
    for atom in (0, 1, 3):
        for axis in range(3):
            step = np.zeros_like(positions)
            step[atom, axis] = 1e-5
            numeric = -(energy(positions + step) - energy(positions - step)) / 2e-5
            # Central differences of step 1e-5 nm on springs of 5e3 kJ/mol/nm^2: error far below 1e-4.
            assert forces[atom, axis] == pytest.approx(numeric, abs=1e-4)
