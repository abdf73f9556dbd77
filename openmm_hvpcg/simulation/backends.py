"""What evaluates the network in OpenMM, and on which platform: TorchForce or PythonForce, chosen by trying.

This is the only module that imports openmmtorch, and it does so when asked: torch first, because openmmtorch
links against torch's libraries.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import unit

from openmm_hvpcg.errors import BackendError
from openmm_hvpcg.potential import forget_pairs

logger = logging.getLogger(__name__)

BACKENDS = ("torchforce", "pythonforce")
NETWORK_NAME = "network"
NETWORK_GROUP = 1

#: Seconds of integration by which one platform is judged.
MEASURE_SECONDS = 0.4


def import_openmmtorch() -> Any:
    """The openmmtorch module.

    Raises
    ------
    BackendError
        It is not installed or cannot load beside the torch that is.
    """
    try:
        with _without_root_log():
            import openmmtorch
    except (ImportError, OSError) as error:
        raise BackendError(
            f"openmmtorch cannot load ({str(error).splitlines()[0]})",
            got=f"torch {torch.__version__}, OpenMM {openmm.Platform.getOpenMMVersion()}",
            hint="install torch>=2.9,<2.10 from the plain registry (not +cpu) with openmmtorch 1.5, or use "
            "backend=pythonforce; `openmm-hvpcg doctor` says more",
        ) from error
    _load_late_plugins()
    return openmmtorch


@contextlib.contextmanager
def _without_root_log() -> Iterator[None]:
    """Hide what is logged on the root logger: openmmtorch 1.5 imports simtk.openmm, which warns there."""
    root = logging.getLogger()
    root.addFilter(_refuse)
    try:
        yield
    finally:
        root.removeFilter(_refuse)


def _refuse(_: logging.LogRecord) -> bool:
    return False


@functools.cache
def _load_late_plugins() -> None:
    """Load the plugins of openmmtorch that failed because OpenMM was imported before torch.

    OpenMM loads its plugins when it is imported, and they find torch's CUDA libraries only once torch has
    loaded them.
    """
    for failure in openmm.Platform.getPluginLoadFailures():
        path = failure.removeprefix("Error loading library ").split(": ")[0]
        if "OpenMMTorch" in Path(path).name:
            try:
                openmm.Platform.loadPluginLibrary(path)
            except openmm.OpenMMException as error:
                logger.debug("plugin %s does not load: %s", path, error)


def clone_script(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """An independent copy of a script, on the CPU."""
    return load_script(dump_script(script))


def dump_script(script: torch.jit.ScriptModule) -> bytes:
    """A script as the bytes of a TorchScript file, the same ones whatever it was last called with."""
    forget_pairs(script)
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    return buffer.getvalue()


def load_script(content: bytes) -> torch.jit.ScriptModule:
    """Inverse of :func:`dump_script`, ready to evaluate."""
    return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()


def evaluate_script(script: torch.jit.ScriptModule, positions: NDArray[Any]) -> tuple[float, NDArray[np.float64]]:
    """Energy kJ/mol and forces (N, 3) kJ/mol/nm of positions (N, 3) nm, those the script gives, or its gradient."""
    x = torch.tensor(np.asarray(positions, dtype=np.float64), requires_grad=True)
    if getattr(script, "outputs_forces", False):
        energy, given = script(x.detach())
        return float(energy), given.numpy()
    energy = script(x)
    # A term without any dependence on the positions (an empty prior, say) has no gradient.
    (gradient,) = torch.autograd.grad(energy, x, allow_unused=True) if energy.requires_grad else (None,)
    forces = np.zeros(x.shape) if gradient is None else -gradient.numpy()
    return float(energy.detach()), forces


class ScriptForce:
    """The computation of an ``openmm.PythonForce``: a script evaluated by torch.

    OpenMM serializes a PythonForce by pickling its computation; the script travels as TorchScript bytes.
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        self.script = script

    def __call__(self, state: openmm.State) -> tuple[float, NDArray[np.float64]]:
        return evaluate_script(self.script, state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))

    def __getstate__(self) -> dict[str, bytes]:
        return {"script": dump_script(self.script)}

    def __setstate__(self, state: dict[str, bytes]) -> None:
        self.script = load_script(state["script"])


