"""Conditional averaging: the estimate from one chain, and datasets made of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import AveragingSettings, InputSettings, LabelSettings, SamplingSettings
from openmm_hvpcg.errors import DataError, MappingError, StudyError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.labels import label
from openmm_hvpcg.training.labels.averaging import average_labels, split_by_fold
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, HeldSamples, Starts
from openmm_hvpcg.training.labels.label import label_frames

PROBES = np.eye(6).reshape(6, 2, 3)
AVERAGING = AveragingSettings(n_samples=5, stride=2, hvp_every=2)
SETTINGS = LabelSettings(
    force_map="harmonic", probes_per_frame=2, averaging=AVERAGING, platform="Reference", workers=1, seed=7
)
N_FRAMES = 20


def build_series(n_series: int, n_samples: int, memory: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stationary AR(1) series of forces (S, n, 2, 3) about a mean of 50, and their covariance (6, 6)."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((6, 6))
    z = rng.standard_normal((n_samples, n_series, 6))
    for n in range(1, n_samples):
        z[n] = memory * z[n - 1] + np.sqrt(1 - memory**2) * z[n]
    return (50.0 + z @ root.T).transpose(1, 0, 2).reshape(n_series, n_samples, 2, 3), root @ root.T


def average(series: np.ndarray) -> np.ndarray:
    """Covariances (S, 6, 6) from each series."""
    none = np.zeros((1, 6, 2, 3))
    return np.array([average_labels(HeldSamples(s, none), PROBES).covariances.reshape(6, 6) for s in series])


@pytest.mark.parametrize("n_samples", [4, 5, 7, 20])
def test_covariance_of_independent_samples_is_unbiased(n_samples):
    """Short chains, of even and of odd length. 21 elements, 4000 series each, at 5 standard errors: false-alarm rate
    1e-5. At 4 samples the plain covariance is a quarter short: more than 20 standard errors of the diagonal."""
    series, exact = build_series(4000, n_samples, 0.0, 1)
    found = average(series)
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - exact) < 5 * error).all()
    if n_samples == 4:
        assert (0.25 * exact.diagonal() > 7 * error.diagonal()).all()


def test_covariance_of_correlated_samples_lacks_what_the_halves_share():
    """AR(1) with coefficient 1/2: short by what the halves' means share, 2 %, where the plain one lacks 14 %.

    The expectation is exact, ``C (1 - sum_ij rho^|i - j| / h^2)`` over i, j in different halves; 21 elements at 5
    standard errors of 4000 series: false-alarm rate 1e-5.
    """
    n_samples, memory = 20, 0.5
    series, exact = build_series(4000, n_samples, memory, 2)
    found = average(series)
    lags = memory ** np.abs(np.subtract.outer(np.arange(n_samples), np.arange(n_samples)))
    shared, plain = lags[:10, 10:].mean(), lags.mean()
    assert (shared, plain) == (pytest.approx(0.02, abs=1e-3), pytest.approx(0.14, abs=1e-2))
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - (1 - shared) * exact) < 5 * error).all()
    # Sharp enough to tell from the plain covariance.
    assert (5 * error.diagonal() < (plain - shared) * exact.diagonal()).all()


def test_averages_are_means_and_a_symmetric_matrix():
    rng = np.random.default_rng(0)
    samples = HeldSamples(rng.standard_normal((6, 2, 3)), rng.standard_normal((2, 6, 2, 3)))
    found = average_labels(samples, PROBES)
    np.testing.assert_allclose(found.forces, samples.forces.mean(axis=0))
    np.testing.assert_allclose(found.hvps, samples.hvps.mean(axis=0))
    matrix = found.covariances.reshape(6, 6)
    np.testing.assert_allclose(matrix, matrix.T)
    assert (np.linalg.eigvalsh(matrix) > -1e-12).all()
    # Any probe: the matrix times it.
    probe = rng.standard_normal((1, 2, 3))
    one = average_labels(replace(samples, hvps=samples.hvps[:, :1]), probe).covariances
    np.testing.assert_allclose(one.ravel(), matrix @ probe.ravel())


def test_runs_have_one_force_map_and_bounded_length():
    fold = np.array([0, 0, 0, 0, 0, 1, 1, 2, 0])
    runs = list(split_by_fold(fold, 3))
    assert [(s.start, s.stop) for s in runs] == [(0, 3), (3, 5), (5, 7), (7, 8), (8, 9)]
    assert all(len(set(fold[s])) == 1 for s in runs)


@pytest.fixture(scope="module")
def alanine() -> AtomisticSystem:
    return build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, constraints="none", name="ala")


@pytest.fixture(scope="module")
def bead_map(alanine) -> BeadMap:
    return build_bead_map("backbone", alanine.topology)


@pytest.fixture(scope="module")
def frames(alanine, tmp_path_factory) -> Frames:
    sampling = SamplingSettings(
        n_frames=N_FRAMES, stride=50, friction_per_ps=10.0, walkers=1, equilibration_steps=2000, platform="Reference"
    )
    return sample_frames(alanine, sampling, tmp_path_factory.mktemp("md") / "frames.zarr", progress=False).read()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of eight frames, of up to three chains in one Context."""
    monkeypatch.setattr(label, "CHUNK_FRAMES", 8)
    monkeypatch.setattr(label, "CHAIN_FRAMES", 3)


