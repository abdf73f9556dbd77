"""Which OpenMM platform: measured on the very system it will run, never assumed."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.errors import BackendError

logger = logging.getLogger(__name__)

GPU_PLATFORMS = ("CUDA", "OpenCL", "HIP")
Purpose = Literal["dynamics", "labels"]

#: Labels: relative rms deviation of forces from the Reference platform's that is still taken. Platforms of
#: single precision are at 1e-6 to 1e-5; ten times more is another model (cutoffs, PME), not rounding.
LABEL_FORCE_TOLERANCE = 1e-4

#: Above this many particles one Reference force call takes seconds: it is neither measured nor compared with.
REFERENCE_MAX_PARTICLES = 5000

#: Time given to each platform, s, in so many turns of so many batches of calls. The fastest batch counts, and platforms
#: take turns: what else the machine does can only slow a batch down, and should not slow one platform alone.
MEASURE_SECONDS = 0.3
MEASURE_TURNS = 3
MEASURE_BATCHES = 4


@dataclass(frozen=True)
class PlatformChoice:
    """A platform and how to open it.

    Attributes
    ----------
    name, properties : arguments of openmm.Context
    calls_per_second : measured for each platform; MD steps for dynamics, force calls for labels
    reason : one line: what was measured and chosen
    """

    name: str
    properties: dict[str, str] = field(default_factory=dict)
    calls_per_second: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def make_context(self, system: openmm.System, integrator: openmm.Integrator) -> openmm.Context:
        """Open a Context on this platform; raises :class:`BackendError` if it cannot be."""
        return _open(self.name, self.properties, system, integrator)


@dataclass(frozen=True)
class PlatformInfo:
    """A platform OpenMM knows here: its relative speed by OpenMM's own guess, and whether it runs."""

    name: str
    speed: float
    works: bool
    problem: str = ""


def list_platforms() -> list[PlatformInfo]:
    """Try every platform with a one-particle system. Plugins that failed to load follow, with the reason."""
    found = []
    for index in range(openmm.Platform.getNumPlatforms()):
        platform = openmm.Platform.getPlatform(index)
        system = openmm.System()
        system.addParticle(1.0)
        problem = ""
        try:
            context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
            context.setPositions(np.zeros((1, 3)))
            context.getState(getForces=True)
        except Exception as error:
            problem = " ".join(str(error).split())
        found.append(PlatformInfo(platform.getName(), platform.getSpeed(), not problem, problem))
    failures = openmm.Platform.getPluginLoadFailures()
    return found + [PlatformInfo("plugin", 0.0, False, " ".join(str(f).split())) for f in failures]


def choose_platform(
    system: openmm.System,
    positions: NDArray[np.floating],
    *,
    platform: str = "auto",
    precision: str = "auto",
    purpose: Purpose,
    box: NDArray[np.floating] | None = None,
    threads: int | None = None,
) -> PlatformChoice:
    """Choose the platform for a stage.

    ``auto`` runs every platform that is present on this system for a moment and takes the fastest one that is
    precise enough: for labels its forces must agree with the Reference platform's (double precision)
    within ``LABEL_FORCE_TOLERANCE``. One line in the log says what was measured and chosen.

    Parameters
    ----------
    system, positions : what will be run; (A, 3) nm
    platform : "auto" or a name
    precision : "auto" (GPU: mixed), "single", "mixed" or "double" (Reference, or a GPU)
    purpose : "dynamics" is measured in MD steps, "labels" in force calls with new positions
    box : (3, 3) nm, else the System's default box
    threads : threads of the CPU platform, else all cores

    Raises
    ------
    BackendError
        The platform is not here, does not run, or lacks the precision.
    """
    present = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if platform != "auto":
        named = {name.lower(): name for name in present}.get(platform.lower())
        if named is None:
            raise BackendError(f"no platform {platform!r}", expected=f"auto or one of {', '.join(present)}")
        if named == "CPU" and precision == "double":
            raise BackendError("the CPU platform has no double precision", hint="use Reference, or a GPU platform")
        return PlatformChoice(named, _properties(named, precision, threads), {}, f"{named}, as asked")
    probe = _Probe(system, np.asarray(positions, dtype=np.float64), box, purpose)
    rates: dict[str, float] = {}
    properties: dict[str, dict[str, str]] = {}
    notes = []
    reference = None
    # Reference comes first: its forces are what the others are compared with.
    for name in sorted(present, key=lambda n: n != "Reference"):
        if name == "Reference" and system.getNumParticles() > REFERENCE_MAX_PARTICLES:
            notes.append(f"Reference not tried above {REFERENCE_MAX_PARTICLES} particles")
            continue
        if name == "CPU" and precision == "double":
            notes.append("CPU left out: no double precision")
            continue
        properties[name] = _properties(name, precision, threads)
        try:
            rate, forces = probe.measure(name, properties[name])
        except (BackendError, openmm.OpenMMException) as error:
            notes.append(f"{name} left out: {' '.join(str(error).split())}")
            continue
        if name == "Reference":
            reference = forces
        elif purpose == "labels" and reference is not None:
            deviation = _relative_rms(forces, reference)
            if not deviation <= LABEL_FORCE_TOLERANCE:
                notes.append(f"{name} left out: forces off by {deviation:.1e}")
                continue
        rates[name] = rate
    for name in list(rates) * (MEASURE_TURNS - 1 if len(rates) > 1 else 0):
        rates[name] = max(rates[name], probe.measure(name, properties[name])[0])
    if not rates:
        raise BackendError("no platform can run this system", got="; ".join(notes))
    best = max(rates, key=rates.__getitem__)
    what = "steps/s" if purpose == "dynamics" else "force calls/s"
    measured = ", ".join(f"{name} {rate:,.0f}" for name, rate in sorted(rates.items(), key=lambda r: -r[1]))
    reason = f"{best} for {purpose}: {measured} {what}" + "".join(f"; {note}" for note in notes)
    logger.info("platform %s", reason)
    return PlatformChoice(best, properties[best], rates, reason)


