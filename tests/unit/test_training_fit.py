from __future__ import annotations

import copy
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_cases import KT, NO_PRIORS, REST, build_labels

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import DataError, PotentialError, StudyError
from openmm_hvpcg.potential import load_potential, save_potential
from openmm_hvpcg.prior_terms import build_prior_geometry
from openmm_hvpcg.training import evaluation as evaluation_module
from openmm_hvpcg.training import fit as fit_module
from openmm_hvpcg.training import matching as matching_module
from openmm_hvpcg.training import preparation as preparation_module
from openmm_hvpcg.training.batches import BatchIndex, FrameBatches
from openmm_hvpcg.training.dataset import split_by_time_blocks
from openmm_hvpcg.training.derivatives import compute_forces_and_hvps
from openmm_hvpcg.training.evaluation import JUDGED_PROBES, choose_network_share, evaluate_network
from openmm_hvpcg.training.export import export_potential, script_potential
from openmm_hvpcg.training.fit import fit_potential, load_fit
from openmm_hvpcg.training.fit_priors import fit_priors
from openmm_hvpcg.training.losses import compute_hvp_target, density_loss, force_loss, hvp_loss
from openmm_hvpcg.training.matching import MatchingModule
from openmm_hvpcg.training.models.registry import build_network, scale_energy
from openmm_hvpcg.training.models.torsions import Bonded, bind_network
from openmm_hvpcg.training.models.total import TotalEnergy
from openmm_hvpcg.training.preparation import Prepared, prepare
from openmm_hvpcg.training.projection import build_projector

MODEL = ModelSettings(features=16, interactions=1, radial=12, cutoff_nm=0.8)
#: Of the molecule of build_labels.
ROWS = Bonded.find(build_labels(20).bead_map)
SETTINGS = TrainingSettings(
    hvp_weight=1.0,
    covariance="auto",
    covariance_frames=700.0,
    covariance_regions=4,
    max_epochs=6,
    batch_size=32,
    learning_rate=5e-3,
    seed=5,
    accelerator="cpu",
    patience=4,
)
PRIORS = PriorSettings()


def train(folder: Path, settings: TrainingSettings = SETTINGS, priors: PriorSettings = PRIORS, **labels):
    return fit_potential([build_labels(**labels)], settings, MODEL, priors, folder, arm="a", progress=False)


def change(**settings) -> TrainingSettings:
    return SETTINGS.model_copy(update=settings)