def resolve_backend(backend: str) -> str:
    """``torchforce`` or ``pythonforce``: what ``backend`` (which may be ``auto``) means on this machine.

    Raises
    ------
    BackendError
        No such backend, or TorchForce was asked for by name and cannot load.
    """
    if backend == "auto":
        try:
            import_openmmtorch()
        except BackendError as error:
            logger.warning("TorchForce is not available, PythonForce serves instead: %s", error)
            return "pythonforce"
        return "torchforce"
    if backend not in BACKENDS:
        raise BackendError("no such backend", expected=f"auto, {' or '.join(BACKENDS)}", got=repr(backend))
    if backend == "torchforce":
        import_openmmtorch()
    return backend


def build_network_force(script: torch.jit.ScriptModule, backend: str = "auto") -> openmm.Force:
    """The OpenMM force that evaluates ``script`` (positions (N, 3) nm -> energy kJ/mol) on all particles.

    Parameters
    ----------
    script : is kept, not copied; one that knows its forces is made to return them
    backend : ``torchforce``, ``pythonforce``, or ``auto``: the first that can load

    Raises
    ------
    BackendError
        See :func:`resolve_backend`.
    """
    # TorchForce calls backward(), which would compute and pile up a gradient for every weight.
    for parameter in script.parameters():
        parameter.requires_grad_(False)
    knows_forces = hasattr(script, "outputs_forces")
    if knows_forces:
        script.outputs_forces = True
    if resolve_backend(backend) == "torchforce":
        force = import_openmmtorch().TorchForce(script)
        force.setOutputsForces(knows_forces)
    else:
        force = openmm.PythonForce(ScriptForce(script))
    force.setForceGroup(NETWORK_GROUP)
    force.setName(NETWORK_NAME)
    return force


@dataclass(frozen=True)
class PlatformChoice:
    """A platform, and the steps per second measured on each candidate (empty where nothing was measured)."""

    name: str
    steps_per_second: dict[str, float]


def list_platforms() -> list[str]:
    """Names of the OpenMM platforms present."""
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def platform_properties(name: str) -> dict[str, str]:
    """Mixed precision where a platform offers a choice: single precision heats a thermostatted CG system."""
    names = openmm.Platform.getPlatformByName(name).getPropertyNames()
    return {"Precision": "mixed"} if "Precision" in names else {}


def find_platform(name: str) -> openmm.Platform:
    """The OpenMM platform of that name, or a :class:`BackendError` that lists those there are."""
    if name not in list_platforms():
        raise BackendError(
            "no such OpenMM platform here",
            expected=f"one of {', '.join(list_platforms())}",
            got=name,
            hint="`openmm-hvpcg doctor` says what to install",
        )
    return openmm.Platform.getPlatformByName(name)


def create_context(system: openmm.System, integrator: openmm.Integrator, platform: str) -> openmm.Context:
    """A Context on the named platform.

    Raises
    ------
    BackendError
        The platform is not there, or cannot run this System.
    """
    chosen = find_platform(platform)
    try:
        return openmm.Context(system, integrator, chosen, platform_properties(platform))
    except openmm.OpenMMException as error:
        raise BackendError(f"platform {platform} cannot run this system ({error})") from error


def choose_platform(
    system: openmm.System, positions: NDArray[Any], platform: str, timestep_ps: float, temperature_K: float
) -> PlatformChoice:
    """The platform to run ``system`` on: the named one, or for ``auto`` the fastest, measured for a moment.

    Parameters
    ----------
    positions : (N, 3) nm
    """
    if platform != "auto":
        return PlatformChoice(platform, {})
    speeds: dict[str, float] = {}
    for name in list_platforms():
        try:
            speeds[name] = _measure_speed(system, positions, name, timestep_ps, temperature_K)
        except (BackendError, openmm.OpenMMException) as error:
            logger.warning("platform %s is left out: %s", name, error)
    if not speeds:
        raise BackendError("no OpenMM platform can run this system", hint="`openmm-hvpcg doctor` says what is off")
    best = max(speeds, key=lambda name: speeds[name])
    logger.info(
        "platform %s: measured %s",
        best,
        ", ".join(f"{name} {speed:.0f} steps/s" for name, speed in speeds.items()),
    )
    return PlatformChoice(best, speeds)


def _measure_speed(
    system: openmm.System, positions: NDArray[Any], platform: str, timestep_ps: float, temperature_K: float
) -> float:
    integrator = openmm.LangevinMiddleIntegrator(temperature_K, 1.0, timestep_ps)
    context = create_context(system, integrator, platform)
    context.setPositions(positions)
    # TorchScript optimises itself during its first calls.
    integrator.step(5)
    start, steps = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < MEASURE_SECONDS:
        integrator.step(2)
        steps += 2
    return steps / elapsed
