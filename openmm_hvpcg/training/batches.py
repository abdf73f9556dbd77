"""Batches: frames of one molecule each, dense, shuffled over molecules, the same for the same seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler


@dataclass(frozen=True)
class MoleculeTensors:
    """Training tensors of one molecule, the priors' part already taken out of the labels.

    ``positions``, ``forces`` (T, B, 3); ``probes``, ``hvps``, ``covariances`` (T, P, B, 3), the last the covariance of
    forces times the probes, what of it is not taken from the residual of the day; ``own_share``, what is; ``species``
    (B,); ``whitening`` (T, 3B, 3B) or None.
    """

    positions: Tensor
    forces: Tensor
    probes: Tensor
    hvps: Tensor
    species: Tensor
    covariances: Tensor
    own_share: float = 1.0
    whitening: Tensor | None = None


class Batch(NamedTuple):
    """Frames of one molecule; see :class:`MoleculeTensors`."""

    positions: Tensor
    forces: Tensor
    probes: Tensor
    hvps: Tensor
    species: Tensor
    covariances: Tensor
    own_share: float
    whitening: Tensor | None


#: Molecule, its frames, and the probes of each that take part.
BatchIndex = tuple[int, NDArray[np.int64], NDArray[np.int64]]


class FrameBatches(Dataset[Batch]):
    """Maps a :data:`BatchIndex` to its :class:`Batch`."""

    def __init__(self, molecules: Sequence[MoleculeTensors]) -> None:
        self.molecules = molecules

    def __getitem__(self, index: BatchIndex) -> Batch:
        molecule, frames, probes = index
        source = self.molecules[molecule]
        rows, columns = torch.from_numpy(frames), torch.from_numpy(probes)
        return Batch(
            source.positions[rows],
            source.forces[rows],
            source.probes[rows[:, None], columns],
            source.hvps[rows[:, None], columns],
            source.species,
            source.covariances[rows[:, None], columns],
            source.own_share,
            None if source.whitening is None else source.whitening[rows],
        )


class BatchSampler(Sampler[BatchIndex]):
    """Draws batches for an epoch.

    Parameters
    ----------
    frames : for each molecule, the frames to use
    n_probes : for each molecule, its probes per frame
    batch_size : frames in a batch
    shuffle : new order, and one random probe a frame, each epoch; else in order, with the first probe
    seed : with the epoch it decides the order
    """

    def __init__(
        self,
        frames: Sequence[NDArray[np.int64]],
        n_probes: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.frames = list(frames)
        self.n_probes = list(n_probes)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(f) // self.batch_size) for f in self.frames)

    def __iter__(self) -> Iterator[BatchIndex]:
        generator = np.random.default_rng([self.seed, self.epoch])
        batches: list[BatchIndex] = []
        for molecule, frames in enumerate(self.frames):
            order = generator.permutation(frames) if self.shuffle else frames
            shape = (len(order), 1)
            probes = generator.integers(0, self.n_probes[molecule], shape) if self.shuffle else np.zeros(shape, int)
            for start in range(0, len(order), self.batch_size):
                stop = start + self.batch_size
                batches.append((molecule, order[start:stop], probes[start:stop]))
        if self.shuffle:
            generator.shuffle(batches)
        return iter(batches)
