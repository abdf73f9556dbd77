"""Sections of what is learnt from: beads, labels, PMF references."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from openmm_hvpcg.config.base import Precision, Settings


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

    share_backbone: bool = Field(
        False,
        description="N, C and O are of one species each in all residues, but proline's N: fewer species, which transfer"
        " better",
    )

    @field_validator("beads")
    @classmethod
    def _json_only(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(value, dict) and set(value) != {"json"}:
            raise ValueError("expected a preset, an mdtraj selection or {json: FILE}")
        return value

    @model_validator(mode="after")
    def _species_are_not_in_a_file(self) -> MappingSettings:
        for key, is_on in self.naming.items():
            if is_on and isinstance(self.beads, dict):
                raise ValueError(f"{key}: a JSON map names the species of its beads itself")
        return self

    @property
    def naming(self) -> dict[str, bool]:
        """How species are named: keyword arguments of :func:`~openmm_hvpcg.mapping.build_bead_map`."""
        return {"ends": self.ends, "share_backbone": self.share_backbone}


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
