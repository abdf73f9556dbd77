from __future__ import annotations

import logging
import sys
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
import torch
from training_cases import REST, build_labels, build_map

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings, resolve_arm, validate_protocol
from openmm_hvpcg.errors import ConfigError, DataError, PotentialError
from openmm_hvpcg.potential import load_potential
from openmm_hvpcg.training.derivatives import compute_forces, compute_forces_and_hvps
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import fit_potential, load_fit
from openmm_hvpcg.training.models import priors
from openmm_hvpcg.training.models.painn import PaiNN, soft_norm
from openmm_hvpcg.training.models.radial import cutoff_envelope
from openmm_hvpcg.training.models.registry import build_base, import_builder
from openmm_hvpcg.training.models.schnet import SchNet
from openmm_hvpcg.training.models.torsions import Bonded, bind_network

SETTINGS = ModelSettings(features=8, interactions=2, radial=10, cutoff_nm=0.5)


def build_random_network(seed: int = 0, settings: ModelSettings = SETTINGS) -> SchNet:
    torch.manual_seed(seed)
    network = build_base(3, settings, energy_scale=10.0).double()
    for parameter in network.readout[-1].parameters():
        torch.nn.init.normal_(parameter)
    return network


def sample_frames(n: int = 4, seed: int = 1) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(REST + 0.02 * rng.standard_normal((n, *REST.shape)))


SPECIES = torch.tensor([0, 1, 0, 1, 2])
INDEX4 = torch.tensor([[0, 1, 2, 3], [2, 1, 3, 4]])
ENERGIES = {
    "network": lambda x: build_random_network()(x, SPECIES),
    "bond": lambda x: priors.bond_energy(x, torch.tensor([[0, 1], [2, 3]]), torch.tensor([[900.0, 0.1], [500.0, 0.2]])),
    "angle": lambda x: priors.angle_energy(
        x, torch.tensor([[0, 1, 2], [1, 2, 4]]), torch.tensor([[50.0, -0.4, 30.0, 0.5], [9.0, 0.3, 10.0, 0.2]])
    ),
    "dihedral": lambda x: priors.dihedral_energy(x, INDEX4, torch.arange(12.0).reshape(2, 6).double()),
    "improper": lambda x: priors.improper_energy(x, INDEX4, torch.tensor([[20.0, 0.5], [30.0, -2.0]])),
    "repulsion": lambda x: priors.repulsion_energy(
        x, torch.tensor([[0, 3], [1, 4]]), torch.tensor([[0.5], [0.4]]), 2.5
    ),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_forces_and_hvps_are_derivatives_of_the_energy(name):
    """Against central differences in double: step 1e-5 nm leaves about 1e-7 of the value."""
    energy, x = ENERGIES[name], sample_frames()
    probes = torch.from_numpy(np.random.default_rng(2).standard_normal((len(x), 2, *x.shape[1:])))
    forces, hvps = compute_forces_and_hvps(energy, x, probes)
    torch.testing.assert_close(forces, compute_forces(energy, x))
    h = 1e-5
    for p in range(2):
        v = probes[:, p]
        slope = (energy(x + h * v) - energy(x - h * v)) / (2 * h)
        torch.testing.assert_close(slope, -(forces * v).sum((1, 2)), rtol=1e-5, atol=1e-5)
        curvature = -(compute_forces(energy, x + h * v) - compute_forces(energy, x - h * v)) / (2 * h)
        torch.testing.assert_close(hvps[:, p], curvature, rtol=1e-5, atol=1e-5 * float(hvps.abs().max()))
    assert float(forces.abs().max()) > 0.1


def test_energy_curvature_is_continuous_at_the_cutoff():
    """Value, slope and second derivative across the cutoff differ by O(step); a mere C1 envelope would jump."""
    network = build_random_network()
    direction = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0]]], dtype=torch.float64)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return network(x, torch.tensor([0, 1]))

    def curvature(r: float) -> float:
        return float(compute_forces_and_hvps(energy, r * direction, direction[:, None])[1][0, 0, 1, 0])

    cutoff = SETTINGS.cutoff_nm
    inside = curvature(cutoff - 1e-7)
    # The third derivative is of the size of the curvature well inside over the distance: 1e-7 nm changes little.
    scale = abs(curvature(0.8 * cutoff))
    assert scale > 1e-3
    assert abs(inside) < 1e-4 * scale
    assert curvature(cutoff + 1e-7) == 0.0
    assert float(energy((cutoff + 0.1) * direction)) == float(energy((cutoff + 0.3) * direction))


def test_envelope_is_one_at_zero_and_zero_beyond():
    x = torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64)
    assert cutoff_envelope(x).tolist() == [1.0, 0.0, 0.0]