def prepare_labels(data, settings: TrainingSettings, priors: PriorSettings = NO_PRIORS) -> Prepared:
    return prepare([data], settings, MODEL, priors, {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return folder, train(folder)


@pytest.mark.parametrize("hvp_weight", [0.0, 1.0])
def test_training_learns_what_the_priors_miss(tmp_path, hvp_weight):
    """The springs between unbonded beads are unknown to the priors; noise-free labels can be fitted.

    Forces first: without noise, all that the priors leave is force error, and the HVP targets' bias is of its square.
    """
    settings = change(hvp_weight=hvp_weight, max_epochs=40, learning_rate=1e-2, batch_size=16, hvp_start=0.4)
    metrics = train(tmp_path, settings, n_frames=400).metrics
    assert metrics["force_rmse_validation"] < 0.6 * metrics["force_rmse_priors"]
    assert metrics["hvp_rmse_validation"] < 0.6 * metrics["hvp_rmse_priors"]


def test_result_has_curves_metrics_and_files(trained):
    folder, result = trained
    assert [row["epoch"] for row in result.curves] == list(range(7))
    # Epoch 0 is the priors alone: its error is that of the priors in the metrics.
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


def build_two(settings=SETTINGS, mixed=True) -> Prepared:
    """Two molecules of as many beads, other species, other numbers of frames and probes, other own shares."""
    first, second = build_labels(100, name="one", force_noise=30.0), build_labels(80, 2, 30.0, seed=3, name="two")
    second = replace(second, bead_map=replace(second.bead_map, species=tuple("BBACA")))
    return prepare([first, second], settings, MODEL, PRIORS, {}, mixed=mixed)


@pytest.mark.parametrize("kind", ["schnet", "painn"])
@pytest.mark.parametrize("changed", [{}, {"whiten": "noise"}, {"density": 0.9}, {"hvp_along": "angles"}], ids=str)
def test_mixed_batch_has_the_mean_loss_of_its_molecules(kind, changed):
    """The losses, and their gradients by the weights, of one batch of 3 and 5 frames and of one batch for each."""
    settings = change(covariance="pooled", **changed)
    prepared = build_two(settings)
    assert prepared.molecules[0].own_share != prepared.molecules[1].own_share
    torch.manual_seed(2)
    network = build_network(3, MODEL.model_copy(update={"kind": kind}), KT)
    last = [network.base.readout[-1], network.torsions.single[-1], network.torsions.pair[-1]]
    for layer in last:
        torch.nn.init.normal_(layer.weight)
    module = MatchingModule(network, settings, prepared)
    batches = FrameBatches(prepared.groups)
    molecules, frames = np.repeat([1, 0], [3, 5]), np.array([70, 2, 30, 4, 60, 61, 9, 33])
    probes = np.array([[1], [0], [0], [2], [1], [0], [2], [1]])

    def compute(rows: slice) -> tuple[float, float, float, torch.Tensor]:
        batch = batches[BatchIndex(molecules[rows], frames[rows], probes[rows])]
        assert batch.species.shape == (len(batch.positions), 5)
        losses = module.compute_losses(network, batch, True, create_graph=True)
        weights = [p for p in network.parameters() if all(p is not layer.bias for layer in last)]
        gradients = torch.autograd.grad(module.combine(losses), weights, allow_unused=True)
        density = 0.0 if losses.density is None else losses.density.item()
        assert (density != 0.0) == ("density" in changed)
        return (
            losses.force.item(),
            losses.hvp.item(),
            density,
            torch.cat([g.flatten() for g in gradients if g is not None]),
        )

    both, first, second = (compute(rows) for rows in (slice(8), slice(3), slice(3, 8)))
    for whole, a, b in zip(both, first, second, strict=True):
        # Float32 sums in another order.
        expected = torch.as_tensor((3 * a + 5 * b) / 8)
        torch.testing.assert_close(torch.as_tensor(whole), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    alone = FrameBatches(build_two(settings, mixed=False).groups)
    batch = alone[BatchIndex(molecules[:3], frames[:3], probes[:3])]
    assert batch.species.shape == (5,)
    losses = module.compute_losses(network, batch, True, create_graph=False)
    assert (float(losses.force), float(losses.hvp)) == pytest.approx(first[:2], rel=1e-5)


@pytest.mark.parametrize(("kind", "mixed"), [("painn", True), ("my_network:MyNetwork", False)])
def test_batches_mix_molecules_where_the_network_can(tmp_path, monkeypatch, kind, mixed):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "contract"))
    seen = []
    genuine = MatchingModule.take_step

    def record(self, batch, index):
        seen.append(batch.species.ndim)
        return genuine(self, batch, index)

    monkeypatch.setattr(MatchingModule, "take_step", record)
    data = [build_labels(100, name="one"), build_labels(80, seed=3, name="two")]
    model = ModelSettings(kind=kind, features=8, radial=8, cutoff_nm=0.8)
    result = fit_potential(data, change(max_epochs=1), model, PRIORS, tmp_path, progress=False)
    assert set(seen) == {2 if mixed else 1}
    # 80 and 64 training frames, 32 a batch: together, or each for itself.
    assert len(seen) == 5
    assert np.isfinite(result.metrics["hvp_rmse_validation"])


def test_fewer_frames_of_each_molecule(tmp_path):
    """The training is that on the frames chosen, and says which dataset they are from."""
    data = build_labels(200, name="one")
    result = fit_potential([data], change(frames_per_molecule=60), MODEL, PRIORS, tmp_path / "few", progress=False)
    assert result.metrics["n_frames"] + result.metrics["n_validation_frames"] == 60
    assert result.spec.datasets == {"one": data.hash}
    same = fit_potential([data.thin(60)], SETTINGS, MODEL, PRIORS, tmp_path / "same", progress=False)
    assert result.curves == same.curves


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


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"probe_law": "soft"}, "mol: training.density takes traces .* expected probes of the law rademacher"),
        (
            {"frames": {"choice": {"kind": "cluster"}}},
            "mol: training.density needs frames that are distributed .* chosen by cluster",
        ),
        (
            {"frames": {"bias": {"share": 0.7}}},
            "mol: training.density needs frames that are distributed .* with a bias",
        ),
    ],
)
def test_density_of_what_is_no_ensemble_is_refused(tmp_path, attributes, message):
    data = replace(build_labels(100), attributes=attributes)
    with pytest.raises(DataError, match=message):
        fit_potential([data], change(density=0.9), MODEL, PRIORS, tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


def test_priors_of_frames_with_a_bias_are_those_without_it():
    """Dihedrals have the densities that the frames tell, each its own, in whatever order these are told."""
    data = build_labels(100)
    rows = build_prior_geometry(data.bead_map.bonds, data.bead_map.n_beads).dihedrals.tolist()
    assert len(rows) > 1
    rng = np.random.default_rng(0)
    told = rng.normal(size=(len(rows), 2, 4)).round(3)

    def prepare_with(order: list[int], dihedrals: list[list[int]]) -> dict[str, tuple[float, ...]]:
        bias = {"share": 0.5, "dihedrals": [dihedrals[k] for k in order], "log_densities": told[order].tolist()}
        biased = replace(data, attributes={"frames": {"bias": bias}})
        return dict(prepare([biased], SETTINGS, MODEL, PRIORS, {}).spec.priors.dihedrals)

    order = list(range(len(rows)))
    split = split_by_time_blocks(data.walker, SETTINGS.validation_fraction, SETTINGS.validation_blocks)[0]
    wanted = fit_priors([(data.bead_map, data.positions[split])], PRIORS, data.temperature_K, [told]).dihedrals
    assert prepare_with(order, rows) == prepare_with(order[::-1], [row[::-1] for row in rows]) == wanted
    assert wanted != fit_priors([(data.bead_map, data.positions[split])], PRIORS, data.temperature_K).dihedrals
    with pytest.raises(DataError, match="mol: the frames were sampled with a bias along dihedrals of other beads"):
        prepare_with(order, [[0, 1, 2, 9], *rows[1:]])


def test_hvps_along_bonds_need_bonds(tmp_path):
    data = build_labels(100)
    data = replace(data, bead_map=replace(data.bead_map, bonds=np.empty((0, 2), dtype=np.int64)))
    with pytest.raises(DataError, match=r"mol: training.hvp_along matches HVPs along bonds, and there are none"):
        fit_potential([data], change(hvp_along="bonds"), MODEL, PRIORS, tmp_path, progress=False)


def test_hvps_are_matched_where_they_are_asked_for(tmp_path):
    """Three trainings on the same labels differ, and each says along what it matched."""
    results = [
        train(tmp_path / along, change(hvp_weight=1.0, max_epochs=3, hvp_along=along), force_noise=100.0)
        for along in ("all", "angles", "bonds")
    ]
    errors = [r.metrics["hvp_rmse_validation"] for r in results]
    assert len(set(errors)) == 3
    # What is matched is a part of all there is, and the figures in physical units are of all of it.
    terms = [r.metrics["loss_terms"]["hvp"]["priors_validation"] for r in results]
    assert terms[0] > terms[1] > terms[2] > 0
    assert len({r.metrics["hvp_rmse_priors"] for r in results}) == 1
    for result, words in zip(results[1:], ("bonds and angles", "bonds"), strict=True):
        assert any(f"HVPs are matched along {words} alone" in line for line in result.metrics["diagnosis"]["weights"])


def test_few_of_many_probes_are_judged(monkeypatch):
    """A network is judged as on labels that have no more probes, and without an HVP of any other."""
    asked = []

    def count(energy, positions, probes, *args):
        asked.append(probes.shape[1])
        return compute_forces_and_hvps(energy, positions, probes, *args)

    monkeypatch.setattr(evaluation_module, "compute_forces_and_hvps", count)
    many = build_labels(n_frames=60, n_probes=JUDGED_PROBES + 4, force_noise=100.0)
    few = replace(many, probes=many.probes[:, :JUDGED_PROBES], hvps=many.hvps[:, :JUDGED_PROBES])
    network = build_network(len(set(many.bead_map.species)), MODEL, KT)
    settings = change(covariance="frame")
    first, second = (evaluate_network(network, prepare_labels(data, settings), [data]) for data in (many, few))
    assert set(asked) == {JUDGED_PROBES}
    assert first["hvp_noise"] is not None
    for key in ("force_rmse_validation", "force_noise", "hvp_rmse_validation", "hvp_noise", "hvp_rmse_training"):
        assert first[key] == second[key], key


def test_density_takes_part_in_the_training(tmp_path):
    """With forces alone, too: in the loss that is trained on and validated with, by its share."""
    results = [
        train(tmp_path / str(share), change(hvp_weight=0.0, max_epochs=3, density=share), force_noise=100.0)
        for share in (0.0, 1e-6, 0.8)
    ]
    plain, nothing, dense = (r.curves[-1] for r in results)
    for key in ("train_loss", "val_loss"):
        # Forces with HVPs and without are summed in another order.
        assert nothing[key] == pytest.approx(plain[key], rel=1e-4)
        assert abs(dense[key] / plain[key] - 1.0) > 1e-3
    assert any("80 % from the density" in line for line in results[2].metrics["diagnosis"]["weights"])


def test_the_last_epoch_is_kept_whether_or_not_it_is_the_best(tmp_path, caplog):
    """Or a training that is killed long after its best epoch would go back to it."""
    settings = change(learning_rate=3e-2, schedule="cosine", max_epochs=20, hvp_weight=0.0)
    result = train(tmp_path, settings, n_frames=60, force_noise=500.0)
    checkpoints = tmp_path / "checkpoints"
    epochs = {p.name: torch.load(p, weights_only=True)["epoch"] for p in checkpoints.iterdir()}
    best = result.metrics["best_epoch"]
    # So few frames of so much noise are overfitted.
    assert best < 15
    assert epochs == {f"best-epoch={best}.ckpt": best, "last.ckpt": 19}
    (tmp_path / "training.json").unlink()
    with caplog.at_level(logging.INFO, "openmm_hvpcg"):
        again = train(tmp_path, settings, n_frames=60, force_noise=500.0)
    assert "training resumes after epoch 20" in caplog.text
    assert again.curves == result.curves
    assert again.metrics["best_epoch"] == best


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
    expected = bind_network(result.network, script.species, ROWS)((x - x.mean(0)).float()[None])[0]
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
        export_potential(Leaning(result.network.base), result.spec, path, build_labels(20).positions)
    assert list(tmp_path.iterdir()) == []
    assert np.isfinite(result.metrics["force_rmse_validation"])


LINE = np.array([[0.15 * k, 0.0, 0.0] for k in range(4)])


@pytest.mark.parametrize("rest", [REST[:2], LINE], ids=["two beads", "a line"])
@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({}, ["each frame's own covariance is used"]),
        ({"covariance": "pooled", "whiten": "noise"}, ["own covariance is used", "residuals are not whitened"]),
        ({"covariance": "frame"}, []),
        ({"hvp_weight": 0.0}, []),
    ],
    ids=str,
)
def test_without_local_axes_each_frame_has_its_own_covariance(tmp_path, caplog, rest, settings, messages):
    result = train(tmp_path, change(max_epochs=1, **settings), n_frames=60, force_noise=50.0, rest=rest)
    found = [r.message for r in caplog.records if "local axes" in r.message]
    assert len(found) == len(messages)
    assert all(part in line for part, line in zip(messages, found, strict=True))
    assert np.isfinite(result.metrics["hvp_rmse_validation"])
    data = build_labels(60, force_noise=50.0, rest=rest)
    prepared, frame = (prepare_labels(data, change(**s)) for s in (settings, {"covariance": "frame"}))
    assert prepared.molecules[0].own_share == 1.0
    assert prepared.scales == frame.scales


