"""Tables and plots of the study, from the results.json of `run.py study`.

    python protocols/unseen_peptides/report.py runs/unseen_peptides --out benchmarks/results/unseen_peptides

Several folders may be given, of sittings on different days or machines. Figures are means over seeds; their errors
combine the scatter of the seeds with the errors of each run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

from openmm_hvpcg.units import compute_kt

COLOURS = {
    "fm": "tab:blue",
    "hvp": "tab:red",
    "hvp_bonds": "tab:purple",
    "hvp_ratio": "tab:brown",
    "density": "tab:green",
    "hvp_density": "tab:orange",
}
NAMES = {
    "fm": "FM",
    "hvp": "FM + HVP",
    "hvp_bonds": "FM + HVP along bonds",
    "hvp_ratio": "FM + HVP, covariance: ratio",
    "density": "FM + density",
    "hvp_density": "FM + HVP + density",
}
#: Title of each column and where its figure lies in a run: observable, divergence.
COLUMNS = {
    "KL, mode 1": ("tica1", "kl"),
    "KL, modes 1 and 2": ("tica12", "kl"),
    "JS, mode 1": ("tica1", "js"),
    "JS, radius of gyration": ("radius_of_gyration", "js"),
    "JS, contacts": ("contacts", "js"),
}


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and its error; the floor is that of the reference."""

    value: float
    error: float
    floor: float
    n_seeds: int


class Results:
    """Figures of results.json by arm, frames and peptide."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.peptides: list[str] = content["test peptides"]
        self.runs = content["runs"]

    @property
    def sizes(self) -> list[int]:
        return sorted({r["n_frames"] for r in self.runs}, reverse=True)

    @property
    def arms(self) -> list[str]:
        return [a for a in COLOURS if any(r["arm"] == a for r in self.runs)]

    @property
    def others(self) -> list[str]:
        """What is compared with force matching alone."""
        return [a for a in self.arms if a != "fm"]

    def find(self, arm: str, size: int, peptide: str) -> list[dict[str, Any]]:
        """What there is of a peptide, a run a seed; unstable ones are left out here and counted by `count_unstable`."""
        chosen = [r for r in self.runs if r["arm"] == arm and r["n_frames"] == size and peptide in r["peptides"]]
        return [r["peptides"][peptide] for r in chosen if r["peptides"][peptide]["stable"]]

    def count_flat(self, size: int) -> int:
        """Frames on barriers of each training peptide, beside the others."""
        return int(max(r["fit"].get("n_frames_flat", 0) for r in self.runs if r["n_frames"] == size))

    def describe(self, size: int) -> str:
        flat = self.count_flat(size)
        return f"{size} frames of each training peptide{f', and {flat} on barriers' if flat else ''}"

    def count_runs(self, size: int) -> int:
        """Simulations of unseen peptides."""
        return sum(len(r["peptides"]) for r in self.runs if r["n_frames"] == size)

    def count_unstable(self, size: int) -> int:
        chosen = [r for r in self.runs if r["n_frames"] == size]
        return sum(not p["stable"] for r in chosen for p in r["peptides"].values())

    def average(self, arm: str, size: int, peptide: str, observable: str, kind: str) -> Mean | None:
        found = [r[observable] for r in self.find(arm, size, peptide) if r[observable] is not None]
        if not found:
            return None
        values = np.array([f[kind] for f in found])
        own = np.sqrt(np.mean([f[f"{kind}_error"] ** 2 for f in found]) / len(found))
        seeds = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        return Mean(float(values.mean()), float(max(own, seeds)), float(found[0][f"{kind}_floor"]), len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    content = merge([json.loads((f / "results.json").read_text(encoding="utf-8")) for f in options.folders])
    results = Results(content)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(make_tables(results), encoding="utf-8")
    plot_bars(results, options.out / "kl.png")
    plot_profiles(results, options.out / "profiles.png")
    if len(results.sizes) > 1:
        plot_efficiency(results, options.out / "efficiency.png")
    lines = [json.dumps(shorten(run)) for run in content.pop("runs")]
    head = json.dumps(shorten(content), indent=1)
    text = head.removesuffix("\n}") + ',\n "runs": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    (options.out / "results.json").write_text(text, encoding="utf-8")


def merge(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of all sittings; of what several have, the last."""
    runs: dict[tuple[str, int, int], dict[str, Any]] = {}
    for run in (r for content in contents for r in content["runs"]):
        key = run["arm"], run["n_frames"], run["seed"]
        before = runs.get(key, {})
        runs[key] = {**run, **{k: {**before.get(k, {}), **run[k]} for k in ("peptides", "trained peptides")}}
    return {**contents[-1], "runs": [runs[key] for key in sorted(runs)]}


