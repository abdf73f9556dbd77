"""The report: one HTML file that needs nothing else, with tables, plots and what to look for in them."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from openmm_hvpcg.analysis import plots
from openmm_hvpcg.analysis.compare import BASINS, Comparison, without_arms
from openmm_hvpcg.analysis.distributions import Landscape
from openmm_hvpcg.analysis.divergences import Estimate
from openmm_hvpcg.analysis.summary import PMFErrors, Simulation, Training, find_arms, judge_arm
from openmm_hvpcg.storage import PathLike, write_text

logger = logging.getLogger(__name__)

#: Swaps of neighbouring temperatures rarer than this are pointed out.
LOW_ACCEPTANCE = 0.1

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; max-width: 68rem; margin: 2rem auto; padding: 0
1.25rem; } h1 { font-size: 1.8rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; border-bottom: 1px solid
#ccd3db; } h3 { margin: 1.8rem 0 .4rem; } p, figcaption { max-width: 60rem; } .lead { color: #4b5560;
#ccd3db; margin-top: 0; }
table { border-collapse: collapse; font-size: .87rem; margin: .8rem 0; } .wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e2e7ec; vertical-align: top; }
th { background: #f3f5f8; font-weight: 600; } td:first-child, th:first-child, .text { text-align: left; }
td { font-variant-numeric: tabular-nums; } td.value { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.8rem; } img { max-width: 100%; height: auto; } figcaption { color: #4b5560;
font-size: .92rem; } .bad { background: #fff3e6; border-left: 4px solid #d55e00; padding: .5rem .9rem; } .dim
{ color: #7a8490; }
"""

_CAPTIONS = {
    "tica1": (
        "Free energy along the slowest mode of the all-atom reference. Good: an arm's curve lies on the "
        "black one, with its wells as deep and its barrier as high. Bands are one standard error from time "
        "blocks. The grey margin holds what a model visits and the reference never does; its outermost bin "
        "takes all that lies beyond."
    ),
    "tica12": (
        "Free energy over the two slowest modes on one colour scale. The line bounds what the reference "
        "visits. Good: the same basins in the same colours, none empty, and little outside the line."
    ),
    "phi_psi": (
        "Ramachandran plane: free energy over phi and psi, one colour scale; the line bounds what the "
        "reference visits. Good: C7eq/PII and alpha-R filled as in the reference, the region phi > 0 no "
        "more than there."
    ),
    "coordinates": (
        "Internal coordinates, of each kind the few whose distributions differ most from the reference; the "
        "rest agree better. Good: curves on top of the black one. Too wide or shifted bonds and angles "
        "point at the priors, wrong dihedrals at the network or at too little data."
    ),
    "size": "Overall size. Good: the same peak and width; small values mean that the model collapses.",
    "training": (
        "Error on validation data the fit never saw, of the targets as the loss sees them. The dashed line is the "
        "noise of the labels themselves: no model can come below it, and a curve close to it is good, however large "
        "the number looks. The dotted line is the priors alone: a curve above it is worse than no network. Lines in "
        "colour are those of one arm. A curve that turns upwards overfits; circles show where it would be if the "
        "network did as well on other frames as on those it was trained on, and far below their curve they tell the "
        "same. Right, the weighted loss: a training curve that falls away from its validation curve learns noise, and "
        "a step is where the HVPs join."
    ),
    "divergences": (
        "Kullback-Leibler divergence of each arm from the reference; shorter is better. The dashed line is "
        "what two halves of the reference differ by: below it, model and reference cannot be told apart "
        "with this sampling."
    ),
    "pmf_errors": (
        "Error of the mean force and of the curvature against the reference; shorter is better. Bars are root mean "
        "squares per component with one standard error. An arm above its priors was made worse by its network."
    ),
}


