"""The potential file: TorchScript plus a JSON spec, the one contract between training and simulation.

The script maps positions (K*B, 3) nm of K independent copies of one molecule to the summed energy, kJ/mol. It
has an attribute ``include_priors`` (bool): without the priors it is the network alone. The tensors that tie
it to a molecule (its species, the indices and parameters of its prior terms) are buffers, so that
:func:`bind_molecule` can point it at another molecule made of the same species.

A script may know its forces without automatic differentiation. Then it has an attribute ``outputs_forces`` (bool, False
in the file): set, the script returns energy and forces; and a method ``forget_pairs``, for it remembers which beads
are near each other.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_hvpcg.errors import MappingError, PotentialError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.prior_terms import PriorParameters, PriorTerms, assign_prior_terms, list_rows
from openmm_hvpcg.storage import PathLike, atomic_path
from openmm_hvpcg.units import UNITS

if TYPE_CHECKING:
    import torch

FORMAT = "openmm-hvpcg/potential"
FORMAT_VERSION = 3
#: Version 1 had no walls before straight angles; before 3, scripts knew no rows of bonded beads.
READABLE_VERSIONS = (1, 2, 3)
SPEC_NAME = "spec.json"

#: Buffer of the script -> where its values come from in :class:`PriorTerms`.
PRIOR_BUFFERS = ("bond", "angle", "dihedral", "improper", "pair")
#: Buffer of the script -> beads in a row along the bonds, how many.
ROW_BUFFERS = {"torsion_index": 4, "chain_index": 5}


@dataclass(frozen=True)
class PotentialSpec:
    """Everything about a potential that is not TorchScript.

    Attributes
    ----------
    species : all species the network knows, in the order of its embedding
    bead_map : the molecule the file is bound to
    sites : ``RESIDUE:NAME`` -> species, for topologies that come without a bead map
    species_masses : species -> bead mass, amu
    priors : parameters by species
    cutoff_nm : range of the network
    temperature_K : the temperature of the training data; a CG potential is a free energy at this temperature
    model : settings of the network
    datasets : molecule -> hash of the labels it was trained on
    metrics : validation figures
    provenance : seeds, versions, arm
    """

    species: tuple[str, ...]
    bead_map: BeadMap
    sites: dict[str, str]
    species_masses: dict[str, float]
    priors: PriorParameters
    cutoff_nm: float
    temperature_K: float
    model: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, "units": UNITS}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            content[name] = value.to_dict() if hasattr(value, "to_dict") else value
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str, where: object = None) -> PotentialSpec:
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise PotentialError("wrong kind of file", expected=FORMAT, got=content["format"], where=where)
            found = content["format_version"]
            if found not in READABLE_VERSIONS:
                newer = isinstance(found, int) and found > FORMAT_VERSION
                raise PotentialError(
                    f"format version is {'too new' if newer else 'not supported'}",
                    expected=FORMAT_VERSION,
                    got=found,
                    where=where,
                    hint="upgrade openmm-hvpcg" if newer else "export it again with this version",
                )
            if content["units"] != UNITS:
                raise PotentialError("units differ", expected=UNITS, got=content["units"], where=where)
            return cls(
                tuple(content["species"]),
                BeadMap.from_dict(content["bead_map"]),
                dict(content["sites"]),
                {k: float(v) for k, v in content["species_masses"].items()},
                PriorParameters.from_dict(content["priors"]),
                float(content["cutoff_nm"]),
                float(content["temperature_K"]),
                content["model"],
                content["datasets"],
                content["metrics"],
                content["provenance"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, MappingError) as error:
            raise PotentialError(f"the spec is malformed ({error})", where=where) from error

    def compute_terms(self, bead_map: BeadMap | None = None) -> PriorTerms:
        """Prior terms of ``bead_map``, or of the molecule the file is bound to."""
        target = self.bead_map if bead_map is None else bead_map
        return assign_prior_terms(self.priors, target.species, target.bonds)

    def compute_species_index(self, bead_map: BeadMap | None = None) -> np.ndarray:
        """Embedding index (B,) of each bead's species; :class:`PotentialError` for one never trained on."""
        target = self.bead_map if bead_map is None else bead_map
        order = {name: i for i, name in enumerate(self.species)}
        unknown = sorted(set(target.species) - set(order))
        if unknown:
            first = target.species.index(unknown[0])
            residue, number, _ = target.residues[first]
            raise PotentialError(
                f"the potential does not know species {', '.join(unknown)}",
                where=f"bead {target.names[first]} of {residue} {number}",
                expected=f"among {', '.join(self.species)}",
                hint="a network has no numbers for a species it never saw: train on a molecule that holds it, too",
            )
        return np.array([order[name] for name in target.species], dtype=np.int64)


