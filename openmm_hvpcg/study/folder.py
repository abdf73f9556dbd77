"""The output folder of a study: its layout, its lock, and the record of what each finished part was made from."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from openmm_hvpcg.atomistic.gromacs_includes import find_includes
from openmm_hvpcg.config import (
    INPUT_BEFORE,
    LABELS_BEFORE,
    MODEL_BEFORE,
    PRIORS_BEFORE,
    REFERENCE_BEFORE,
    SAMPLING_BEFORE,
    TRAINING_BEFORE,
    TRAINING_FREE,
    MoleculeSettings,
    Protocol,
    ReferenceSettings,
    dump_protocol,
    load_protocol,
    resolve_arm,
)
from openmm_hvpcg.errors import HVPCGError, StudyError
from openmm_hvpcg.storage import PathLike, explain_disk_errors, hash_file, write_json, write_text

if TYPE_CHECKING:
    from openmm_hvpcg.study.cluster import Cluster

CONFIG_NAME = "config.resolved.yaml"
LOG_NAME = "log.txt"
LOCK_NAME = ".lock"
RECORDS = "stages"
#: Before the name of a file in a record, whose value is its hash.
FILE = "file "

#: Settings that say where and how fast, not what: changing them keeps the results.
WITHOUT_EFFECT = {"platform", "workers", "walkers_in", "accelerator"}
#: What molecules are sampled with whose frames get no bias.
UNFLATTENED = {key: value for key, value in SAMPLING_BEFORE.items() if key.startswith("flatten")}
#: Settings younger than version 0.1.0, and what was done before there was a choice: records of older runs lack them.
BEFORE = {
    **{f"sampling.{key}": value for key, value in SAMPLING_BEFORE.items()},
    "mapping.ends": False,
    "mapping.share_backbone": False,
    "simulation.exchange": None,
    **{f"labels.{key}": value for key, value in LABELS_BEFORE.items()},
    **{f"reference.{key}": value for key, value in REFERENCE_BEFORE.items()},
    **{f"priors.{key}": value for key, value in PRIORS_BEFORE.items()},
    **{f"training.{key}": value for key, value in TRAINING_BEFORE.items()},
    **{f"model.{key}": value for key, value in MODEL_BEFORE.items()},
}


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
    cluster : where the units of a stage are done; None: one after the other in this process
    """

    protocol: Protocol
    base: Path
    out: Path
    progress: bool = True
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    cluster: Cluster | None = field(default=None, repr=False, compare=False)

    def frames_path(self, molecule: str) -> Path:
        return self.out / "frames" / f"{molecule}.zarr"

    def pilot_path(self, molecule: str) -> Path:
        """Frames without the bias that the others are sampled with."""
        return self.out / "frames" / f"{molecule}+pilot.zarr"

    def dataset_path(self, molecule: str) -> Path:
        return self.out / "datasets" / f"{molecule}.zarr"

    def reference_path(self, molecule: str) -> Path:
        return self.out / "references" / f"{molecule}.zarr"

    @property
    def evaluation_path(self) -> Path:
        return self.out / "evaluation.json"

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

    @property
    def reference_settings(self) -> ReferenceSettings:
        """Those of the protocol, or the defaults where it asks for no reference."""
        return self.protocol.reference or ReferenceSettings()

    def describe_unit(self, stage: str, unit: str) -> dict[str, Any]:
        """Everything the results of one unit of a stage depend on, flat: its own settings and those before it."""
        p = self.protocol
        if stage == "sample":
            molecule = next(m for m in p.molecules if m.name == unit)
            # Which bonds are flexible, which frames are alike, what is flattened.
            is_flattened = p.is_flattened(molecule)
            depends_on_beads = (
                p.sampling.flexible_beads or molecule.input.trajectory_choice == "cluster" or is_flattened
            )
            sampling = p.sampling if is_flattened else p.sampling.model_copy(update=UNFLATTENED)
            return {
                "temperature_K": p.temperature_K,
                **_flatten(f"{unit}.input", molecule.input),
                **self._hash_inputs(molecule),
                **_flatten("sampling", sampling),
                **(self._describe_mapping() if depends_on_beads else {}),
            }
        if stage == "label":
            own = _flatten("labels", p.labels)
            return {**self.describe_unit("sample", unit), **self._describe_mapping(), **own}
        if stage == "reference":
            own = _flatten("reference", self.reference_settings)
            return {**self.describe_unit("sample", unit), **self._describe_mapping(), **own}
        if stage == "train":
            training, model = resolve_arm(p, unit)
            priors = p.priors.limit_to(len(self.trained))
            own = {**_flatten("priors", priors), **_flatten("training", training), **_flatten("model", model)}
            for key in ("arms", *TRAINING_FREE):
                own.pop(f"training.{key}", None)
            before: dict[str, Any] = {}
            for molecule in self.trained:
                before |= self.describe_unit("label", molecule.name)
            return {**before, **own, "molecules trained on": [m.name for m in self.trained]}
        if stage == "export":
            return {f"{FILE}training.json": _hash(self.find_output("train", unit)), **_flatten("export", p.export)}
        if stage == "simulate":
            arm, molecule_name = unit.split("/")
            before = {**self.describe_unit("train", arm), **self.describe_unit("sample", molecule_name)}
            return {**before, **_flatten("simulation", p.simulation)}
        return self._describe_evaluation() if stage == "evaluate" else self._describe_report()

    def _describe_mapping(self) -> dict[str, Any]:
        beads = self.protocol.mapping.beads
        json_map = {f"{FILE}{beads['json']}": _hash(self.base / beads["json"])} if isinstance(beads, dict) else {}
        return {**_flatten("mapping", self.protocol.mapping), **json_map}

    def _describe_evaluation(self) -> dict[str, Any]:
        arms = {f"{FILE}{arm}": _hash(self.find_output("train", arm)) for arm in self.arms}
        # The header of a reference says what it was made from; the rest of it follows from that.
        headers = [self.reference_path(m.name) / "zarr.json" for m in self.judged]
        return {**arms, **{f"{FILE}{path.relative_to(self.out)}": _hash(path) for path in headers}}

    def _describe_report(self) -> dict[str, Any]:
        results = {
            **{f"{FILE}{arm}": _hash(self.model_folder(arm) / "training.json") for arm in self.arms},
            **{f"{FILE}{u}": _hash(self.find_output("simulate", u)) for u in self.list_units("simulate")},
            **{f"{FILE}{m.name}": _hash(self.base / m.native_pdb) for m in self.judged if m.native_pdb is not None},
        }
        if self.is_done("evaluate", "evaluation"):
            results[f"{FILE}{self.evaluation_path.name}"] = _hash(self.evaluation_path)
        return {**_flatten("analysis", self.protocol.analysis), **results}

    def _hash_inputs(self, molecule: MoleculeSettings) -> dict[str, Any]:
        """Hashes of the files a molecule is built from."""
        names = molecule.input.list_files()
        top, folder = molecule.input.top, molecule.input.include_folder
        if top is not None:
            names += [str(p) for p in find_includes(self.base / top, None if folder is None else self.base / folder)]
        return {f"{FILE}{_shorten(self.base, name)}": _hash(self.base / name) for name in names}

    def find_output(self, stage: str, unit: str, *, begun: bool = False) -> Path:
        """The file or folder that is there once a unit is finished, or as soon as it has ``begun``."""
        if stage == "sample":
            return self.frames_path(unit)
        if stage == "label":
            return self.dataset_path(unit)
        if stage == "reference":
            return self.reference_path(unit)
        if stage == "evaluate":
            return self.evaluation_path
        if stage == "train":
            return self.model_folder(unit) / ("made_from.json" if begun else "training.json")
        if stage == "export":
            return self.potential_path(unit)
        if stage == "simulate":
            return self.run_folder(*unit.split("/")) / ("run.json" if begun else "result.json")
        return self.report_folder / "summary.json"

    def is_done(self, stage: str, unit: str) -> bool:
        """Whether a unit's result is there, and still the one of what it was made from."""
        path = self._record_path(stage, unit)
        if not (path.exists() and self.find_output(stage, unit).exists()):
            return False
        # The other stages were compared when the study was opened; these are quick and made again.
        return stage not in ("export", "evaluate", "compare") or read_record(path) == self.describe_unit(stage, unit)

    def mark_begun(self, stage: str, unit: str) -> None:
        """Record the settings a unit is started with, so that it is not gone on with under other ones."""
        write_json(self._record_path(stage, f"{unit}/begun"), self.describe_unit(stage, unit))
        self._record_path(stage, unit).unlink(missing_ok=True)

    def mark_done(self, stage: str, unit: str) -> None:
        """Record that a unit is finished, and from which settings."""
        write_json(self._record_path(stage, unit), self.describe_unit(stage, unit))
        self._record_path(stage, f"{unit}/begun").unlink(missing_ok=True)

    def find_changes(self, stage: str, unit: str) -> list[str]:
        """Settings of a begun or finished unit that differ from the protocol's, as ``key (old -> new)``."""
        paths = [self._record_path(stage, name) for name in (f"{unit}/begun", unit)]
        found = next((path for path in paths if path.exists()), None)
        if found is None or not self.find_output(stage, unit, begun=True).exists():
            return []
        new = self.describe_unit(stage, unit)
        before = {f"{m.name}.input.{k}": v for m in self.protocol.molecules for k, v in INPUT_BEFORE.items()}
        old = {**BEFORE, **before, **read_record(found)}
        if stage == "reference" and self.protocol.reference is None:
            # Nothing is asked of a reference that there is.
            new = {k: v for k, v in new.items() if not k.startswith("reference.")}
        # A key of one side only is a molecule that left or came (their list tells), or another version of ours.
        return [_explain_change(k, old[k], new[k]) for k in old if k in new and old[k] != new[k]]

    def _record_path(self, stage: str, unit: str) -> Path:
        # No name holds a plus sign, so no two units share a record.
        return self.out / RECORDS / f"{stage}.{unit.replace('/', '+')}.json"

    def list_units(self, stage: str) -> list[str]:
        """Units of a stage: molecules, arms, or ``arm/molecule``."""
        if stage == "sample":
            return [m.name for m in self.protocol.molecules]
        if stage == "label":
            return [m.name for m in self.trained]
        if stage == "reference":
            return [m.name for m in self.judged]
        if stage == "evaluate":
            return ["evaluation"]
        if stage in ("train", "export"):
            return self.arms
        if stage == "simulate":
            return [f"{arm}/{m.name}" for m in self.judged for arm in self.arms]
        return ["report"]

    def list_molecules(self, stage: str, units: Sequence[str]) -> list[str]:
        """Molecules whose bead maps some units of a stage work with."""
        if stage == "sample" or not units:
            return []
        if stage in ("train", "export"):
            return [m.name for m in self.trained]
        return sorted({unit.split("/")[-1] for unit in units})


