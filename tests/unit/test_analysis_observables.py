"""Features, internal coordinates, phi and psi."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from analysis_samples import DIPEPTIDE, build_chain_topology, build_dipeptide, simulate_chain

from openmm_hvpcg.analysis import observables as obs
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.frames import Frames


def to_frames(positions: np.ndarray, topology=None) -> Frames:
    topology = topology or build_chain_topology(positions.shape[1])
    return Frames(positions, topology, 300.0, np.zeros(len(positions), dtype=int))


def test_bonded_terms_of_a_branched_graph() -> None:
    bonds, angles, dihedrals = obs.find_bonded_terms(DIPEPTIDE.to_topology())
    assert bonds == [(0, 1), (1, 2), (2, 3), (2, 4), (4, 5)]
    assert angles == [(0, 1, 2), (1, 2, 3), (1, 2, 4), (2, 4, 5), (3, 2, 4)]
    assert dihedrals == [(0, 1, 2, 3), (0, 1, 2, 4), (1, 2, 4, 5), (3, 2, 4, 5)]


@pytest.mark.parametrize(
    ("n_beads", "n_pairs", "note"),
    [
        (2, 1, "all 1 pair distances"),
        (3, 3, "all 3 pair distances"),
        (6, 10, "unbonded"),
        (34, 496, "more than 2 apart"),
        (60, 406, "one bead in 2"),
    ],
)
def test_features_are_bounded(n_beads: int, n_pairs: int, note: str) -> None:
    features = obs.build_features(build_chain_topology(n_beads), "distances")
    assert len(features.pairs) == n_pairs <= obs.MAX_FEATURES
    assert note in features.note


def test_feature_values() -> None:
    positions = build_dipeptide(np.array([-80.0, 60.0]), np.array([120.0, 30.0]))
    features = obs.build_features(DIPEPTIDE.to_topology(), "distances+dihedrals")
    values = features.compute(to_frames(positions, DIPEPTIDE.to_topology()))
    assert values.shape == (2, features.n_features) == (2, 10 + 8)
    i, j = features.pairs[3]
    # Positions are float32 nm: 1e-7 relative, some ten times that in a difference.
    assert values[:, 3] == pytest.approx(np.linalg.norm(positions[:, i] - positions[:, j], axis=1), abs=2e-6)
    phi = features.dihedrals.tolist().index([0, 1, 2, 4])
    assert values[:, 10 + phi] == pytest.approx(np.cos(np.radians([-80.0, 60.0])), abs=1e-5)
    assert values[:, 14 + phi] == pytest.approx(np.sin(np.radians([-80.0, 60.0])), abs=1e-5)


def test_features_that_cannot_be() -> None:
    with pytest.raises(InputError, match="one bead"):
        obs.build_features(build_chain_topology(1), "distances")
    with pytest.raises(InputError, match="no dihedrals"):
        obs.build_features(build_chain_topology(3), "dihedrals")


def test_coordinates_of_a_known_structure() -> None:
    # A right-angled zigzag: bonds 0.1, 0.2, 0.3 nm, angles 90 degrees, dihedral +90 degrees.
    positions = np.array([[[0.1, 0, 0], [0, 0, 0], [0, 0.2, 0], [0, 0.2, 0.3]]])
    frames = to_frames(positions)
    coordinates = obs.find_coordinates(frames.topology, frames)
    values = dict(
        zip(
            [(c.kind, c.label) for c in coordinates],
            obs.compute_coordinates(frames, coordinates)[0],
            strict=True,
        )
    )
    expected = {
        ("bond", "B1-B2"): 0.1,
        ("bond", "B2-B3"): 0.2,
        ("bond", "B3-B4"): 0.3,
        ("1-3 distance", "B1-B3"): np.sqrt(0.05),
        ("1-3 distance", "B2-B4"): np.sqrt(0.13),
        ("distance", "B1-B4"): np.sqrt(0.14),
        ("angle", "B1-B2-B3"): 90.0,
        ("angle", "B2-B3-B4"): 90.0,
        # From the first bond's side, looking along the second (y), x turns into z counter-clockwise: IUPAC
        # -90.
        ("dihedral", "B1-B2-B3-B4"): -90.0,
    }
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=1e-5), key  # float32 positions


def test_size_and_rmsd() -> None:
    square = np.array([[0, 0, 0], [0, 0.2, 0], [0.2, 0.2, 0], [0.2, 0, 0.0]])
    turned = square[:, [1, 2, 0]] + 5.0
    frames = to_frames(np.stack([square, turned, 2 * square]))
    # float32 positions, around 5 nm: 5e-7 nm.
    assert obs.compute_radius_of_gyration(frames) == pytest.approx(np.sqrt(2) * np.array([0.1, 0.1, 0.2]), abs=5e-6)
    # Superposed; twice the size leaves each corner sqrt(2) 0.1 nm away. mdtraj's RMSD is a float32
    # difference of sums of squares: 1e-3 nm near zero.
    assert obs.compute_rmsd(frames, square) == pytest.approx([0.0, 0.0, np.sqrt(2) * 0.1], abs=1e-3)


def test_phi_psi_of_a_dipeptide() -> None:
    found = obs.find_phi_psi(DIPEPTIDE)
    assert found == ((0, 1, 2, 4), (1, 2, 4, 5))
    phi, psi = np.array([-80.0, -57.0, 60.0, 175.0]), np.array([120.0, -47.0, 45.0, -170.0])
    frames = to_frames(build_dipeptide(phi, psi), DIPEPTIDE.to_topology())
    # Angles from float32 positions 0.15 nm apart: 1e-5 rad.
    assert obs.compute_phi_psi(frames, found) == pytest.approx(np.stack([phi, psi], axis=1), abs=1e-3)


def test_phi_psi_of_an_alpha_carbon_is_that_of_an_l_amino_acid() -> None:
    """The test's own geometry: CB on the L side, so that the sign convention is that of real peptides."""
    x = build_dipeptide(np.array([-80.0]), np.array([120.0]))[0]
    # CORN rule: from H, CO-R-N run clockwise; with H opposite the mean of the others, (N x C) . CB is
    # positive.
    n, c, cb = x[1] - x[2], x[4] - x[2], x[3] - x[2]
    assert np.dot(np.cross(n, c), cb) > 0