def test_network_is_invariant_and_starts_at_zero():
    x, network = sample_frames(), build_random_network()
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0])
    # Double-precision rounding.
    torch.testing.assert_close(network(x @ turn + 1.0, SPECIES), network(x, SPECIES), rtol=1e-10, atol=1e-10)
    swapped = x[:, [2, 1, 0, 3, 4]]  # beads 0 and 2 are of one species
    torch.testing.assert_close(network(swapped, SPECIES), network(x, SPECIES), rtol=1e-10, atol=1e-10)
    assert (build_base(3, SETTINGS)(x.float(), SPECIES) == 0).all()


def test_species_matter():
    x, network = sample_frames(), build_random_network()
    assert not torch.allclose(network(x, SPECIES), network(x, torch.tensor([1, 1, 0, 1, 2])))


def test_dihedral_has_the_sign_of_mdtraj():
    x = sample_frames(20)
    trajectory = md.Trajectory(x.numpy(), build_map().to_topology())
    expected = md.compute_dihedrals(trajectory, INDEX4.numpy(), periodic=False)
    # mdtraj works in float32.
    np.testing.assert_allclose(priors.dihedral_angle(x, INDEX4).numpy(), expected, atol=1e-4)


def test_repulsion_is_smooth_where_it_starts():
    """Zero with two derivatives at sigma: within 1e-4 nm of it, energy ~ x^3, slope ~ x^2, curvature ~ x."""
    x = torch.tensor([[[0.0, 0, 0], [0.4 - 1e-4, 0, 0]]], dtype=torch.float64)
    direction = torch.tensor([[[[0.0, 0, 0], [1.0, 0, 0]]]], dtype=torch.float64)

    def energy(y: torch.Tensor) -> torch.Tensor:
        return priors.repulsion_energy(y, torch.tensor([[0, 1]]), torch.tensor([[0.4]], dtype=torch.float64), 2.5)

    force, hvp = compute_forces_and_hvps(energy, x, direction)
    # (sigma/r)^4 - 1 ~ 4 * 1e-4 / 0.4 = 1e-3: energy 2.5e-9, force 3 * 2.5e-6 * 10, curvature 6 * 2.5e-3 * 100.
    assert float(energy(x)) == pytest.approx(2.5e-9, rel=0.02)
    assert float(force[0, 1, 0]) == pytest.approx(7.5e-5, rel=0.02)
    assert float(hvp[0, 0, 1, 0]) == pytest.approx(1.5, rel=0.02)
    assert float(energy(x + 0.5 * direction[:, 0])) == 0.0


CONTRACT = Path(__file__).parents[1] / "contract"
TRAINING = TrainingSettings(hvp_weight=1.0, max_epochs=4, batch_size=16, learning_rate=5e-3, accelerator="cpu")
SMALL = {"features": 8, "interactions": 2, "radial": 8, "cutoff_nm": 0.6}


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder that networks can be imported from; what is imported from it is forgotten again."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def own_network(importable):
    """The example of the README in a module of its own."""
    (importable / "somebodys.py").write_text((CONTRACT / "my_network.py").read_text())
    return importable / "somebodys.py"


def fit(folder, model, **labels):
    return fit_potential([build_labels(**labels)], TRAINING, model, PriorSettings(), folder, progress=False)


def parse_model(**model) -> ModelSettings:
    """As a protocol YAML gives it, arm overrides applied."""
    content = {
        "molecules": [{"name": "a", "input": {"sequence": "A"}}],
        "model": {**SMALL, **model},
        "training": {"arms": [{"name": "a", "hvp_weight": 1.0}]},
    }
    return resolve_arm(validate_protocol(content), "a")[1]


@pytest.mark.parametrize("options", [{"kind": "painn"}, {"kind": "somebodys:MyNetwork", "options": {"width": 8}}])
def test_other_networks_are_trained_read_back_and_exported(tmp_path, own_network, options):
    model = parse_model(**options)
    result = fit(tmp_path / "model", model, n_frames=80)
    back = load_fit(tmp_path / "model")
    assert back.spec.model == model.model_dump(mode="json")
    x = torch.from_numpy(build_labels(n_frames=3).positions)
    rows = Bonded.find(build_labels(n_frames=3).bead_map)
    expected = bind_network(result.network, SPECIES, rows)(x).detach()
    assert float(expected.abs().max()) > 0
    assert torch.equal(bind_network(back.network, SPECIES, rows)(x), expected)
    check = export_potential(back.network, back.spec, tmp_path / "potential.pt", x.numpy())
    assert check.passed
    script, spec = load_potential(tmp_path / "potential.pt")
    script.include_priors = False
    torch.testing.assert_close(script(x.double()).detach(), expected.sum().double(), rtol=1e-4, atol=1e-4)
    source = spec.provenance.get("network_source")
    assert source == (str(own_network) if model.is_foreign else None)


