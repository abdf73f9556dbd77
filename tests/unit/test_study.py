"""The output folder of a study: records, changes, the lock, and what a refused run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openmm_hvpcg.errors import InputError, StudyError, UnstableSimulationError
from openmm_hvpcg.quiet import hide_c_output
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.study.folder import BEFORE, CONFIG_NAME, Study, open_study, read_record, take_folder

PROTOCOL = {
    "molecules": [
        {"name": "a", "input": {"pdb": "a.pdb"}},
        {"name": "t", "role": "test", "input": {"sequence": "G"}},
        {"name": "r", "role": "train", "input": {"sequence": "A"}},
    ],
    "training": {"arms": [{"name": "x"}, {"name": "y", "learning_rate": 0.5, "features": 8}]},
}


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    (tmp_path / "a.pdb").write_text("one")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(PROTOCOL))
    return tmp_path / "p.yaml"


@pytest.fixture
def study(protocol: Path) -> Study:
    return open_study(protocol, protocol.parent / "out")


def finish(study: Study, stage: str, unit: str) -> None:
    """As a stage does it: begin, write the output, finish."""
    study.mark_begun(stage, unit)
    for begun in (True, False):
        output = study.find_output(stage, unit, begun=begun)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    study.mark_done(stage, unit)


def test_roles_and_units(study: Study) -> None:
    assert [m.name for m in study.trained] == ["a", "r"]
    assert [m.name for m in study.judged] == ["a", "t"]
    assert study.list_units("label") == ["a", "r"]
    assert study.list_units("reference") == ["a", "t"]
    assert study.list_units("simulate") == ["x/a", "y/a", "x/t", "y/t"]


def test_opening_writes_nothing(protocol: Path) -> None:
    open_study(protocol, protocol.parent / "out")
    assert not (protocol.parent / "out").exists()


def test_done_needs_record_and_output(study: Study) -> None:
    assert not study.is_done("sample", "a")
    finish(study, "sample", "a")
    assert study.is_done("sample", "a")
    study.frames_path("a").unlink()
    assert not study.is_done("sample", "a")


@pytest.mark.parametrize(
    ("stage", "unit", "override", "changes"),
    [
        ("sample", "t", "sampling.seed=5", ["sampling.seed (1 -> 5)"]),
        ("sample", "t", "molecules.1.input.start=helix", ["t.input.start (extended -> helix)"]),
        ("sample", "t", "molecules.0.input.start=helix", []),
        ("sample", "t", "labels.seed=5", []),
        ("sample", "t", "sampling.platform=CPU", []),
        ("sample", "t", "sampling.flexible_beads=true", ["sampling.flexible_beads (False -> True)"]),
        ("sample", "t", "mapping.beads=heavy", []),
        ("label", "a", "mapping.beads=heavy", ["mapping.beads (ca -> heavy)"]),
        ("reference", "t", "reference.n_frames=3", ["reference.n_frames (64 -> 3)"]),
        ("reference", "t", "mapping.beads=heavy", ["mapping.beads (ca -> heavy)"]),
        ("reference", "t", "reference.workers=3", []),
        ("reference", "t", "labels.seed=5", []),
        ("label", "a", "labels.workers=3", []),
        ("train", "x", "labels.seed=5", ["labels.seed (2 -> 5)"]),
        ("train", "x", "model.features=9", ["model.features (64 -> 9)"]),
        ("train", "y", "model.features=9", []),
        (
            *("train", "x", "molecules.2.role=test"),
            # With one molecule left no prior can ask for two.
            ["priors.min_molecules (2 -> 1)", "molecules trained on (['a', 'r'] -> ['a'])"],
        ),
        ("train", "x", "priors.min_molecules=1", ["priors.min_molecules (2 -> 1)"]),
        ("train", "x", "priors.min_molecules=9", []),
        ("train", "x", "training.arms.1.learning_rate=0.1", []),
        ("simulate", "x/t", "training.seed=5", ["training.seed (3 -> 5)"]),
        ("simulate", "x/t", "simulation.n_steps=500", ["simulation.n_steps (100000 -> 500)"]),
        ("simulate", "x/t", "analysis.bins=7", []),
    ],
)
def test_changes(study: Study, protocol: Path, stage: str, unit: str, override: str, changes: list[str]) -> None:
    finish(study, stage, unit)
    fresh = protocol.parent / "fresh"
    changed = open_study(protocol, fresh, [override])
    assert Study(changed.protocol, study.base, study.out).find_changes(stage, unit) == changes


def test_flexible_beads_make_frames_depend_on_the_mapping(study: Study, protocol: Path) -> None:
    def change(*overrides: str) -> Study:
        opened = open_study(protocol, protocol.parent / "fresh", ["sampling.flexible_beads=true", *overrides])
        return Study(opened.protocol, study.base, study.out)

    finish(change(), "sample", "t")
    assert change().find_changes("sample", "t") == []
    assert change("mapping.beads=heavy").find_changes("sample", "t") == ["mapping.beads (ca -> heavy)"]


def test_what_is_flattened_depends_on_the_mapping(study: Study, protocol: Path) -> None:
    """Molecules that are not only trained on know nothing of it."""

    def change(*overrides: str) -> Study:
        opened = open_study(protocol, protocol.parent / "fresh", overrides)
        return Study(opened.protocol, study.base, study.out)

    for name in ("r", "t", "a"):
        finish(study, "sample", name)
    assert change("sampling.flatten=0.5").find_changes("sample", "r") == ["sampling.flatten (0.0 -> 0.5)"]
    for name in ("t", "a"):
        assert change("sampling.flatten=0.5", "mapping.beads=heavy").find_changes("sample", name) == []
    finish(change("sampling.flatten=0.5"), "sample", "r")
    assert change("sampling.flatten=0.5").find_changes("sample", "r") == []
    changes = change("sampling.flatten=0.5", "mapping.beads=heavy").find_changes("sample", "r")
    assert changes == ["mapping.beads (ca -> heavy)"]


def test_records_of_older_versions(study: Study, protocol: Path) -> None:
    """Before there was a choice, constraints stayed: such frames are not those of flexible beads."""
    finish(study, "label", "a")
    path = study._record_path("label", "a")
    old = {k: v for k, v in read_record(path).items() if k not in BEFORE}
    later = ("training.", "model.", "reference.", "priors.", "simulation.")
    assert len(old) == len(read_record(path)) - sum(not key.startswith(later) for key in BEFORE)
    write_json(path, old)
    assert study.find_changes("label", "a") == []
    assert study.is_done("label", "a")
    opened = open_study(protocol, protocol.parent / "fresh", ["sampling.flexible_beads=true"])
    changed = Study(opened.protocol, study.base, study.out)
    assert changed.find_changes("label", "a") == ["sampling.flexible_beads (False -> True)"]


@pytest.mark.parametrize("role", ["train", "test"])
def test_priors_of_older_versions(protocol: Path, role: str) -> None:
    """They were fitted for every combination of species: with one molecule they still are, with more no longer."""
    study = open_study(protocol, protocol.parent / "out", [f"molecules.2.role={role}"])
    finish(study, "train", "x")
    path = study._record_path("train", "x")
    write_json(path, {k: v for k, v in read_record(path).items() if k != "priors.min_molecules"})
    assert study.find_changes("train", "x") == (["priors.min_molecules (1 -> 2)"] if role == "train" else [])


def test_a_reference_that_is_there_suits_a_protocol_without_the_section(study: Study, protocol: Path) -> None:
    def change(*overrides: str) -> Study:
        opened = open_study(protocol, protocol.parent / "fresh", list(overrides))
        return Study(opened.protocol, study.base, study.out)

    finish(change("reference.n_frames=3"), "reference", "t")
    assert study.find_changes("reference", "t") == []
    assert study.is_done("reference", "t")
    assert change("reference={}").find_changes("reference", "t") == ["reference.n_frames (3 -> 64)"]
    assert change("temperature_K=310").find_changes("reference", "t") == ["temperature_K (300.0 -> 310.0)"]


def test_the_evaluation_follows_what_it_is_made_from(study: Study) -> None:
    for stage, units in (("reference", ["a", "t"]), ("train", ["x", "y"])):
        for unit in units:
            finish(study, stage, unit)
    header = study.reference_path("t") / "zarr.json"
    study.reference_path("t").unlink()
    header.parent.mkdir()
    header.write_text("one")
    finish(study, "compare", "report")
    finish(study, "evaluate", "evaluation")
    assert study.is_done("evaluate", "evaluation")
    assert not study.is_done("compare", "report")
    finish(study, "compare", "report")
    header.write_text("another")
    assert not study.is_done("evaluate", "evaluation")
    assert not study.is_done("compare", "report")
    finish(study, "evaluate", "evaluation")
    study.find_output("train", "y").write_text("trained again")
    assert not study.is_done("evaluate", "evaluation")


@pytest.mark.parametrize("content", ["{", '{"format": "openmm-hvpcg/evaluation", "format_version": 99}', "{}"])
def test_a_damaged_evaluation(study: Study, content: str) -> None:
    from openmm_hvpcg.study.evaluating import read_evaluation

    finish(study, "evaluate", "evaluation")
    study.evaluation_path.write_text(content)
    with pytest.raises(StudyError, match=r"evaluation\.json"):
        read_evaluation(study)


def test_a_changed_input_file(study: Study) -> None:
    finish(study, "sample", "a")
    assert study.find_changes("sample", "a") == []
    (study.base / "a.pdb").write_text("another")
    assert study.find_changes("sample", "a") == ["file a.pdb (its contents changed)"]
    (study.base / "a.pdb").unlink()
    assert study.find_changes("sample", "a") == ["file a.pdb (missing)"]


def test_a_changed_file_that_a_topology_includes(study: Study, protocol: Path) -> None:
    (study.base / "a.top").write_text('#include "ff/types.itp"\n')
    (study.base / "ff").mkdir()
    (study.base / "ff" / "types.itp").write_text("one")
    content = {**PROTOCOL, "molecules": [{"name": "g", "input": {"top": "a.top", "coordinates": "a.gro"}}]}
    protocol.write_text(yaml.safe_dump(content))
    opened = open_study(protocol, study.out)
    finish(opened, "sample", "g")
    assert opened.find_changes("sample", "g") == []
    (study.base / "ff" / "types.itp").write_text("another")
    assert opened.find_changes("sample", "g") == ["file ff/types.itp (its contents changed)"]


def test_frames_chosen_before_there_was_a_choice(study: Study, protocol: Path) -> None:
    """All were taken. Those chosen by cluster depend on the beads."""
    key, fresh = "molecules.2.input.trajectory", protocol.parent / "fresh"

    def change(*overrides: str) -> Study:
        opened = open_study(protocol, fresh, [f"{key}=a.dcd", *overrides])
        return Study(opened.protocol, opened.base, study.out)

    finish(change(), "sample", "r")
    path = study._record_path("sample", "r")
    write_json(path, {k: v for k, v in read_record(path).items() if ".trajectory_" not in k or k.endswith("_ps")})
    assert change().find_changes("sample", "r") == []
    chosen = change(f"{key}_frames=9", f"{key}_choice=cluster")
    assert chosen.find_changes("sample", "r") == [
        "r.input.trajectory_frames (None -> 9)",
        "r.input.trajectory_choice (time -> cluster)",
    ]
    finish(chosen, "sample", "r")
    other = change(f"{key}_frames=9", f"{key}_choice=cluster", "mapping.beads=heavy")
    assert other.find_changes("sample", "r") == ["mapping.beads (ca -> heavy)"]


def test_what_was_begun_counts_once_it_has_an_output(study: Study, protocol: Path) -> None:
    """A run refused before it made anything may be tried with other settings; one that was killed may not."""
    study.mark_begun("sample", "t")
    other = open_study(protocol, protocol.parent / "fresh", ["sampling.seed=5"])
    changed = Study(other.protocol, study.base, study.out)
    assert changed.find_changes("sample", "t") == []
    study.frames_path("t").mkdir(parents=True)
    assert changed.find_changes("sample", "t") == ["sampling.seed (1 -> 5)"]
    # Begun anew after its results were deleted: the old record speaks no longer.
    study.frames_path("t").rmdir()
    finish(study, "sample", "t")
    changed.mark_begun("sample", "t")
    assert changed.find_changes("sample", "t") == []


def test_opening_names_the_change_and_the_way_out(study: Study, protocol: Path) -> None:
    with take_folder(study):
        finish(study, "simulate", "x/t")
    with pytest.raises(StudyError, match=r"simulation\.seed \(4 -> 9\).*delete cg/x/t to make it again"):
        open_study(protocol, study.out, ["simulation.seed=9"])


def test_export_and_report_follow_what_they_are_made_from(study: Study) -> None:
    finish(study, "train", "x")
    finish(study, "export", "x")
    finish(study, "compare", "report")
    assert study.is_done("export", "x")
    assert study.is_done("compare", "report")
    study.find_output("train", "x").write_text("trained again")
    assert not study.is_done("export", "x")
    assert not study.is_done("compare", "report")


def test_records_of_different_units_differ(study: Study) -> None:
    units = [("simulate", u) for u in ("a.b/c", "a/b.c")] + [("train", "a"), ("train", "a.begun"), ("train", "a/begun")]
    assert len({study._record_path(*u) for u in units}) == len(units)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_damaged_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StudyError, match=r"r\.json.*damaged"):
        read_record(tmp_path / "r.json")


def test_folder_is_held_by_one(study: Study) -> None:
    code = (
        "import sys\nfrom openmm_hvpcg.errors import StudyError\n"
        "from openmm_hvpcg.study.folder import open_study, take_folder\n"
        "try:\n    with take_folder(open_study(*sys.argv[1:])): print('taken')\n"
        "except StudyError as error: print(error)\n"
    )
    words = [sys.executable, "-c", code, str(study.base / "p.yaml"), str(study.out)]

    def try_it() -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout

    with take_folder(study):
        assert "another run is using this folder" in try_it()
    assert try_it() == "taken\n"


@pytest.mark.parametrize("existed", [False, True])
def test_refused_run_leaves_nothing(study: Study, existed: bool) -> None:
    if existed:
        study.out.mkdir()

    def run() -> None:
        with take_folder(study):
            study.mark_begun("sample", "a")
            raise InputError("bad")

    with pytest.raises(InputError):
        run()
    assert study.out.exists() == existed
    assert not existed or not any(study.out.iterdir())


def test_failed_run_keeps_what_it_made(study: Study) -> None:
    with take_folder(study):
        finish(study, "sample", "a")
    with pytest.raises(UnstableSimulationError), take_folder(study):
        raise UnstableSimulationError("blew up")
    assert study.is_done("sample", "a")
    assert (study.out / CONFIG_NAME).exists()


def test_c_output_is_hidden_and_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before ")
    with hide_c_output():
        os.write(1, b"chatter")
        os.write(2, b"chatter")
    os.write(1, b"after")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("before after", "")
