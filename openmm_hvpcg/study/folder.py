"""The output folder of a study: its layout, its lock, and the record of what each finished part was made from."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from openmm_hvpcg.config import MoleculeSettings, Protocol, dump_protocol, load_protocol, resolve_arm
from openmm_hvpcg.errors import StudyError
from openmm_hvpcg.storage import PathLike, explain_disk_errors, hash_file, write_json, write_text

CONFIG_NAME = "config.resolved.yaml"
LOG_NAME = "log.txt"
LOCK_NAME = ".lock"
RECORDS = "stages"

#: Settings that say where and how fast, not what: changing them keeps the results.
WITHOUT_EFFECT = {"platform", "workers", "accelerator"}


@dataclass(frozen=True)
class Study:
    """A protocol and the folder of its results.

    Attributes
    ----------
    protocol : Protocol
    base : the folder that paths in the protocol are relative to
    out : the output folder
    progress : show progress bars
    cache : all-atom systems built so far in this process
    """

    protocol: Protocol
    base: Path
    out: Path
    progress: bool = True
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def frames_path(self, molecule: str) -> Path:
        return self.out / "frames" / f"{molecule}.zarr"

    def dataset_path(self, molecule: str) -> Path:
        return self.out / "datasets" / f"{molecule}.zarr"

    def map_path(self, molecule: str) -> Path:
        return self.out / "mapping" / f"{molecule}.json"

    def model_folder(self, arm: str) -> Path:
        return self.out / "models" / arm

    def potential_path(self, arm: str) -> Path:
        return self.model_folder(arm) / "potential.pt"

    def run_folder(self, arm: str, molecule: str) -> Path:
        return self.out / "cg" / arm / molecule

    @property
    def report_folder(self) -> Path:
        return self.out / "report"

    @property
    def arms(self) -> list[str]:
        return [arm.name for arm in self.protocol.training.arms]

    @property
    def trained(self) -> list[MoleculeSettings]:
        """Molecules to train on."""
        return [m for m in self.protocol.molecules if m.role != "test"]

    @property
    def judged(self) -> list[MoleculeSettings]:
        """Molecules to simulate and compare: those to test on, or all where there are none."""
        return [m for m in self.protocol.molecules if m.role != "train"] or list(self.protocol.molecules)

    def describe_unit(self, stage: str, unit: str) -> dict[str, Any]:
        """The settings that the results of one unit of a stage depend on directly, flat."""
        p = self.protocol
        if stage == "sample":
            molecule = next(m for m in p.molecules if m.name == unit)
            return {
                "temperature_K": p.temperature_K,
                **_flatten(f"{unit}.input", molecule.input),
                **self._hash_inputs(molecule),
                **_flatten("sampling", p.sampling),
            }
        if stage == "label":
            beads = p.mapping.beads
            json_map = {"mapping file": _hash(self.base / beads["json"])} if isinstance(beads, dict) else {}
            return {**_flatten("mapping", p.mapping), **json_map, **_flatten("labels", p.labels)}
        if stage == "train":
            training, model = resolve_arm(p, unit)
            flat = {**_flatten("priors", p.priors), **_flatten("training", training), **_flatten("model", model)}
            flat.pop("training.arms", None)
            return {**flat, "molecules trained on": [m.name for m in self.trained]}
        if stage == "simulate":
            return _flatten("simulation", p.simulation)
        return {}

    def _hash_inputs(self, molecule: MoleculeSettings) -> dict[str, Any]:
        """Hashes of the files a molecule is built from."""
        source = molecule.input
        own = [source.force_field] if isinstance(source.force_field, str) else source.force_field
        names = [source.pdb, source.prmtop, source.coordinates, source.system_xml, *own, *(source.trajectory or [])]
        files = {n: self.base / n for n in names if n is not None and (self.base / n).is_file()}
        return {f"file {name}": _hash(path) for name, path in files.items()}

    def is_done(self, stage: str, unit: str) -> bool:
        return self._record_path(stage, unit).exists()

    def mark_done(self, stage: str, unit: str) -> None:
        """Record that a unit is finished, and from which settings."""
        write_json(self._record_path(stage, unit), self.describe_unit(stage, unit))

    def find_changes(self, stage: str, unit: str) -> list[str]:
        """Settings of a finished unit that differ from the protocol's, as ``key (old -> new)``."""
        path = self._record_path(stage, unit)
        if not path.exists():
            return []
        old, new = json.loads(path.read_text(encoding="utf-8")), self.describe_unit(stage, unit)
        return [f"{k} ({old.get(k)} -> {new.get(k)})" for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]

    def _record_path(self, stage: str, unit: str) -> Path:
        return self.out / RECORDS / f"{stage}.{unit.replace('/', '.')}.json"

    def list_units(self, stage: str) -> list[str]:
        """Units of a stage: molecules, arms, or ``arm/molecule``."""
        if stage == "sample":
            return [m.name for m in self.protocol.molecules]
        if stage == "label":
            return [m.name for m in self.trained]
        if stage in ("train", "export"):
            return self.arms
        if stage == "simulate":
            return [f"{arm}/{m.name}" for m in self.judged for arm in self.arms]
        return ["report"]


def open_study(
    protocol_path: PathLike, out: PathLike, overrides: Sequence[str] = (), *, progress: bool = True
) -> Study:
    """Validate a protocol and take its output folder.

    Raises
    ------
    ConfigError
        The protocol is wrong.
    StudyError
        ``out`` holds something else, or results made with other settings; nothing is changed then.
    """
    protocol = load_protocol(protocol_path, overrides)
    study = Study(protocol, Path(protocol_path).absolute().parent, Path(out), progress)
    _check_folder(study)
    with explain_disk_errors(study.out):
        study.out.mkdir(parents=True, exist_ok=True)
        write_text(study.out / CONFIG_NAME, dump_protocol(protocol))
    return study


@contextlib.contextmanager
def lock_study(study: Study) -> Iterator[None]:
    """Hold the folder: two runs at once would write over each other."""
    with explain_disk_errors(study.out), open(study.out / LOCK_NAME, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                "another run is using this folder", where=study.out, hint="wait for it, or stop it"
            ) from error
        yield


def _check_folder(study: Study) -> None:
    out = study.out
    if out.exists() and not out.is_dir():
        raise StudyError("the output path is a file", where=out, hint="choose a folder")
    config = out / CONFIG_NAME
    if not config.exists():
        if out.exists() and any(out.iterdir()):
            raise StudyError(
                "the output folder is not empty and holds no study", where=out, hint="choose a new or empty folder"
            )
        return
    try:
        names = {m["name"] for m in yaml.safe_load(config.read_text(encoding="utf-8"))["molecules"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise StudyError(f"{CONFIG_NAME} is damaged ({error})", where=out) from error
    asked = {m.name for m in study.protocol.molecules}
    if not names & asked:
        raise StudyError(
            "the output folder holds another study",
            expected=f"molecules {', '.join(sorted(asked))}",
            got=", ".join(sorted(names)),
            where=out,
            hint="choose another folder",
        )
    for stage in ("sample", "label", "train", "simulate"):
        for unit in study.list_units(stage):
            changed = study.find_changes(stage, unit)
            if changed:
                raise StudyError(
                    f"the {stage} stage of {unit} was run with other settings: {', '.join(changed)}",
                    where=out,
                    hint="results of different settings are not mixed: choose another --out, or set them back",
                )


def _flatten(prefix: str, settings: BaseModel) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    return {f"{prefix}.{k}": v for k, v in values.items() if k not in WITHOUT_EFFECT}


def _hash(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None