def compute_excess(prepared: Prepared, data, residual: torch.Tensor) -> torch.Tensor:
    """HVP target minus the HVP of the springs (T, P, B, 3), for labels without priors."""
    m = prepared.molecules[0]
    exact = torch.from_numpy(build_labels(data.n_frames).hvps)
    return compute_hvp_target(m.hvps, residual, m.probes, prepared.beta, m.covariances, m.own_share) - exact


def get_noise(data) -> torch.Tensor:
    """What an exact model leaves of the forces."""
    return torch.from_numpy(data.forces - build_labels(data.n_frames).forces)


@pytest.mark.parametrize("covariance", ["pooled", "ratio"])
def test_mean_pooled_target_is_the_hessian(covariance):
    """Held-out frames, seen from local axes: the mean of ``(t(v) - H v) v^T`` vanishes.

    225 elements z-tested at 5.5 standard errors, of the held-out frames and of the pooled covariance, which rests on as
    many (Rademacher probes, three a frame, of one noise: the frame counts once): false-alarm rate 1e-5.
    """
    data = build_labels(2000, force_noise=100.0)
    prepared = prepare_labels(data, change(validation_fraction=0.5, covariance=covariance))
    noise = get_noise(data)
    prepared.pool_covariances([noise[torch.from_numpy(prepared.pooling[0])]])
    excess, m = compute_excess(prepared, data, noise), prepared.molecules[0]
    axes = prepared.pooled[0].axes(m.positions.double()).float()
    v, e = (torch.einsum("tbix,tpbx->tpbi", axes, a).flatten(2) for a in (m.probes, excess))
    held_out = (e[..., :, None] * v[..., None, :]).mean(1)[prepared.validation[0]]
    error = 2**0.5 * held_out.std(0) / len(held_out) ** 0.5
    mean = held_out.mean(0)
    assert float((mean.abs() / error).max()) < 5.5
    assert m.own_share == 1000 / 1700
    # Without the correction the target is beta s off on the diagonal, and would not pass.
    assert float((100.0**2 / KT / error.diagonal()).min()) > 15.0


