"""The potential file: written whole, read exactly, anything else refused, bound to another molecule."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.errors import PotentialError, StorageError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import (
    FORMAT_VERSION,
    PotentialSpec,
    bind_molecule,
    compute_buffers,
    load_potential,
    read_spec,
    save_potential,
)
from openmm_hvpcg.prior_terms import ANY, DIHEDRAL_ORDER, PriorParameters
from openmm_hvpcg.training.export import script_network
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.models.total import TotalEnergy
from openmm_hvpcg.units import UNITS

PRIORS = PriorParameters(
    bonds={"A|B": (900.0, 0.36), "B|B": (1100.0, 0.38), ANY: (1000.0, 0.37)},
    angles={ANY: (40.0, -0.3)},
    dihedrals={ANY: tuple(0.2 * n for n in range(2 * DIHEDRAL_ORDER))},
    repulsion={ANY: (0.45,), "A|A": (0.6,)},
    repulsion_epsilon=2.5,
)


def build_map(species: str, bonds: list[list[int]] | None = None) -> BeadMap:
    n = len(species)
    weights = np.zeros((n, 2 * n))
    weights[np.arange(n), 2 * np.arange(n)] = 0.75
    weights[np.arange(n), 2 * np.arange(n) + 1] = 0.25
    return BeadMap(
        weights,
        tuple(species),
        np.linspace(12.0, 18.0, n),
        np.array([[i, i + 1] for i in range(n - 1)] if bonds is None else bonds),
        tuple(f"X{i}" for i in range(n)),
        tuple(("RES", i + 1, 0) for i in range(n)),
    )


def build_spec(bead_map: BeadMap, **changes: Any) -> PotentialSpec:
    spec = PotentialSpec(
        species=("A", "B", "C"),
        bead_map=bead_map,
        sites={"RES:X0": "A", "RES:X1": "B"},
        species_masses={"A": 12.0, "B": 18.0, "C": 1.0},
        priors=PRIORS,
        cutoff_nm=0.9,
        temperature_K=300.0,
        model={"kind": "schnet", "features": 8},
        datasets={"ala": "f00d"},
        metrics={"force": 1.5, "none": None},
        provenance={"seed": 3, "arm": "hvp"},
    )
    return replace(spec, **changes)


def build_script(spec: PotentialSpec) -> torch.jit.ScriptModule:
    torch.manual_seed(7)
    model = ModelSettings(features=8, interactions=1, radial=6, cutoff_nm=0.9)
    network = build_network(len(spec.species), model, 10.0)
    with torch.no_grad():  # a new network is zero everywhere
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return script_network(TotalEnergy(network, spec))


def build_positions(n_beads: int) -> Tensor:
    steps = np.random.default_rng(3).normal(size=(n_beads, 3)) + np.array([0.9, 0.0, 0.0])
    steps *= 0.37 / np.linalg.norm(steps, axis=1, keepdims=True)
    return torch.from_numpy(np.cumsum(steps, axis=0))


#: Same weights and operations, but the network is in float32 and TorchScript may fuse operations in one of two runs:
#: a few 1e-7 of energies (kJ/mol) and forces (kJ/mol/nm) of up to 100 (9.7e-7 was seen).
FLOAT32 = {"rtol": 1e-6, "atol": 1e-4}

SPEC = build_spec(build_map("ABBA"))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound potential file."""
    path = tmp_path_factory.mktemp("potential") / "p.pt"
    save_potential(path, build_script(SPEC), SPEC)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    target = tmp_path / "p.pt"
    target.write_bytes(content)
    return target


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of the spec inside a potential file; None drops one."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in members if n.endswith("extra/spec.json"))
    spec = json.loads(members[name])
    for key, value in changes.items():
        if value is None:
            del spec[key]
        else:
            spec[key] = value
    members[name] = json.dumps(spec).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)


