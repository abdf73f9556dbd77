"""Files of every format version there has been still load, with the values they held (see make_files.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
import yaml

from openmm_hvpcg.config import dump_protocol, load_protocol, resolve_arm
from openmm_hvpcg.frames import load_frames
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.potential import load_potential
from openmm_hvpcg.simulation.system import CGPotential
from openmm_hvpcg.training.dataset import load_dataset

FOLDERS = sorted((Path(__file__).parent / "files").glob("version_*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


def test_there_are_files() -> None:
    assert FOLDERS[0].name == "version_1"


def test_frames(folder: Path, expected: dict[str, Any]) -> None:
    frames = load_frames(folder / "frames.zarr")
    assert np.array_equal(frames.positions, np.array(expected["frames"]["positions"]))
    assert frames.walker.tolist() == expected["frames"]["walker"] == [0, 0, 0, 1, 1, 1]
    assert (frames.temperature_K, frames.interval_ps) == (300.0, expected["interval_ps"])
    assert frames.box is None
    assert [str(atom) for atom in frames.topology.atoms] == expected["atoms"]
    assert [[a.index, b.index] for a, b in frames.topology.bonds] == expected["atom_bonds"]
    assert frames.provenance == expected["frames_provenance"]


def test_dataset(folder: Path, expected: dict[str, Any]) -> None:
    dataset = load_dataset(folder / "dataset.zarr")
    for name in ("positions", "forces", "probes", "hvps", "walker"):
        assert np.array_equal(getattr(dataset, name), np.array(expected["dataset"][name])), name
    assert dataset.temperature_K == 300.0
    assert dataset.hash == expected["dataset_hash"]
    assert dataset.bead_map.hash == expected["bead_map_hash"]
    assert list(dataset.bead_map.species) == expected["species"]
    assert dataset.bead_map.bonds.tolist() == expected["bead_bonds"]


def test_preset_still_gives_the_map_of_the_dataset(folder: Path) -> None:
    bead_map = build_bead_map("backbone", load_frames(folder / "frames.zarr").topology)
    assert load_dataset(folder / "dataset.zarr", bead_map).n_frames == 6


def test_potential(folder: Path, expected: dict[str, Any]) -> None:
    script, spec = load_potential(folder / "potential.pt")
    x = torch.tensor(expected["dataset"]["positions"], dtype=torch.float64, requires_grad=True)
    energies = torch.stack([script(frame) for frame in x])
    forces = -torch.autograd.grad(energies.sum(), x)[0]
    # Energies of tens of kJ/mol, forces of up to 2000 kJ/mol/nm. The priors are in double precision, the network is
    # in float32, whose rounding differs from machine to machine: a few 1e-7 of its terms.
    np.testing.assert_allclose(energies.detach(), expected["energies"], rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(forces, expected["forces"], rtol=1e-6, atol=1e-2)
    assert spec.bead_map.hash == expected["bead_map_hash"]
    assert spec.datasets == {"ala2": expected["dataset_hash"]}
    assert spec.metrics == {"val_force": 1.25, "val_hvp": None}
    assert (spec.cutoff_nm, spec.temperature_K) == (0.8, 300.0)


def test_potential_runs_in_openmm(folder: Path, expected: dict[str, Any]) -> None:
    system = CGPotential.load(folder / "potential.pt").createSystem(backend="pythonforce")
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(expected["dataset"]["positions"][0])
    energy = context.getState(getEnergy=True).getPotentialEnergy()
    # As above; PythonForce hands the network its positions in double precision.
    assert energy.value_in_unit(openmm.unit.kilojoule_per_mole) == pytest.approx(
        expected["energies"][0], rel=1e-6, abs=1e-3
    )


def test_protocol_means_the_same(folder: Path) -> None:
    protocol = load_protocol(folder / "protocol.yaml")
    now = yaml.safe_load(dump_protocol(protocol))
    then = yaml.safe_load((folder / "protocol.resolved.yaml").read_text())
    # A newer version may have more keys; none of the old ones may be lost or change its default.
    assert find_differences(then, now) == []
    assert load_protocol(folder / "protocol.resolved.yaml") == protocol
    assert resolve_arm(protocol, "hvp")[0].max_epochs == 3


def find_differences(then: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            line
            for name, value in then.items()
            for line in find_differences(value, now.get(name, "no such key"), f"{key}.{name}")
        ]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = enumerate(zip(then, now, strict=True))
        return [line for i, (a, b) in pairs for line in find_differences(a, b, f"{key}.{i}")]
    return [] if then == now else [f"{key}: {then!r} became {now!r}"]
