"""The command line: parse, open the study, call one public function. Heavy imports wait until they are needed."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from openmm_hvpcg._version import __version__
from openmm_hvpcg.errors import ConfigError, HVPCGError

app = typer.Typer(
    name="openmm-hvpcg",
    help="Coarse-grained neural potentials by force and Hessian matching, from all-atom OpenMM to CG OpenMM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ProtocolArgument = Annotated[Path, typer.Argument(help="The protocol YAML of the study.", metavar="PROTOCOL.yaml")]
OutOption = Annotated[Path, typer.Option("--out", help="The output folder; a run that was stopped goes on there.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: section.key=value. May be repeated.")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Work on a Dask cluster: an address (tcp://host:8786), a scheduler file, or local for processes here.",
        metavar="ADDRESS",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes of --scheduler local; one a core without it.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, warnings only.")]

#: Exit status after Ctrl-C.
STOPPED = 130


def main() -> None:
    """Entry point: an error of ours is one line on standard error and its exit status."""
    try:
        # typer turns its Exit, and Ctrl-C, into what it returns.
        status = app(standalone_mode=False)
    except HVPCGError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        status = STOPPED
    except Exception as error:
        status = _explain_usage(error)
        if status is None:
            raise
    if status == STOPPED:
        _say("stopped; run the same command again to go on")
    if status:
        sys.exit(status)


def _explain_usage(error: Exception) -> int | None:
    """Exit status for what typer raises, its message shown; None for anything else."""
    if isinstance(error, OSError):
        _say(f"error: {error.filename or 'file system'}: {error.strerror or error}")
        return 1
    show = getattr(error, "show", None)
    if callable(show):
        show()
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ in ("Abort", "Exit"):
        return int(getattr(error, "exit_code", 1))
    return None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _run(
    protocol: Path,
    out: Path,
    overrides: list[str] | None,
    quiet: bool,
    stage: str | None,
    scheduler: str | None = None,
    workers: int | None = None,
) -> None:
    """Open the study and run one stage, or all, here or on a cluster."""
    _start_logging(quiet)
    from openmm_hvpcg.study.folder import open_study

    study = open_study(protocol, out, overrides or (), progress=not quiet)
    with _connect(scheduler, workers) as cluster:
        from openmm_hvpcg.study.stages import check_stable, run_stage, run_study

        study = dataclasses.replace(study, cluster=cluster)
        result = run_study(study) if stage is None else run_stage(study, stage)
    if stage in (None, "compare"):
        _show_figures(study, result)
    if stage == "evaluate":
        _show_evaluation(study, result)
    if stage is None:
        check_stable(study)


def _connect(scheduler: str | None, workers: int | None) -> AbstractContextManager[Any]:
    """The cluster to work on; None for this process alone."""
    if scheduler is None:
        if workers is not None:
            raise ConfigError("--workers goes with --scheduler local")
        return nullcontext()
    from openmm_hvpcg.study.cluster import connect_cluster

    return connect_cluster(scheduler, workers)


def _start_logging(quiet: bool) -> None:
    from rich.logging import RichHandler

    from openmm_hvpcg.progress import console

    handler = RichHandler(console=console, show_path=False, show_level=True, log_time_format="%H:%M:%S", markup=False)
    package = logging.getLogger("openmm_hvpcg")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    package.propagate = False


def _show_figures(study: Any, summary: dict[str, Any]) -> None:
    """The key figures as two tables that fit 80 columns, and where the report lies."""
    from rich.console import Console

    distances = _start_table(
        "Distance from the all-atom reference, nats ± block error", "KL mode 1", "KL modes 1-2", "JS mode 1"
    )
    runs = _start_table(
        "Validation error / label noise (kJ/mol, nm), and simulation", "forces", "HVPs", "ns", "steps/s"
    )
    for name, molecule in summary["molecules"].items():
        for arm, f in molecule["arms"].items():
            t = summary["arms"].get(arm, {})
            errors = [
                f"{_number(t.get(f'{k}_rmse_validation'))} / {_number(t.get(f'{k}_noise'))}" for k in ("force", "hvp")
            ]
            if f["status"] == "ok":
                figures = [_with_error(f, key) for key in ("kl_tica1", "kl_tica12", "js_tica1")]
            else:
                figures = [str(f["status"]), "-", "-"]
            distances.add_row(name, arm, *figures)
            runs.add_row(name, arm, *errors, _number(f.get("simulated_ns")), _number(f.get("steps_per_second")))
    console = Console()
    console.print(distances, runs)
    errors = _build_pmf_table({name: molecule["arms"] for name, molecule in summary["molecules"].items()})
    if errors is not None:
        console.print(errors)
    console.print(f"report:  {study.report_folder / 'report.html'}", soft_wrap=True)
    console.print(f"figures: {study.report_folder / 'summary.json'}", soft_wrap=True)


def _show_evaluation(study: Any, evaluation: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(_build_pmf_table({name: molecule["arms"] for name, molecule in evaluation["molecules"].items()}))
    console.print(f"figures: {study.evaluation_path}", soft_wrap=True)


def _build_pmf_table(molecules: dict[str, dict[str, dict[str, Any]]]) -> Any:
    """Errors against the PMF reference, each arm's beside its priors'; None where nothing was evaluated."""
    table = _start_table("Error against the PMF reference (kJ/mol, nm)", "mean forces", "HVPs")
    for name, arms in molecules.items():
        priors: list[tuple[str, str]] = []
        for arm, f in arms.items():
            alone = (_to_error(f, "pmf_force_rmse_priors"), _to_error(f, "pmf_hvp_rmse_priors"))
            # Arms mostly share their priors.
            if alone not in priors and f.get("pmf_force_rmse_priors") is not None:
                table.add_row(name, f"priors of {arm}" if priors else "priors alone", *alone)
                priors.append(alone)
        for arm, f in arms.items():
            if f.get("pmf_force_rmse") is not None:
                table.add_row(name, arm, _to_error(f, "pmf_force_rmse"), _to_error(f, "pmf_hvp_rmse"))
    return table if table.row_count else None


def _start_table(title: str, *headings: str) -> Any:
    """A table with a row for each molecule and arm; names may fold on a narrow terminal, numbers never do."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for heading in ("molecule", "arm"):
        table.add_column(heading, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _with_error(figures: dict[str, Any], key: str) -> str:
    value, error = figures.get(key), figures.get(f"{key}_error")
    return _number(value) if value is None or error is None else f"{value:.3f} ± {error:.3f}"


def _to_error(figures: dict[str, Any], key: str) -> str:
    """Value ± error in the value's unit, to the two digits that the error is known to."""
    value, error = figures.get(key), figures.get(f"{key}_error")
    if value is None or not error:
        return _number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


@app.command()
def run(
    protocol: ProtocolArgument,
    out: OutOption,
    set_: SetOption = None,
    quiet: QuietOption = False,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = None,
) -> None:
    """Run all stages, from the molecules to the report; finished parts are skipped."""
    _run(protocol, out, set_, quiet, None, scheduler, workers)


#: Stages whose molecules, arms and simulations can be spread over a cluster.
ON_CLUSTER = ("sample", "label", "reference", "train", "export", "simulate")


def _add_stage(name: str, summary: str) -> None:
    def command(protocol: ProtocolArgument, out: OutOption, set_: SetOption = None, quiet: QuietOption = False) -> None:
        _run(protocol, out, set_, quiet, name)

    def on_cluster(
        protocol: ProtocolArgument,
        out: OutOption,
        set_: SetOption = None,
        quiet: QuietOption = False,
        scheduler: SchedulerOption = None,
        workers: WorkersOption = None,
    ) -> None:
        _run(protocol, out, set_, quiet, name, scheduler, workers)

    chosen = on_cluster if name in ON_CLUSTER else command
    chosen.__doc__ = summary
    app.command(name)(chosen)


for _name, _summary in {
    "sample": "All-atom molecular dynamics, or frames from trajectories.",
    "label": "Projected forces and Hessian-vector products of the frames.",
    "reference": "True mean forces and CG Hessians, by sampling with the beads held still.",
    "train": "Fit priors and network, one model an arm.",
    "export": "Write and check each arm's potential file.",
    "evaluate": "Errors of the priors and of every arm against the reference.",
    "simulate": "Coarse-grained molecular dynamics with each potential.",
    "compare": "Compare with the all-atom reference; write report.html and summary.json.",
}.items():
    _add_stage(_name, _summary)


@app.command()
def doctor() -> None:
    """Check versions, platforms and backends; exit status 0 only if production can run here."""
    from rich.console import Console

    from openmm_hvpcg.doctor import render, run_doctor

    report = run_doctor()
    render(report, Console())
    if not report.production_ok:
        raise typer.Exit(1)


@app.command()
def config(
    protocol: Annotated[Path | None, typer.Argument(help="A protocol to validate and resolve.")] = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="Show every key, its default and meaning.")] = False,
    set_: SetOption = None,
) -> None:
    """Show all defaults, or a protocol with every default written out."""
    from openmm_hvpcg import config as settings
    from openmm_hvpcg.errors import ConfigError

    if defaults:
        typer.echo(settings.describe_defaults(), nl=False)
    elif protocol is not None:
        typer.echo(settings.dump_protocol(settings.load_protocol(protocol, set_ or ())), nl=False)
    else:
        raise ConfigError("nothing to show", hint="give --defaults, or a protocol YAML")


@app.command("check-potential")
def check_potential_command(
    potential: Annotated[Path, typer.Argument(help="A potential file.")],
    structure: Annotated[Path, typer.Argument(help="CG frames of its molecule (PDB, with bonds).")],
) -> None:
    """Verify a potential file: script = OpenMM, forces = -gradient, symmetries."""
    import mdtraj as md
    from rich.console import Console
    from rich.table import Table

    from openmm_hvpcg.errors import InputError
    from openmm_hvpcg.simulation import check_potential

    try:
        frames = md.load(str(structure)).xyz
    except Exception as error:
        raise InputError(f"cannot be read ({error})", where=structure) from error
    check = check_potential(potential, frames)
    table = Table("check", "value", "tolerance", "")
    for item in check.items:
        table.add_row(item.name, f"{item.value:.2e}", f"{item.tolerance:.0e}", "ok" if item.passed else "FAILED")
    Console().print(table)
    check.raise_if_failed(where=potential)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"openmm-hvpcg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""