def test_a_trained_network_of_ones_own_that_has_changed_or_gone(tmp_path, own_network, caplog):
    fit(tmp_path / "model", ModelSettings(kind="somebodys:MyNetwork", **SMALL), n_frames=80)
    own_network.write_text(own_network.read_text() + "\n# another comment\n")
    with caplog.at_level(logging.WARNING, "openmm_hvpcg"):
        load_fit(tmp_path / "model")
    assert "the code of somebodys:MyNetwork has changed since it was trained" in caplog.text
    own_network.write_text(own_network.read_text().replace("self.inner", "self.within"))
    del sys.modules["somebodys"]
    with pytest.raises(DataError, match="training result is damaged"):
        load_fit(tmp_path / "model")
    own_network.unlink()
    del sys.modules["somebodys"]
    with pytest.raises(ConfigError, match="module somebodys is not found"):
        load_fit(tmp_path / "model")


def test_a_bad_network_is_refused_before_it_is_trained(tmp_path, own_network):
    own_network.write_text(own_network.read_text().replace("nn.Tanh()", "nn.ReLU()"))
    with pytest.raises(PotentialError, match=r"somebodys:MyNetwork: its .* jumps"):
        fit(tmp_path / "model", ModelSettings(kind="somebodys:MyNetwork", **SMALL), n_frames=20)
    assert not (tmp_path / "model").exists()


def test_a_class_is_recorded_by_its_name(own_network):
    builder = import_builder("somebodys:MyNetwork")
    settings = ModelSettings(kind=builder)
    assert settings == ModelSettings(kind="somebodys:MyNetwork")
    assert type(build_base(2, settings).network) is builder
    assert ModelSettings(kind=PaiNN).kind == "openmm_hvpcg.training.models.painn:PaiNN"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", "nowhere:Net", "module nowhere is not found.* PYTHONPATH"),
        ("", "mine.deeper:Net", "module mine.deeper is not found"),
        ("import nothing_like_it", "mine:Net", "module mine cannot be imported .*nothing_like_it"),
        ("1 / 0", "mine:Net", "module mine cannot be imported .*ZeroDivisionError"),
        ("class Network: pass", "mine:Netwrok", "mine has no Netwrok. Did you mean Network"),
        ("net = 3", "mine:net", "expected a class or a function .* got an instance of int"),
        ("import torch\nnet = torch.nn.Identity()", "mine:net", "got an instance of Identity"),
        ("def build(n, settings): return n", "mine:build", "gives no network: expected a torch.nn.Module, got int"),
        ("def build(n): pass", "mine:build", "mine:build cannot be built .*TypeError.*Called with the number|takes 1"),
        ("def build(n, settings, width): 1 / 0", "mine:build", "cannot be built .*missing .*'width'"),
    ],
)
def test_a_network_that_cannot_be_had_is_explained(importable, text, kind, message):
    (importable / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=f"^model.kind: .*({message})"):
        build_base(2, ModelSettings(kind=kind))


def test_options_reach_the_builder_by_name(own_network):
    network = build_base(2, ModelSettings(kind="somebodys:MyNetwork", options={"width": 5})).network
    assert network.embedding.embedding_dim == 5
    with pytest.raises(ConfigError, match=r"cannot be built .*unexpected keyword argument 'witdh'"):
        build_base(2, ModelSettings(kind="somebodys:MyNetwork", options={"witdh": 5}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "pain"}, r"model.kind: expected 'schnet', 'painn' or package.module:Name, got 'pain'; did you mean"),
        ({"kind": "my-package:Net"}, "model.kind: expected"),
        ({"kind": "module:"}, "model.kind: expected"),
        ({"kind": ":Net"}, "model.kind: expected"),
        ({"kind": "painn", "options": {"width": 3}}, "model: options go with a network of your own"),
        ({"kind": "a:B", "options": 3}, "model.options: "),
    ],
)
def test_settings_of_networks_that_make_no_sense(model, message):
    with pytest.raises(ConfigError, match=message):
        parse_model(**model)


def test_a_class_that_cannot_be_found_again_is_refused():
    class Local(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="define it at the top of a module"):
        ModelSettings(kind=Local)


def test_soft_norm_is_smooth_at_zero_and_a_length_far_from_it():
    """Near zero |v|^2 / 2e, so the Hessian there is 1/e = 10; far away |v| - e."""
    zero = torch.zeros(3, 1, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda v: soft_norm(v).sum(), zero).reshape(3, 3)
    torch.testing.assert_close(hessian, 10.0 * torch.eye(3, dtype=torch.float64))
    assert float(soft_norm(zero)) == 0.0
    far = torch.tensor([[300.0], [0.0], [400.0]], dtype=torch.float64)
    assert float(soft_norm(far)) == pytest.approx(499.9, abs=1e-4)
