"""The study of unseen peptides, shrunk: every piece, in its order, as its README has it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_process import REPOSITORY

from openmm_hvpcg.config import load_protocol
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.fit import load_fit
from openmm_hvpcg.training.models.priors import dihedral_angle
from openmm_hvpcg.training.models.torsions import Bonded

FOLDER = REPOSITORY / "protocols" / "unseen_peptides"
PROTOCOL: dict[str, Any] = {
    "temperature_K": 350,
    "molecules": [
        {"name": name, "role": role, "input": {"sequence": name, "hydrogen_mass_amu": 3}}
        for name, role in (("GA", "train"), ("AG", "train"), ("AA", "train"), ("AGA", "test"))
    ],
    "mapping": {"beads": "ca+caps"},
    "labels": {"probes_per_frame": 2, "max_frames": 40},
    "model": {"features": 8, "interactions": 1, "radial": 8, "cutoff_nm": 1.2},
    "training": {
        "arms": [
            {"name": "fm", "hvp_weight": 0.0},
            {"name": "hvp", "hvp_weight": "balanced"},
            {"name": "hvp_density", "hvp_weight": "balanced", "density": 0.9},
        ],
        "batch_size": 32,
        "max_epochs": 1,
        "schedule": "cosine",
    },
    "simulation": {"replicas": 4, "n_steps": 400, "save_every": 10},
    "analysis": {"lag_frames": 1, "bins": 10, "blocks": 2},
}
SAMPLING = {
    **{"equilibration-steps": 50, "stride": 10, "frames": 20, "platform": "CPU"},
    **{"copies-train": 2, "copies-test": 4, "training-frames": 40},
}


@pytest.fixture(scope="module")
def call() -> Any:
    """Calls a script of the protocol as its command line would."""
    names = (
        *("run", "report", "sample_crowd", "sample_many", "draw_many", "peptides", "judging", "convergence"),
        *("dihedral_bias", "barriers"),
    )
    taken = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER))

    def call_script(script: str, *words: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, words)])
            importlib.import_module(script).main()

    yield call_script
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(taken)


@pytest.fixture(scope="module")
def study(call: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where everything was run once."""
    root = tmp_path_factory.mktemp("unseen")
    protocol = root / "protocol.yaml"
    protocol.write_text(yaml.safe_dump(PROTOCOL))
    common = ("--protocol", protocol, "--data", root / "data", "--jobs", 1)
    call("run", *common, "systems", root / "systems")
    flags = [word for key, value in SAMPLING.items() for word in (f"--{key}", value)]
    call("sample_crowd", root / "systems", root / "samples", *flags)
    call("run", *common, "label", root / "samples", "--scratch", root / "scratch")
    call("run", *common, "reference", root / "samples")
    call("run", *common, "study", "--out", root / "out", "--sizes", 40, "--seeds", 1)
    call("run", *common, "study", "--out", root / "out", "--sizes", 40, "--seeds", 1, "--peptides", "GA")
    call("report", root / "out", "--out", root / "report")
    return root


def test_data_hold_what_was_sampled(study: Path, call: Callable[..., None]) -> None:
    peptides = importlib.import_module("peptides")
    datasets = peptides.load_labels(study / "data" / "labels.zip")
    assert [d.name for d in datasets] == ["AA", "AG", "GA"]
    label = importlib.import_module("openmm_hvpcg.training.dataset").load_dataset
    for data in datasets:
        assert (data.n_frames, data.n_probes, data.bead_map.species[0]) == (40, 2, "ACE")
        exact = label(study / "scratch" / f"{data.name}.zarr")
        np.testing.assert_array_equal(data.positions, exact.positions)
        np.testing.assert_array_equal(data.probes, exact.probes)
        for name in ("forces", "hvps"):
            # Rounded to 12 bits of the mantissa: half a unit of the last is 2^-13.
            np.testing.assert_allclose(getattr(data, name), getattr(exact, name), rtol=2.0**-13)
    frames, bead_map = peptides.load_reference(study / "data" / "references.zip", "AGA")
    assert frames.n_frames % 4 == 0
    assert bead_map.species == ("ACE", "ALA", "GLY", "ALA", "NME")
    # Neighbouring C-alphas across a trans peptide bond are 0.38 nm apart; the grid of 1e-4 nm does not show.
    assert np.linalg.norm(np.diff(frames.positions[:, 1:4], axis=1), axis=-1).mean() == pytest.approx(0.385, abs=0.01)


