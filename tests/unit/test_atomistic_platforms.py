"""Platforms are chosen by measuring."""

from __future__ import annotations

import logging

import numpy as np
import openmm
import pytest

from openmm_hvpcg.atomistic import platforms
from openmm_hvpcg.atomistic.platforms import LABEL_FORCE_TOLERANCE, choose_platform, list_platforms
from openmm_hvpcg.errors import BackendError


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "MEASURE_SECONDS", 0.05)


@pytest.fixture
def chain() -> tuple[openmm.System, np.ndarray]:
    """Twelve charged particles in a row, joined by springs."""
    system = openmm.System()
    bonds, nonbonded = openmm.HarmonicBondForce(), openmm.NonbondedForce()
    for i in range(12):
        system.addParticle(12.0)
        nonbonded.addParticle(0.3 * (-1) ** i, 0.3, 0.4)
        if i:
            bonds.addBond(i - 1, i, 0.15, 1e5)
            nonbonded.addException(i - 1, i, 0.0, 0.3, 0.0)
    system.addForce(bonds)
    system.addForce(nonbonded)
    rng = np.random.default_rng(0)
    return system, np.arange(12)[:, None] * [0.16, 0, 0] + rng.normal(scale=0.005, size=(12, 3))


@pytest.mark.parametrize("purpose", ["dynamics", "labels"])
def test_auto_takes_the_fastest_and_says_so(
    chain: tuple[openmm.System, np.ndarray], purpose: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        choice = choose_platform(*chain, purpose=purpose, threads=1)  # type: ignore[arg-type]
    assert {"Reference", "CPU"} <= set(choice.calls_per_second)
    assert choice.calls_per_second[choice.name] == max(choice.calls_per_second.values())
    assert choice.reason in caplog.text
    assert len([r for r in caplog.records if "platform" in r.message]) == 1
    assert choice.make_context(chain[0], openmm.VerletIntegrator(0.001)).getPlatform().getName() == choice.name


def test_measuring_does_not_move_anything(chain: tuple[openmm.System, np.ndarray]) -> None:
    before = chain[1].copy()
    choose_platform(*chain, purpose="dynamics")
    np.testing.assert_array_equal(chain[1], before)


def test_labels_leave_out_platforms_with_other_forces(
    chain: tuple[openmm.System, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    true_measure = platforms._Probe.measure

    def measure(self: platforms._Probe, name: str, properties: dict[str, str]) -> tuple[float, np.ndarray]:
        rate, forces = true_measure(self, name, properties)
        return (1e9, forces * (1 + 3 * LABEL_FORCE_TOLERANCE)) if name == "CPU" else (rate, forces)

    monkeypatch.setattr(platforms._Probe, "measure", measure)
    labels = choose_platform(*chain, purpose="labels")
    assert labels.name == "Reference"
    assert "CPU left out: forces off by 3.0e-04" in labels.reason
    assert choose_platform(*chain, purpose="dynamics").name == "CPU"


def test_cpu_forces_are_precise_enough_for_labels(chain: tuple[openmm.System, np.ndarray]) -> None:
    assert "left out" not in choose_platform(*chain, purpose="labels").reason


def test_reference_is_skipped_on_big_systems(
    chain: tuple[openmm.System, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "REFERENCE_MAX_PARTICLES", 11)
    choice = choose_platform(*chain, purpose="labels")
    assert "Reference" not in choice.calls_per_second
    assert "Reference not tried" in choice.reason


def test_double_precision_leaves_the_cpu_platform_out(chain: tuple[openmm.System, np.ndarray]) -> None:
    choice = choose_platform(*chain, purpose="labels", precision="double")
    assert "CPU" not in choice.calls_per_second
    with pytest.raises(BackendError, match="no double precision"):
        choose_platform(*chain, purpose="labels", precision="double", platform="CPU")


def test_named_platform_and_threads(chain: tuple[openmm.System, np.ndarray]) -> None:
    choice = choose_platform(*chain, purpose="dynamics", platform="cpu", threads=3)
    assert (choice.name, choice.properties, choice.calls_per_second) == ("CPU", {"Threads": "3"}, {})


def test_gpu_properties() -> None:
    assert platforms._properties("CUDA", "auto", 2) == {"Precision": "mixed"}
    assert platforms._properties("OpenCL", "double", None) == {"Precision": "double"}


def test_platform_that_is_not_here(chain: tuple[openmm.System, np.ndarray]) -> None:
    with pytest.raises(BackendError, match=r"no platform 'Metal': expected auto or one of Reference, CPU"):
        choose_platform(*chain, purpose="labels", platform="Metal")


def test_system_no_platform_can_run(chain: tuple[openmm.System, np.ndarray]) -> None:
    bad = openmm.CustomExternalForce("no_such_function(x)")
    chain[0].addForce(bad)
    with pytest.raises(BackendError, match="no platform can run this system"):
        choose_platform(*chain, purpose="dynamics")


def test_list_platforms() -> None:
    found = {p.name: p for p in list_platforms()}
    assert found["Reference"].works
    assert found["CPU"].works
    assert all(p.works or p.problem for p in found.values())
