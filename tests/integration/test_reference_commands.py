"""The PMF reference and the evaluation against it, through the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_process import Command, Options, Result, call_cli
from conftest import DEMO, set_options

from openmm_hvpcg.analysis.summary import PMF_KEYS
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import bind_molecule, load_potential
from openmm_hvpcg.training.reference import load_reference

#: What a study with a reference needs, at the least cost. Heavy hydrogens: on flexible bonds they move at 2 fs.
FLEXIBLE = ("sampling.flexible_beads=true", "molecules.0.input.hydrogen_mass_amu=3")
SHORT = ("training.max_epochs=2", "simulation.n_steps=100", "sampling.n_frames=40")
REFERENCE = (
    "reference.n_frames=4",
    "reference.n_samples=24",
    "reference.hvp_every=2",
    "reference.blocks=4",
    "reference.platform=Reference",
)
#: One worker: within the command's own process, which here is a forked one; those do not end joblib's workers.
ALONE = "reference.workers=1"
SETTINGS = set_options(*FLEXIBLE, *SHORT, *REFERENCE, ALONE)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run(stage: str, out: Path, *settings: str, protocol: Path = DEMO) -> Result:
    result = call_cli(stage, protocol, "--out", out, *(settings or SETTINGS), options=Options(columns=80))
    assert result.status == 0, result.err
    return result


def refuse(stage: str, out: Path, *settings: str, protocol: Path = DEMO) -> Result:
    return call_cli(stage, protocol, "--out", out, "--quiet", *settings)


def assert_refused(result: Result, *words: str) -> None:
    assert result.status == 2, (result.status, result.err)
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A whole run with a reference by the installed command, on all cores, and what it said."""
    out = tmp_path_factory.mktemp("reference") / "study"
    script = Path(sys.executable).with_name("openmm-hvpcg")
    done = subprocess.run(
        [str(script), "run", str(DEMO), "--out", str(out), *set_options(*FLEXIBLE, *SHORT, *REFERENCE)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def study(shown: tuple[Path, Result], tmp_path: Path) -> Path:
    return Path(shutil.copytree(shown[0], tmp_path / "study"))


def compute_force_error(out: Path, arm: str, molecule: str) -> float:
    """From the exported potential, as simulations see it."""
    reference = load_reference(out / "references" / f"{molecule}.zarr")
    script, spec = load_potential(out / "models" / arm / "potential.pt")
    bind_molecule(script, spec, BeadMap.load(out / "mapping" / f"{molecule}.json"))
    x = torch.from_numpy(reference.positions).requires_grad_()
    forces = -torch.autograd.grad(script(x.reshape(-1, 3)), x)[0].numpy()
    return float(np.sqrt(np.mean((forces - reference.forces) ** 2) - np.mean(reference.force_errors**2)))


def test_run_evaluates(shown: tuple[Path, Result]) -> None:
    out, result = shown
    evaluation, summary = read_json(out / "evaluation.json"), read_json(out / "report" / "summary.json")
    assert (evaluation["format"], evaluation["format_version"]) == ("openmm-hvpcg/evaluation", 1)
    assert evaluation["units"]["energy"] == "kJ/mol"
    facts = evaluation["molecules"]["ala"]["reference"]
    assert (facts["configurations"], facts["probes"]) == (4, 18)
    assert 0 < facts["force_noise"] < facts["force_size"]
    arms = evaluation["molecules"]["ala"]["arms"]
    assert set(arms) == {"fm", "hvp"}
    for arm, figures in arms.items():
        assert set(figures) == set(PMF_KEYS)
        assert all(value > 0 for value in figures.values())
        # The script computes the network in float32, whose rounding is some 1e-6 of a force.
        assert figures["pmf_force_rmse"] == pytest.approx(compute_force_error(out, arm, "ala"), rel=1e-4)
        assert {k: summary["molecules"]["ala"]["arms"][arm][k] for k in PMF_KEYS} == figures
        assert re.search(rf"ala +{arm} +{figures['pmf_force_rmse']:.0f}", result.out)
    assert summary["provenance"]["references"] == {"ala": facts}
    assert "Error of the mean force and its curvature" in (out / "report" / "report.html").read_text()
    assert "priors alone" in result.out
    assert max(len(line) for line in result.out.splitlines() if str(out) not in line) <= 80
    # Reference before training, evaluation before the simulations, each once.
    log = (out / "log.txt").read_text()
    assert re.findall(r"stage (\w+): done", log) == [
        "sample", "label", "reference", "train", "export", "evaluate", "simulate", "compare",
    ]  # fmt: skip


def test_frames_are_of_the_system_without_constraints_on_beads(shown: tuple[Path, Result]) -> None:
    reference = load_reference(shown[0] / "references" / "ala.zarr")
    frames = reference.attributes["frames"]
    assert frames["system"]["lifted_constraints"] > 0
    assert reference.attributes["made_from"]["system_hash"] == frames["system_hash"]


def test_finished_parts_are_skipped(study: Path) -> None:
    def read() -> dict[str, bytes]:
        kept = (p for p in study.rglob("*") if p.is_file() and p.name not in ("log.txt", ".lock", "seconds.json"))
        return {str(p.relative_to(study)): p.read_bytes() for p in kept}

    before = read()
    run("run", study)
    run("evaluate", study)
    run("reference", study)
    # A protocol that says nothing of a reference takes the one there is.
    said = run("evaluate", study, *set_options(*FLEXIBLE, *SHORT))
    assert "priors alone" in said.out
    assert {k: v for k, v in read().items() if k != "config.resolved.yaml"} == {
        k: v for k, v in before.items() if k != "config.resolved.yaml"
    }
    log = (study / "log.txt").read_text()
    assert log.count("reference ala: done already, skipped") == 2
    assert log.count("evaluate evaluation: done already, skipped") == 3
    refused = refuse("evaluate", study, *SETTINGS, "--set", "reference.n_samples=30")
    assert_refused(refused, "reference stage of ala", "reference.n_samples (24 -> 30)", "delete references/ala.zarr")


def test_killed_and_resumed(study: Path, tmp_path: Path) -> None:
    import zarr

    whole, killed = study / "references" / "ala.zarr", tmp_path / "whole.zarr"
    shutil.move(whole, killed)
    whole, killed = killed, whole
    (study / "stages" / "reference.ala.json").unlink()
    (study / "evaluation.json").unlink()

    def count() -> int:
        return int(zarr.open_group(str(killed), mode="r")["done"][...].sum())  # type: ignore[union-attr]

    Command(["reference", DEMO, "--out", study, *SETTINGS]).kill_when(lambda: 0 < count() < 4)
    assert_refused(refuse("evaluate", study, *SETTINGS), "not finished", "it resumes")
    assert_refused(refuse("reference", study, *SETTINGS, "--set", "reference.seed=9"), "reference.seed (5 -> 9)")
    run("reference", study)
    a, b = load_reference(killed), load_reference(whole)
    for name in ("positions", "forces", "force_errors", "probes", "hvps", "hvp_errors"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_evaluated_again_when_a_training_changed(study: Path) -> None:
    before = read_json(study / "evaluation.json")["molecules"]["ala"]["arms"]
    for folder in ("models/hvp", "cg/hvp"):
        shutil.rmtree(study / folder)
    changed = set_options(
        *FLEXIBLE, *SHORT, *REFERENCE, ALONE, "training.arms.1.seed=8", "training.arms.1.learning_rate=0.01"
    )
    missing = refuse("evaluate", study, *changed)
    assert_refused(missing, "the train stage of hvp has not been run")
    # The old figures are of a model that is gone: they are in no report.
    run("compare", study, *changed)
    assert read_json(study / "report/summary.json")["molecules"]["ala"]["arms"]["fm"]["pmf_force_rmse"] is None
    run("train", study, *changed)
    run("evaluate", study, *changed)
    after = read_json(study / "evaluation.json")["molecules"]["ala"]["arms"]
    assert after["fm"] == before["fm"]
    assert after["hvp"]["pmf_force_rmse"] != before["hvp"]["pmf_force_rmse"]


def test_a_molecule_that_was_never_trained_on(tmp_path: Path) -> None:
    """The potentials are bound to its beads; it is judged as simulations would see it."""
    source = {"caps": True, "hydrogen_mass_amu": 3}
    content = {
        "molecules": [
            {"name": "two", "role": "train", "input": {"sequence": "AA", **source}},
            {"name": "one", "role": "test", "input": {"sequence": "A", **source}},
        ],
        "mapping": {"beads": "backbone"},
    }
    protocol, out = tmp_path / "p.yaml", tmp_path / "out"
    protocol.write_text(yaml.safe_dump(content))
    one_arm = "training.arms=[{name: fm, hvp_weight: 0.0, learning_rate: 0.01}]"
    settings = set_options("sampling.flexible_beads=true", *SHORT, *REFERENCE, ALONE, "reference.probes=2", one_arm)
    for stage in ("sample", "label", "train", "export", "reference", "evaluate"):
        run(stage, out, *settings, protocol=protocol)
    molecules = read_json(out / "evaluation.json")["molecules"]
    assert set(molecules) == {"one"}
    assert molecules["one"]["reference"]["probes"] == 2
    figures = molecules["one"]["arms"]["fm"]
    # As above.
    assert figures["pmf_force_rmse"] == pytest.approx(compute_force_error(out, "fm", "one"), rel=1e-4)


class TestBadInput:
    def test_constrained_beads_are_refused_before_anything_is_sampled(self, tmp_path: Path) -> None:
        result = refuse("run", tmp_path / "out", *set_options(*SHORT, *REFERENCE))
        assert_refused(result, "cannot be held", "takes part in a constraint", "sampling.flexible_beads: true")
        assert not (tmp_path / "out").exists()

    def test_frames_with_constrained_beads(self, finished: Path, tmp_path: Path) -> None:
        """The demo has no flexible beads: its frames cannot have a reference, and switching over is no way out."""
        out = Path(shutil.copytree(finished, tmp_path / "out"))
        result = refuse("reference", out, *set_options())
        assert_refused(result, "ala: bead", "takes part in a constraint", "sample again")
        assert not (out / "references").exists()
        switched = refuse("reference", out, *set_options("sampling.flexible_beads=true"))
        assert_refused(switched, "sampling.flexible_beads (False -> True)")

    def test_centre_of_mass_beads(self, tmp_path: Path) -> None:
        beads = [
            {"name": "B1", "species": "X", "mass_amu": 15.0, "atoms": [0, 1, 2, 3], "weights": [0.1, 0.7, 0.1, 0.1]},
            {"name": "B2", "species": "Y", "mass_amu": 12.0, "atoms": [8], "weights": [1.0]},
        ]
        (tmp_path / "map.json").write_text(json.dumps({"beads": beads, "bonds": []}))
        content = {
            "molecules": [{"name": "mol", "input": {"sequence": "A"}}],
            "mapping": {"beads": {"json": "map.json"}},
        }
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
        settings = set_options(*SHORT, *REFERENCE, "sampling.flexible_beads=true")
        result = refuse("run", tmp_path / "out", *settings, protocol=tmp_path / "p.yaml")
        assert_refused(result, "mol: bead 0 (B1) cannot be held", "expected a bead on one atom, got 4 atoms")
        assert not (tmp_path / "out").exists()

    def test_evaluate_before_its_inputs(self, study: Path) -> None:
        (study / "evaluation.json").unlink()
        shutil.rmtree(study / "references")
        result = refuse("evaluate", study, *SETTINGS)
        assert_refused(result, "the reference stage of ala has not been run. Run reference first")
        assert not (study / "evaluation.json").exists()
