"""Bad input through the command line: one clear line, exit status 2, nothing written or lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mdtraj as md
import numpy as np
import pytest
import torch
import yaml
import zarr
from cli_process import DATA, Result, call_cli
from conftest import DEMO, set_options

from openmm_hvpcg import cli
from openmm_hvpcg.frames import load_frames

PDB = {"pdb": "dialanine.pdb"}
GROMACS = {"top": "dialanine.top", "coordinates": "dialanine.gro"}
CHARMM = {"psf": "dialanine.psf", "parameters": "dialanine.prm", "coordinates": "dialanine.crd"}


def assert_refused(result: Result, *words: str) -> None:
    assert result.status == 2, (result.status, result.err)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small input files in it."""
    for file in DATA.glob("dialanine.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def run_molecule(folder: Path, source: dict[str, Any], beads: Any = "ca", stage: str = "run") -> Result:
    """``run`` on a molecule of the given input; the study is ``folder/out``."""
    content = {"molecules": [{"name": "mol", "input": source}], "mapping": {"beads": beads}}
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    return call_cli(stage, folder / "p.yaml", "--out", folder / "out", "--quiet", *set_options())


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    after = change(before)
    assert after != before
    path.write_text(after)


def strip_hydrogens(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line[12:16].strip().startswith("H"))


def strip_residue(text: str, number: int) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if line[22:26].strip() != str(number))


def write_small_gro(folder: Path) -> None:
    atoms = "".join(f"{1:5d}ACE  {name:>5}{k:5d}{0.1 * k:8.3f}{0:8.3f}{0:8.3f}\n" for k, name in ((1, "CH3"), (2, "C")))
    (folder / "small.gro").write_text(f"two atoms\n    2\n{atoms}   0.0 0.0 0.0\n")


def write_small_rst7(folder: Path) -> dict[str, Any]:
    (folder / "small.rst7").write_text("two atoms\n    2\n" + "".join(f"{x:12.7f}" for x in range(6)) + "\n")
    return {"prmtop": "dialanine.prmtop", "coordinates": "small.rst7"}


def write_trajectory(folder: Path, n_atoms: int, *, spoil: bool = False) -> dict[str, Any]:
    positions = np.tile(md.load(str(folder / "dialanine.pdb")).xyz, (5, 1, 1))[:, :n_atoms]
    if spoil:
        positions[3, 7] = np.nan
    with md.formats.DCDTrajectoryFile(str(folder / "t.dcd"), "w") as handle:
        handle.write(10 * positions)
    return {**PDB, "trajectory": ["t.dcd"]}


class Case(NamedTuple):
    """An input that cannot be used: what to do to the folder, and what the error must say."""

    source: dict[str, Any] | Callable[[Path], dict[str, Any]]
    words: tuple[str, ...]
    change: Callable[[Path], None] | None = None


INPUTS = {
    "unknown residue": Case(
        PDB, ("dialanine.pdb", "XYZ"), lambda f: edit(f / "dialanine.pdb", lambda t: t.replace("ALA", "XYZ"))
    ),
    "missing hydrogens": Case(
        {**PDB, "repair": False}, ("dialanine.pdb", "ydrogen"), lambda f: edit(f / "dialanine.pdb", strip_hydrogens)
    ),
    "gap in a chain": Case(
        PDB, ("gap", "ALA 2 (chain A)", "NME 4"), lambda f: edit(f / "dialanine.pdb", lambda t: strip_residue(t, 3))
    ),
    "residue to remove is not there": Case({**PDB, "remove": ["GOL"]}, ("no residue GOL", "ACE, ALA, NME")),
    "NaN in a structure": Case(
        PDB,
        ("dialanine.pdb", "NaN"),
        lambda f: edit(f / "dialanine.pdb", lambda t: t.replace(t.splitlines()[1][30:38], "     nan", 1)),
    ),
    "not a PDB": Case(PDB, ("dialanine.pdb",), lambda f: (f / "dialanine.pdb").write_text("nothing\n") and None),
    "no such file": Case({"pdb": "none.pdb"}, ("none.pdb", "no such file")),
    "no such force field": Case({**PDB, "force_field": ["none.xml"]}, ("none.xml",)),
    "unknown amino acid": Case({"sequence": "AXA"}, ("X",)),
    "prmtop and coordinates differ": Case(write_small_rst7, ("32", "2", "different sizes")),
    "not a prmtop": Case({"prmtop": "dialanine.pdb", "coordinates": "dialanine.rst7"}, ("dialanine.pdb", "prmtop")),
    "GROMACS include": Case(
        GROMACS,
        ("dialanine.top", "none.itp", "include_folder"),
        lambda f: edit(f / "dialanine.top", lambda t: '#include "none.itp"\n' + t),
    ),
    "GROMACS coordinates differ": Case({**GROMACS, "coordinates": "small.gro"}, ("32", "2"), write_small_gro),
    "CHARMM parameter missing": Case(
        CHARMM,
        ("dialanine.psf", "Missing bond type"),
        lambda f: edit(f / "dialanine.prm", lambda t: t.replace("C5     C1 ", "C5     C6 ", 1)),
    ),
    "not a System": Case({"system_xml": "dialanine.pdb", "pdb": "dialanine.pdb"}, ("dialanine.pdb", "openmm.System")),
    "System and PDB differ": Case(
        {"system_xml": "dialanine.xml", **PDB},
        ("32",),
        lambda f: edit(f / "dialanine.pdb", strip_hydrogens),
    ),
    "trajectory and topology differ": Case(lambda f: write_trajectory(f, 20), ("t.dcd", "expected 32 atoms", "got 20")),
    "NaN in a trajectory": Case(lambda f: write_trajectory(f, 32, spoil=True), ("t.dcd", "NaN", "frame 3")),
    "no such trajectory": Case({**PDB, "trajectory": "none.dcd"}, ("none.dcd",)),
}


