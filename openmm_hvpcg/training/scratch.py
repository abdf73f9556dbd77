"""Where training tensors lie: in memory, or in files of which no more is in memory than what is looked at.

The files are mapped: the operating system reads the pages that are touched, and :meth:`Scratch.release` lets go of
them. Processes that open the same files share them.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_hvpcg.storage import check_free_space, explain_disk_errors


class Storage(Protocol):
    """Gives tensors, and may be told that nothing of them is needed for now."""

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Float32 zeros of a shape, to be written to; no two have one name."""

    def release(self) -> None:
        """Keep nothing of the tensors in memory that lies in files."""


class Memory:
    """Tensors in memory."""

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Zeros that take no memory until they are written to."""
        return torch.from_numpy(np.zeros(shape, dtype=np.float32))

    def release(self) -> None:
        """Nothing to do."""


class Scratch:
    """Tensors in files of a folder.

    Parameters
    ----------
    folder : of the files
    attach : take the files that another process has made there, instead of making them
    """

    def __init__(self, folder: Path, *, attach: bool = False) -> None:
        self.folder = folder
        self.attach = attach
        self._maps: list[mmap.mmap] = []
        if not attach:
            self.delete()
            with explain_disk_errors(folder):
                folder.mkdir(parents=True)

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Zeros of a shape, or where attached, what the other process wrote.

        Raises
        ------
        StorageError
            The disk has no room for it.
        """
        n_bytes = 4 * math.prod(shape)
        if n_bytes == 0:
            return torch.zeros(shape)
        path = self.folder / f"{name}.float32"
        if not self.attach:
            check_free_space(path, n_bytes)
        with explain_disk_errors(path), open(path, "r+b" if self.attach else "w+b") as handle:
            if not self.attach:
                _reserve(handle.fileno(), n_bytes)
            self._maps.append(mmap.mmap(handle.fileno(), n_bytes))
        return torch.from_numpy(np.frombuffer(self._maps[-1], dtype=np.float32).reshape(shape))

    def release(self) -> None:
        """Let go of the pages: what was written is kept, by the system's cache or in the files."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def delete(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Make the file so long, its blocks set aside: a full disk is an error now, and not a crash on a later write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.ftruncate(descriptor, n_bytes)
