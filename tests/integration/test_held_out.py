"""What is held out is held out of everything: a test molecule leaves no trace in what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_process import call_cli
from conftest import set_options

from openmm_hvpcg.study.reporting import describe_roles
from openmm_hvpcg.training.fit import FitResult, load_fit

ARMS = ("fm", "hvp")
STAGES = ("sample", "label", "train")


def describe_molecule(name: str, role: str, sequence: str) -> dict[str, Any]:
    return {"name": name, "role": role, "input": {"sequence": sequence, "solvent": "vacuum"}}


TRAINED = [describe_molecule("one", "train", "AG"), describe_molecule("two", "both", "GAA")]
#: More beads, other frames, and the same species.
UNSEEN = describe_molecule("unseen", "test", "AGGA")


def train(folder: Path, molecules: list[dict[str, Any]], *stages: str) -> dict[str, FitResult]:
    content = {"molecules": molecules, "mapping": {"beads": "ca+caps"}, "priors": {"min_molecules": 2}}
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    for stage in stages:
        result = call_cli(stage, folder / "p.yaml", "--out", folder / "out", *set_options("simulation.timestep_fs=1"))
        assert result.status == 0, result.err
    return {arm: load_fit(folder / "out/models" / arm) for arm in ARMS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, FitResult]]:
    """Trained on two molecules, judged on one of them and on one held out, up to the report."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", train(folder, [UNSEEN, *TRAINED], "run")


def take_apart(fit: FitResult) -> dict[str, Any]:
    """All that was trained and chosen: everything of a result but the time it took."""
    spec = json.loads(fit.spec.to_json())
    for figures in (spec["metrics"], fit.metrics):
        figures.pop("wall_time_s", None)
    return {"spec": spec, "metrics": fit.metrics, "curves": fit.curves}


def have_equal_weights(a: FitResult, b: FitResult) -> bool:
    first, second = a.network.state_dict(), b.network.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def test_without_the_test_molecule_all_is_the_same_to_the_bit(whole: tuple[Path, dict[str, FitResult]], tmp_path: Path):
    """Priors, scales, weights, curves and the epoch that was chosen, in both arms, all made anew."""
    fits = train(tmp_path, TRAINED, *STAGES)
    for arm in ARMS:
        assert take_apart(fits[arm]) == take_apart(whole[1][arm]), arm
        assert have_equal_weights(fits[arm], whole[1][arm]), arm


def test_another_training_molecule_changes_them(whole: tuple[Path, dict[str, FitResult]], tmp_path: Path):
    """The same comparison does find a change where there is one."""
    fits = train(tmp_path, [UNSEEN, describe_molecule("one", "train", "GA"), TRAINED[1]], *STAGES)
    for arm in ARMS:
        assert fits[arm].spec.priors != whole[1][arm].spec.priors
        assert fits[arm].curves != whole[1][arm].curves
        assert not have_equal_weights(fits[arm], whole[1][arm])


def test_the_report_says_what_was_held_out(whole: tuple[Path, dict[str, FitResult]]):
    page = (whole[0] / "report/report.html").read_text()
    assert "Trained on one, two. Held out: unseen; the priors, the normalisation, the training" in page
    assert "Not held out, for they were trained on as well: two." in page
    provenance = json.loads((whole[0] / "report/summary.json").read_text())["provenance"]
    assert provenance["trained_on"] == ["one", "two"]
    assert provenance["held_out"] == ["unseen"]


@pytest.mark.parametrize(
    ("trained", "judged", "twins", "said", "unsaid"),
    [
        (["a"], ["t"], {}, "Held out: t;", "as well"),
        (["a", "b"], ["b", "t"], {}, "trained on as well: b.", "Held out: b"),
        (["a"], ["a"], {}, "No molecule was held out", "Held out: "),
        (["a"], ["t"], {"t": "a"}, "But t has the same beads as a", "No molecule"),
    ],
)
def test_words(trained: list[str], judged: list[str], twins: dict[str, str], said: str, unsaid: str):
    text = describe_roles(trained, judged, twins)
    assert text.startswith(f"Trained on {', '.join(trained)}.")
    assert said in text
    assert unsaid not in text
    assert describe_roles([], judged) == ""
