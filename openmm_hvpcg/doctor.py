"""Can production run here? Versions, OpenMM platforms, backends and GPU, each with one line of advice.

Both backends are really run: energy, forces and one integration step of a small module against the module
itself. TorchForce runs in a process of its own, so that a crash of a badly matched library is reported, not
suffered.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform as host
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import unit
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from openmm_hvpcg.errors import HVPCGError
from openmm_hvpcg.simulation.backends import build_network_force, create_context, list_platforms

PACKAGES = ("openmm", "openmmtorch", "torch", "lightning", "zarr", "mdtraj", "deeptime", "numpy")
#: The one package that production can do without: PythonForce serves then.
OPTIONAL = ("openmmtorch",)
PROBE_TIMEOUT_S = 180
#: The module is in float64 and OpenMM's Reference platform too; other platforms add in float32.
PROBE_TOLERANCE = {"Reference": 1e-9}
PROBE_TOLERANCE_OTHER = 1e-4
GPU_PLATFORMS = ("CUDA", "HIP", "OpenCL")


@dataclass(frozen=True)
class DoctorCheck:
    """One finding; ``advice`` is empty where all is well."""

    name: str
    ok: bool
    value: str
    advice: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All findings. ``production_ok``: the versions fit and at least one backend gives the right numbers."""

    checks: tuple[DoctorCheck, ...]
    production_ok: bool


class _Spring(torch.nn.Module):
    """Springs between neighbours with a quartic term: the eager model that backends are measured by."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        stretch = torch.linalg.vector_norm(positions[1:] - positions[:-1], dim=-1) - 0.3
        return (500.0 * stretch**2 + 2000.0 * stretch**4).sum()


def run_doctor() -> DoctorReport:
    """Look at everything; takes some ten seconds, changes nothing."""
    versions = check_versions()
    platforms, gpu = list_platforms(), _ask_nvidia_smi()
    backends = [_check_torchforce(name) for name in ("Reference", *(p for p in GPU_PLATFORMS if p in platforms))]
    backends.append(_as_check("PythonForce", probe_backend("pythonforce", "Reference"), "reinstall openmm>=8.6,<8.7"))
    production_ok = any(check.ok for check in backends) and all(
        check.ok for check in versions if check.name not in OPTIONAL
    )
    return DoctorReport(
        (*versions, *_check_platforms(platforms, gpu), *backends, _check_gpu(platforms, gpu)), production_ok
    )


def render(report: DoctorReport, console: Console) -> None:
    """Print a report as a table, and the verdict."""
    table = Table("", "what", "found", "what to do", show_lines=False)
    for check in report.checks:
        table.add_row("[green]ok[/]" if check.ok else "[red]off[/]", check.name, check.value, check.advice)
    console.print(table)
    console.print("[green]production can run here[/]" if report.production_ok else "[red]production cannot run here[/]")


def check_versions() -> list[DoctorCheck]:
    """Python and the packages that must fit together, against this package's own requirements."""
    try:
        metadata = importlib.metadata.metadata("openmm-hvpcg")
        texts = importlib.metadata.requires("openmm-hvpcg") or []
    except importlib.metadata.PackageNotFoundError:
        return [DoctorCheck("openmm-hvpcg", False, "not installed", "pip install openmm-hvpcg, or make install")]
    wanted = {r.name.lower(): r.specifier for r in map(Requirement, texts) if r.marker is None}
    return [
        _compare_version("python", host.python_version(), SpecifierSet(metadata["Requires-Python"] or "")),
        *(_check_package(name, wanted.get(name, SpecifierSet())) for name in PACKAGES),
    ]


def _check_package(name: str, wanted: SpecifierSet) -> DoctorCheck:
    try:
        return _compare_version(name, importlib.metadata.version(name), wanted)
    except importlib.metadata.PackageNotFoundError:
        return DoctorCheck(name, False, "not installed", f"pip install '{name}{wanted}'")


def _compare_version(name: str, found: str, wanted: SpecifierSet) -> DoctorCheck:
    if wanted.contains(found, prereleases=True):
        return DoctorCheck(name, True, found)
    what = f"use Python {wanted}" if name == "python" else f"pip install '{name}{wanted}'"
    return DoctorCheck(name, False, found, what)