def shorten(value: Any) -> Any:
    """Numbers with four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: shorten(v) for k, v in value.items()}
    return [shorten(v) for v in value] if isinstance(value, list) else value


def show(mean: Mean | None) -> str:
    return "-" if mean is None else f"{mean.value:.3f} ± {mean.error:.3f}"


def make_tables(results: Results) -> str:
    parts = []
    networks = {r["fit"].get("networks", 1) for r in results.runs}
    if max(networks) > 1:
        parts += [f"Every potential is the mean of {max(networks)} networks, trained from seeds of their own.", ""]
    for size in results.sizes:
        parts += [f"## {results.describe(size)}", *make_table(results, size, "KL, mode 1"), ""]
        for arm in results.others:
            if summary := summarize(results, size, arm):
                parts += [summary, ""]
        if results.count_runs(size):
            parts += [f"Unstable runs: {results.count_unstable(size)} of {results.count_runs(size)}.", ""]
    largest = results.sizes[0]
    parts += [f"## More figures, {results.describe(largest)}"]
    for title in list(COLUMNS)[1:]:
        parts += [f"### {title}", *make_table(results, largest, title), ""]
    parts += ["### Share of the CG frames beyond the range of the AA data along mode 1", *make_outside(results), ""]
    parts += [f"## Peptides that were trained on, {largest} frames", *make_trained(results, largest), ""]
    parts += ["## Sizes and contacts", *make_moments(results, largest), ""]
    parts += make_unseen_forces(results)
    parts += ["## Training", *make_training(results)]
    return "\n".join(parts) + "\n"


def make_table(results: Results, size: int, title: str) -> list[str]:
    observable, kind = COLUMNS[title]
    lines = [
        f"| peptide | slowest mode, ps | {' | '.join(NAMES[a] for a in results.arms)} | change | two halves of AA |",
        "|" + " --- |" * (4 + len(results.arms)),
    ]
    for peptide in results.peptides:
        means = {a: results.average(a, size, peptide, observable, kind) for a in results.arms}
        known = [m for m in means.values() if m is not None]
        if not known:
            continue
        fm = means.get("fm")
        change = ", ".join(
            "-" if not fm or not (m := means[a]) else f"{100 * (m.value / fm.value - 1):+.0f} %" for a in results.others
        )
        timescale = next(r["timescales_ps"][0] for a in results.arms for r in results.find(a, size, peptide))
        lines.append(
            f"| {peptide} | {timescale:.0f} | {' | '.join(show(m) for m in means.values())} | {change} |"
            f" {known[0].floor:.3f} |"
        )
    return lines


def summarize(results: Results, size: int, arm: str) -> str:
    """An arm beside force matching alone."""
    pairs = [
        (results.average("fm", size, p, "tica1", "kl"), results.average(arm, size, p, "tica1", "kl"))
        for p in results.peptides
    ]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        return ""
    ratios = np.array([b.value / a.value for a, b in both])
    sure = sum(abs(b.value - a.value) > 2 * np.hypot(a.error, b.error) for a, b in both)
    medians = [float(np.median([m.value for m in column])) for column in zip(*both, strict=True)]
    seeds = compare_seeds(results, size, arm)
    return (
        f"{NAMES[arm]} ahead of FM on {int((ratios < 1).sum())} of {len(both)} along mode 1 ({sure} differences beyond"
        f" two errors); median KL {medians[1]:.3f} (FM {medians[0]:.3f}), median ratio {np.median(ratios):.2f},"
        f" best {100 * (ratios.min() - 1):+.0f} %, worst {100 * (ratios.max() - 1):+.0f} %.{seeds}"
    )


def compare_seeds(results: Results, size: int, arm: str) -> str:
    """An arm beside force matching from the same seed, over all peptides: those of one seed err alike."""
    found = {
        (r["arm"], r["seed"]): {
            name: figures["tica1"]["kl"] for name, figures in r["peptides"].items() if figures["stable"]
        }
        for r in results.runs
        if r["n_frames"] == size
    }
    rows = [
        np.array([np.log(kl / found["fm", seed][name]) for name, kl in own.items() if name in found["fm", seed]])
        for (which, seed), own in sorted(found.items())
        if which == arm and ("fm", seed) in found
    ]
    rows = [row for row in rows if len(row)]
    if len(rows) < 2:
        return ""
    means = np.array([row.mean() for row in rows])
    error = means.std(ddof=1) / np.sqrt(len(means))
    ahead = ", ".join(str(int((row < 0).sum())) for row in rows)
    low, mean, high = np.exp(means.mean() + error * np.array([-1.0, 0.0, 1.0]))
    return (
        f" Of each seed by itself ahead on {ahead}; geometric mean of all ratios {mean:.2f} ({low:.2f} to {high:.2f}, a"
        f" standard error over {len(rows)} seeds)."
    )


def make_trained(results: Results, size: int) -> list[str]:
    """KL along mode 1 on peptides of the training set: what is left there is not for want of transfer."""
    runs = [r for r in results.runs if r["n_frames"] == size and r["trained peptides"]]
    lines = [
        f"| peptide | {' | '.join(NAMES[a] for a in results.arms)} | two halves of AA |",
        "|" + " --- |" * (2 + len(results.arms)),
    ]
    for peptide in sorted({name for r in runs for name in r["trained peptides"]}):
        cells, floor = [], 0.0
        for arm in results.arms:
            found = [r["trained peptides"].get(peptide) for r in runs if r["arm"] == arm]
            stable = [f["tica1"] for f in found if f is not None and f["stable"]]
            floor = stable[0]["kl_floor"] if stable else floor
            error = np.sqrt(np.mean([f["kl_error"] ** 2 for f in stable]) / len(stable)) if stable else 0.0
            cells.append(f"{np.mean([f['kl'] for f in stable]):.3f} ± {error:.3f}" if stable else "-")
        lines.append(f"| {peptide} | {' | '.join(cells)} | {floor:.3f} |")
    return lines


def make_outside(results: Results) -> list[str]:
    """What KL(AA || CG) does not see: states that only the CG model visits. Mean over seeds, with each seed's."""
    cases = [(arm, size) for size in results.sizes for arm in results.arms]
    lines = [
        f"| peptide | {' | '.join(f'{NAMES[arm]}, {size}' for arm, size in cases)} |",
        "|" + " --- |" * (1 + len(cases)),
    ]
    for peptide in results.peptides:
        cells = []
        for arm, size in cases:
            shares = [100 * run["tica1"]["outside"] for run in results.find(arm, size, peptide)]
            each = ", ".join(f"{s:.2f}" for s in shares)
            cells.append(f"{np.mean(shares):.2f} % ({each})" if shares else "-")
        lines.append(f"| {peptide} | {' | '.join(cells)} |")
    return lines


