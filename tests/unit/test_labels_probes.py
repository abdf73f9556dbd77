from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from training_cases import REST, build_labels

from openmm_hvpcg.errors import ConfigError
from openmm_hvpcg.training.labels.probes import ProbeLaw, compute_soft_modes, draw_probes
from openmm_hvpcg.training.noise import estimate_noise

OLD = Path(__file__).parents[1] / "continuity" / "files" / "version_1" / "expected.json"
LAWS = [
    ProbeLaw(),
    ProbeLaw("normal"),
    ProbeLaw("soft"),
    ProbeLaw("soft", n_modes=3),
    ProbeLaw(translations="remove"),
    ProbeLaw("normal", translations="remove"),
]
FLAT = np.array([[0, 0, 0], [0.38, 0, 0], [0.5, 0.36, 0], [0.9, 0.3, 0]])
LINE = np.array([[0.1, 0, 0], [0.2, 0.3, 0], [0.3, 0.6, 0]])


def test_known_laws_draw_what_they_always_drew():
    """Old datasets can be finished: the probes stored in one, and the streams they come from."""
    stored = np.array(json.loads(OLD.read_text())["dataset"]["probes"])
    np.testing.assert_array_equal(draw_probes("rademacher", np.arange(6), 2, stored.shape[2], 2), stored)
    normal = draw_probes(ProbeLaw("normal"), np.array([17]), 2, 4, 3)[0]
    np.testing.assert_array_equal(normal, np.random.default_rng([3, 17]).standard_normal((2, 4, 3)).astype(np.float32))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_probes_belong_to_frames_not_to_chunks(law):
    positions = REST + 0.02 * np.random.default_rng(1).standard_normal((20, *REST.shape))
    whole = draw_probes(law, np.arange(20), 2, 5, 3, positions)
    few = np.array([17, 2, 9])
    np.testing.assert_array_equal(draw_probes(law, few, 2, 5, 3, positions[few]), whole[few])
    assert not np.array_equal(whole, draw_probes(law, np.arange(20), 2, 5, 4, positions))
    assert whole.dtype == np.float32
    # Each frame and probe of its own: no two alike.
    assert len(np.unique(whole.reshape(40, -1), axis=0)) == 40


@pytest.mark.parametrize("positions", [REST, FLAT, LINE, FLAT[:2]], ids=["five", "flat", "line", "two"])
@pytest.mark.parametrize("law", [law for law in LAWS if law.n_modes is None], ids=str)
def test_second_moment_is_what_is_said(law, positions):
    """Up to 225 entries z-tested at 6 standard errors of 20000 probes: false-alarm rate below 5e-7 a case."""
    n_beads = len(positions)
    v = draw_probes(law, np.arange(2000), 10, n_beads, 5, np.repeat(positions[None], 2000, axis=0))
    v = v.astype(np.float64).reshape(20000, -1)
    products = v[:, :, None] * v[:, None, :]
    error = products.std(axis=0) / np.sqrt(len(v))
    expected = law.compute_second_moments(positions[None])[0]
    # Squares of signs do not vary: float32 is left.
    assert (np.abs(products.mean(axis=0) - expected) < 6 * error + 1e-6).all()
    assert (np.abs(v).max(axis=1) > 0).all()
    if law.translations == "remove" or law.name == "soft":
        # Float32 sums of a few numbers of size 1 to 10.
        np.testing.assert_allclose(v.reshape(-1, n_beads, 3).sum(axis=1), 0, atol=1e-5)


def test_soft_moment_has_the_trace_of_the_identity_and_the_rank_asked_for():
    for n_modes, rank in ((None, 9), (1, 1), (4, 4)):
        moment = ProbeLaw("soft", n_modes).compute_second_moments(REST[None])[0]
        assert np.trace(moment) == pytest.approx(15, rel=1e-12)  # rounding
        assert np.linalg.matrix_rank(moment, tol=1e-9) == rank


@pytest.mark.parametrize(("positions", "count"), [(REST, 9), (FLAT, 6), (LINE, 4), (FLAT[:2], 1)])
def test_soft_modes_are_stiff_and_no_rigid_motions(positions, count):
    """3B - 6 modes of positive stiffness, five rigid motions on a line; flat and straight molecules included."""
    stiffness, modes = compute_soft_modes(positions)
    assert len(stiffness) == count
    assert (np.diff(stiffness) >= 0).all()
    # An isotropic tenth of each spring holds what central springs do not.
    assert stiffness[0] > 1e-3 * stiffness[-1]
    rigid = [np.tile(axis, len(positions)) for axis in np.eye(3)]
    rigid += [np.cross(axis, positions - positions.mean(axis=0)).ravel() for axis in np.eye(3)]
    # Orthogonal by construction, up to rounding.
    np.testing.assert_allclose(np.array(rigid) @ modes, 0, atol=1e-12)
    np.testing.assert_allclose(modes.T @ modes, np.eye(count), atol=1e-12)


