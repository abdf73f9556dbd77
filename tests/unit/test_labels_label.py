from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, LabelSettings
from openmm_hvpcg.errors import ConfigError, DataError, InputError, MappingError, StudyError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps
from openmm_hvpcg.training.labels.label import CHUNK_FRAMES, label_frames
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.training.labels.probes import draw_probes

SETTINGS = LabelSettings(probes_per_frame=2, platform="Reference", workers=1, seed=7)
N_FRAMES = 3 * CHUNK_FRAMES


@pytest.fixture(scope="module")
def alanine():
    return build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, name="ala")


def build_frames(system, n_frames: int = N_FRAMES) -> Frames:
    noise = 0.003 * np.random.default_rng(0).standard_normal((n_frames, system.n_atoms, 3))
    return Frames(
        (system.positions + noise).astype(np.float32),
        system.topology,
        300.0,
        np.repeat([0, 1], [n_frames // 2, n_frames - n_frames // 2]),
    )


@pytest.fixture(scope="module")
def dataset(alanine, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "ala.zarr"
    bead_map = build_bead_map("backbone", alanine.topology)
    return path, bead_map, label_frames(alanine, build_frames(alanine), bead_map, SETTINGS, path, progress=False)


def test_labels_are_the_projected_forces_and_hvps(alanine, dataset):
    path, bead_map, data = dataset
    frames = build_frames(alanine)
    weights = np.asarray(zarr.open_group(str(path), mode="r")["force_map"])
    probes = draw_probes("rademacher", np.arange(N_FRAMES), 2, bead_map.n_beads, 7)
    with ForceOracle(alanine.system, "Reference") as oracle:
        forces = weights @ oracle(frames.positions.astype(np.float64))
        step = data.attributes["finite_difference"]["step_nm"]
        hvps = compute_projected_hvps(oracle, frames.positions, probes, weights, step)
    np.testing.assert_array_equal(data.probes, probes)
    # Stored as float32: 6e-8 relative.
    np.testing.assert_allclose(data.forces, forces, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(data.hvps, hvps, rtol=1e-6, atol=1e-6 * np.abs(hvps).max())
    np.testing.assert_array_equal(data.positions, bead_map.map_positions(frames.positions).astype(np.float32))


def test_provenance_is_whole(dataset):
    attributes = dataset[2].attributes
    assert attributes["finite_difference"]["relative_error"] < 1e-7
    assert attributes["probe_second_moment"] == "identity"
    assert attributes["force_map"]["method"] == "optimal"
    assert attributes["made_from"]["settings"]["seed"] == 7
    for key in ("system", "frames", "platform", "openmm_version", "bead_map", "temperature_K", "units"):
        assert key in attributes


def test_workers_do_not_change_the_labels(alanine, dataset, tmp_path):
    settings = SETTINGS.model_copy(update={"workers": 2})
    other = label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "x.zarr", progress=False)
    assert other.hash == dataset[2].hash


def test_killed_labelling_resumes_without_loss(alanine, dataset, tmp_path):
    """SIGKILL between chunks: the finished labels stay as they are, and the end equals an uninterrupted run."""
    path = tmp_path / "ala.zarr"
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import time, test_labels_label as t
from openmm_hvpcg.training.labels import label
system = t.build_atomistic_system(t.InputSettings(sequence="A"), temperature_K=300.0, name="ala")
genuine = label.compute_projected_hvps
label.compute_projected_hvps = lambda *a: (time.sleep(0.4), genuine(*a))[1]
bead_map = t.build_bead_map("backbone", system.topology)
t.label_frames(system, t.build_frames(system), bead_map, t.SETTINGS, {str(path)!r}, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (path / "done" / "c" / "0").exists():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = np.asarray(zarr.open_group(str(path), mode="r")["done"])
    assert 0 < done.sum() < N_FRAMES
    with pytest.raises(DataError, match="labels are missing"):
        load_dataset(path)
    kept = (path / "hvps" / "c" / "0" / "0" / "0" / "0").stat().st_mtime_ns
    resumed = label_frames(alanine, build_frames(alanine), dataset[1], SETTINGS, path, progress=False)
    assert resumed.hash == dataset[2].hash
    assert (path / "hvps" / "c" / "0" / "0" / "0" / "0").stat().st_mtime_ns == kept


def test_other_settings_frames_or_maps_are_refused(alanine, dataset):
    path, bead_map, _ = dataset
    frames = build_frames(alanine)
    with pytest.raises(StudyError, match=r"labels\.seed \(7 -> 8\)"):
        label_frames(alanine, frames, bead_map, SETTINGS.model_copy(update={"seed": 8}), path, progress=False)
    with pytest.raises(StudyError, match="frames_hash"):
        label_frames(alanine, frames.select(slice(0, 100)), bead_map, SETTINGS, path, progress=False)
    with pytest.raises(StudyError, match="bead_map_hash"):
        label_frames(alanine, frames, build_bead_map("heavy", alanine.topology), SETTINGS, path, progress=False)


def test_max_frames_are_evenly_spaced(alanine, dataset, tmp_path):
    settings = SETTINGS.model_copy(update={"max_frames": 5, "step_nm": 1e-5})
    data = label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "x.zarr", progress=False)
    chosen = np.asarray(zarr.open_group(str(tmp_path / "x.zarr"), mode="r")["frame"])
    assert chosen.tolist() == [0, 48, 96, 143, 191]
    np.testing.assert_array_equal(data.positions, dataset[2].positions[chosen])
    assert data.attributes["finite_difference"]["step_nm"] == 1e-5


def test_sizes_that_do_not_fit_are_refused(alanine, dataset, tmp_path):
    other = build_atomistic_system(InputSettings(sequence="G"), temperature_K=300.0)
    with pytest.raises(InputError, match="frames and System differ"):
        label_frames(other, build_frames(alanine), dataset[1], SETTINGS, tmp_path / "x.zarr")
    with pytest.raises(MappingError, match="bead map and System differ"):
        label_frames(other, build_frames(other), dataset[1], SETTINGS, tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()


def test_cpu_platform_labels_agree_with_reference(alanine, dataset, tmp_path):
    settings = SETTINGS.model_copy(update={"platform": "CPU", "max_frames": 5})
    data = label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "x.zarr", progress=False)
    exact = dataset[2].hvps[[0, 48, 96, 143, 191]]
    # The force map's sample differs (5 frames), so compare what does not depend on it: the recorded error.
    assert data.attributes["platform"]["name"] == "CPU"
    # Theory note: single-precision nonbonded forces leave about 4e-6 at the best step.
    assert data.attributes["finite_difference"]["relative_error"] < 1e-4
    assert data.hvps.shape == exact.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(format_version=99), "too new"),
        (lambda a: a.update(format="openmm-hvpcg/frames"), "wrong kind"),
        (lambda a: a["units"].update(length="angstrom"), "units differ"),
        (lambda a: a.pop("bead_map"), "header is incomplete"),
    ],
)
def test_foreign_headers_are_refused(dataset, tmp_path, change, message):
    shutil.copytree(dataset[0], tmp_path / "x.zarr")
    header = tmp_path / "x.zarr" / "zarr.json"
    content = json.loads(header.read_text())
    change(content["attributes"])
    header.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / "x.zarr")


