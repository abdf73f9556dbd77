"""What a file of labels or references was made from: checked before it is begun, and again where it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.systems import AtomisticSystem
from openmm_hvpcg.config import Settings
from openmm_hvpcg.errors import InputError, MappingError, StudyError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import PathLike, compute_hash, describe_changes, open_store


def check_sizes(system: AtomisticSystem, frames: Frames, bead_map: BeadMap) -> None:
    """Raise :class:`InputError` or :class:`MappingError` where the numbers of atoms differ."""
    n_atoms, where = system.n_atoms, system.name or None
    if frames.n_atoms != n_atoms:
        raise InputError("frames and System differ", expected=f"{n_atoms} atoms", got=frames.n_atoms, where=where)
    if bead_map.n_atoms != n_atoms:
        raise MappingError("bead map and System differ", expected=f"{n_atoms} atoms", got=bead_map.n_atoms, where=where)


def choose_frames(n_frames: int, most: int | None) -> NDArray[np.int64]:
    """Indices of at most so many frames, evenly spaced, the first and the last among them."""
    if most is None or most >= n_frames:
        return np.arange(n_frames)
    return np.unique(np.linspace(0, n_frames - 1, most).round().astype(np.int64))


def describe_sources(
    system: AtomisticSystem, frames: Frames, bead_map: BeadMap, settings: Settings, chosen: NDArray[np.int64]
) -> dict[str, Any]:
    """Settings and hashes, JSON-ready; platform and workers may change between runs."""
    return {
        "settings": settings.model_dump(mode="json", exclude={"platform", "workers"}),
        "system_hash": system.system_hash,
        "frames_hash": compute_hash(frames.positions, chosen),
        "bead_map_hash": bead_map.hash,
    }


def open_unfinished(
    path: PathLike,
    kind: str,
    version: int,
    section: str,
    made_from: dict[str, Any],
    before: Mapping[str, Any] | None = None,
) -> Any:
    """Open a store to go on with it.

    Parameters
    ----------
    path, kind, version : see :func:`~openmm_hvpcg.storage.open_store`
    section : of the protocol, for messages
    made_from : what it has to be made from, see :func:`describe_sources`
    before : settings younger than the format, and what a file that does not know them was made with

    Raises
    ------
    StudyError
        It was made from something else; it says from what.
    DataError
        Not such a store.
    """
    group = open_store(path, kind, version, mode="r+")
    found = group.attrs.get("made_from", {})
    changed = [key for key in made_from if key != "settings" and found.get(key) != made_from[key]]
    changed += describe_changes(section, {**(before or {}), **found.get("settings", {})}, made_from["settings"])
    if changed:
        raise StudyError(
            f"the file there was made from something else: {', '.join(changed)} differ",
            where=path,
            hint="choose another output folder, or delete it to make it again",
        )
    return group