def test_ratio_needs_probes_that_make_a_hessian():
    data = build_labels(100, force_noise=9.0)
    data.attributes["probe_law"] = "soft"
    with pytest.raises(DataError, match=r"mol: covariance: ratio cannot .* soft probes.*covariance: pooled"):
        prepare_labels(data, change(covariance="ratio"))


@pytest.mark.parametrize(("frames", "share"), [(700.0, 160 / 860), (160.0, 0.5), (1e-9, 1.0)])
def test_own_share_grows_with_the_frames(frames, share):
    data = build_labels(200, force_noise=100.0)
    prepared = prepare_labels(data, change(covariance="pooled", covariance_frames=frames))
    m = prepared.molecules[0]
    assert m.own_share == pytest.approx(share, rel=1e-9)
    paper = compute_hvp_target(m.hvps, m.forces, m.probes, prepared.beta)
    target = compute_hvp_target(m.hvps, m.forces, m.probes, prepared.beta, m.covariances, m.own_share)
    # Float32 sums of a few terms.
    assert (share == 1.0) == bool(torch.allclose(target, paper, rtol=1e-5, atol=1e-5 * float(paper.abs().max())))


def test_frame_covariance_is_that_of_the_paper():
    prepared = prepare_labels(build_labels(200, force_noise=100.0), change(covariance="frame"))
    m, (pooled,) = prepared.molecules[0], prepared.pooled
    assert pooled is None
    target = compute_hvp_target(m.hvps, m.forces, m.probes, prepared.beta, m.covariances, m.own_share)
    assert torch.equal(target, compute_hvp_target(m.hvps, m.forces, m.probes, prepared.beta))


