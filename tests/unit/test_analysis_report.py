"""report.html and summary.json."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_samples import DIPEPTIDE, sample_dipeptide, simulate_chain

from openmm_hvpcg.analysis import plots
from openmm_hvpcg.analysis.compare import Comparison, compare_runs
from openmm_hvpcg.analysis.divergences import Estimate
from openmm_hvpcg.analysis.observables import find_phi_psi
from openmm_hvpcg.analysis.report import _show_estimate, write_report
from openmm_hvpcg.analysis.summary import PMF_KEYS, SUMMARY_KEYS, build_summary, write_summary
from openmm_hvpcg.config import AnalysisSettings
from openmm_hvpcg.errors import StorageError

ARMS = ("fm", "hvp", "bad")
PROVENANCE = {"package_version": "0.1.0", "seeds": {"sampling": 1}, "datasets": {"ala": "ab" * 32}}


@pytest.fixture(scope="module")
def comparisons() -> dict[str, Comparison]:
    settings = AnalysisSettings(lag_frames=5, bins=20)
    ala = compare_runs(
        sample_dipeptide(400, 1),
        {arm: sample_dipeptide(200, 2 + i, walkers=4) for i, arm in enumerate(ARMS)},
        settings,
        molecule="ala",
        phi_psi=find_phi_psi(DIPEPTIDE),
    )
    reference = simulate_chain(200, 1)
    runs = {"fm": simulate_chain(150, 2), "hvp": simulate_chain(2, 3)}
    chain = compare_runs(reference, runs, settings, molecule="chain", native=reference.positions[0])
    return {"ala": ala, "chain": chain}


def describe_training(**changes: Any) -> dict[str, Any]:
    curves = [
        {
            "epoch": e,
            "train_loss": 1.0,
            "val_loss": 1.0,
            "val_force_rmse": 400 + 90 / (e + 1),
            "val_hvp_rmse": 1e5 + e,
        }
        for e in range(20)
    ]
    figures = {
        "curves": curves, "force_rmse_validation": 405.0, "hvp_rmse_validation": 1.1e5, "force_noise": 390.0,
        "hvp_noise": 9e4, "force_rmse_priors": 700.0, "hvp_rmse_priors": 2e5, "n_frames": 4000, "epochs": 20,
        "wall_time_s": 33.3,
    }  # fmt: skip
    return {**figures, **changes}


def describe_run(**changes: Any) -> dict[str, Any]:
    run = {
        "simulated_ns": 3.2, "steps_per_second": 812.5, "backend": "torchforce", "platform": "CPU",
        "replicas": 8, "n_steps": 100000, "timestep_fs": 4.0, "stable": True, "message": "",
    }  # fmt: skip
    return {**run, **changes}


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return {
        "fm": describe_training(),
        "hvp": describe_training(hvp_noise=float("nan")),
        "bad": describe_training(curves=[]),
    }


@pytest.fixture(scope="module")
def simulation() -> dict[str, Any]:
    blown = describe_run(stable=False, simulated_ns=float("nan"), message="energy 1e9 at step 312, replica <1>")
    return {
        "ala": {"fm": describe_run(), "hvp": describe_run(), "bad": blown},
        "chain": {"fm": describe_run()},
    }


def describe_pmf_errors(**changes: Any) -> dict[str, Any]:
    figures = {
        "pmf_force_rmse": 171.0, "pmf_force_rmse_error": 3.0, "pmf_hvp_rmse": 6.6e4, "pmf_hvp_rmse_error": 400.0,
        "pmf_force_rmse_priors": 211.0, "pmf_force_rmse_priors_error": 2.0,
        "pmf_hvp_rmse_priors": 7.4e4, "pmf_hvp_rmse_priors_error": None,
    }  # fmt: skip
    return {**figures, **changes}


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(path: Path) -> _Links:
    parser = _Links()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


@pytest.fixture(scope="module")
def report(comparisons, training, simulation, tmp_path_factory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"), comparisons, training, simulation, PROVENANCE)


def test_report_needs_nothing_else(report: Path) -> None:
    assert [p.name for p in report.parent.iterdir()] == ["report.html"]
    page = parse(report)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in report.read_text(encoding="utf-8")
    # Training, KL bars; ala: modes 1, modes 1-2, phi/psi, size, coordinates; chain: the same without phi/psi.
    assert len(page.links) == page.tags.count("img") == 2 + 5 + 4
    for link in page.links:
        header, _, data = link.partition(",")
        assert header == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")


def test_report_tells_the_figures(report: Path, comparisons) -> None:
    cells = [t.strip() for t in parse(report).text]
    for expected in ("812", "3.2", "torchforce", "405 / 390", "sampling floor", "ab" * 32, "seeds.sampling"):
        assert expected in cells, expected
    kl = comparisons["ala"].tica1.kl["fm"]
    assert _show_estimate(kl) in cells


def test_arms_that_failed_are_shown_as_such(report: Path, comparisons, training, simulation) -> None:
    text = " ".join(parse(report).text)
    assert "energy 1e9 at step 312, replica <1>" in text
    assert "too short to compare: 4 frames" in text
    assert "there is no CG run of this arm" in text
    summary = build_summary(comparisons, training, simulation, PROVENANCE)["molecules"]
    assert {arm: f["status"] for arm, f in summary["ala"]["arms"].items()} == {
        "fm": "ok",
        "hvp": "ok",
        "bad": "unstable",
    }
    chain = summary["chain"]["arms"]
    assert {arm: f["status"] for arm, f in chain.items()} == {"fm": "ok", "hvp": "skipped", "bad": "missing"}
    for failed in (summary["ala"]["arms"]["bad"], chain["hvp"], chain["bad"]):
        assert failed["kl_tica1"] is failed["kl_tica12_error"] is failed["radius_of_gyration_mean_nm"] is None
        assert failed["message"]
    assert summary["ala"]["arms"]["bad"]["backend"] == "torchforce"
    assert summary["ala"]["arms"]["bad"]["simulated_ns"] is None


def test_a_study_without_any_comparison(training, tmp_path: Path) -> None:
    simulation = {"ala": {"fm": describe_run(stable=False, message="blew up")}}
    page = parse(write_report(tmp_path, {}, training, simulation, {}))
    assert "no comparison of this molecule" in " ".join(page.text)
    summary = write_summary(tmp_path / "summary.json", {}, training, simulation, {})
    assert summary["molecules"]["ala"]["reference"] is None
    assert summary["molecules"]["ala"]["arms"]["hvp"]["status"] == "missing"


def test_replica_exchange_is_told(tmp_path: Path) -> None:
    reference, run = simulate_chain(200, 1), simulate_chain(150, 2)
    settings = AnalysisSettings(lag_frames=5, bins=20)
    arms = ("good", "rare", "stuck")
    weights = {"good": np.linspace(0.0, 1.0, run.n_frames)}
    compared = compare_runs(reference, dict.fromkeys(arms, run), settings, molecule="c", weights=weights)
    exchange = {"temperatures_K": [300.0, 367.4, 450.0], "swap_acceptance": [0.41, 0.52], "round_trips": 12}
    simulation = {
        "c": {
            "good": describe_run(**exchange),
            "rare": describe_run(**{**exchange, "swap_acceptance": [0.41, 0.07]}),
            "stuck": describe_run(**{**exchange, "round_trips": 0}),
        }
    }
    path = write_report(tmp_path, {"c": compared}, {}, simulation, {})
    told = {arm: next(t for t in parse(path).text if t.startswith(f"Arm {arm}: replica exchange")) for arm in arms}
    assert "at 300, 367, 450 K; neighbours swap with probability 0.41, 0.52; 12 round trips." in told["good"]
    assert f"weighted to 300 K: 270 frames are worth {compared.n_effective['good']:.0f} of" in told["good"]
    assert "worth" not in told["rare"]
    assert "Swaps are too rare" in told["rare"]
    assert "No replica came back from the hottest" in told["stuck"]
    assert path.read_text(encoding="utf-8").count('<p class="bad">Arm') == 2
    summary = build_summary({"c": compared}, {}, simulation, {})["molecules"]["c"]["arms"]
    assert summary["good"]["n_effective_frames"] == pytest.approx(compared.n_effective["good"])
    assert summary["rare"]["n_effective_frames"] is None
    assert {key: summary["good"][key] for key in exchange} == exchange


PMF_HEADING = "Error of the mean force and its curvature"


def test_errors_against_the_pmf_reference(comparisons, training, simulation, tmp_path: Path) -> None:
    pmf = {"ala": {"fm": describe_pmf_errors(), "hvp": describe_pmf_errors(pmf_force_rmse=150.0)}}
    results = (comparisons, training, simulation, PROVENANCE)
    page = parse(write_report(tmp_path, *results, pmf_errors=pmf))
    cells = [t.strip() for t in page.text]
    assert PMF_HEADING in cells
    for expected in (plots.PRIORS_LABEL, "211.0 ± 2.0", "171.0 ± 3.0", "150.0 ± 3.0", "66000 ± 400", "7.4e+04"):
        assert cells.count(expected) >= 1, expected
    # One plot more than without; priors that the arms share have one row.
    assert page.tags.count("img") == 2 + 5 + 4 + 1
    assert cells.count(plots.PRIORS_LABEL) == 1 + 2  # its row, and two headings of the training table
    summary = build_summary(*results, pmf)["molecules"]
    assert {k: summary["ala"]["arms"]["hvp"][k] for k in PMF_KEYS} == pmf["ala"]["hvp"]
    for unknown in (summary["ala"]["arms"]["bad"], summary["chain"]["arms"]["fm"]):
        assert all(unknown[key] is None for key in PMF_KEYS)


def test_no_evaluation_no_heading(report: Path, comparisons, training, simulation, tmp_path: Path) -> None:
    assert PMF_HEADING not in report.read_text()
    empty = write_report(tmp_path, comparisons, training, simulation, PROVENANCE, pmf_errors={"ala": {}})
    assert PMF_HEADING not in empty.read_text()


def test_bars_of_priors_and_arms() -> None:
    arms = {"fm": describe_pmf_errors(), "hvp": describe_pmf_errors(pmf_hvp_rmse=None, pmf_force_rmse_priors=200.0)}
    assert [label for label, _, _ in plots.list_pmf_rows(arms)] == [
        "priors alone (fm)",
        "priors alone (hvp)",
        "fm",
        "hvp",
    ]
    assert len(plots.list_pmf_rows({"fm": arms["fm"], "x": arms["fm"]})) == 3
    figure = plots.plot_pmf_errors({"ala": arms, "gly": {"fm": arms["fm"]}}, {"fm": "red", "hvp": "blue"})
    assert figure is not None
    heights = [sorted(bar.get_height() for bar in ax.patches if bar.get_height() > 0) for ax in figure.axes]
    assert heights == [[171.0, 171.0, 171.0, 200.0, 211.0, 211.0], [6.6e4, 6.6e4, 7.4e4, 7.4e4, 7.4e4]]
    for ax in figure.axes:
        assert [t.get_text() for t in ax.get_xticklabels()] == ["ala", "gly"]
        assert "kJ/mol/nm" in ax.get_ylabel()
    assert plots.plot_pmf_errors({}, {}) is None


def test_names_are_escaped(comparisons, tmp_path: Path) -> None:
    evil = '<img src="http://x/y.png" onerror=alert(1)>'
    training = {evil: describe_training()}
    simulation = {evil: {evil: describe_run(message=evil, backend=evil, stable=False)}}
    path = write_report(tmp_path, {evil: comparisons["chain"]}, training, simulation, {evil: {evil: evil}}, title=evil)
    page = parse(path)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert '<img src="http' not in path.read_text(encoding="utf-8")
    assert evil in [t.strip() for t in page.text]


def list_keys(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [k for key, entry in value.items() for k in [(*path, key), *list_keys(entry, (*path, key))]]
    if isinstance(value, list):
        return [k for entry in value for k in list_keys(entry, path)]
    return []


def test_every_key_of_the_summary_is_documented(comparisons, training, simulation, tmp_path: Path) -> None:
    path = tmp_path / "report" / "summary.json"
    returned = write_summary(path, comparisons, training, simulation, PROVENANCE)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary == returned
    assert summary["format"] == "openmm-hvpcg/summary"
    assert summary["format_version"] == 1
    assert summary["provenance"] == PROVENANCE
    for keys in list_keys(summary):
        if keys[0] in ("units", "provenance") and len(keys) > 1:
            continue  # free contents
        is_molecule = keys[0] == "molecules" and len(keys) == 2
        is_arm = keys[:1] == ("arms",) and len(keys) == 2
        is_arm |= keys[0] == "molecules" and len(keys) == 4 and keys[2] == "arms"
        if not (is_molecule or is_arm):
            assert keys[-1] in SUMMARY_KEYS, keys
    used = {keys[-1] for keys in list_keys(summary)}
    assert used >= set(SUMMARY_KEYS), set(SUMMARY_KEYS) - used
    assert all(len(meaning) > 10 for meaning in SUMMARY_KEYS.values())


def test_summary_holds_the_contract(comparisons, training, simulation) -> None:
    summary = build_summary(comparisons, training, simulation, PROVENANCE)
    arm = summary["molecules"]["ala"]["arms"]["hvp"]
    c = comparisons["ala"]
    assert arm["kl_tica1"] == c.tica1.kl["hvp"].value
    assert arm["kl_tica1_error"] == c.tica1.kl["hvp"].error
    assert c.tica12 is not None
    assert arm["kl_tica12"] == c.tica12.kl["hvp"].value
    assert arm["js_tica12_error"] == c.tica12.js["hvp"].error
    assert arm["radius_of_gyration_mean_nm"] == c.radius_of_gyration.arms["hvp"].mean.value
    assert (arm["simulated_ns"], arm["steps_per_second"], arm["backend"]) == (3.2, 812.5, "torchforce")
    assert len(arm["observables"]) == len(c.coordinates)
    assert summary["arms"]["fm"]["force_noise"] == 390.0
    assert summary["arms"]["hvp"]["hvp_noise"] is None
    assert "curves" not in summary["arms"]["fm"]


def test_summary_takes_numpy_values(comparisons, simulation, tmp_path: Path) -> None:
    training = {"fm": {"epochs": np.int64(3), "force_noise": np.float32(2.5), "hvp_noise": np.float64("inf")}}
    summary = write_summary(tmp_path / "s.json", comparisons, training, simulation, {"a": np.arange(2), "p": tmp_path})
    assert summary["arms"]["fm"]["epochs"] == 3
    assert summary["arms"]["fm"]["force_noise"] == 2.5
    assert summary["arms"]["fm"]["hvp_noise"] is None
    assert summary["provenance"] == {"a": [0, 1], "p": str(tmp_path)}


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StorageError, match="no space left"):
        write_report(tmp_path, {}, {}, {}, PROVENANCE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.12345, 0.0123, "0.123 ± 0.012"),
        (12.3, 2.0, "12.3 ± 2.0"),
        (150.2, 31.0, "150 ± 31"),
        (0.5, float("nan"), "0.5"),
    ],
)
def test_estimates_are_shown_to_their_error(value: float, error: float, text: str) -> None:
    assert _show_estimate(Estimate(value, error)) == text


def test_plots_have_labels_units_and_legends(comparisons, training) -> None:
    c, colours = comparisons["ala"], plots.choose_colours(ARMS)
    assert len(set(colours.values())) == len(ARMS)
    assert c.tica12 is not None
    assert c.phi_psi is not None
    figures = [
        plots.plot_slow_mode(c, colours),
        plots.plot_plane(c, c.tica12),
        plots.plot_plane(c, c.phi_psi),
        plots.plot_coordinates(c, colours),
        plots.plot_size(comparisons["chain"], colours),
        plots.plot_training(training, colours),
        plots.plot_divergences(comparisons, colours),
    ]
    for figure in figures:
        assert figure is not None
        named = [ax for ax in figure.axes if ax.get_xlabel()]
        assert named
        assert all(ax.get_ylabel() for ax in named)
    planes = [ax.collections[0] for ax in figures[2].axes if ax.get_title()]  # type: ignore[union-attr]
    assert [ax.get_title() for ax in figures[2].axes if ax.get_title()] == [plots.REFERENCE_LABEL, *ARMS]  # type: ignore[union-attr]
    assert len({mesh.get_clim() for mesh in planes}) == 1
    legend = figures[0].axes[0].get_legend()  # type: ignore[union-attr]
    assert {t.get_text() for t in legend.get_texts()} >= {plots.REFERENCE_LABEL, *ARMS}
    labels = [line.get_label() for line in figures[5].axes[0].lines]  # type: ignore[union-attr]
    assert "label noise" in labels
    assert re.search(r"kJ/mol/nm\)", figures[5].axes[0].get_ylabel())  # type: ignore[union-attr]


def describe_diagnosis(**changes: Any) -> dict[str, Any]:
    force = {
        "verdict": "too few", "noise": 390.0, "irreducible": 0.93, "error": 109.0, "error_uncertainty": 12.0,
        "error_is_bound": False, "explained": 0.8, "learnt": 0.71, "learnt_error": 0.06, "n_frames_needed": 14000,
        "is_lower_bound": False,
    }  # fmt: skip
    unknown = {
        **dict.fromkeys(force), "verdict": "nothing learnt", "error_is_bound": False,
        "n_frames_needed": 36000, "is_lower_bound": True,
    }  # fmt: skip
    found = {
        "n_frames": 4000, "target": 0.9, "force": force, "hvp": unknown, "irreducible": None,
        "weights": ["weight <one>"], "remarks": ["a remark"], "warning": "too few <labels>",
    }  # fmt: skip
    return {**found, **changes}


def describe_loss_terms() -> dict[str, Any]:
    force = {"training": 110.0**2, "priors_training": 700.0**2, "priors_validation": 690.0**2, "noise": 100.0**2}
    return {"force": force, "hvp": {**force, "noise": None}}


def test_training_says_whether_the_labels_do(training, tmp_path: Path) -> None:
    judged = {
        "fm": describe_training(diagnosis=describe_diagnosis(), loss_terms=describe_loss_terms(), best_epoch=3),
        "hvp": describe_training(diagnosis=describe_diagnosis(warning=None, irreducible=0.42)),
        "bad": training["bad"],  # from before there was a diagnosis
    }
    path = write_report(tmp_path, {}, judged, {}, {})
    cells = [t.strip() for t in parse(path).text]
    for expected in ("390", "93 %", "109 ± 12", "80 %", "71 ± 6 %", "about 14,000", "at least 36,000", "unknown"):
        assert cells.count(expected) >= 2, expected
    assert cells.count("weight <one>") == cells.count("a remark") == 2
    assert "Of the weighted validation loss, 42 % is noise of the labels." in cells
    html = path.read_text(encoding="utf-8")
    assert html.count('<p class="bad">') == 1
    assert '<p class="bad">Arm <b>fm</b>: too few &lt;labels&gt;</p>' in html
    bound = describe_diagnosis(force={**describe_diagnosis()["force"], "error_is_bound": True})
    judged["fm"]["diagnosis"] = bound
    assert "below 109" in [t.strip() for t in parse(write_report(tmp_path, {}, judged, {}, {})).text]


def test_results_without_a_diagnosis_have_no_verdict(report: Path) -> None:
    assert "Are the labels enough" not in report.read_text(encoding="utf-8")


def test_curves_have_noise_and_priors_as_the_loss_sees_them() -> None:
    figures = describe_training(loss_terms=describe_loss_terms(), best_epoch=3)
    assert plots.get_loss_figure(figures, "force", "noise") == 100.0
    assert plots.get_loss_figure(figures, "hvp", "noise") is None
    # What is left of training frames, had they been given what the held-out ones were: 110^2 - 700^2 + 690^2 < 0.
    assert plots.get_loss_figure(figures, "force", "training") is None
    figures["loss_terms"]["force"]["training"] = 160.0**2
    expected = (160.0**2 - 700.0**2 + 690.0**2) ** 0.5
    assert plots.get_loss_figure(figures, "force", "training") == pytest.approx(expected)
    assert plots.get_loss_figure(describe_training(), "force", "noise") == 390.0
    assert plots.get_loss_figure(describe_training(), "force", "training") is None
    figure = plots.plot_training({"fm": figures}, {"fm": "red"})
    assert figure is not None
    force, hvp, loss = figure.axes
    levels = {
        line.get_linestyle(): line.get_ydata()[0]
        for line in force.lines
        if line.get_color() == "black" and len(line.get_ydata())
    }
    assert levels == {"--": 100.0, ":": 690.0}
    circles = [line for line in force.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in circles] == [4]  # the epoch kept, 3 from 0, is the fourth
    assert not any(line.get_linestyle() == "--" for line in hvp.lines)
    assert {line.get_linestyle() for line in loss.lines} == {"-", "-."}


def test_training_without_curves_has_no_plot(training) -> None:
    assert plots.plot_training({"bad": training["bad"]}, {"bad": "black"}) is None
    assert plots.plot_divergences({}, {}) is None
