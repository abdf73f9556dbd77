from __future__ import annotations

import numpy as np
import pytest
import torch
from training_cases import build_labels

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.training import fit as fit_module
from openmm_hvpcg.training.averaging import average_weights
from openmm_hvpcg.training.fit import fit_potential, load_fit
from openmm_hvpcg.training.matching import MatchingModule

MODEL = ModelSettings(features=8, interactions=1, radial=8, cutoff_nm=0.8)
SETTINGS = TrainingSettings(max_epochs=4, batch_size=32, learning_rate=2e-2, seed=5, accelerator="cpu")


def train(folder, **changed):
    settings = SETTINGS.model_copy(update=changed)
    return fit_potential([build_labels(n_frames=120)], settings, MODEL, PriorSettings(), folder, progress=False)


def test_mean_follows_with_its_decay_and_soon_forgets_the_start():
    network = torch.nn.Linear(3, 1)
    averaged = average_weights(network, 0.8)
    rng = np.random.default_rng(2)
    expected = None
    for n in range(60):
        weights = rng.normal(size=(1, 3))
        with torch.no_grad():
            network.weight.copy_(torch.from_numpy(weights))
        averaged.update_parameters(network)
        decay = min(0.8, (1 + n) / (10 + n))
        expected = weights if expected is None else decay * expected + (1 - decay) * weights
        # Float32 rounding of 60 steps.
        np.testing.assert_allclose(averaged.module.weight.numpy(), expected, atol=1e-6)
    assert not any(p.requires_grad for p in averaged.parameters())


@pytest.mark.parametrize("hvp_weight", [0.0, 1.0])
def test_the_mean_is_what_is_judged_and_kept(tmp_path, monkeypatch, hvp_weight):
    """The weights that are kept are the recursion over those of every step up to the best epoch, not of one step."""
    steps = []
    genuine = MatchingModule.take_step

    def record(self, batch, k):
        loss = genuine(self, batch, k)
        steps.append(torch.nn.utils.parameters_to_vector(self.network.parameters()).detach().double())
        return loss

    monkeypatch.setattr(MatchingModule, "take_step", record)
    monkeypatch.setattr(fit_module, "choose_network_share", lambda *_: 1.0)
    result = train(tmp_path, weight_averaging=0.9, hvp_weight=hvp_weight)
    n_steps = len(steps) // 4
    expected = steps[0]
    for n, weights in enumerate(steps[1 : n_steps * (result.metrics["best_epoch"] + 1)], start=1):
        expected = torch.lerp(weights, expected, min(0.9, (1 + n) / (10 + n)))
    kept = torch.nn.utils.parameters_to_vector(load_fit(tmp_path).network.parameters()).detach().double()
    # Float32 rounding.
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)
    assert float((kept - steps[n_steps * (result.metrics["best_epoch"] + 1) - 1]).abs().max()) > 1e-3
    best = result.curves[1 + result.metrics["best_epoch"]]
    assert result.metrics["force_rmse_validation"] == pytest.approx(best["val_force_rmse"], rel=1e-4)


def test_without_averaging_the_weights_themselves_are_kept(tmp_path):
    """And training goes the same way: the mean is looked at, never trained with."""
    plain = train(tmp_path / "plain", hvp_weight=0.0)
    averaged = train(tmp_path / "averaged", hvp_weight=0.0, weight_averaging=0.9)
    losses = [[row["train_loss"] for row in result.curves] for result in (plain, averaged)]
    assert losses[0] == losses[1]
    assert plain.curves[-1]["val_force_rmse"] != averaged.curves[-1]["val_force_rmse"]
