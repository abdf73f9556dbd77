"""What a worker of a cluster does: one task of one unit of a study, from the study's folder, into it.

A task may be begun again, by another worker, at any moment: the stages resume. It may even be begun while an earlier
attempt goes on, at a worker that the scheduler has lost sight of: a lock in the folder lets it wait for that one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import get_worker

from openmm_hvpcg._version import __version__
from openmm_hvpcg.config import Protocol
from openmm_hvpcg.errors import BackendError, HVPCGError, StudyError
from openmm_hvpcg.study.folder import RECORDS, Study

logger = logging.getLogger(__name__)

#: Of a run, in the study's folder; a worker that sees the folder finds the token of the run in it.
TOKEN = f"{RECORDS}/cluster.token"
#: Network file systems show a new file after some seconds, 60 at most by default.
PATIENCE_S = 60.0
LOCK_POLL_S = 0.5

# OpenMM's Reference platform has one random generator a process, and torch one number of threads.
_one_at_a_time = threading.Lock()
_studies: dict[str, Study] = {}


@dataclass(frozen=True)
class Task:
    """A unit of a stage, or some parts of it.

    Attributes
    ----------
    protocol, base, out : of the study; paths are absolute, and the same on all machines
    token : of the run
    stage, unit : which
    step : ``begin`` the unit, do ``parts`` of it, or the ``whole`` of it, or what is left
    version : of this package, which the worker has to have too
    """

    protocol: Protocol
    base: Path
    out: Path
    token: str
    stage: str
    unit: str
    step: str
    parts: tuple[int, ...] = ()
    version: str = __version__

    def __str__(self) -> str:
        parts = f" ({self.step} {', '.join(map(str, self.parts))})" if self.step == "part" else ""
        return f"{self.stage} {self.unit}{parts}"


def run_task(task: Task) -> list[int]:
    """Do a task in a worker's process; returns the parts of the unit that were to do.

    Raises
    ------
    HVPCGError
        What went wrong, the unit named.
    """
    with _one_at_a_time, _forward_log(task.token):
        try:
            _check_worker(task)
            from openmm_hvpcg.study.stages import UNIT_WORK

            study, work = _open(task), UNIT_WORK[task.stage]
            with _hold(find_lock(task.out, task.stage, task.unit), task.parts):
                if task.step != "begin":
                    logger.info("%s: on %s", task, get_worker().address)
                if task.step == "whole":
                    work.whole(study, task.unit)
                elif work.part is not None:
                    return work.part(study, task.unit, task.parts)
        except HVPCGError as error:
            raise _name_unit(error, task.unit) from None
    return []


def find_lock(out: Path, stage: str, unit: str) -> Path:
    """The file whose bytes the tasks of a unit hold."""
    return out / RECORDS / f"{stage}.{unit.replace('/', '+')}.lock"


def check_token(out: Path, token: str, patience_s: float = PATIENCE_S) -> None:
    """Raise :class:`StudyError` unless this machine sees the folder of the run."""
    limit = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError):
            if (out / TOKEN).read_text(encoding="utf-8") == token:
                return
        if time.monotonic() >= limit:
            break
        time.sleep(LOCK_POLL_S)
    raise StudyError(
        f"the worker on {socket.gethostname()} does not see the files of the machine that the study was started on",
        where=out,
        hint="choose an --out on a file system that all of them share, at the same path",
    )


def _check_worker(task: Task) -> None:
    if task.version != __version__:
        raise BackendError(
            f"the worker on {socket.gethostname()} has another openmm-hvpcg",
            expected=task.version,
            got=__version__,
            hint="start the workers from the environment the study is started from",
        )
    check_token(task.out, task.token)


def _open(task: Task) -> Study:
    """The study of a run, with what this process has built for it."""
    if task.token not in _studies:
        _studies.clear()
        _studies[task.token] = Study(task.protocol, task.base, task.out, progress=False)
    return _studies[task.token]


def _name_unit(error: HVPCGError, unit: str) -> HVPCGError:
    named = re.search(rf"(?<!\w){re.escape(unit)}(?!\w)", str(error))
    return error if named else type(error)(str(error), where=unit)


@contextlib.contextmanager
def _hold(path: Path, parts: tuple[int, ...]) -> Iterator[None]:
    """Hold a byte of a file for each part, or the whole file; a process that ends lets go of it."""
    with open(path, "a", encoding="utf-8") as handle:
        for start, length in [(part, 1) for part in parts] or [(0, 0)]:
            waiting = False
            while not _try_lock(handle, start, length):
                if not waiting:
                    logger.warning("%s: an earlier attempt still goes on; waiting for it", path.stem)
                waiting = True
                time.sleep(LOCK_POLL_S)
        yield


def _try_lock(handle: Any, start: int, length: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise StudyError(f"the file system has no locks ({error})", where=handle.name) from error
    return True


class _ToClient(logging.Handler):
    """Sends log records to the process that started the run."""

    def __init__(self, topic: str) -> None:
        super().__init__(logging.INFO)
        self._topic = topic
        # Log records also come from threads that Dask does not know.
        self._worker = get_worker()

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.log_event(
            self._topic, {"name": record.name, "level": record.levelno, "message": record.getMessage()}
        )


@contextlib.contextmanager
def _forward_log(topic: str) -> Iterator[None]:
    package, handler = logging.getLogger("openmm_hvpcg"), _ToClient(topic)
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
