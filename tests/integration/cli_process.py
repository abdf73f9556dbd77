"""The command line in processes of its own, forked from one that has imported everything: isolated, killable, quick."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "data"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["openmm_hvpcg.cli", "openmm_hvpcg.study.stages"])


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Options:
    """What a test changes in the process of a command.

    ``checkpoint_seconds``: how often sampling and simulation write checkpoints; ``python_path``: searched first;
    ``columns``: width of the terminal.
    """

    checkpoint_seconds: float | None = None
    python_path: str | None = None
    columns: int = 200


def call_cli(*arguments: object, options: Options | None = None) -> Result:
    """Run ``openmm-hvpcg arguments`` to its end."""
    return Command(arguments, options or Options()).finish()


class Command:
    """``openmm-hvpcg arguments``, started."""

    def __init__(self, arguments: Sequence[object], options: Options | None = None) -> None:
        words = [str(a) for a in arguments]
        self._files = [_new_file(), _new_file()]
        self.process = _context.Process(target=_run, args=(words, options or Options(), *map(str, self._files)))
        # The fork server is started by the first process, with this environment: more than one thread per
        # process on a shared machine makes torch's small operations wait for each other.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            self.process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before

    def finish(self, timeout: float = 120.0) -> Result:
        """Wait for the end."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s: {self._read(1)}")
        result = Result(self.process.exitcode, self._read(0), self._read(1))
        for file in self._files:
            file.unlink()
        return result

    def kill_when(self, ready: Callable[[], bool], timeout: float = 60.0) -> None:
        """SIGKILL the command as soon as ``ready()``; fails if it ends before."""
        limit = time.monotonic() + timeout
        while not _holds(ready):
            if self.process.exitcode is not None or time.monotonic() > limit:
                raise AssertionError(f"ended or late before it could be killed: {self._read(1)}")
            time.sleep(0.01)
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.finish().status == -signal.SIGKILL

    def _read(self, index: int) -> str:
        return self._files[index].read_text(encoding="utf-8", errors="replace")


def _holds(ready: Callable[[], bool]) -> bool:
    """A store that is being written may be unreadable for a moment."""
    try:
        return ready()
    except Exception:
        return False


def _new_file() -> Path:
    handle, name = tempfile.mkstemp(prefix="hvpcg-test-")
    os.close(handle)
    return Path(name)


def _run(arguments: list[str], options: Options, out: str, err: str) -> None:
    for descriptor, name in ((1, out), (2, err)):
        target = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, descriptor)
        os.close(target)
    # The fork server's streams were made for the descriptors it was started with.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["COLUMNS"] = str(options.columns)
    if options.python_path is not None:
        sys.path.insert(0, options.python_path)
    if options.checkpoint_seconds is not None:
        _checkpoint_every(options.checkpoint_seconds)
    from openmm_hvpcg import cli

    sys.argv = ["openmm-hvpcg", *arguments]
    cli.main()


def _checkpoint_every(seconds: float) -> None:
    from openmm_hvpcg.study import stages

    changed: Any = stages
    changed.sample_frames = partial(stages.sample_frames, checkpoint_seconds=seconds)
    changed.simulate = partial(stages.simulate, checkpoint_interval_s=seconds)
