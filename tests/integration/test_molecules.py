"""Roles of molecules, every kind of input, and arms that blow up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import pytest
import yaml
import zarr
from cli_process import DATA, Options, call_cli
from conftest import DEMO, set_options

from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, LabelSettings
from openmm_hvpcg.frames import load_frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import load_potential
from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.labels.label import label_frames

FM = {"name": "fm", "hvp_weight": 0.0}


def write_protocol(path: Path, molecules: list[dict[str, Any]], beads: Any = "backbone") -> Path:
    content = {"molecules": molecules, "mapping": {"beads": beads}, "training": {"arms": [FM]}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on one peptide, judged on another: the folder of the protocol and of its study ``out``."""
    folder = tmp_path_factory.mktemp("two")
    molecules = [
        {"name": "one", "role": "train", "input": {"sequence": "A"}},
        {"name": "two", "role": "test", "input": {"sequence": "AA"}},
    ]
    protocol = write_protocol(folder / "p.yaml", molecules)
    result = call_cli("run", protocol, "--out", folder / "out", *set_options("simulation.timestep_fs=1"))
    assert result.status == 0, result.err
    return folder


def test_roles(two: Path) -> None:
    out = two / "out"
    assert [p.name for p in (out / "datasets").iterdir()] == ["one.zarr"]
    assert [p.name for p in (out / "cg/fm").iterdir()] == ["two"]
    _, spec = load_potential(out / "models/fm/potential.pt")
    assert list(spec.datasets) == ["one"]
    summary = json.loads((out / "report/summary.json").read_text())
    assert list(summary["molecules"]) == ["two"]
    figures = summary["molecules"]["two"]["arms"]["fm"]
    assert figures["status"] == "ok"
    assert figures["kl_tica1"] is not None
    n_beads = BeadMap.load(out / "mapping/two.json").n_beads
    assert n_beads > spec.bead_map.n_beads
    assert (out / "cg/fm/two/topology.pdb").read_text().count("ATOM") == n_beads


def test_frames_chosen_by_cluster_train_and_do_not_judge(tmp_path: Path) -> None:
    """One trajectory, chosen from by cluster for training and by time for the comparison."""
    topology = md.load(str(DATA / "dialanine.pdb")).topology
    positions = md.load(str(DATA / "dialanine.pdb")).xyz
    noise = np.random.default_rng(0).normal(scale=0.004, size=(400, 32, 3))
    md.Trajectory(positions + noise, topology).save(str(tmp_path / "t.dcd"))
    shared = {"pdb": str(DATA / "dialanine.pdb"), "trajectory": "t.dcd", "trajectory_frames": 100}
    molecules: list[dict[str, Any]] = [
        {"name": "one", "role": "train", "input": {**shared, "trajectory_choice": "cluster"}},
        {"name": "two", "role": "test", "input": {**shared, "trajectory_stride": 3}},
    ]
    protocol = write_protocol(tmp_path / "p.yaml", molecules)
    for stage in ("sample", "label"):
        result = call_cli(stage, protocol, "--out", tmp_path / "out", *set_options("labels.max_frames=8"))
        assert result.status == 0, result.err
    one, two = (load_frames(tmp_path / f"out/frames/{name}.zarr") for name in ("one", "two"))
    assert (one.n_frames, two.n_frames) == (100, 67)  # 134 of every third frame, and every other of these
    assert two.interval_ps == 6.0
    assert "not distributed as the ensemble" in (tmp_path / "out/datasets/one.zarr/zarr.json").read_text()
    molecules[0]["role"] = "both"
    result = call_cli("label", write_protocol(tmp_path / "p.yaml", molecules), "--out", tmp_path / "out")
    assert result.status == 2
    assert "molecule one is compared with, and frames chosen by cluster" in result.err.replace("\n", " ")


