"""A study whose CG runs swap temperatures: simulated, weighted, reported; nothing before it is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mdtraj as md
from cli_process import call_cli
from conftest import DEMO, set_options

EXCHANGE = ("simulation.exchange.temperatures=2", "simulation.exchange.hottest_K=330", "simulation.exchange.every=10")


def test_exchange_in_a_study(study: Path) -> None:
    shutil.rmtree(study / "cg")
    before = (study / "models" / "fm" / "training.json").stat().st_mtime_ns
    result = call_cli("run", DEMO, "--out", study, *set_options(*EXCHANGE))
    assert result.status == 0, result.out + result.err
    assert (study / "models" / "fm" / "training.json").stat().st_mtime_ns == before
    summary = json.loads((study / "report" / "summary.json").read_text())["molecules"]
    for name, molecule in summary.items():
        for arm, figures in molecule["arms"].items():
            assert figures["status"] == "ok"
            assert figures["temperatures_K"] == [300.0, 330.0]
            assert 0 < figures["swap_acceptance"][0] <= 1
            # Two replicas of 20 frames, a tenth of each is burn-in.
            assert figures["n_frames"] == 36
            assert 5 < figures["n_effective_frames"] <= 36
            folder = study / "cg" / arm / name
            for replica in ("replica_000.dcd", "replica_001.dcd"):
                assert len(md.load(str(folder / replica), top=folder / "topology.pdb")) == 20
    assert "replica exchange at 300, 330 K" in (study / "report" / "report.html").read_text()
