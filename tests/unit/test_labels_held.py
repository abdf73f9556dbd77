from __future__ import annotations

import signal
from dataclasses import replace
from itertools import chain

import numpy as np
import openmm
import pytest

from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import BackendError, InputError, MappingError, UnstableSimulationError
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, HeldSamples, Starts, find_held_atoms
from openmm_hvpcg.training.labels.oracle import ForceOracle

CHAINS = Chains(n_samples=6, stride=5, hvp_every=4, timestep_fs=2.0, friction_per_ps=5.0, temperature_K=300.0)


@pytest.fixture(scope="module")
def alanine() -> AtomisticSystem:
    return build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, constraints="none", name="ala")


@pytest.fixture(scope="module")
def bead_map(alanine) -> BeadMap:
    return build_bead_map("backbone", alanine.topology)


def build_sampler(system: AtomisticSystem, bead_map: BeadMap, **changes) -> HeldSampler:
    return replace(HeldSampler(system, bead_map, "Reference", {}, step_nm=1e-5, seed=3, workers=1), **changes)


def build_starts(system: AtomisticSystem, bead_map: BeadMap, frames: list[int], force_map=None) -> Starts:
    noise = 0.003 * np.random.default_rng(0).standard_normal((10, system.n_atoms, 3))[frames]
    probes = np.random.default_rng(1).choice([-1.0, 1.0], (10, 2, bead_map.n_beads, 3))[frames]
    weights = bead_map.site_weights if force_map is None else force_map
    return Starts(np.array(frames), system.positions + noise, probes, weights)


def assert_same(a: HeldSamples, b: HeldSamples) -> None:
    np.testing.assert_array_equal(a.forces, b.forces)
    np.testing.assert_array_equal(a.hvps, b.hvps)


def test_a_group_depends_on_nothing_but_itself(alanine, bead_map):
    """Other workers, another order and fewer groups give the same bits: a run can be interrupted between groups."""
    groups = [build_starts(alanine, bead_map, frames) for frames in ([0], [1, 2], [3])]
    alone = list(build_sampler(alanine, bead_map).sample(groups, CHAINS))
    together = list(build_sampler(alanine, bead_map, workers=2).sample(groups[::-1], CHAINS))[::-1]
    assert [len(found) for found in alone] == [1, 2, 1]
    for a, b in zip(chain(*alone), chain(*together), strict=True):
        assert_same(a, b)
    (rest,) = build_sampler(alanine, bead_map).sample(groups[1:2], CHAINS)
    assert_same(rest[1], alone[1][1])
    assert alone[0][0].forces.shape == (6, bead_map.n_beads, 3)
    assert alone[0][0].hvps.shape == (2, 2, bead_map.n_beads, 3)
    assert list(build_sampler(alanine, bead_map).sample([], CHAINS)) == []
    other = next(build_sampler(alanine, bead_map, seed=4).sample(groups[:1], CHAINS))
    assert not np.array_equal(other[0].forces, alone[0][0].forces)


def test_beads_are_held_and_the_rest_moves(alanine, bead_map, monkeypatch):
    """Positions at which HVPs are taken: two displacements of each of two probes, whose mean is the sample."""
    seen = []
    genuine = ForceOracle.__call__
    monkeypatch.setattr(ForceOracle, "__call__", lambda self, x, box: (seen.append(x), genuine(self, x, box))[1])
    starts = build_starts(alanine, bead_map, [5])
    next(build_sampler(alanine, bead_map).sample([starts], CHAINS))
    samples = np.array(seen).mean(axis=1)
    held = find_held_atoms(alanine, bead_map)
    # Rounding of the displacements.
    np.testing.assert_allclose(samples[:, held], np.repeat(starts.positions[:, held], 2, axis=0), rtol=0, atol=1e-12)
    moved = np.linalg.norm(samples[1] - samples[0], axis=-1)
    hidden = np.setdiff1d(np.arange(alanine.n_atoms), held)
    # 40 fs at thermal speeds (0.3 to 1.6 nm/ps): 0.01 nm and more.
    assert (moved[hidden] > 1e-3).all()


def test_equilibration_is_left_out(alanine, bead_map):
    """On one stream of noise, a chain equilibrated for 10 steps is the same chain two samples later."""
    starts = build_starts(alanine, bead_map, [0])
    plain = next(build_sampler(alanine, bead_map).sample([starts], CHAINS))[0]
    later = next(build_sampler(alanine, bead_map).sample([starts], replace(CHAINS, equilibration_steps=10)))[0]
    np.testing.assert_array_equal(later.forces[:-2], plain.forces[2:])