def make_moments(results: Results, size: int) -> list[str]:
    arms = results.arms
    lines = [
        f"| peptide | radius of gyration, nm: AA | {' | '.join(NAMES[a] for a in arms)} | contacts: AA |"
        f" {' | '.join(NAMES[a] for a in arms)} |",
        "|" + " --- |" * (3 + 2 * len(arms)),
    ]
    for peptide in results.peptides:
        cells = []
        for observable, unit in (("radius_of_gyration", "_nm"), ("contacts", "")):
            found = {a: [r[observable] for r in results.find(a, size, peptide)] for a in arms}
            rows = [r for runs in found.values() for r in runs]
            if not rows:
                break
            cells.append(f"{rows[0][f'reference_mean{unit}']:.3f}")
            cells += [f"{np.mean([r[f'mean{unit}'] for r in runs]):.3f}" if runs else "-" for runs in found.values()]
        if cells:
            lines.append(f"| {peptide} | {' | '.join(cells)} |")
    return lines


def make_unseen_forces(results: Results) -> list[str]:
    """What networks take off the mean square of the force labels of unseen peptides, in which noise cancels."""
    if not any(r["fit"].get("unseen_forces") for r in results.runs):
        return []
    cases = [(size, arm) for size in results.sizes for arm in results.arms]
    heads = [f"{NAMES[arm]}{'' if arm == 'fm' else ', beyond FM'}, {size}" for size, arm in cases]
    lines = [
        "## Forces of unseen peptides",
        "What FM takes off the mean square that its priors leave, (kJ/mol/nm)^2 a component, and what others take off"
        " beyond FM; errors over walkers.",
        "",
        f"| peptide | {' | '.join(heads)} |",
        "|" + " --- |" * (1 + len(cases)),
    ]
    sums: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for peptide in results.peptides:
        cells = []
        for size, arm in cases:
            better, worse = (find_squares(results, a, size, peptide) for a in (arm, "fm"))
            if better is None or worse is None:
                cells.append("-")
                continue
            gains = worse[1] - better[0] if arm == "fm" else worse[0] - better[0]
            sums[size, arm].append(float(gains.mean()))
            cells.append(f"{gains.mean():.0f} ± {gains.std(ddof=1) / np.sqrt(len(gains)):.0f}")
        lines.append(f"| {peptide} | {' | '.join(cells)} |")
    means = [f"{np.mean(sums[case]):.0f}" if sums[case] else "-" for case in cases]
    return [*lines, f"| mean | {' | '.join(means)} |", ""]