def _check_platforms(platforms: list[str], gpu: str | None) -> list[DoctorCheck]:
    """The platforms found, and why plugins did not load, plugins of one cause together.

    openmmtorch's own plugins are judged by running TorchForce. Those for GPUs are missed where one idles.
    """
    advice = "" if platforms else "reinstall openmm"
    checks = [DoctorCheck("OpenMM platforms", bool(platforms), ", ".join(platforms), advice)]
    causes: dict[str, list[str]] = {}
    for failure in openmm.Platform.getPluginLoadFailures():
        path, _, cause = " ".join(failure.split()).removeprefix("Error loading library ").partition(": ")
        name = Path(path).stem.removeprefix("lib")
        if "OpenMMTorch" not in name:
            causes.setdefault(cause, []).append(name)
    for cause, names in causes.items():
        for_gpus = all(any(kind in name for kind in GPU_PLATFORMS) for name in names)
        spare = for_gpus and (gpu is None or "CUDA" in platforms)
        advice = "needed on a GPU only" if spare else "install the library or driver it misses"
        checks.append(DoctorCheck(f"plugins {', '.join(names)}", spare, f"not loaded: {cause}", advice))
    return checks


def probe_backend(backend: str, platform: str) -> str | None:
    """Energy, forces and one step of OpenMM against the eager module; None if right, else what is wrong."""
    rng = np.random.default_rng(7)
    start = np.cumsum(rng.normal(0.3, 0.05, size=(5, 3)), axis=0)
    x = torch.tensor(start, requires_grad=True)
    energy = _Spring()(x)
    (gradient,) = torch.autograd.grad(energy, x)
    forces, mass, step = -gradient.numpy(), 12.0, 0.002
    try:
        system = openmm.System()
        for _ in start:
            system.addParticle(mass)
        system.addForce(build_network_force(torch.jit.script(_Spring()), backend))
        context = create_context(system, openmm.VerletIntegrator(step), platform)
        context.setPositions(start)
        state = context.getState(energy=True, forces=True)
        found = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        context.getIntegrator().step(1)
        moved = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    except (HVPCGError, openmm.OpenMMException, RuntimeError) as error:
        return str(error)
    # Leapfrog from rest: the first step moves each particle by F dt^2 / m.
    expected = start + forces * step**2 / mass
    tolerance = PROBE_TOLERANCE.get(platform, PROBE_TOLERANCE_OTHER)
    found_energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    errors = {
        "energy": abs(found_energy - float(energy.detach())) / abs(float(energy.detach())),
        "forces": float(np.abs(found - forces).max() / np.abs(forces).max()),
        "one step": float(np.abs(moved - expected).max() / np.abs(expected).max()),
    }
    wrong = [f"{name} off by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    return ", ".join(wrong) or None


def _check_torchforce(platform: str) -> DoctorCheck:
    code = (
        "import json, sys; from openmm_hvpcg.doctor import probe_backend; "
        f"sys.stdout.write('\\n' + json.dumps(probe_backend('torchforce', {platform!r})))"
    )
    return _as_check(f"TorchForce on {platform}", run_probe(code), _advise_torchforce())


def run_probe(code: str) -> str | None:
    """Run Python code in a process of its own; its last line is JSON: null, or what is wrong."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"did not finish in {PROBE_TIMEOUT_S} s"
    if done.returncode < 0:
        return f"crashed (signal {-done.returncode}): the libraries do not fit together"
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"failed with status {done.returncode}"
    verdict = json.loads(done.stdout.splitlines()[-1])
    return None if verdict is None else str(verdict)


def _as_check(name: str, problem: str | None, advice: str) -> DoctorCheck:
    if problem is None:
        return DoctorCheck(name, True, "runs, equals the eager model")
    return DoctorCheck(name, False, problem, advice)


def _advise_torchforce() -> str:
    if torch.version.cuda is None:
        return "it needs the plain torch wheel, not +cpu: pip install --force-reinstall 'torch>=2.9,<2.10'"
    return "pip install 'torch>=2.9,<2.10' 'openmmtorch>=1.5,<1.6' 'openmm>=8.6,<8.7'; PythonForce serves too"


def _check_gpu(platforms: list[str], gpu: str | None) -> DoctorCheck:
    """The GPU that the driver shows, and whether torch and OpenMM can use it."""
    if gpu is None:
        seen = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: runs on the CPU"
        return DoctorCheck("GPU", True, seen)
    problems = []
    if "CUDA" not in platforms:
        problems.append("pip install openmm-hvpcg[cuda12] (driver of CUDA 13: [cuda13])")
    if not torch.cuda.is_available():
        problems.append("torch does not see it: check that the driver is as new as torch's CUDA")
    return DoctorCheck("GPU", not problems, gpu, "; ".join(problems))


def _ask_nvidia_smi() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return "; ".join(lines) if done.returncode == 0 and lines else None
