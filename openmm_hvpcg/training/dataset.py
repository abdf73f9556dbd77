"""Labels on disk and in memory.

A dataset file holds raw ingredients, never a combined target: the covariance correction belongs to the model of the
day.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import DataError, MappingError
from openmm_hvpcg.frames import find_not_finite
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import PathLike, compute_hash, open_store, read_array

FORMAT_VERSION = 1
KIND = "labels"


@dataclass(frozen=True)
class LabelledFrames:
    """Labels of one molecule.

    Attributes
    ----------
    positions : (T, B, 3) float32 nm, bead positions
    forces : (T, B, 3) float32 kJ/mol/nm, projected forces
    probes : (T, P, B, 3) float32
    hvps : (T, P, B, 3) float32 kJ/mol/nm^2, projected HVPs, sign ``+H v``
    walker : (T,) int64, the trajectory each frame is from
    bead_map : BeadMap
    temperature_K : float
    attributes : the file's provenance
    name : the molecule
    covariances : (T, P, B, 3) float32 (kJ/mol/nm)^2, covariance of the projected forces at held beads times each probe,
        where labels are conditional averages; else None
    """

    positions: NDArray[np.float32]
    forces: NDArray[np.float32]
    probes: NDArray[np.float32]
    hvps: NDArray[np.float32]
    walker: NDArray[np.int64]
    bead_map: BeadMap
    temperature_K: float
    attributes: dict[str, Any]
    name: str = ""
    covariances: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        n_frames, n_beads = len(self.positions), self.bead_map.n_beads
        for name in ("positions", "forces"):
            _check_shape(name, getattr(self, name), (n_frames, n_beads, 3), self.name)
        n_probes = self.probes.shape[1] if self.probes.ndim == 4 else -1
        averaged = () if self.covariances is None else ("covariances",)
        for name in ("probes", "hvps", *averaged):
            _check_shape(name, getattr(self, name), (n_frames, n_probes, n_beads, 3), self.name)
        for name in ("positions", "forces", "probes", "hvps", *averaged):
            bad = find_not_finite(getattr(self, name))
            if bad is not None:
                raise DataError(
                    f"{name} hold NaN or infinity, first in frame {bad}",
                    where=self.name,
                    hint="the file is truncated or damaged; make it again",
                )
        if self.walker.shape != (n_frames,) or (n_frames and self.walker.min() < 0):
            raise DataError("array 'walker' is damaged", where=self.name, hint="make the file again")

    @property
    def n_frames(self) -> int:
        return len(self.positions)

    @property
    def n_probes(self) -> int:
        return int(self.probes.shape[1])

    @property
    def hash(self) -> str:
        """Identifies the labels by their values and their map."""
        averaged = () if self.covariances is None else (self.covariances,)
        return compute_hash(self.positions, self.forces, self.probes, self.hvps, self.bead_map.hash, *averaged)

    def select(self, frames: NDArray[np.int64] | slice) -> LabelledFrames:
        """Some of the frames, in the order given."""
        per_frame = ["positions", "forces", "probes", "hvps", "walker"]
        per_frame += [] if self.covariances is None else ["covariances"]
        return replace(self, **{name: getattr(self, name)[frames] for name in per_frame})


def load_dataset(path: PathLike, bead_map: BeadMap | None = None) -> LabelledFrames:
    """Read a finished dataset.

    Parameters
    ----------
    path : the dataset
    bead_map : the map it has to be of; None accepts any

    Raises
    ------
    DataError
        Not a dataset, of another version or units, unfinished, truncated.
    MappingError
        Of another mapping than ``bead_map``.
    """
    group = open_store(path, KIND, FORMAT_VERSION)
    attributes = dict(group.attrs)
    done = read_array(group, "done", path)
    if not done.all():
        raise DataError(
            "labels are missing",
            expected=f"{len(done)} frames",
            got=int(done.sum()),
            where=path,
            hint="run the label stage again; it resumes",
        )
    try:
        found = BeadMap.from_dict(json.loads(attributes["bead_map"]), where=path)
        temperature = float(attributes["temperature_K"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the header is incomplete ({error})", where=path) from error
    if bead_map is not None and found.hash != bead_map.hash:
        raise MappingError(
            "the dataset was made with another mapping",
            expected=f"{bead_map.n_beads} beads, map {bead_map.hash[:12]}",
            got=f"{found.n_beads} beads, map {found.hash[:12]}",
            where=path,
            hint="label again, or use the mapping of the dataset",
        )
    arrays = {name: read_array(group, name, path) for name in ("positions", "forces", "probes", "hvps", "walker")}
    if attributes.get("made_from", {}).get("settings", {}).get("averaging") is not None or "covariances" in group:
        arrays["covariances"] = read_array(group, "covariances", path)
    return LabelledFrames(
        **arrays, bead_map=found, temperature_K=temperature, attributes=attributes, name=Path(path).stem
    )


def split_by_time_blocks(
    walker: NDArray[np.int64], fraction: float, n_blocks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation frames, the latter as contiguous blocks spread evenly over each walker.

    Neighbouring frames are alike: a random split would let the validation set leak. Every walker gives the same
    share; a walker too short for ``n_blocks`` blocks gives fewer.

    Raises
    ------
    DataError
        One of the two sets would be empty.
    """
    validation: list[NDArray[np.int64]] = []
    for w in np.unique(walker):
        frames = np.flatnonzero(walker == w)
        n_validation = round(fraction * len(frames))
        blocks = max(1, min(n_blocks, n_validation))
        period = len(frames) / blocks
        for b in range(blocks):
            size = (n_validation * (b + 1)) // blocks - (n_validation * b) // blocks
            end = round((b + 1) * period)
            validation.append(frames[end - size : end])
    held_out = np.concatenate(validation) if validation else np.empty(0, dtype=np.int64)
    training = np.setdiff1d(np.arange(len(walker)), held_out)
    if len(held_out) == 0 or len(training) == 0:
        raise DataError(
            "too few frames to split into training and validation",
            expected="at least one frame of each",
            got=f"{len(training)} and {len(held_out)} of {len(walker)}",
            hint="sample more frames or change validation_fraction",
        )
    return training, held_out


def _check_shape(name: str, values: NDArray[Any], shape: tuple[int, ...], where: str) -> None:
    if values.shape != shape:
        raise DataError(f"array {name!r} has the wrong shape", expected=shape, got=values.shape, where=where)
