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
from openmm_hvpcg.frames import Frames, load_frames
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.labels import label
from openmm_hvpcg.training.labels.force_maps import METHODS
from openmm_hvpcg.training.labels.frame_maps import FrameMaps
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps
from openmm_hvpcg.training.labels.label import CHUNK_FRAMES, label_chunks, label_frames
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.training.labels.probes import ProbeLaw, draw_probes

SETTINGS = LabelSettings(probes_per_frame=2, platform="Reference", workers=1, seed=7)
N_FRAMES = 3 * CHUNK_FRAMES
TESTS = Path(__file__).parents[1]


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
    group = zarr.open_group(str(path), mode="r")
    maps, fold = np.asarray(group["fold_force_maps"]), np.asarray(group["fold"])
    assert len(maps) == 5
    assert np.bincount(fold).min() > 0.9 * N_FRAMES / 5
    probes = draw_probes("rademacher", np.arange(N_FRAMES), 2, bead_map.n_beads, 7)
    with ForceOracle(alanine.system, "Reference") as oracle:
        forces = maps[fold] @ oracle(frames.positions.astype(np.float64))
        step = data.attributes["finite_difference"]["step_nm"]
        hvps = np.empty(probes.shape)
        for k, weights in enumerate(maps):
            own = fold == k
            hvps[own] = compute_projected_hvps(oracle, frames.positions[own], probes[own], weights, step)
    np.testing.assert_array_equal(data.probes, probes)
    # Stored as float32: 6e-8 relative.
    np.testing.assert_allclose(data.forces, forces, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(data.hvps, hvps, rtol=1e-6, atol=1e-6 * np.abs(hvps).max())
    np.testing.assert_array_equal(data.positions, bead_map.map_positions(frames.positions).astype(np.float32))


def test_provenance_is_whole(dataset):
    attributes = dataset[2].attributes
    assert attributes["finite_difference"]["relative_error"] < 1e-7
    assert attributes["probe_second_moment"] == "identity"
    assert attributes["force_map"]["method"] == "optimal_cv"
    assert attributes["made_from"]["settings"]["seed"] == 7
    for key in ("system", "frames", "platform", "openmm_version", "bead_map", "temperature_K", "units"):
        assert key in attributes


def test_maps_are_compared_and_force_calls_counted(alanine, dataset, tmp_path, monkeypatch, caplog):
    calls = []
    genuine = ForceOracle.__call__
    monkeypatch.setattr(
        ForceOracle, "__call__", lambda self, x, box=None: (calls.append(len(x)), genuine(self, x, box))[1]
    )
    caplog.set_level("INFO")
    settings = SETTINGS.model_copy(update={"max_frames": 100, "force_map": "optimal_cv"})
    data = label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "x.zarr", progress=False)
    found = data.attributes["force_map"]
    assert list(found["comparison"]) == list(METHODS)
    assert found["comparison_frames"] == {"forces": 100, "hvps": 64}
    # Every frame was projected by the map of its fold: the figure is that of the labels themselves.
    rms = np.sqrt(np.mean(data.forces.astype(np.float64) ** 2))
    assert found["comparison"]["optimal_cv"]["forces"] == pytest.approx(rms, rel=1e-6)  # float32 labels
    assert found["comparison"]["slice"]["forces"] == pytest.approx(found["rms_projected_force_slice"], rel=1e-12)
    # Even where all atoms are shaken at random, the map that follows the bonds is quieter in both figures.
    for figure in ("forces", "hvps"):
        assert found["comparison"]["harmonic"][figure] < found["comparison"]["slice"][figure]
    assert sum(calls) == sum(data.attributes["force_calls"].values())
    assert data.attributes["force_calls"]["labels"] == 100 * 5
    (line,) = [r.message for r in caplog.records if "by force map" in r.message]
    assert all(f"{method} " in line for method in METHODS)


def test_noisy_map_is_warned_of(alanine, dataset, tmp_path, caplog):
    """16 free weights fitted to 12 forces a component interpolate them, and are of no use for frames not seen."""
    settings = SETTINGS.model_copy(update={"force_map": "optimal", "max_frames": 5})
    label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "x.zarr", progress=False)
    assert "force map optimal, from 5 frames, makes noisier labels than" in caplog.text
    caplog.clear()
    settings = SETTINGS.model_copy(update={"force_map": "optimal", "max_frames": 1})
    label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "y.zarr", progress=False)
    assert "fitted to one frame" in caplog.text


@pytest.mark.parametrize(
    "law",
    [ProbeLaw("soft"), ProbeLaw("soft", n_modes=4), ProbeLaw("rademacher", translations="remove")],
    ids=str,
)
def test_laws_of_probes_are_drawn_and_named(alanine, dataset, tmp_path, law):
    settings = LabelSettings(
        probe_law=law.name,
        probe_modes=law.n_modes,
        probe_translations=law.translations,
        probes_per_frame=2,
        max_frames=CHUNK_FRAMES + 6,
        platform="Reference",
        workers=1,
        seed=7,
    )
    data = label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "x.zarr", progress=False)
    chosen = np.asarray(zarr.open_group(str(tmp_path / "x.zarr"), mode="r")["frame"])
    # From the stored positions alone, in one piece.
    expected = draw_probes(law, chosen, 2, data.bead_map.n_beads, 7, data.positions)
    np.testing.assert_array_equal(data.probes, expected)
    assert ProbeLaw.from_attributes(data.attributes) == law
    assert data.attributes["probe_second_moment"] == law.describe()
    assert data.attributes["finite_difference"]["relative_error"] < 1e-6