def test_sample_covariance_needs_no_model():
    """Labels by conditional averaging: the target is the Hessian for any residual; its labels are exact here."""
    data = build_labels(200, force_noise=100.0, n_samples=10)
    prepared = prepare_labels(data, SETTINGS)
    assert prepared.pooled == [None]
    for residual in (torch.zeros(200, 5, 3), 1e3 * get_noise(data)):
        excess = compute_excess(prepared, data, residual)
        # Float32: 6e-8 of covariances of 100^2 / kT.
        assert float(excess.abs().max()) < 1e-6 * float(prepared.molecules[0].hvps.abs().max())
    assert prepared.force_noise == pytest.approx(100.0**2, rel=1e-6)


def test_covariance_that_is_not_of_the_labels_is_refused():
    with pytest.raises(DataError, match="sample needs labels by conditional averaging"):
        prepare_labels(build_labels(100), change(covariance="sample"))
    for kind in ("frame", "pooled"):
        with pytest.raises(DataError, match=rf"mol: covariance: {kind} needs labels of frames.*auto or sample"):
            prepare_labels(build_labels(100, force_noise=9.0, n_samples=5), change(covariance=kind))


@pytest.mark.parametrize("n_samples", [None, 10], ids=["frames", "averaged"])
@pytest.mark.parametrize("whitening", ["none", "noise"])
def test_priors_score_one_on_the_training_frames(whitening, n_samples):
    """Losses of a model of no force, with all probes, on all training frames at once."""
    data = build_labels(200, force_noise=100.0, n_samples=n_samples)
    prepared = prepare_labels(data, change(whiten=whitening))
    m, rows = prepared.molecules[0], torch.from_numpy(prepared.training[0])
    zero, white = torch.zeros(len(rows), 5, 3), None if m.whitening is None else m.whitening[rows]
    assert (white is None) == (whitening == "none")
    force = force_loss(zero, m.forces[rows], prepared.scales, white)
    hvp = hvp_loss(
        torch.zeros_like(m.hvps[rows]),
        m.hvps[rows],
        m.forces[rows],
        m.probes[rows],
        prepared.beta,
        prepared.scales,
        m.covariances[rows],
        m.own_share,
        white,
    )
    # Float32 against double sums.
    assert float(force) == pytest.approx(1.0, rel=1e-4)
    assert float(hvp) == pytest.approx(1.0, rel=1e-4)


def test_whitened_training_is_judged_in_physical_units(tmp_path):
    settings = change(max_epochs=5, hvp_weight="balanced")
    results = [
        train(tmp_path / kind, settings.model_copy(update={"whiten": kind}), force_noise=30.0)
        for kind in ("none", "noise")
    ]
    plain, white = (r.metrics for r in results)
    for name in ("force_rmse_priors", "hvp_rmse_priors"):
        assert white[name] == pytest.approx(plain[name], rel=1e-6)
    assert white["loss_terms"]["force"]["priors_training"] != pytest.approx(
        plain["loss_terms"]["force"]["priors_training"], rel=1e-3
    )
    # It learns, by the loss it is trained on.
    curve = [row["val_loss"] for row in results[1].curves]
    assert min(curve) < 0.95 * curve[0]


def test_balanced_weight_is_recorded_as_a_number(tmp_path):
    settings = change(max_epochs=1, hvp_weight="balanced", force_weight=2.0)
    metrics = train(tmp_path, settings, force_noise=100.0).metrics
    prepared = prepare_labels(build_labels(force_noise=100.0), settings, PRIORS)
    scales, beta = prepared.scales, 1 / KT
    assert metrics["hvp_weight"] == pytest.approx(2.0 * scales.hvp / (2 * beta**2 * scales.force**2), rel=1e-6)
    assert json.loads((tmp_path / "training.json").read_text())["metrics"]["hvp_weight"] == metrics["hvp_weight"]