def write_report(
    folder: PathLike,
    comparisons: Mapping[str, Comparison],
    training: Training,
    simulation: Simulation,
    provenance: Mapping[str, Any],
    *,
    title: str = "Coarse-grained potentials against the all-atom reference",
    pmf_errors: PMFErrors | None = None,
    roles: str = "",
) -> Path:
    """Write ``folder/report.html``, one self-contained file, and return its path.

    Parameters
    ----------
    comparisons : by molecule
    training : by arm: ``curves`` (one dict an epoch) and the figures documented in ``SUMMARY_KEYS``
    simulation : by molecule, then by arm: the simulation figures of ``SUMMARY_KEYS``, ``stable`` and
        ``message``
    provenance : what the study was made from; nested dictionaries become dotted rows
    title : heading
    pmf_errors : by molecule, then by arm: the ``pmf_`` figures of ``SUMMARY_KEYS``; None without a PMF reference
    roles : which molecules were trained on and which held out, in words
    """
    molecules = list(dict.fromkeys([*comparisons, *simulation]))
    status = {
        m: {
            arm: judge_arm(m, arm, comparisons.get(m), simulation)
            for arm in find_arms(m, comparisons.get(m), training, simulation)
        }
        for m in molecules
    }
    # An unstable run may have frames, but its figures would mislead.
    shown = {
        m: without_arms(c, {arm: str(status[m][arm][1]) for arm in c.arms if status[m][arm][0] != "ok"})
        for m, c in comparisons.items()
    }
    judged = (arm for m in molecules for arm in [*status[m], *(pmf_errors or {}).get(m, {})])
    colours = plots.choose_colours(list(dict.fromkeys([*training, *judged])))
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{_describe_study(molecules, colours)}</p>']
    parts.append(f"<p>{escape(roles)}</p>" if roles else "")
    parts.append("<h2>Key figures</h2>")
    parts.append(_build_key_table(shown, training, simulation, status))
    parts.append(_embed(plots.plot_divergences(shown, colours), "divergences"))
    parts.append(_build_pmf_errors(pmf_errors or {}, colours))
    for molecule in molecules:
        runs = simulation.get(molecule, {})
        parts.append(_build_molecule(molecule, shown.get(molecule), status[molecule], colours, runs))
    parts.append(_build_training(training, colours))
    parts += ["<h2>What this was made from</h2>", _build_provenance(provenance)]
    path = Path(folder) / "report.html"
    write_text(path, _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(p for p in parts if p)))
    logger.info("report written to %s", path)
    return path


_PAGE = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    "<title>{title}</title><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n"
)


def _describe_study(molecules: Sequence[str], arms: Mapping[str, str]) -> str:
    return f"Molecules: {escape(', '.join(molecules) or 'none')}. Arms: {escape(', '.join(arms) or 'none')}."


def _build_key_table(
    comparisons: Mapping[str, Comparison],
    training: Training,
    simulation: Simulation,
    status: Mapping[str, Mapping[str, tuple[str, str | None]]],
) -> str:
    head = [
        "molecule", "arm", "KL mode 1", "KL modes 1-2", "JS mode 1", "JS modes 1-2",
        "force error / noise (kJ/mol/nm)", "HVP error / noise (kJ/mol/nm²)",
        "CG ns", "steps/s", "backend", "status",
    ]  # fmt: skip
    rows = []
    for molecule, arms in status.items():
        c = comparisons.get(molecule)
        for arm, (state, _) in arms.items():
            figures, run = training.get(arm, {}), simulation.get(molecule, {}).get(arm, {})
            known = c if c is not None and arm in c.arms else None
            spaces = (known.tica1, known.tica12) if known else (None, None)
            rows.append(
                [
                    molecule,
                    arm,
                    *(_show_estimate(space.kl[arm] if space else None) for space in spaces),
                    *(_show_estimate(space.js[arm] if space else None) for space in spaces),
                    _show_pair(figures.get("force_rmse_validation"), figures.get("force_noise")),
                    _show_pair(figures.get("hvp_rmse_validation"), figures.get("hvp_noise")),
                    _show(run.get("simulated_ns")),
                    _show(run.get("steps_per_second")),
                    str(run.get("backend") or "–"),
                    state,
                ]
            )
        if c is not None:
            floors = [_show(s.kl_floor if s else None) for s in (c.tica1, c.tica12)]
            floors += [_show(s.js_floor if s else None) for s in (c.tica1, c.tica12)]
            rows.append([molecule, "reference, half against half", *floors, *["–"] * 5, "sampling floor"])
    note = (
        "<p>Divergences are in nats, ± one standard error from time blocks; 0 means the same distribution. "
        "Compare them with the sampling floor, and errors with the noise of the labels.</p>"
    )
    return note + _build_table(head, rows, n_text=2)


