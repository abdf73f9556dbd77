"""The peptides of the study: which there are, their systems and bead maps, and what later sittings need of the data.

`data/unseen_peptides` holds two zarr archives: `labels.zip`, the labelled frames of the training peptides, and
`references.zip`, the bead positions of the peptides to test on. Forces and HVPs keep 12 bits of their mantissas, an
error of 1e-4 of each, a thousandth of their noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import zarr
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import MoleculeSettings, Protocol
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.labels.label import label_frames

FORMAT_VERSION = 1
MANTISSA_BITS = 12
ROUNDED = ("forces", "hvps")
ARRAYS = ("positions", "forces", "probes", "hvps", "walker")
LABELS, REFERENCES = "labels.zip", "references.zip"


def list_peptides(protocol: Protocol, role: str) -> list[MoleculeSettings]:
    return [m for m in protocol.molecules if m.role == role]


def build_system(protocol: Protocol, molecule: MoleculeSettings, start: str = "extended") -> AtomisticSystem:
    """The all-atom system, from an extended or a helical start structure."""
    return build_atomistic_system(
        molecule.input.model_copy(update={"start": start}),
        temperature_K=protocol.temperature_K,
        constraints=protocol.sampling.constraints,
        name=molecule.name,
    )


def build_map(protocol: Protocol, topology: md.Topology) -> BeadMap:
    if not isinstance(protocol.mapping.beads, str):
        raise SystemExit("this study takes a selection, not a JSON map")
    return build_bead_map(protocol.mapping.beads, topology, **protocol.mapping.naming)


def label_peptide(protocol: Protocol, system: AtomisticSystem, frames: Frames, path: Path) -> LabelledFrames:
    """Labels of all frames, by one process: peptides are labelled side by side."""
    settings = protocol.labels.model_copy(update={"workers": 1, "platform": "Reference", "max_frames": None})
    return label_frames(system, frames, build_map(protocol, system.topology), settings, path, progress=False)


def round_mantissas(values: NDArray[np.float32], bits: int = MANTISSA_BITS) -> NDArray[np.float32]:
    """To the nearest float32 whose mantissa has zeros after the first ``bits``; such numbers compress."""
    dropped = 23 - bits
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(1 << (dropped - 1))
    return ((raw + half) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).view(np.float32)


@contextmanager
def _new_archive(path: Path, attributes: dict[str, Any]) -> Iterator[zarr.Group]:
    """A zarr group in a zip file, which appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    store = zarr.storage.ZipStore(unfinished, mode="w")
    group = zarr.create_group(store, attributes={"format_version": FORMAT_VERSION, **attributes})
    yield group
    store.close()
    unfinished.replace(path)


@contextmanager
def _open_archive(path: Path) -> Iterator[zarr.Group]:
    if not path.exists():
        raise SystemExit(f"{path}: no such file. Make it with run.py label and run.py reference")
    store = zarr.storage.ZipStore(path, mode="r")
    group = zarr.open_group(store, mode="r")
    version = group.attrs["format_version"]
    if version != FORMAT_VERSION:
        raise SystemExit(f"{path}: expected format version {FORMAT_VERSION}, got {version}")
    yield group
    store.close()


def _add(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    codec = zarr.codecs.BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle")
    group.create_array(name, data=np.ascontiguousarray(values), chunks=values.shape, compressors=[codec])


def save_labels(path: Path, datasets: list[LabelledFrames], facts: dict[str, Any]) -> None:
    with _new_archive(path, facts) as root:
        for data in datasets:
            group = root.create_group(data.name, attributes={"labels": json.dumps(data.attributes)})
            for name in ARRAYS:
                values = getattr(data, name)
                _add(group, name, round_mantissas(values) if name in ROUNDED else values)


def load_labels(path: Path) -> list[LabelledFrames]:
    """Labels of every training peptide."""
    with _open_archive(path) as root:
        return [_read_labels(root, name, path) for name, _ in sorted(root.groups())]


def choose_part(dataset: LabelledFrames, n_parts: int, part: int) -> LabelledFrames:
    """Every ``n_parts``-th frame of each walker from frame ``part`` on: different parts have no frame in common."""
    place = np.zeros(dataset.n_frames, dtype=np.int64)
    for walker in np.unique(dataset.walker):
        rows = np.flatnonzero(dataset.walker == walker)
        place[rows] = np.arange(len(rows))
    return dataset.select(np.flatnonzero(place % n_parts == part % n_parts))


def _read_labels(root: zarr.Group, name: str, where: Path) -> LabelledFrames:
    group = root[name]
    attributes = json.loads(group.attrs["labels"])
    return LabelledFrames(
        **{a: np.asarray(group[a][:]) for a in ARRAYS},
        bead_map=BeadMap.from_dict(json.loads(attributes["bead_map"]), where=where),
        temperature_K=float(attributes["temperature_K"]),
        attributes=attributes,
        name=name,
    )


def load_labelled(path: Path, name: str) -> tuple[Frames, BeadMap]:
    """Bead positions of a peptide, from its labels."""
    with _open_archive(path) as root:
        data, facts = _read_labels(root, name, path), dict(root.attrs)
    kept = np.bincount(data.walker).max()
    interval_ps = float(facts["interval_ps"]) * facts["sampling"]["frames_a_copy"] / kept
    topology = data.bead_map.to_topology()
    return Frames(data.positions, topology, data.temperature_K, data.walker, interval_ps=interval_ps), data.bead_map


def save_references(
    path: Path, references: dict[str, tuple[NDArray[np.int16], NDArray[Any], BeadMap]], facts: dict[str, Any]
) -> None:
    """Positions as multiples of ``grid_nm`` of ``facts``, walker of each frame, and bead map of each peptide."""
    with _new_archive(path, facts) as root:
        for name, (positions, walker, bead_map) in references.items():
            group = root.create_group(name, attributes={"bead_map": json.dumps(bead_map.to_dict())})
            _add(group, "positions", positions)
            _add(group, "walker", walker)


def load_reference(path: Path, name: str) -> tuple[Frames, BeadMap]:
    """Bead positions of one peptide, mapped from all atoms."""
    with _open_archive(path) as root:
        group, facts = root[name], dict(root.attrs)
        bead_map = BeadMap.from_dict(json.loads(str(group.attrs["bead_map"])), where=path)
        positions = np.asarray(group["positions"][:], dtype=np.float32) * np.float32(facts["grid_nm"])
        return (
            Frames(
                positions,
                bead_map.to_topology(),
                float(facts["temperature_K"]),
                np.asarray(group["walker"][:], dtype=np.int64),
                interval_ps=float(facts["interval_ps"]),
            ),
            bead_map,
        )