def find_squares(results: Results, arm: str, size: int, peptide: str) -> Any:
    """Mean squares (2, W) that model and priors leave of a peptide's labels, by walker; None where there are none."""
    fits = [r["fit"].get("unseen_forces", {}) for r in results.runs if (r["arm"], r["n_frames"]) == (arm, size)]
    found = [[f[peptide]["model"], f[peptide]["priors"]] for f in fits if peptide in f]
    return np.mean(found, axis=0) if found else None


def make_training(results: Results) -> list[str]:
    lines = [
        "| arm | frames a peptide | seeds | validation force error (label noise) | validation HVP error | CPU s |",
        "|" + " --- |" * 6,
    ]
    for size in results.sizes:
        for arm in results.arms:
            fits = [r["fit"] for r in results.runs if r["arm"] == arm and r["n_frames"] == size]
            if fits:
                keys = ("force_rmse_validation", "force_noise", "hvp_rmse_validation", "training_cpu_s")
                mean = {k: float(np.mean([f.get(k, np.nan) for f in fits])) for k in keys}
                lines.append(
                    f"| {NAMES[arm]} | {size} | {len(fits)} | {mean['force_rmse_validation']:.1f}"
                    f" ({mean['force_noise']:.1f}) | {mean['hvp_rmse_validation']:.4g} |"
                    f" {mean['training_cpu_s']:.0f} |"
                )
    return lines


