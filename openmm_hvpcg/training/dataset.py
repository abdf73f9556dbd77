"""Labels on disk and in memory.

A dataset file holds raw ingredients, never a combined target: the covariance correction belongs to the model of the
day.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import DataError, MappingError
from openmm_hvpcg.frames import find_not_finite
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import StoreLike, compute_hash, open_store, read_array, split_rows

FORMAT_VERSION = 1
KIND = "labels"


class StoredArray:
    """An array that stays in its zarr store: what is asked for is read, by slices, numbers or lists of rows.

    Parameters
    ----------
    array : the zarr array
    where : its store, for messages
    """

    def __init__(self, array: Any, where: object) -> None:
        self._array, self._where = array, where
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype[Any] = array.dtype
        self.ndim: int = array.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        try:
            return np.asarray(self._array.oindex[rows] if isinstance(rows, np.ndarray) else self._array[rows])
        except Exception as error:  # of zarr, its codecs, or the place where the store lies
            raise DataError(
                f"array {self._array.basename!r} is damaged or out of reach ({error})",
                where=self._where,
                hint="check the connection, or make the file again",
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[...], dtype=dtype)


@dataclass(frozen=True)
class LabelledFrames:
    """Labels of one molecule.

    The arrays may be of another kind that numpy can index, such as :class:`StoredArray`.

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
            bad = _find_not_finite(getattr(self, name))
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

    def thin(self, n_frames: int | None) -> LabelledFrames:
        """At most so many of the frames (None: all), evenly spaced over those of each walker.

        Raises
        ------
        DataError
            There are more walkers than frames wanted.
        """
        if n_frames is None or n_frames >= self.n_frames:
            return self
        return self.select(choose_evenly(self.walker, n_frames, self.name))


def load_dataset(
    path: StoreLike, bead_map: BeadMap | None = None, *, stream: bool = False, name: str | None = None
) -> LabelledFrames:
    """Read a finished dataset.

    Parameters
    ----------
    path : the dataset: a path, a URL that fsspec knows such as ``s3://bucket/name.zarr``, or a zarr store
    bead_map : the map it has to be of; None accepts any
    stream : leave the arrays where they are, and read of them what is needed; they are read once here to be checked
    name : the molecule; None: the name of the file

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
    names = ["positions", "forces", "probes", "hvps"]
    if attributes.get("made_from", {}).get("settings", {}).get("averaging") is not None or "covariances" in group:
        names.append("covariances")
    arrays: dict[str, Any] = {key: _open_array(group, key, path, stream) for key in names}
    return LabelledFrames(
        **arrays,
        walker=read_array(group, "walker", path),
        bead_map=found,
        temperature_K=temperature,
        attributes=attributes,
        name=name or PurePath(str(path)).stem,
    )


def _open_array(group: Any, name: str, path: StoreLike, stream: bool) -> Any:
    if stream and name in group:
        return StoredArray(group[name], path)
    return read_array(group, name, path)


def choose_evenly(walker: NDArray[np.int64], n_frames: int, where: str = "") -> NDArray[np.int64]:
    """``n_frames`` of the frames, evenly spaced over those of each walker (T,), which gives its share of them.

    Raises
    ------
    DataError
        There are more walkers than frames wanted.
    """
    walkers, sizes = np.unique(walker, return_counts=True)
    if len(walkers) > n_frames:
        raise DataError(
            "fewer frames wanted than there are walkers", expected=f"at least {len(walkers)}", got=n_frames, where=where
        )
    # One each, so that none is left out; then whole shares of the rest, and its remainder to the first ones.
    spare = sizes - 1
    shares = 1 + spare * (n_frames - len(walkers)) // max(1, spare.sum())
    room = np.flatnonzero(shares < sizes)
    shares[room[: n_frames - shares.sum()]] += 1
    chosen = []
    for w, size, share in zip(walkers, sizes, shares, strict=True):
        chosen.append(np.flatnonzero(walker == w)[(np.arange(share) * size + size // 2) // share])
    return np.sort(np.concatenate(chosen))


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


def _find_not_finite(values: Any) -> int | None:
    """Index of the first frame that holds a NaN or infinity, reading some of them at a time; None if there is none."""
    for rows in split_rows(values):
        bad = find_not_finite(values[rows])
        if bad is not None:
            return int(rows.start) + bad
    return None


def _check_shape(name: str, values: NDArray[Any], shape: tuple[int, ...], where: str) -> None:
    if values.shape != shape:
        raise DataError(f"array {name!r} has the wrong shape", expected=shape, got=values.shape, where=where)