def test_more_soft_modes_than_there_are_leave_no_file(alanine, dataset, tmp_path):
    settings = SETTINGS.model_copy(update={"probe_law": "soft", "probe_modes": 1000})
    with pytest.raises(ConfigError, match="have fewer soft modes"):
        label_frames(alanine, build_frames(alanine), dataset[1], settings, tmp_path / "x.zarr", progress=False)
    assert not (tmp_path / "x.zarr").exists()


def test_dataset_begun_by_an_older_version_is_finished_as_it_was_begun(tmp_path):
    """Format version 1, from before there were folds and other laws: one map for all frames, the default law."""
    old = TESTS / "continuity" / "files" / "version_1"
    molecule = build_atomistic_system(
        InputSettings(system_xml="dialanine.xml", pdb="dialanine.pdb"), temperature_K=300.0, base=TESTS.parent / "data"
    )
    path = tmp_path / "dataset.zarr"
    shutil.copytree(old / "dataset.zarr", path)
    group = zarr.open_group(str(path), mode="r+")
    expected = {name: np.asarray(group[name]) for name in ("probes", "forces", "hvps")}
    for name in expected:
        group[name][...] = np.nan
    group["done"][...] = 0
    made_from = dict(group.attrs["made_from"])
    assert "probe_modes" not in made_from["settings"]
    # Another OpenMM may serialize the same System otherwise: what is tested here is the settings.
    group.attrs["made_from"] = {**made_from, "system_hash": molecule.system_hash}
    settings = LabelSettings.model_validate({**made_from["settings"], "platform": "Reference", "workers": 1})
    frames = load_frames(old / "frames.zarr")
    bead_map = build_bead_map("backbone", frames.topology)
    changed = settings.model_copy(update={"probe_translations": "remove"})
    with pytest.raises(StudyError, match=r"labels\.probe_translations \(keep -> remove\)"):
        label_frames(molecule, frames, bead_map, changed, path, progress=False)
    data = label_frames(molecule, frames, bead_map, settings, path, progress=False)
    np.testing.assert_array_equal(data.probes, expected["probes"])
    # Double-precision forces on another machine: differences of 1e-12 over a step of 1e-4 nm.
    np.testing.assert_allclose(data.forces, expected["forces"], rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(data.hvps, expected["hvps"], rtol=1e-5, atol=1e-5 * np.abs(expected["hvps"]).max())
    assert len(FrameMaps.read(group, path).weights) == 1


def test_lost_force_maps_are_noticed(alanine, dataset, tmp_path):
    for name in ("fold", "fold_force_maps"):
        path = tmp_path / f"{name}.zarr"
        shutil.copytree(dataset[0], path)
        zarr.open_group(str(path), mode="r+")["done"][:CHUNK_FRAMES] = 0
        shutil.rmtree(path / name / "c")
        with pytest.raises(DataError, match="force maps are damaged"):
            label_frames(alanine, build_frames(alanine), dataset[1], SETTINGS, path, progress=False)


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
from openmm_hvpcg.training.labels import frame_maps
system = t.build_atomistic_system(t.InputSettings(sequence="A"), temperature_K=300.0, name="ala")
genuine = frame_maps.FrameMaps.compute_hvps
frame_maps.FrameMaps.compute_hvps = lambda *a: (time.sleep(0.4), genuine(*a))[1]
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


def test_many_frames_get_longer_chunks_and_a_dataset_keeps_its_own(alanine, dataset, tmp_path, monkeypatch):
    """A dataset begun with long chunks is finished with them by a package that would choose short ones."""
    frames, bead_map, path = build_frames(alanine), dataset[1], tmp_path / "x.zarr"
    frame_counts = (1, 4095, 8191, 8192, 16000, 10**6)
    assert [label._choose_chunk(n, 1000) for n in frame_counts] == [64, 64, 64, 128, 192, 256]
    assert [label._choose_chunk(n, 22) for n in frame_counts] == [64, 448, 960, 1024, 1984, 2048], "quick to label"
    with monkeypatch.context() as patch:
        patch.setattr(label, "MANY_CHUNKS", 1)
        assert label_chunks(alanine, frames, bead_map, SETTINGS, path, [], progress=False) == [0]
    assert zarr.open_group(str(path), mode="r")["hvps"].chunks[0] == N_FRAMES
    assert label_chunks(alanine, frames, bead_map, SETTINGS, path, [0], progress=False) == [0]
    whole = label_frames(alanine, frames, bead_map, SETTINGS, path, progress=False)
    short = label_frames(alanine, frames, bead_map, SETTINGS, tmp_path / "y.zarr", progress=False)
    np.testing.assert_array_equal(whole.hvps, short.hvps)
