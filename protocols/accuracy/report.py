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
FIGURES = {"pmf_force_rmse": "PMF force error, kJ/mol/nm", "pmf_hvp_rmse": "PMF HVP error, kJ/mol/nm$^2$"}


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


def plot_errors(content: dict[str, Any], path: Path) -> None:
    """Errors against frames and against AA force calls: mean and range over seeds."""
    axes_of: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("frames", lambda run: run["n_frames"]),
        ("AA force calls (sampling and labels)", lambda run: run["force_calls"]),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharey="row", layout="constrained")
    arms = group(content["runs"])
    for row, (key, label) in zip(axes, FIGURES.items(), strict=True):
        for axis, (title, abscissa) in zip(row, axes_of, strict=True):
            for arm, sizes in arms.items():
                x = [abscissa(runs[0]) for runs in sizes.values()]
                y = [[run[key] for run in runs] for runs in sizes.values()]
                axis.plot(x, [np.mean(v) for v in y], "o-", ms=4, color=COLOURS[arm], label=arm)
                axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=COLOURS[arm], alpha=0.15, lw=0)
            priors = {n: np.mean([r[key.replace("pmf", "priors")] for r in runs]) for n, runs in arms["fm"].items()}
            x = [abscissa(runs[0]) for runs in arms["fm"].values()]
            axis.plot(x, list(priors.values()), "k--", lw=1, label="priors alone")
            axis.set(xscale="log", yscale="log", xlabel=title, ylabel=label if axis is row[0] else "")
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{content['molecule']}: error against the PMF reference (mean and range of the seeds)")
    figure.savefig(path, dpi=80)
    plt.close(figure)


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
