from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import build_labels

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import DataError, PotentialError, StudyError
from openmm_hvpcg.potential import load_potential
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import fit_potential, load_fit

MODEL = ModelSettings(features=16, interactions=1, radial=12, cutoff_nm=0.8)
SETTINGS = TrainingSettings(
    hvp_weight=1.0, max_epochs=6, batch_size=32, learning_rate=5e-3, seed=5, accelerator="cpu", patience=4
)


def train(folder: Path, settings: TrainingSettings = SETTINGS, **labels):
    return fit_potential([build_labels(**labels)], settings, MODEL, PriorSettings(), folder, arm="a", progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return folder, train(folder)


@pytest.mark.parametrize("hvp_weight", [0.0, 1.0])
def test_training_learns_what_the_priors_miss(tmp_path, hvp_weight):
    """The springs between unbonded beads are unknown to the priors; noise-free labels can be fitted."""
    settings = SETTINGS.model_copy(
        update={"hvp_weight": hvp_weight, "max_epochs": 40, "learning_rate": 1e-2, "batch_size": 16}
    )
    metrics = train(tmp_path, settings, n_frames=400).metrics
    assert metrics["force_rmse_validation"] < 0.6 * metrics["force_rmse_priors"]
    assert metrics["hvp_rmse_validation"] < 0.6 * metrics["hvp_rmse_priors"]


def test_result_has_curves_metrics_and_files(trained):
    folder, result = trained
    assert [row["epoch"] for row in result.curves] == list(range(7))
    # Epoch 0 is the priors alone: its error is that of the priors in the metrics, one probe against all probes apart.
    assert result.curves[0]["val_force_rmse"] == pytest.approx(result.metrics["force_rmse_priors"], rel=1e-4)
    assert result.metrics["n_frames"] + result.metrics["n_validation_frames"] == 240
    assert result.metrics["force_noise"] is not None
    for name in ("training.json", "made_from.json", "checkpoints/last.ckpt", "logs/csv/metrics.csv"):
        assert (folder / name).exists()
    assert list((folder / "logs" / "tensorboard").glob("events.*"))


def test_finished_training_is_returned_not_repeated(trained, caplog):
    folder, result = trained
    before = (folder / "training.json").read_bytes()
    with caplog.at_level(logging.INFO, "openmm_hvpcg"):
        again = train(folder)
    assert "finished already" in caplog.text
    assert again.metrics == result.metrics
    assert (folder / "training.json").read_bytes() == before
    for a, b in zip(again.network.parameters(), result.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_settings_or_data_are_refused(trained):
    folder, _ = trained
    with pytest.raises(StudyError, match=r"training\.learning_rate \(0\.005 -> 0\.1\)"):
        train(folder, SETTINGS.model_copy(update={"learning_rate": 0.1}))
    with pytest.raises(StudyError, match=r"datasets\.mol"):
        train(folder, seed=9)


def test_same_seed_same_model_other_seed_other_model(trained, tmp_path):
    _, result = trained
    assert train(tmp_path / "same").curves == result.curves
    assert train(tmp_path / "other", SETTINGS.model_copy(update={"seed": 6})).curves != result.curves


def test_killed_training_resumes_to_the_uninterrupted_result(trained, tmp_path):
    """SIGKILL after some epochs; the resumed run has the same curves and weights as one that was left alone."""
    _, whole = trained
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_training_fit as t, pathlib; t.train(pathlib.Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    last, deadline = tmp_path / "checkpoints" / "last.ckpt", time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    assert not (tmp_path / "training.json").exists()
    resumed = train(tmp_path)
    # One thread does the same operations in the same order.
    assert resumed.curves == whole.curves
    for a, b in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_priors_and_scales_see_training_frames_only(tmp_path):
    """Garbage in the validation blocks must not reach the priors."""
    data = build_labels(200)
    spoiled = data.positions.copy()
    # With two walkers of 100 frames, 0.2 and one block, the last 20 frames of each are held out.
    for rows in (slice(80, 100), slice(180, 200)):
        spoiled[rows] *= 1.5
    settings = SETTINGS.model_copy(update={"max_epochs": 1, "validation_blocks": 1})
    results = [
        fit_potential([d], settings, MODEL, PriorSettings(), tmp_path / str(k), progress=False)
        for k, d in enumerate((data, replace(data, positions=spoiled)))
    ]
    assert results[0].spec.priors == results[1].spec.priors


def test_two_molecules_train_one_potential(tmp_path):
    first, second = build_labels(100, name="one"), build_labels(80, seed=3, name="two")
    result = fit_potential(
        [first, second],
        SETTINGS.model_copy(update={"max_epochs": 2}),
        MODEL,
        PriorSettings(),
        tmp_path,
        progress=False,
    )
    assert result.spec.datasets == {"one": first.hash, "two": second.hash}
    assert result.metrics["n_frames"] == 144


def test_unusable_data_are_refused(tmp_path):
    data = build_labels(100)
    with pytest.raises(DataError, match="different temperatures"):
        fit_potential([data, replace(data, temperature_K=310.0)], SETTINGS, MODEL, PriorSettings(), tmp_path)
    with pytest.raises(DataError, match="at least one dataset"):
        fit_potential([], SETTINGS, MODEL, PriorSettings(), tmp_path)
    with pytest.raises(DataError, match="too few frames to fit the priors"):
        train(tmp_path, n_frames=20)
    with pytest.raises(DataError, match="no finished training"):
        load_fit(tmp_path / "none")


def test_damaged_result_is_named(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "training.json").write_text(json.dumps({"spec": {}}))
    with pytest.raises(DataError, match=r"training result is damaged"):
        load_fit(tmp_path)
    assert load_fit(folder).metrics


def test_export_writes_a_potential_that_equals_the_model(trained, tmp_path):
    _, result = trained
    frames = build_labels(20).positions
    check = export_potential(result.network, result.spec, tmp_path / "potential.pt", frames)
    assert check.passed
    script, spec = load_potential(tmp_path / "potential.pt")
    assert spec.metrics == result.metrics
    script.include_priors = False
    x = torch.from_numpy(frames[0]).double()
    expected = result.network((x - x.mean(0)).float()[None], script.species)[0]
    # The same float32 operations, scripted: fusion may change the last bits.
    assert float(script(x)) == pytest.approx(float(expected), rel=1e-5, abs=1e-4)


def test_export_refuses_a_potential_that_fails(trained, tmp_path):
    _, result = trained

    class Leaning(torch.nn.Module):
        """Depends on where the molecule points: not a potential."""

        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, positions: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
            return self.network(positions, species) + 500.0 * positions[:, 0, 0]

    path = tmp_path / "potential.pt"
    with pytest.raises(PotentialError, match="rotation"):
        export_potential(Leaning(result.network), result.spec, path, build_labels(20).positions)
    assert list(tmp_path.iterdir()) == []
    assert np.isfinite(result.metrics["force_rmse_validation"])