def plot_bars(results: Results, path: Path) -> None:
    size = results.sizes[0]
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    x = np.arange(len(results.peptides))
    width = 0.8 / len(results.arms)
    for k, arm in enumerate(results.arms):
        means = [results.average(arm, size, p, "tica1", "kl") for p in results.peptides]
        axis.bar(
            x + width * (k - 0.5 * (len(results.arms) - 1)),
            [np.nan if m is None else m.value for m in means],
            width,
            yerr=[0.0 if m is None else m.error for m in means],
            color=COLOURS[arm],
            label=NAMES[arm],
            capsize=3,
        )
    floors = [results.average(results.arms[0], size, p, "tica1", "kl") for p in results.peptides]
    axis.hlines(
        [np.nan if m is None else m.floor for m in floors],
        x - 0.4,
        x + 0.4,
        "k",
        "dashed",
        label="two halves of the AA data",
    )
    axis.set_xticks(x, results.peptides, rotation=30, ha="right")
    axis.set_ylabel("KL(AA || CG), slowest mode, nats")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_profiles(results: Results, path: Path) -> None:
    """Free energy along the slowest mode, one line a seed."""
    size = results.sizes[0]
    kt = compute_kt(results.content["protocol"]["temperature_K"])
    figure, axes = plt.subplots(3, 3, figsize=(10, 8), layout="constrained")
    for axis, peptide in zip(axes.flat, results.peptides, strict=False):
        for arm in results.arms:
            found = [run for run in results.find(arm, size, peptide) if "curve" in run]
            for number, run in enumerate(found):
                curve = {k: np.array(v) for k, v in run["curve"].items()}
                if not axis.lines:
                    axis.plot(*to_profile(curve, "reference", kt), color="k", lw=2, label="AA")
                label = NAMES[arm] if number == 0 else None
                axis.plot(*to_profile(curve, "model", kt), color=COLOURS[arm], lw=1, alpha=0.8, label=label)
        axis.set_title(peptide)
    save_profiles(figure, axes, path)


def save_profiles(figure: Any, axes: Any, path: Path) -> None:
    """Label a grid of free energies along the slowest mode, and write it."""
    for axis in axes.flat:
        axis.set_ylim(-0.5, 25)
    for axis in axes[-1]:
        axis.set_xlabel("TICA mode 1")
    for axis in axes[:, 0]:
        axis.set_ylabel("free energy, kJ/mol")
    if axes.flat[0].lines:
        axes.flat[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def to_profile(curve: dict[str, Any], name: str, kt: float) -> tuple[Any, Any]:
    density = np.where(curve[name] > 0, curve[name], np.nan)
    energy = -kt * np.log(density)
    return curve["centres"], energy - np.nanmin(energy)


def plot_efficiency(results: Results, path: Path) -> None:
    """Median over peptides against frames, one point a seed; no file where no arm has several numbers of them."""
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    axis.set_xscale("log", base=2)
    for arm in results.arms:
        points = []
        for run in results.runs:
            if run["arm"] == arm:
                found = [p["tica1"]["kl"] for p in run["peptides"].values() if p["stable"]]
                if len(found) == len(results.peptides):
                    points.append((run["n_frames"], float(np.median(found)), float(np.mean(found))))
        if len({n for n, *_ in points}) > 1:
            n, median, mean = np.array(sorted(points)).T
            axis.plot(n, median, "o", color=COLOURS[arm], alpha=0.6)
            sizes = np.unique(n)
            axis.plot(
                sizes, [median[n == s].mean() for s in sizes], "-", color=COLOURS[arm], label=f"{NAMES[arm]}, median"
            )
            axis.plot(sizes, [mean[n == s].mean() for s in sizes], ":", color=COLOURS[arm], label=f"{NAMES[arm]}, mean")
    if not axis.lines:
        plt.close(figure)
        return
    axis.set_yscale("log")
    axis.set_xticks(results.sizes, [str(s) for s in results.sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    flat = any(results.count_flat(size) for size in results.sizes)
    axis.set_xlabel(f"frames of each training peptide{', and as many on barriers' if flat else ''}")
    axis.set_ylabel("KL(AA || CG), slowest mode, nine peptides")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
