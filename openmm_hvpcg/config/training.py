"""Sections of training: priors, network, arms."""

from __future__ import annotations

import difflib
import shlex
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from openmm_hvpcg.config.base import Settings


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
    hvp_along: Literal["all", "bonds", "angles"] = Field(
        "all",
        description="directions that HVPs are matched along: all; bonds; angles: bonds and angles, where curvature is"
        " large beside the error of pooled covariances",
    )
    covariance: Literal["auto", "frame", "pooled", "ratio", "sample"] = Field(
        "auto",
        description="of the HVP target: frame, each frame's own; pooled, mixed with that of frames alike; ratio,"
        " pooled, and larger where the frame's Hessian is; sample, of inner samples (conditional averaging); auto:"
        " sample where the labels have it, else pooled",
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
    committee: int = Field(
        1,
        ge=1,
        description="networks trained one after the other, each from its own seed; their mean is the arm's",
    )
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["plateau", "cosine"] = Field(
        "plateau", description="of the learning rate: halved when validation stalls, or a cosine to the last epoch"
    )
    weight_decay: float = Field(0.0, ge=0)
    weight_averaging: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per step of a running mean of the network's weights, which is what is judged and kept; 0.999"
        " averages over about 1000 steps; 0: the weights themselves",
    )
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
    devices: int = Field(1, ge=1, description="GPUs, or processes on CPUs, that share every batch; of each machine")
    hosts: list[str] = Field(
        default_factory=list,
        description="other machines that share every batch, with as many devices each; they see the output folder and"
        " the Python environment at the same paths",
    )
    launch: str = Field("ssh {host}", description="what starts a command on one of the hosts")
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

    @field_validator("hosts")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value) or not all(value):
            raise ValueError(f"expected distinct names of machines other than this one, got {value}")
        return value

    @field_validator("launch")
    @classmethod
    def _names_the_host(cls, value: str) -> str:
        try:
            words = shlex.split(value.format(host="HOST"))
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"expected a command with {{host}} in it, got {value!r} ({error})") from error
        if not any("HOST" in word for word in words):
            raise ValueError(f"expected a command with {{host}} in it, such as 'ssh {{host}}', got {value!r}")
        return value

    @property
    def n_machines(self) -> int:
        """Machines that train together, this one among them."""
        return 1 + len(self.hosts)

    @property
    def n_processes(self) -> int:
        """Processes that share every batch."""
        return self.devices * self.n_machines

    @model_validator(mode="after")
    def _whiten_alone(self) -> TrainingSettings:
        for key, is_on in (("density", self.density > 0), (f"hvp_along: {self.hvp_along}", self.hvp_along != "all")):
            if is_on and self.whiten != "none":
                raise ValueError(f"{key} and whiten: noise exclude each other, choose one")
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
    "hvp_along": "all",
    "covariance": "frame",
    "covariance_frames": TrainingSettings.model_fields["covariance_frames"].default,
    "covariance_regions": TrainingSettings.model_fields["covariance_regions"].default,
    "whiten": "none",
    "density": 0.0,
    "schedule": "plateau",
    "weight_averaging": 0.0,
    "frames_per_molecule": None,
    "devices": 1,
    "committee": 1,
}
#: What networks trained before these keys existed were built with.
MODEL_BEFORE: dict[str, Any] = {"options": None, "torsions": False, "chiral_channels": 0}
#: Keys of a training that change nothing of its result.
TRAINING_FREE = ("memory_gb", "hosts", "launch")