@pytest.mark.parametrize("case", INPUTS.values(), ids=INPUTS.keys())
def test_input(folder: Path, case: Case) -> None:
    if case.change is not None:
        case.change(folder)
    source = case.source(folder) if callable(case.source) else case.source
    assert_refused(run_molecule(folder, source), *case.words)
    assert not (folder / "out").exists()


def bead(atoms: list[int], weights: list[float], name: str = "B") -> dict[str, Any]:
    return {"name": name, "species": "X", "mass_amu": 12.0, "atoms": atoms, "weights": weights}


#: Bead maps of dialanine (32 atoms): atom 8 is CA of the first alanine, 9 its HA.
MAPS = {
    "empty selection": ("name ZZ", ("name ZZ", "no atom")),
    "not a selection": ("name ==", ("name ==", "selection")),
    "rows that do not sum to 1": ([bead([8], [0.9])], ("map.json", "do not sum to 1", "0.9")),
    "overlapping beads": ([bead([8], [1.0]), bead([8], [1.0])], ("map.json", "overlap")),
    "no such atom": ([bead([32], [1.0])], ("map.json", "0 to 31", "32")),
    "not a map": ("{", ("map.json", "not JSON")),
    "no beads": ([], ("map.json", "at least one bead")),
    "weights missing": ([{"name": "B", "species": "X", "mass_amu": 1.0, "atoms": [8]}], ("map.json", "weights")),
}


@pytest.mark.parametrize(("content", "words"), MAPS.values(), ids=MAPS.keys())
def test_mapping(folder: Path, content: Any, words: tuple[str, ...]) -> None:
    beads: Any = content
    if isinstance(content, list) or content == "{":
        text = content if content == "{" else json.dumps({"beads": content, "bonds": []})
        (folder / "map.json").write_text(text)
        beads = {"json": "map.json"}
    assert_refused(run_molecule(folder, PDB, beads), *words)
    assert not (folder / "out").exists()


def test_beads_on_one_rigid_cluster(folder: Path) -> None:
    names = [a.name for a in md.load(str(folder / "dialanine.pdb")).topology.atoms]
    carbon, hydrogen = names.index("CA"), names.index("HA")
    assert_refused(
        run_molecule(folder, PDB, f"index {carbon} {hydrogen}"), "molecule mol", "joined by rigid constraints"
    )
    assert not (folder / "out").exists()


def test_bead_on_a_massless_site(folder: Path) -> None:
    atom = [a.name for a in md.load(str(folder / "dialanine.pdb")).topology.atoms].index("C")

    def remove_mass(text: str) -> str:
        lines = text.splitlines()
        particles = [i for i, line in enumerate(lines) if line.strip().startswith("<Particle mass=")]
        lines[particles[atom]] = '\t\t<Particle mass="0"/>'
        return "\n".join(lines)

    edit(folder / "dialanine.xml", remove_mass)
    (folder / "map.json").write_text(json.dumps({"beads": [bead([atom], [1.0])], "bonds": []}))
    source = {"system_xml": "dialanine.xml", **PDB}
    assert_refused(run_molecule(folder, source, {"json": "map.json"}), "massless")
    assert not (folder / "out").exists()


