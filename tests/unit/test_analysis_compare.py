"""compare_runs on synthetic trajectories."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from analysis_samples import DIPEPTIDE, KT, build_chain_topology, sample_dipeptide, simulate_chain

from openmm_hvpcg.analysis.compare import (
    BASINS,
    Comparison,
    assign_basins,
    compare_runs,
    list_after_burn_in,
    without_arms,
)
from openmm_hvpcg.analysis.observables import compute_phi_psi, find_phi_psi
from openmm_hvpcg.config import AnalysisSettings
from openmm_hvpcg.errors import InputError

SETTINGS = AnalysisSettings(lag_frames=5, bins=30)


@pytest.fixture(scope="module")
def chain() -> Comparison:
    """A chain against itself (another seed) and against one with bonds four times softer."""
    reference = simulate_chain(1500, 1)
    runs = {
        "same": simulate_chain(800, 2, walkers=6),
        "soft": simulate_chain(800, 3, walkers=6, stiffness=500.0),
    }
    return compare_runs(reference, runs, SETTINGS, molecule="chain", native=reference.positions[0])


@pytest.fixture(scope="module")
def dipeptide() -> Comparison:
    runs = {
        "same": sample_dipeptide(500, 2, walkers=8),
        "helical": sample_dipeptide(500, 3, walkers=8, helix=0.8),
    }
    return compare_runs(sample_dipeptide(2000, 1), runs, SETTINGS, molecule="ala", phi_psi=find_phi_psi(DIPEPTIDE))


def test_the_same_model_is_within_the_sampling_floor(chain: Comparison) -> None:
    # The floor is that of halves of the reference, noisier than what is compared here; three times it allows
    # for its own scatter.
    for landscape in (chain.tica1, chain.tica12):
        assert landscape is not None
        assert landscape.kl["same"].value < 3 * landscape.kl_floor
        assert landscape.js["same"].value < 3 * landscape.js_floor


def test_a_softer_model_is_told_apart(chain: Comparison) -> None:
    bonds = [o for o in chain.coordinates if o.kind == "bond"]
    assert len(bonds) == 4
    for bond in bonds:
        # Bonds half as stiff in width: JS of two Gaussians of widths 1 and 2 is 0.11 nats.
        assert bond.landscape.js["soft"].value == pytest.approx(0.11, abs=0.04)
        assert bond.landscape.js["same"].value < 0.02
        # Stiffness k along the bond, and 0.1 k from two 1-3 springs: width sqrt(kT / k) within 15 %.
        assert bond.reference.std.value == pytest.approx(np.sqrt(KT / 2000.0), rel=0.15)
        assert bond.arms["soft"].std.value == pytest.approx(np.sqrt(KT / 500.0), rel=0.15)
    assert chain.tica1.kl["soft"].value > chain.tica1.kl["same"].value


def test_densities_are_normalised_and_free_energies_start_at_zero(chain: Comparison) -> None:
    landscapes = [chain.tica1, chain.tica12, chain.radius_of_gyration.landscape]
    landscapes += [o.landscape for o in chain.coordinates]
    for landscape in landscapes:
        assert landscape is not None
        for density in (landscape.reference, *landscape.arms.values()):
            assert (density.values * landscape.bins.volume).sum() == pytest.approx(1.0, rel=1e-12)  # rounding
            energy, error = density.compute_free_energy(300.0)
            assert np.nanmin(energy) == 0.0
            seen = density.values > 0
            assert np.array_equal(np.isfinite(energy), seen)
            assert (error[seen] >= 0).all()


def test_rmsd_only_with_a_native_structure(chain: Comparison, dipeptide: Comparison) -> None:
    assert chain.rmsd is not None
    assert chain.rmsd.reference.mean.value > 0
    assert dipeptide.rmsd is None
    assert chain.phi_psi is None
    assert chain.populations == {}


def test_populations_of_basins(dipeptide: Comparison) -> None:
    assert dipeptide.phi_psi is not None
    for name, helix in ((None, 0.4), ("same", 0.4), ("helical", 0.8)):
        shares = dict(zip(BASINS, dipeptide.populations[name], strict=True))
        assert sum(s.value for s in shares.values()) == pytest.approx(1.0, rel=1e-12)  # rounding
        found = shares["alpha_r"]
        # Half a percent of angles fall over the boundary of the basin; 4 block errors: false alarms below
        # 1e-3.
        assert abs(found.value - helix) < 4 * found.error + 0.005
        assert 0.005 < found.error < 0.1
    assert dipeptide.phi_psi.kl["helical"].value > 3 * dipeptide.phi_psi.kl["same"].value
    assert dipeptide.tica1.kl["helical"].value > 3 * dipeptide.tica1.kl["same"].value


def test_slow_mode_of_the_dipeptide(dipeptide: Comparison) -> None:
    # States are drawn afresh with probability 0.05 a frame of 0.5 ps: 9.7 ps; with 200 draws, and the noise
    # of the features lowering it a little, within 25 %.
    assert dipeptide.slow_modes.timescales_ps[0] == pytest.approx(-0.5 / np.log(0.95), rel=0.25)
    assert dipeptide.slow_modes.lag_ps == 2.5


@pytest.mark.parametrize(
    ("phi", "psi", "basin"),
    [(-80, 80, 0), (-75, 150, 0), (-150, -170, 0), (170, 170, 0), (-65, -40, 1), (55, 45, 2), (70, -60, 3)],
)
def test_basins(phi: float, psi: float, basin: int) -> None:
    assert assign_basins(np.array([[phi, psi]], dtype=float)).tolist() == [basin]


def test_burn_in_leaves_out_the_start_of_every_walker() -> None:
    frames = simulate_chain(40, 0, walkers=3)
    used = frames.select(list_after_burn_in(frames.walker, 0.25))
    assert used.n_frames == 90
    assert np.array_equal(used.positions[:30], frames.positions[10:40])
    assert np.array_equal(used.walker, np.repeat([0, 1, 2], 30))


def test_frames_without_weight_are_as_good_as_not_there() -> None:
    reference, run = simulate_chain(300, 1), simulate_chain(300, 2, walkers=3)
    settings = SETTINGS.model_copy(update={"burn_in": 0.0})
    weights = 0.1 * (run.walker != 1)
    weighted = compare_runs(reference, {"a": run}, settings, molecule="c", weights={"a": weights})
    left = compare_runs(reference, {"a": run.select(np.flatnonzero(run.walker != 1))}, settings, molecule="c")
    assert weighted.n_effective == {"a": pytest.approx(600)}
    assert left.n_effective == {}
    for one, other in [
        (weighted.tica1.kl["a"], left.tica1.kl["a"]),
        (weighted.tica1.js["a"], left.tica1.js["a"]),
        *((o.arms["a"].mean, p.arms["a"].mean) for o, p in zip(weighted.coordinates, left.coordinates, strict=True)),
        *((o.arms["a"].std, p.arms["a"].std) for o, p in zip(weighted.coordinates, left.coordinates, strict=True)),
    ]:
        assert one.value == pytest.approx(other.value, rel=1e-6, abs=1e-9)


def test_weights_turn_one_ensemble_into_another() -> None:
    """Frames drawn with 80 % helix, weighted to 40 %, agree with a reference of 40 % as frames of it would."""
    reference, run = sample_dipeptide(4000, 1), sample_dipeptide(4000, 2, walkers=8, helix=0.8)
    phi_psi = find_phi_psi(DIPEPTIDE)
    assert phi_psi is not None
    helix = assign_basins(compute_phi_psi(run, phi_psi)) == 1
    weights = {"weighted": np.where(helix, 0.4 / 0.8, 0.6 / 0.2)}
    runs = {"weighted": run, "plain": run}
    found = compare_runs(reference, runs, SETTINGS, molecule="ala", phi_psi=phi_psi, weights=weights)
    assert found.phi_psi is not None
    assert found.phi_psi.kl["weighted"].value < 0.25 * found.phi_psi.kl["plain"].value
    # Shares of 0.4 and 0.6 are 0.38 nats from 0.8 and 0.2; that of the 400 states drawn for the reference is uncertain
    # by 0.025, which makes 0.04 nats.
    assert found.phi_psi.kl["plain"].value > 0.2
    share = found.populations["weighted"][1]
    # Four standard errors from seven or more blocks: by Student's law one change of the seeds in 200.
    assert abs(share.value - 0.4) < 4 * share.error < 0.2
    assert 0.2 * run.n_frames < found.n_effective["weighted"] < 0.7 * run.n_frames


def test_too_little_weight_is_skipped() -> None:
    reference, run = simulate_chain(200, 1), simulate_chain(200, 2)
    weights = np.full(run.n_frames, 1e-9)
    weights[[50, 60, 250]] = 1.0
    compared = compare_runs(reference, {"a": run}, SETTINGS, molecule="c", weights={"a": weights})
    assert "they are worth 3" in compared.skipped["a"]


def test_burn_in_is_not_counted() -> None:
    """Replicas that start far away: their first tenth would show as frames beyond the reference."""
    reference = simulate_chain(500, 1)
    run = simulate_chain(300, 2)
    positions = run.positions.copy()
    for w in range(2):
        positions[300 * w : 300 * w + 30] *= 3.0
    spoiled = dataclasses.replace(run, positions=positions)
    compared = compare_runs(reference, {"run": spoiled}, SETTINGS, molecule="chain")
    assert compared.n_frames == {"run": 540}
    assert compared.tica1.outside["run"] < 0.02
    counted = compare_runs(reference, {"run": spoiled}, SETTINGS.model_copy(update={"burn_in": 0.0}), molecule="chain")
    assert counted.tica1.outside["run"] > 0.09


def test_same_input_same_result() -> None:
    reference, run = simulate_chain(300, 1), simulate_chain(300, 2)
    first, second = (compare_runs(reference, {"a": run}, SETTINGS, molecule="c") for _ in range(2))
    assert first.tica1.kl == second.tica1.kl
    assert first.tica1.kl_floor == second.tica1.kl_floor


@pytest.mark.parametrize("features", ["distances", "dihedrals", "distances+dihedrals"])
def test_feature_kinds(features: str) -> None:
    settings = AnalysisSettings(lag_frames=5, bins=20, features=features)
    compared = compare_runs(simulate_chain(300, 1), {"a": simulate_chain(200, 2)}, settings, molecule="c")
    assert np.isfinite(compared.tica1.kl["a"].value)
    assert compared.n_features == {"distances": 6, "dihedrals": 4, "distances+dihedrals": 10}[features]


def test_a_dimer_has_one_mode() -> None:
    reference, run = (simulate_chain(300, seed, n_beads=2) for seed in (1, 2))
    compared = compare_runs(reference, {"a": run}, SETTINGS, molecule="dimer")
    assert compared.tica12 is None
    assert compared.slow_modes.n_modes == 1
    assert [o.kind for o in compared.coordinates] == ["bond"]


def test_reference_alone() -> None:
    compared = compare_runs(simulate_chain(200, 1), {}, SETTINGS, molecule="c")
    assert compared.arms == ()
    assert compared.tica1.kl == {}


def test_a_short_run_is_skipped_not_fatal() -> None:
    runs = {"short": simulate_chain(4, 1), "good": simulate_chain(200, 2)}
    compared = compare_runs(simulate_chain(200, 3), runs, SETTINGS, molecule="c")
    assert compared.arms == ("good",)
    assert "8 frames after burn-in, at least 10" in compared.skipped["short"]


def test_a_run_that_flew_apart_is_skipped_or_counted() -> None:
    reference, run = simulate_chain(200, 3), simulate_chain(100, 2)
    runs = {
        name: dataclasses.replace(run, positions=run.positions * scale)
        for name, scale in (("far", 1e3), ("gone", 1e25))
    }
    compared = compare_runs(reference, runs, SETTINGS, molecule="c", native=reference.positions[0])
    assert compared.arms == ("far",)
    assert "physical range" in compared.skipped["gone"]
    assert compared.tica1.outside["far"] == 1.0
    # Nothing in common: JS is ln 2 to rounding, KL finite and large.
    assert compared.tica1.js["far"].value == pytest.approx(np.log(2), rel=1e-12)
    assert 3 < compared.tica1.kl["far"].value < 20


def test_inputs_are_left_alone() -> None:
    """mdtraj centres positions for an RMSD: not ours."""
    reference, run = simulate_chain(100, 3), simulate_chain(100, 2)
    before = [frames.positions.copy() for frames in (reference, run)]
    native = reference.positions[0].copy()
    compare_runs(reference, {"a": run}, SETTINGS, molecule="c", native=native)
    assert np.array_equal(reference.positions, before[0])
    assert np.array_equal(run.positions, before[1])
    assert np.array_equal(native, before[0][0])


def test_without_arms(dipeptide: Comparison) -> None:
    less = without_arms(dipeptide, {"helical": "blew up"})
    assert less.arms == ("same",)
    assert less.skipped == {"helical": "blew up"}
    for o in (*less.coordinates, less.radius_of_gyration):
        assert set(o.arms) == set(o.landscape.arms) == set(o.landscape.kl) == {"same"}
    assert set(less.populations) == {None, "same"}
    assert less.tica1.kl["same"] == dipeptide.tica1.kl["same"]


def test_bad_inputs() -> None:
    reference = simulate_chain(200, 1)
    run = simulate_chain(100, 2)

    def compare(**changes: object) -> None:
        arguments = {
            "reference": reference,
            "runs": {"a": run},
            "settings": SETTINGS,
            "molecule": "mol",
            **changes,
        }
        compare_runs(**arguments)  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"mol, arm a: beads of the run .*expected 5 beads.*got 4 beads"):
        compare(runs={"a": simulate_chain(50, 2, n_beads=4)})
    with pytest.raises(InputError, match=r"temperatures .*expected 300.0 K, got 310.0 K"):
        compare(runs={"a": dataclasses.replace(run, temperature_K=310.0)})
    with pytest.raises(InputError, match=r"native structure does not fit"):
        compare(native=np.zeros((4, 3)))
    with pytest.raises(InputError, match=r"native structure hold NaN"):
        compare(native=np.full((5, 3), np.nan))
    with pytest.raises(InputError, match=r"four different beads"):
        compare(phi_psi=((0, 1, 2, 5), (1, 2, 3, 4)))
    with pytest.raises(InputError, match=r"mol: the reference is too short for the TICA lag"):
        compare(reference=simulate_chain(8, 1))
    with pytest.raises(InputError, match=r"mol: the reference is too short: expected at least 10 frames, got 6"):
        compare(reference=simulate_chain(3, 1))
    one = build_chain_topology(1)
    single = dataclasses.replace(reference, positions=reference.positions[:, :1], topology=one)
    with pytest.raises(InputError, match="one bead"):
        compare(reference=single, runs={})