def test_force_calls_are_counted(alanine, bead_map, monkeypatch):
    calls = []
    genuine = ForceOracle.__call__
    monkeypatch.setattr(ForceOracle, "__call__", lambda self, x, box: (calls.append(len(x)), genuine(self, x, box))[1])
    next(build_sampler(alanine, bead_map).sample([build_starts(alanine, bead_map, [0])], CHAINS))
    # 6 samples of 5 MD steps and one force call each, and the HVPs.
    assert CHAINS.count_force_calls(n_probes=2) == 6 * 6 + sum(calls)
    assert replace(CHAINS, equilibration_steps=7).count_force_calls(2) == CHAINS.count_force_calls(2) + 7


def test_beads_spread_over_atoms_are_refused(alanine, bead_map):
    weights = bead_map.site_weights.copy()
    weights[1] *= 0.5
    weights[1, 0] = 0.5
    with pytest.raises(MappingError, match=r"bead 1 .* cannot be held: expected a bead on one atom, got 2 atoms"):
        find_held_atoms(alanine, replace(bead_map, site_weights=weights))


def test_constrained_beads_are_refused():
    system = build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, constraints="hbonds", name="ala")
    with pytest.raises(MappingError, match=r"takes part in a constraint.*flexible_beads"):
        build_sampler(system, build_bead_map("backbone", system.topology))


def test_hidden_constraints_are_kept(alanine, bead_map):
    """Constraints among hidden atoms: their distances stay."""
    system = openmm.XmlSerializer.clone(alanine.system)
    atoms = [a.index for a in alanine.topology.atoms if a.name in ("HB1", "HB2")]
    apart = float(np.linalg.norm(alanine.positions[atoms[0]] - alanine.positions[atoms[1]]))
    system.addConstraint(*atoms, apart)
    rigid = replace(alanine, system=system)
    starts = Starts(
        np.array([0]), alanine.positions[None], np.empty((1, 0, bead_map.n_beads, 3)), bead_map.site_weights
    )
    seen = []
    genuine = openmm.Context.getState

    def record(self, **what):
        state = genuine(self, **{**what, "getPositions": True})
        seen.append(state.getPositions(asNumpy=True)._value[atoms])
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmm.Context, "getState", record)
        next(build_sampler(rigid, bead_map).sample([starts], CHAINS))
    distances = np.linalg.norm(np.diff(seen, axis=1)[:, 0], axis=-1)
    # The integrator's own tolerance is 1e-5.
    np.testing.assert_allclose(distances, apart, rtol=2e-5)


def test_barostat_is_refused(alanine, bead_map):
    system = openmm.XmlSerializer.clone(alanine.system)
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    with pytest.raises(InputError, match="MonteCarloBarostat, under which beads cannot be held"):
        find_held_atoms(replace(alanine, system=system), bead_map)


def test_blow_up_names_the_frame(alanine, bead_map):
    """Bonds to hydrogen (period 9 fs) are not stable at 10 fs; the message survives the way between processes."""
    chains = replace(CHAINS, n_samples=200, timestep_fs=10.0)
    groups = [build_starts(alanine, bead_map, [k]) for k in (7, 8)]
    for workers in (1, 2):
        with pytest.raises(UnstableSimulationError, match=r"ala, frame [78]: .* blew up at 10.0 fs. Choose a shorter"):
            list(build_sampler(alanine, bead_map, workers=workers).sample(groups, chains))


def test_heat_without_nan_is_a_blow_up(alanine, bead_map):
    """A bond stretched by 0.2 nm sets 6000 kJ/mol free within 2.5 fs: 17,000 K and more, and all numbers finite."""
    starts = build_starts(alanine, bead_map, [0])
    carbon, hydrogen = (next(a.index for a in alanine.topology.atoms if a.name == name) for name in ("CB", "HB1"))
    bond = starts.positions[0, hydrogen] - starts.positions[0, carbon]
    starts.positions[0, hydrogen] += 0.2 * bond / np.linalg.norm(bond)
    with pytest.raises(UnstableSimulationError, match="ala, frame 0"):
        next(build_sampler(alanine, bead_map).sample([starts], replace(CHAINS, timestep_fs=0.5)))


def test_unknown_platform_is_one_of_our_errors(alanine, bead_map):
    sampler = build_sampler(alanine, bead_map, platform="Abacus")
    with pytest.raises(BackendError, match="Abacus"):
        next(sampler.sample([build_starts(alanine, bead_map, [0])], CHAINS))


class Bomb:
    """Kills the process that reads it."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_killed_process_is_one_of_our_errors_and_the_next_run_works(alanine, bead_map):
    groups = [build_starts(alanine, bead_map, [0]), build_starts(alanine, bead_map, [1], force_map=Bomb())]
    sampler = build_sampler(alanine, bead_map, workers=2)
    with pytest.raises(BackendError, match=r"a process that samples ala was killed.*fewer workers"):
        list(sampler.sample(groups, CHAINS))
    groups[1] = build_starts(alanine, bead_map, [1])
    assert len(list(sampler.sample(groups, CHAINS))) == 2