class TestSpec:
    def test_round_trip(self) -> None:
        again = PotentialSpec.from_json(SPEC.to_json())
        assert again.bead_map.to_dict() == SPEC.bead_map.to_dict()
        assert replace(again, bead_map=SPEC.bead_map) == SPEC

    def test_header(self) -> None:
        content = json.loads(SPEC.to_json())
        assert content["format"] == "openmm-hvpcg/potential"
        assert content["format_version"] == FORMAT_VERSION
        assert content["units"] == UNITS

    def test_species_index(self) -> None:
        assert SPEC.compute_species_index().tolist() == [0, 1, 1, 0]
        assert SPEC.compute_species_index(build_map("CCB")).tolist() == [2, 2, 1]

    def test_unknown_species(self) -> None:
        with pytest.raises(PotentialError, match="does not know species D, E: expected among A, B, C"):
            SPEC.compute_species_index(build_map("AEDA"))


class TestFile:
    def test_round_trip(self, path: Path) -> None:
        script, spec = load_potential(path)
        x = build_positions(4)
        torch.testing.assert_close(script(x), build_script(SPEC)(x), **FLOAT32)
        assert spec.to_json() == SPEC.to_json()
        assert read_spec(path).to_json() == SPEC.to_json()
        assert not script.training

    def test_reading_the_spec_needs_no_torch(self, path: Path) -> None:
        code = (
            "import sys; from openmm_hvpcg.potential import read_spec; read_spec(sys.argv[1]);"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60).returncode == 0

    def test_failure_keeps_the_old_file(self, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(StorageError, match="no space left"):
            save_potential(path, build_script(SPEC), SPEC)
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["p.pt"]

    def test_missing(self, tmp_path: Path) -> None:
        for read in (read_spec, load_potential):
            for name in ("none.pt", "."):
                with pytest.raises(PotentialError, match="no such potential file"):
                    read(tmp_path / name)

    @pytest.mark.parametrize("kind", ["empty", "text", "binary", "zip", "plain", "cut", "head"])
    def test_not_a_potential_file(self, tmp_path: Path, content: bytes, kind: str) -> None:
        path = tmp_path / "p.pt"
        match kind:
            case "zip":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("a.txt", "hello")
            case "plain":
                torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
            case _:
                data = {
                    "empty": b"",
                    "text": b"energy = 0",
                    "binary": bytes(range(256)) * 40,
                    "cut": content[: len(content) // 2],
                    "head": content[:-1],
                }
                path.write_bytes(data[kind])
        for read in (read_spec, load_potential):
            with pytest.raises(PotentialError, match=r"p\.pt: not a potential file") as caught:
                read(path)
            assert "\n" not in str(caught.value)

    def test_a_spec_without_a_script(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("p/extra/spec.json", SPEC.to_json())
        with pytest.raises(PotentialError, match=r"p\.pt: the TorchScript is damaged") as caught:
            load_potential(path)
        assert "\n" not in str(caught.value)

    def test_any_damaged_byte_is_noticed_or_harmless(self, tmp_path: Path, content: bytes) -> None:
        x, expected = build_positions(4), build_script(SPEC)(build_positions(4))
        path = tmp_path / "p.pt"
        refused = 0
        for position in np.random.default_rng(0).integers(0, len(content), 60):
            damaged = bytearray(content)
            damaged[position] ^= 0xFF
            path.write_bytes(damaged)
            try:
                script, spec = load_potential(path)
            except PotentialError:
                refused += 1
            else:  # padding between the members of the archive
                torch.testing.assert_close(script(x), expected, **FLOAT32)
                assert spec.to_json() == SPEC.to_json()
        assert refused > 20

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"format": "openmm-hvpcg/frames"},
                "wrong kind of file: expected openmm-hvpcg/potential, got openmm-hvpcg/frames",
            ),
            (
                {"format_version": FORMAT_VERSION + 1},
                "format version is too new: expected 3, got 4. Upgrade openmm-hvpcg",
            ),
            ({"format_version": 0}, "format version is not supported: expected 3, got 0. Export it again"),
            ({"units": {**UNITS, "length": "angstrom"}}, "units differ"),
            ({"species": 3}, "malformed"),
            ({"cutoff_nm": "far"}, "malformed"),
            ({"bead_map": {"beads": []}}, "malformed"),
            ({"priors": {"bonds": {}}}, "malformed"),
            *(({key: None}, "malformed") for key in ("format", "units", "bead_map", "priors", "temperature_K")),
        ],
    )
    def test_wrong_spec(self, path: Path, change: dict[str, Any], message: str) -> None:
        rewrite(path, **change)
        for read in (read_spec, load_potential):
            with pytest.raises(PotentialError, match=message):
                read(path)

    def test_rewriting_alone_keeps_it_sound(self, path: Path) -> None:
        rewrite(path, temperature_K=310.0)
        script, spec = load_potential(path)
        assert spec.temperature_K == 310.0
        assert torch.isfinite(script(build_positions(4)))


