"""Table and plots of the accuracy study, from the ``results.json`` of each molecule.

python protocols/accuracy/report.py runs/accuracy/alanine runs/accuracy/pentapeptide --out benchmarks/results/accuracy
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

Runs = list[dict[str, Any]]
COLOURS = {
    "fm": "tab:blue",
    "hvp slice": "tab:gray",
    "hvp optimal": "tab:green",
    "best": "tab:red",
    "best averaged": "tab:purple",
}
FIGURES = {
    "pmf_force_rmse": "PMF force error, kJ/mol/nm",
    "pmf_hvp_rmse": "PMF HVP error, kJ/mol/nm$^2$",
    "kl_tica1": "KL along the slowest mode, nats",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tables = []
    for folder in options.folders:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        name = content["molecule"]
        (options.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        plot_errors(content, options.out / f"{name}.png")
        tables.append(make_table(content))
    (options.out / "table.md").write_text("\n".join(tables), encoding="utf-8")


def group(runs: Runs) -> dict[str, dict[int, Runs]]:
    """Runs by arm and number of frames."""
    found: dict[str, dict[int, Runs]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run["arm"]][run["n_frames"]].append(run)
    return {arm: dict(sorted(found[arm].items())) for arm in COLOURS if arm in found}


def get_figure(run: dict[str, Any], key: str) -> float:
    """An error against the reference, or what a simulation gave; NaN where there is none, or it was unstable."""
    return float(run[key] if key in run else run.get("simulation", {}).get(key, np.nan))


def plot_errors(content: dict[str, Any], path: Path) -> None:
    """Figures against frames, AA force calls and training time: mean and range over seeds."""
    axes_of: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("frames", lambda run: run["n_frames"]),
        ("AA force calls (sampling and labels)", lambda run: run["force_calls"]),
        ("training, CPU s", lambda run: run["training_cpu_s"]),
    ]
    figure, axes = plt.subplots(len(FIGURES), 3, figsize=(13, 10), sharey="row", sharex="col", layout="constrained")
    arms = group(content["runs"])
    for row, (key, label) in zip(axes, FIGURES.items(), strict=True):
        for axis, (title, abscissa) in zip(row, axes_of, strict=True):
            for arm, sizes in arms.items():
                plot_arm(axis, arm, list(sizes.values()), key, abscissa)
            if key.startswith("pmf"):
                sizes = list(arms["fm"].values())
                priors = [np.mean([r[key.replace("pmf", "priors")] for r in runs]) for runs in sizes]
                x = [np.mean([abscissa(r) for r in runs]) for runs in sizes]
                axis.plot(x, priors, "k--", lw=1, label="priors alone")
            axis.set(xscale="log", yscale="log", ylabel=label if axis is row[0] else "")
            axis.set_xlabel(title if key == list(FIGURES)[-1] else "")
            axis.grid(alpha=0.3, which="both")
    floors = [r["simulation"]["kl_floor"] for r in content["runs"] if r.get("simulation", {}).get("stable")]
    for axis in axes[-1] if floors else ():
        axis.axhline(np.mean(floors), color="k", ls=":", lw=1, label="two halves of the reference")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{content['molecule']}: against the all-atom truth (mean and range of the seeds)")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_arm(axis: Any, arm: str, sizes: list[Runs], key: str, abscissa: Callable[[dict[str, Any]], float]) -> None:
    values = [[v for run in runs if np.isfinite(v := get_figure(run, key))] for runs in sizes]
    known = [k for k, v in enumerate(values) if v]
    x = [np.mean([abscissa(run) for run in sizes[k]]) for k in known]
    low, mean, high = ([f(values[k]) for k in known] for f in (min, np.mean, max))
    axis.plot(x, mean, "o-", ms=4, color=COLOURS[arm], label=arm)
    axis.fill_between(x, low, high, color=COLOURS[arm], alpha=0.15, lw=0)


def make_table(content: dict[str, Any]) -> str:
    """Markdown: mean of the seeds, and the change from FM at equal frames."""
    arms = group(content["runs"])
    lines = [
        f"### {content['molecule']}",
        "",
        "| frames | arm | seeds | PMF force error | against fm | PMF HVP error | against fm | network share"
        " | KL mode 1 | AA force calls | training, CPU s |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in sorted({run["n_frames"] for run in content["runs"]}):
        fm = arms.get("fm", {}).get(size, [])
        if fm:
            priors = [np.mean([r[f"priors_{k}_rmse"] for r in fm]) for k in ("force", "hvp")]
            change = [
                p / np.mean([r[f"pmf_{k}_rmse"] for r in fm]) - 1 for p, k in zip(priors, ("force", "hvp"), strict=True)
            ]
            lines.append(
                f"| {size} | priors alone | {len(fm)} | {priors[0]:.1f} | {change[0]:+.0%} | {priors[1]:.3g} |"
                f" {change[1]:+.0%} | | | | |"
            )
        lines += [make_row(arm, size, sizes[size], fm) for arm, sizes in arms.items() if size in sizes]
    return "\n".join([*lines, ""])


def make_row(arm: str, size: int, runs: Runs, fm: Runs) -> str:
    cells = [f"{size}", arm, f"{len(runs)}"]
    for key, form in (("pmf_force_rmse", ".1f"), ("pmf_hvp_rmse", ".3g")):
        values = [run[key] for run in runs]
        spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):{form}}{spread}")
        cells.append(f"{np.mean(values) / np.mean([run[key] for run in fm]) - 1:+.0%}" if fm else "-")
    cells.append(f"{np.mean([run['network_share'] for run in runs]):.2f}")
    simulated = [run["simulation"] for run in runs if "simulation" in run]
    stable = [s["kl_tica1"] for s in simulated if s["stable"]]
    shown = f"{np.mean(stable):.3f}" if stable else ""
    unstable = sum(not s["stable"] for s in simulated)
    cells.append(f"{shown} ({unstable} unstable)" if unstable else shown)
    cells += [f"{runs[0]['force_calls']:,}", f"{np.mean([run['training_cpu_s'] for run in runs]):.0f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