def test_truncated_dataset_and_other_mapping_are_refused(alanine, dataset, tmp_path):
    shutil.copytree(dataset[0], tmp_path / "x.zarr")
    shutil.rmtree(tmp_path / "x.zarr" / "hvps" / "c" / "1")
    with pytest.raises(DataError, match=f"hvps hold NaN or infinity, first in frame {CHUNK_FRAMES}"):
        load_dataset(tmp_path / "x.zarr")
    shutil.copytree(dataset[0], tmp_path / "y.zarr")
    shutil.rmtree(tmp_path / "y.zarr" / "walker" / "c")
    with pytest.raises(DataError, match="'walker' is damaged"):
        load_dataset(tmp_path / "y.zarr")
    shutil.rmtree(tmp_path / "x.zarr" / "forces")
    with pytest.raises(DataError, match="'forces' is missing"):
        load_dataset(tmp_path / "x.zarr")
    with pytest.raises(MappingError, match="another mapping"):
        load_dataset(dataset[0], build_bead_map("heavy", alanine.topology))


def test_probes_belong_to_frames_not_to_chunks():
    whole = draw_probes("normal", np.arange(10), 2, 4, seed=3)
    np.testing.assert_array_equal(draw_probes("normal", np.array([7, 2]), 2, 4, seed=3), whole[[7, 2]])
    assert not np.array_equal(whole, draw_probes("normal", np.arange(10), 2, 4, seed=4))
    assert set(np.unique(draw_probes("rademacher", np.arange(10), 2, 4, seed=3))) == {-1.0, 1.0}
    with pytest.raises(ConfigError, match="no such probe law"):
        draw_probes("uniform", np.arange(3), 1, 2, seed=0)