def _build_pmf_errors(pmf_errors: PMFErrors, colours: plots.Colours) -> str:
    """Table and bars of the errors against the PMF reference; nothing without one."""
    if not any(pmf_errors.values()):
        return ""
    head = ["molecule", "", "mean-force error (kJ/mol/nm)", "HVP error (kJ/mol/nm²)"]
    rows = []
    for molecule, arms in pmf_errors.items():
        for label, figures, suffix in plots.list_pmf_rows(arms):
            errors = (_show_estimate(plots.get_pmf_error(figures, kind, suffix)) for kind in ("force", "hvp"))
            rows.append([molecule, label, *errors])
    note = (
        "<p>How far the potentials are from the true free-energy surface. The reference holds the beads of chosen "
        "configurations still and averages over all that the other atoms do there: mean forces and their curvature "
        "(Hessian-vector products, HVPs) that no model took part in. The noise of the reference itself is taken out "
        "of the errors; ± is one standard error.</p>"
    )
    plot = _embed(plots.plot_pmf_errors(pmf_errors, colours), "pmf_errors")
    return "\n".join(
        ["<h2>Error of the mean force and its curvature</h2>", note, plot, _build_table(head, rows, n_text=2)]
    )


def _build_molecule(
    molecule: str,
    comparison: Comparison | None,
    status: Mapping[str, tuple[str, str | None]],
    colours: plots.Colours,
    runs: Mapping[str, Mapping[str, Any]],
) -> str:
    parts = [f"<h2>{escape(molecule)}</h2>"]
    for arm, (state, message) in status.items():
        if state != "ok":
            parts.append(f'<p class="bad">Arm <b>{escape(arm)}</b>: {escape(state)}. {escape(str(message))}</p>')
    parts += [_describe_exchange(arm, run, comparison) for arm, run in runs.items() if run.get("temperatures_K")]
    if comparison is None:
        return "\n".join([*parts, "<p>There is no comparison of this molecule.</p>"])
    c = comparison
    parts.append(f"<p>{_describe_reference(c)}</p>")
    parts += ["<h3>Slow modes</h3>", _embed(plots.plot_slow_mode(c, colours), "tica1")]
    if c.tica12 is not None:
        parts.append(_embed(plots.plot_plane(c, c.tica12), "tica12"))
    if c.phi_psi is not None:
        parts += ["<h3>Phi and psi</h3>", _embed(plots.plot_plane(c, c.phi_psi), "phi_psi")]
        parts.append(_build_phi_psi_table(c, c.phi_psi))
    parts += ["<h3>Size</h3>", _embed(plots.plot_size(c, colours), "size"), _build_size_table(c)]
    parts += ["<h3>Internal coordinates</h3>", _embed(plots.plot_coordinates(c, colours), "coordinates")]
    parts.append(_build_coordinate_table(c))
    return "\n".join(parts)


def _describe_exchange(arm: str, run: Mapping[str, Any], comparison: Comparison | None) -> str:
    """How a replica exchange went, and what its weighted frames are worth."""
    temperatures, acceptance = run["temperatures_K"], run["swap_acceptance"]
    text = (
        f"Arm {arm}: replica exchange at {', '.join(f'{t:.0f}' for t in temperatures)} K; neighbours swap with"
        f" probability {', '.join(f'{p:.2f}' for p in acceptance)}; {run['round_trips']} round trips."
    )
    if comparison is not None and arm in comparison.n_effective:
        text += (
            f" Frames of all temperatures are weighted to {temperatures[0]:g} K: {comparison.n_frames[arm]} frames"
            f" are worth {comparison.n_effective[arm]:.0f} of that temperature."
        )
    rare = min(acceptance) < LOW_ACCEPTANCE
    if rare:
        text += " Swaps are too rare: take more temperatures or a lower hottest_K."
    elif run["round_trips"] == 0:
        rare, text = True, text + " No replica came back from the hottest temperature: simulate longer."
    return f'<p class="bad">{escape(text)}</p>' if rare else f"<p>{escape(text)}</p>"