def test_cosine_warms_up_and_ends(tmp_path, monkeypatch):
    """A fiftieth of the rate at the first step, a thousandth at the last, and half of it half way."""
    rates = []
    genuine = MatchingModule.take_step

    def record(self, batch, index):
        loss = genuine(self, batch, index)
        (group,) = self._optimizer.param_groups
        rates.append(group["lr"])
        return loss

    monkeypatch.setattr(MatchingModule, "take_step", record)
    settings = change(schedule="cosine", hvp_weight=0.0, max_epochs=40, patience=40, batch_size=8, learning_rate=1e-3)
    train(tmp_path, settings, n_frames=75)
    # 60 training frames, 8 batches an epoch.
    assert len(rates) == 320
    warm, rest = rates[:50], rates[50:]
    assert warm[0] == pytest.approx(1e-3 / 50, rel=1e-9)
    assert (np.diff(warm) > 0).all()
    # cos(pi * 50 / 320) is still 0.88.
    assert 0.9e-3 < max(rates) < 1e-3
    assert (np.diff(rest) <= 0).all()
    assert rates[160] == pytest.approx(0.5e-3, rel=1e-9)
    assert rates[-1] == pytest.approx(1e-6, rel=1e-9)


def test_hvps_start_where_they_are_told_to(tmp_path, monkeypatch):
    """Until then no HVP is computed in training and none pooled; forces alone decide, as in force matching."""
    seen, pooled = [], []
    compute, pool = MatchingModule.compute_losses, Prepared.pool_covariances

    def record(self, network, batch, with_hvps, create_graph):
        if create_graph:
            seen.append((self.current_epoch, with_hvps))
        return compute(self, network, batch, with_hvps, create_graph)

    monkeypatch.setattr(MatchingModule, "compute_losses", record)
    monkeypatch.setattr(Prepared, "pool_covariances", lambda self, r: (pooled.append(len(seen)), pool(self, r))[1])
    monkeypatch.setattr(matching_module, "POOLINGS", 3)
    result = train(tmp_path / "both", change(hvp_start=0.4, max_epochs=6, patience=6), force_noise=30.0)
    # 0.4 of 6 epochs: the third is the first with HVPs. 192 training frames, 6 batches an epoch.
    assert seen == [(epoch, epoch >= 2) for epoch in range(6) for _ in range(6)]
    assert pooled == [12, 24]
    alone = train(tmp_path / "force", change(hvp_weight=0.0, max_epochs=6, patience=6), force_noise=30.0)
    forces = [[row["val_force_rmse"] for row in r.curves] for r in (result, alone)]
    assert forces[0][:3] == forces[1][:3]
    assert forces[0][3] != forces[1][3]


class Interruption(Exception):
    pass


PAUSED = change(
    hvp_weight="balanced",
    covariance="ratio",
    covariance_regions=2,
    schedule="cosine",
    weight_averaging=0.9,
    hvp_start=0.34,
    patience=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching_module, "POOLINGS", 3)
        patch.setattr(preparation_module, "find_share", lambda terms: 0.1 + abs(terms[0][0] / terms[0][1]) % 0.8)
        result = train(tmp_path_factory.mktemp("whole"), PAUSED, n_frames=120, force_noise=30.0)
    assert 0.1 < result.metrics["covariance_share"] < 0.9
    return result


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_interrupted_training_with_every_schedule_resumes_bit_for_bit(tmp_path, monkeypatch, whole, epoch):
    """Covariances are pooled after epochs 2 and 4 of 6: broken off before the first, between, and just after the last.

    Between them the resumed run has to take the pooled covariances from the checkpoint.
    """
    monkeypatch.setattr(matching_module, "POOLINGS", 3)
    # Of so few frames a share that is never none, and another one each time.
    monkeypatch.setattr(preparation_module, "find_share", lambda terms: 0.1 + abs(terms[0][0] / terms[0][1]) % 0.8)
    genuine = MatchingModule.take_step

    def break_off(self, batch, index):
        if self.current_epoch == epoch and index == 1:
            raise Interruption
        return genuine(self, batch, index)

    monkeypatch.setattr(MatchingModule, "take_step", break_off)
    with pytest.raises(Interruption):
        train(tmp_path, PAUSED, n_frames=120, force_noise=30.0)
    assert not (tmp_path / "training.json").exists()
    monkeypatch.setattr(MatchingModule, "take_step", genuine)
    resumed = train(tmp_path, PAUSED, n_frames=120, force_noise=30.0)
    assert resumed.curves == whole.curves
    assert resumed.metrics["network_share"] == whole.metrics["network_share"]
    assert resumed.metrics["loss_terms"] == whole.metrics["loss_terms"]
    for a, b in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)


