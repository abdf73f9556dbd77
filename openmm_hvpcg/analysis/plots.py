"""The report's figures: every function takes results and returns a matplotlib Figure.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart by colour-blind readers too;
the reference is black throughout. An arm has the same colour and dash in every figure.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from openmm_hvpcg.analysis.compare import Comparison
from openmm_hvpcg.analysis.distributions import Density, Landscape, Observable
from openmm_hvpcg.analysis.divergences import Estimate

FloatArray = NDArray[np.float64]
Colours = Mapping[str, str]

REFERENCE_LABEL = "AA reference"
PRIORS_LABEL = "priors alone"
PRIORS_COLOUR = "0.6"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
#: Free energies above this height over the reference's highest seen state are cut off in plots, kJ/mol.
HEADROOM = 4.0
#: Densities above this many times the reference's highest are cut off: a runaway arm piles up in one bin.
MAX_DENSITY_RATIO = 3.0
KINDS = {
    "bond": "bonds",
    "1-3 distance": "1-3 distances",
    "distance": "distances",
    "angle": "angles",
    "dihedral": "dihedrals",
}
N_PANELS_PER_KIND = 4
DPI = 110


def choose_colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for each arm, the same in every figure."""
    return dict(zip(arms, itertools.cycle(PALETTE), strict=False))


def render_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def plot_slow_mode(comparison: Comparison, colours: Colours) -> Figure:
    """Free energy along TICA mode 1: reference and arms with one-standard-error bands."""
    figure, (axes,) = _make_figure(1, 1, 7.5, 4.2)
    landscape = comparison.tica1
    x = landscape.bins.centres[0]
    highest = 0.0
    for label, density, colour in _list_densities(landscape, colours):
        energy, error = density.compute_free_energy(comparison.temperature_K)
        if label == REFERENCE_LABEL:
            highest = float(np.nanmax(energy))
        axes.fill_between(x, energy - error, energy + error, color=colour, alpha=0.2, linewidth=0)
        # Points too, or a state seen with empty bins on both sides would not show.
        width = 2.0 if label == REFERENCE_LABEL else 1.6
        axes.plot(x, energy, color=colour, label=label, marker=".", markersize=4, linewidth=width)
    inside = np.flatnonzero(landscape.bins.inside)
    low, high = landscape.bins.edges[0][inside[0]], landscape.bins.edges[0][inside[-1] + 1]
    if landscape.arms:
        axes.axvspan(landscape.bins.edges[0][0], low, color="0.93", zorder=0, linewidth=0)
        axes.axvspan(
            high,
            landscape.bins.edges[0][-1],
            color="0.93",
            zorder=0,
            linewidth=0,
            label="beyond the reference",
        )
        axes.set_xlim(landscape.bins.edges[0][0], landscape.bins.edges[0][-1])
    axes.set_ylim(0, highest + HEADROOM)
    axes.set_xlabel("TICA mode 1 (reference standard deviations)")
    axes.set_ylabel("free energy (kJ/mol)")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=5)
    return figure


def plot_plane(comparison: Comparison, landscape: Landscape) -> Figure:
    """Free energies over two coordinates side by side; a line bounds what the reference visits."""
    panels = [(label, density) for label, density, _ in _list_densities(landscape, dict.fromkeys(landscape.arms, ""))]
    n_columns = min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure, axes = _make_figure(n_rows, n_columns, 3.4 * n_columns + 0.9, 3.3 * n_rows + 0.3)
    energies = [density.compute_free_energy(comparison.temperature_K)[0] for _, density in panels]
    top = float(np.ceil(np.nanmax(energies[0]))) or 1.0
    visited = landscape.reference.values > 0
    spans = _find_spans(landscape, [e for e in energies])
    is_periodic = bool(landscape.bins.inside.all())
    mesh = None
    for ax, (label, _), energy in zip(axes, panels, energies, strict=False):
        mesh = ax.pcolormesh(*landscape.bins.edges, energy.T, cmap="viridis", vmin=0, vmax=top, rasterized=True)
        _draw_boundary(ax, landscape.bins.edges, visited)
        ax.set_title(label, fontsize=10)
        for axis, name, unit, span in zip((ax.xaxis, ax.yaxis), landscape.axes, landscape.units, spans, strict=True):
            axis.set_label_text(f"{name} ({unit})" if unit else name)
            axis.set_view_interval(*span, ignore=True)
            if is_periodic:
                axis.set_ticks([-180, -90, 0, 90, 180])
        if is_periodic:
            ax.set_aspect("equal")
    for ax in axes[len(panels) :]:
        ax.remove()
    if mesh is not None:
        figure.colorbar(mesh, ax=axes[: len(panels)], label="free energy (kJ/mol)", extend="max", shrink=0.9)
    return figure