def test_results_and_report(study: Path) -> None:
    content = json.loads((study / "out" / "results.json").read_text())
    assert {r["arm"] for r in content["runs"]} == {"fm", "hvp", "hvp_density"}
    for run in content["runs"]:
        # Twenty per cent of the frames are held out for validation.
        assert run["fit"]["n_frames"] == 3 * 32
        assert (set(run["peptides"]), set(run["trained peptides"])) == ({"AGA"}, {"GA"})
        assert run["trained peptides"]["GA"]["tica1"]["kl"] >= 0
        figures = run["peptides"]["AGA"]
        assert figures["stable"]
        for key in ("tica1", "tica12", "radius_of_gyration", "contacts"):
            assert figures[key]["kl"] >= 0
            assert figures[key]["js"] <= np.log(2)
    table = (study / "report" / "table.md").read_text()
    assert "| AGA |" in table
    assert "FM + HVP ahead of FM on" in table
    assert "FM + HVP + density ahead of FM on" in table
    assert "Unstable runs: 0 of 3." in table
    assert "## 40 frames of each training peptide\n" in table
    for name in ("kl.png", "profiles.png"):
        assert (study / "report" / name).stat().st_size > 5000
    # One number of frames makes no curve.
    assert not (study / "report" / "efficiency.png").exists()


