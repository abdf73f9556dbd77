"""A study on a Dask cluster of two worker processes: the results of one machine, whatever happens to the workers."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from distributed import Client

from openmm_hvpcg.errors import BackendError, ConfigError, InputError, StudyError
from openmm_hvpcg.study import cluster_tasks
from openmm_hvpcg.study.cluster import Cluster, connect_cluster
from openmm_hvpcg.study.folder import LOG_NAME, Study, open_study
from openmm_hvpcg.study.stages import UNIT_WORK, run_stage

#: Walkers of 70, 70 and 69 frames, which share chunks of the store; datasets of four chunks, so that they have parts.
PROTOCOL: dict[str, Any] = {
    "molecules": [{"name": name, "input": {"sequence": name, "solvent": "vacuum"}} for name in ("G", "A")],
    "mapping": {"beads": "backbone"},
    "sampling": {"n_frames": 209, "walkers": 3, "stride": 5, "equilibration_steps": 50, "platform": "Reference"},
    "labels": {"probes_per_frame": 1, "platform": "Reference"},
    "model": {"features": 8, "interactions": 1, "radial": 8},
    "training": {"max_epochs": 1, "batch_size": 64, "arms": [{"name": "fm", "hvp_weight": 0.0}]},
    "simulation": {"replicas": 2, "n_steps": 40, "save_every": 10, "timestep_fs": 1.0, "platform": "Reference"},
}
#: The date in the header of a DCD ends here.
DCD_HEADER = 276


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    package = logging.getLogger("openmm_hvpcg")
    level = package.level
    package.setLevel(logging.INFO)
    with connect_cluster("local", 2) as started:
        yield started
    package.setLevel(level)


def open_new(folder: Path, out: str, cluster: Cluster | None = None, **changes: Any) -> Study:
    (folder / f"{out}.yaml").write_text(yaml.safe_dump({**PROTOCOL, **changes}))
    study = open_study(folder / f"{out}.yaml", folder / out, progress=False)
    return dataclasses.replace(study, cluster=cluster)


def assert_same_arrays(first: Path, second: Path) -> None:
    one, other = (dict(zarr.open_group(str(path), mode="r").arrays()) for path in (first, second))
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values[...], other[name][...], err_msg=name)


def test_results_are_those_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    here, there = open_new(tmp_path, "here"), open_new(tmp_path, "there", cluster)
    for stage in ("sample", "label", "train", "export", "simulate"):
        run_stage(here, stage)
        run_stage(there, stage)
    for molecule in ("G", "A"):
        assert_same_arrays(here.frames_path(molecule), there.frames_path(molecule))
        assert_same_arrays(here.dataset_path(molecule), there.dataset_path(molecule))
        runs = here.run_folder("fm", molecule), there.run_folder("fm", molecule)
        for name, start in (("replica_000.dcd", DCD_HEADER), ("replica_001.dcd", DCD_HEADER), ("energies.csv", 0)):
            one, other = ((run / name).read_bytes()[start:] for run in runs)
            assert one == other, name
    one, other = (json.loads((study.model_folder("fm") / "training.json").read_text()) for study in (here, there))
    assert one["curves"] == other["curves"]
    # The same files, too, but for what says when and on which machine.
    assert list_files(here.out) == list_files(there.out)
    log = (there.out / LOG_NAME).read_text()
    for part in range(3):
        assert log.count(f"sample A (part {part}): on tcp://") == 1
    for said in ("label A (part 3)", "train fm", "export fm"):
        assert log.count(f"{said}: on tcp://") == 1
    assert log.count("fm/A: 8e-05 ns in all") == 1, "the log has what workers say"


def list_files(folder: Path) -> list[str]:
    names = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "tensorboard" not in str(p))
    return sorted(names)


def test_a_worker_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    long = {"molecules": PROTOCOL["molecules"][1:], "sampling": {**PROTOCOL["sampling"], "stride": 400}}
    here, there = open_new(tmp_path, "here", **long), open_new(tmp_path, "there", cluster, **long)
    cluster._client.run(checkpoint_often)
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_sampling_worker, cluster._client, there)
        run_stage(there, "sample")
        # Made frames and a state to go on from; else this would show only that walkers can begin twice.
        walker, frames = killed.result()
    assert frames > 0
    run_stage(here, "sample")
    assert_same_arrays(here.frames_path("A"), there.frames_path("A"))
    log = (there.out / LOG_NAME).read_text()
    assert log.count(f"sample A (part {walker}): on tcp://") == 2
    assert "fresh velocities" not in log
    assert sorted(p.name for p in (there.out / "frames").iterdir()) == ["A.zarr"]


def checkpoint_often() -> None:
    """In a worker: several checkpoints in a test of seconds."""
    import functools

    from openmm_hvpcg.study import stages

    changed: Any = stages
    changed.sample_walker = functools.partial(stages.sample_walker, checkpoint_seconds=0.1)


def kill_sampling_worker(client: Client, study: Study) -> tuple[int, int]:
    """SIGKILL a worker as soon as its walker has frames; the walker, and how many frames."""
    pids = client.run(os.getpid)
    parts = study.frames_path("A").with_suffix(".parts")

    def find() -> tuple[int, int] | None:
        for path in parts.glob("walker_?.zarr"):
            done = zarr.open_group(str(path), mode="r")["done"][...]
            if 0 < done.sum() < len(done):
                return int(path.stem[-1]), int(done.sum())
        return None

    walker, done = wait_for(find)
    begun = wait_for(lambda: re.search(rf"part {walker}\): on (\S+)", (study.out / LOG_NAME).read_text()))
    os.kill(pids[begun[1]], signal.SIGKILL)
    return walker, done


def wait_for(find: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """What ``find`` returns once it is something; a store that is being made may be unreadable for a moment."""
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        try:
            found = find()
        except (OSError, KeyError, ValueError):
            found = None
        if found is not None:
            return found
        time.sleep(0.02)
    raise TimeoutError


def test_one_machine_goes_on_where_a_cluster_was_stopped(tmp_path: Path) -> None:
    one = {"molecules": PROTOCOL["molecules"][:1]}
    whole, stopped = open_new(tmp_path, "whole", **one), open_new(tmp_path, "stopped", **one)
    work = UNIT_WORK["sample"]
    assert work.part is not None
    assert work.part(stopped, "G", ()) == [0, 1, 2]
    # The store of all has no frames while its walkers are made apart.
    assert work.part(stopped, "G", (1,)) == [0, 1, 2]
    for study in (whole, stopped):
        run_stage(study, "sample")
    assert_same_arrays(whole.frames_path("G"), stopped.frames_path("G"))
    assert [p.name for p in (stopped.out / "frames").iterdir()] == ["G.zarr"]


def test_an_error_names_the_molecule(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "bad.dcd").write_text("no trajectory")
    bad = {"name": "broken", "input": {"sequence": "G", "solvent": "vacuum", "trajectory": ["bad.dcd"]}}
    study = open_new(tmp_path, "out", cluster, molecules=[bad])
    with pytest.raises(InputError, match=r"broken.*bad\.dcd"):
        run_stage(study, "sample")
    # The next study is not in the way of what the failed one left.
    run_stage(open_new(tmp_path, "next", cluster, molecules=PROTOCOL["molecules"][:1]), "sample")


def test_nobody_at_the_address(tmp_path: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(BackendError, match=r"tcp://127\.0\.0\.1:9: no Dask scheduler answers"),
        connect_cluster("tcp://127.0.0.1:9"),
    ):
        pass
    # 5 s to connect, and room for a busy machine.
    assert time.monotonic() - began < 15
    with pytest.raises(ConfigError, match="no such scheduler"), connect_cluster(str(tmp_path / "scheduler.json")):
        pass
    with pytest.raises(ConfigError, match="--workers goes with --scheduler local"), connect_cluster("tcp://a:1", 2):
        pass


def test_a_worker_that_does_not_see_the_folder(tmp_path: Path) -> None:
    token = tmp_path / cluster_tasks.TOKEN
    token.parent.mkdir()
    for content in (None, "another run's"):
        if content is not None:
            token.write_text(content)
        with pytest.raises(StudyError, match="does not see the files"):
            cluster_tasks.check_token(tmp_path, "ours", patience_s=0)
    token.write_text("ours")
    cluster_tasks.check_token(tmp_path, "ours", patience_s=0)


def test_a_task_waits_for_its_earlier_attempt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "sample.A.lock"
    code = (
        "import fcntl, sys, time; handle = open(sys.argv[1], 'a')\n"
        "fcntl.lockf(handle, fcntl.LOCK_EX, 1, 2); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as attempt:
        assert attempt.stdout is not None
        attempt.stdout.readline()
        with cluster_tasks._hold(lock, (1, 3)):
            assert not caplog.records, "other parts are free"
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(lambda: (time.sleep(0.3), attempt.kill(), time.monotonic())[-1])
            with cluster_tasks._hold(lock, ()):
                assert time.monotonic() > killed.result()
    assert "an earlier attempt still goes on" in caplog.text
