"""Sections of the all-atom side: molecules and sampling."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from openmm_hvpcg.config.base import Precision, Settings

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
    flatten: float = Field(
        0.0,
        ge=0,
        le=1,
        description="molecules to train on only (role train): share of the potential of mean force of each dihedral of"
        " beads that a bias takes away, so that frames lie on barriers, too; labels are made without it",
    )
    flatten_frames: int = Field(
        400, ge=20, description="flatten: frames without the bias, sampled first, that tell these potentials"
    )
    platform: str = Field("auto", description="auto measures; or Reference, CPU, CUDA, OpenCL, HIP")
    precision: Precision = "auto"
    seed: int = Field(1, ge=0, le=2**31 - 1)


#: What molecules sampled before these keys existed were sampled with.
SAMPLING_BEFORE: dict[str, Any] = {
    "flexible_beads": False,
    "flatten": 0.0,
    "flatten_frames": SamplingSettings.model_fields["flatten_frames"].default,
}