def save_potential(path: PathLike, script: torch.jit.ScriptModule, spec: PotentialSpec) -> None:
    """Write script and spec to ``path``, whole or not at all."""
    import torch

    # Through memory: torch hides the reason why it could not write a file.
    content = io.BytesIO()
    torch.jit.save(script, content, _extra_files={SPEC_NAME: spec.to_json()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getvalue())


def read_spec(path: PathLike) -> PotentialSpec:
    """Read the spec of a potential file without loading torch.

    Raises
    ------
    PotentialError
        Missing, or not a potential file, or of another version.
    """
    if not Path(path).is_file():
        raise PotentialError("no such potential file", where=path, hint="the export stage writes it")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"extra/{SPEC_NAME}")), None)
            if name is None:
                raise PotentialError("not a potential file: TorchScript without our spec", where=path)
            # torch does not compare the checksums it writes.
            damaged = archive.testzip()
            if damaged is not None:
                raise PotentialError(f"the file is damaged (in {damaged})", where=path, hint="export it again")
            text = archive.read(name).decode("utf-8")
    # What the zip reader raises for a damaged archive.
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        OSError,
        ValueError,
    ) as error:
        raise PotentialError(f"not a potential file ({error})", where=path) from error
    return PotentialSpec.from_json(text, where=path)


def load_potential(path: PathLike) -> tuple[torch.jit.ScriptModule, PotentialSpec]:
    """Read a potential file; returns the script (on the CPU) and its spec.

    Raises
    ------
    PotentialError
        Missing, not a potential file, damaged, or of another version.
    """
    import torch

    spec = read_spec(path)
    try:
        script = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # torch raises of many kinds, with a C++ trace after the first line
        reason = str(error).strip().partition("\n")[0]
        raise PotentialError(f"the TorchScript is damaged ({reason})", where=path) from error
    return script.eval(), spec


def bind_molecule(script: torch.jit.ScriptModule, spec: PotentialSpec, bead_map: BeadMap) -> PotentialSpec:
    """Point ``script`` at another molecule, in place; returns the spec bound to it.

    Raises
    ------
    PotentialError
        The molecule has a species, or a bonded combination, the potential has no parameters for.
    """
    for name, value in compute_buffers(spec, bead_map).items():
        if name in ROW_BUFFERS and not hasattr(script, name):
            continue
        current = getattr(script, name)
        setattr(script, name, value.to(device=current.device, dtype=current.dtype))
    forget_pairs(script)
    return replace(spec, bead_map=bead_map)


def forget_pairs(script: torch.jit.ScriptModule) -> None:
    """Make a script that remembers pairs of beads, or what it knows of its molecule, find them anew."""
    if hasattr(script, "forget_pairs"):
        script.forget_pairs()


def compute_buffers(spec: PotentialSpec, bead_map: BeadMap | None = None) -> dict[str, torch.Tensor]:
    """All molecule-specific buffers of the script by name, for ``bead_map`` or the bound molecule."""
    import torch

    terms = spec.compute_terms(bead_map)
    molecule = spec.bead_map if bead_map is None else bead_map
    buffers = {"species": torch.from_numpy(spec.compute_species_index(bead_map))}
    for name, length in ROW_BUFFERS.items():
        buffers[name] = torch.from_numpy(list_rows(molecule.bonds, molecule.n_beads, length))
    for name in PRIOR_BUFFERS:
        buffers[f"{name}_index"] = torch.from_numpy(getattr(terms.geometry, f"{name}s"))
        buffers[f"{name}_parameters"] = torch.from_numpy(getattr(terms, f"{name}s"))
    return buffers