YAMLS = {
    "not YAML": ("molecules: [", ("not YAML",)),
    "no mapping": ("- 1\n- 2\n", ("not a protocol", "list")),
    "empty": ("", ("not a protocol",)),
    "no molecules": ("temperature_K: 300\n", ("molecules", "missing")),
    "unknown section": ("molecules: [{name: a, input: {sequence: A}}]\nsampilng: {}\n", ("sampilng", "'sampling'")),
    "unknown key": (
        "molecules: [{name: a, input: {sequence: A}}]\nsampling: {n_frame: 3}\n",
        ("sampling.n_frame", "did you mean 'n_frames'"),
    ),
    "wrong type": (
        "molecules: [{name: a, input: {sequence: A}}]\nsampling: {n_frames: many}\n",
        ("n_frames", "'many'"),
    ),
    "out of range": ("molecules: [{name: a, input: {sequence: A}}]\ntemperature_K: -1\n", ("temperature_K", "-1")),
    "two sources": ("molecules: [{name: a, input: {sequence: A, pdb: a.pdb}}]\n", ("exactly one", "sequence, pdb")),
    "a name that is a path": ("molecules: [{name: ../a, input: {sequence: A}}]\n", ("name", "../a")),
    "arm with an unknown key": (
        "molecules: [{name: a, input: {sequence: A}}]\ntraining: {arms: [{name: x, hvp_wieght: 1}]}\n",
        ("hvp_wieght", "'hvp_weight'"),
    ),
    "nobody to train on": ("molecules: [{name: a, role: test, input: {sequence: A}}]\n", ("no molecule to train on",)),
}


@pytest.mark.parametrize(("text", "words"), YAMLS.values(), ids=YAMLS.keys())
def test_protocol(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "p.yaml").write_text(text)
    assert_refused(call_cli("run", tmp_path / "p.yaml", "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["nonsense", "sampling.n_frames=-3", "sampling.colour=red", "molecules.5.name=x"])
def test_set(tmp_path: Path, option: str) -> None:
    result = call_cli("run", DEMO, "--out", tmp_path / "out", "--set", option)
    assert_refused(result)
    assert not (tmp_path / "out").exists()


def test_no_such_protocol(tmp_path: Path) -> None:
    assert_refused(call_cli("run", tmp_path / "p.yaml", "--out", tmp_path / "out"), "p.yaml", "no such protocol")


def test_output_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for out, word in (("file", "is a file"), ("file/below", "file"), ("folder", "holds no study")):
        assert_refused(call_cli("run", DEMO, "--out", tmp_path / out), word)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["file", "folder", "folder/mine.txt"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/mine.txt").read_text() == "mine"


def test_output_of_another_study(study: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("molecules: [{name: other, input: {sequence: G}}]\n")
    before = (study / "config.resolved.yaml").read_text()
    assert_refused(
        call_cli("run", tmp_path / "p.yaml", "--out", study), "another study", "expected molecules other, got ala"
    )
    assert (study / "config.resolved.yaml").read_text() == before


def test_too_few_frames_for_the_priors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = set_options("sampling.n_frames=20")
    assert_refused(call_cli("run", DEMO, "--out", out, "--quiet", *settings), "too few frames", "20", "16")
    assert load_frames(out / "frames/ala.zarr").n_frames == 20
    assert not (out / "models/fm/training.json").exists()


def edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit_store(store: Path) -> None:
        header = json.loads((store / "zarr.json").read_text())
        change(header["attributes"])
        (store / "zarr.json").write_text(json.dumps(header))

    return edit_store


def drop_a_bead(attributes: dict[str, Any]) -> None:
    content = json.loads(attributes["bead_map"])
    content["beads"].pop()
    content["bonds"] = []
    attributes["bead_map"] = json.dumps(content)


def truncate_chunk(store: Path) -> None:
    chunk = store / "hvps" / "c" / "0" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-200])


DATASETS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "newer version": (edit_header(lambda a: a.update(format_version=99)), ("too new", "99")),
    "older version": (edit_header(lambda a: a.update(format_version=0)), ("not supported", "got 0")),
    "other units": (edit_header(lambda a: a["units"].update(length="angstrom")), ("units", "angstrom")),
    "other kind": (edit_header(lambda a: a.update(format="other")), ("wrong kind", "other")),
    "other mapping": (edit_header(drop_a_bead), ("another mapping", "6 beads", "5 beads")),
    "chunk deleted": (lambda s: shutil.rmtree(s / "forces" / "c"), ("forces", "NaN")),
    "chunk truncated": (truncate_chunk, ("hvps", "damaged")),
    "array missing": (lambda s: shutil.rmtree(s / "hvps"), ("hvps", "missing")),
    "unfinished": (lambda s: shutil.rmtree(s / "done" / "c"), ("labels are missing", "80 frames")),
    "not a store": (lambda s: (s / "zarr.json").write_text("{") and None, ("zarr",)),
}


@pytest.mark.parametrize(("damage", "words"), DATASETS.values(), ids=DATASETS.keys())
def test_dataset(study: Path, damage: Callable[[Path], None], words: tuple[str, ...]) -> None:
    shutil.rmtree(study / "models")
    shutil.rmtree(study / "cg")
    damage(study / "datasets" / "ala.zarr")
    assert_refused(call_cli("train", DEMO, "--out", study, "--quiet", *set_options()), "ala", *words)
    assert not (study / "models").exists()


def test_frames_that_are_truncated(study: Path) -> None:
    for stage in ("datasets", "models", "cg"):
        shutil.rmtree(study / stage)
    shutil.rmtree(study / "frames/ala.zarr/positions/c")
    result = call_cli("label", DEMO, "--out", study, "--quiet", *set_options())
    assert_refused(result, "frames/ala.zarr", "truncated")


def write_no_script(path: Path) -> None:
    path.write_text("not a potential\n")


def write_bare_script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 1)), str(path))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