def plot_coordinates(comparison: Comparison, colours: Colours) -> Figure | None:
    """Distributions of internal coordinates, of each kind the few that differ most; None without any."""
    rows = []
    for kind in KINDS:
        members = [o for o in comparison.coordinates if o.kind == kind]
        worst = sorted(members, key=lambda o: -o.largest_js)[:N_PANELS_PER_KIND]
        if worst:
            rows.append(worst)
    if not rows:
        return None
    n_columns = max(len(row) for row in rows)
    figure, axes = _make_figure(len(rows), n_columns, max(6.5, 2.75 * n_columns), 2.3 * len(rows) + 0.5)
    for r, row in enumerate(rows):
        for c in range(n_columns):
            ax = axes[r * n_columns + c]
            if c < len(row):
                _draw_density(ax, row[c], colours)
                ax.set_title(KINDS[row[c].kind] if c == 0 else "", loc="left", fontsize=10, fontweight="bold")
            else:
                ax.remove()
    _add_common_legend(figure, axes[0])
    return figure


def plot_size(comparison: Comparison, colours: Colours) -> Figure:
    """Distributions of the radius of gyration, and of the RMSD to native where there is one."""
    shown = [o for o in (comparison.radius_of_gyration, comparison.rmsd) if o is not None]
    figure, axes = _make_figure(1, len(shown), 4.6 * len(shown) + 0.5, 3.4)
    for ax, observable in zip(axes, shown, strict=True):
        _draw_density(ax, observable, colours)
    _add_common_legend(figure, axes[0])
    return figure


def plot_training(training: Mapping[str, Mapping[str, Any]], colours: Colours) -> Figure | None:
    """Force and HVP errors and the loss by epoch, with the labels' noise and the priors; None without curves."""
    if not any(figures.get("curves") for figures in training.values()):
        return None
    figure, axes = _make_figure(1, 3, 12.0, 4.0)
    panels = (("force", "force error (kJ/mol/nm)"), ("hvp", "HVP error (kJ/mol/nm$^2$)"))
    for ax, (term, label) in zip(axes, panels, strict=False):
        values: list[float] = []
        for arm, figures in training.items():
            values += _draw_curve(ax, figures, f"val_{term}_rmse", color=colours[arm])
            fitted = get_loss_figure(figures, term, "training")
            if fitted is not None and figures.get("best_epoch") is not None:
                ax.plot(figures["best_epoch"] + 1, fitted, "o", color=colours[arm], markerfacecolor="none")
                values.append(fitted)
        for name, dashes in (("noise", "--"), ("priors_validation", ":")):
            for level, arms in _group_levels(training, term, name).items():
                colour = "black" if len(arms) == len(training) else colours[arms[0]]
                ax.axhline(level, color=colour, linestyle=dashes, linewidth=1.2)
                values.append(level)
        _finish_curves(ax, values, f"validation {label}")
    values = []
    for arm, figures in training.items():
        weight = sum(_to_float(figures.get(f"{term}_weight")) or 0.0 for term, _ in panels) or 1.0
        first = (figures.get("curves") or [{}])[0].get("val_loss") or 1.0
        values += _draw_curve(axes[2], figures, "val_loss", first, color=colours[arm])
        values += _draw_curve(axes[2], figures, "train_loss", weight, color=colours[arm], linestyle="-.", linewidth=1.0)
    _finish_curves(axes[2], values, "loss (priors alone: 1)")
    styles = (
        ("label noise", {"linestyle": "--"}),
        (PRIORS_LABEL, {"linestyle": ":"}),
        ("training frames", {"marker": "o", "markerfacecolor": "none", "linestyle": "none"}),
        ("training loss", {"linestyle": "-.", "linewidth": 1.0}),
    )
    for arm in training:
        axes[0].plot([], [], color=colours[arm], label=arm)
    for label, style in styles:
        axes[0].plot([], [], color="black", label=label, **style)
    _add_common_legend(figure, axes[0])
    return figure


def get_loss_figure(figures: Mapping[str, Any], term: str, name: str) -> float | None:
    """Root mean square of a term as the loss sees it, in the units of the curves; None where it is not known.

    ``name`` is priors_validation, noise, or training: what would be left of the held-out labels if the network took as
    much off them as it does on training frames. Results without ``loss_terms`` have the first two of the plain labels.
    """
    if "loss_terms" not in figures:
        plain = {"noise": "noise", "priors_validation": "rmse_priors"}
        return _to_float(figures.get(f"{term}_{plain[name]}")) if name in plain else None
    found = figures["loss_terms"][term]
    square = _to_float(found.get(name))
    if name == "training" and square is not None:
        # The two sets differ by chance in what there is to take off, and by more than the network does.
        square += found["priors_validation"] - found["priors_training"]
    return None if square is None or square < 0 else float(square**0.5)


