"""Labels that stay in files: the same training, to the bit, with no more in memory than is looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from training_cases import TEMPERATURE, build_labels

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import DataError, StorageError
from openmm_hvpcg.storage import compute_hash, split_rows
from openmm_hvpcg.training import preparation as preparation_module
from openmm_hvpcg.training.dataset import FORMAT_VERSION, KIND, LabelledFrames, StoredArray, load_dataset
from openmm_hvpcg.training.fit import FitResult, fit_potential
from openmm_hvpcg.training.processes import count_bytes
from openmm_hvpcg.training.scratch import Memory, Scratch
from openmm_hvpcg.units import UNITS

MODEL = ModelSettings(features=8, interactions=1, radial=8, cutoff_nm=0.8)
SETTINGS = TrainingSettings(
    hvp_weight="balanced", covariance_frames=300.0, max_epochs=3, batch_size=32, learning_rate=5e-3, accelerator="cpu"
)


def write_dataset(data: LabelledFrames, store: object) -> None:
    """A labels store as the label stage leaves it, in chunks that frames do not fill evenly."""
    group = zarr.open_group(str(store) if isinstance(store, Path) else store, mode="w", zarr_format=3)
    group.attrs.update(
        {
            "format": f"openmm-hvpcg/{KIND}",
            "format_version": FORMAT_VERSION,
            "units": UNITS,
            "bead_map": json.dumps(data.bead_map.to_dict()),
            "temperature_K": TEMPERATURE,
        }
    )
    names = ["positions", "forces", "probes", "hvps", "walker"]
    for name in [*names, *(["covariances"] if data.covariances is not None else [])]:
        values = getattr(data, name)
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(7, *values.shape[1:]))
        array[...] = values
    group.create_array("done", shape=(data.n_frames,), dtype="uint8", chunks=(100,))[...] = 1


@pytest.fixture(params=["path", "URL", "store"])
def stored(request, tmp_path):
    data = build_labels(60, force_noise=30.0, n_samples=5, name="mol")
    if request.param == "path":
        place = tmp_path / "mol.zarr"
    elif request.param == "URL":
        place = f"memory://{tmp_path.name}/mol.zarr"
    else:
        place = zarr.storage.MemoryStore()
    write_dataset(data, place)
    return data, place


@pytest.mark.parametrize("stream", [False, True])
def test_datasets_are_read_from_any_store(stored, stream):
    data, place = stored
    found = load_dataset(place, data.bead_map, stream=stream, name="mol")
    assert isinstance(found.hvps, StoredArray) is stream
    assert found.hash == data.hash
    rows = np.array([50, 3, 4])
    for name in ("positions", "forces", "probes", "hvps", "covariances"):
        expected, values = getattr(data, name), getattr(found, name)
        np.testing.assert_array_equal(np.asarray(values), expected)
        np.testing.assert_array_equal(values[rows], expected[rows])
        np.testing.assert_array_equal(values[10:31], expected[10:31])
        np.testing.assert_array_equal(values[5], expected[5])
    np.testing.assert_array_equal(found.select(rows).hvps, data.hvps[rows])


def test_name_is_that_of_the_file(tmp_path):
    write_dataset(build_labels(20), tmp_path / "ala.zarr")
    assert load_dataset(tmp_path / "ala.zarr").name == "ala"
    write_dataset(build_labels(20), f"memory://{tmp_path.name}/gly.zarr")
    assert load_dataset(f"memory://{tmp_path.name}/gly.zarr").name == "gly"
    with pytest.raises(DataError, match=r"memory://nowhere/x.zarr: not a readable zarr group"):
        load_dataset("memory://nowhere/x.zarr")


def test_damage_is_found_in_streamed_labels(tmp_path):
    data = build_labels(60)
    write_dataset(data, tmp_path / "mol.zarr")
    group = zarr.open_group(str(tmp_path / "mol.zarr"), mode="r+")
    group["forces"][33, 1, 2] = np.nan
    with pytest.raises(DataError, match="forces hold NaN or infinity, first in frame 33"):
        load_dataset(tmp_path / "mol.zarr", stream=True)
    group["forces"][33, 1, 2] = 0.0
    found = load_dataset(tmp_path / "mol.zarr", stream=True)
    chunk = tmp_path / "mol.zarr" / "hvps" / "c" / "2" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(DataError, match="'hvps' is damaged or out of reach"):
        found.hvps[14:21]


def test_hash_in_parts_is_that_of_the_whole():
    values = np.arange(3000, dtype=np.float32).reshape(100, 30)
    parts = split_rows(values, 1000)
    assert len(parts) == 13
    np.testing.assert_array_equal(np.concatenate([values[p] for p in parts]), values)
    # 2^24 bytes at a time: four parts.
    big = np.random.default_rng(0).standard_normal((2_000_000, 4)).astype(np.float64)
    assert len(split_rows(big)) == 4
    assert compute_hash(big, np.float32(2.0), "a") == compute_hash(np.asfortranarray(big), np.float32(2.0), b"a")
    assert compute_hash(big) != compute_hash(big[::-1])


def test_scratch_holds_what_is_written(tmp_path):
    scratch = Scratch(tmp_path / "scratch")
    values = scratch.allocate("a", (50, 3))
    assert float(values.abs().sum()) == 0.0
    values.copy_(torch.arange(150.0).reshape(50, 3))
    scratch.release()
    assert torch.equal(values, torch.arange(150.0).reshape(50, 3))
    other = Scratch(tmp_path / "scratch", attach=True).allocate("a", (50, 3))
    values[7] = -1.0
    assert other[7].tolist() == [-1.0] * 3
    assert scratch.allocate("empty", (0, 3)).shape == (0, 3)
    for rows in ([[3, 4], [5, 39], [0, 0]], [7], [], list(range(40))):
        wanted = torch.tensor(rows, dtype=torch.long)
        for part in (values, values[10:], values.unflatten(0, (50, 1))):
            assert torch.equal(scratch.gather(part, wanted), part[wanted])
    scratch.delete()
    assert list(tmp_path.iterdir()) == []


def test_scratch_says_that_the_disk_is_too_small(tmp_path):
    """Before anything is written: a mapped file on a full disk would end the process. This one is of 64 TB."""
    with pytest.raises(StorageError, match="not enough disk space"):
        Scratch(tmp_path / "scratch").allocate("a", (2**44,))


def test_memory_is_zero():
    memory = Memory()
    assert float(memory.allocate("a", (5, 2)).abs().sum()) == 0.0
    memory.release()


def train(folder: Path, settings: TrainingSettings, *data: LabelledFrames) -> FitResult:
    return fit_potential(data, settings, MODEL, PriorSettings(), folder, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"covariance": "pooled"},
        {"covariance": "ratio", "covariance_regions": 2},
        {"whiten": "noise"},
        {"n_samples": 5},
        {"hvp_weight": 0.0},
        {"density": 0.9},
    ],
    ids=str,
)
def test_streamed_training_is_the_same_to_the_bit(tmp_path, monkeypatch, settings):
    """Labels from zarr stores by way of scratch files; sums in parts of some frames, in both."""
    monkeypatch.setattr(preparation_module, "CHUNK_VALUES", 1000)
    settings = dict(settings)
    labels = {"force_noise": 30.0, "n_samples": settings.pop("n_samples", None)}
    data = [build_labels(130, name="one", **labels), build_labels(70, seed=3, name="two", **labels)]
    settings = SETTINGS.model_copy(update=settings)
    whole = train(tmp_path / "whole", settings, *data)
    streamed = []
    for d in data:
        write_dataset(d, tmp_path / f"{d.name}.zarr")
        streamed.append(load_dataset(tmp_path / f"{d.name}.zarr", stream=True))
    opened = []
    monkeypatch.setattr(Scratch, "release", lambda self: opened.append(self.folder))
    parts = train(tmp_path / "parts", settings.model_copy(update={"memory_gb": 1e-5}), *streamed)
    assert set(opened) == {tmp_path / "parts" / "scratch"}
    assert not (tmp_path / "parts" / "scratch").exists()
    assert parts.curves == whole.curves
    for result in (parts, whole):
        result.metrics.pop("wall_time_s")
    assert parts.metrics == whole.metrics
    for a, b in zip(parts.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_released_training_is_the_same_to_the_bit(tmp_path):
    """As above, the pages let go of in earnest."""
    data = build_labels(130, force_noise=30.0)
    whole = train(tmp_path / "whole", SETTINGS, data)
    parts = train(tmp_path / "parts", SETTINGS.model_copy(update={"memory_gb": 1e-5}), data)
    assert parts.curves == whole.curves


def test_labels_within_the_bound_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Scratch, "allocate", None)
    data = build_labels(60)
    # Positions, forces; and of each of three probes itself, its HVP and its covariance, all of 15 numbers.
    assert count_bytes(data, SETTINGS) == 60 * (2 + 9) * 15 * 4
    bound = count_bytes(data, SETTINGS) / 1e9
    assert train(tmp_path / "in", SETTINGS.model_copy(update={"memory_gb": bound}), data).curves
    with pytest.raises(TypeError):
        train(tmp_path / "out", SETTINGS.model_copy(update={"memory_gb": 0.99 * bound}), data)


def test_bound_may_change_when_a_training_resumes(tmp_path):
    data = build_labels(60)
    first = train(tmp_path, SETTINGS, data)
    assert train(tmp_path, SETTINGS.model_copy(update={"memory_gb": 1e-5}), data).curves == first.curves


def test_fits_use_no_more_frames_than_they_need(monkeypatch):
    """Priors and pooled covariances see evenly spaced frames of many, all of few; the loss sees all."""
    data = build_labels(400, force_noise=30.0)
    everything = preparation_module.prepare([data], SETTINGS, MODEL, PriorSettings(), {})
    np.testing.assert_array_equal(everything.pooling[0], everything.training[0])
    monkeypatch.setattr(preparation_module, "FIT_FRAMES", 100)
    monkeypatch.setattr(preparation_module, "FIT_VALUES", 14 * 150)
    few = preparation_module.prepare([data], SETTINGS, MODEL, PriorSettings(), {})
    # 14 soft features of five beads.
    assert len(few.pooling[0]) == 150
    assert set(few.pooling[0]) < set(few.training[0])
    assert np.ptp(np.diff(np.searchsorted(few.training[0], few.pooling[0]))) <= 1
    np.testing.assert_array_equal(few.training[0], everything.training[0])
    assert few.molecules[0].own_share == everything.molecules[0].own_share
    # A covariance of 150 frames instead of 320: the same within some standard errors, sqrt(2 / 150) = 0.12.
    assert few.scales.hvp == pytest.approx(everything.scales.hvp, rel=0.2)
    assert replace(few.scales, hvp=1.0) != replace(everything.scales, hvp=1.0)