class TestBinding:
    @pytest.mark.parametrize(
        ("species", "bonds"),
        [("BA", None), ("ABBABA", None), ("CCCCC", None), ("ABAB", [[0, 1], [0, 2], [0, 3]]), ("C", None)],
    )
    def test_equals_building_it_there(self, path: Path, species: str, bonds: list[list[int]] | None) -> None:
        target = build_map(species, bonds)
        script, spec = load_potential(path)
        bound = bind_molecule(script, spec, target)
        direct = build_script(build_spec(target))
        x = build_positions(len(species)).requires_grad_()
        energies = [module(x) for module in (script, direct)]
        forces = [torch.autograd.grad(energy, x)[0] for energy in energies]
        torch.testing.assert_close(*energies, **FLOAT32)
        torch.testing.assert_close(*forces, **FLOAT32)
        assert bound.bead_map is target
        assert replace(bound, bead_map=spec.bead_map) == spec

    def test_there_and_back(self, path: Path) -> None:
        script, spec = load_potential(path)
        x = build_positions(4)
        before = script(x)
        other = bind_molecule(script, spec, build_map("CCCC"))
        assert abs(float((script(x) - before).detach())) > 0.5
        bind_molecule(script, other, SPEC.bead_map)
        torch.testing.assert_close(script(x), before, **FLOAT32)

    def test_survives_saving(self, path: Path, tmp_path: Path) -> None:
        script, spec = load_potential(path)
        bound = bind_molecule(script, spec, build_map("ABBABA"))
        save_potential(tmp_path / "bound.pt", script, bound)
        again, found = load_potential(tmp_path / "bound.pt")
        assert found.bead_map.hash == build_map("ABBABA").hash
        torch.testing.assert_close(again(build_positions(6)), script(build_positions(6)), **FLOAT32)

    @pytest.mark.parametrize("species", ["ABZ", "Z"])
    def test_refused_molecule_leaves_the_script_as_it_was(self, path: Path, species: str) -> None:
        script, spec = load_potential(path)
        x = build_positions(4)
        before = script(x)
        with pytest.raises(PotentialError, match="does not know species Z"):
            bind_molecule(script, spec, build_map(species))
        torch.testing.assert_close(script(x), before, **FLOAT32)

    def test_combination_without_parameters(self) -> None:
        spec = build_spec(build_map("ABBA"), priors=PriorParameters(bonds={"A|B": (1.0, 0.3), "B|B": (1.0, 0.3)}))
        script = build_script(spec)
        before = {name: getattr(script, name).clone() for name in compute_buffers(spec)}
        with pytest.raises(PotentialError, match=r"no bond parameters for A\|C"):
            bind_molecule(script, spec, build_map("ABBAC"))
        assert all(torch.equal(getattr(script, name), value) for name, value in before.items())

    def test_buffers(self) -> None:
        buffers = compute_buffers(SPEC)
        assert buffers["species"].tolist() == [0, 1, 1, 0]
        assert buffers["bond_index"].tolist() == [[0, 1], [1, 2], [2, 3]]
        assert buffers["bond_parameters"].tolist() == [[900.0, 0.36], [1100.0, 0.38], [900.0, 0.36]]
        assert buffers["improper_index"].shape == (0, 4)
        assert {name for name in buffers if name.endswith("_index")} == {
            f"{term}_index" for term in ("bond", "angle", "dihedral", "improper", "pair", "torsion", "chain")
        }