class Springs(torch.nn.Module):
    """The energy behind the labels, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.first, self.second = torch.triu_indices(5, 5, 1)
        self.rest = torch.from_numpy(np.linalg.norm(REST[self.first] - REST[self.second], axis=-1))

    def forward(self, positions: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
        r = torch.linalg.vector_norm(positions[:, self.first] - positions[:, self.second], dim=-1)
        return self.factor * 1000.0 * ((r - self.rest) ** 2).sum(1)


@pytest.mark.parametrize(
    ("factor", "share"), [(2.0, 0.5), (4.0, 0.25), (1.0, 1.0), (0.5, 1.0), (-1.0, 0.0), (0.0, 0.0)]
)
@pytest.mark.parametrize("hvp_weight", [0.0, 1.0])
def test_network_share_undoes_what_is_too_much(hvp_weight, factor, share):
    """A network that is the truth times a factor, exact labels; never more than the whole, never less than nothing."""
    data = build_labels(100, force_noise=10.0, n_samples=10**12)
    prepared = prepare_labels(data, change(hvp_weight=hvp_weight))
    # Float32 labels.
    assert choose_network_share(Springs(factor), prepared, 1.0, hvp_weight) == pytest.approx(share, abs=1e-5)


#: No springs, no priors: a network can only learn noise.
NOISE = {"n_frames": 150, "force_noise": 300.0, "stiffness": 0.0, "hvp_noise": 3e4, "seed": 1}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A training on noise, and the whole network as its best checkpoint has it."""
    folder = tmp_path_factory.mktemp("noise")
    settings = change(covariance="pooled", hvp_weight="balanced", max_epochs=8, patience=8)
    result = train(folder, settings, NO_PRIORS, **NOISE)
    content = json.loads((folder / "training.json").read_text())
    return (
        folder,
        result,
        content,
        fit_module._load_network(folder / "checkpoints" / content["best"], result.spec, MODEL),
    )


@pytest.mark.parametrize("factor", [1.0, 30.0], ids=["as trained", "overdone"])
@pytest.mark.parametrize(
    "settings",
    [{"covariance": "frame"}, {"covariance": "pooled"}, {"whiten": "noise"}, {"density": 0.9}, {"hvp_along": "bonds"}],
    ids=lambda s: str(*s.values()),
)
def test_network_share_is_best_on_held_out_frames(noisy, settings, factor):
    """No other share is better, so that none of it, the priors alone, is not: HVP targets as of the whole network."""
    prepared = prepare_labels(build_labels(**NOISE), change(**settings))
    network = copy.deepcopy(noisy[3])
    scale_energy(network, factor)
    density = settings.get("density", 0.0)
    share = choose_network_share(network, prepared, 1.0, 2.0, density)
    assert 0.0 <= share <= 1.0
    m, rows, scales = prepared.molecules[0], torch.from_numpy(prepared.validation[0]), prepared.scales
    x, q, v, p, covariances = (getattr(m, n)[rows] for n in ("positions", "forces", "probes", "hvps", "covariances"))
    f, h = compute_forces_and_hvps(bind_network(network, m.species, m.bonded), x, v)
    white, projector = None if m.whitening is None else m.whitening[rows], build_projector(x, m.links)
    assert (projector is None) == ("hvp_along" not in settings)

    def compute_loss(share: float) -> float:
        second = hvp_loss(share * h, p, q - f, v, prepared.beta, scales, covariances, m.own_share, white, projector)
        first = force_loss(share * f, q, scales, white)
        if density > 0:
            labels = m.density_forces[rows], m.density_probes[rows]
            first += density * density_loss(share * f, share * h, *labels, prepared.beta, scales)
        return float(first + 2.0 * second)

    # Float32 sums.
    assert compute_loss(share) <= min(compute_loss(s) for s in np.linspace(0.0, 1.0, 21)) * (1 + 1e-6)


@pytest.mark.parametrize("labels", [{"hvp_weight": 0.0}, {"n_samples": 4}], ids=["forces", "averaged"])
def test_metrics_of_pure_noise_are_no_worse_than_the_priors(tmp_path, labels):
    """Where targets do not hang on the network, the figures reported say it themselves."""
    labels = dict(labels)
    settings = change(hvp_weight=labels.pop("hvp_weight", 1.0), max_epochs=8, patience=8)
    m = train(tmp_path, settings, NO_PRIORS, **NOISE, **labels).metrics
    scales = prepare_labels(build_labels(**NOISE, **labels), settings).scales
    loss = [
        m[f"force_rmse_{k}"] ** 2 / scales.force + m["hvp_weight"] * m[f"hvp_rmse_{k}"] ** 2 / scales.hvp
        for k in ("validation", "priors")
    ]
    assert 0.0 <= m["network_share"] <= 1.0
    assert loss[0] <= loss[1] * (1 + 1e-6)


