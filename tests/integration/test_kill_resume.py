"""SIGKILL in the middle of each long stage; the same command again finishes with nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from cli_process import Command, Options, call_cli
from conftest import DEMO, set_options

#: Far shorter than in production, so that tests of seconds hold several checkpoints.
OFTEN = Options(checkpoint_seconds=0.1)


def read_array(store: Path, name: str) -> Any:
    return zarr.open_group(str(store), mode="r")[name][...]


def run(stage: str, out: Path, settings: list[str]) -> None:
    result = call_cli(stage, DEMO, "--out", out, *settings, options=OFTEN)
    assert result.status == 0, result.err


def forget(study: Path, *folders: str) -> None:
    """Take results away; the hint of a refusal promises that this is enough to make them anew."""
    for folder in folders:
        shutil.rmtree(study / folder, ignore_errors=True)


def test_sampling(tmp_path: Path) -> None:
    settings = set_options("sampling.n_frames=120", "sampling.stride=250")
    out, whole = tmp_path / "killed", tmp_path / "whole"
    store = out / "frames" / "ala.zarr"
    command = Command(["sample", DEMO, "--out", out, *settings], OFTEN)
    command.kill_when(lambda: 0 < read_array(store, "done").sum() < 120)
    done = read_array(store, "done").astype(bool)
    kept = read_array(store, "positions")[done]
    refused = call_cli("sample", DEMO, "--out", out, *settings, "--set", "sampling.seed=5")
    assert refused.status == 2
    assert "sampling.seed (1 -> 5)" in refused.err
    run("sample", out, settings)
    np.testing.assert_array_equal(read_array(store, "positions")[done], kept)
    run("sample", whole, settings)
    # On the Reference platform, bit for bit (promised by sample_frames).
    for name in ("positions", "walker", "done"):
        np.testing.assert_array_equal(read_array(store, name), read_array(whole / "frames/ala.zarr", name))


def test_labels(study: Path, tmp_path: Path) -> None:
    # 80 frames are two chunks; 100 probes make each long enough to be killed in.
    settings = set_options("labels.probes_per_frame=100")
    forget(study, "datasets", "models", "cg")
    whole = Path(shutil.copytree(study, tmp_path / "whole"))
    store = study / "datasets" / "ala.zarr"
    command = Command(["label", DEMO, "--out", study, *settings])
    command.kill_when(lambda: 0 < read_array(store, "done").sum() < 80)
    done = read_array(store, "done").astype(bool)
    kept = {name: read_array(store, name)[done] for name in ("forces", "hvps", "probes")}
    chunk = store / "hvps" / "c" / "0" / "0" / "0" / "0"
    written = chunk.stat().st_mtime_ns
    refused = call_cli("label", DEMO, "--out", study, *settings, "--set", "mapping.beads=heavy")
    assert refused.status == 2
    assert "-> heavy)" in refused.err
    run("label", study, settings)
    assert chunk.stat().st_mtime_ns == written
    for name, values in kept.items():
        np.testing.assert_array_equal(read_array(store, name)[done], values)
    run("label", whole, settings)
    for name in ("positions", "forces", "probes", "hvps", "done", "frame"):
        np.testing.assert_array_equal(read_array(store, name), read_array(whole / "datasets/ala.zarr", name))


@pytest.mark.parametrize(("arm", "patience"), [("fm", 2), ("hvp", 200)])
def test_training(study: Path, tmp_path: Path, arm: str, patience: int) -> None:
    """With a patience of 2 the learning rate is lowered on the way; with 200 never."""
    arms = {"fm": "{name: fm, hvp_weight: 0.0}", "hvp": "{name: hvp, hvp_weight: 1.0}"}
    settings = set_options(f"training.arms=[{arms[arm]}]", "training.max_epochs=12", f"training.patience={patience}")
    forget(study, "models", "cg")
    whole = Path(shutil.copytree(study, tmp_path / "whole"))
    folder = study / "models" / arm
    command = Command(["train", DEMO, "--out", study, *settings])
    command.kill_when(lambda: count_epochs(folder) >= 3)
    assert not (folder / "training.json").exists()
    run("train", study, settings)
    assert "training resumes after epoch" in (study / "log.txt").read_text()
    run("train", whole, settings)
    killed, uninterrupted = (json.loads((f / "models" / arm / "training.json").read_text()) for f in (study, whole))
    assert len(uninterrupted["curves"]) == 13
    assert killed["curves"] == uninterrupted["curves"]
    assert killed["best"] == uninterrupted["best"]
    different = {k for k, v in killed["metrics"].items() if v != uninterrupted["metrics"][k]}
    assert different <= {"wall_time_s"}


def count_epochs(folder: Path) -> int:
    """Epochs in the log once there is a checkpoint to resume from."""
    if not (folder / "checkpoints" / "last.ckpt").exists():
        return 0
    return sum("," in line for line in (folder / "logs/csv/metrics.csv").read_text().splitlines()[1:]) // 2


def test_run_killed_in_simulation(study: Path, tmp_path: Path) -> None:
    """A ``run`` killed while it simulates the first arm: it goes on there, and what was finished is left alone."""
    settings = set_options("simulation.n_steps=1000")
    forget(study, "cg", "report")
    whole = Path(shutil.copytree(study, tmp_path / "whole"))
    folder = study / "cg" / "fm" / "ala"
    command = Command(["run", DEMO, "--out", study, *settings], OFTEN)
    command.kill_when((folder / "checkpoint.npz").exists)
    assert not (folder / "result.json").exists()
    potential = (study / "models/fm/potential.pt").stat().st_mtime_ns
    run("run", study, settings)
    assert "going on from step" in (study / "log.txt").read_text()
    assert (study / "models/fm/potential.pt").stat().st_mtime_ns == potential
    summary = json.loads((study / "report/summary.json").read_text())
    assert {a: f["status"] for a, f in summary["molecules"]["ala"]["arms"].items()} == {"fm": "ok", "hvp": "ok"}
    run("simulate", whole, [*settings, "--set", "training.arms=[{name: fm, hvp_weight: 0.0}]"])
    # On the Reference platform, bit for bit (promised by simulate); the header of a DCD holds the time of day.
    for name, start in (("replica_000.dcd", 276), ("replica_001.dcd", 276), ("energies.csv", 0)):
        assert (folder / name).read_bytes()[start:] == (whole / "cg/fm/ala" / name).read_bytes()[start:], name
