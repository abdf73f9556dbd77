from __future__ import annotations

import json

import numpy as np
import pytest

from openmm_hvpcg.errors import MappingError
from openmm_hvpcg.training.labels.force_maps import (
    METHODS,
    ForceMap,
    build_force_map,
    check_force_map,
    fit_force_maps,
    split_in_blocks,
)

M = np.array([[1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0]])
CLUSTERS = np.array([0, 0, 1, 2, 2])
ACTIVE = np.ones(5, dtype=bool)
FORCES = np.random.default_rng(0).standard_normal((200, 5, 3))


def test_slice_map_takes_the_whole_rigid_cluster_of_its_atom():
    weights = build_force_map("slice", M, CLUSTERS, ACTIVE, FORCES).weights
    # Least-norm solution by pseudo-inverse: exact up to rounding.
    np.testing.assert_allclose(weights, [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_maps_are_admissible(method, seed):
    """Random linear maps, clusters, inactive atoms and bonds, from one frame, fewer than weights, and many."""
    rng = np.random.default_rng(seed)
    site_weights = np.zeros((3, 12))
    for bead in range(3):
        # Beads of atoms 0-2, 3-5, 6-8, of which clusters of two are made below; 9-11 are hidden.
        site_weights[bead, 3 * bead : 3 * bead + 3] = rng.dirichlet(np.ones(3))
    clusters = np.array([0, 0, 1, 2, 3, 3, 4, 5, 5, 6, 6, 7])
    active = np.arange(12) != 11
    bonds = rng.integers(0, 12, (10, 2))
    for n_frames in (1, 4, 60):
        forces = 500.0 * rng.standard_normal((n_frames, 12, 3))
        whole, by_fold = fit_force_maps(method, site_weights, clusters, active, forces, bonds)
        assert by_fold.shape == (min(5, n_frames), 3, 12)
        for weights in (whole.weights, *by_fold):
            np.testing.assert_allclose(weights @ site_weights.T, np.eye(3), atol=1e-9)  # rounding of the solve
            check_force_map(ForceMap(weights, method), site_weights, clusters)
            assert (weights[:, ~active] == 0).all()
        json.dumps(whole.diagnostics, allow_nan=False)


def test_harmonic_map_is_linear_along_a_chain():
    """Harmonic functions on a path are linear: 1, 2/3, 1/3, 0 between two beads, and constant beyond them."""
    site_weights = np.zeros((2, 6))
    site_weights[0, 1] = site_weights[1, 4] = 1.0
    bonds = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]])
    free, active = np.arange(6), np.ones(6, dtype=bool)
    weights = build_force_map("harmonic", site_weights, free, active, np.zeros((1, 6, 3)), bonds).weights
    expected = [[1, 1, 2 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 2 / 3, 1, 1]]
    np.testing.assert_allclose(weights, expected, atol=1e-5)  # NORM_SHARE is 1e-6 of a step, here of up to 3 weights
    # Without bonds there is nothing to vary along: the least norm is left.
    bare = build_force_map("harmonic", site_weights, free, active, np.zeros((1, 6, 3))).weights
    np.testing.assert_allclose(bare, site_weights, atol=1e-12)


