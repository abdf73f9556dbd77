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
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_hvpcg.storage import check_free_space, explain_disk_errors


class Storage(Protocol):
    """Gives tensors, and may be told that nothing of them is needed for now."""

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Float32 zeros of a shape, to be written to; no two have one name."""

    def gather(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """``tensor[rows]`` of an allocated tensor, or of whole rows of one; for rows that lie far apart."""

    def release(self) -> None:
        """Keep nothing of the tensors in memory that lies in files."""

    def publish(self) -> None:
        """Bring what was written where other machines can read it."""

    def refresh(self) -> None:
        """See what another machine has published."""


class Memory:
    """Tensors in memory."""

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Zeros that take no memory until they are written to."""
        return torch.from_numpy(np.zeros(shape, dtype=np.float32))

    def gather(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """``tensor[rows]``."""
        return tensor[rows]

    def release(self) -> None:
        """Nothing to do."""

    publish = refresh = release


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
        #: Of each file the address it is mapped to, its size, and the file.
        self._files: list[tuple[int, int, BinaryIO]] = []
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
        with explain_disk_errors(path):
            file = open(path, "r+b" if self.attach else "w+b", buffering=0)  # noqa: SIM115  open as long as the map
            if not self.attach:
                _reserve(file.fileno(), n_bytes)
            self._maps.append(mmap.mmap(file.fileno(), n_bytes))
        tensor = torch.from_numpy(np.frombuffer(self._maps[-1], dtype=np.float32).reshape(shape))
        self._files.append((tensor.data_ptr(), n_bytes, file))
        return tensor

    def gather(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """``tensor[rows]``, read from the file: through the map, each row could take megabytes around it along."""
        address, size = tensor.data_ptr(), 4 * math.prod(tensor.shape[1:])
        at, _, file = next(f for f in self._files if f[0] <= address < f[0] + f[1])
        found = np.empty((*rows.shape, *tensor.shape[1:]), dtype=np.float32)
        if found.size > 0:
            wanted, buffer = rows.flatten().numpy(), found.data.cast("B")
            starts = np.flatnonzero(np.diff(wanted, prepend=wanted[0] - 2) != 1)
            for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(wanted)], strict=True):
                place, n_bytes = address - at + int(wanted[start]) * size, (stop - start) * size
                buffer[start * size : stop * size] = os.pread(file.fileno(), n_bytes, place)
        return torch.from_numpy(found)

    def release(self) -> None:
        """Let go of the pages: what was written is kept, by the system's cache or in the files."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def publish(self) -> None:
        """Write to the disk, or the server, what is still in this machine's memory."""
        with explain_disk_errors(self.folder):
            for mapped, (_, _, file) in zip(self._maps, self._files, strict=True):
                mapped.flush()
                os.fsync(file.fileno())

    def refresh(self) -> None:
        """Open the files again: a network file system then looks whether what it remembers of them is out of date."""
        for _, _, file in self._files:
            with explain_disk_errors(file.name), open(file.name, "rb"):
                pass

    def delete(self) -> None:
        """Remove the files; what was given keeps its memory."""
        for _, _, file in self._files:
            file.close()
        self._files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Make the file so long, its blocks set aside: a full disk is an error now, and not a crash on a later write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.ftruncate(descriptor, n_bytes)
