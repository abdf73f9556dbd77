"""Several processes train as one would on the same batches."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from training_cases import build_labels

from openmm_hvpcg.config import ModelSettings, PriorSettings, TrainingSettings
from openmm_hvpcg.errors import BackendError, ConfigError
from openmm_hvpcg.training import fit as fit_module
from openmm_hvpcg.training import processes as processes_module
from openmm_hvpcg.training.batches import BatchIndex, FrameBatches
from openmm_hvpcg.training.fit import FitResult, fit_potential
from openmm_hvpcg.training.matching import MatchingModule
from openmm_hvpcg.training.places import Place, ProcessPlace
from openmm_hvpcg.training.preparation import prepare
from openmm_hvpcg.training.processes import load_prepared, save_prepared
from openmm_hvpcg.training.scratch import Scratch

MODEL = ModelSettings(features=8, interactions=1, radial=8, cutoff_nm=0.8)
SETTINGS = TrainingSettings(
    hvp_weight=1.0,
    covariance_frames=300.0,
    max_epochs=3,
    batch_size=33,
    learning_rate=5e-3,
    accelerator="cpu",
    schedule="cosine",
)
TWO = SETTINGS.model_copy(update={"devices": 2})


def build_data():
    """Two molecules of as many beads and one of fewer; the last batches are of 2 frames and of 1."""
    return [
        build_labels(100, force_noise=30.0, name="one"),
        build_labels(70, seed=3, force_noise=30.0, name="two"),
        build_labels(85, seed=4, force_noise=30.0, name="three", rest=np.eye(4, 3) * 0.2),
    ]


def train(folder: Path, settings: TrainingSettings) -> FitResult:
    return fit_potential(build_data(), settings, MODEL, PriorSettings(), folder, progress=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, SETTINGS)


def flatten(curves: list[dict[str, float]]) -> np.ndarray:
    return np.array([[row[key] for key in sorted(row)] for row in curves[1:]])


def test_two_processes_train_as_one(alone, tmp_path, monkeypatch):
    """Broken off in the second epoch, too, and resumed: the curves of one process, and its files.

    Gradients are sums of float32 in another order: 6e-8 of the larger terms a step, which Adam passes on as changes of
    its steps of that share, but for weights whose gradient is near zero.
    """
    folder, one = alone
    genuine = MatchingModule.take_step

    def break_off(self, batch, index):
        if self.current_epoch == 1 and index == 2:
            raise ZeroDivisionError
        return genuine(self, batch, index)

    monkeypatch.setattr(MatchingModule, "take_step", break_off)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, TWO)
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "scratch").exists()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    monkeypatch.setattr(MatchingModule, "take_step", genuine)
    two = train(tmp_path, TWO)
    assert not torch.distributed.is_initialized()
    np.testing.assert_allclose(flatten(two.curves), flatten(one.curves), rtol=1e-4)
    names = [
        {str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and "events." not in p.name}
        for f in (folder, tmp_path)
    ]
    assert names[1] - names[0] == {"logs/workers.log"}
    assert names[0] <= names[1]
    for a, b in zip(two.network.parameters(), one.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.fixture
def remote(tmp_path, monkeypatch) -> TrainingSettings:
    """Two machines: what stands for ssh runs the command by a shell that knows nothing of our environment."""
    script = tmp_path / "reach"
    script.write_text(
        """#!/bin/sh
host=$1; shift
[ "$host" = elsewhere ] || { echo "reach: no such machine: $host" >&2; exit 255; }
echo "Welcome to $host"
exec env -i PATH="$PATH" HOME="$HOME" sh -c "$*"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return SETTINGS.model_copy(update={"hosts": ["elsewhere"], "launch": f"{script} {{host}}"})


def test_two_machines_train_as_one(alone, remote, tmp_path, monkeypatch):
    """The tolerance is that of two processes; the covariances that the first one pools reach the other."""
    started = []
    genuine = processes_module.start_process

    def start(command, **keywords):
        started.append(command)
        return genuine(command, **keywords)

    monkeypatch.setattr(processes_module, "start_process", start)
    published = []
    publish = Scratch.publish
    monkeypatch.setattr(Scratch, "publish", lambda self: (published.append(1), publish(self)))
    two = train(tmp_path / "fit", remote)
    np.testing.assert_allclose(flatten(two.curves), flatten(alone[1].curves), rtol=1e-4)
    (command,) = started
    assert command[1] == "elsewhere"
    assert "GLOO_SOCKET_IFNAME=lo" in command
    # Once before the other one starts, and with each pooling.
    assert len(published) == 1 + SETTINGS.max_epochs
    # The machines are no part of what a training is made from: it may go on elsewhere.
    again = train(tmp_path / "fit", SETTINGS)
    assert again.curves == two.curves