def _draw_curve(ax: Axes, figures: Mapping[str, Any], key: str, unit: float = 1.0, **style: Any) -> list[float]:
    """Draw a column of the learning curves over ``unit``; return its values."""
    points = [
        (entry["epoch"], value / unit)
        for entry in figures.get("curves") or ()
        if (value := _to_float(entry.get(key))) is not None
    ]
    if not points:
        return []
    epochs, values = zip(*points, strict=True)
    ax.plot(epochs, values, marker="." if len(points) < 15 else "", **style)
    return list(values)


def _finish_curves(ax: Axes, values: Sequence[float], label: str) -> None:
    """Scale and labels of a panel of learning curves that hold ``values``."""
    if values and min(values) > 0 and max(values) > 5 * min(values):
        ax.set_yscale("log")
    elif values and max(values) >= 1e4:
        ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    ax.set_xlabel("epoch")
    ax.set_ylabel(label)
    if not values:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color="0.4")


def plot_divergences(comparisons: Mapping[str, Comparison], colours: Colours) -> Figure | None:
    """KL by molecule and arm with errors and sampling floor, mode 1 and modes 1-2; None without arms."""
    if not any(c.arms for c in comparisons.values()):
        return None
    figure, axes = _make_figure(1, 2, 9.2, 3.8)
    arms = [arm for arm in colours if any(arm in c.arms for c in comparisons.values())]
    width = 0.8 / len(arms)
    for ax, name, title in zip(axes, ("tica1", "tica12"), ("TICA mode 1", "TICA modes 1 and 2"), strict=True):
        for m, comparison in enumerate(comparisons.values()):
            landscape: Landscape | None = getattr(comparison, name)
            if landscape is None:
                continue
            for a, arm in enumerate(arms):
                if arm not in landscape.kl:
                    continue
                found = landscape.kl[arm]
                place = m + (a - (len(arms) - 1) / 2) * width
                error = found.error if np.isfinite(found.error) else 0.0
                ax.bar(place, found.value, 0.92 * width, color=colours[arm])
                ax.errorbar(place, found.value, error, color="black", capsize=3, linewidth=1.2)
            ax.hlines(landscape.kl_floor, m - 0.45, m + 0.45, color="black", linestyle="--", linewidth=1.2)
        for arm in arms:
            ax.bar(0, 0, color=colours[arm], label=arm)
        ax.plot([], [], color="black", linestyle="--", linewidth=1.2, label="sampling floor")
        ax.set_xticks(range(len(comparisons)), list(comparisons))
        ax.set_xlim(-0.6, len(comparisons) - 0.4)
        ax.set_ylim(bottom=0)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("molecule")
        ax.set_ylabel("KL(reference || model) (nats)")
    _add_common_legend(figure, axes[0])
    return figure


def list_pmf_rows(arms: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any], str]]:
    """(label, figures, suffix of their keys) of what is judged on a molecule: priors first, then arms.

    Arms mostly share their priors, which are then listed once.
    """
    keys = [f"pmf_{kind}_rmse_priors" for kind in ("force", "hvp")]
    priors: dict[tuple[Any, ...], list[str]] = {}
    for arm, figures in arms.items():
        priors.setdefault(tuple(figures.get(key) for key in keys), []).append(arm)
    labels = [PRIORS_LABEL if len(priors) == 1 else f"{PRIORS_LABEL} ({', '.join(names)})" for names in priors.values()]
    rows = [(label, arms[names[0]], "_priors") for label, names in zip(labels, priors.values(), strict=True)]
    return [*rows, *((arm, figures, "") for arm, figures in arms.items())]


def get_pmf_error(figures: Mapping[str, Any], kind: str, suffix: str) -> Estimate | None:
    """One figure of :data:`~openmm_hvpcg.analysis.summary.PMF_KEYS` with its error; None where it is not known."""
    key = f"pmf_{kind}_rmse{suffix}"
    value, error = _to_float(figures.get(key)), _to_float(figures.get(f"{key}_error"))
    return None if value is None else Estimate(value, float("nan") if error is None else error)


