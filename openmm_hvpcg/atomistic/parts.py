"""Stores of single walkers beside the frames of a molecule, so that several machines can make them at once.

Walkers share chunks of a store, and a chunk wants one writer. A walker that is made apart has a store of its own with
the same rows, of which only its own exist; the frames are added to the molecule's store afterwards.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from openmm_hvpcg.frames import FramesStore


def find_parts(path: Path) -> Path:
    """The folder of the stores of single walkers of the frames at ``path``."""
    return path.with_suffix(".parts")


def open_part(store: FramesStore, walker: int) -> FramesStore:
    """The store of one walker, new or begun, with at least the frames that ``store`` has of it."""
    path = find_parts(store.path) / f"walker_{walker}.zarr"
    if path.exists():
        part = FramesStore.open(path, mode="r+")
    else:
        attributes = store.attributes
        part = FramesStore.create(
            path,
            store.topology,
            [count if w == walker else 0 for w, count in enumerate(store.counts)],
            temperature_K=attributes["temperature_K"],
            interval_ps=attributes["interval_ps"],
            periodic=store.periodic,
            provenance=attributes["provenance"],
        )
    _add_missing(store, part, walker)
    return part


def gather_parts(store: FramesStore) -> None:
    """Add to ``store`` what single walkers' stores have more than it, and remove them; a kill loses nothing."""
    folder = find_parts(store.path)
    for walker in range(len(store.counts)):
        path = folder / f"walker_{walker}.zarr"
        if path.exists():
            _add_missing(FramesStore.open(path), store, walker)
    shutil.rmtree(folder, ignore_errors=True)


def _add_missing(source: FramesStore, target: FramesStore, walker: int) -> None:
    first, last = target.count_done(walker), source.count_done(walker)
    if first < last:
        positions, box = source.read_rows(walker, first, last)
        target.append(walker, positions, box)