def test_frames_on_barriers_train_and_do_not_judge(two: Path, tmp_path: Path) -> None:
    """With a bias for the molecule that is only trained on; its labels are those of the System without it."""
    protocol, out = two / "p.yaml", tmp_path / "out"
    flatten = set_options("sampling.flatten=0.8", "sampling.flatten_frames=40", "sampling.platform=Reference")
    for stage in ("sample", "label"):
        result = call_cli(stage, protocol, "--out", out, *flatten)
        assert result.status == 0, result.err
    plain, flat = (load_frames(folder / "frames/one.zarr") for folder in (two / "out", out))
    bias = flat.provenance["bias"]
    assert (bias["share"], bias["frames"]) == (0.8, 40)
    assert len(bias["log_densities"]) == len(bias["dihedrals"]) > 0
    assert flat.provenance["system_hash"] == plain.provenance["system_hash"]
    assert load_frames(out / "frames/one+pilot.zarr").n_frames == 40
    assert not (out / "frames/two+pilot.zarr").exists()
    assert "bias" not in load_frames(out / "frames/two.zarr").provenance
    labels = load_dataset(out / "datasets/one.zarr")
    assert labels.attributes["frames"]["bias"] == bias
    system = build_atomistic_system(InputSettings(sequence="A"), temperature_K=300.0)
    settings = LabelSettings(probes_per_frame=2, platform="Reference")
    again = label_frames(system, flat, labels.bead_map, settings, tmp_path / "again.zarr", progress=False)
    np.testing.assert_array_equal(again.forces, labels.forces)
    assert "done already" in call_cli("sample", protocol, "--out", out, *flatten).err
    other = call_cli("sample", protocol, "--out", out, *flatten, "--set", "sampling.flatten=0.3")
    assert other.status != 0
    assert "sampling.flatten (0.8 -> 0.3)" in other.err
    # On a cluster the frames without the bias come before the parts of those with it.
    result = call_cli("sample", protocol, "--out", tmp_path / "local", *flatten, "--scheduler", "local", "--workers", 1)
    assert result.status == 0, result.err
    np.testing.assert_array_equal(load_frames(tmp_path / "local/frames/one.zarr").positions, flat.positions)


def test_a_molecule_can_be_added(two: Path, tmp_path: Path) -> None:
    """Another test molecule is sampled if the network can know its species; what is there is kept."""
    out = Path(shutil.copytree(two / "out", tmp_path / "out"))
    protocol = yaml.safe_load((two / "p.yaml").read_text())
    protocol["molecules"].append({"name": "third", "role": "test", "input": {"sequence": "G"}})
    path = write_protocol(tmp_path / "p.yaml", protocol["molecules"])
    result = call_cli("sample", path, "--out", out, *set_options("simulation.timestep_fs=1"))
    assert result.status != 0
    for word in ("molecule third", "GLY:CA", "add a training molecule"):
        assert word in result.err
    assert not (out / "frames/third.zarr").exists()
    protocol["molecules"][-1]["input"]["sequence"] = "AAA"
    path = write_protocol(tmp_path / "p.yaml", protocol["molecules"])
    result = call_cli("sample", path, "--out", out, *set_options("simulation.timestep_fs=1"))
    assert result.status == 0, result.err
    assert load_frames(out / "frames/third.zarr").n_frames == 80
    assert "sample one: done already, skipped" in (out / "log.txt").read_text()


def test_every_kind_of_input(two: Path, tmp_path: Path) -> None:
    """Amber, System XML, a trajectory, helix and heavy hydrogens, with a JSON map that all of them fit."""
    for file in DATA.glob("dialanine.*"):
        shutil.copy(file, tmp_path)
    exported = load_frames(two / "out/frames/two.zarr")
    exported.export(tmp_path / "exported.dcd")
    write_map(tmp_path / "map.json", exported)
    molecules = [
        {"name": "amber", "input": {"prmtop": "dialanine.prmtop", "coordinates": "dialanine.rst7"}},
        {"name": "xml", "input": {"system_xml": "dialanine.xml", "pdb": "dialanine.pdb"}},
        {
            "name": "files",
            "input": {"pdb": "dialanine.pdb", "trajectory": "exported.dcd", "trajectory_interval_ps": 0.04},
        },
        {"name": "helix", "input": {"sequence": "AA", "start": "helix", "hydrogen_mass_amu": 3.0}},
    ]
    protocol = write_protocol(tmp_path / "p.yaml", molecules, {"json": "map.json"})
    out = tmp_path / "out"
    settings = set_options("sampling.equilibration_steps=50", "sampling.stride=5")
    for stage in ("sample", "label"):
        result = call_cli(stage, protocol, "--out", out, *settings)
        assert result.status == 0, result.err
        assert "dcdplugin" not in result.out + result.err
    for molecule in molecules:
        group = zarr.open_group(str(out / "datasets" / f"{molecule['name']}.zarr"), mode="r")
        assert group["hvps"].shape == (80, 2, 4, 3)
        assert np.isfinite(group["hvps"][...]).all()
    # A DCD holds float32 angstrom, and the frames are centred again: 1e-6 nm at most.
    imported = load_frames(out / "frames/files.zarr")
    assert imported.interval_ps == 0.04
    np.testing.assert_allclose(imported.positions, exported.positions, rtol=0, atol=1e-6)
    heavy = (out / "datasets/helix.zarr/zarr.json").read_text()
    assert '"hydrogen_mass_amu": 3.0' in heavy
    change_an_input_file(protocol, out, settings, tmp_path)


