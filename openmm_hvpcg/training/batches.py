"""Batches: frames of any molecules with as many beads bonded alike, dense, the same for the same seed and epoch.

A step then sees many molecules, each as often as it has frames. A network that cannot take them together (see
:mod:`openmm_hvpcg.training.models.registry`) gets batches of one molecule each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from openmm_hvpcg.training.models.torsions import Bonded
from openmm_hvpcg.training.scratch import Memory, Storage


@dataclass(frozen=True)
class MoleculeTensors:
    """Training tensors of one molecule, the priors' part already taken out of the labels.

    ``positions``, ``forces`` (T, B, 3); ``probes``, ``hvps``, ``covariances`` (T, P, B, 3), the last the covariance of
    forces times the probes, what of it is not taken from the residual of the day; ``own_share``, what is; ``species``
    (B,); ``whitening`` (T, 3B, 3B) or None; ``density_forces`` (T, B, 3) and ``density_probes`` (T, P, B, 3), see
    :mod:`openmm_hvpcg.training.density`, or None; ``links`` (n, 2), along which HVPs are matched, None: everywhere.
    """

    positions: Tensor
    forces: Tensor
    probes: Tensor
    hvps: Tensor
    species: Tensor
    bonded: Bonded
    covariances: Tensor
    own_share: float = 1.0
    whitening: Tensor | None = None
    density_forces: Tensor | None = None
    density_probes: Tensor | None = None
    links: Tensor | None = None


class MoleculeSize(NamedTuple):
    """What has to be known of a molecule to make room for it; ``species`` (B,)."""

    n_frames: int
    n_probes: int
    species: Tensor
    bonded: Bonded
    links: Tensor | None = None


class Batch(NamedTuple):
    """F frames with P probes each; see :class:`MoleculeTensors`.

    ``species`` is (B,) where all frames are of one molecule, else (F, B); ``own_share`` is (F,), in double. ``weight``
    is what the loss of this part of a batch counts, where several processes share it: the mean over the processes is
    then that of the whole batch.
    """

    positions: Tensor
    forces: Tensor
    probes: Tensor
    hvps: Tensor
    species: Tensor
    bonded: Bonded
    covariances: Tensor
    own_share: Tensor
    whitening: Tensor | None
    density_forces: Tensor | None
    density_probes: Tensor | None
    links: Tensor | None
    weight: float = 1.0

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        if self.positions.device == device:
            return self
        moved = Batch(*(a.to(device) if isinstance(a, Tensor) else a for a in self))  # type: ignore[arg-type]
        return moved._replace(bonded=Bonded(*(rows.to(device) for rows in self.bonded)))


class BatchIndex(NamedTuple):
    """Molecules (F,) of one group, a frame (F,) of each, and the probes (F, P) of it that take part."""

    molecules: NDArray[np.int64]
    frames: NDArray[np.int64]
    probes: NDArray[np.int64]
    weight: float = 1.0


def group_molecules(sizes: Sequence[MoleculeSize], mixed: bool = True) -> list[list[int]]:
    """Indices of the molecules that share batches: as many beads bonded alike, or where not ``mixed`` each its own."""
    groups: dict[Any, list[int]] = {}
    for k, size in enumerate(sizes):
        rows = [*size.bonded, *([] if size.links is None else [size.links])]
        kind = (len(size.species), *(str(r.tolist()) for r in rows))
        groups.setdefault(kind if mixed else k, []).append(k)
    return list(groups.values())


@dataclass(frozen=True)
class FrameGroup:
    """Tensors of molecules of as many beads bonded alike, one molecule after the other: N frames, R probes in all.

    ``members`` are the molecules' places among all; ``positions``, ``forces`` (N, B, 3); ``probes``, ``hvps``,
    ``covariances`` (R, B, 3); ``whitening`` (N, 3B, 3B), ``density_forces`` (N, B, 3) and ``density_probes`` (R, B, 3),
    or None; ``links`` (n, 2) or None; ``species`` (M, B) and ``own_share`` (M,) of each molecule; ``first_frame``,
    ``n_frames``, ``first_probe``, ``n_probes`` (M,), where its rows begin and how many it has, of the last for each
    frame.
    """

    members: tuple[int, ...]
    positions: Tensor
    forces: Tensor
    probes: Tensor
    hvps: Tensor
    covariances: Tensor
    whitening: Tensor | None
    density_forces: Tensor | None
    density_probes: Tensor | None
    links: Tensor | None
    species: Tensor
    bonded: Bonded
    own_share: Tensor
    first_frame: NDArray[np.int64]
    n_frames: NDArray[np.int64]
    first_probe: NDArray[np.int64]
    n_probes: NDArray[np.int64]

    @classmethod
    def allocate(
        cls,
        members: Sequence[int],
        sizes: Sequence[MoleculeSize],
        *,
        whitened: bool = False,
        dense: bool = False,
        storage: Storage | None = None,
    ) -> FrameGroup:
        """Room for the molecules ``members`` of all ``sizes``: zeros, and an own share of one; in memory by default."""
        storage = storage or Memory()
        own = [sizes[k] for k in members]
        n_frames, n_probes = np.array([s.n_frames for s in own]), np.array([s.n_probes for s in own])
        ends, probe_ends = np.cumsum(n_frames), np.cumsum(n_frames * n_probes)
        n, n_rows, n_beads = int(ends[-1]), int(probe_ends[-1]), len(own[0].species)
        prefix = f"group{members[0]}-"
        return cls(
            tuple(members),
            storage.allocate(f"{prefix}positions", (n, n_beads, 3)),
            storage.allocate(f"{prefix}forces", (n, n_beads, 3)),
            storage.allocate(f"{prefix}probes", (n_rows, n_beads, 3)),
            storage.allocate(f"{prefix}hvps", (n_rows, n_beads, 3)),
            storage.allocate(f"{prefix}covariances", (n_rows, n_beads, 3)),
            storage.allocate(f"{prefix}whitening", (n, 3 * n_beads, 3 * n_beads)) if whitened else None,
            storage.allocate(f"{prefix}density_forces", (n, n_beads, 3)) if dense else None,
            storage.allocate(f"{prefix}density_probes", (n_rows, n_beads, 3)) if dense else None,
            own[0].links,
            torch.stack([s.species for s in own]),
            own[0].bonded,
            torch.ones(len(own), dtype=torch.float64),
            ends - n_frames,
            n_frames,
            probe_ends - n_frames * n_probes,
            n_probes,
        )

    def get_molecule(self, index: int) -> MoleculeTensors:
        """The ``index``-th member's tensors: views, so that what is written to them is in the group."""
        first, n, p = (int(a[index]) for a in (self.first_frame, self.n_frames, self.n_probes))
        rows, start = slice(first, first + n), int(self.first_probe[index])

        def split(tensor: Tensor) -> Tensor:
            return tensor[start : start + n * p].unflatten(0, (n, p))

        probes, hvps, covariances = (split(a) for a in (self.probes, self.hvps, self.covariances))
        return MoleculeTensors(
            self.positions[rows],
            self.forces[rows],
            probes,
            hvps,
            self.species[index],
            self.bonded,
            covariances,
            float(self.own_share[index]),
            None if self.whitening is None else self.whitening[rows],
            None if self.density_forces is None else self.density_forces[rows],
            None if self.density_probes is None else split(self.density_probes),
            self.links,
        )

    def gather(
        self,
        molecules: NDArray[np.int64],
        frames: NDArray[np.int64],
        probes: NDArray[np.int64],
        weight: float,
        storage: Storage,
    ) -> Batch:
        """The batch of some frames (F,), each of a member (F,), with some of its probes (F, P)."""
        rows = torch.from_numpy(self.first_frame[molecules] + frames)
        first = self.first_probe[molecules] + frames * self.n_probes[molecules]
        columns = torch.from_numpy(first[:, None] + probes)
        return Batch(
            storage.gather(self.positions, rows),
            storage.gather(self.forces, rows),
            storage.gather(self.probes, columns),
            storage.gather(self.hvps, columns),
            self.species[0] if len(self.members) == 1 else self.species[torch.from_numpy(molecules)],
            self.bonded,
            storage.gather(self.covariances, columns),
            self.own_share[torch.from_numpy(molecules)],
            None if self.whitening is None else storage.gather(self.whitening, rows),
            None if self.density_forces is None else storage.gather(self.density_forces, rows),
            None if self.density_probes is None else storage.gather(self.density_probes, columns),
            self.links,
            weight,
        )


