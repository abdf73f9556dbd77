"""Is a potential fit to be simulated? Every way to evaluate it compared, and its symmetries."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
import torch
from numpy.typing import NDArray
from openmm import unit

from openmm_hvpcg.errors import BackendError, InputError, PotentialError
from openmm_hvpcg.frames import check_finite
from openmm_hvpcg.simulation.backends import (
    BACKENDS,
    NETWORK_GROUP,
    clone_script,
    evaluate_script,
    resolve_backend,
)
from openmm_hvpcg.simulation.system import CGPotential, load_any_potential
from openmm_hvpcg.storage import PathLike
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

#: Frames looked at; more would find nothing new and cost time.
MAX_FRAMES = 10
SEED = 20240229
STEP_NM = 2e-6
N_DIRECTIONS = 4

#: float32 resolves 6e-8; sums over some hundred terms that cancel lose up to three digits of it.
FLOAT32_FORCES = "float32 network: 6e-8 times the cancellation in its sums"
FLOAT32_FORCE_TOLERANCE = 1e-4
#: An energy is a sum of terms of up to a hundred times its size; at its tolerance it is good to a hundredth of kT, and
#: what moves the beads are forces.
FLOAT32_ENERGY_TOLERANCE = 1e-4
#: In float64 the error of a central difference is h^2/6 of a third derivative, which is up to 1e6/nm^2 of the force
#: where the radial basis is dense, so 1e-6; plus rounding 1e-16 E/h, 1e-7 kJ/mol/nm.
DIFFERENCE_TOLERANCE = 1e-5
#: float64 resolves 1e-16; positions 3 nm from the origin and sums over some hundred terms that cancel lose six digits.
SYMMETRY_TOLERANCE = 1e-9
#: Both in float64, the torch side with parameters that may have been stored in float32.
PRIOR_TOLERANCE = 1e-6


@dataclass(frozen=True)
class CheckItem:
    """One check: ``value`` must not exceed ``tolerance``, for ``reason``."""

    name: str
    value: float
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.tolerance)


@dataclass(frozen=True)
class PotentialCheck:
    """All checks of one potential."""

    items: tuple[CheckItem, ...]

    @property
    def passed(self) -> bool:
        return all(item.passed for item in self.items)

    def raise_if_failed(self, where: object = None) -> None:
        """Raise :class:`PotentialError` naming every check that failed."""
        failed = [item for item in self.items if not item.passed]
        if failed:
            raise PotentialError(
                "the potential fails: "
                + "; ".join(f"{i.name} {i.value:.3g}, at most {i.tolerance:.3g} ({i.reason})" for i in failed),
                where=where,
            )


def check_potential(
    potential: CGPotential | PathLike,
    positions: NDArray[Any],
    *,
    eager: Callable[[torch.Tensor], torch.Tensor] | None = None,
    backend: str = "auto",
) -> PotentialCheck:
    """Check a potential on test frames of the molecule it is bound to.

    Energies and forces of the script equal those of the eager module and of OpenMM, through every backend, with
    native priors and with torch priors; native priors equal torch priors; forces are minus the gradient of the
    energy (finite differences in float64); the energy does not change when the molecule is moved or turned or when
    like molecules are swapped; copies do not see each other.

    Parameters
    ----------
    potential : or the path of a potential file
    positions : (T, B, 3) nm, at most ten of them are used
    eager : the module that was scripted: positions (K*B, 3) -> energy
    backend : ``auto`` checks every backend that can load; a name, that one

    Returns
    -------
    PotentialCheck
        Deviations relative to the rms force or to the energy scale, with tolerances and their reasons.

    Raises
    ------
    InputError
        The frames do not fit the molecule.
    BackendError
        A backend was asked for by name and cannot load.
    """
    potential = load_any_potential(potential)
    frames = np.asarray(positions, dtype=np.float64)
    n_beads = potential.spec.bead_map.n_beads
    if frames.ndim != 3 or frames.shape[1:] != (n_beads, 3) or len(frames) == 0:
        raise InputError("test frames do not fit the molecule", expected=f"(T, {n_beads}, 3) nm", got=frames.shape)
    check_finite(frames, "test frames")
    frames = frames[np.linspace(0, len(frames) - 1, min(MAX_FRAMES, len(frames))).astype(int)]
    script = clone_script(potential.script)
    script.include_priors = True
    reference = _Reference.compute(script, frames, compute_kt(potential.spec.temperature_K))
    items = [
        CheckItem(
            "energies or forces not finite",
            reference.count_not_finite(),
            0,
            "a simulation needs finite numbers",
        )
    ]
    if items[0].passed:
        if eager is not None:
            items += reference.compare("scripted against eager", *_evaluate_eager(eager, frames))
        double = clone_script(script).double()
        exact = _Reference.compute(double, frames, compute_kt(potential.spec.temperature_K))
        items += _check_gradient(double, frames, exact, reference)
        items += _check_symmetries(double, frames, exact)
        items += _check_openmm(potential, double, frames, exact, reference, _list_backends(backend))
    return PotentialCheck(tuple(items))


@dataclass(frozen=True)
class _Reference:
    """What the script says of each frame, and the scales deviations are measured by."""

    energies: NDArray[np.float64]
    forces: NDArray[np.float64]
    energy_scale: float
    force_scale: float

    @classmethod
    def compute(cls, script: torch.jit.ScriptModule, frames: NDArray[np.float64], kt: float) -> _Reference:
        energies, forces = _stack(evaluate_script(script, frame) for frame in frames)
        return cls(
            energies,
            forces,
            max(kt, float(np.abs(energies).max())),
            float(np.sqrt((forces**2).mean())) or 1.0,
        )

    def count_not_finite(self) -> int:
        return int((~np.isfinite(self.energies)).sum() + (~np.isfinite(self.forces)).sum())

    def compare(self, name: str, energies: NDArray[np.float64], forces: NDArray[np.float64]) -> list[CheckItem]:
        return [
            CheckItem(
                f"{name}: energy",
                _maximum(energies - self.energies) / self.energy_scale,
                FLOAT32_ENERGY_TOLERANCE,
                "float32 network: rounding of a sum over its features and beads",
            ),
            CheckItem(
                f"{name}: forces",
                _maximum(forces - self.forces) / self.force_scale,
                FLOAT32_FORCE_TOLERANCE,
                FLOAT32_FORCES,
            ),
        ]


def _maximum(values: NDArray[np.float64]) -> float:
    """Largest magnitude; infinite if anything is not finite, so that it fails any tolerance."""
    return float(np.abs(values).max()) if np.isfinite(values).all() else float("inf")


def _stack(
    results: Iterable[tuple[float, NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    energies, forces = zip(*results, strict=True)
    return np.array(energies, dtype=np.float64), np.array(forces, dtype=np.float64)


def _evaluate_eager(
    eager: Callable[[torch.Tensor], torch.Tensor], frames: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    def evaluate(frame: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        x = torch.tensor(frame, requires_grad=True)
        energy = eager(x).sum()
        (gradient,) = torch.autograd.grad(energy, x)
        return float(energy.detach()), -gradient.numpy()

    return _stack(evaluate(frame) for frame in frames)


def _check_gradient(
    double: torch.jit.ScriptModule, frames: NDArray[np.float64], exact: _Reference, reference: _Reference
) -> list[CheckItem]:
    """Forces against central differences along random directions, in float64; and float32 against float64."""
    rng = np.random.default_rng(SEED)
    worst, slopes = 0.0, []
    for frame, forces in zip(frames, exact.forces, strict=True):
        for _ in range(N_DIRECTIONS):
            direction = rng.normal(size=frame.shape)
            ends = [float(double(torch.from_numpy(frame + s * STEP_NM * direction)).detach()) for s in (1, -1)]
            slope = float(-(forces * direction).sum())
            slopes.append(slope)
            worst = max(worst, _maximum(np.array((ends[0] - ends[1]) / (2 * STEP_NM) - slope)))
    return [
        CheckItem(
            "forces against finite differences",
            worst / (float(np.sqrt(np.mean(np.square(slopes)))) or 1.0),
            DIFFERENCE_TOLERANCE,
            f"central differences, step {STEP_NM:g} nm, in float64",
        ),
        CheckItem(
            "forces against float64",
            _maximum(reference.forces - exact.forces) / exact.force_scale,
            FLOAT32_FORCE_TOLERANCE,
            FLOAT32_FORCES,
        ),
    ]


def _check_symmetries(
    double: torch.jit.ScriptModule, frames: NDArray[np.float64], exact: _Reference
) -> list[CheckItem]:
    """In float64, where rounding does not hide an energy that depends on what it must not depend on."""
    rng = np.random.default_rng(SEED)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    order = np.roll(np.arange(len(frames)), 1)
    moved, _ = _stack(evaluate_script(double, frame + rng.uniform(-3, 3, size=3)) for frame in frames)
    turned, _ = _stack(evaluate_script(double, frame @ rotation.T) for frame in frames)
    together, forces = evaluate_script(double, frames.reshape(-1, 3))
    swapped, swapped_forces = evaluate_script(double, frames[order].reshape(-1, 3))
    forces, swapped_forces = forces.reshape(frames.shape), swapped_forces.reshape(frames.shape)
    energies, total = exact.energies, float(exact.energies.sum())
    energy_scale = max(1.0, float(np.abs(energies).max()))
    deviations = {
        "translation": (moved - energies) / energy_scale,
        "rotation": (turned - energies) / energy_scale,
        "copies together against one by one: energy": np.array([together - total]) / (energy_scale * len(frames)),
        "copies together against one by one: forces": (forces - exact.forces) / exact.force_scale,
        "permutation of like molecules: energy": np.array([swapped - total]) / (energy_scale * len(frames)),
        "permutation of like molecules: forces": (swapped_forces - forces[order]) / exact.force_scale,
    }
    reason = "in float64: rounding of distances far from the origin, and of sums in another order"
    return [CheckItem(name, _maximum(values), SYMMETRY_TOLERANCE, reason) for name, values in deviations.items()]


def _check_openmm(
    potential: CGPotential,
    double: torch.jit.ScriptModule,
    frames: NDArray[np.float64],
    exact: _Reference,
    reference: _Reference,
    backends: list[str],
) -> list[CheckItem]:
    items = []
    # Each of both once: whose priors it is makes no difference to a backend.
    for backend, priors in ((backends[0], "native"), (backends[-1], "torch")):
        system = potential.createSystem(backend=backend, priors=priors)
        context = _open_context(system)
        items += reference.compare(f"OpenMM {backend}, {priors} priors", *_evaluate(context, frames))
        if priors == "native":
            groups = {force.getForceGroup() for force in system.getForces()} - {NETWORK_GROUP}
            native_energies, native = _evaluate(context, frames, groups)
    double.include_priors = False
    network = _stack(evaluate_script(double, frame) for frame in frames)
    energies, forces = exact.energies - network[0], exact.forces - network[1]
    reason = "both in float64; parameters may have been stored in float32"
    return [
        *items,
        CheckItem(
            "native against torch priors: energy",
            _maximum(native_energies - energies) / reference.energy_scale,
            PRIOR_TOLERANCE,
            reason,
        ),
        CheckItem(
            "native against torch priors: forces",
            _maximum(native - forces) / reference.force_scale,
            PRIOR_TOLERANCE,
            reason,
        ),
    ]


def _list_backends(backend: str) -> list[str]:
    if backend != "auto":
        return [resolve_backend(backend)]
    found = []
    for name in BACKENDS:
        try:
            found.append(resolve_backend(name))
        except BackendError as error:
            logger.warning("%s is not checked: %s", name, error)
    return found


def _open_context(system: openmm.System) -> openmm.Context:
    return openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))


def evaluate_system(
    system: openmm.System, frames: NDArray[np.float64], groups: set[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energies (T,) kJ/mol and forces (T, N, 3) of frames (T, N, 3) nm, on the Reference platform.

    ``groups`` restricts it to some force groups.
    """
    return _evaluate(_open_context(system), frames, groups)


def _evaluate(
    context: openmm.Context, frames: NDArray[np.float64], groups: set[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    wanted: dict[str, Any] = {} if groups is None else {"groups": sum(1 << g for g in groups)}

    def evaluate(frame: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        context.setPositions(frame)
        state = context.getState(energy=True, forces=True, **wanted)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        return state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole), np.array(forces)

    return _stack(evaluate(frame) for frame in frames)
