from __future__ import annotations

import numpy as np
import pytest
from training_cases import KT, REST, build_labels, build_map

from openmm_hvpcg.config import PriorSettings
from openmm_hvpcg.errors import DataError
from openmm_hvpcg.training.fit_priors import MIN_FRAMES, fit_priors
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
    k, c0 = found.angles["A|B|C"]
    # The vertex is bead 1: its arms point to bead 0 and to +x.
    assert c0 == pytest.approx(-0.4, abs=5 * 0.05 / n**0.5)
    assert k == pytest.approx(KT / 0.05**2, rel=0.05)
    a1, a2, a3, b1, b2, b3 = found.dihedrals["A|B|C|D"]
    # The histogram's pseudo-counts and bin noise stay below 0.1 kT in each coefficient.
    np.testing.assert_allclose([a1, b1], [-2 * KT * np.cos(0.8), -2 * KT * np.sin(0.8)], atol=0.1 * KT)
    assert max(map(abs, (a2, a3, b2, b3))) < 0.15 * KT


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
