"""Walker processes: start them, take what they send, put it on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np
import openmm
from numpy.typing import NDArray
from rich.progress import Progress, TaskID

from openmm_hvpcg.atomistic.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from openmm_hvpcg.atomistic.molecule import AtomisticSystem, is_movable
from openmm_hvpcg.atomistic.platforms import PlatformChoice
from openmm_hvpcg.atomistic.walker import WalkerJob
from openmm_hvpcg.atomistic.workers import start_worker
from openmm_hvpcg.config import SamplingSettings
from openmm_hvpcg.errors import BackendError, UnstableSimulationError
from openmm_hvpcg.frames import FramesStore
from openmm_hvpcg.units import NS_PER_PS, PS_PER_FS, SECONDS_PER_DAY

logger = logging.getLogger(__name__)


class Meter:
    """A progress bar over the steps of all walkers, with ns/day of those made in this run."""

    def __init__(self, bar: Progress, task: TaskID, timestep_fs: float) -> None:
        self._bar = bar
        self._task = task
        self._timestep_fs = timestep_fs
        self._new_steps = 0
        self._start = time.monotonic()
        self._lock = threading.Lock()

    @property
    def ns(self) -> float:
        return self._new_steps * self._timestep_fs * PS_PER_FS * NS_PER_PS

    @property
    def ns_per_day(self) -> float:
        return self.ns / max(time.monotonic() - self._start, 1e-9) * SECONDS_PER_DAY

    def add_steps(self, steps: int, *, new: bool = False) -> None:
        with self._lock:
            self._new_steps += steps if new else 0
            self._bar.update(self._task, advance=steps, speed=f"{self.ns_per_day:,.0f} ns/day" if new else "")


class WalkerPool:
    """Starts walkers, takes what they send and puts it on disk."""

    def __init__(
        self,
        system: AtomisticSystem,
        settings: SamplingSettings,
        store: FramesStore,
        checkpoints: Path,
        choice: PlatformChoice,
        checkpoint_seconds: float,
    ) -> None:
        self._system = system
        self._settings = settings
        self._store = store
        self._checkpoints = checkpoints
        self._choice = choice
        self._checkpoint_seconds = checkpoint_seconds
        self._xml = openmm.XmlSerializer.serialize(system.system).encode()
        self._movable = is_movable(system)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def run_walkers(self, walkers: list[int], workers: int, meter: Meter) -> None:
        """Run the given walkers, ``workers`` at a time; the first failure stops all."""
        with ThreadPoolExecutor(max_workers=workers) as pool:
            futures = [pool.submit(self._run_walker, w, meter) for w in walkers]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                self._stop()
                for future in futures:
                    future.cancel()

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes.values():
                process.kill()

    def _run_walker(self, walker: int, meter: Meter) -> None:
        job, positions, box, checkpoint = self._prepare(walker)
        meter.add_steps(_steps_before(job))
        with tempfile.TemporaryFile() as errors, _start_process(errors) as (process, connection):
            with self._lock:
                if self._stopped:
                    process.kill()
                self._processes[walker] = process
            try:
                for message in (
                    job.to_json(),
                    self._xml,
                    positions.tobytes(),
                    b"" if box is None else box.tobytes(),
                    checkpoint,
                ):
                    connection.send_bytes(message)
                self._receive(walker, job, connection, meter)
            except (EOFError, ConnectionResetError, BrokenPipeError) as error:
                if self._stopped:
                    return
                process.wait()
                errors.seek(0)
                tail = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                raise BackendError(
                    f"walker {walker} ended on its own (exit status {process.returncode}) {' '.join(tail)}",
                    where=self._store.path,
                    hint="run again: it resumes; if it happens again, try another platform",
                ) from error

    def _prepare(self, walker: int) -> tuple[WalkerJob, NDArray[np.float64], NDArray[np.float64] | None, bytes]:
        """Where the walker stands: its job, positions and box to start from, and checkpoint."""
        settings, stored = self._settings, self._store.count_done(walker)
        checkpoint = read_checkpoint(self._checkpoint_path(walker))
        if checkpoint is not None and checkpoint.frame > stored:
            logger.warning("walker %d: the checkpoint is ahead of the frames and not used", walker)
            checkpoint = None
        if checkpoint is not None and checkpoint.platform != self._choice.name:
            logger.warning(
                "walker %d: its checkpoint is of platform %s, not %s",
                walker,
                checkpoint.platform,
                self._choice.name,
            )
            checkpoint = None
        positions, box = self._system.positions, self._system.box
        if stored:
            last, last_box = self._store.read_rows(walker, stored - 1, stored)
            positions = last[0].astype(np.float64)
            box = None if last_box is None else last_box[0].astype(np.float64)
        if checkpoint is None and stored:
            logger.warning("walker %d: goes on from frame %d with fresh velocities", walker, stored - 1)
        first = checkpoint.frame if checkpoint else stored
        equilibrated = checkpoint.equilibrated if checkpoint else (settings.equilibration_steps if stored else 0)
        # Generators that a checkpoint does not hold (CPU platform) must not repeat what they gave before.
        seeds = np.random.SeedSequence([settings.seed, walker, first, equilibrated]).generate_state(2)
        job = WalkerJob(
            platform=self._choice.name,
            properties=self._choice.properties,
            temperature_K=self._system.temperature_K,
            friction_per_ps=settings.friction_per_ps,
            timestep_ps=settings.timestep_fs * PS_PER_FS,
            stride=settings.stride,
            n_frames=self._store.counts[walker],
            equilibration_steps=settings.equilibration_steps,
            first_frame=first,
            restart_frame=stored,
            equilibrated=equilibrated,
            velocity_seed=int(seeds[0] % (2**31 - 1)) + 1,
            integrator_seed=int(seeds[1] % (2**31 - 1)) + 1,
            movable=self._movable,
            periodic=self._store.periodic,
            checkpoint_seconds=self._checkpoint_seconds,
        )
        return job, np.ascontiguousarray(positions), box, checkpoint.state if checkpoint else b""

    def _checkpoint_path(self, walker: int) -> Path:
        return self._checkpoints / f"walker_{walker}.chk"

    def _receive(self, walker: int, job: WalkerJob, connection: Connection, meter: Meter) -> None:
        while True:
            message: dict[str, Any] = json.loads(connection.recv_bytes())
            event = message["event"]
            if event == "progress":
                meter.add_steps(message["steps"], new=True)
            elif event == "frames":
                self._keep(walker, message, connection)
            elif event == "finished":
                return
            elif event == "checkpoint_refused":
                logger.warning(
                    "walker %d: its checkpoint cannot be loaded (%s); goes on from %s with fresh velocities",
                    walker,
                    message["reason"],
                    f"frame {job.restart_frame - 1}" if job.restart_frame else "the start",
                )
            elif event == "unstable":
                raise self._explain_blow_up(walker, message["reason"])
            else:
                raise BackendError(
                    f"walker {walker} failed on platform {job.platform} ({message['reason']})",
                    where=self._store.path,
                )

    def _keep(self, walker: int, message: dict[str, Any], connection: Connection) -> None:
        """Add frames to the store, then write the state after them: never a state ahead of its frames."""
        n_frames = int(message["n_frames"])
        if n_frames:
            shape = (n_frames, self._system.n_atoms, 3)
            positions = np.frombuffer(connection.recv_bytes(), dtype=np.float32).reshape(shape)
            raw_box = connection.recv_bytes()
            box = None
            if self._store.periodic:
                box = np.frombuffer(raw_box, dtype=np.float32).reshape(n_frames, 3, 3)
            # A kill between frames and state leaves frames that the resumed walker makes once more.
            known = self._store.count_done(walker) - (int(message["frame"]) - n_frames)
            if known < n_frames:
                self._store.append(walker, positions[known:], None if box is None else box[known:])
        if message["checkpoint"]:
            state = connection.recv_bytes()
            write_checkpoint(
                self._checkpoint_path(walker),
                Checkpoint(int(message["frame"]), int(message["equilibrated"]), self._choice.name, state),
            )

    def _explain_blow_up(self, walker: int, reason: str) -> UnstableSimulationError:
        stored = self._store.count_done(walker)
        where = f"last good frame {stored - 1}" if stored else "before its first frame"
        return UnstableSimulationError(
            f"walker {walker} blew up, {where} ({' '.join(reason.split())})",
            where=self._store.path,
            hint="finished frames are kept; use a shorter timestep_fs or constraints: hbonds",
        )


def _steps_before(job: WalkerJob) -> int:
    return job.equilibrated + job.first_frame * job.stride


@contextlib.contextmanager
def _start_process(errors: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    """A walker process and the connection to it; it is gone on exit."""
    process, connection = start_worker("openmm_hvpcg.atomistic.walker", errors)
    try:
        yield process, connection
    finally:
        connection.close()
        process.kill()
        process.wait()
