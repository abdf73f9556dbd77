"""The protocol YAML: one validated model per section, every default in sight.

:func:`load_protocol` reads a file, applies ``--set`` overrides and returns a :class:`Protocol`. Anything
wrong is a :class:`~openmm_hvpcg.errors.ConfigError` of one line that names the key; an unknown key names the
closest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from openmm_hvpcg.errors import ConfigError
from openmm_hvpcg.storage import PathLike

Precision = Literal["auto", "single", "mixed", "double"]


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Numbers in text are welcome (YAML reads 1e-3 as text), but yes, no, on and off are not 1 and 0.
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and field.annotation is not bool:
            raise ValueError(f"expected no true or false, got {value}")
        return value


#: Keys a molecule comes from, those that need coordinates, and those that other keys go with.
SOURCES = ("sequence", "prmtop", "top", "psf", "system_xml", "pdb")
WITH_COORDINATES = ("prmtop", "top", "psf")
_ONLY_WITH = {
    "coordinates": WITH_COORDINATES,
    "include_folder": ("top",),
    "parameters": ("psf",),
    "box_nm": ("psf",),
    "remove": ("pdb",),
    "replace": ("pdb",),
}


class InputSettings(Settings):
    """Where a molecule comes from: exactly one of sequence, pdb, prmtop, top, psf, system_xml (with pdb)."""

    sequence: str | None = Field(None, description="one-letter peptide sequence")
    caps: bool = Field(True, description="ACE and NME caps on the peptide")
    start: Literal["extended", "helix"] = Field("extended", description="start structure of the peptide")
    pdb: str | None = Field(None, description="PDB file")
    prmtop: str | None = Field(None, description="Amber topology")
    top: str | None = Field(None, description="GROMACS topology")
    include_folder: str | None = Field(None, description="GROMACS: folder of the files the topology includes")
    psf: str | None = Field(None, description="CHARMM topology; needs parameters")
    parameters: list[str] | None = Field(None, description="CHARMM parameter files (rtf, prm, str)")
    coordinates: str | None = Field(None, description="of prmtop (inpcrd, rst7), top (gro, pdb) or psf (crd, pdb)")
    box_nm: list[float] | None = Field(
        None, min_length=3, max_length=3, description="edges of the box of psf, where its coordinates have none"
    )
    system_xml: str | None = Field(None, description="serialized openmm.System; needs pdb")
    remove: list[str] = Field([], description="residues of pdb to leave out, by name, such as HOH")
    replace: list[str] = Field(
        [], description="modified residues of pdb, by name, that lose what modifies them, as SEP, which becomes SER"
    )
    repair: bool = Field(True, description="add atoms a pdb lacks, replace residues such as MSE; false: refuse it")
    ph: float = Field(7.0, ge=0, le=14, description="pH that hydrogens are added at")
    force_field: str | list[str] = Field("amber14", description="amber14, amber99sbildn, charmm36 or OpenMM XML files")
    solvent: Literal["vacuum", "obc2", "explicit"] = Field("obc2", description="solvent model")
    hydrogen_mass_amu: float | None = Field(None, ge=1.0, le=4.0, description="hydrogen mass repartitioning")
    padding_nm: float = Field(1.0, gt=0, description="explicit solvent: distance from solute to box edge")
    ionic_strength_molar: float = Field(0.0, ge=0, description="explicit solvent: salt beyond neutralisation")
    trajectory: list[str] | None = Field(None, description="take frames from these files instead of sampling")
    trajectory_interval_ps: float | None = Field(None, gt=0, description="time between their frames, if files lack it")
    trajectory_stride: int = Field(1, ge=1, description="every so many of their frames")
    trajectory_frames: int | None = Field(None, ge=1, description="at most so many of these; null: all")
    trajectory_choice: Literal["time", "cluster"] = Field(
        "time", description="time: evenly spaced; cluster: evenly over slow coordinates of the beads, to train on only"
    )

    @field_validator("trajectory", "parameters", "remove", "replace", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> InputSettings:
        given = [k for k in SOURCES if getattr(self, k) is not None]
        if self.system_xml is not None and self.pdb is not None:
            given.remove("pdb")
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(SOURCES)}, got {', '.join(given) or 'none'}")
        source = given[0]
        if source in WITH_COORDINATES and self.coordinates is None:
            raise ValueError(f"{source} and coordinates go together")
        if self.system_xml is not None and self.pdb is None:
            raise ValueError("system_xml needs pdb for its topology and positions")
        if self.psf is not None and not self.parameters:
            raise ValueError("psf needs parameters, the CHARMM parameter files")
        if self.box_nm is not None and min(self.box_nm) <= 0:
            raise ValueError(f"box_nm: expected edges above 0, got {', '.join(f'{e:g}' for e in self.box_nm)}")
        for key, sources in _ONLY_WITH.items():
            if getattr(self, key) and source not in sources:
                raise ValueError(f"{' or '.join(sources)} and {key} go together")
        return self

    @model_validator(mode="after")
    def _choice_of_frames(self) -> InputSettings:
        for key, before in INPUT_BEFORE.items():
            if self.trajectory is None and getattr(self, key) != before:
                raise ValueError(f"trajectory and {key} go together")
        if self.trajectory_choice == "cluster" and self.trajectory_frames is None:
            raise ValueError("trajectory_choice: cluster needs trajectory_frames, how many frames to take")
        return self

    def list_files(self) -> list[str]:
        """Names of the files the molecule is built from, its own force-field XMLs and trajectories among them."""
        own = [self.force_field] if isinstance(self.force_field, str) else self.force_field
        names = [self.pdb, self.prmtop, self.top, self.psf, self.coordinates, self.system_xml]
        names += [*(self.parameters or []), *(self.trajectory or []), *(n for n in own if n.endswith(".xml"))]
        return [name for name in names if name is not None]


#: What molecules sampled before these keys existed were made with.
INPUT_BEFORE: dict[str, Any] = {"trajectory_stride": 1, "trajectory_frames": None, "trajectory_choice": "time"}


class MoleculeSettings(Settings):
    """One molecule of the study."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names its files")
    role: Literal["train", "test", "both"] = Field(
        "both",
        description="train: trained on only; test: sampled, simulated, compared, never trained on; both",
    )
    input: InputSettings
    native_pdb: str | None = Field(None, description="native structure, for RMSD")