@pytest.mark.parametrize("damage", [write_no_script, write_bare_script, cut_short, Path.unlink])
def test_potential(study: Path, damage: Callable[[Path], None]) -> None:
    shutil.rmtree(study / "cg/fm")
    structure = study / "cg/hvp/ala/topology.pdb"
    potential = study / "models/fm/potential.pt"
    damage(potential)
    assert_refused(call_cli("check-potential", potential, structure), "potential.pt")
    assert_refused(call_cli("simulate", DEMO, "--out", study, "--quiet", *set_options()), "fm")
    assert not (study / "cg/fm").exists()


def test_structure_of_a_check(study: Path, tmp_path: Path) -> None:
    potential = study / "models/fm/potential.pt"
    assert_refused(call_cli("check-potential", potential, tmp_path / "none.pdb"), "none.pdb")
    assert_refused(call_cli("check-potential", potential, DATA / "dialanine.pdb"), "32", "6")


@pytest.mark.parametrize("name", ["config.resolved.yaml", "stages/train.fm.json", "models/fm/training.json"])
def test_damaged_records(study: Path, name: str) -> None:
    (study / name).write_text("[")
    shutil.rmtree(study / "report")
    assert_refused(call_cli("run", DEMO, "--out", study, "--quiet", *set_options()), Path(name).name, "damaged")


def test_platform_that_is_not_here(tmp_path: Path) -> None:
    result = call_cli("run", DEMO, "--out", tmp_path / "out", "--quiet", *set_options("sampling.platform=Abacus"))
    assert_refused(result, "Abacus", "Reference")
    # Platforms are no part of a study: with one that is here it goes on.
    settings = set_options("sampling.platform=auto")
    assert call_cli("sample", DEMO, "--out", tmp_path / "out", *settings).status == 0


def call_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """The command line in this process, whose system calls a test can change."""
    monkeypatch.setattr(sys, "argv", ["openmm-hvpcg", *map(str, arguments)])
    # The command line sets up the package's logger for a process of its own; the tests after this one share it.
    package = logging.getLogger("openmm_hvpcg")
    handlers, level, propagate = package.handlers[:], package.level, package.propagate
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        package.handlers[:], package.propagate = handlers, propagate
        package.setLevel(level)
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return Result(ended.value.code, captured.out, captured.err)


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    result = call_here(monkeypatch, capsys, "run", DEMO, "--out", tmp_path / "out", "--quiet", *set_options())
    assert_refused(result, "not enough disk space", "free")
    assert not (tmp_path / "out").exists()


def test_disk_full_while_labelling(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up after the first chunk: it is said, kept, and gone on with when there is room again."""
    for stage in ("datasets", "models", "cg"):
        shutil.rmtree(study / stage)
    store = study / "datasets/ala.zarr"
    replace = os.replace

    def refuse_second_chunk(source: Any, target: Any, **options: Any) -> None:
        if str(target).endswith("hvps/c/1/0/0/0"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target, **options)

    with monkeypatch.context() as full:
        for name in ("replace", "rename"):
            full.setattr(os, name, refuse_second_chunk)
        arguments = ("label", DEMO, "--out", study, "--quiet", *set_options())
        assert_refused(call_here(full, capsys, *arguments), "ala.zarr", "no space left on the disk")
    assert int(zarr.open_group(str(store), mode="r")["done"][...].sum()) == 64
    assert call_cli(*arguments).status == 0
    assert int(zarr.open_group(str(store), mode="r")["done"][...].sum()) == 80


def test_no_permission() -> None:
    """Nobody makes folders in sysfs, not even root."""
    assert_refused(call_cli("run", DEMO, "--out", "/sys/openmm-hvpcg"), "cannot write")