def test_network_share_is_kept_by_what_is_loaded_and_exported(tmp_path, noisy):
    folder, result, content, network = noisy
    x, species = torch.from_numpy(build_labels(20).positions), torch.tensor([0, 1, 0, 1, 2])
    whole, share = bind_network(network, species, ROWS)(x).detach(), content["network_share"]
    assert share == result.metrics["network_share"]
    # The test has teeth: neither all nor nothing of a network of some kJ/mol.
    assert 0.0 < share < 0.9
    assert float(whole.abs().max()) > 0.1
    for found in (load_fit(folder).network, result.network):
        # Float32 rounding.
        torch.testing.assert_close(bind_network(found, species, ROWS)(x), share * whole, rtol=1e-4, atol=1e-5)
    script = script_potential(TotalEnergy(result.network, result.spec))
    save_potential(tmp_path / "potential.pt", script, result.spec)
    script, _ = load_potential(tmp_path / "potential.pt")
    exported = torch.stack([script(frame.double()) for frame in x])
    torch.testing.assert_close(exported.detach(), share * whole.double(), rtol=1e-4, atol=1e-5)


def test_training_of_an_older_version_has_the_whole_network(tmp_path, noisy):
    folder, _, content, network = noisy
    shutil.copytree(folder, tmp_path / "old")
    older = {key: value for key, value in content.items() if key != "network_share"}
    (tmp_path / "old" / "training.json").write_text(json.dumps(older))
    x, species = torch.from_numpy(build_labels(20).positions), torch.tensor([0, 1, 0, 1, 2])
    found = load_fit(tmp_path / "old").network
    assert torch.equal(*(bind_network(n, species, ROWS)(x) for n in (found, network)))


def test_potential_without_priors_is_exported(tmp_path):
    """No native force is left to ask OpenMM for."""
    data = build_labels(80, 1)
    fit = fit_potential(
        [data], SETTINGS.model_copy(update={"max_epochs": 1}), MODEL, NO_PRIORS, tmp_path, progress=False
    )
    check = export_potential(fit.network, fit.spec, tmp_path / "potential.pt", data.positions[:4])
    assert all(item.passed for item in check.items)


def test_a_cosine_runs_to_its_end(tmp_path):
    """A patience of one epoch would stop on labels that are noise."""
    settings = SETTINGS.model_copy(update={"max_epochs": 8, "patience": 1, "schedule": "cosine", "learning_rate": 1e-2})
    fit = fit_potential(
        [build_labels(80, 1, force_noise=2000.0)], settings, MODEL, PriorSettings(), tmp_path, progress=False
    )
    assert fit.metrics["epochs"] == 8


def test_patience_waits_for_the_hvps(tmp_path):
    settings = SETTINGS.model_copy(
        update={"max_epochs": 10, "patience": 1, "hvp_start": 0.8, "hvp_weight": 1.0, "learning_rate": 1e-2}
    )
    fit = fit_potential(
        [build_labels(80, 1, force_noise=2000.0)], settings, MODEL, PriorSettings(), tmp_path, progress=False
    )
    assert fit.metrics["epochs"] >= 8


def test_a_spec_lists_the_ends_of_a_chain_apart() -> None:
    data = build_labels()
    residues = tuple(("MOL", n, 0) for n in range(data.bead_map.n_beads))
    species = ("N-A", "A", "A", "A", "C-A")
    sites = [
        prepare(
            [replace(data, bead_map=replace(data.bead_map, residues=residues, names=("X",) * 5, species=kinds))],
            *(TrainingSettings(), MODEL, PriorSettings(), {}),
        ).spec.sites
        for kinds in (species, ("A",) * 5)
    ]
    assert sites == [{"N-MOL:X": "N-A", "MOL:X": "A", "C-MOL:X": "C-A"}, {"MOL:X": "A"}]


def test_training_killed_in_its_first_epoch_begins_anew(tmp_path):
    """It left a table of validation alone, to which nothing fits."""
    logs = tmp_path / "model" / "logs" / "csv"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text("epoch,step,val_force\n0,1,1.0\n")
    train(tmp_path / "model", SETTINGS.model_copy(update={"max_epochs": 2}), NO_PRIORS, n_frames=80)
    assert "train_loss" in (logs / "metrics.csv").read_text().splitlines()[0]


def test_a_training_from_before_torsions_is_read(tmp_path):
    """Its settings do not say that it has none."""
    model = MODEL.model_copy(update={"torsions": False})
    settings = SETTINGS.model_copy(update={"max_epochs": 1})
    result = fit_potential([build_labels(80)], settings, model, NO_PRIORS, tmp_path, progress=False)
    path = tmp_path / "training.json"
    content = json.loads(path.read_text())
    for key in ("torsions", "chiral_channels"):
        del content["spec"]["model"][key]
    path.write_text(json.dumps(content))
    x, species = torch.from_numpy(build_labels(20).positions), torch.tensor([0, 1, 0, 1, 2])
    assert torch.equal(load_fit(tmp_path).network(x, species), result.network(x, species))