@pytest.fixture(scope="module")
def dataset(alanine, frames, bead_map, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "ala.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "CHUNK_FRAMES", 8)
        patch.setattr(label, "CHAIN_FRAMES", 3)
        return path, label_frames(alanine, frames, bead_map, SETTINGS, path, progress=False)


def test_dataset_of_averages_comes_back_from_disk(dataset, bead_map):
    path, data = dataset
    found = load_dataset(path, bead_map)
    for name in ("positions", "forces", "probes", "hvps", "covariances", "walker"):
        np.testing.assert_array_equal(getattr(found, name), getattr(data, name))
    assert found.hash == data.hash != replace(data, covariances=None).hash
    assert data.covariances.shape == data.hvps.shape == (N_FRAMES, 2, bead_map.n_beads, 3)
    assert data.covariances.dtype == np.float32
    # A covariance: no probe has a negative variance.
    assert ((data.covariances * data.probes).sum(axis=(2, 3)) > 0).all()


def test_force_calls_are_those_of_the_chains(dataset):
    chains = Chains(5, 2, 2, 2.0, 5.0, 300.0)
    # 10 steps, 5 forces, and 2 probes at 3 of the samples.
    assert chains.count_force_calls(2) == 10 + 5 + 2 * 2 * 3
    assert dataset[1].attributes["force_calls"]["labels"] == N_FRAMES * chains.count_force_calls(2)
    assert dataset[1].attributes["made_from"]["settings"]["averaging"] == AVERAGING.model_dump(mode="json")


def test_each_frame_is_averaged_by_the_map_of_its_fold(alanine, frames, bead_map, tmp_path):
    """Maps fitted to the frames differ from fold to fold; one run of three chains, done again by hand."""
    path = tmp_path / "ala.zarr"
    settings = SETTINGS.model_copy(update={"force_map": "optimal"})
    data = label_frames(alanine, frames, bead_map, settings, path, progress=False)
    group = zarr.open_group(str(path), mode="r")
    fold, maps = np.asarray(group["fold"]), np.asarray(group["fold_force_maps"])
    assert fold[:8].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert np.abs(maps[1] - maps[0]).max() > 0.01
    run, step = slice(4, 7), data.attributes["finite_difference"]["step_nm"]
    sampler = HeldSampler(alanine, bead_map, "Reference", {}, step, seed=7, workers=1)
    starts = Starts(np.arange(20)[run], frames.positions[run], data.probes[run], maps[1])
    (found,) = sampler.sample([starts], Chains(5, 2, 2, 2.0, 5.0, 300.0))
    for k, samples in enumerate(found):
        expected = average_labels(samples, data.probes[run][k])
        for name in ("forces", "hvps", "covariances"):
            # Stored as float32.
            stored, value = getattr(data, name)[run][k], getattr(expected, name)
            np.testing.assert_allclose(stored, value, rtol=1e-6, atol=1e-6 * np.abs(value).max())


def test_interrupted_averaging_resumes_to_the_same_dataset(alanine, frames, bead_map, dataset, tmp_path, monkeypatch):
    """Broken off in the second of three chunks; the finished one stays, and the rest is the same to the last bit."""
    path, calls = tmp_path / "ala.zarr", []

    def break_off(samples, probes):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return average_labels(samples, probes)

    monkeypatch.setattr(label, "average_labels", break_off)
    with pytest.raises(KeyboardInterrupt):
        label_frames(alanine, frames, bead_map, SETTINGS, path, progress=False)
    done = np.asarray(zarr.open_group(str(path), mode="r")["done"])
    assert done.tolist() == [1] * 8 + [0] * 12
    with pytest.raises(DataError, match="labels are missing"):
        load_dataset(path)
    calls.clear()
    monkeypatch.setattr(label, "average_labels", lambda *a: (calls.append(1), average_labels(*a))[1])
    resumed = label_frames(alanine, frames, bead_map, SETTINGS, path, progress=False)
    assert len(calls) == 12
    assert resumed.hash == dataset[1].hash


def test_workers_do_not_change_the_averages(alanine, frames, bead_map, dataset, tmp_path):
    settings = SETTINGS.model_copy(update={"workers": 2})
    other = label_frames(alanine, frames, bead_map, settings, tmp_path / "x.zarr", progress=False)
    assert other.hash == dataset[1].hash


def test_other_averaging_is_refused(alanine, frames, bead_map, dataset):
    for averaging, message in (
        (AVERAGING.model_copy(update={"n_samples": 6}), r"labels\.averaging\S* \(.*5.* -> .*6"),
        (None, r"labels\.averaging"),
    ):
        settings = SETTINGS.model_copy(update={"averaging": averaging})
        with pytest.raises(StudyError, match=message):
            label_frames(alanine, frames, bead_map, settings, dataset[0], progress=False)


def test_lost_covariances_are_noticed(dataset, tmp_path):
    """Without them the labels would pass for those of frames, and their covariance be taken from averaged forces."""
    shutil.copytree(dataset[0], tmp_path / "x.zarr")
    shutil.rmtree(tmp_path / "x.zarr" / "covariances")
    with pytest.raises(DataError, match="'covariances' is missing"):
        load_dataset(tmp_path / "x.zarr")
    shutil.copytree(dataset[0], tmp_path / "y.zarr")
    shutil.rmtree(tmp_path / "y.zarr" / "covariances" / "c" / "1")
    with pytest.raises(DataError, match="covariances hold NaN or infinity, first in frame 8"):
        load_dataset(tmp_path / "y.zarr")


def test_constrained_beads_leave_no_file(frames, tmp_path):
    system = build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, constraints="hbonds", name="ala")
    path: Path = tmp_path / "x.zarr"
    with pytest.raises(MappingError, match="takes part in a constraint") as caught:
        label_frames(system, frames, build_bead_map("backbone", system.topology), SETTINGS, path, progress=False)
    assert "\n" not in str(caught.value)
    assert "flexible_beads" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_averages_are_quieter_than_frames(alanine, frames, bead_map, dataset, tmp_path):
    """Twenty samples 10 fs apart against the frames, same map, about the same means.

    Two sets of chains from the same frames differ by twice the noise of one. Bonds and angles decorrelate within 10 to
    50 fs, so that the noise falls to a fifth or less; hidden states slower than the chain stay out of the comparison.
    """
    averaging = AveragingSettings(n_samples=20, stride=10, hvp_every=20, timestep_fs=1.0)
    made = []
    for seed in (7, 8):
        settings = SETTINGS.model_copy(update={"averaging": averaging, "seed": seed})
        made.append(label_frames(alanine, frames, bead_map, settings, tmp_path / f"{seed}.zarr", progress=False))
    settings = SETTINGS.model_copy(update={"averaging": None})
    plain = label_frames(alanine, frames, bead_map, settings, tmp_path / "plain.zarr", progress=False)
    assert plain.covariances is None
    assert plain.attributes["force_calls"]["labels"] == N_FRAMES * (1 + 2 * 2)
    np.testing.assert_array_equal(plain.positions, made[0].positions)
    noise = 0.5 * np.mean((made[0].forces - made[1].forces) ** 2)
    mean = 0.5 * (made[0].forces + made[1].forces)
    scatter = np.mean((plain.forces - mean) ** 2)
    assert noise < 0.2 * scatter
    # The chains' own covariance is that scatter: E[v . C v] / 3B. Five other trajectories gave 0.82 to 0.99 of it, 7 %
    # apart: 5 times that.
    variance = np.mean([(d.covariances * d.probes).sum() / (d.probes**2).sum() for d in made])
    assert variance == pytest.approx(scatter, rel=0.35)