def read_forces(context: openmm.Context, forces: NDArray[np.float64]) -> None:
    """Compute the forces of a Context, kJ/mol/nm, into a contiguous array (A, 3).

    What ``getForces(asNumpy=True)`` does, less the units, which cost a small molecule a third of the call.
    """
    context.getState(getForces=True)._getVectorAsNumpy(openmm.State.Forces, forces)


class _Probe:
    """Runs one system on one platform after another."""

    def __init__(
        self,
        system: openmm.System,
        positions: NDArray[np.float64],
        box: NDArray[np.floating] | None,
        purpose: Purpose,
    ) -> None:
        self._system = system
        self._positions = positions
        self._box = box
        self._purpose = purpose
        self._opened: dict[str, tuple[openmm.Context, openmm.Integrator, int]] = {}

    def measure(self, name: str, properties: dict[str, str]) -> tuple[float, NDArray[np.float64]]:
        """Calls per second of one turn, and the forces (A, 3) in kJ/mol/nm."""
        forces = np.empty(self._positions.shape)
        if name not in self._opened:
            self._open(name, properties)
        context, integrator, batch = self._opened[name]
        context.setPositions(self._positions)
        read_forces(context, forces)
        rate, turn_s = 0.0, MEASURE_SECONDS / MEASURE_TURNS
        end = time.perf_counter() + turn_s
        while (start := time.perf_counter()) < end:
            self._run(context, integrator, batch)
            rate = max(rate, batch / (time.perf_counter() - start))
            batch = max(1, int(rate * turn_s / MEASURE_BATCHES))
        self._opened[name] = context, integrator, batch
        return rate, forces

    def _open(self, name: str, properties: dict[str, str]) -> None:
        # So short a step leaves the positions where they are, whatever the forces.
        integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 1e-9)
        context = _open(name, properties, self._system, integrator)
        if self._box is not None:
            context.setPeriodicBoxVectors(*np.asarray(self._box, dtype=np.float64))
        context.setPositions(self._positions)
        self._run(context, integrator, 1)
        self._opened[name] = context, integrator, 1

    def _run(self, context: openmm.Context, integrator: openmm.Integrator, calls: int) -> None:
        if self._purpose == "dynamics":
            integrator.step(calls)
            context.getState(getVelocities=True)  # waits for the device
            return
        forces = np.empty(self._positions.shape)
        for _ in range(calls):
            context.setPositions(self._positions)
            read_forces(context, forces)


def _open(
    name: str, properties: dict[str, str], system: openmm.System, integrator: openmm.Integrator
) -> openmm.Context:
    try:
        return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(name), properties)
    except Exception as error:
        raise BackendError(f"platform {name} cannot run this system ({error})") from error


def _properties(name: str, precision: str, threads: int | None) -> dict[str, str]:
    if name in GPU_PLATFORMS:
        return {"Precision": "mixed" if precision == "auto" else precision}
    if name == "CPU" and threads is not None:
        return {"Threads": str(max(1, threads))}
    return {}


def _relative_rms(forces: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    scale = float(np.sqrt(np.mean(reference**2)))
    deviation = float(np.sqrt(np.mean((forces - reference) ** 2)))
    return deviation / scale if scale > 0 else deviation