class Chain:
    """Forces of a chain of stiff bonds, a bead at every tenth atom; each bond and atom pulls at random."""

    n_atoms = 60
    bonds = np.stack([np.arange(59), np.arange(1, 60)], axis=1)
    site_weights = np.eye(60)[5::10]
    free, active = np.arange(60), np.ones(60, dtype=bool)

    @classmethod
    def draw(cls, n_frames: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        forces = 100.0 * rng.standard_normal((n_frames, 60, 3))
        # Bonds of different strain, so that the harmonic map is good but not the best.
        pull = np.linspace(500.0, 3000.0, 59)[:, None] * rng.standard_normal((n_frames, 59, 3))
        forces[:, :-1] += pull
        forces[:, 1:] -= pull
        return forces

    @classmethod
    def measure(cls, method: str, n_frames: int, seed: int) -> float:
        """Mean square on 4000 new frames, (kJ/mol/nm)^2: known to 0.3 %, and the same frames for all."""
        arguments = (cls.site_weights, cls.free, cls.active, cls.draw(n_frames, seed), cls.bonds)
        weights = build_force_map(method, *arguments).weights
        return float(np.mean(np.matmul(weights, cls.draw(4000, 99)) ** 2))


@pytest.mark.parametrize("seed", range(3))
def test_cross_validated_map_overfits_less(seed):
    """54 free weights and 150 forces a component, as the C-alpha map of a capped pentapeptide has at 50 frames.

    Ordinary least squares multiplies the variance by about 1 / (1 - 54/150) = 1.6: a tenth off asks for a small part of
    that excess. The frames it is measured on are the same for all, and the seeds are fixed.
    """
    optimal, regular = (Chain.measure(m, 50, seed) for m in ("optimal", "optimal_cv"))
    assert regular < 0.9 * optimal
    assert regular < 1.02 * Chain.measure("harmonic", 50, seed)


def test_cross_validated_map_becomes_the_optimal_one():
    """With 20000 frames the ridge is lost in the sample: the variances agree to a thousandth, harmonic's does not."""
    optimal, regular, harmonic = (Chain.measure(m, 20000, 0) for m in ("optimal", "optimal_cv", "harmonic"))
    assert regular == pytest.approx(optimal, rel=1e-3)
    assert harmonic > 1.015 * optimal


def test_cross_validation_says_what_it_chose():
    arguments = (Chain.site_weights, Chain.free, Chain.active, Chain.draw(50, 0), Chain.bonds)
    found = build_force_map("optimal_cv", *arguments).diagnostics
    curve = found["cv_rms_projected_force"]
    assert found["ridge_strength"] == found["cv_strengths"][int(np.argmin(curve))]
    # The curve at its minimum is what the folds' maps really do to the frames they have not seen.
    assert min(curve) == pytest.approx(found["rms_projected_force_held_out"], rel=1e-9)
    assert curve[0] > min(curve)


def test_map_of_a_fold_has_not_seen_it():
    forces = Chain.draw(100, 0)
    fold = split_in_blocks(100)
    changed = forces.copy()
    changed[fold == 2] = Chain.draw(20, 1)
    maps = [fit_force_maps("optimal", Chain.site_weights, Chain.free, Chain.active, f)[1] for f in (forces, changed)]
    # The sums over the other folds come from a difference of sums: equal up to rounding.
    np.testing.assert_allclose(maps[0][2], maps[1][2], atol=1e-8)
    assert np.abs(maps[0][1] - maps[1][1]).max() > 1e-3


def test_cross_fitting_removes_the_bias_of_fitted_labels():
    """A map that has seen a frame makes its label too small, by free weights / forces; cross-fitting does not.

    300 repeats; each slope is z-tested at 5 standard errors: false-alarm rate 1e-6.
    """
    rng = np.random.default_rng(0)
    site_weights, free, active = np.eye(20)[:2], np.arange(20), np.ones(20, dtype=bool)
    fold = split_in_blocks(20)
    slopes = []
    for _ in range(300):
        mean = rng.standard_normal((20, 2, 3))
        forces = rng.standard_normal((20, 20, 3)) + np.matmul(site_weights.T, mean)
        whole, by_fold = fit_force_maps("optimal", site_weights, free, active, forces)
        labels = (whole.project(forces), np.concatenate([by_fold[k] @ forces[fold == k] for k in range(5)]))
        slopes.append([np.sum(q * mean) / np.sum(mean**2) for q in labels])
    average, error = np.mean(slopes, axis=0), np.std(slopes, axis=0) / np.sqrt(300)
    # 18 free weights, 20 frames of 3 components: 1 - 18/60 = 0.7.
    assert abs(average[0] - 0.7) < 5 * error[0]
    assert abs(average[1] - 1.0) < 5 * error[1]
    assert error.max() < 0.03


def test_no_admissible_map_has_less_variance_than_the_optimal_one():
    optimal = build_force_map("optimal", M, CLUSTERS, ACTIVE, FORCES)
    least = np.mean(optimal.project(FORCES) ** 2)
    rng = np.random.default_rng(1)
    for _ in range(50):
        # Any change of weight on the cluster without a bead keeps the map admissible.
        other = optimal.weights.copy()
        other[:, 3:] += 0.1 * rng.standard_normal((2, 1))
        # The ridge (1e-9) may cost that much; every real change costs more.
        assert np.mean(np.matmul(other, FORCES) ** 2) > least * (1 - 1e-7)
    assert optimal.diagnostics["rms_projected_force"] <= optimal.diagnostics["rms_projected_force_slice"]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_free_where_every_cluster_has_a_bead(method):
    site_weights = np.array([[1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 1.0, 0]])
    weights = build_force_map(method, site_weights, CLUSTERS, ACTIVE, FORCES, np.array([[1, 2]])).weights
    np.testing.assert_allclose(weights, [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]], atol=1e-12)  # rounding


@pytest.mark.parametrize("method", METHODS)
def test_forces_that_are_zero_are_no_trouble(method):
    force_map = build_force_map(method, M, CLUSTERS, ACTIVE, np.zeros((3, 5, 3)), np.array([[1, 2], [2, 3]]))
    assert np.isfinite(force_map.weights).all()
    json.dumps(force_map.diagnostics, allow_nan=False)


def test_inactive_atoms_get_no_weight():
    active = np.array([True, True, True, False, False])
    assert (build_force_map("optimal", M, CLUSTERS, active, FORCES).weights[:, 3:] == 0).all()


def test_beads_in_one_rigid_cluster_are_refused():
    with pytest.raises(MappingError, match=r"beads \[0, 1\] are joined by rigid constraints"):
        build_force_map("slice", M, np.zeros(5, dtype=int), ACTIVE, FORCES)


def test_bead_on_massless_atom_is_refused():
    with pytest.raises(MappingError, match="atom 2, which is massless"):
        build_force_map("slice", M, CLUSTERS, np.array([True, True, False, True, True]), FORCES)


def test_unknown_method_is_refused():
    with pytest.raises(MappingError, match="expected slice, harmonic, optimal, optimal_cv, got best"):
        build_force_map("best", M, CLUSTERS, ACTIVE, FORCES)


def test_check_finds_inadmissible_maps():
    with pytest.raises(MappingError, match="not admissible"):
        check_force_map(ForceMap(0.9 * M, "x"), M, np.arange(5))
    with pytest.raises(MappingError, match="breaks constraints"):
        check_force_map(ForceMap(M, "x"), M, CLUSTERS)
    with pytest.raises(MappingError, match="differ in size"):
        check_force_map(ForceMap(M[:1], "x"), M, CLUSTERS)
