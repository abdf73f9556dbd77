"""Training in two processes, and on labels read from files, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_process import call_cli
from conftest import DEMO, set_options


def read_curves(study: Path) -> dict[str, list[dict[str, float]]]:
    return {f.parent.name: json.loads(f.read_text())["curves"] for f in sorted(study.glob("models/*/training.json"))}


def test_train_in_two_processes_and_from_files(study: Path) -> None:
    """One after the other, in one command: two arms, each with its own processes and its own scratch files.

    The curves are those of the finished study, but for float32 sums in another order.
    """
    before = read_curves(study)
    for made in ("models", "cg", "report"):
        shutil.rmtree(study / made)
    result = call_cli(
        "train",
        DEMO,
        "--out",
        study,
        *set_options("training.devices=2", "training.memory_gb=1e-6", "training.accelerator=cpu"),
    )
    assert result.status == 0, result.err
    assert "[Gloo]" not in result.out + result.err
    after = read_curves(study)
    assert after.keys() == before.keys()
    for arm, curves in after.items():
        assert len(curves) == len(before[arm]) == 4
        for row, expected in zip(curves[1:], before[arm][1:], strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
    assert list(study.glob("models/*/scratch")) == []
    assert len(list(study.glob("models/*/logs/workers.log"))) == len(after)
