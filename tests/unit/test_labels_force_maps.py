from __future__ import annotations

import numpy as np
import pytest

from openmm_hvpcg.errors import MappingError
from openmm_hvpcg.training.labels.force_maps import ForceMap, build_force_map, check_force_map

M = np.array([[1.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0]])
CLUSTERS = np.array([0, 0, 1, 2, 2])
ACTIVE = np.ones(5, dtype=bool)
FORCES = np.random.default_rng(0).standard_normal((200, 5, 3))


def test_slice_map_takes_the_whole_rigid_cluster_of_its_atom():
    weights = build_force_map("slice", M, CLUSTERS, ACTIVE, FORCES).weights
    # Least-norm solution by pseudo-inverse: exact up to rounding.
    np.testing.assert_allclose(weights, [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("method", ["slice", "optimal"])
def test_maps_are_admissible(method):
    force_map = build_force_map(method, M, CLUSTERS, ACTIVE, FORCES)
    np.testing.assert_allclose(force_map.weights @ M.T, np.eye(2), atol=1e-9)  # rounding of the solve
    check_force_map(force_map, M, CLUSTERS)


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
    with pytest.raises(MappingError, match="expected slice, optimal, got best"):
        build_force_map("best", M, CLUSTERS, ACTIVE, FORCES)


def test_check_finds_inadmissible_maps():
    with pytest.raises(MappingError, match="not admissible"):
        check_force_map(ForceMap(0.9 * M, "x"), M, np.arange(5))
    with pytest.raises(MappingError, match="breaks constraints"):
        check_force_map(ForceMap(M, "x"), M, CLUSTERS)
    with pytest.raises(MappingError, match="differ in size"):
        check_force_map(ForceMap(M[:1], "x"), M, CLUSTERS)
