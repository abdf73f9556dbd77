"""A finished study, made once: the demo protocol, shrunk, by the installed command in a process of its own."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cli_process import REPOSITORY

#: Shrinks a protocol to seconds. Reference: the one platform on which a run repeats bit for bit.
SHRINK = (
    "sampling.n_frames=80",
    "sampling.stride=20",
    "sampling.equilibration_steps=200",
    "sampling.walkers=2",
    "sampling.platform=Reference",
    "labels.probes_per_frame=2",
    "labels.platform=Reference",
    "model.features=8",
    "model.interactions=1",
    "model.radial=8",
    "training.max_epochs=3",
    "training.batch_size=16",
    "training.learning_rate=0.001",
    "simulation.replicas=2",
    "simulation.n_steps=200",
    "simulation.save_every=10",
    "simulation.platform=Reference",
)
#: The same for a protocol that asks for a PMF reference; setting a key of the section would turn it on in the others.
SHRINK_REFERENCE = (
    "reference.n_frames=3",
    "reference.n_samples=40",
    "reference.hvp_every=2",
    "reference.stride=1",
    "reference.platform=Reference",
)
#: Protocols with more or larger molecules than a test has time for, by folder: those that are left, and their roles.
#: Every species of the molecule to test on has to be in one to train on.
SHRINK_MOLECULES = {
    "fast_folders": {"chignolin": "test", "trp_cage": "train", "bba": "train"},
    "unseen_peptides": {"VDKR": "train", "SIHG": "train", "KSIV": "test"},
}
#: What else a protocol needs, by folder.
SHRINK_MORE = {
    "fast_folders": (
        "sampling.stride=5",
        "sampling.equilibration_steps=20",
        # Ten of its residues have the species that Trp-cage lacks; all of BBA takes 20 s to build.
        "molecules.2.input.sequence=EQYTAKYKGR",
        "simulation.exchange.temperatures=2",
        "simulation.exchange.every=10",
    ),
}
PROTOCOLS = sorted((REPOSITORY / "protocols").glob("*/protocol.yaml"))
DEMO = REPOSITORY / "protocols" / "alanine_dipeptide" / "protocol.yaml"


def set_options(*settings: str) -> list[str]:
    """``--set a --set b`` of settings, after those that shrink a protocol."""
    return [word for setting in (*SHRINK, *settings) for word in ("--set", setting)]


def shrink(protocol: Path) -> list[str]:
    """``--set a --set b`` of all that shrinks this protocol to seconds."""
    content = yaml.safe_load(protocol.read_text(encoding="utf-8"))
    folder = protocol.parent.name
    more = list(SHRINK_REFERENCE) if content.get("reference") is not None else []
    roles = SHRINK_MOLECULES.get(folder)
    if roles is not None:
        kept = [{**m, "role": roles[m["name"]]} for m in content["molecules"] if m["name"] in roles]
        more.append(f"molecules={yaml.safe_dump(kept, default_flow_style=True, width=math.inf).strip()}")
    return set_options(*more, *SHRINK_MORE.get(folder, ()))


@dataclass(frozen=True)
class Shown:
    """A protocol run by the installed command: where, and what it said."""

    protocol: Path
    out: Path
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def run_protocol(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Shown]:
    """Runs a shrunk protocol by the console script; each protocol once."""
    runs: dict[Path, Shown] = {}

    def run(protocol: Path) -> Shown:
        if protocol not in runs:
            out = tmp_path_factory.mktemp(protocol.parent.name) / "study"
            script = Path(sys.executable).with_name("openmm-hvpcg")
            done = subprocess.run(
                [str(script), "run", str(protocol), "--out", str(out), *shrink(protocol)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            runs[protocol] = Shown(protocol, out, done.returncode, done.stdout, done.stderr)
        return runs[protocol]

    return run


@pytest.fixture(scope="session")
def finished(run_protocol: Callable[[Path], Shown]) -> Path:
    """The folder of the finished demo study; not to be changed."""
    shown = run_protocol(DEMO)
    assert shown.status == 0, shown.stderr
    return shown.out


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished demo study."""
    return Path(shutil.copytree(finished, tmp_path / "study"))
