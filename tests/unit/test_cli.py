"""The command line's own work: what is imported when, errors to exit statuses, the table of key figures."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openmm_hvpcg import cli
from openmm_hvpcg.errors import InputError, UnstableSimulationError


def call(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> int:
    """Exit status of ``main`` when the command raises."""

    def fail(**_: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (InputError("bad atoms", where="a.pdb"), 2, "error: a.pdb: bad atoms\n"),
        (UnstableSimulationError("blew up"), 1, "error: blew up\n"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to go on\n"),
        (OSError(errno.EIO, "Input/output error", "x.zarr"), 1, "error: x.zarr: Input/output error\n"),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    said: str,
) -> None:
    assert call(monkeypatch, raised) == status
    assert capsys.readouterr().err == said


def test_what_typer_returns_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It turns Ctrl-C and its own Exit into return values."""
    for status, said in ((130, "stopped; run the same command again to go on\n"), (1, "")):
        monkeypatch.setattr(cli, "app", lambda status=status, **_: status)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code, capsys.readouterr().err) == (status, said)


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_wrong_settings_are_found_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("molecules: 3\n")
    code = (
        "import sys\nfrom openmm_hvpcg import cli\n"
        f"sys.argv = ['openmm-hvpcg', 'run', {str(tmp_path / 'p.yaml')!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n"
        "    print(end.code, *{'torch', 'openmm', 'mdtraj', 'lightning'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2\n"


def build_summary(molecule: str, **arms: dict[str, Any]) -> dict[str, Any]:
    figures = {
        "status": "ok", "kl_tica1": 0.08407, "kl_tica1_error": 0.04667, "kl_tica12": 12.2288, "kl_tica12_error": 0.0547,
        "js_tica1": 0.02223, "js_tica1_error": 0.01163, "simulated_ns": 1.6, "steps_per_second": 624.9,
    }  # fmt: skip
    training = {
        "force_rmse_validation": 298.3, "force_noise": 286.2, "hvp_rmse_validation": 167610.7, "hvp_noise": None,
    }  # fmt: skip
    return {
        "molecules": {molecule: {"arms": {name: {**figures, **changes} for name, changes in arms.items()}}},
        "arms": dict.fromkeys(arms, training),
    }


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("columns")
def test_key_figures_fit_80_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = build_summary("ala", fm={}, hvp={})
    cli._show_figures(SimpleNamespace(report_folder=tmp_path), summary)
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "ala fm 0.084 ± 0.047 12.229 ± 0.055 0.022 ± 0.012" in lines
    assert "ala hvp 298 / 286 1.68e+05 / - 1.6 625" in lines
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert f"report:  {tmp_path / 'report.html'}" in out


PMF = {
    "pmf_force_rmse": 171.26, "pmf_force_rmse_error": 3.24, "pmf_hvp_rmse": 66012.0, "pmf_hvp_rmse_error": 412.0,
    "pmf_force_rmse_priors": 211.4, "pmf_force_rmse_priors_error": 2.13,
    "pmf_hvp_rmse_priors": 74123.0, "pmf_hvp_rmse_priors_error": None,
}  # fmt: skip


@pytest.mark.usefixtures("columns")
def test_errors_against_the_reference(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = build_summary("ala", fm=PMF, hvp={**PMF, "pmf_force_rmse": 150.0})
    other = build_summary("gly", fm=PMF, hvp={**PMF, "pmf_force_rmse_priors": 200.0})
    summary["molecules"] |= other["molecules"]
    evaluation = {"molecules": {name: {"arms": m["arms"]} for name, m in summary["molecules"].items()}}
    cli._show_figures(SimpleNamespace(report_folder=tmp_path), summary)
    after_run = capsys.readouterr().out
    cli._show_evaluation(SimpleNamespace(evaluation_path=tmp_path / "evaluation.json"), evaluation)
    after_evaluate = capsys.readouterr().out
    for out in (after_run, after_evaluate):
        rows = [" ".join(line.split()) for line in out.splitlines()]
        start = next(i for i, row in enumerate(rows) if row.startswith("Error against the PMF reference"))
        assert [row for row in rows[start:] if row.startswith(("ala", "gly"))] == [
            "ala priors alone 211.4 ± 2.1 7.41e+04",
            "ala fm 171.3 ± 3.2 66012 ± 412",
            "ala hvp 150.0 ± 3.2 66012 ± 412",
            "gly priors alone 211.4 ± 2.1 7.41e+04",
            "gly priors of hvp 200.0 ± 2.1 7.41e+04",
            "gly fm 171.3 ± 3.2 66012 ± 412",
            "gly hvp 171.3 ± 3.2 66012 ± 412",
        ]
        assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert f"figures: {tmp_path / 'evaluation.json'}" in after_evaluate


@pytest.mark.usefixtures("columns")
def test_no_table_without_a_reference(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli._show_figures(SimpleNamespace(report_folder=tmp_path), build_summary("ala", fm=dict.fromkeys(PMF), hvp={}))
    assert "PMF" not in capsys.readouterr().out


@pytest.mark.usefixtures("columns")
def test_long_names_fold_and_numbers_do_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    summary = build_summary("a_protein_of_some_length", an_arm_with_a_long_name={})
    cli._show_figures(SimpleNamespace(report_folder=tmp_path), summary)
    out = capsys.readouterr().out
    assert "12.229 ± 0.055" in out
    assert "298 / 286" in out
    assert "…" not in out


@pytest.mark.usefixtures("columns")
def test_an_arm_without_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = dict.fromkeys(("kl_tica1", "kl_tica12", "js_tica1", "simulated_ns", "steps_per_second"))
    summary = build_summary("ala", fm={**empty, "status": "unstable"}, hvp={**empty, "status": "missing"})
    del summary["arms"]["hvp"]
    cli._show_figures(SimpleNamespace(report_folder=tmp_path), summary)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "ala fm unstable - -" in lines
    assert "ala hvp missing - -" in lines
    assert "ala hvp - / - - / - - -" in lines
