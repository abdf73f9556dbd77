from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from openmm_hvpcg.atomistic.platforms import PlatformChoice
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, ReferenceSettings
from openmm_hvpcg.errors import BackendError, DataError, InputError, MappingError, StudyError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.training import reference as module
from openmm_hvpcg.training.labels.held import HeldSampler, HeldSamples, Starts
from openmm_hvpcg.training.labels.probes import draw_probes
from openmm_hvpcg.training.reference import PMFReference, average_samples, compute_reference, load_reference
from openmm_hvpcg.units import compute_kt

SETTINGS = ReferenceSettings(
    n_frames=3, n_samples=24, stride=2, hvp_every=2, probes=2, blocks=4, platform="Reference", workers=1, seed=7
)


@pytest.fixture(scope="module")
def alanine():
    return build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, constraints="none", name="ala")


@pytest.fixture(scope="module")
def bead_map(alanine):
    return build_bead_map("backbone", alanine.topology)


def build_frames(system, n_frames: int = 9) -> Frames:
    noise = 0.003 * np.random.default_rng(0).standard_normal((n_frames, system.n_atoms, 3))
    return Frames((system.positions + noise).astype(np.float32), system.topology, 300.0, np.zeros(n_frames, dtype=int))


@pytest.fixture(scope="module")
def made(alanine, bead_map, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "ala.zarr"
    return path, compute_reference(alanine, build_frames(alanine), bead_map, SETTINGS, path, progress=False)


@pytest.fixture
def copied(made, tmp_path):
    path = tmp_path / "ala.zarr"
    shutil.copytree(made[0], path)
    return path, zarr.open_group(str(path), mode="r+")


def assert_same(a: PMFReference, b: PMFReference) -> None:
    for name in ("positions", "forces", "force_errors", "probes", "hvps", "hvp_errors", "frame", "force_map"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_reference_averages_the_samples_of_its_chains(alanine, bead_map, made):
    found, frames = made[1], build_frames(alanine)
    np.testing.assert_array_equal(found.frame, [0, 4, 8])
    np.testing.assert_array_equal(found.positions, bead_map.map_positions(frames.positions[found.frame]))
    np.testing.assert_array_equal(found.probes, draw_probes("rademacher", found.frame, 2, bead_map.n_beads, 7))
    step_nm = found.attributes["finite_difference"]["step_nm"]
    sampler = HeldSampler(alanine, bead_map, "Reference", {}, step_nm, 7, 1)
    starts = Starts(found.frame[1:2], frames.positions[4:5], found.probes[1:2], found.force_map)
    chains = module._Job(alanine, frames, bead_map, SETTINGS, found.frame).chains
    ((samples,),) = sampler.sample([starts], chains)
    expected = average_samples(samples, found.probes[1], 1 / compute_kt(300.0), 4)
    for name, value in zip(("forces", "force_errors", "hvps", "hvp_errors"), expected, strict=True):
        np.testing.assert_array_equal(getattr(found, name)[1], value)


def test_provenance_is_whole(made):
    attributes = made[1].attributes
    assert attributes["made_from"]["settings"]["seed"] == 7
    assert attributes["force_calls_per_configuration"] == 24 * 3 + 12 * 2 * 2
    assert attributes["finite_difference"]["relative_error"] < 1e-6  # double precision, see the theory note
    for key in ("system", "frames", "platform", "openmm_version", "bead_map", "force_map", "units", "format_version"):
        assert key in attributes
    assert (made[1].name, made[1].temperature_K, made[1].n_frames) == ("ala", 300.0, 3)


def test_whole_hessian_is_symmetric_and_blind_to_translation(alanine, bead_map, tmp_path):
    settings = SETTINGS.model_copy(update={"probes": "full", "n_frames": 1, "workers": 2})
    found = compute_reference(alanine, build_frames(alanine), bead_map, settings, tmp_path / "x.zarr", progress=False)
    n = 3 * bead_map.n_beads
    np.testing.assert_array_equal(found.probes[0].reshape(n, n), np.eye(n))
    hessian = found.hvps[0].reshape(n, n)
    scale = np.abs(hessian).max()
    # Finite differences of double-precision forces: 1e-8 of an HVP.
    np.testing.assert_allclose(hessian, hessian.T, rtol=0, atol=1e-6 * scale)
    assert (found.hvp_errors > 0).all()
    # The map's columns sum to 1 to within its fit: what a translation costs is small beside the Hessian.
    uniform = np.tile(np.eye(3), (bead_map.n_beads, 1))
    assert np.abs(hessian @ uniform).max() < 0.1 * scale


def test_average_of_few_samples_by_hand():
    """Two blocks of two samples, one bead, one component."""
    forces = np.zeros((4, 1, 3))
    forces[:, 0, 0] = [1.0, 3.0, 4.0, 8.0]
    hvps = np.zeros((2, 1, 1, 3))
    hvps[:, 0, 0, 0] = [10.0, 14.0]
    probes = np.array([[[1.0, 0.0, 0.0]]])
    mean, error, hvp, hvp_error = average_samples(HeldSamples(forces, hvps), probes, 0.5, 2)
    assert mean[0, 0] == 4.0
    # Block means 2 and 6: half their difference.
    assert error[0, 0] == pytest.approx(2.0)
    # Whole: 12 - 0.5 * 6.5 = 8.75; without a block: 14 - 0.5 * 4 = 12 and 10 - 0.5 * 1 = 9.5.
    assert hvp[0, 0, 0] == pytest.approx(2 * 8.75 - (12 + 9.5) / 2)
    assert hvp_error[0, 0, 0] == pytest.approx((12 - 9.5) / 2)
    with pytest.raises(DataError, match="too few samples for blocks: expected 3 or more, got 2"):
        average_samples(HeldSamples(forces, hvps), probes, 0.5, 3)


def test_finished_reference_is_not_made_again(alanine, bead_map, made, monkeypatch):
    monkeypatch.setattr(HeldSampler, "sample", lambda *a: pytest.fail("sampled"))
    monkeypatch.setattr(module, "choose_platform", lambda *a, **k: pytest.fail("measured"))
    again = compute_reference(alanine, build_frames(alanine), bead_map, SETTINGS, made[0], progress=False)
    assert_same(again, made[1])


def test_lost_configurations_are_made_again_with_the_same_numbers(alanine, bead_map, made, copied):
    path, group = copied
    for name in ("positions", "forces", "force_errors", "hvps", "hvp_errors"):
        group[name][1] = np.nan
    group["done"][1] = 0
    with pytest.raises(DataError, match="not finished: expected 3 configurations, got 2"):
        load_reference(path)
    assert_same(compute_reference(alanine, build_frames(alanine), bead_map, SETTINGS, path, progress=False), made[1])


def test_resumed_run_stays_on_its_platform(alanine, bead_map, copied, monkeypatch):
    """Which platform wins a measurement varies: what was begun on one goes on there, and elsewhere if it is gone."""
    job = module._Job(alanine, build_frames(alanine), bead_map, SETTINGS.model_copy(update={"platform": "auto"}), [])
    asked = []

    def choose(*_, platform, **__):
        asked.append(platform)
        if platform == "Reference":
            raise BackendError("no platform Reference")
        return PlatformChoice("CPU")

    assert module._get_platform(job, copied[1]).name == "Reference"
    monkeypatch.setattr(module, "choose_platform", choose)
    assert module._get_platform(job, copied[1]).name == "CPU"
    assert asked == ["Reference", "auto"]


def test_killed_run_resumes_without_loss_and_leaves_no_process(alanine, bead_map, tmp_path):
    """SIGKILL of the process that leads; the script has no ``if __name__ == "__main__"``."""
    settings = SETTINGS.model_copy(update={"n_frames": 8, "n_samples": 400, "workers": 2})
    path, script = tmp_path / "ala.zarr", tmp_path / "script.py"
    script.write_text(
        f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_training_reference as t
system = t.build_atomistic_system(t.InputSettings(sequence="A"), temperature_K=300.0, constraints="none", name="ala")
settings = t.SETTINGS.model_copy(update={{"n_frames": 8, "n_samples": 400, "workers": 2}})
bead_map = t.build_bead_map("backbone", system.topology)
t.compute_reference(system, t.build_frames(system), bead_map, settings, {str(path)!r}, progress=False)
"""
    )
    # Its processes share its standard output: that ends when the last of them does.
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not (path / "done" / "c").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)
    done = np.asarray(zarr.open_group(str(path), mode="r")["done"])
    assert 0 < done.sum() < 8, "the kill came too early or too late to test anything"
    frames = build_frames(alanine)
    resumed = compute_reference(alanine, frames, bead_map, settings, path, progress=False)
    whole = compute_reference(alanine, frames, bead_map, settings, tmp_path / "whole.zarr", progress=False)
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"n_samples": 30}, r"reference.n_samples \(24 -> 30\) differ"),
        ({"seed": 8}, r"reference.seed \(7 -> 8\) differ"),
        ("frames", "frames_hash differ"),
        ("system", "system_hash differ"),
    ],
)
def test_something_else_is_not_gone_on_with(alanine, bead_map, made, what, message):
    settings, frames, system = SETTINGS, build_frames(alanine), alanine
    if isinstance(what, dict):
        settings = SETTINGS.model_copy(update=what)
    elif what == "frames":
        frames = build_frames(alanine, 10)
    else:
        system = build_atomistic_system(
            InputSettings(sequence="A", hydrogen_mass_amu=2.0), temperature_K=300.0, constraints="none", name="ala"
        )
    with pytest.raises(StudyError, match=message):
        compute_reference(system, frames, bead_map, settings, made[0], progress=False)
    # Speed may change.
    changed = SETTINGS.model_copy(update={"workers": 2, "platform": "auto"})
    compute_reference(alanine, build_frames(alanine), bead_map, changed, made[0], progress=False)


def test_what_does_not_fit_together_is_refused(alanine, bead_map, tmp_path):
    glycine = build_atomistic_system(InputSettings(sequence="G"), temperature_K=300.0, constraints="none", name="gly")
    frames, path = build_frames(alanine), tmp_path / "x.zarr"
    with pytest.raises(InputError, match="frames and System differ: expected 19 atoms, got 22"):
        compute_reference(glycine, frames, bead_map, SETTINGS, path, progress=False)
    with pytest.raises(MappingError, match="bead map and System differ: expected 19 atoms, got 22"):
        compute_reference(glycine, build_frames(glycine), bead_map, SETTINGS, path, progress=False)
    with pytest.raises(InputError, match="differ in temperature: expected 310 K, got 300 K"):
        compute_reference(replace(alanine, temperature_K=310.0), frames, bead_map, SETTINGS, path, progress=False)
    weights = bead_map.site_weights.copy()
    weights[0, :3] = 1 / 3
    weights[0, 3:] = 0
    with pytest.raises(MappingError, match="cannot be held: expected a bead on one atom"):
        compute_reference(alanine, frames, replace(bead_map, site_weights=weights), SETTINGS, path, progress=False)
    rigid = build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0, name="ala")
    with pytest.raises(MappingError, match="takes part in a constraint"):
        compute_reference(rigid, frames, bead_map, SETTINGS, path, progress=False)
    wrong = SETTINGS.model_copy(update={"platform": "Abacus"})
    with pytest.raises(BackendError, match="no platform"):
        compute_reference(alanine, frames, bead_map, wrong, path, progress=False)
    assert not path.exists()


def test_damaged_and_foreign_files_are_refused(alanine, bead_map, copied):
    path, group = copied
    with pytest.raises(MappingError, match="made with another mapping"):
        load_reference(path, build_bead_map("heavy", alanine.topology))
    version = group.attrs["format_version"]
    group.attrs["format_version"] = 99
    with pytest.raises(DataError, match="too new"):
        load_reference(path)
    group.attrs["format_version"] = version
    for name in ("hvps", "force_errors", "force_map"):
        kept = np.asarray(group[name])
        shutil.rmtree(path / name / "c")
        with pytest.raises(DataError, match=rf"ala.zarr.*{name} hold NaN"):
            load_reference(path)
        group[name][...] = kept
    group["force_errors"][0, 0, 0] = -1.0
    with pytest.raises(DataError, match="force_errors hold NaN, infinity or a negative error"):
        load_reference(path)
    group["force_errors"][0, 0, 0] = 1.0
    shutil.rmtree(path / "forces")
    with pytest.raises(DataError, match="'forces' is missing"):
        load_reference(path)
    header = dict(group.attrs)
    for key in ("bead_map", "temperature_K"):
        group.attrs.put({k: v for k, v in header.items() if k != key})
        with pytest.raises(DataError, match="header is incomplete"):
            load_reference(path)
    group.attrs.put({**header, "format": "openmm-hvpcg/labels"})
    with pytest.raises(DataError, match="wrong kind of file"):
        load_reference(path)
    with pytest.raises(DataError, match="there is no pmf_reference"):
        load_reference(path.with_name("none.zarr"))


def test_wrong_shapes_are_refused(made):
    found = made[1]
    with pytest.raises(DataError, match="forces have the wrong shape"):
        replace(found, forces=found.forces[:2])
    with pytest.raises(DataError, match="hvps have the wrong shape"):
        replace(found, hvps=found.hvps[:, :1])
