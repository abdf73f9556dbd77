"""The script that judges each molecule on a potential trained on all the others."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_process import REPOSITORY

SCRIPT = REPOSITORY / "protocols" / "fast_folders" / "leave_one_out.py"
PROTOCOL: dict[str, Any] = {
    "molecules": [
        {"name": name, "role": role, "input": {"sequence": sequence, "solvent": "vacuum"}}
        for name, role, sequence in (("one", "train", "AGA"), ("two", "train", "GAG"), ("three", "test", "AAG"))
    ],
    "sampling": {"n_frames": 40, "stride": 10, "equilibration_steps": 50, "platform": "Reference"},
    "labels": {"probes_per_frame": 1, "platform": "Reference"},
    "model": {"features": 4, "interactions": 1, "radial": 4},
    "training": {"arms": [{"name": "fm", "hvp_weight": 0.0}], "max_epochs": 1},
    "simulation": {"replicas": 2, "n_steps": 100, "save_every": 5, "platform": "Reference"},
}


@pytest.fixture
def leave_one_out() -> Callable[[Sequence[str]], None]:
    """Runs the script as its command line would."""
    spec = importlib.util.spec_from_file_location("leave_one_out", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[Sequence[str]], None] = module.main
    return main


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_each_is_left_out(leave_one_out: Callable[[Sequence[str]], None], tmp_path: Path) -> None:
    protocol, out = tmp_path / "protocol.yaml", tmp_path / "out"
    protocol.write_text(yaml.safe_dump(PROTOCOL))
    words = ["--protocol", str(protocol), "--out", str(out), "--set", "model.radial=5"]
    leave_one_out([*words, "--molecules", "two"])
    # Two was to be trained on in the protocol, and three was not to be labelled.
    trained = read_json(out / "two" / "stages" / "train.fm.json")
    assert trained["molecules trained on"] == ["one", "three"]
    assert trained["model.radial"] == 5
    assert [p.name for p in (out / "two" / "cg" / "fm").iterdir()] == ["two"]
    first = read_json(out / "leave_one_out.json")
    assert first["two"]["arms"]["fm"]["kl_tica1"] >= 0
    # Another one joins it, from the same frames and labels.
    made = {p: p.stat().st_mtime_ns for p in (out / "data").rglob("c/*")}
    assert made
    leave_one_out([*words, "--molecules", "three"])
    both = read_json(out / "leave_one_out.json")
    assert set(both) == {"two", "three"}
    assert both["two"] == first["two"]
    assert read_json(out / "three" / "stages" / "train.fm.json")["molecules trained on"] == ["one", "two"]
    assert {p: p.stat().st_mtime_ns for p in (out / "data").rglob("c/*")} == made
    with pytest.raises(SystemExit, match="no molecule four"):
        leave_one_out([*words, "--molecules", "four"])