def test_stretching_a_bond_is_stiffer_than_moving_the_ends():
    """Four beads in a chain: the softest mode leaves all three bonds as they are, the stiffest does not."""
    _, modes = compute_soft_modes(FLAT + np.array([0, 0, 0.1]) * np.arange(4)[:, None])
    chain = FLAT + np.array([0, 0, 0.1]) * np.arange(4)[:, None]
    units = np.diff(chain, axis=0)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    strains = [
        np.linalg.norm((np.diff(modes[:, k].reshape(4, 3), axis=0) * units).sum(axis=1)) for k in range(modes.shape[1])
    ]
    assert strains[0] < 0.2 * strains[-1]


def test_soft_moment_turns_with_the_molecule():
    turn = Rotation.from_rotvec([0.3, -1.0, 0.7]).as_matrix()
    plain, turned = ProbeLaw("soft").compute_second_moments(np.stack([REST, REST @ turn.T + 0.4]))
    block = np.kron(np.eye(5), turn)
    np.testing.assert_allclose(turned, block @ plain @ block.T, atol=1e-10)  # rounding, entries of size 1


@pytest.mark.parametrize("law", [law for law in LAWS if law.n_modes is None], ids=str)
def test_duals_give_the_projector(law):
    """``E[v dual^T] = S S^+``: exact in the moments, since the dual is a linear function of the probe."""
    basis = np.eye(15).reshape(1, 15, 5, 3)
    duals = law.compute_duals(REST[None], basis)[0].reshape(15, 15)
    moment = law.compute_second_moments(REST[None])[0]
    projector = moment @ duals
    np.testing.assert_allclose(projector, projector.T, atol=1e-9)
    np.testing.assert_allclose(projector @ moment, moment, atol=1e-9)
    assert ProbeLaw("soft", 2).compute_duals(REST[None], basis) is None


@pytest.mark.parametrize("law", [LAWS[2], LAWS[4], LAWS[5]], ids=str)
def test_noise_is_found_whatever_the_law(law):
    """A matrix all frames share, seen turned, beside noise of each: only the noise is found, to 15 %.

    All but rigid motions is shared and noisy. 1500 pairs; the cross term weighs stiff directions by up to 40 times
    soft ones, which leaves about 5 % of error.
    """
    rng = np.random.default_rng(3)
    data = build_labels(1500, seed=4)
    turns = np.stack(
        [Rotation.align_vectors(x - x.mean(0), REST - REST.mean(0))[0].as_matrix() for x in data.positions]
    )
    blocks = np.einsum("tij,bc->tbicj", turns, np.eye(5)).reshape(1500, 15, 15)
    internal = compute_soft_modes(REST)[1]
    project = internal @ internal.T

    def symmetric(size: float, *n: int) -> np.ndarray:
        matrices = rng.standard_normal((*n, 15, 15))
        return project @ (size * (matrices + matrices.swapaxes(-1, -2))) @ project

    shared, noise = symmetric(200.0), symmetric(100.0, 1500)
    probes = draw_probes(law, np.arange(1500), 3, 5, 8, data.positions).astype(np.float64)
    v = probes.reshape(1500, 3, 15) @ blocks
    residuals = (v @ (shared + noise) @ blocks.swapaxes(1, 2)).reshape(probes.shape)
    found = estimate_noise(data.positions, data.walker, data.forces, probes, residuals, law)
    assert found is not None
    assert found.hvp is not None
    true = np.sqrt(np.mean((v @ noise) ** 2))
    assert found.hvp == pytest.approx(true, rel=0.15)
    assert np.sqrt(np.mean(residuals**2)) > 1.8 * true


def test_few_soft_modes_do_not_reveal_the_noise():
    data = build_labels(200, seed=4)
    found = estimate_noise(data.positions, data.walker, data.forces, data.probes, data.hvps, ProbeLaw("soft", 2))
    assert found is not None
    assert found.hvp is None
    assert found.force > 0


def test_laws_are_named():
    assert ProbeLaw().describe() == ProbeLaw("normal").describe() == "identity"
    assert "projector" in ProbeLaw(translations="remove").describe()
    assert "the 3 softest modes" in ProbeLaw("soft", 3).describe()
    assert ProbeLaw.from_attributes({}) == ProbeLaw()
    soft = {"probe_law": "soft", "probe_modes": 3, "probe_translations": "remove"}
    assert ProbeLaw.from_attributes(soft) == ProbeLaw("soft", 3, "remove")


@pytest.mark.parametrize(
    ("law", "n_beads", "message"),
    [
        ("uniform", 2, "no such probe law: expected rademacher, normal, soft, got uniform"),
        (("normal", None, "some"), 2, "expected keep or remove, got some"),
        (("normal", 3), 4, "number of modes"),
        (("soft", 0), 4, "number of modes"),
        (("soft", 10), 5, "5 beads have fewer soft modes: expected at most 9, got 10"),
        (("soft",), 1, "one bead has nothing but translations"),
        (("rademacher", None, "remove"), 1, "one bead has nothing but translations"),
    ],
)
def test_wrong_laws_are_refused(law, n_beads, message):
    with pytest.raises(ConfigError, match=message):
        draw_probes(law if isinstance(law, str) else ProbeLaw(*law), np.arange(1), 1, n_beads, 0, REST[None, :n_beads])


def test_soft_probes_need_beads():
    with pytest.raises(ConfigError, match=r"expected \(3, 5, 3\), got none"):
        draw_probes("soft", np.arange(3), 1, 5, 0)
