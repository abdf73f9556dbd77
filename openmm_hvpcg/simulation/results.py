"""What a simulation's folder says: what is being run (``run.json``), how it ended (``result.json``)."""

from __future__ import annotations

import importlib.metadata
import json
import platform as host
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg._version import __version__
from openmm_hvpcg.errors import StudyError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.quiet import hide_c_output
from openmm_hvpcg.simulation.outputs import CHECKPOINT_NAME, ENERGIES_NAME
from openmm_hvpcg.storage import PathLike
from openmm_hvpcg.units import PS_PER_FS

STUDY_NAME = "run.json"
RESULT_NAME = "result.json"


@dataclass(frozen=True)
class SimulationResult:
    """What ``result.json`` holds.

    Attributes
    ----------
    stable : False if the run blew up; ``message`` then says where
    n_steps, n_frames : done, each replica
    simulated_ns : summed over replicas
    steps_per_second, ns_per_day : the latter summed over replicas
    trajectories : file names, one a replica, beside ``topology.pdb``
    seed, potential_hash, settings, versions : what it takes to run it again
    exchange : temperatures_K, acceptance (probability of swapping neighbours), n_swaps, round_trips; None without
    """

    stable: bool
    message: str
    n_steps: int
    n_frames: int
    replicas: int
    simulated_ns: float
    wall_time_s: float
    steps_per_second: float
    ns_per_day: float
    temperature_K: float
    backend: str
    platform: str
    torch_threads: int
    seed: int
    potential_hash: str
    trajectories: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    exchange: dict[str, Any] | None = None


@dataclass(frozen=True)
class Ladder:
    """Which temperature each frame of a run with replica exchange was sampled at, and its energy.

    Attributes
    ----------
    temperatures_K : coldest first
    states : (K, T) index of the temperature of each frame of each replica
    energies : (K, T) kJ/mol
    """

    temperatures_K: NDArray[np.float64]
    states: NDArray[np.int64]
    energies: NDArray[np.float64]


def load_result(folder: PathLike) -> SimulationResult:
    """Read ``result.json`` of a finished run."""
    path = Path(folder) / RESULT_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return SimulationResult(**{**content, "trajectories": tuple(content["trajectories"])})
    except FileNotFoundError as error:
        raise StudyError("no finished simulation", where=folder, hint="run the simulate stage") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(f"not a simulation result ({error})", where=path) from error


def load_run(folder: PathLike, topology: md.Topology) -> Frames:
    """The frames of a finished run, each replica a walker.

    Parameters
    ----------
    folder : of the run
    topology : of its molecule
    """
    result = load_result(folder)
    # The DCD reader talks on standard output.
    with hide_c_output():
        replicas = [md.load(str(Path(folder) / name), top=topology) for name in result.trajectories]
    return Frames(
        np.concatenate([r.xyz for r in replicas]),
        topology,
        result.temperature_K,
        np.repeat(np.arange(len(replicas)), [r.n_frames for r in replicas]),
        result.settings["save_every"] * result.settings["timestep_fs"] * PS_PER_FS,
    )


def load_ladder(folder: PathLike) -> Ladder | None:
    """Temperatures and energies of the frames of a finished run; None without replica exchange."""
    result, path = load_result(folder), Path(folder) / ENERGIES_NAME
    if result.exchange is None:
        return None
    try:
        log = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))
        columns = [f"{k:03d}" for k in range(result.replicas)]
        states = np.array([log[f"state_{k}"] for k in columns]).astype(np.int64)
        energies = np.array([log[f"potential_energy_kJ_per_mol_{k}"] for k in columns])
    except (OSError, ValueError) as error:
        raise StudyError(f"the energies cannot be read ({error})", where=path) from error
    if states.shape[1] != result.n_frames or not np.isfinite(energies).all():
        raise StudyError("the energies do not fit the frames", expected=f"{result.n_frames} complete lines", where=path)
    return Ladder(np.array(result.exchange["temperatures_K"]), states, energies)


def read_study(folder: Path, study: dict[str, Any]) -> dict[str, Any] | None:
    """The stored run of ``folder`` if there is one and it is this one; None for a folder free to use."""
    path = folder / STUDY_NAME
    if not path.exists():
        names = (RESULT_NAME, ENERGIES_NAME, CHECKPOINT_NAME, "replica_000.dcd", "replica_000.xtc")
        found = [name for name in names if (folder / name).exists()]
        if found:
            raise StudyError(
                f"the folder holds {found[0]} of an unknown run", where=folder, hint="choose another folder"
            )
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        old = {**stored["study"]["settings"], **{k: v for k, v in stored["study"].items() if k != "settings"}}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(f"not a description of a run ({error})", where=path) from error
    new = {**study["settings"], **{k: v for k, v in study.items() if k != "settings"}}
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        raise StudyError(
            "the folder holds a run with another " + ", ".join(differing),
            expected=", ".join(f"{k} {_shorten(old.get(k))}" for k in differing),
            got=", ".join(f"{k} {_shorten(new.get(k))}" for k in differing),
            where=folder,
            hint="choose another folder, or remove this one to run anew",
        )
    return stored


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."


def collect_versions() -> dict[str, str]:
    versions = {"openmm-hvpcg": __version__, "python": host.python_version()}
    for name in ("openmm", "torch", "openmmtorch", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