def open_study(
    protocol_path: PathLike, out: PathLike, overrides: Sequence[str] = (), *, progress: bool = True
) -> Study:
    """Validate a protocol against its output folder; nothing is written yet.

    Raises
    ------
    ConfigError
        The protocol is wrong.
    StudyError
        ``out`` holds something else, or results made with other settings.
    """
    protocol = load_protocol(protocol_path, overrides)
    study = Study(protocol, Path(protocol_path).absolute().parent, Path(out), progress)
    _check_folder(study)
    return study


@contextlib.contextmanager
def take_folder(study: Study) -> Iterator[None]:
    """Hold the output folder while a study runs: two runs at once would write over each other.

    A run that is refused before it has made anything leaves nothing behind.
    """
    existed, was_ours = study.out.exists(), (study.out / CONFIG_NAME).exists()
    with explain_disk_errors(study.out):
        try:
            study.out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StudyError("the output path runs through a file", where=study.out, hint="choose a folder") from error
        handle = open(study.out / LOCK_NAME, "w")  # noqa: SIM115
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(
                "another run is using this folder", where=study.out, hint="wait for it, or stop it"
            ) from error
        try:
            write_text(study.out / CONFIG_NAME, dump_protocol(study.protocol))
            yield
        except HVPCGError:
            if not was_ours:
                _remove_traces(study.out, existed)
            raise


