"""Which of the processes that train together this one is, in the words of Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from openmm_hvpcg.quiet import hide_c_output

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """The ``rank``-th of ``n_ranks`` processes on ``n_machines``, which meet at ``port`` of the first one's address."""

    rank: int
    n_ranks: int
    port: int
    n_machines: int = 1
    address: str = HOST

    @classmethod
    def parse(cls, words: Sequence[str]) -> Place:
        """Inverse of :meth:`to_words`."""
        rank, n_ranks, port, n_machines = map(int, words[:4])
        return cls(rank, n_ranks, port, n_machines, words[4])

    def to_words(self) -> list[str]:
        """As arguments of a command."""
        return [str(value) for value in astuple(self)]

    @property
    def n_devices(self) -> int:
        """Processes on each machine."""
        return self.n_ranks // self.n_machines

    @property
    def machine(self) -> int:
        """Which machine this is, from 0."""
        return self.rank // self.n_devices


ALONE = Place(0, 1, 0)


class ProcessPlace(LightningEnvironment):
    """Tells Lightning that the processes are there already."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none: it would run the whole command again."""
        return True

    @property
    def main_address(self) -> str:
        """Where the first process is."""
        return self.place.address

    @property
    def main_port(self) -> int:
        """Where it listens."""
        return self.place.port

    def local_rank(self) -> int:
        """Which one of its machine this is, and with that its device."""
        return self.place.rank % self.place.n_devices

    def node_rank(self) -> int:
        """Which machine this is."""
        return self.place.machine


class SharedStrategy(DDPStrategy):
    """Distributed data parallel: a copy of the network in each process, gradients averaged over them."""

    def __init__(self) -> None:
        # Of some weights, such as the last bias, forces know nothing.
        super().__init__(find_unused_parameters=True, broadcast_buffers=False)

    def setup_distributed(self) -> None:
        """Meet the others, without what Gloo has to say about it on standard output."""
        with hide_c_output():
            super().setup_distributed()