def test_machine_that_cannot_be_reached_is_reported(remote, tmp_path):
    lost = remote.model_copy(update={"hosts": ["nowhere"]})
    with pytest.raises(BackendError, match="reach: no such machine: nowhere"):
        train(tmp_path / "fit", lost)
    assert not (tmp_path / "fit" / "scratch").exists()


def test_command_for_a_shell_is_refused_where_it_would_break(remote, tmp_path):
    with pytest.raises(ConfigError, match="a shell would take a part of the command apart"):
        train(tmp_path / "two words", remote)


def test_places_of_two_machines():
    place = Place(5, 8, 1234, 2, "first")
    assert Place.parse(place.to_words()) == place
    assert (place.n_devices, place.machine) == (4, 1)
    environment = ProcessPlace(place)
    assert (environment.local_rank(), environment.node_rank()) == (1, 1)
    assert (environment.main_address, environment.main_port) == ("first", 1234)


@pytest.mark.parametrize("changed", [{"hosts": ["a", "a"]}, {"launch": "ssh"}, {"launch": "ssh {node}"}], ids=str)
def test_wrong_hosts_are_refused(changed):
    with pytest.raises(ValidationError, match="expected"):
        TrainingSettings.model_validate(changed)


def test_lost_process_is_reported(tmp_path, monkeypatch):
    """A worker that cannot go on ends the training with what it said."""
    write = fit_module.write_json

    def spoil(path: Path, content: dict) -> None:
        write(path, {**content, "model": {"kind": "none"}} if path.name == "made_from.json" else content)

    monkeypatch.setattr(fit_module, "write_json", spoil)
    with pytest.raises(BackendError, match=r"workers\.log: a process of the training ended before its time"):
        train(tmp_path, TWO)
    assert "none" in (tmp_path / "logs" / "workers.log").read_text()
    assert not (tmp_path / "scratch").exists()


def test_killed_process_is_reported(tmp_path, monkeypatch):
    workers = []
    genuine = MatchingModule.take_step

    def start(*arguments, **keywords):
        workers.append(subprocess.Popen(*arguments, **keywords))
        return workers[-1]

    def kill(self, batch, index):
        workers[0].kill()
        return genuine(self, batch, index)

    monkeypatch.setattr(processes_module, "start_process", start)
    monkeypatch.setattr(MatchingModule, "take_step", kill)
    with pytest.raises(BackendError, match=r"workers\.log: a process of the training ended before its time"):
        train(tmp_path, TWO)
    assert not torch.distributed.is_initialized()


def test_more_devices_than_there_are_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendError, match=r"fewer GPUs than training\.devices: expected 2, got 1"):
        train(tmp_path, TWO.model_copy(update={"accelerator": "auto"}))


@pytest.mark.parametrize("changed", [{}, {"whiten": "noise"}, {"density": 0.9}, {"hvp_along": "angles"}], ids=str)
def test_workers_have_the_same_batches(tmp_path, changed):
    storage = Scratch(tmp_path / "scratch")
    settings = SETTINGS.model_copy(update=changed)
    first = prepare(build_data(), settings, MODEL, PriorSettings(), {}, storage=storage)
    save_prepared(first, storage.folder)
    second = load_prepared(storage.folder)
    for name in ("scales", "prior_validation", "beta", "force_noise"):
        assert getattr(first, name) == getattr(second, name)
    assert json.loads(first.spec.to_json()) == json.loads(second.spec.to_json())
    for name in ("training", "validation"):
        for a, b in zip(getattr(first, name), getattr(second, name), strict=True):
            np.testing.assert_array_equal(a, b)
    for index in (
        BatchIndex(np.array([0, 1, 1]), np.array([4, 2, 69]), np.array([[1], [0], [2]]), 0.5),
        BatchIndex(np.array([2]), np.array([5]), np.array([[2]])),
    ):
        a, b = (FrameBatches(p.groups)[index] for p in (first, second))
        assert a.weight == b.weight
        assert torch.equal(a.own_share, b.own_share)
        assert (a.whitening is None) == (b.whitening is None) == ("whiten" not in changed)
        assert (a.links is None) == ("hvp_along" not in changed)
        assert (a.density_forces is None) == (b.density_probes is None) == ("density" not in changed)
        for x, y in zip(a, b, strict=True):
            assert not isinstance(x, torch.Tensor) or torch.equal(x, y)