def _remove_traces(out: Path, existed: bool) -> None:
    """Take away what says only that a run was tried; anything else in the folder stays, and they with it."""
    traces = {CONFIG_NAME, LOG_NAME, LOCK_NAME, RECORDS}
    if {path.name for path in out.iterdir()} - traces:
        return
    shutil.rmtree(out / RECORDS, ignore_errors=True)
    for path in out.iterdir():
        path.unlink()
    if not existed:
        out.rmdir()


def read_record(path: Path) -> dict[str, Any]:
    """A record of a study, or a :class:`StudyError` where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"the record is damaged ({error})", where=path, hint="delete it to repeat its stage"
        ) from error
    if not isinstance(content, dict):
        raise StudyError("the record is damaged", where=path, hint="delete it to repeat its stage")
    return content


def _check_folder(study: Study) -> None:
    out = study.out
    if out.exists() and not out.is_dir():
        raise StudyError("the output path is a file", where=out, hint="choose a folder")
    config = out / CONFIG_NAME
    if not config.exists():
        if out.exists() and any(path.name != LOCK_NAME for path in out.iterdir()):
            raise StudyError(
                "the output folder is not empty and holds no study", where=out, hint="choose a new or empty folder"
            )
        return
    try:
        names = {m["name"] for m in yaml.safe_load(config.read_text(encoding="utf-8"))["molecules"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
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
    for stage in ("sample", "label", "reference", "train", "simulate"):
        for unit in study.list_units(stage):
            changed = study.find_changes(stage, unit)
            if changed:
                raise StudyError(
                    f"the {stage} stage of {unit} was run with other settings: {', '.join(changed)}",
                    where=out,
                    hint="results of different settings are not mixed: choose another --out, set them back, or"
                    f" delete {_name_folder(study, stage, unit)} to make it again",
                )


def _name_folder(study: Study, stage: str, unit: str) -> Path:
    """What to delete to make a unit again, relative to the study."""
    output = study.find_output(stage, unit)
    return (output if stage in ("sample", "label", "reference") else output.parent).relative_to(study.out)


def _shorten(base: Path, name: str) -> str:
    """A name relative to ``base`` where it lies below it, so that a study can be moved."""
    return str(Path(name).relative_to(base)) if Path(name).is_absolute() and Path(name).is_relative_to(base) else name


def _explain_change(key: str, old: Any, new: Any) -> str:
    if key.startswith(FILE):
        return f"{key} ({'missing' if new is None else 'its contents changed'})"
    return f"{key} ({old} -> {new})"


def _flatten(prefix: str, settings: BaseModel) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    return {f"{prefix}.{k}": v for k, v in values.items() if k not in WITHOUT_EFFECT}


def _hash(path: Path) -> str | None:
    if not path.is_file():
        return None
    status = path.stat()
    return _hash_once(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1024)
def _hash_once(path: Path, mtime_ns: int, size: int) -> str:
    """The hash of a file that has not changed since it was last hashed; trajectories are large."""
    return hash_file(path)