class SamplingSettings(Settings):
    """AA molecular dynamics."""

    n_frames: int = Field(4000, ge=1, description="frames in all, over all walkers")
    stride: int = Field(250, ge=1, description="MD steps between frames")
    timestep_fs: float = Field(2.0, gt=0, le=10)
    friction_per_ps: float = Field(1.0, gt=0)
    walkers: int = Field(2, ge=1, description="independent trajectories")
    walkers_in: Literal["auto", "processes", "one_system"] = Field(
        "auto",
        description="one_system: copies that do not feel each other, for small molecules on a GPU; auto: there, else"
        " processes",
    )
    equilibration_steps: int = Field(20000, ge=0, description="steps of each walker before its first frame")
    constraints: Literal["none", "hbonds", "allbonds"] = "hbonds"
    flexible_beads: bool = Field(
        False,
        description="bonds of atoms that carry beads stay flexible: needed by reference and conditional averaging",
    )
    platform: str = Field("auto", description="auto measures; or Reference, CPU, CUDA, OpenCL, HIP")
    precision: Precision = "auto"
    seed: int = Field(1, ge=0, le=2**31 - 1)


class MappingSettings(Settings):
    """Atoms to beads."""

    beads: str | dict[str, str] = Field(
        "ca",
        description="ca; ca+cb, C-beta too; ca+caps, methyl carbons of the caps too; backbone; heavy; an mdtraj"
        " selection; or {json: FILE}",
    )

    ends: bool = Field(
        False, description="beads of a chain's first and last residue are species of their own, so that its ends differ"
    )

    @field_validator("beads")
    @classmethod
    def _json_only(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(value, dict) and set(value) != {"json"}:
            raise ValueError("expected a preset, an mdtraj selection or {json: FILE}")
        return value

    @model_validator(mode="after")
    def _ends_are_not_in_a_file(self) -> MappingSettings:
        if self.ends and isinstance(self.beads, dict):
            raise ValueError("ends: a JSON map names the species of its beads itself")
        return self


class AveragingSettings(Settings):
    """Conditional averaging: labels that are means over samples of the hidden atoms, the beads of a frame held."""

    n_samples: int = Field(20, ge=4, description="samples a frame")
    stride: int = Field(5, ge=1, description="MD steps between samples")
    hvp_every: int = Field(4, ge=1, description="HVPs at every so many samples")
    timestep_fs: float = Field(2.0, gt=0, le=10)
    friction_per_ps: float = Field(5.0, gt=0)


class LabelSettings(Settings):
    """Projected forces and Hessian-vector products."""

    force_map: Literal["slice", "harmonic", "optimal", "optimal_cv"] = Field(
        "optimal_cv", description="harmonic: smooth along bonds; optimal: fitted; optimal_cv: between the two"
    )
    probes_per_frame: int = Field(4, ge=1)
    probe_law: Literal["rademacher", "normal", "soft"] = Field(
        "rademacher", description="soft: modes of an elastic network on the beads, the softer the larger"
    )
    probe_modes: int | None = Field(None, ge=1, description="soft: only so many softest modes")
    probe_translations: Literal["keep", "remove"] = Field("keep", description="remove: probes of zero mean")
    step_nm: float | Literal["auto"] = Field("auto", description="largest atom displacement of a finite difference")
    max_frames: int | None = Field(None, ge=1, description="label at most this many frames, evenly spaced")
    averaging: AveragingSettings | None = Field(None, description="conditional averaging; null: labels of the frames")
    platform: str = Field("auto", description="auto measures; or Reference, CPU, CUDA, OpenCL, HIP")
    precision: Precision = "auto"
    workers: int | Literal["auto"] = Field("auto", description="OpenMM Contexts working at once")
    seed: int = Field(2, ge=0, le=2**31 - 1)

    @field_validator("step_nm")
    @classmethod
    def _step_range(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 1e-8 <= value <= 0.05:
            raise ValueError("expected auto or 1e-8 to 0.05 nm")
        return value

    @field_validator("workers")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if not isinstance(value, str) and value < 1:
            raise ValueError("expected auto or at least 1")
        return value

    @model_validator(mode="after")
    def _modes_are_soft(self) -> LabelSettings:
        if self.probe_modes is not None and self.probe_law != "soft":
            raise ValueError("probe_modes goes with probe_law: soft")
        return self


#: What labels made before these keys existed were made with.
LABELS_BEFORE: dict[str, Any] = {"probe_modes": None, "probe_translations": "keep", "averaging": None}


class ReferenceSettings(Settings):
    """PMF reference: mean forces and CG Hessians with the beads held; ``run`` makes one where the section is given."""

    n_frames: int = Field(64, ge=1, description="configurations, evenly spaced over the frames")
    n_samples: int = Field(1000, ge=20, description="samples of the hidden atoms at each")
    stride: int = Field(5, ge=1, description="MD steps between samples")
    hvp_every: int = Field(4, ge=1, description="HVPs at every so many samples")
    probes: int | Literal["full"] = Field("full", description="full: the whole CG Hessian; or probes a configuration")
    blocks: int = Field(10, ge=2, description="stretches of each chain, for standard errors")
    timestep_fs: float = Field(2.0, gt=0, le=10)
    friction_per_ps: float = Field(5.0, gt=0)
    ladder_K: list[float] = Field(
        default_factory=list,
        description="replica exchange of the hidden atoms with chains at these higher temperatures; [] for none",
    )
    equilibration_steps: int = Field(0, ge=0, description="MD steps of each chain before its first sample")
    platform: str = Field("auto", description="auto measures; or Reference, CPU, CUDA, OpenCL, HIP")
    workers: int | Literal["auto"] = Field("auto", description="processes at once")
    seed: int = Field(5, ge=0, le=2**31 - 1)

    @field_validator("probes", "workers")
    @classmethod
    def _at_least_one(cls, value: int | str, info: ValidationInfo) -> int | str:
        if not isinstance(value, str) and value < 1:
            raise ValueError(f"expected {'full' if info.field_name == 'probes' else 'auto'} or at least 1")
        return value

    @field_validator("ladder_K")
    @classmethod
    def _upwards(cls, value: list[float]) -> list[float]:
        if any(b <= a for a, b in zip([0.0, *value], value, strict=False)):
            raise ValueError(f"expected temperatures upwards, got {value}")
        return value

    @model_validator(mode="after")
    def _enough_samples(self) -> ReferenceSettings:
        if -(-self.n_samples // self.hvp_every) < self.blocks:
            raise ValueError(f"fewer HVP samples ({-(-self.n_samples // self.hvp_every)}) than blocks ({self.blocks})")
        return self


#: What references made before these keys existed were made with.
REFERENCE_BEFORE: dict[str, Any] = {"ladder_K": [], "equilibration_steps": 0}


class PriorSettings(Settings):
    """Which prior terms are fitted and used."""

    bonds: bool = True
    angles: bool = True
    dihedrals: bool = True
    repulsion: bool = True
    angle_walls: bool = Field(True, description="keep angles from becoming straight where no frame has them so")
    min_molecules: int = Field(
        2,
        ge=1,
        description="species combined in fewer training molecules (or in fewer than there are) share general"
        " parameters, as they do in molecules never trained on",
    )

    def limit_to(self, n_molecules: int) -> PriorSettings:
        """These settings as they act on so many training molecules: no more can be asked for than there are."""
        return self.model_copy(update={"min_molecules": min(self.min_molecules, n_molecules)})


#: What priors fitted before these keys existed were fitted with.
PRIORS_BEFORE: dict[str, Any] = {"min_molecules": 1, "angle_walls": False}


class ModelSettings(Settings):
    """The network: schnet, painn, or one's own (:mod:`openmm_hvpcg.training.models.registry`)."""

    #: The package's own networks.
    KINDS: ClassVar[tuple[str, ...]] = ("schnet", "painn")

    kind: str = Field(
        "schnet",
        description="schnet: distances; painn: angles and dihedrals too; or package.module:Name, a network of your own",
    )
    features: int = Field(64, ge=1)
    interactions: int = Field(2, ge=1)
    radial: int = Field(20, ge=2, description="radial basis functions")
    cutoff_nm: float = Field(1.2, gt=0)
    torsions: bool = Field(True, description="beside it, a small network of the dihedral angles along the bonds")
    chiral_channels: int = Field(
        0, ge=0, description="triple products by which the network tells a molecule from its mirror image; 0: it cannot"
    )
    options: dict[str, Any] | None = Field(None, description="what a network of your own is built with besides these")

    @field_validator("kind", mode="before")
    @classmethod
    def _name_of_a_class(cls, value: Any) -> Any:
        """A class or function, as Python code would hand it over, is recorded by where it can be imported."""
        if isinstance(value, str) or not callable(value):
            return value
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if module is None or name is None or "<" in name:
            raise ValueError(
                f"expected a class or function that can be imported, got {value!r}; define it at the top of a module"
            )
        return f"{module}:{name}"

    @field_validator("kind")
    @classmethod
    def _known_or_importable(cls, value: str) -> str:
        module, separator, name = value.partition(":")
        parts = [*module.split("."), *name.split(".")]
        if value not in cls.KINDS and not (separator and all(part.isidentifier() for part in parts)):
            known = ", ".join(repr(kind) for kind in cls.KINDS)
            close = difflib.get_close_matches(value, cls.KINDS, n=1, cutoff=0.5)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"expected {known} or package.module:Name, got {value!r}{meant}")
        return value

    @model_validator(mode="after")
    def _options_are_foreign(self) -> ModelSettings:
        if self.options is not None and not self.is_foreign:
            raise ValueError(f"options go with a network of your own, not with kind: {self.kind}")
        return self

    @property
    def is_foreign(self) -> bool:
        """Whether the network comes from outside the package."""
        return self.kind not in self.KINDS


class ArmSettings(Settings):
    """One training arm: its name, and overrides of any key of ``training`` and ``model``."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


class TrainingSettings(Settings):
    """Force matching and Hessian matching."""

    arms: list[ArmSettings] = Field(
        default_factory=lambda: [
            ArmSettings.model_validate({"name": "fm", "hvp_weight": 0.0}),
            ArmSettings.model_validate({"name": "hvp", "hvp_weight": 1.0}),
        ]
    )
    force_weight: float = Field(1.0, ge=0)
    hvp_weight: float | Literal["balanced"] = Field(
        0.0, description="balanced: each term weighs by what its own noise leaves of its information"
    )
    hvp_start: float = Field(0.0, ge=0, lt=1, description="share of the epochs with forces alone, before the HVPs")
    covariance: Literal["auto", "frame", "pooled", "sample"] = Field(
        "auto",
        description="of the HVP target: frame, each frame's own; pooled, mixed with that of frames alike; sample, of"
        " inner samples (conditional averaging); auto: sample where the labels have it, else pooled",
    )
    covariance_frames: float = Field(
        50000.0, gt=0, description="pooled: with so many training frames, a frame's own covariance counts half"
    )
    covariance_regions: int = Field(4, ge=1, description="pooled: regions of the soft coordinates")
    whiten: Literal["none", "noise"] = Field(
        "none", description="noise: residuals count by the noise of their direction"
    )
    density: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of what is learnt of mean forces, but along bonds, from the density of the frames instead of"
        " from projected forces; they must be an equilibrium ensemble; about 0.9 for C-alpha beads, 0.4 for backbone"
        " beads",
    )
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["plateau", "cosine"] = Field(
        "plateau", description="of the learning rate: halved when validation stalls, or a cosine to the last epoch"
    )
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    max_epochs: int = Field(200, ge=1)
    patience: int = Field(
        20,
        ge=1,
        description="plateau: epochs without a better validation loss before stopping; a cosine runs on",
    )
    frames_per_molecule: int | None = Field(
        None, ge=2, description="at most so many frames of each molecule, evenly spaced over its walkers; null: all"
    )
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    validation_blocks: int = Field(5, ge=1, description="time blocks that make up the validation set")
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = Field(1, ge=1, description="GPUs, or processes on CPUs, that share every batch")
    memory_gb: float | None = Field(
        None, gt=0, description="labels larger than this are read from files as they are needed; null: all in memory"
    )
    seed: int = Field(3, ge=0, le=2**31 - 1)

    @field_validator("hvp_weight")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value < 0:
            raise ValueError(f"expected balanced, or a number of at least 0, got {value}")
        return value

    @model_validator(mode="after")
    def _density_alone(self) -> TrainingSettings:
        if self.density > 0 and self.whiten != "none":
            raise ValueError("density and whiten: noise exclude each other, choose one")
        return self

    @model_validator(mode="after")
    def _unique_arms(self) -> TrainingSettings:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"arms need at least one entry and distinct names, got {names}")
        return self


#: What trainings made before these keys existed were made with.
TRAINING_BEFORE: dict[str, Any] = {
    "hvp_start": 0.0,
    "covariance": "frame",
    "covariance_frames": TrainingSettings.model_fields["covariance_frames"].default,
    "covariance_regions": TrainingSettings.model_fields["covariance_regions"].default,
    "whiten": "none",
    "density": 0.0,
    "schedule": "plateau",
    "frames_per_molecule": None,
    "devices": 1,
}
#: What networks trained before these keys existed were built with.
MODEL_BEFORE: dict[str, Any] = {"options": None, "torsions": False, "chiral_channels": 0}
#: Keys of a training that change nothing of its result.
TRAINING_FREE = ("memory_gb",)


class ExportSettings(Settings):
    """The potential file."""

    tabulate: Literal["auto", "on", "off"] = Field(
        "auto",
        description="radial filters as splines, many times as fast: auto, where their error is below 1e-5; on insists",
    )


class ExchangeSettings(Settings):
    """Replica exchange of a CG simulation with hotter copies of itself."""

    hottest_K: float = Field(
        450.0, gt=0, le=2000, description="temperatures rise from the study's to this one in equal ratios"
    )
    temperatures: int = Field(6, ge=2, description="how many, with the study's; each is one copy")
    every: int = Field(50, ge=1, description="steps between swaps")


class SimulationSettings(Settings):
    """CG molecular dynamics."""

    replicas: int = Field(32, ge=1, description="independent copies in one System; with exchange, its temperatures")
    exchange: ExchangeSettings | None = Field(None, description="off: no replica exchange in temperature")
    n_steps: int = Field(100000, ge=1)
    timestep_fs: float = Field(4.0, gt=0, le=50)
    friction_per_ps: float = Field(1.0, gt=0)
    save_every: int = Field(100, ge=1)
    trajectory_format: Literal["dcd", "xtc"] = "dcd"
    backend: Literal["auto", "torchforce", "pythonforce"] = "auto"
    priors: Literal["native", "torch"] = "native"
    platform: str = Field("auto", description="auto measures; or Reference, CPU, CUDA, OpenCL, HIP")
    seed: int = Field(4, ge=0, le=2**31 - 1)

    @model_validator(mode="before")
    @classmethod
    def _one_copy_a_temperature(cls, content: Any) -> Any:
        exchange = content.get("exchange") if isinstance(content, dict) else None
        if isinstance(exchange, ExchangeSettings):
            exchange = exchange.model_dump()
        if not isinstance(exchange, dict) or "replicas" in content:
            return content
        n_temperatures = exchange.get("temperatures", ExchangeSettings().temperatures)
        return {**content, "replicas": n_temperatures} if isinstance(n_temperatures, int) else content

    @model_validator(mode="after")
    def _saves_something(self) -> SimulationSettings:
        if self.save_every > self.n_steps:
            raise ValueError(f"save_every ({self.save_every}) is larger than n_steps ({self.n_steps})")
        return self

    @model_validator(mode="after")
    def _exchange_fits(self) -> SimulationSettings:
        if self.exchange is None:
            return self
        if self.replicas != self.exchange.temperatures:
            raise ValueError(
                f"exchange simulates one copy at each of its {self.exchange.temperatures} temperatures: leave replicas"
                f" out, or set it to that, got {self.replicas}"
            )
        for key in ("save_every", "n_steps"):
            if getattr(self, key) % self.exchange.every:
                raise ValueError(
                    f"{key} ({getattr(self, key)}) is no multiple of exchange.every ({self.exchange.every})"
                )
        return self


class AnalysisSettings(Settings):
    """Comparison with the AA reference."""

    features: Literal["distances", "dihedrals", "distances+dihedrals"] = "distances"
    lag_frames: int = Field(10, ge=1, description="TICA lag, in frames of the reference")
    bins: int = Field(50, ge=5, description="state bins an axis along the slow modes")
    burn_in: float = Field(0.1, ge=0, lt=0.9, description="share of each CG replica left out")
    blocks: int = Field(5, ge=2, description="blocks for statistical errors")


class Protocol(Settings):
    """A whole study."""

    temperature_K: float = Field(300.0, gt=0, le=2000)
    molecules: list[MoleculeSettings] = Field(min_length=1)
    sampling: SamplingSettings = SamplingSettings()
    mapping: MappingSettings = MappingSettings()
    labels: LabelSettings = LabelSettings()
    reference: ReferenceSettings | None = None
    priors: PriorSettings = PriorSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    export: ExportSettings = ExportSettings()
    simulation: SimulationSettings = SimulationSettings()
    analysis: AnalysisSettings = AnalysisSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Protocol:
        names = [m.name for m in self.molecules]
        if len(set(names)) != len(names):
            raise ValueError(f"molecules need distinct names, got {names}")
        if self.sampling.walkers > self.sampling.n_frames:
            raise ValueError(
                f"sampling: fewer frames ({self.sampling.n_frames}) than walkers ({self.sampling.walkers})"
            )
        if all(m.role == "test" for m in self.molecules):
            raise ValueError("no molecule to train on: give at least one the role train or both")
        compared = [m for m in self.molecules if m.role != "train"] or self.molecules
        biased = next((m.name for m in compared if m.input.trajectory_choice == "cluster"), None)
        if biased is not None:
            raise ValueError(
                f"molecule {biased} is compared with, and frames chosen by cluster are not distributed as its ensemble"
                " is: give it the role train, and the role test to a molecule with frames sampled or chosen by time"
                " (the same input under another name will do)"
            )
        exchange = self.simulation.exchange
        if exchange is not None and exchange.hottest_K <= self.temperature_K:
            raise ValueError(
                f"simulation.exchange.hottest_K ({exchange.hottest_K:g}) is not above temperature_K"
                f" ({self.temperature_K:g})"
            )
        chosen = next((m.name for m in self.molecules if m.input.trajectory_choice == "cluster"), None)
        for arm in self.training.arms:
            training, _ = resolve_arm(self, arm.name)
            if training.density > 0 and chosen is not None:
                raise ValueError(
                    f"arm {arm.name} learns from the density of the frames (training.density), and frames of molecule"
                    f" {chosen} chosen by cluster are not distributed as its ensemble is: choose them by time, or leave"
                    " density out"
                )
        return self


def resolve_arm(protocol: Protocol, name: str) -> tuple[TrainingSettings, ModelSettings]:
    """Training and model settings of one arm, its overrides applied.

    Raises
    ------
    ConfigError
        No such arm, or an override that is not a key of ``training`` or ``model`` or has a wrong value.
    """
    arm = next((a for a in protocol.training.arms if a.name == name), None)
    if arm is None:
        raise ConfigError("no such arm", expected=[a.name for a in protocol.training.arms], got=name)
    training = protocol.training.model_dump()
    training["arms"] = [{"name": name}]
    model = protocol.model.model_dump()
    for key, value in (arm.model_extra or {}).items():
        if key in ModelSettings.model_fields:
            model[key] = value
        elif key in TrainingSettings.model_fields and key != "arms":
            training[key] = value
        else:
            known = [*ModelSettings.model_fields, *TrainingSettings.model_fields]
            raise ConfigError(f"arm {name}: unknown key {key!r}{_closest(key, known)}")
    try:
        resolved = TrainingSettings.model_validate(training), ModelSettings.model_validate(model)
    except ValidationError as error:
        raise ConfigError(f"arm {name}: {_explain(error, TrainingSettings)}") from error
    if resolved[0].force_weight == resolved[0].hvp_weight == 0:
        raise ConfigError(f"arm {name}: force_weight and hvp_weight are both 0, so nothing is trained")
    return resolved


def load_protocol(path: PathLike, overrides: Sequence[str] = ()) -> Protocol:
    """Read and validate a protocol YAML.

    Parameters
    ----------
    path : the YAML file
    overrides : ``section.key=value`` each, value YAML; ``molecules.0.input.sequence=AA`` reaches into lists
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such protocol file", where=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from error
    content = _parse_yaml(text, path)
    if not isinstance(content, dict):
        raise ConfigError("not a protocol", expected="sections with keys", got=type(content).__name__, where=path)
    for override in overrides:
        _apply_override(content, override)
    return validate_protocol(content, where=path)


def validate_protocol(content: dict[str, Any], where: object = None) -> Protocol:
    """Validate parsed YAML; errors name the key."""
    try:
        return Protocol.model_validate(content)
    except ConfigError as error:
        raise ConfigError(str(error), where=where) from error
    except ValidationError as error:
        raise ConfigError(_explain(error, Protocol), where=where) from error


def dump_protocol(protocol: Protocol) -> str:
    """The protocol as YAML with every default written out."""
    return yaml.safe_dump(protocol.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def describe_defaults() -> str:
    """All sections with their defaults as YAML, each key's meaning as a comment."""
    lines = ["temperature_K: 300.0", "molecules:   # required", "  - name: NAME"]
    molecule = MoleculeSettings.model_fields
    lines.append(f"    role: {_show(molecule['role'])}")
    lines.append("    input:   # one of sequence, pdb, prmtop + coordinates, system_xml + pdb")
    lines += [f"      {key}: {_show(field)}" for key, field in InputSettings.model_fields.items()]
    lines.append(f"    native_pdb: {_show(molecule['native_pdb'])}")
    for name, field in Protocol.model_fields.items():
        if name in ("temperature_K", "molecules"):
            continue
        lines += _describe_section(name, field)
    return "\n".join(lines) + "\n"


def _describe_section(name: str, field: Any) -> list[str]:
    """A key and the keys below it; one that is off unless it is given has them as comments."""
    is_optional = type(None) in get_args(field.annotation)
    candidates = get_args(field.annotation) if is_optional else (field.annotation,)
    section = next((a for a in candidates if isinstance(a, type) and issubclass(a, BaseModel)), None)
    if section is None:
        return [f"{name}: {_show(field)}"]
    off = field.default is None
    head = f"{name}: null   # {field.description or 'off'}; on with any of these keys, or {{}}" if off else f"{name}:"
    below = [line for key, sub in section.model_fields.items() for line in _describe_section(key, sub)]
    return [head, *(f"{'#' if off else ' '} {line}" for line in below)]


def _show(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list):
        value = [v.model_dump() if isinstance(v, BaseModel) else v for v in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()
    return f"{text}   # {field.description}" if field.description else text


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: object) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    # A date that does not exist is a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not YAML ({error})", where=where) from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("cannot read --set", expected="section.key=value", got=override)
    value = _parse_yaml(text, f"--set {key}")
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"--set {key}: there is no {part!r} to set")
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {key}: there is no {last!r} to set")


def _closest(key: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known keys: {', '.join(known)}"


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line of all problems, each with its key."""
    lines: dict[str, None] = {}
    for item in error.errors():
        location = item["loc"]
        key = ".".join(str(part) for part in location if not _is_union_tag(part))
        if item["type"] == "extra_forbidden":
            known = _fields_at(root, location[:-1])
            lines[f"unknown key {key!r}{_closest(str(location[-1]), known)}"] = None
        elif item["type"] == "missing":
            lines[f"{key}: missing"] = None
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = re.sub(r"a valid dictionary or instance of \w+", "a section with keys", message)
            got = "" if item["type"] == "value_error" else f", got {_shorten(item['input'])}"
            lines[f"{key}: {message[:1].lower()}{message[1:]}{got}" if key else message] = None
    return "; ".join(lines)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part in ("str", "int", "float") or part.startswith(("literal[", "list[", "dict[", "constrained-"))
    )


def _fields_at(root: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names of the fields of the model found by walking ``location`` from ``root``."""
    model: Any = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        arguments = getattr(annotation, "__args__", ())
        model = next((a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)), annotation)
    return list(model.model_fields)
