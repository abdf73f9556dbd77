"""Which frames of long trajectories are taken: evenly in time, or evenly over clusters in the beads' slow coordinates.

Frames chosen by cluster are not distributed as the ensemble is. Targets of force and Hessian matching are conditional
on the beads' positions, so that they stay right for any distribution of these; averages over such frames do not.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mdtraj as md
import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.periodic import label_molecules
from openmm_hvpcg.atomistic.trajectory_files import Placer
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.mapping import BeadMap

logger = logging.getLogger(__name__)

#: So many beads, evenly along the chain, describe a frame: their distances, and dihedrals of neighbours among them.
FEATURE_BEADS = 12
#: Frames that are looked at, evenly in time; few enough to hold their features (up to 84 float32 each) in memory.
CANDIDATES = 50_000
CLUSTERS = 100
#: Clusters are fitted on so many of them.
CLUSTERED = 20_000
#: The lag of TICA as a share of the longest file, its modes, and the pairs of frames that each feature needs.
LAG_SHARE = 0.01
MODES = 4
PAIRS_PER_FEATURE = 10

IndexArray = NDArray[np.int64]


@dataclass(frozen=True)
class FrameChoice:
    """What is asked for.

    Attributes
    ----------
    stride : every so many frames of each file are looked at
    n_frames : at most so many are taken; None: all
    kind : "time" or "cluster"
    seed : of the clusters, and of the frames drawn from each
    bead_map : M (B, A), for "cluster"
    """

    stride: int = 1
    n_frames: int | None = None
    kind: Literal["time", "cluster"] = "time"
    seed: int = 0
    bead_map: BeadMap | None = None

    def describe(self) -> dict[str, Any]:
        """What the chosen frames depend on, JSON-ready; seed and beads only where they matter."""
        facts: dict[str, Any] = {"stride": self.stride, "n_frames": self.n_frames, "kind": self.kind}
        if self.kind == "cluster" and self.bead_map is not None:
            facts |= {"seed": self.seed, "bead_map_hash": self.bead_map.hash}
        return facts


class BeadTraces:
    """Features of the beads of frames as they are read, thinned evenly in time where they grow too many.

    Parameters
    ----------
    system, bead_map : what the frames are of
    stride : frames whose index is a multiple of it are looked at
    n_files : number of trajectories
    most : frames kept
    """

    def __init__(
        self, system: AtomisticSystem, bead_map: BeadMap, stride: int, n_files: int, most: int = CANDIDATES
    ) -> None:
        if bead_map.n_beads < 2:
            raise InputError(
                "trajectory_choice: cluster needs distances of beads",
                expected="two or more beads",
                got=bead_map.n_beads,
                hint="use trajectory_choice: time",
            )
        self.every, self._most = stride, most
        molecules = label_molecules(system.n_atoms, [(a.index, b.index) for a, b in system.topology.bonds])
        # Molecules without beads need not be made whole.
        self._atoms = np.flatnonzero(np.isin(molecules, molecules[bead_map.site_weights.any(axis=0)]))
        beads = np.unique(np.linspace(0, bead_map.n_beads - 1, FEATURE_BEADS).round().astype(int))
        self._weights = bead_map.site_weights[beads][:, self._atoms]
        subset = system.topology.subset(self._atoms)
        self._placer = Placer(subset, periodic=system.is_periodic, movable=True)
        self._frames: list[list[IndexArray]] = [[] for _ in range(n_files)]
        self._features: list[list[NDArray[np.float32]]] = [[] for _ in range(n_files)]
        self._count = 0

    def add(self, file: int, chunk: md.Trajectory, first: int) -> None:
        """Look at a chunk of a file whose first frame has the index ``first``."""
        frames = np.arange(first, first + chunk.n_frames)
        rows = np.flatnonzero(frames % self.every == 0)
        if not len(rows):
            return
        positions, _ = self._placer.place(chunk[rows].atom_slice(self._atoms))
        self._frames[file].append(frames[rows])
        self._features[file].append(measure_beads(np.einsum("ba,nad->nbd", self._weights, positions, optimize=True)))
        self._count += len(rows)
        while self._count > self._most:
            self._thin()

    def _thin(self) -> None:
        self.every *= 2
        self._count = 0
        for frames, features in zip(self._frames, self._features, strict=True):
            for k, index in enumerate(frames):
                kept = index % self.every == 0
                frames[k], features[k] = index[kept], features[k][kept]
                self._count += int(kept.sum())

    def finish(self) -> tuple[list[IndexArray], list[NDArray[np.float32]]]:
        """Of each file the frames (n,) that were kept and their features (n, F)."""
        return (
            [np.concatenate(f or [np.empty(0, dtype=np.int64)]) for f in self._frames],
            [np.concatenate(f) if f else np.empty((0, 0), dtype=np.float32) for f in self._features],
        )


def measure_beads(positions: NDArray[np.float64]) -> NDArray[np.float32]:
    """Features (n, F) of beads (n, B, 3) nm: all distances, cosines and sines of dihedrals along the chain."""
    n_beads = positions.shape[1]
    i, j = np.triu_indices(n_beads, 1)
    parts = [np.linalg.norm(positions[:, i] - positions[:, j], axis=-1)]
    if n_beads > 3:
        a, b, c = (positions[:, k + 1 : n_beads - 2 + k] - positions[:, k : n_beads - 3 + k] for k in range(3))
        normals = np.cross(a, b), np.cross(b, c)
        angles = np.arctan2(
            np.linalg.norm(b, axis=-1) * (a * normals[1]).sum(axis=-1), (normals[0] * normals[1]).sum(axis=-1)
        )
        parts += [np.cos(angles), np.sin(angles)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def choose_by_time(n_frames: Sequence[int], stride: int, most: int | None) -> tuple[list[IndexArray], int]:
    """Every k-th frame of files of ``n_frames`` frames, k a multiple of ``stride`` so large that at most ``most`` come.

    Returns
    -------
    the indices of each file, and k

    Raises
    ------
    InputError
        More files than frames.
    """
    thinned = np.array([-(-n // stride) for n in n_frames])
    factor = 1
    if most is not None and thinned.sum() > most:
        if len(n_frames) > most:
            raise InputError(
                "trajectory_frames is too small", expected=f"a frame for each of {len(n_frames)} files", got=most
            )
        factor = 1 + bisect.bisect_left(
            range(1, int(thinned.max()) + 1), True, key=lambda k: int(np.ceil(thinned / k).sum()) <= most
        )
    step = stride * factor
    return [np.arange(0, n, step) for n in n_frames], step


def choose_by_cluster(
    frames: Sequence[IndexArray], features: Sequence[NDArray[np.float32]], most: int, seed: int
) -> tuple[list[IndexArray], dict[str, Any]]:
    """Frames spread evenly over clusters in the slow coordinates of their features; the same at every call.

    Parameters
    ----------
    frames : (n,) index of each candidate in its file, by file
    features : (n, F) by file
    most : frames to take

    Returns
    -------
    the indices of each file, rising; and what was done, for the provenance
    """
    from deeptime.clustering import KMeans  # takes a second, which every command would feel

    sizes = [len(f) for f in frames]
    n_candidates = sum(sizes)
    if most >= n_candidates:
        return list(frames), {
            "candidates": n_candidates,
            "clusters": 0,
            "coordinates": "none: all candidates are taken",
        }
    coordinates, note = _find_slow_coordinates(features)
    few = np.linspace(0, n_candidates - 1, min(CLUSTERED, n_candidates)).round().astype(int)
    n_clusters = min(CLUSTERS, most, len(few))
    model = KMeans(n_clusters, fixed_seed=seed, n_jobs=1, tolerance=1e-3).fit_fetch(coordinates[few])
    clusters = np.asarray(model.transform(coordinates))
    counts = np.bincount(clusters, minlength=n_clusters)
    quotas = share_evenly(counts, most)
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(np.flatnonzero(clusters == k), q, replace=False) for k, q in enumerate(quotas) if q]
    chosen = np.sort(np.concatenate(drawn))
    edges = np.concatenate([[0], np.cumsum(sizes)])
    taken = [
        f[chosen[(chosen >= a) & (chosen < b)] - a] for f, (a, b) in zip(frames, itertools.pairwise(edges), strict=True)
    ]
    return taken, {
        "candidates": n_candidates,
        "clusters": int((counts > 0).sum()),
        "most_of_a_cluster": int(quotas.max()),
        "coordinates": note,
        "weights": "frames are spread evenly over clusters: they are not distributed as the ensemble is",
    }


def share_evenly(counts: NDArray[Any], total: int) -> IndexArray:
    """How many of each of ``counts`` to take for ``total`` in all, as equal as they allow."""
    quotas = np.zeros(len(counts), dtype=np.int64)
    left = min(total, int(np.sum(counts)))
    order = np.argsort(counts, kind="stable")
    for rank, k in enumerate(order):
        quotas[k] = min(int(counts[k]), -(-left // (len(order) - rank)))
        left -= int(quotas[k])
    return quotas


def _find_slow_coordinates(features: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float64], str]:
    """TICA modes scaled by how slow they are; the standardised features where there are too few frames for that."""
    from deeptime.decomposition import TICA

    sizes = [len(f) for f in features if len(f)]
    everything = np.concatenate([f for f in features if len(f)]).astype(np.float64)
    mean, spread = everything.mean(axis=0), everything.std(axis=0)
    kept = spread > 1e-6 * np.maximum(np.abs(mean), 1e-3)
    if not kept.any():
        raise InputError("the frames of the trajectory are all alike", hint="use trajectory_choice: time")
    everything = everything[:, kept]
    everything -= mean[kept]
    everything /= spread[kept]
    series = np.split(everything, np.cumsum(sizes)[:-1])
    lag = max(1, int(LAG_SHARE * max(map(len, series))))
    long = [f for f in series if len(f) > lag]
    if sum(len(f) - lag for f in long) < PAIRS_PER_FEATURE * int(kept.sum()):
        return everything, "distances and dihedrals of beads"
    model = TICA(lagtime=lag, dim=min(MODES, int(kept.sum())), scaling="kinetic_map").fit_from_timeseries(long)
    modes = np.concatenate([model.fetch_model().transform(f) for f in series])
    return modes, f"{modes.shape[1]} TICA modes of distances and dihedrals of beads, lag {lag} candidates"