@pytest.mark.parametrize("change", ["two residues", "no N after", "no names"])
def test_phi_psi_where_there_are_none_or_several(change: str) -> None:
    names = DIPEPTIDE.names
    if change == "two residues":
        bead_map = dataclasses.replace(
            DIPEPTIDE,
            site_weights=np.eye(9),
            species=("X",) * 9,
            masses=np.full(9, 12.0),
            bonds=np.array([[i, i + 1] for i in range(8)]),
            names=("C", "N", "CA", "C", "N", "CA", "C", "N", "CA"),
            residues=(("ACE", 1, 0), *[("ALA", 2, 0)] * 3, *[("ALA", 3, 0)] * 3, *[("ALA", 4, 0)] * 2),
        )
    elif change == "no N after":
        bead_map = dataclasses.replace(DIPEPTIDE, names=(*names[:5], "O"))
    else:
        bead_map = dataclasses.replace(DIPEPTIDE, names=tuple(f"B{i}" for i in range(6)))
    assert obs.find_phi_psi(bead_map) is None


def test_broken_molecule_is_refused() -> None:
    frames = simulate_chain(20, 0, walkers=1)
    box = np.broadcast_to(3.0 * np.eye(3), (20, 3, 3))
    obs.check_whole(dataclasses.replace(frames, box=box), "whole")
    positions = frames.positions.copy()
    positions[7, 2:] += [3.0, 0, 0]
    with pytest.raises(InputError, match=r"mol: a molecule is broken .* frame 7"):
        obs.check_whole(dataclasses.replace(frames, positions=positions, box=box), "mol")
