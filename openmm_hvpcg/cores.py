"""How many cores there are, and how many threads torch should use for a model of a given size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

#: Pairs of beads that give a thread enough to do. Below it a second thread costs more than it brings, and on a machine
#: that is busy it can cost a hundredfold: OpenMP threads spin while they wait for one that has no core.
PAIRS_PER_THREAD = 1600


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_threads() -> int:
    """Threads this process may use: its cores, or OMP_NUM_THREADS where that is fewer."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(count_cores(), int(asked)) if asked.isdecimal() and int(asked) > 0 else count_cores()


def choose_torch_threads(n_beads: int, n_copies: int, pairs_per_thread: int = PAIRS_PER_THREAD) -> int:
    """Torch threads for a network on ``n_copies`` molecules of ``n_beads`` at once.

    By size, not by measuring, so that the same run on the same machine sums in the same order.
    """
    return int(min(count_threads(), max(1, n_copies * n_beads**2 // pairs_per_thread)))


@contextmanager
def use_torch_threads(n_threads: int) -> Iterator[None]:
    """Let torch use ``n_threads`` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