class FrameBatches(Dataset[Batch]):
    """Maps a :class:`BatchIndex` to its :class:`Batch`; the groups lie in ``storage``."""

    def __init__(self, groups: Sequence[FrameGroup], storage: Storage | None = None) -> None:
        self.groups = list(groups)
        self.storage = storage or Memory()
        n_molecules = sum(len(g.members) for g in groups)
        self._group, self._member = np.zeros((2, n_molecules), dtype=np.int64)
        for k, group in enumerate(groups):
            self._group[list(group.members)] = k
            self._member[list(group.members)] = np.arange(len(group.members))

    def __getitem__(self, index: BatchIndex) -> Batch:
        group = self.groups[self._group[index.molecules[0]]]
        return group.gather(self._member[index.molecules], *index[1:], self.storage)


class BatchSampler(Sampler[BatchIndex]):
    """Draws batches for an epoch.

    Parameters
    ----------
    frames : for each molecule, the frames to use
    n_probes : for each molecule, its probes per frame
    batch_size : frames in a batch
    shuffle : new order, and one random probe a frame, each epoch; else in order, with the first probe
    seed : with the epoch it decides the order
    groups : molecules that share batches; None: each has its own
    rank, n_ranks : which part of every batch this process takes, of how many
    """

    def __init__(
        self,
        frames: Sequence[NDArray[np.int64]],
        n_probes: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        groups: Sequence[Sequence[int]] | None = None,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        groups = [[k] for k in range(len(frames))] if groups is None else groups
        self.frames = [np.concatenate([frames[k] for k in group]) for group in groups]
        self.molecules = [np.repeat(group, [len(frames[k]) for k in group]) for group in groups]
        self.n_probes = np.asarray(n_probes)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank, self.n_ranks = rank, n_ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(f) // self.batch_size) for f in self.frames)

    def __iter__(self) -> Iterator[BatchIndex]:
        generator = np.random.default_rng([self.seed, self.epoch])
        batches: list[BatchIndex] = []
        for molecules, frames in zip(self.molecules, self.frames, strict=True):
            probes = np.zeros((len(frames), 1), dtype=np.int64)
            if self.shuffle:
                order = generator.permutation(len(frames))
                molecules, frames = molecules[order], frames[order]
                probes = generator.integers(0, self.n_probes[molecules, None])
            for start in range(0, len(frames), self.batch_size):
                rows = slice(start, start + self.batch_size)
                batches.append(self._take_part(molecules[rows], frames[rows], probes[rows]))
        if self.shuffle:
            generator.shuffle(batches)
        return iter(batches)

    def _take_part(
        self, molecules: NDArray[np.int64], frames: NDArray[np.int64], probes: NDArray[np.int64]
    ) -> BatchIndex:
        """This process's part of a batch. One with fewer frames than processes leaves some with a frame of no weight:
        all have to take part in every step."""
        part = slice(self.rank, None, self.n_ranks)
        weight = len(frames[part]) * self.n_ranks / len(frames)
        if weight == 0.0:
            part = slice(0, 1)
        return BatchIndex(molecules[part], frames[part], probes[part], weight)
