"""Every protocol, shrunk, through the command line; stages one by one; what a changed setting does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from cli_process import Options, call_cli
from conftest import DEMO, PROTOCOLS, Shown, set_options

from openmm_hvpcg.analysis.summary import SUMMARY_KEYS

STAGES = ("sample", "label", "train", "export", "simulate", "compare")
CONTRACTED = (
    "kl_tica1", "kl_tica1_error", "kl_tica12", "kl_tica12_error", "js_tica1", "js_tica1_error",
    "simulated_ns", "steps_per_second", "backend",
)  # fmt: skip
CONTRACTED_TRAINING = ("force_rmse_validation", "force_noise", "hvp_rmse_validation", "hvp_noise")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def list_files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def read_contents(folder: Path) -> dict[str, bytes]:
    """Every file of a study but its log and the time its stages took."""
    return {
        name: (folder / name).read_bytes()
        for name in list_files(folder)
        if name not in ("log.txt", ".lock", "stages/seconds.json")
    }


def assert_same_arrays(first: Path, second: Path) -> None:
    a, b = (dict(zarr.open_group(str(p), mode="r").arrays()) for p in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name][...], b[name][...], err_msg=name)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.parent.name)
def test_protocol_runs(protocol: Path, run_protocol: Callable[[Path], Shown]) -> None:
    shown = run_protocol(protocol)
    assert shown.status == 0, shown.stderr
    resolved = yaml.safe_load((shown.out / "config.resolved.yaml").read_text())
    arms = [arm["name"] for arm in resolved["training"]["arms"]]
    judged = [m["name"] for m in resolved["molecules"] if m["role"] != "train"]
    trained = [m["name"] for m in resolved["molecules"] if m["role"] != "test"]
    expected = ["log.txt", "report/report.html", "report/summary.json"]
    for arm in arms:
        expected += [f"models/{arm}/potential.pt", f"models/{arm}/checkpoints/last.ckpt"]
        expected += [f"models/{arm}/logs/csv/metrics.csv"]
        for m in judged:
            expected += [f"cg/{arm}/{m}/{f}" for f in ("topology.pdb", "replica_001.dcd", "energies.csv")]
    assert set(expected) <= list_files(shown.out)
    for arm in arms:
        assert list((shown.out / "models" / arm / "logs" / "tensorboard").glob("events.*"))
    for m in resolved["molecules"]:
        assert "positions" in zarr.open_group(str(shown.out / "frames" / f"{m['name']}.zarr"), mode="r")
    for name in trained:
        check_dataset(shown.out, name)
    check_summary(read_json(shown.out / "report" / "summary.json"), arms, judged)


def check_dataset(out: Path, molecule: str) -> None:
    group = zarr.open_group(str(out / "datasets" / f"{molecule}.zarr"), mode="r")
    n_frames, n_beads, _ = group["positions"].shape
    n_atoms = zarr.open_group(str(out / "frames" / f"{molecule}.zarr"), mode="r")["positions"].shape[1]
    assert (n_frames, n_beads) == (80, len(read_json(out / "mapping" / f"{molecule}.json")["beads"]))
    assert group["forces"].shape == (n_frames, n_beads, 3)
    assert group["probes"].shape == group["hvps"].shape == (n_frames, 2, n_beads, 3)
    assert group["force_map"].shape == (n_beads, n_atoms)
    for name in ("positions", "forces", "probes", "hvps"):
        assert np.isfinite(group[name][...]).all()
    assert group.attrs["format"] == "openmm-hvpcg/labels"


def check_summary(summary: dict[str, Any], arms: list[str], judged: list[str]) -> None:
    assert set(summary["molecules"]) == set(judged)
    for molecule in judged:
        for arm in arms:
            figures = summary["molecules"][molecule]["arms"][arm]
            assert figures["status"] == "ok"
            for key in CONTRACTED:
                assert figures[key] is not None, key
                assert key in SUMMARY_KEYS
    for arm in arms:
        for key in CONTRACTED_TRAINING:
            # Noise is unknown (null) where no two frames are near enough to compare.
            assert key in summary["arms"][arm]
            assert key.endswith("noise") or summary["arms"][arm][key] > 0


def test_output_fits_80_columns_and_is_free_of_chatter(run_protocol: Callable[[Path], Shown]) -> None:
    shown = run_protocol(DEMO)
    assert "dcdplugin" not in shown.stdout + shown.stderr
    assert "simtk" not in shown.stdout + shown.stderr
    tables = [line for line in shown.stdout.splitlines() if not line.startswith(("report:", "figures:"))]
    assert max(map(len, tables)) <= 80
    assert "…" not in shown.stdout
    summary = read_json(shown.out / "report" / "summary.json")
    for arm, figures in summary["molecules"]["ala"]["arms"].items():
        kl = f"{figures['kl_tica1']:.3f} ± {figures['kl_tica1_error']:.3f}"
        assert re.search(rf"ala +{arm} +{re.escape(kl)}", shown.stdout)
    assert str(shown.out / "report" / "report.html") in shown.stdout


def test_second_run_repeats_nothing(study: Path) -> None:
    before, seconds = read_contents(study), sum(read_json(study / "stages" / "seconds.json").values())
    result = call_cli("run", DEMO, "--out", study, *set_options())
    assert result.status == 0, result.err
    assert read_contents(study) == before
    log = (study / "log.txt").read_text()
    for unit in ("sample ala", "label ala", "train fm", "export hvp", "simulate hvp/ala", "compare report"):
        assert f"{unit}: done already, skipped" in log
    # Reading a few records takes hundredths of a second; any stage that did its work would take more than this.
    assert sum(read_json(study / "stages" / "seconds.json").values()) - seconds < 0.8


def test_stages_one_by_one_give_the_same(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    one_arm = set_options("training.arms=[{name: fm, hvp_weight: 0.0}]")
    for stage in STAGES:
        result = call_cli(stage, DEMO, "--out", out, *one_arm)
        assert result.status == 0, result.err

    def normalise(folder: Path) -> set[str]:
        names = (re.sub(r"events\.out.*", "events", n) for n in list_files(folder))
        return {n for n in names if "hvp" not in n.replace("hvps", "")}

    assert normalise(out) == normalise(finished)
    assert_same_arrays(out / "frames" / "ala.zarr", finished / "frames" / "ala.zarr")
    assert_same_arrays(out / "datasets" / "ala.zarr", finished / "datasets" / "ala.zarr")
    # Training is seeded and runs on one thread here.
    for name in ("val_loss", "train_loss"):
        curves = [[e[name] for e in read_json(f / "models/fm/training.json")["curves"]] for f in (out, finished)]
        assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("label", "sample"), ("train", "label"), ("export", "train"), ("simulate", "export"), ("compare", "sample")],
)
def test_stage_before_its_inputs(study: Path, stage: str, missing: str) -> None:
    needed = {"sample": "frames", "label": "datasets", "train": "models", "export": "models", "simulate": "cg"}
    shutil.rmtree(study / "report")
    for done in STAGES[STAGES.index(missing) : -1]:
        shutil.rmtree(study / needed[done], ignore_errors=True)
    result = call_cli(stage, DEMO, "--out", study, *set_options())
    assert result.status == 2
    assert re.search(
        rf"error: .*the {missing} stage of \S+ has not been run\. Run {missing} first$", result.err.strip()
    )
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("temperature_K=310", "temperature_K (300.0 -> 310.0)"),
        ("molecules.0.input.start=helix", "ala.input.start (extended -> helix)"),
        ("sampling.stride=25", "sampling.stride (20 -> 25)"),
        ("mapping.beads=ca", "-> ca)"),
        ("labels.seed=9", "labels.seed (2 -> 9)"),
        ("labels.force_map=slice", "labels.force_map (optimal_cv -> slice)"),
        ("priors.angles=false", "priors.angles (True -> False)"),
        ("model.features=16", "model.features (8 -> 16)"),
        ("training.learning_rate=0.01", "training.learning_rate (0.001 -> 0.01)"),
        ("simulation.n_steps=300", "simulation.n_steps (200 -> 300)"),
    ],
)
def test_changed_setting_is_refused(study: Path, setting: str, named: str) -> None:
    before = read_contents(study)
    result = call_cli("run", DEMO, "--out", study, *set_options(setting))
    assert result.status == 2
    assert named in result.err
    assert result.err.count("\n") == 1
    assert read_contents(study) == before


def test_setting_without_effect_is_accepted(study: Path) -> None:
    result = call_cli("run", DEMO, "--out", study, *set_options("labels.workers=1", "labels.platform=CPU"))
    assert result.status == 0, result.err


def test_changed_analysis_makes_the_report_again(study: Path) -> None:
    before = {k: v for k, v in read_contents(study).items() if not k.startswith(("report/", "stages/", "config"))}
    old = read_json(study / "report" / "summary.json")
    result = call_cli("run", DEMO, "--out", study, *set_options("analysis.lag_frames=2"))
    assert result.status == 0, result.err
    new = read_json(study / "report" / "summary.json")
    assert old["molecules"]["ala"]["reference"]["tica_lag_ps"] != pytest.approx(2 * 0.04)
    # Frames are 20 steps of 2 fs apart; the figures come from JSON as they are, so that only rounding remains.
    assert new["molecules"]["ala"]["reference"]["tica_lag_ps"] == pytest.approx(2 * 0.04)
    after = read_contents(study)
    assert {k: after[k] for k in before} == before
    assert yaml.safe_load((study / "config.resolved.yaml").read_text())["analysis"]["lag_frames"] == 2


def test_deleted_results_are_made_again_with_new_settings(study: Path) -> None:
    """What the refusal's hint says works; without deleting what depends on it too, it does not."""
    shutil.rmtree(study / "models" / "hvp")
    changed = set_options("training.seed=8", "training.arms=[{name: hvp, hvp_weight: 0.5}]")
    refused = call_cli("train", DEMO, "--out", study, *changed)
    assert refused.status == 2
    assert "simulate stage of hvp/ala" in refused.err
    assert "delete cg/hvp/ala" in refused.err
    shutil.rmtree(study / "cg" / "hvp")
    again = call_cli("train", DEMO, "--out", study, *changed)
    assert again.status == 0, again.err
    assert read_json(study / "models/hvp/training.json")["metrics"]["hvp_weight"] == 0.5


def test_two_runs_at_once(study: Path, tmp_path: Path) -> None:
    import fcntl

    with open(study / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        result = call_cli("run", DEMO, "--out", study, *set_options())
    assert result.status == 2
    assert "another run is using this folder" in result.err


def test_check_potential(study: Path) -> None:
    result = call_cli(
        "check-potential",
        study / "models/fm/potential.pt",
        study / "cg/fm/ala/topology.pdb",
        options=Options(columns=120),
    )
    assert result.status == 0, result.err
    assert "FAILED" not in result.out
    assert result.out.count("ok") >= 10
