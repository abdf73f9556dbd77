from __future__ import annotations

import numpy as np
import pytest
import torch
from training_cases import KT, REST, build_labels, build_map

from openmm_hvpcg.config import PriorSettings
from openmm_hvpcg.errors import DataError
from openmm_hvpcg.prior_terms import ANY, NO_WALL, assign_prior_terms
from openmm_hvpcg.training.fit_priors import MIN_FRAMES, SIGMA_FACTOR, WALL_HEIGHT_KT, WALL_MARGIN, fit_priors
from openmm_hvpcg.training.models.priors import angle_energy
from openmm_hvpcg.training.noise import estimate_noise


def place_chain(bond: np.ndarray, cosine: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Four beads with given first bond (T,), first angle's cosine and dihedral; the rest fixed."""
    n = len(bond)
    sine = np.sqrt(1 - cosine**2)
    x = np.zeros((n, 4, 3))
    x[:, 1, 0] = 0.3
    x[:, 0, 0] = 0.3 + bond * cosine
    x[:, 0, 1] = bond * sine
    x[:, 1] = [0.3, 0, 0]
    x[:, 2] = [0.6, 0, 0]
    x[:, 3, 0] = 0.6
    x[:, 3, 1], x[:, 3, 2] = 0.3 * np.cos(phi), 0.3 * np.sin(phi)
    return x


def test_boltzmann_inversion_finds_the_parameters_it_was_sampled_from():
    """20000 independent samples: widths to 0.5 %, so springs to 1 %; five standard errors leave 5 %."""
    rng, n = np.random.default_rng(0), 20000
    bond = rng.normal(0.3, 0.01, n)
    cosine = rng.normal(-0.4, 0.05, n)
    phi = rng.vonmises(0.8, 2.0, n)  # p ~ exp(2 cos(phi - 0.8)): a_1 = -2 kT cos 0.8, b_1 = -2 kT sin 0.8
    chain = build_map("ABCD", [[0, 1], [1, 2], [2, 3]])
    found = fit_priors([(chain, place_chain(bond, cosine, phi))], PriorSettings(), 300.0)
    k, r0 = found.bonds["A|B"]
    assert r0 == pytest.approx(0.3, abs=5 * 0.01 / n**0.5)
    assert k == pytest.approx(KT / 0.01**2, rel=0.05)
    k, c0, *_ = found.angles["A|B|C"]
    # The vertex is bead 1: its arms point to bead 0 and to +x.
    assert c0 == pytest.approx(-0.4, abs=5 * 0.05 / n**0.5)
    assert k == pytest.approx(KT / 0.05**2, rel=0.05)
    a1, a2, a3, b1, b2, b3 = found.dihedrals["A|B|C|D"]
    # The histogram's pseudo-counts and bin noise stay below 0.1 kT in each coefficient.
    np.testing.assert_allclose([a1, b1], [-2 * KT * np.cos(0.8), -2 * KT * np.sin(0.8)], atol=0.1 * KT)
    assert max(map(abs, (a2, a3, b2, b3))) < 0.15 * KT


def test_dihedrals_with_a_bias_have_the_prior_of_their_density_without_it():
    """Uniform angles, sampled with a bias: the prior is -ln p of the density that is told, each term to 0.15 kT."""
    rng, n = np.random.default_rng(2), 2000
    chain, widths = build_map("ABCD", [[0, 1], [1, 2], [2, 3]]), (np.full(n, 0.3), np.full(n, -0.4))
    frames = [(chain, place_chain(*widths, rng.uniform(-np.pi, np.pi, n)))]
    told = np.array([[[1.2, -0.4, 0.0], [0.8, 0.3, -0.2]]])
    found = fit_priors(frames, PriorSettings(), 300.0, [told]).dihedrals["A|B|C|D"]
    # Where p is small pseudo-counts flatten the prior: 0.15 kT, as above.
    np.testing.assert_allclose(found, -KT * told.ravel(), atol=0.15 * KT)
    as_sampled = fit_priors(frames, PriorSettings(), 300.0).dihedrals["A|B|C|D"]
    np.testing.assert_allclose(as_sampled, 0.0, atol=0.15 * KT)


def test_wall_starts_beyond_the_straightest_angle_and_keeps_angles_from_being_straight():
    rng, n = np.random.default_rng(0), 20000
    cosine = np.clip(rng.normal(-0.6, 0.08, n), -0.99, 0.99)
    chain = build_map("ABCD", [[0, 1], [1, 2], [2, 3]])
    positions = place_chain(np.full(n, 0.3), cosine, rng.uniform(-np.pi, np.pi, n))
    _, _, height, start = fit_priors([(chain, positions)], PriorSettings(), 300.0).angles["A|B|C"]
    # One frame in a thousand lies beyond, by the definition of the quantile; the wall starts a margin after it.
    assert start == pytest.approx(np.quantile(cosine, 1e-3) - WALL_MARGIN, abs=1e-6)
    assert height == pytest.approx(WALL_HEIGHT_KT * KT)
    index, rows = torch.tensor([[0, 1, 2]]), torch.tensor([[0.0, 0.0, height, start]], dtype=torch.float64)

    def energy(c: float) -> float:
        x = torch.tensor(place_chain(np.array([0.3]), np.array([c]), np.zeros(1)))
        return float(angle_energy(x, index, rows))

    assert energy(start + 1e-6) == 0.0
    assert energy(-1.0 + 1e-12) == pytest.approx(height, rel=1e-6)
    # C2 at the start: the energy grows with the third power, an eighth at half the way.
    assert energy(0.5 * (start - 1.0)) == pytest.approx(height / 8, rel=1e-6)


def test_no_wall_where_frames_have_straight_angles_or_none_is_wanted():
    rng, n = np.random.default_rng(0), 1000
    chain = build_map("ABCD", [[0, 1], [1, 2], [2, 3]])
    straight = place_chain(np.full(n, 0.3), -1.0 + 0.05 * rng.random(n), rng.uniform(-np.pi, np.pi, n))
    assert fit_priors([(chain, straight)], PriorSettings(), 300.0).angles["A|B|C"][2:] == NO_WALL
    bent = place_chain(np.full(n, 0.3), np.full(n, -0.4), rng.uniform(-np.pi, np.pi, n))
    assert fit_priors([(chain, bent)], PriorSettings(angle_walls=False), 300.0).angles["A|B|C"][2:] == NO_WALL
    assert fit_priors([(chain, bent)], PriorSettings(), 300.0).angles["A|B|C"][2] > 0


def test_dihedrals_about_one_bond_count_once():
    """Two dihedrals that say the same thing get half of the potential each."""
    rng, n = np.random.default_rng(1), 5000
    x = place_chain(np.full(n, 0.3), np.full(n, -0.4), rng.vonmises(0.8, 2.0, n))
    single = fit_priors([(build_map("ABCD", [[0, 1], [1, 2], [2, 3]]), x)], PriorSettings(), 300.0)
    doubled = np.concatenate([x, x[:, 3:] + [0.01, 0, 0]], axis=1)
    branched = fit_priors([(build_map("ABCDE", [[0, 1], [1, 2], [2, 3], [2, 4]]), doubled)], PriorSettings(), 300.0)
    np.testing.assert_allclose(branched.dihedrals["A|B|C|D"], np.array(single.dihedrals["A|B|C|D"]) / 2, rtol=1e-9)


def test_terms_can_be_switched_off():
    off = PriorSettings(bonds=False, angles=False, dihedrals=False, repulsion=False)
    data = build_labels(60)
    found = fit_priors([(data.bead_map, data.positions)], off, 300.0)
    assert not any((found.bonds, found.angles, found.dihedrals, found.impropers, found.repulsion))


def test_improper_finds_the_handedness():
    data = build_labels(100)
    ((k, phi0),) = {
        v for key, v in fit_priors([(data.bead_map, data.positions)], PriorSettings(), 300.0).impropers.items()
    }
    mirrored = data.positions * np.array([1, 1, -1], dtype=np.float32)
    ((k_m, phi0_m),) = set(fit_priors([(data.bead_map, mirrored)], PriorSettings(), 300.0).impropers.values())
    # Mirroring is exact in floating point; the turns of the frames cost float32 rounding.
    assert phi0 == pytest.approx(-phi0_m, abs=1e-5)
    assert k == pytest.approx(k_m, rel=1e-4)
    assert abs(phi0) > 0.1


def test_too_few_frames_are_refused():
    data = build_labels(MIN_FRAMES - 1)
    with pytest.raises(DataError, match=f"at least {MIN_FRAMES} training frames, got {MIN_FRAMES - 1}"):
        fit_priors([(data.bead_map, data.positions)], PriorSettings(), 300.0)


CHAIN = [[0, 1], [1, 2], [2, 3]]


def draw_chain(seed: int, n: int = 400, bond: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return place_chain(rng.normal(bond, 0.01, n), rng.normal(-0.4, 0.05, n), rng.vonmises(0.8, 2.0, n))


def test_what_one_molecule_alone_has_is_shared_in_training_as_it_is_for_the_unseen(caplog):
    """Bonds 0-1 of ABCD, ABCE and FBCD differ in length; A|B is in two molecules, F|B in one."""
    molecules = [
        (build_map("ABCD", CHAIN), draw_chain(0)),
        (build_map("ABCE", CHAIN), draw_chain(1)),
        (build_map("FBCD", CHAIN), draw_chain(2, bond=0.5)),
    ]
    with caplog.at_level("INFO", "openmm_hvpcg"):
        shared = fit_priors(molecules, PriorSettings(), 300.0)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().endswith("own: 7 of 9 bonds, 4 of 6 angles, 0 of 3 dihedrals")
    assert set(shared.bonds) == {"A|B", "B|C", "C|D", ANY}
    assert set(shared.angles) == {"A|B|C", "B|C|D", "*|B|*", "*|C|*", ANY}
    assert set(shared.dihedrals) == {"*|B|C|*", ANY}
    assert set(fit_priors(molecules, PriorSettings(min_molecules=3), 300.0).bonds) == {"B|C", ANY}
    # A training molecule's own rare bond, and those of a molecule never seen, have the same parameters.
    trained = assign_prior_terms(shared, tuple("FBCD"), np.array(CHAIN))
    unseen = assign_prior_terms(shared, tuple("GBCH"), np.array(CHAIN))
    assert trained.bonds[0].tolist() == unseen.bonds[0].tolist() == list(shared.bonds[ANY])
    assert trained.angles[0].tolist() == unseen.angles[0].tolist() == list(shared.angles["*|B|*"])
    assert trained.dihedrals.tolist() == unseen.dihedrals.tolist() == [list(shared.dihedrals["*|B|C|*"])]
    # Every combination for itself, as before there was a choice.
    each = fit_priors(molecules, PriorSettings(min_molecules=1), 300.0)
    assert assign_prior_terms(each, tuple("FBCD"), np.array(CHAIN)).bonds[0, 1] == pytest.approx(0.5, abs=0.003)
    # The rare bond had its say in what is shared: of nine bonds eight are 0.3 nm.
    assert shared.bonds[ANY][1] == pytest.approx((8 * 0.3 + 0.5) / 9, abs=0.001)


def test_one_molecule_keeps_its_own_parameters():
    molecules = [(build_map("ABCD", CHAIN), draw_chain(0))]
    found = fit_priors(molecules, PriorSettings(), 300.0)
    assert found == fit_priors(molecules, PriorSettings(min_molecules=1), 300.0)
    assert {"A|B", "B|C", "C|D"} < set(found.bonds)
    assert "A|B|C|D" in found.dihedrals


def test_a_longer_trajectory_counts_no_more():
    """Two molecules, one with ten times the frames: means in the middle, and the variance that of the mixture."""
    molecules = [
        (build_map("ABCD", CHAIN), draw_chain(0, n=4000, bond=0.3)),
        (build_map("ABCD", CHAIN), draw_chain(1, n=400, bond=0.4)),
    ]
    k, r0 = fit_priors(molecules, PriorSettings(), 300.0).bonds["A|B"]
    assert r0 == pytest.approx(0.35, abs=0.002)  # five standard errors of the smaller mean, halved
    assert KT / k == pytest.approx(0.01**2 + 0.05**2, rel=0.05)
    phi = fit_priors(molecules, PriorSettings(), 300.0).dihedrals["A|B|C|D"]
    np.testing.assert_allclose(phi[0], -2 * KT * np.cos(0.8), atol=0.3 * KT)  # noise of the 400 frames' histogram


def test_shared_repulsion_pushes_nothing_apart_that_training_saw_together():
    """Five beads: the ends repel. In one molecule, whose ends no other has, they come much closer."""

    def stretch(seed: int, distance: float) -> np.ndarray:
        x = draw_chain(seed)
        rng = np.random.default_rng(seed)
        last = x[:, :1] + [[[0.0, 0.0, distance]]] + 0.005 * rng.standard_normal((len(x), 1, 3))
        return np.concatenate([x, last], axis=1)

    bonds = [*CHAIN, [3, 4]]
    far = [(build_map("ABCDA", bonds), stretch(seed, 0.5)) for seed in range(20)]
    rare = stretch(99, 0.35)
    found = fit_priors([*far, (build_map("EBCDF", bonds), rare)], PriorSettings(), 300.0)
    # Not even pairs of twenty molecules keep a sigma of their own: an unseen one may bring them closer.
    assert set(found.repulsion) == {ANY}
    closest = np.linalg.norm(rare[:, 4] - rare[:, 0], axis=-1).min()
    # A quantile of 0.1 % of 400 frames lies just above the least; sigma is SIGMA_FACTOR times it.
    assert found.repulsion[ANY][0] == pytest.approx(SIGMA_FACTOR * closest, rel=0.02)
    each = fit_priors([*far, (build_map("EBCDF", bonds), rare)], PriorSettings(min_molecules=1), 300.0)
    assert each.repulsion["E|F"] == found.repulsion[ANY]
    assert each.repulsion["A|A"][0] > 0.5


def test_noise_estimate_recovers_known_noise():
    """Labels that are pure noise of known size, seen in turned frames: both estimates within 15 %.

    1000 pairs of 15 components fix the force noise to 1 %; the HVP noise rests on fourth moments and probe
    averages, whose error for 1000 pairs is about 4 %.
    """
    rng = np.random.default_rng(3)
    data = build_labels(1000, seed=4)
    forces = 50.0 * rng.standard_normal(data.forces.shape)
    matrices = rng.standard_normal((1000, 15, 15))
    matrices = 100.0 * (matrices + matrices.transpose(0, 2, 1))
    hvps = np.einsum("tij,tpj->tpi", matrices, data.probes.reshape(1000, 3, 15)).reshape(data.probes.shape)
    noise = estimate_noise(data.positions, data.walker, forces, data.probes, hvps)
    assert noise is not None
    assert noise.force == pytest.approx(50.0, rel=0.05)
    assert noise.hvp == pytest.approx(np.sqrt((hvps**2).mean()), rel=0.15)


def test_what_neighbours_share_is_not_noise():
    """A label that is a vector fixed to the molecule is the same in every frame once turned: no noise."""
    rng = np.random.default_rng(5)
    turns = np.linalg.qr(rng.standard_normal((400, 3, 3)))[0]
    turns *= np.sign(np.linalg.det(turns))[:, None, None]
    positions, labels = (REST @ turns).astype(np.float32), 100.0 * (REST @ turns)
    probes = rng.standard_normal((400, 1, *REST.shape)).astype(np.float32)
    noise = estimate_noise(positions, np.zeros(400, dtype=int), labels, probes, np.zeros_like(probes))
    assert noise is not None
    assert noise.force < 1e-3 * np.sqrt((labels**2).mean())  # float32 positions in the alignment
    assert noise.hvp == 0.0


def test_too_few_frames_give_no_estimate():
    data = build_labels(12)
    assert estimate_noise(data.positions, np.zeros(12, int), data.forces, data.probes, data.hvps) is None
