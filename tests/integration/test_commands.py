"""The small commands: doctor, config, version, help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from cli_process import call_cli
from conftest import DEMO

from openmm_hvpcg import __version__
from openmm_hvpcg.config import Protocol


def test_doctor_finds_that_production_can_run() -> None:
    result = call_cli("doctor")
    assert result.status == 0, result.out + result.err
    for word in ("openmm", "torch", "TorchForce", "PythonForce", "Reference"):
        assert word in result.out


def test_config() -> None:
    defaults = call_cli("config", "--defaults")
    assert defaults.status == 0
    sections = yaml.safe_load(defaults.out)
    assert set(sections) == set(Protocol.model_fields)
    assert sections["sampling"]["n_frames"] == Protocol.model_fields["sampling"].default.n_frames
    resolved = call_cli("config", DEMO, "--set", "labels.seed=77")
    assert resolved.status == 0
    assert yaml.safe_load(resolved.out)["labels"]["seed"] == 77
    empty = call_cli("config")
    assert empty.status == 2
    assert "Give --defaults" in empty.err


def test_python_dash_m(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "openmm_hvpcg", *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)

    helped = call("--help")
    assert helped.returncode == 0
    stages = ("sample", "label", "reference", "train", "export", "evaluate", "simulate", "compare")
    for command in ("run", *stages, "doctor", "check-potential"):
        assert command in helped.stdout
    version = call("--version")
    assert (version.returncode, version.stdout) == (0, f"openmm-hvpcg {__version__}\n")
    wrong = call("simulat")
    assert wrong.returncode == 2
    assert "simulat" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    missing = call("run", "p.yaml")
    assert missing.returncode == 2
    assert "--out" in missing.stderr