def test_sittings_are_put_together(study: Path, call: Callable[..., None], tmp_path: Path) -> None:
    """What a report holds can be reported again, with what other folders have; of what several have the last counts."""
    kept = json.loads((study / "report" / "results.json").read_text())
    first = {**kept, "runs": [{**r, "seed": 7} for r in kept["runs"][:1]]}
    again = {**kept, "runs": [{**r, "peptides": {}} for r in kept["runs"][:1]]}
    for name, content in (("first", first), ("again", again)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    call("report", tmp_path / "first", tmp_path / "again", study / "report", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [(r["arm"], r["seed"]) for r in found] == [("fm", 1), ("fm", 7), ("hvp", 1), ("hvp_density", 1)]
    assert [found[k] for k in (0, 2, 3)] == kept["runs"]
    assert all(len(p["curve"]["model"]) > 5 for r in found for p in r["peptides"].values())


def test_seeds_are_compared_in_pairs(study: Path) -> None:
    """Ratios of 1/2, 1/2 and of 1/8, 2: both seeds have a mean ln of -ln 2. What is unstable counts not."""

    def build_run(arm: str, seed: int, *values: float | None) -> dict[str, Any]:
        peptides = {f"P{k}": {"stable": v is not None, "tica1": {"kl": v}} for k, v in enumerate(values)}
        return {"arm": arm, "n_frames": 40, "seed": seed, "peptides": peptides}

    module = importlib.import_module("report")
    runs = [build_run("fm", 1, 0.4, 0.6), build_run("fm", 2, 0.8, 0.1), build_run("fm", 3, 1.0, 1.0)]
    runs += [build_run("hvp", 1, 0.2, 0.3), build_run("hvp", 2, 0.1, 0.2), build_run("hvp", 4, 1.0, 1.0)]
    words = module.compare_seeds(module.Results({"test peptides": ["P0", "P1"], "runs": runs}), 40, "hvp")
    assert "ahead on 2, 1; geometric mean of all ratios 0.50 (0.50 to 0.50, a standard error over 2 seeds)" in words
    runs += [build_run("hvp", 3, 2.0, None)]
    words = module.compare_seeds(module.Results({"test peptides": ["P0", "P1"], "runs": runs}), 40, "hvp")
    # Means of ln: -ln 2, -ln 2, ln 2.
    assert "ahead on 2, 1, 0; geometric mean of all ratios 0.79 (0.50 to 1.26, a standard error over 3 seeds)" in words
    assert not module.compare_seeds(module.Results({"test peptides": ["P0", "P1"], "runs": runs[:4]}), 40, "hvp")


def test_a_second_run_repeats_nothing(study: Path, call: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(importlib.import_module("run"), "run_one", refuse)
    before = (study / "out" / "results.json").read_bytes()
    common = ("--protocol", study / "protocol.yaml", "--data", study / "data", "--jobs", 1)
    call("run", *common, "study", "--out", study / "out", "--sizes", 40, "--seeds", 1)
    assert (study / "out" / "results.json").read_bytes() == before


def test_means_of_networks_are_judged_as_one(study: Path, call: Callable[..., None], tmp_path: Path) -> None:
    common = ("--protocol", study / "protocol.yaml", "--data", study / "data", "--jobs", 1)
    call("run", *common, "study", "--out", tmp_path / "out", "--arms", "fm", "--sizes", 40, "--seeds", 1, 2)
    call("run", *common, "means", tmp_path / "out", "--out", tmp_path / "means")
    (run,) = json.loads((tmp_path / "means" / "results.json").read_text())["runs"]
    assert (run["arm"], run["seed"], run["fit"]["networks"]) == ("fm", 0, 2)
    assert run["peptides"]["AGA"]["tica1"]["kl"] >= 0
    load = importlib.import_module("openmm_hvpcg.potential").load_potential
    peptides = importlib.import_module("peptides")
    x = torch.from_numpy(peptides.load_labels(study / "data" / "labels.zip")[0].positions[0]).double()
    folders = [tmp_path / place for place in ("means/models/fm-40-0", "out/models/fm-40-1", "out/models/fm-40-2")]
    mean, first, second = (float(load(folder / "potential.pt")[0](x)) for folder in folders)
    assert first != second
    # Splines, in single precision.
    assert mean == pytest.approx((first + second) / 2, rel=1e-4, abs=1e-3)
    call("report", tmp_path / "means", "--out", tmp_path / "report")
    assert "the mean of 2 networks" in (tmp_path / "report" / "table.md").read_text()


def test_seeds_of_fewer_frames_have_frames_of_their_own(
    study: Path, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def record(datasets: list[Any], *_: Any, **__: Any) -> None:
        used.append(datasets[0])
        raise InterruptedError

    monkeypatch.setattr(importlib.import_module("run"), "fit_potential", record)
    common = ("--protocol", study / "protocol.yaml", "--data", study / "data", "--jobs", 1)
    for seed in (1, 2, 3):
        with pytest.raises(InterruptedError):
            call("run", *common, "study", "--out", tmp_path, "--arms", "fm", "--sizes", 20, "--seeds", seed)
    first, second, third = used
    assert first.hash == third.hash
    assert [np.unique(d.walker, return_counts=True)[1].tolist() for d in (first, second)] == [[10, 10], [10, 10]]
    # Half of 40 frames each, none of them in both.
    assert len(np.unique(np.concatenate([first.positions, second.positions]), axis=0)) == 40


def test_convergence_is_judged(
    study: Path, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a Markov state model are those of its stationary distribution, here of two states by construction."""
    convergence = importlib.import_module("convergence")
    monkeypatch.setattr(convergence, "LAG_FRAMES", 1)
    monkeypatch.setattr(convergence, "N_STATES", 4)
    words = ("--protocol", study / "protocol.yaml", "--data", study / "data", "--out", tmp_path)
    call("convergence", *words)
    (row,) = json.loads((tmp_path / "convergence.json").read_text())["rows"]
    assert row["kl_by_start_weighted"] >= 0
    assert "| AGA |" in (tmp_path / "convergence.md").read_text()
    # Paths that start in the wrong state, one of which leaves it twice as fast as the other: 1/3 and 2/3 at the end.
    monkeypatch.setattr(convergence, "N_STATES", 2)
    rng, walkers, n = np.random.default_rng(0), 40, 200
    state = np.ones((walkers, n), dtype=int)
    for k in range(1, n):
        leaves = rng.random(walkers) < np.where(state[:, k - 1] == 1, 0.02, 0.04)
        state[:, k] = np.where(leaves, 1 - state[:, k - 1], state[:, k - 1])
    walker = np.repeat(np.arange(walkers), n)
    coordinates = state.reshape(-1, 1) + 0.01 * rng.standard_normal((walkers * n, 1))
    weights = convergence.weigh_frames(convergence.find_states(coordinates), walker, np.ones(walkers * n, dtype=bool))
    share = weights[state.ravel() == 1].sum() / weights.sum()
    # About 110 crossings each way: 13 % of the ratio of rates, 0.03 of the share; four of them.
    assert share == pytest.approx(2 / 3, abs=0.12)


@pytest.fixture
def short_sampling(call: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """sample_many.py takes few steps."""
    many = importlib.import_module("sample_many")
    for name, steps in {"SHAKING_STEPS": 20, "COOLING_STEPS": 10, "STRIDE": 5}.items():
        monkeypatch.setattr(many, name, steps)


@pytest.mark.usefixtures("short_sampling")
def test_many_peptides_are_sampled_on_cores(study: Path, call: Callable[..., None], tmp_path: Path) -> None:
    words = ("--protocol", study / "protocol.yaml", "--scratch", tmp_path, "--out", tmp_path / "labels.zip")
    call("sample_many", *words, "--jobs", 1)
    data = importlib.import_module("peptides").load_labels(tmp_path / "labels.zip")
    assert [d.name for d in data] == ["AA", "AG", "GA"]
    assert {(d.n_frames, len(np.unique(d.walker))) for d in data} == {(40, 4)}
    made = (tmp_path / "AA.zarr" / "zarr.json").stat().st_mtime_ns
    call("sample_many", *words, "--jobs", 1)
    assert (tmp_path / "AA.zarr" / "zarr.json").stat().st_mtime_ns == made, "made again"
    common = ("--protocol", study / "protocol.yaml", "--data", study / "data", "--jobs", 1)
    out = ("--out", tmp_path / "out", "--labels", tmp_path / "labels.zip")
    call("run", *common, "study", *out, "--arms", "fm", "--sizes", 40, "--seeds", 1)
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert run["peptides"]["AGA"]["tica1"]["kl"] >= 0


@pytest.mark.usefixtures("short_sampling")
def test_frames_on_barriers_are_labelled_without_the_bias(
    study: Path, call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--protocol", study / "protocol.yaml", "--jobs", 1, "--frames", 40)
    bias = ("--flatten", 0.7, "--seen", study / "data" / "labels.zip")
    for name, words in {"plain": (), "flat": bias}.items():
        call("sample_many", *common, *words, "--scratch", tmp_path / name, "--out", tmp_path / f"{name}.zip")
    peptides = importlib.import_module("peptides")
    plain, flat = (peptides.load_labels(tmp_path / f"{name}.zip") for name in ("plain", "flat"))
    for a, b in zip(plain, flat, strict=True):
        assert b.attributes["frames"]["bias"]["share"] == 0.7
        assert "bias" not in a.attributes["frames"]
        assert b.attributes["frames"]["system_hash"] == a.attributes["frames"]["system_hash"]
        # The same seeds, and another trajectory.
        assert not np.allclose(a.positions[-1], b.positions[-1], atol=1e-3)
    # Trained on beside the others, a molecule each, for as many steps: 40 frames and 40 more.
    words = ("--protocol", study / "protocol.yaml", "--data", study / "data", "--jobs", 1, "study")
    out = ("--out", tmp_path / "out", "--arms", "fm", "--sizes", 40, "--seeds", 1, "--flat", tmp_path / "flat.zip")
    call("run", *words, *out)
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    made_from = json.loads((tmp_path / "out/models/fm-40-1/fit/made_from.json").read_text())
    assert set(made_from["datasets"]) == {f"{d.name}{end}" for d in flat for end in ("", "_flat")}
    assert made_from["priors"]["min_molecules"] == 3
    call("report", tmp_path / "out", "--out", tmp_path / "report")
    table = (tmp_path / "report" / "table.md").read_text()
    assert "## 40 frames of each training peptide, and 40 on barriers" in table
    assert run["peptides"]["AGA"]["tica1"]["kl"] >= 0
    module = importlib.import_module("run")
    choose = partial(module.choose_settings, load_protocol(FOLDER / "protocol.yaml"))
    settings = [choose(module.Work("fm", size, 1), more)[0] for size, more in ((1600, 0), (800, 800), (800, 0))]
    assert [(s.max_epochs, s.frames_per_molecule) for s in settings] == [(20, 1600), (20, 800), (40, 800)]
    # Where fewer frames are trained on there are as many of each kind, and other seeds have others.
    first, second = (module.load_flat(tmp_path / "flat.zip", module.Work("fm", 20, seed))[0] for seed in (1, 2))
    assert (first.name, first.n_frames, second.n_frames) == (f"{flat[0].name}_flat", 20, 20)
    assert len(np.unique(np.concatenate([first.positions, second.positions]), axis=0)) == 40
    with pytest.raises(SystemExit):
        call("sample_many", *common, "--flatten", 0.7, "--scratch", tmp_path / "no", "--out", tmp_path / "no.zip")
    assert "--flatten and --seen go together" in capsys.readouterr().err


@pytest.mark.usefixtures("short_sampling")
def test_backbone_models_are_judged_by_the_beads_of_the_references(
    study: Path, call: Callable[..., None], tmp_path: Path
) -> None:
    protocol = tmp_path / "backbone.yaml"
    beads = yaml.safe_load((FOLDER / "backbone.yaml").read_text())["mapping"]
    protocol.write_text(yaml.safe_dump({**PROTOCOL, "mapping": {**beads, "share_backbone": True}}))
    for role, archive in (("train", "labels"), ("test", "unseen")):
        words = ("--role", role, "--frames", 24, "--walkers", 2, "--jobs", 1)
        files = ("--scratch", tmp_path / role, "--out", tmp_path / f"{archive}.zip")
        call("sample_many", "--protocol", protocol, *words, *files)
    peptides = importlib.import_module("peptides")
    (unseen,) = peptides.load_labels(tmp_path / "unseen.zip")
    # Three residues of N, CA and C; CH3 and C before them, N and CH3 behind.
    assert (unseen.name, unseen.n_frames, unseen.bead_map.n_beads) == ("AGA", 24, 13)
    assert len(unseen.bead_map.bonds) == 12
    assert set(unseen.bead_map.species) == {*("ACE:CH3", "ACE:C", "BB:N", "ALA:CA", "GLY:CA", "BB:C", "NME:N", "NME:C")}
    common = ("--protocol", protocol, "--data", study / "data", "--jobs", 1)
    archives = ("--labels", tmp_path / "labels.zip", "--unseen", tmp_path / "unseen.zip")
    call("run", *common, "study", "--out", tmp_path / "out", *archives, "--arms", "fm", "--sizes", 24, "--seeds", 1, 2)
    call("run", *common, "means", tmp_path / "out", "--out", tmp_path / "means", *archives)
    for folder, seeds in (("out", (1, 2)), ("means", (0,))):
        runs = json.loads((tmp_path / folder / "results.json").read_text())["runs"]
        assert [r["seed"] for r in runs] == list(seeds)
        for run in runs:
            # The distribution of the CA and the caps alone, as of any other model.
            assert run["peptides"]["AGA"]["radius_of_gyration"]["reference_mean_nm"] == pytest.approx(0.4, abs=0.1)
            squares = {name: np.mean(s) for name, s in run["fit"]["unseen_forces"]["AGA"].items()}
            # An epoch on 54 frames: not much is learnt, and little is spoilt.
            assert squares["model"] == pytest.approx(squares["priors"], rel=0.1)
            assert squares["priors"] < np.square(unseen.forces).mean()
    call("report", tmp_path / "out", "--out", tmp_path / "report")
    table = (tmp_path / "report" / "table.md").read_text()
    lines = table.split("## Forces of unseen peptides")[1].splitlines()
    row = next(line for line in lines if line.startswith("| AGA |"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    fits = [run["fit"]["unseen_forces"]["AGA"] for run in found]
    gain = np.mean([np.mean(f["priors"]) - np.mean(f["model"]) for f in fits])
    assert float(row.split("|")[2].split("±")[0]) == pytest.approx(gain, abs=0.51)
    fit = tmp_path / "out" / "models" / "fm-24-1" / "fit"
    call("dihedral_bias", tmp_path / "unseen.zip", fit, "--out", tmp_path / "bias.json")
    assert set(json.loads((tmp_path / "bias.json").read_text())["coefficients"]["fm-24-1"]) == {
        *("cos phi", "sin phi", "cos psi", "sin psi")
    }
    # Labels that are the model's forces and those of 3 kJ/mol cos psi: this is found, without an error.
    bias = importlib.import_module("dihedral_bias")
    found = bias.find_biases(load_fit(fit), [add_cos_psi(unseen, load_fit(fit), 3.0)])
    assert found["cos psi"] == (pytest.approx(3.0, rel=1e-3), pytest.approx(0.0, abs=1e-3))
    # Of labels that are the model's forces nothing is left, along psi alone.
    collect = importlib.import_module("barriers").collect
    own, left = (collect([add_cos_psi(unseen, load_fit(fit), 0.0)], model) for model in (None, load_fit(fit)))
    assert len(left.angles) == 3 * unseen.n_frames
    assert np.abs(left.along).max() < 1e-4 * np.abs(own.along).max()
    frames, _ = peptides.load_labelled(tmp_path / "unseen.zip", "AGA")
    reference, _ = peptides.load_reference(study / "data" / "references.zip", "AGA")
    chosen = importlib.import_module("judging").choose_beads(frames, reference.topology)
    np.testing.assert_array_equal(chosen.positions, frames.positions[:, [0, 3, 6, 9, 12]])


def add_cos_psi(data: Any, fit: Any, coefficient: float) -> Any:
    """Labels (kJ/mol/nm) that are the forces of a model and of ``coefficient`` times cos psi of every residue."""
    functions = dict(importlib.import_module("dihedral_bias").list_functions(data.bead_map))
    total = importlib.import_module("judging").bind_model(fit.network, fit.spec, data.bead_map)
    x = torch.from_numpy(data.positions).double()
    forces = compute_forces(lambda p: total.frame_energies(p) + coefficient * functions["cos psi"](p), x)
    return replace(data, forces=forces.numpy().astype(np.float32))


def test_work_over_barriers(call: Callable[..., None], tmp_path: Path) -> None:
    """Labels of real frames that are the forces of 5 cos(dihedral): the work of the cosine, without an error."""
    peptides, barriers = (importlib.import_module(name) for name in ("peptides", "barriers"))
    several = [d for d in peptides.load_labels(REPOSITORY / "data/unseen_peptides/labels.zip") if len(d.name) == 6]
    data = several[0]
    (torsion,) = Bonded.find(data.bead_map).torsions[:1]
    x = torch.from_numpy(data.positions).double()
    forces = compute_forces(lambda p: 5.0 * torch.cos(dihedral_angle(p, torsion[None]))[:, 0], x)
    samples = barriers.collect([replace(data, forces=forces.numpy())])
    angles = np.radians(samples.angles[: data.n_frames])
    np.testing.assert_allclose(samples.along[: data.n_frames], 5.0 * np.sin(angles), atol=1e-6)
    in_helix = np.abs(np.degrees(dihedral_angle(x, Bonded.find(data.bead_map).torsions).numpy()) - 50) < 50
    np.testing.assert_allclose(samples.helical[: data.n_frames], in_helix[:, 1:].mean(axis=1))
    # Means over bins of 14.5 degrees are off the cosine's slope by 0.3 %.
    grid = np.linspace(-180, 180, 36001)[:-1]
    found = barriers.add_up(barriers.Samples(grid, 5.0 * np.sin(np.radians(grid)), grid), 50, 195)
    assert found["difference"] == pytest.approx(5.0 * (np.cos(np.radians(195)) - np.cos(np.radians(50))), rel=3e-3)
    assert found["error"] == pytest.approx(0.0, abs=0.02)
    peptides.save_labels(tmp_path / "labels.zip", several, {})
    call("barriers", tmp_path / "labels.zip", "--out", tmp_path / "out.json")
    sizes = json.loads((tmp_path / "out.json").read_text())["labels"]
    assert [name.split(", ")[1] for name in sizes] == [f"{n} frames a peptide" for n in (1600, 800, 400)]
    errors = [figures["helix to strand"]["error"] for figures in sizes.values()]
    assert sizes.popitem()[1].keys() == {"helix to strand", "strand to helix"}
    # A quarter of the frames has twice the error; by the scatter of variances in bins of few frames not quite.
    assert 1.5 < errors[2] / errors[0] < 2.7


def test_backbone_study_has_the_peptides_of_the_first() -> None:
    first, backbone = (yaml.safe_load((FOLDER / name).read_text()) for name in ("protocol.yaml", "backbone.yaml"))
    assert backbone["molecules"] == first["molecules"]


def test_many_peptides_hold_nothing_of_the_unseen(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    call("draw_many")
    assert capsys.readouterr().out == (FOLDER / "many.yaml").read_text(), "draw_many.py makes it anew"
    molecules = yaml.safe_load((FOLDER / "many.yaml").read_text())["molecules"]
    train, test = ([m["name"] for m in molecules if m["role"] == role] for role in ("train", "test"))
    assert (len(train), len(set(train)), len(test)) == (164, 164, 9)
    triples = {s[i : i + 3] for s in test for i in range(len(s) - 2)}
    assert not any(triple in name for triple in triples for name in train)
    seen, unseen = ({s[i : i + 2] for s in names for i in range(len(s) - 1)} for names in (train, test))
    assert unseen - seen == {"AL", "QP"}


def test_kept_data_are_of_the_protocol() -> None:
    """What later sittings start from: every peptide, and no test peptide among the labels."""
    sys.path.insert(0, str(FOLDER))
    try:
        peptides = importlib.import_module("peptides")
    finally:
        sys.path.remove(str(FOLDER))
    protocol = yaml.safe_load((FOLDER / "protocol.yaml").read_text())
    names = {role: {m["name"] for m in protocol["molecules"] if m["role"] == role} for role in ("train", "test")}
    assert (len(names["train"]), len(names["test"])) == (24, 9)
    assert set("".join(names["train"])) == set("ACDEFGHIKLMNPQRSTVWY")
    datasets = peptides.load_labels(REPOSITORY / "data" / "unseen_peptides" / "labels.zip")
    assert {d.name for d in datasets} == names["train"]
    assert {d.temperature_K for d in datasets} == {protocol["temperature_K"]}
    for name in names["test"]:
        frames, bead_map = peptides.load_reference(REPOSITORY / "data" / "unseen_peptides" / "references.zip", name)
        assert frames.n_frames == 64 * 320
        assert bead_map.n_beads == len(name) + 2
    sizes = [f.stat().st_size for f in (REPOSITORY / "data" / "unseen_peptides").iterdir()]
    assert sum(sizes) < 25e6
