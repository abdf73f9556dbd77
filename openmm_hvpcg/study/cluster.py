"""The units of a stage on a Dask cluster: on this machine, or wherever a scheduler has workers."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmm_hvpcg.cores import count_cores
from openmm_hvpcg.errors import BackendError, ConfigError, HVPCGError, StudyError
from openmm_hvpcg.progress import track
from openmm_hvpcg.storage import write_text
from openmm_hvpcg.study.folder import Study

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

    from openmm_hvpcg.study.cluster_tasks import Task
    from openmm_hvpcg.study.stages import UnitWork

logger = logging.getLogger(__name__)

LOCAL = "local"
CONNECT_S = 5.0
#: Tasks of a worker where parts of a unit can be grouped: enough to even out, and few enough not to be all preparation.
TASKS_PER_WORKER = 4


@contextlib.contextmanager
def connect_cluster(scheduler: str, workers: int | None = None) -> Iterator[Cluster]:
    """Connect to a scheduler, or start a cluster of processes on this machine.

    Parameters
    ----------
    scheduler : ``local``, an address (``tcp://host:8786``) or a scheduler file
    workers : processes of ``local``, one a core where None

    Raises
    ------
    ConfigError
        Neither of the three, or ``workers`` of a cluster that is not ours to size.
    BackendError
        Dask is not installed, or nobody answers.
    """
    try:
        import distributed
    except ImportError as error:
        raise BackendError(
            f"a cluster needs Dask ({error})", hint="pip install 'openmm-hvpcg[cluster]', here and for the workers"
        ) from error
    if scheduler != LOCAL and workers is not None:
        raise ConfigError(
            "--workers goes with --scheduler local", got=scheduler, hint="start workers with the scheduler's own means"
        )
    # Its warnings are tracebacks of tasks, which reach the user as errors, and news of workers that come and go.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if scheduler == LOCAL:
            local = stack.enter_context(_start_local(workers or count_cores()))
            where: dict[str, Any] = {"address": local.scheduler_address}
        else:
            where = _find_scheduler(scheduler)
        try:
            client = distributed.Client(**where, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise BackendError(
                f"no Dask scheduler answers ({' '.join(str(error).split())})",
                where=scheduler,
                hint="start one with `dask scheduler`, or use --scheduler local",
            ) from error
        yield Cluster(stack.enter_context(client))


@contextlib.contextmanager
def _start_local(workers: int) -> Iterator[LocalCluster]:
    import dask
    from distributed import Client, LocalCluster

    # Workers start processes of their own, which a daemon must not; no limit of memory, since those are not counted.
    with dask.config.set({"distributed.worker.daemon": False}):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        )
        with cluster, Client(cluster, set_as_default=False) as client:
            client.register_plugin(_make_core_plugin(workers))
            yield cluster


def _make_core_plugin(workers: int) -> Any:
    """Gives every worker of this machine its share of the cores; those that start again get theirs too."""
    from distributed import WorkerPlugin

    class ShareCores(WorkerPlugin):
        name = "openmm-hvpcg-cores"

        def setup(self, worker: Any) -> None:
            _share_cores(int(worker.name), workers)

    return ShareCores()


def _share_cores(worker: int, workers: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= workers:
        os.sched_setaffinity(0, cores[worker::workers])


def _find_scheduler(scheduler: str) -> dict[str, Any]:
    if re.fullmatch(r"((tcp|tls|ws|wss)://.+)|([\w.-]+:\d+)", scheduler):
        return {"address": scheduler}
    if not Path(scheduler).is_file():
        raise ConfigError(
            "no such scheduler",
            expected="local, an address such as tcp://host:8786, or a scheduler file",
            got=scheduler,
        )
    return {"scheduler_file": scheduler}


class Cluster:
    """Does the units of a study's stages on a cluster's workers; made by :func:`connect_cluster`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def map_units(self, study: Study, stage: str, units: list[str], work: UnitWork) -> Iterator[str]:
        """Do units of a stage at once; yields each as it is finished.

        A unit that has parts is begun first; then its parts are done wherever there is a worker, and what they made is
        put together. Tasks of a worker that dies are done again by another one, from where they were.

        Raises
        ------
        HVPCGError
            Of the first unit that failed, which it names. The others are stopped: what they have done is kept.
        """
        from openmm_hvpcg.study.cluster_tasks import find_lock

        if not units:
            return
        with self._open_run(study) as run:
            if not self._client.nthreads():
                logger.info("no worker has come to the scheduler yet; waiting for one")
            with track(stage, len(units), "units", show=study.progress) as advance:
                for unit in run.do_units(stage, units, work):
                    _await_file(study.find_output(stage, unit))
                    find_lock(study.out, stage, unit).unlink(missing_ok=True)
                    advance(1)
                    yield unit

    @contextlib.contextmanager
    def _open_run(self, study: Study) -> Iterator[_Run]:
        from openmm_hvpcg.study.cluster_tasks import TOKEN

        token, path = secrets.token_hex(8), study.out / TOKEN
        write_text(path, token)
        self._client.subscribe_topic(token, _log_here)
        run = _Run(self._client, study, token)
        try:
            yield run
        finally:
            run.stop()
            self._client.unsubscribe_topic(token)
            path.unlink(missing_ok=True)


class _Run:
    """The tasks of one stage."""

    def __init__(self, client: Client, study: Study, token: str) -> None:
        self._client, self._study, self._token = client, study, token
        self._tasks: dict[Future, Task] = {}

    def do_units(self, stage: str, units: list[str], work: UnitWork) -> Iterator[str]:
        from distributed import as_completed

        left: dict[str, int] = {}
        finished = as_completed(loop=self._client.loop)
        for unit in units:
            finished.add(self._submit(stage, unit, "whole" if work.part is None else "begin"))
        for future in finished:
            task, todo = self._tasks[future], self._get_result(future)
            del self._tasks[future]
            if task.step == "whole":
                yield task.unit
                continue
            if task.step == "begin":
                groups = _group(todo, work.share or self._choose_share(len(todo)))
                # One group is the whole, without a detour.
                groups = groups if len(groups) > 1 else []
                left[task.unit] = len(groups)
                for group in groups:
                    finished.add(self._submit(stage, task.unit, "part", group))
            else:
                left[task.unit] -= 1
            if left[task.unit] == 0:
                finished.add(self._submit(stage, task.unit, "whole"))

    def stop(self) -> None:
        """Let go of tasks that wait, and start workers anew that are at one: a thread cannot be interrupted."""
        if not self._tasks:
            return
        keys = {future.key for future in self._tasks}
        with contextlib.suppress(Exception):
            busy = [worker for worker, doing in self._client.processing().items() if keys & set(doing)]
            self._client.cancel(list(self._tasks), force=True)
            if busy:
                self._client.restart_workers(busy, timeout=CONNECT_S, raise_for_error=False)

    def _submit(self, stage: str, unit: str, step: str, parts: tuple[int, ...] = ()) -> Future:
        from openmm_hvpcg.study.cluster_tasks import Task, run_task

        study = self._study
        task = Task(study.protocol, study.base.absolute(), study.out.absolute(), self._token, stage, unit, step, parts)
        first = f"-{parts[0]}" if parts else ""
        future = self._client.submit(run_task, task, key=f"{stage}-{unit}-{step}{first}-{self._token}", pure=False)
        self._tasks[future] = task
        return future

    def _get_result(self, future: Future) -> list[int]:
        """What a task returned; what it raised is raised."""
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        task = self._tasks[future]
        try:
            return future.result()
        except HVPCGError:
            raise
        except KilledWorker as error:
            raise BackendError(
                "every worker that tried it died, as by lack of memory",
                where=str(task),
                hint="look into the workers' logs; the same command again goes on from here",
            ) from error
        except FutureCancelledError as error:
            raise BackendError(
                "the connection to the Dask scheduler was lost",
                where=str(task),
                hint="the same command again goes on from here",
            ) from error
        except ModuleNotFoundError as error:
            raise BackendError(
                f"a worker lacks a module ({error})",
                where=str(task),
                hint="start the workers from the environment the study is started from",
            ) from error

    def _choose_share(self, n_parts: int) -> int:
        return -(-n_parts // (TASKS_PER_WORKER * max(1, len(self._client.nthreads())))) or 1


def _group(parts: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(parts[k : k + size]) for k in range(0, len(parts), size)]


def _log_here(event: tuple[float, dict[str, Any]]) -> None:
    """Log what a worker said as if it had been said here."""
    message = event[1]
    logging.getLogger(message["name"]).log(message["level"], "%s", message["message"])


def _await_file(path: Path) -> None:
    """Wait until a worker's output is seen here: a network file system may take its time."""
    from openmm_hvpcg.study.cluster_tasks import LOCK_POLL_S, PATIENCE_S

    limit = time.monotonic() + PATIENCE_S
    while not path.exists():
        if time.monotonic() > limit:
            raise StudyError("what a worker wrote is not seen here", where=path, hint="share the file system")
        time.sleep(LOCK_POLL_S)
        # Listing a folder renews what the system remembers of it.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