def _describe_reference(c: Comparison) -> str:
    scales = [f"{t:.3g} ps" if np.isfinite(t) else "not resolved" for t in c.slow_modes.timescales_ps]
    text = (
        f"Reference: {c.n_frames_reference} frames, {c.reference_ns:.3g} ns, {c.temperature_K:g} K. TICA on "
        f"{c.feature_note} at a lag of {c.slow_modes.lag_ps:.3g} ps; timescales of the slowest modes: "
        f"{', '.join(scales)}. Frames used of the arms, after burn-in: "
        f"{', '.join(f'{arm} {n}' for arm, n in c.n_frames.items()) or 'none'}."
    )
    if "distance" in c.feature_note and "dihedral" not in c.feature_note:
        text += " Pair distances do not see handedness: a mirror image shows in the dihedrals, not in the modes."
    outside = [f"{arm} {100 * share:.2g} %" for arm, share in c.tica1.outside.items() if share > 0]
    if outside:
        text += f" Frames beyond the reference's range of mode 1: {', '.join(outside)}."
    return escape(text)


def _build_phi_psi_table(c: Comparison, landscape: Landscape) -> str:
    rows = []
    for name, shares in c.populations.items():
        label = plots.REFERENCE_LABEL if name is None else name
        kl, js = (landscape.kl[name], landscape.js[name]) if name is not None else (None, None)
        rows.append([label, *(_show_estimate(s) for s in shares), _show_estimate(kl), _show_estimate(js)])
    note = (
        "<p>Shares of frames in the basins (degrees): c7eq_pii, phi &lt; 0 or &gt; 130 with psi &gt; 50 or "
        "&lt; -120; alpha_r, the same phi with psi from -120 to 50; alpha_l, phi 0 to 130 with psi 0 to "
        "120; c7ax, the rest of phi 0 to 130.</p>"
    )
    return note + _build_table(["", *BASINS, "KL (nats)", "JS (nats)"], rows)


def _build_size_table(c: Comparison) -> str:
    rows = []
    for observable in (c.radius_of_gyration, c.rmsd):
        if observable is None:
            continue
        for name, moments in [(None, observable.reference), *observable.arms.items()]:
            js = observable.landscape.js[name] if name is not None else None
            label = plots.REFERENCE_LABEL if name is None else name
            figures = (moments.mean, moments.std, js)
            rows.append([observable.label, label, *(_show_estimate(f) for f in figures)])
    return _build_table(["observable", "", "mean (nm)", "std (nm)", "JS (nats)"], rows, n_text=2)


def _build_coordinate_table(c: Comparison) -> str:
    head = ["coordinate", "kind", "unit", "reference mean", "reference std"]
    for arm in c.arms:
        head += [f"{arm} mean", f"{arm} std", f"{arm} JS"]
    rows = []
    for o in c.coordinates:
        row = [o.label, o.kind, o.unit, _show_estimate(o.reference.mean), _show_estimate(o.reference.std)]
        for arm in c.arms:
            figures = (o.arms[arm].mean, o.arms[arm].std, o.landscape.js[arm])
            row += [_show_estimate(f) for f in figures]
        rows.append(row)
    if not rows:
        return ""
    table = _build_table(head, rows, n_text=3)
    return f"<details><summary>All {len(rows)} internal coordinates</summary>{table}</details>"


def _build_training(training: Training, colours: plots.Colours) -> str:
    if not training:
        return ""
    keys = {
        "force_rmse_validation": "force error", "force_rmse_priors": "priors alone",
        "force_noise": "force label noise", "hvp_rmse_validation": "HVP error",
        "hvp_rmse_priors": "priors alone", "hvp_noise": "HVP target noise",
        "n_frames": "frames", "epochs": "epochs", "wall_time_s": "wall time (s)",
    }  # fmt: skip
    rows = [[arm, *(_show(figures.get(key)) for key in keys)] for arm, figures in training.items()]
    note = "<p>Rms per component on the validation set; forces in kJ/mol/nm, HVPs in kJ/mol/nm².</p>"
    plot = _embed(plots.plot_training(training, colours), "training")
    judged = {arm: figures["diagnosis"] for arm, figures in training.items() if figures.get("diagnosis")}
    boxes = [
        f'<p class="bad">Arm <b>{escape(arm)}</b>: {escape(found["warning"])}</p>'
        for arm, found in judged.items()
        if found.get("warning")
    ]
    table = _build_table(["arm", *keys.values()], rows)
    return "\n".join(["<h2>Training</h2>", *boxes, plot, note, table, _build_diagnoses(judged)])


