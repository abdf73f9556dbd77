"""The doctor sees what is off and says what to do about it."""

from __future__ import annotations

import importlib.metadata
import io
import subprocess

import pytest
import torch
from rich.console import Console

from openmm_hvpcg import doctor
from openmm_hvpcg.doctor import DoctorCheck, DoctorReport, probe_backend, render, run_doctor, run_probe
from openmm_hvpcg.errors import BackendError


def find(report: DoctorReport, name: str) -> DoctorCheck:
    return next(check for check in report.checks if check.name == name)


def test_this_machine_can_run() -> None:
    """The packages the tests run with are those the package asks for, so both backends must work."""
    report = run_doctor()
    assert report.production_ok
    for name in ("TorchForce on Reference", "PythonForce", "python", *doctor.PACKAGES):
        assert find(report, name).ok, find(report, name)
    assert "Reference" in find(report, "OpenMM platforms").value
    assert all(check.advice for check in report.checks if not check.ok)
    # Plugins that failed are reported with their cause, never those of openmmtorch, which TorchForce judges.
    assert not any("OpenMMTorch" in check.name for check in report.checks)


def test_report_is_readable() -> None:
    console = Console(file=io.StringIO(), width=200)
    render(DoctorReport((DoctorCheck("torch", False, "2.10.0", "pip install 'torch<2.10'"),), False), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("off", "torch", "2.10.0", "pip install 'torch<2.10'", "production cannot run here"):
        assert part in text


@pytest.mark.parametrize("backend", ["torchforce", "pythonforce"])
def test_probe_passes(backend: str) -> None:
    assert probe_backend(backend, "Reference") is None


def test_probe_reports_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = doctor.build_network_force

    class Stiffer(torch.nn.Module):
        def forward(self, positions: torch.Tensor) -> torch.Tensor:
            stretch = torch.linalg.vector_norm(positions[1:] - positions[:-1], dim=-1) - 0.3
            return (500.1 * stretch**2 + 2000.0 * stretch**4).sum()

    monkeypatch.setattr(
        doctor, "build_network_force", lambda script, backend: genuine(torch.jit.script(Stiffer()), backend)
    )
    problem = probe_backend("pythonforce", "Reference")
    assert problem is not None
    assert "forces off by" in problem


def test_probe_reports_what_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(script: object, backend: str) -> None:
        raise BackendError("openmmtorch cannot load (libtorch_cuda.so)")

    monkeypatch.setattr(doctor, "build_network_force", fail)
    assert "libtorch_cuda" in str(probe_backend("torchforce", "Reference"))


def test_probe_reports_a_missing_platform() -> None:
    assert "no such OpenMM platform" in str(probe_backend("pythonforce", "Quantum"))


def test_a_crash_is_reported_not_suffered() -> None:
    problem = run_probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert problem is not None
    assert "crashed (signal 11)" in problem
    assert run_probe("raise ImportError('no libtorch')") == "ImportError: no libtorch"
    assert run_probe("import sys; sys.stdout.write('chatter\\nnull')") is None


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deeptime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.10.0" if name == "torch" else genuine(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = {check.name: check for check in doctor.check_versions()}
    assert not checks["torch"].ok
    assert "2.10" in checks["torch"].value
    assert "pip install 'torch<2.10,>=2.9'" in checks["torch"].advice
    assert checks["deeptime"].value == "not installed"
    assert checks["openmm"].ok


def test_torchforce_alone_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TorchForce production runs on PythonForce; with neither, or with a wrong torch, it does not."""
    monkeypatch.setattr(doctor, "run_probe", lambda code: "crashed (signal 11)")
    report = run_doctor()
    assert report.production_ok
    assert find(report, "TorchForce on Reference").advice
    monkeypatch.setattr(doctor, "probe_backend", lambda backend, platform: "forces off by 1.0e-01")
    assert not run_doctor().production_ok
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "run_probe", lambda code: None)
    monkeypatch.setattr(doctor, "check_versions", lambda: [DoctorCheck("torch", False, "2.10.0", "pip")])
    assert not run_doctor().production_ok


def test_gpu_without_cuda_platform_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA H100, 550.1\n", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    gpu = doctor._ask_nvidia_smi()
    assert gpu == "NVIDIA H100, 550.1"
    check = doctor._check_gpu(["Reference", "CPU"], gpu)
    assert not check.ok
    assert "openmm-hvpcg[cuda12]" in check.advice
    assert doctor._check_gpu(["Reference", "CUDA"], gpu).ok
    assert doctor._check_gpu(["Reference"], None).value == "NVIDIA H100"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch does not see it" in doctor._check_gpu(["Reference", "CUDA"], gpu).advice
    assert doctor._check_gpu(["Reference"], None).value.startswith("none")
