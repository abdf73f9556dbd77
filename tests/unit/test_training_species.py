"""Species shrunk towards the mean of their kind, by how many training molecules have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import build_labels

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import ConfigError
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import FitResult, fit_potential, load_fit
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.models.torsions import Bonded, bind_network
from openmm_hvpcg.training.species import compute_shares, shrink_species

MODEL = ModelSettings(features=8, interactions=1, radial=8, cutoff_nm=0.8)
SETTINGS = TrainingSettings(max_epochs=2, batch_size=32, learning_rate=5e-3, accelerator="cpu", species_molecules=3.0)
CHAINS = (("ACE", "ALA", "GLY", "ALA", "NME"), ("ACE", "ALA", "ALA", "VAL", "NME"))


def build_data() -> list[LabelledFrames]:
    """Two molecules with residues between caps."""
    data = [build_labels(100, name="one", force_noise=30.0), build_labels(80, seed=3, name="two", force_noise=30.0)]
    return [replace(d, bead_map=replace(d.bead_map, species=s)) for d, s in zip(data, CHAINS, strict=True)]


def train(folder: Path, settings: TrainingSettings = SETTINGS, model: ModelSettings = MODEL) -> FitResult:
    return fit_potential(build_data(), settings, model, PriorSettings(), folder, progress=False)


def test_share_grows_with_the_molecules_that_have_the_species() -> None:
    """A residue twice in a molecule is there once; caps have nothing to lean on."""
    shares = compute_shares(build_data(), 3.0)
    assert shares == {"ALA": 2 / 5, "GLY": 1 / 4, "VAL": 1 / 4}


def test_species_that_name_an_atom_lean_on_the_same_atom() -> None:
    data = [
        replace(d, bead_map=replace(d.bead_map, species=tuple(["ALA:CA", "ALA:CB", "GLY:CA", "ACE", "NME"])))
        for d in build_data()
    ]
    assert compute_shares(data, 2.0) == {"ALA:CA": 0.5, "GLY:CA": 0.5}


@pytest.mark.parametrize("kind", ["schnet", "painn"])
def test_embeddings_move_towards_their_mean(kind: str) -> None:
    species = ("ACE", "ALA", "GLY", "NME", "VAL")
    network = build_network(5, MODEL.model_copy(update={"kind": kind}), 2.5)
    embeddings = [m.weight for m in network.modules() if isinstance(m, torch.nn.Embedding)]
    assert len(embeddings) == 2  # of the beads and of the dihedrals
    before = [w.detach().clone() for w in embeddings]
    shrink_species(network, species, {"ALA": 0.5, "GLY": 0.0, "VAL": 1.0})
    for old, new in zip(before, embeddings, strict=True):
        mean = old[[1, 2, 4]].mean(0)
        for row, share in ((1, 0.5), (2, 0.0), (4, 1.0)):
            torch.testing.assert_close(new[row].detach(), mean + share * (old[row] - mean))
        assert torch.equal(new[[0, 3]], old[[0, 3]])


def test_shrunk_network_is_what_is_judged_kept_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(tmp_path / "fit")
    assert result.metrics["species_shares"] == {"ALA": 2 / 5, "GLY": 1 / 4, "VAL": 1 / 4}
    assert any("counted half where 3 training molecules" in line for line in result.metrics["diagnosis"]["weights"])
    again = load_fit(tmp_path / "fit")
    for a, b in zip(result.network.state_dict().values(), again.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    whole = train(tmp_path / "whole", SETTINGS.model_copy(update={"species_molecules": 0.0}))
    assert whole.metrics["species_shares"] == {}
    assert result.curves == whole.curves  # the training is the same
    assert result.metrics["force_rmse_validation"] != pytest.approx(whole.metrics["force_rmse_validation"], rel=1e-6)
    # Trainings from before there were shares kept everything.
    path = tmp_path / "whole" / "training.json"
    content = json.loads(path.read_text())
    del content["species_shares"]
    path.write_text(json.dumps(content))
    x = torch.from_numpy(build_data()[0].positions[:5])
    index = torch.from_numpy(whole.spec.compute_species_index(build_data()[0].bead_map))
    bonded = Bonded.find(build_data()[0].bead_map)
    energies = [bind_network(fit.network, index, bonded)(x) for fit in (whole, load_fit(tmp_path / "whole"), result)]
    assert torch.equal(energies[0], energies[1])
    assert not torch.allclose(energies[0], energies[2])
    export_potential(result.network, result.spec, tmp_path / "potential.pt", build_data()[0].positions[:4])


def test_other_networks_see_to_their_species_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "contract"))
    model = ModelSettings(kind="my_network:MyNetwork", features=8, radial=8, cutoff_nm=0.8)
    with pytest.raises(ConfigError, match="species_molecules is for the package's own networks: got my_network"):
        train(tmp_path, model=model)


def test_what_neighbours_put_in_is_what_is_shrunk() -> None:
    """Estimates of species that differ by 1, of n molecules with noise of 2 each: the share is the best one.

    Mean square errors over 4000 draws: at n / (n + 4) it is s^2 v / (s^2 + v) = 0.8 of a noise of 4 in one molecule;
    sqrt(2 / 4000) of that is 2 %, tested at 5 of them (false alarms below 1e-5).
    """
    rng = np.random.default_rng(1)
    truth = rng.standard_normal(4000)
    for n in (1, 4):
        share = compute_shares(build_data()[:1] * n, 4.0)["ALA"]
        assert share == n / (n + 4)
        estimate = truth + 2.0 / np.sqrt(n) * rng.standard_normal(4000)
        error = np.mean((share * estimate - truth) ** 2)
        assert error == pytest.approx(4 / (n + 4), rel=0.11)
