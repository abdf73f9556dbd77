"""The check that a network of one's own has to pass before it is trained: good ones pass, each bad one is named."""

from __future__ import annotations

import logging

import bad_networks
import pytest
import torch

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.errors import PotentialError
from openmm_hvpcg.training.models.check import check_model, takes_many_molecules
from openmm_hvpcg.training.models.registry import build_base

SPECIES = torch.tensor([0, 1, 2, 1, 0])
GOOD = ("schnet", "painn", "my_network:MyNetwork", "bad_networks:Pairs")
BAD = {
    "Columns": r"wrong shape for 4 frames: expected one energy a frame, \(4,\), got \(4, 1\)",
    "Total": r"wrong shape .* got \(\)",
    "Pinned": "its energy changes when the molecule is moved",
    "Oriented": "its energy changes when the molecule is turned",
    "Lambda": "not scriptable",
    "Detached": r"differentiating its energy failed \(RuntimeError: .*does not require grad",
    "PartlyDetached": "its forces are not minus the gradient of its energy",
    "Cdist": "differentiating its energy twice failed .*_cdist_backward",
    "Once": "its Hessian-vector products are not the derivative of its forces",
    "Dropout": "differ between training and evaluation mode",
    "Mixing": "depends on the other frames of its batch",
    "SingleOnly": "expected torch.float64, got torch.float32",
    "DoubleConstant": "expected torch.float32, got torch.float64",
    "Failing": r"evaluating it failed \(RuntimeError: out of ideas\)",
    "NotFinite": "not finite",
    "Indifferent": "does not depend on the positions",
    "Springs": "no trainable parameter",
    "Kinked": "jumps.* as a molecule is stretched",
    "Cut": "its energy jumps",
    "SlopeCut": "its force jumps",
    "CosineCut": "its second derivative jumps",
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_base(3, ModelSettings(kind=kind, features=8, radial=8, cutoff_nm=0.9), 2.5)


@pytest.mark.parametrize("kind", GOOD)
def test_good_networks_pass_and_stay_as_they_are(kind: str) -> None:
    network = build(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random_state = torch.random.get_rng_state()
    check_model(network, SPECIES, 0.9, kind)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert network.training


@pytest.mark.parametrize("name", BAD)
def test_bad_networks_are_refused_by_name(name: str) -> None:
    with pytest.raises(PotentialError, match=BAD[name]) as caught:
        check_model(build(f"bad_networks:{name}"), SPECIES, 0.9, name)
    assert str(caught.value).startswith(f"{name}: ")


def test_every_bad_network_is_tried() -> None:
    names = {n for n, c in vars(bad_networks).items() if isinstance(c, type) and c.__module__ == "bad_networks"}
    assert names - {"Bad", "Pairs", "_Once"} == set(BAD)


@pytest.mark.parametrize(("kind", "warned"), [("my_network:MyNetwork", False), ("bad_networks:Pairs", True)])
def test_warns_of_a_start_away_from_the_priors(kind: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "openmm_hvpcg"):
        check_model(build(kind), SPECIES, 0.9, kind)
    assert ("not zero to begin with" in caplog.text) is warned


class Forgetful(torch.nn.Module):
    """Takes species of every frame, and uses those of the first for all."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, positions: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
        return self.network(positions, species[0] if species.ndim == 2 else species)


@pytest.mark.parametrize("n_beads", [2, 4, 5, 9])
def test_finds_who_takes_many_molecules_at_once(n_beads: int) -> None:
    """Of any size: shapes that happen to fit, as four beads in four frames, do not mislead it."""
    assert takes_many_molecules(build("schnet"), n_beads, 3, 0.9)
    assert takes_many_molecules(build("painn"), n_beads, 3, 0.9)
    assert not takes_many_molecules(build("my_network:MyNetwork"), n_beads, 3, 0.9)
    assert not takes_many_molecules(Forgetful(build("schnet")), n_beads, 3, 0.9)
