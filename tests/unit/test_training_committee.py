"""Several networks as one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from training_cases import build_labels

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import StudyError
from openmm_hvpcg.potential import load_potential
from openmm_hvpcg.training import fit as fit_module
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import fit_potential, load_fit
from openmm_hvpcg.training.models.committee import Committee, combine_networks
from openmm_hvpcg.training.models.registry import build_network, scale_energy
from openmm_hvpcg.training.models.schnet import SchNet
from openmm_hvpcg.training.models.torsions import Bonded, bind_network, split_network

N_SPECIES = 4
BONDED = Bonded(torch.arange(3)[:, None] + torch.arange(4), torch.arange(2)[:, None] + torch.arange(5))
SETTINGS = TrainingSettings(
    hvp_weight=1.0, max_epochs=2, batch_size=32, learning_rate=5e-3, seed=5, accelerator="cpu", committee=3
)
MODEL = ModelSettings(features=8, interactions=1, radial=8, cutoff_nm=0.8)


def build_random(settings: ModelSettings, seed: int, share: float) -> torch.nn.Module:
    """Nothing in it is zero; ``share`` of its energy is kept."""
    torch.manual_seed(seed)
    network = build_network(N_SPECIES, settings, 2.5)
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.4)
    scale_energy(network, share)
    return network.double()


@pytest.mark.parametrize(
    ("changed", "is_one"),
    [
        ({}, True),
        ({"chiral_channels": 3}, True),
        ({"torsions": False}, True),
        ({"interactions": 3, "features": 5}, True),
        ({"kind": "painn"}, False),
    ],
    ids=str,
)
def test_energy_is_the_mean(changed, is_one):
    """To rounding in double, also of networks of which a part only was kept; SchNets become one."""
    settings = ModelSettings(**{"features": 6, "radial": 8, **changed})
    members = [build_random(settings, seed, share) for seed, share in enumerate((1.0, 0.7, 0.4))]
    before = [w.clone() for m in members for w in m.parameters()]
    together = combine_networks(members)
    base, torsions = split_network(together)
    assert isinstance(base, SchNet if is_one else Committee)
    assert (torsions is None) == (not settings.torsions)
    generator = torch.Generator().manual_seed(1)
    positions = 0.8 * torch.rand(5, 6, 3, dtype=torch.double, generator=generator)
    for species in (torch.tensor([0, 1, 2, 3, 1, 0]), torch.arange(30).reshape(5, 6) % N_SPECIES):
        mean = sum(bind_network(m, species, BONDED)(positions) for m in members) / 3
        assert float(mean.detach().std()) > 0.1
        torch.testing.assert_close(bind_network(together, species, BONDED)(positions), mean, rtol=1e-12, atol=1e-12)
    for weights, old in zip((w for m in members for w in m.parameters()), before, strict=True):
        assert torch.equal(weights, old)
    # As one network has: its energy can be scaled.
    scale_energy(together, 0.5)
    half = bind_network(together, species, BONDED)(positions)
    torch.testing.assert_close(half, 0.5 * mean, rtol=1e-12, atol=1e-12)


def train(folder, settings=SETTINGS):
    return fit_potential([build_labels(120)], settings, MODEL, PriorSettings(), folder, arm="c", progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("committee")
    return folder, train(folder)


def test_members_are_trainings_of_other_seeds(trained, tmp_path):
    folder, result = trained
    alone = train(tmp_path, SETTINGS.model_copy(update={"committee": 1, "seed": 6}))
    second = load_fit(folder / "members" / "1")
    assert second.metrics["force_rmse_validation"] == alone.metrics["force_rmse_validation"]
    for a, b in zip(second.network.parameters(), alone.network.parameters(), strict=True):
        assert torch.equal(a, b)
    errors = [load_fit(folder / "members" / str(k)).metrics["force_rmse_validation"] for k in range(3)]
    assert len(set(errors)) == 3
    # A mean of networks is never worse than they are on average (the error is convex), but for what is kept of it.
    assert result.metrics["force_rmse_validation"] <= np.sqrt(np.mean(np.square(errors))) * (1 + 1e-6)
    assert 0.0 < result.metrics["network_share"] <= 1.0
    assert len(result.curves) == 1 + SETTINGS.max_epochs
    assert result.curves[0]["train_loss"] is None
    assert result.metrics["epochs"] == SETTINGS.max_epochs


def test_committee_is_loaded_exported_and_described_as_one(trained, tmp_path):
    folder, result = trained
    loaded = load_fit(folder)
    assert loaded.spec.to_json() == result.spec.to_json()
    for a, b in zip(loaded.network.parameters(), result.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loaded.spec.provenance["made_from"]["training"]["committee"] == 3
    frames = build_labels(20).positions
    check = export_potential(result.network, result.spec, tmp_path / "potential.pt", frames)
    # With its filters as splines, as one network has.
    assert any(item.name.startswith("tables") for item in check.items)
    script, _ = load_potential(tmp_path / "potential.pt")
    script.include_priors = False
    x = torch.from_numpy(frames[0]).double()
    bonded = Bonded.find(result.spec.bead_map)
    members = [load_fit(folder / "members" / str(k)).network for k in range(3)]
    energies = [bind_network(m, script.species, bonded)((x - x.mean(0)).float()[None])[0] for m in members]
    share = result.metrics["network_share"]
    # Splines: 1e-5 of the energies' spread; float32.
    assert float(script(x)) == pytest.approx(share * float(sum(energies)) / 3, rel=1e-4, abs=1e-3)


def test_killed_committee_goes_on(trained, tmp_path, monkeypatch):
    folder, whole = trained
    calls = []
    genuine = fit_module.train_in_processes

    def count(*arguments):
        calls.append(arguments[3].name)
        return genuine(*arguments)

    monkeypatch.setattr(fit_module, "train_in_processes", count)
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "training.json").unlink()
    shutil.rmtree(tmp_path / "again" / "members" / "2")
    result = train(tmp_path / "again")
    assert calls == ["2"]
    for a, b in zip(result.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(StudyError, match="committee"):
        train(tmp_path / "again", SETTINGS.model_copy(update={"committee": 2}))