def _build_diagnoses(judged: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the labels do, and the weights of each arm with their reasons; nothing for results that lack it."""
    if not judged:
        return ""
    head = [
        "arm", "labels", "noise of the labels", "of the validation loss, noise", "error without the noise",
        "of the priors' error, explained", "learnt of what it could", "labelled frames",
        "frames that would do", "verdict",
    ]  # fmt: skip
    rows = [
        [arm, label, *_describe_term(found[term], found["n_frames"])]
        for arm, found in judged.items()
        for term, label in (("force", "forces"), ("hvp", "HVPs"))
    ]
    target = next(iter(judged.values()))["target"]
    note = (
        "<p>Noise is what no model can explain; of the loss that share stays, however long one trains. It is estimated "
        "from frames whose beads look alike, and leans towards too large; of HVPs it is that of targets with each "
        "frame's own covariance, while the loss may see quieter ones. What a network could learn follows from how much "
        "more it takes off the priors' error on training frames than on others: the surplus is noise it learnt. "
        f"The frames that would do bring it to {100 * target:.0f} % of that; what is then still missing no frames "
        "mend, but a larger network or longer training may. “unknown”: these labels do not tell.</p>"
    )
    parts = ["<h3>Are the labels enough for the network?</h3>", _build_table(head, rows, n_text=2), note]
    parts.append("<h3>Weights of the loss, and why</h3>")
    for arm, found in judged.items():
        share = found.get("irreducible")
        lines = [*found["weights"], *found["remarks"]]
        if share is not None:
            lines.append(f"Of the weighted validation loss, {100 * share:.0f} % is noise of the labels.")
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<p>Arm <b>{escape(arm)}</b></p><ul>{items}</ul>")
    return "\n".join(parts)


def _describe_term(term: Mapping[str, Any], n_frames: int) -> list[str]:
    """Cells of the table on the labels, for one term of one arm."""

    def share(value: float | None) -> str:
        return "unknown" if value is None else f"{100 * value:.0f} %"

    error = "unknown" if term["error"] is None else _show(term["error"])
    if term["error_is_bound"]:
        error = f"below {error}"
    elif term["error_uncertainty"] is not None:
        error = _show_estimate(Estimate(term["error"], term["error_uncertainty"]))
    learnt, needed = "–", "–"
    if term["learnt"] is not None:
        learnt = f"{100 * term['learnt']:.0f} ± {100 * term['learnt_error']:.0f} %"
    if term["n_frames_needed"] is not None:
        needed = f"{'at least' if term['is_lower_bound'] else 'about'} {term['n_frames_needed']:,}"
    noise = "unknown" if term["noise"] is None else _show(term["noise"])
    shares = [share(term["irreducible"]), error, share(term["explained"])]
    return [noise, *shares, learnt, f"{n_frames:,}", needed, term["verdict"]]


def _build_provenance(provenance: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="value">{escape(value)}</td></tr>' for key, value in _flatten(provenance)
    )
    return f"<table>{rows}</table>" if rows else '<p class="dim">Nothing was recorded.</p>'


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows += _flatten(value, f"{name}.") if isinstance(value, Mapping) else [(name, str(value))]
    return rows


def _build_table(head: Sequence[str], rows: Sequence[Sequence[str]], n_text: int = 1) -> str:
    """An HTML table; cells are escaped here, the first ``n_text`` columns are set left."""

    def row(tag: str, cells: Sequence[str]) -> str:
        left = [' class="text"' if c < n_text else "" for c in range(len(cells))]
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(left, cells, strict=True))

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return f'<div class="wide"><table><tr>{row("th", head)}</tr>{body}</table></div>'


def _embed(figure: Figure | None, caption: str) -> str:
    if figure is None:
        return ""
    image = base64.b64encode(plots.render_png(figure)).decode("ascii")
    text = escape(_CAPTIONS[caption])
    picture = f'<img alt="{text}" src="data:image/png;base64,{image}">'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return str(value)
    number = float(value)
    if not np.isfinite(number):
        return "–"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _show_pair(value: Any, noise: Any) -> str:
    return f"{_show(value)} / {_show(noise)}" if value is not None or noise is not None else "–"


def _show_estimate(found: Estimate | None) -> str:
    """Value ± error, to the decimals that the error's first two digits call for."""
    if found is None or not np.isfinite(found.value):
        return "–"
    if not np.isfinite(found.error) or found.error <= 0:
        return f"{found.value:.3g}"
    decimals = max(0, 1 - int(np.floor(np.log10(found.error))))
    return f"{found.value:.{decimals}f} ± {found.error:.{decimals}f}"
