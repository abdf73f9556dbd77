"""One walker's MD in a process of its own: ``python -m openmm_hvpcg.atomistic.walker FD``.

A process, not a thread, because OpenMM's Reference platform draws all random numbers from one generator of
the process: two walkers in threads would share it, and nothing could be repeated or resumed exactly. The
walker writes no file. It sends frames and checkpoints to the process that started it, and ends with it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_hvpcg.atomistic.periodic import recentre, wrap_molecules
from openmm_hvpcg.units import BOLTZMANN

#: A kinetic temperature above this many times the thermostat's is a blow-up: a chance of 1e-12 a frame even
#: for a single atom in equilibrium (chi-square with 3 degrees of freedom above 60).
MAX_TEMPERATURE_RATIO = 20.0

#: A molecule that has drifted this far from the origin (nm) is moved back, so that platforms which compute
#: in single precision keep their digits.
MAX_DRIFT_NM = 5.0

#: Enough to remove clashes; the equilibration does the rest. kJ/mol/nm (rms), iterations.
MINIMIZE_TOLERANCE = 10.0
MINIMIZE_ITERATIONS = 500
PROGRESS_SECONDS = 0.3
MAX_BUFFERED_BYTES = 64_000_000


@dataclass(frozen=True)
class WalkerJob:
    """All a walker needs besides System, positions, box and checkpoint.

    ``first_frame`` and ``equilibrated`` say where the checkpoint (or, without one, the positions) stands;
    ``restart_frame`` where to go on from the positions if the checkpoint cannot be loaded.
    """

    platform: str
    properties: dict[str, str]
    temperature_K: float
    friction_per_ps: float
    timestep_ps: float
    stride: int
    n_frames: int
    equilibration_steps: int
    first_frame: int
    restart_frame: int
    equilibrated: int
    velocity_seed: int
    integrator_seed: int
    movable: bool
    periodic: bool
    checkpoint_seconds: float

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> WalkerJob:
        return cls(**json.loads(text))


class BlowUp(Exception):
    """Positions or temperature left the physical range."""


def main() -> None:
    """Serve the one job that comes through the connection, and report any failure through it."""
    connection = Connection(int(sys.argv[1]))
    try:
        job = WalkerJob.from_json(connection.recv_bytes())
        xml, positions, box, checkpoint = (connection.recv_bytes() for _ in range(4))
        walker = _Walker(connection, job, xml.decode(), np.frombuffer(positions).reshape(-1, 3), box)
        try:
            walker.start(checkpoint)
            walker.run()
            walker.send("finished")
        except BlowUp as error:
            walker.flush(with_checkpoint=False)
            walker.send("unstable", reason=str(error))
        except (openmm.OpenMMException, ValueError) as error:
            walker.flush(with_checkpoint=False)
            unstable = "nan" in str(error).lower()
            walker.send("unstable" if unstable else "error", reason=str(error))
    except (BrokenPipeError, ConnectionResetError, EOFError, KeyboardInterrupt):
        sys.exit(1)


class _Walker:
    def __init__(
        self, connection: Connection, job: WalkerJob, xml: str, positions: NDArray[np.float64], box: bytes
    ) -> None:
        self._connection = connection
        self._job = job
        self._positions = positions
        system = openmm.XmlSerializer.deserialize(xml)
        self._masses = np.array(
            [system.getParticleMass(i).value_in_unit(unit.amu) for i in range(system.getNumParticles())]
        )
        self._dof = max(1, 3 * int(np.count_nonzero(self._masses)) - system.getNumConstraints())
        self._integrator = openmm.LangevinMiddleIntegrator(job.temperature_K, job.friction_per_ps, job.timestep_ps)
        self._integrator.setRandomNumberSeed(job.integrator_seed)
        for force in system.getForces():
            if hasattr(force, "setRandomNumberSeed"):
                force.setRandomNumberSeed(job.integrator_seed)
        platform = openmm.Platform.getPlatformByName(job.platform)
        self._context = openmm.Context(system, self._integrator, platform, job.properties)
        if box:
            self._context.setPeriodicBoxVectors(*np.frombuffer(box).reshape(3, 3))
        self._molecules = _number_molecules(self._context, len(positions))
        self._frame = job.first_frame
        self._equilibrated = job.equilibrated
        self._buffer: list[NDArray[np.float32]] = []
        self._boxes: list[NDArray[np.float32]] = []
        self._last_flush = self._last_progress = time.monotonic()
        self._block = 1
        self._steps_since = 0

    def start(self, checkpoint: bytes) -> None:
        """Load the checkpoint, or go on from the last stored frame, or start anew."""
        if checkpoint:
            try:
                self._context.loadCheckpoint(checkpoint)
                return
            except Exception as error:
                self.send("checkpoint_refused", reason=str(error))
                self._frame = self._job.restart_frame
                self._equilibrated = self._job.equilibration_steps if self._frame else 0
        self._context.setPositions(self._positions)
        if self._frame == 0:
            openmm.LocalEnergyMinimizer.minimize(self._context, MINIMIZE_TOLERANCE, MINIMIZE_ITERATIONS)
        self._context.applyConstraints(1e-6)
        self._context.setVelocitiesToTemperature(self._job.temperature_K, self._job.velocity_seed)
        # A kill between the first frames and their checkpoint must find one to go on from.
        self.flush(with_checkpoint=True)

    def run(self) -> None:
        """Equilibrate, then make the frames that are missing."""
        job = self._job
        while self._equilibrated < job.equilibration_steps:
            steps = min(self._block, job.equilibration_steps - self._equilibrated)
            self._step(steps)
            self._equilibrated += steps
            self._flush_if_due()
        while self._frame < job.n_frames:
            done = 0
            while done < job.stride:
                steps = min(self._block, job.stride - done)
                self._step(steps)
                done += steps
            self._take_frame()
            self._flush_if_due()
        self.flush(with_checkpoint=True)
        self.send("progress", steps=self._steps_since)

    def send(self, event: str, **facts: Any) -> None:
        self._connection.send_bytes(json.dumps({"event": event, **facts}).encode())

    def flush(self, *, with_checkpoint: bool) -> None:
        """Send the frames made so far, and the state after them."""
        checkpoint = self._context.createCheckpoint() if with_checkpoint else b""
        self.send(
            "frames",
            n_frames=len(self._buffer),
            frame=self._frame,
            equilibrated=self._equilibrated,
            checkpoint=bool(checkpoint),
        )
        if self._buffer:
            self._connection.send_bytes(np.stack(self._buffer).tobytes())
            self._connection.send_bytes(np.stack(self._boxes).tobytes() if self._boxes else b"-")
        if checkpoint:
            self._connection.send_bytes(checkpoint)
        self._buffer.clear()
        self._boxes.clear()
        self._last_flush = time.monotonic()

    def _step(self, steps: int) -> None:
        start = time.perf_counter()
        self._integrator.step(steps)
        elapsed = time.perf_counter() - start
        # Blocks of about a third of a progress interval; grouping steps does not change the trajectory.
        if elapsed < PROGRESS_SECONDS / 6:
            self._block = min(2 * self._block, 100_000)
        elif elapsed > PROGRESS_SECONDS / 2:
            self._block = max(1, self._block // 2)
        self._steps_since += steps
        if time.monotonic() - self._last_progress >= PROGRESS_SECONDS:
            self.send("progress", steps=self._steps_since)
            self._steps_since = 0
            self._last_progress = time.monotonic()

    def _take_frame(self) -> None:
        state = self._context.getState(getPositions=True, getVelocities=True)
        positions = np.asarray(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        velocities = np.asarray(state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond))
        self._check(positions, velocities)
        job = self._job
        box = np.array([[*v.value_in_unit(unit.nanometer)] for v in state.getPeriodicBoxVectors()])
        stored = positions
        if job.movable:
            stored = wrap_molecules(positions, box, self._molecules) if job.periodic else recentre(positions)
            if not job.periodic and np.linalg.norm(positions.mean(axis=0)) > MAX_DRIFT_NM:
                self._context.setPositions(stored)
        self._buffer.append(stored.astype(np.float32))
        if job.periodic:
            self._boxes.append(box.astype(np.float32))
        self._frame += 1

    def _check(self, positions: NDArray[np.float64], velocities: NDArray[np.float64]) -> None:
        if not (np.isfinite(positions).all() and np.isfinite(velocities).all()):
            raise BlowUp("positions or velocities are NaN")
        temperature = float(np.sum(self._masses[:, None] * velocities**2)) / (self._dof * BOLTZMANN)
        if temperature > MAX_TEMPERATURE_RATIO * self._job.temperature_K:
            raise BlowUp(f"the kinetic temperature reached {temperature:.3g} K at {self._job.temperature_K:g} K")

    def _flush_if_due(self) -> None:
        held = len(self._buffer) * self._positions.size * 4
        if time.monotonic() - self._last_flush >= self._job.checkpoint_seconds or held > MAX_BUFFERED_BYTES:
            self.flush(with_checkpoint=True)


def _number_molecules(context: openmm.Context, n_atoms: int) -> NDArray[np.int64]:
    labels = np.zeros(n_atoms, dtype=np.int64)
    for number, atoms in enumerate(context.getMolecules()):
        labels[list(atoms)] = number
    # wrap_molecules centres on molecule 0: make that the one that holds the first atom.
    first = labels[0]
    if first != 0:
        labels[labels == 0], labels[labels == first] = -1, 0
        labels[labels == -1] = first
    return labels


if __name__ == "__main__":
    main()