def plot_pmf_errors(pmf_errors: Mapping[str, Mapping[str, Mapping[str, Any]]], colours: Colours) -> Figure | None:
    """Force and HVP errors against the PMF reference by molecule: priors and arms; None without any."""
    rows = {molecule: list_pmf_rows(arms) for molecule, arms in pmf_errors.items() if arms}
    if not rows:
        return None
    figure, axes = _make_figure(1, 2, 9.2, 3.8)
    width = 0.8 / max(len(r) for r in rows.values())
    panels = (("force", "mean-force error (kJ/mol/nm)"), ("hvp", "HVP error (kJ/mol/nm$^2$)"))
    for ax, (kind, label) in zip(axes, panels, strict=True):
        named: dict[str, str] = {}
        for m, bars in enumerate(rows.values()):
            for b, (name, figures, suffix) in enumerate(bars):
                named[name] = PRIORS_COLOUR if suffix else colours[name]
                found = get_pmf_error(figures, kind, suffix)
                if found is None:
                    continue
                place = m + (b - (len(bars) - 1) / 2) * width
                ax.bar(place, found.value, 0.92 * width, color=named[name])
                error = found.error if np.isfinite(found.error) else 0.0
                ax.errorbar(place, found.value, error, color="black", capsize=3, linewidth=1.2)
        for name, colour in named.items():
            ax.bar(0, 0, color=colour, label=name)
        ax.set_xticks(range(len(rows)), list(rows))
        ax.set_xlim(-0.6, len(rows) - 0.4)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("molecule")
        ax.set_ylabel(label)
        if kind == "hvp":
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4), useMathText=True)
    _add_common_legend(figure, axes[0])
    return figure


def _make_figure(n_rows: int, n_columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, axes


def _list_densities(landscape: Landscape, colours: Colours) -> list[tuple[str, Density, str]]:
    arms = [(arm, density, colours[arm]) for arm, density in landscape.arms.items()]
    return [(REFERENCE_LABEL, landscape.reference, "black"), *arms]


def _draw_density(ax: Axes, observable: Observable, colours: Colours) -> None:
    landscape = observable.landscape
    x = landscape.bins.centres[0]
    for label, density, colour in _list_densities(landscape, colours):
        low = np.maximum(density.values - density.errors, 0)
        ax.fill_between(x, low, density.values + density.errors, color=colour, alpha=0.2, linewidth=0)
        ax.plot(x, density.values, color=colour, label=label, linewidth=1.8 if label == REFERENCE_LABEL else 1.4)
    highest = max(density.values.max() for density in (landscape.reference, *landscape.arms.values()))
    ax.set_ylim(0, 1.05 * min(float(highest), MAX_DENSITY_RATIO * float(landscape.reference.values.max())))
    ax.set_xlabel(f"{observable.label} ({observable.unit})", fontsize=9)
    ax.set_ylabel("density (relative)", fontsize=9)
    ax.set_yticks([])
    if observable.kind == "dihedral":
        ax.set_xlim(-180, 180)
        ax.set_xticks([-180, -90, 0, 90, 180])
    else:
        seen = np.flatnonzero(
            np.max([d.values / d.values.max() for d in (landscape.reference, *landscape.arms.values())], axis=0) > 2e-3
        )
        ax.set_xlim(landscape.bins.edges[0][seen[0]], landscape.bins.edges[0][seen[-1] + 1])


def _add_common_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False)


def _find_spans(landscape: Landscape, energies: Sequence[FloatArray]) -> list[tuple[float, float]]:
    """Limits of each axis that show every cell that any data set visits."""
    visited = np.any([np.isfinite(energy) for energy in energies], axis=0)
    spans = []
    for axis, edges in enumerate(landscape.bins.edges):
        seen = np.flatnonzero(visited.any(axis=1 - axis))
        spans.append((float(edges[seen[0]]), float(edges[seen[-1] + 1])))
    return spans


def _draw_boundary(ax: Axes, edges: tuple[FloatArray, ...], visited: NDArray[np.bool_]) -> None:
    """Outline the cells of ``visited`` along their edges."""
    padded = np.pad(visited, 1)
    x, y = edges
    vertical = padded[1:, 1:-1] != padded[:-1, 1:-1]
    horizontal = padded[1:-1, 1:] != padded[1:-1, :-1]
    segments = [[(x[i], y[j]), (x[i], y[j + 1])] for i, j in np.argwhere(vertical)]
    segments += [[(x[i], y[j]), (x[i + 1], y[j])] for i, j in np.argwhere(horizontal)]
    ax.add_collection(LineCollection(segments, colors="0.25", linewidths=0.7), autolim=False)


def _group_levels(training: Mapping[str, Mapping[str, Any]], term: str, name: str) -> dict[float, list[str]]:
    """Arms by a level of their labels (they mostly share it)."""
    groups: dict[float, list[str]] = {}
    for arm, figures in training.items():
        level = get_loss_figure(figures, term, name)
        if level is not None:
            groups.setdefault(float(f"{level:.3g}"), []).append(arm)
    return groups


def _to_float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float, np.number)) and np.isfinite(value) else None
