"""Training in several processes, one a device, on one copy of the tensors; and where the tensors lie.

The first process is the one that was asked to train. It starts the others on :mod:`openmm_hvpcg.training.worker`, which
need no more than its folder: settings and tensors lie there in files, and the tensors are mapped into the memory of
all. They end with it: each watches a pipe from it. On other machines they are started by ssh or the like, which passes
the pipes on; the folder has to lie on a file system of all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from openmm_hvpcg.config import ModelSettings, TrainingSettings
from openmm_hvpcg.errors import BackendError, ConfigError, HVPCGError
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.training.batches import FrameGroup, MoleculeSize
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.loop import Trained, train_network
from openmm_hvpcg.training.losses import LossScales
from openmm_hvpcg.training.models.torsions import Bonded
from openmm_hvpcg.training.places import HOST, Place
from openmm_hvpcg.training.preparation import Prepared
from openmm_hvpcg.training.scratch import Memory, Scratch, Storage

logger = logging.getLogger(__name__)

SCRATCH = "scratch"
#: What a worker writes when it has loaded everything.
READY = b"ready\n"
#: Seconds that a worker has to end by itself.
PATIENCE_S = 20.0
#: Seconds after the loss of its connection within which the end of a worker is the reason.
LOST_S = 5.0
start_process = subprocess.Popen
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
#: Environment variables that processes on other machines get, too: how to talk to each other, and threads.
HANDED_ON = ("GLOO_", "NCCL_", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def open_storage(datasets: Sequence[LabelledFrames], settings: TrainingSettings, folder: Path) -> Iterator[Storage]:
    """Memory for the tensors of a training; or files in its folder, for its time, where that is asked for.

    Files are used where the tensors are larger than ``training.memory_gb``, and where processes share them.
    """
    size_gb = sum(count_bytes(d, settings) for d in datasets) / 1e9
    if settings.n_processes == 1 and (settings.memory_gb is None or size_gb <= settings.memory_gb):
        yield Memory()
        return
    scratch = Scratch(folder / SCRATCH)
    logger.info("%s: the labels, %.2g GB, are read from files", folder.name, size_gb)
    try:
        yield scratch
    finally:
        scratch.delete()


def count_bytes(dataset: LabelledFrames, settings: TrainingSettings) -> int:
    """Size of the training tensors of a dataset."""
    n = 3 * dataset.bead_map.n_beads
    per_frame = 2 * n + 3 * n * dataset.n_probes + (n * n if settings.whiten == "noise" else 0)
    per_frame += n + n * dataset.n_probes if settings.density > 0 else 0
    per_frame += n * dataset.n_probes if settings.covariance == "ratio" else 0
    return 4 * per_frame * dataset.n_frames


def train_in_processes(
    prepared: Prepared, settings: TrainingSettings, model: ModelSettings, folder: Path, progress: bool
) -> Trained:
    """Train on ``settings.devices`` devices of this machine and of each of ``settings.hosts``, a process a device.

    Raises
    ------
    BackendError
        Another process ended before its time.
    """
    if settings.n_processes == 1:
        return train_network(prepared, settings, model, folder, progress=progress)
    save_prepared(prepared, folder / SCRATCH)
    prepared.storage.publish()
    with _start_workers(folder, settings) as place:
        return train_network(prepared, settings, model, folder, place, progress=progress)


def _find_address(settings: TrainingSettings) -> str:
    """Where the other processes find this one."""
    return HOST if not settings.hosts else os.environ.get("MASTER_ADDR") or socket.gethostname()


def build_command(folder: Path, place: Place, settings: TrainingSettings) -> list[str]:
    """What starts the process of a place.

    Raises
    ------
    ConfigError
        The shell of another machine would take a part of the command apart.
    """
    command = [sys.executable, "-m", "openmm_hvpcg.training.worker", os.path.abspath(folder), *place.to_words()]
    paths = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    handed_on = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
    command = ["env", *(f"{name}={value}" for name, value in (handed_on | {"PYTHONPATH": paths}).items()), *command]
    if place.machine == 0:
        return command
    for word in command:
        if shlex.quote(word) != word:
            raise ConfigError(
                "training.hosts: a shell would take a part of the command apart that starts a process there",
                got=repr(word),
                expected="letters, digits and @%+=:,./-_",
                hint="take folders with such names",
            )
    return [*shlex.split(settings.launch.format(host=settings.hosts[place.machine - 1])), *command]


def _wait_until_ready(worker: subprocess.Popen[bytes]) -> bool:
    """Whether it has loaded everything; what a login shell has to say first is passed over."""
    return worker.stdout is not None and any(line == READY for line in iter(worker.stdout.readline, b""))


@contextlib.contextmanager
def _start_workers(folder: Path, settings: TrainingSettings) -> Iterator[Place]:
    """Start the other processes; gives this one's place among them."""
    place = Place(0, settings.n_processes, find_free_network_port(), settings.n_machines, _find_address(settings))
    commands = [build_command(folder, replace(place, rank=rank), settings) for rank in range(1, place.n_ranks)]
    if settings.hosts:
        logger.info("%s: %d processes on each of %s", folder.name, place.n_devices, ", ".join(settings.hosts))
    log_path = folder / "logs" / "workers.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    before = {name: os.environ.get(name) for name in _ADDRESS}
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with open(log_path, "wb") as log:
            for command in commands:
                # Away from the terminal: an interruption is this process's to handle.
                worker = start_process(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
                )
                workers.append(worker)
        for worker in workers:
            if not _wait_until_ready(worker):
                raise _explain(log_path)
        yield place
        if any(worker.wait(PATIENCE_S) != 0 for worker in workers):
            raise _explain(log_path)
    except HVPCGError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _has_failed(workers):
            raise _explain(log_path) from error
        raise
    finally:
        _end(workers)
        leave_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _has_failed(workers: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether one of them ended before its time, which shows here as a lost connection a little earlier."""
    until = time.monotonic() + LOST_S
    while all(worker.poll() is None for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    return any(worker.poll() not in (None, 0) for worker in workers)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: with its pipe closed a worker ends itself."""
    for worker in workers:
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()
    for worker in workers:
        try:
            worker.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def leave_group() -> None:
    """Leave the processes that trained together, so that the next training can make a group of its own."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _explain(log_path: Path) -> BackendError:
    lines = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return BackendError(
        f"a process of the training ended before its time ({lines[-1] if lines else 'without a word'})",
        where=log_path,
        hint="run the same command again; it resumes",
    )


def save_prepared(prepared: Prepared, folder: Path) -> None:
    """Write beside the tensors in a scratch folder what else a worker needs."""
    for name in ("training", "validation"):
        for k, frames in enumerate(getattr(prepared, name)):
            np.save(folder / f"{name}{k}.npy", frames)
    content = {
        "spec": json.loads(prepared.spec.to_json()),
        "scales": asdict(prepared.scales),
        "prior_validation": prepared.prior_validation,
        "beta": prepared.beta,
        "force_noise": prepared.force_noise,
        "sizes": [
            (
                len(m.positions),
                m.probes.shape[1],
                m.species.tolist(),
                [rows.tolist() for rows in m.bonded],
                None if m.links is None else m.links.tolist(),
            )
            for m in prepared.molecules
        ],
        "groups": [
            (g.members, g.whitening is not None, g.density_forces is not None, g.own_share.tolist())
            for g in prepared.groups
        ],
    }
    write_json(folder / "prepared.json", content)


def _read_rows(bonded: list[list[list[int]]]) -> Iterator[torch.Tensor]:
    return (torch.tensor(rows, dtype=torch.long).reshape(-1, k) for rows, k in zip(bonded, (4, 5), strict=True))


def load_prepared(folder: Path) -> Prepared:
    """What :func:`save_prepared` wrote, on the same tensors; covariances are pooled by the first process alone."""
    content = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    storage = Scratch(folder, attach=True)
    sizes = [
        MoleculeSize(
            n,
            p,
            torch.tensor(species),
            Bonded(*_read_rows(bonded)),
            None if links is None else torch.tensor(links, dtype=torch.long).reshape(-1, 2),
        )
        for n, p, species, bonded, links in content["sizes"]
    ]
    groups = []
    for members, whitened, dense, own_share in content["groups"]:
        group = FrameGroup.allocate(members, sizes, whitened=whitened, dense=dense, storage=storage)
        groups.append(replace(group, own_share=torch.tensor(own_share, dtype=torch.float64)))
    molecules = {k: group.get_molecule(i) for group in groups for i, k in enumerate(group.members)}
    training, validation = (
        [np.load(folder / f"{name}{k}.npy") for k in range(len(sizes))] for name in ("training", "validation")
    )
    force, hvp = content["prior_validation"]
    return Prepared(
        [molecules[k] for k in range(len(sizes))],
        groups,
        training,
        validation,
        training,
        LossScales(**content["scales"]),
        (force, hvp),
        PotentialSpec.from_json(json.dumps(content["spec"]), where=folder),
        content["beta"],
        content["force_noise"],
        [None] * len(sizes),
        [None] * len(sizes),
        storage,
    )