def write_map(path: Path, frames: Any) -> None:
    """Four beads, each the mean of two atoms, one of them heavy; of 32 atoms."""
    heavy = [a.index for a in frames.topology.atoms if a.name in ("CA", "CB")]
    beads = [
        {"name": f"B{i}", "species": "X", "mass_amu": 24.0, "atoms": [heavy[i], partner], "weights": [0.75, 0.25]}
        for i, partner in enumerate(find_partners(frames.topology, heavy))
    ]
    path.write_text(json.dumps({"beads": beads, "bonds": [[0, 1], [2, 3], [0, 2]]}))


def find_partners(topology: Any, atoms: list[int]) -> list[int]:
    """The first other heavy neighbour in the same residue's backbone: N for CA, a hydrogen of its own for CB."""
    names = {a.index: (a.residue.index, a.name) for a in topology.atoms}
    index = {v: k for k, v in names.items()}
    partner = {"CA": "C", "CB": "HB1"}
    return [index[names[a][0], partner[names[a][1]]] for a in atoms]


def change_an_input_file(protocol: Path, out: Path, settings: list[str], folder: Path) -> None:
    original = (folder / "exported.dcd").read_bytes()
    (folder / "exported.dcd").write_bytes(original[:-8] + bytes([original[-8] ^ 1]) + original[-7:])
    result = call_cli("label", protocol, "--out", out, *settings)
    assert result.status == 2
    assert "file exported.dcd (its contents changed)" in result.err
    (folder / "exported.dcd").write_bytes(original)
    content = (folder / "map.json").read_text()
    (folder / "map.json").write_text(content.replace("24.0", "25.0"))
    result = call_cli("label", protocol, "--out", out, *settings)
    assert result.status == 2
    assert "file map.json (its contents changed)" in result.err


def test_an_arm_that_blows_up(study: Path) -> None:
    """Exit status 1 and the reason; the report is made all the same, and a second run says it again."""
    settings = set_options("simulation.timestep_fs=50", "training.arms=[{name: fm, hvp_weight: 0.0}]")
    shutil.rmtree(study / "cg")
    simulated = call_cli("simulate", DEMO, "--out", study, *settings)
    assert simulated.status == 1
    assert "fm/ala" in simulated.err
    assert "blew up" in simulated.err
    assert "Traceback" not in simulated.err
    for _ in range(2):
        result = call_cli("run", DEMO, "--out", study, *settings, options=Options(columns=80))
        assert result.status == 1
        assert "blew up" in result.err.splitlines()[-1]
        assert "unstable" in result.out
    assert call_cli("compare", DEMO, "--out", study, *settings).status == 0
    figures = json.loads((study / "report/summary.json").read_text())["molecules"]["ala"]["arms"]["fm"]
    assert figures["status"] == "unstable"
    assert "blew up" in figures["message"]
    assert (study / "report/report.html").stat().st_size > 10_000
    assert "blew up" in (study / "log.txt").read_text()


def test_openmmtorch_that_cannot_load(study: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "openmmtorch.py").write_text("raise ImportError('libtorch_cuda.so: cannot open')\n")
    broken = Options(python_path=str(tmp_path / "broken"))
    one_arm = ("training.arms=[{name: fm, hvp_weight: 0.0}]",)
    shutil.rmtree(study / "cg")
    asked = call_cli(
        "simulate", DEMO, "--out", study, *set_options(*one_arm, "simulation.backend=torchforce"), options=broken
    )
    assert asked.status == 2
    assert "openmmtorch cannot load (libtorch_cuda.so: cannot open)" in asked.err
    assert "Traceback" not in asked.err
    assert not (study / "cg").exists()
    auto = call_cli("simulate", DEMO, "--out", study, *set_options(*one_arm), options=broken)
    assert auto.status == 0, auto.err
    assert "PythonForce serves instead" in (study / "log.txt").read_text()
    assert json.loads((study / "cg/fm/ala/result.json").read_text())["backend"] == "pythonforce"
