"""Processes that label frames side by side. The first of them is the one that asked.

Processes, not threads: of a force call of a small molecule so much is Python's that threads would wait for its lock.
What comes out does not depend on how many there are.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import Connection, wait
from typing import IO

import openmm

from openmm_hvpcg import errors
from openmm_hvpcg.atomistic.workers import start_worker
from openmm_hvpcg.errors import BackendError
from openmm_hvpcg.training.labels.hvp import ForceFunction
from openmm_hvpcg.training.labels.parts import Labels, Part, Recipe, label_part
from openmm_hvpcg.training.labels.worker import receive, send

#: Parts that a process has before it: one in work, one in waiting.
AHEAD = 2
Parts = Iterator[tuple[slice, Part]]


@dataclass
class _Member:
    """A process at work.

    ``begun``: it has started up and knows what to do; ``pending``: the parts it has, in order.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    errors: IO[bytes]
    begun: bool = False
    pending: deque[slice] = field(default_factory=deque)


class Team:
    """Other processes that label frames of one System, on as many cores.

    Parameters
    ----------
    n_others : processes to start; they start up while this one goes on
    system, platform, properties : as of :class:`~openmm_hvpcg.training.labels.oracle.ForceOracle`
    """

    def __init__(self, n_others: int, system: openmm.System, platform: str, properties: dict[str, str]) -> None:
        self._start = {"system": openmm.XmlSerializer.serialize(system), "platform": platform, "properties": properties}
        self._members: list[_Member] = []
        #: Frames of a part, for whoever cuts them.
        self.frames_at_once = 1
        try:
            for _ in range(n_others):
                self._members.append(_start_member())
        except BaseException:
            self.close()
            raise

    def label(self, recipe: Recipe, parts: Parts, force_function: ForceFunction) -> Iterator[tuple[slice, Labels]]:
        """Labels of all parts in the order they are finished; this process takes parts too, with its own forces.

        To be called once.

        Raises
        ------
        InputError
            Forces of a frame are not finite.
        BackendError
            A process ended before its time, or its platform failed.
        """
        while True:
            yield from self._collect(recipe, parts, 0.0)
            rows, part = next(parts, (None, None))
            if rows is None or part is None:
                break
            yield rows, label_part(force_function, recipe, part)
        while any(member.pending for member in self._members):
            yield from self._collect(recipe, parts, None)

    def _collect(self, recipe: Recipe, parts: Parts, timeout: float | None) -> list[tuple[slice, Labels]]:
        """What has been finished by others, who get new parts for it."""
        by_connection = {member.connection: member for member in self._members}
        found = []
        for connection in wait(list(by_connection), timeout):
            member = by_connection[connection]  # type: ignore[index]
            try:
                header, arrays = receive(member.connection)
                if "error" in header:
                    raise getattr(errors, header["kind"])(header["error"])
                if member.begun:
                    found.append((member.pending.popleft(), arrays))
                else:
                    self._begin(member, recipe)
                _feed(member, parts)
            except (EOFError, ConnectionResetError, BrokenPipeError) as error:
                raise _explain(member) from error
        return found

    def _begin(self, member: _Member, recipe: Recipe) -> None:
        header = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ("law", "weights")}
        send(member.connection, {**self._start, **header, "law": asdict(recipe.law)}, {"weights": recipe.weights})
        member.begun = True

    def close(self) -> None:
        """End the processes."""
        for member in self._members:
            member.connection.close()
            member.process.kill()
            member.process.wait()
            member.errors.close()
        self._members.clear()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _feed(member: _Member, parts: Parts) -> None:
    while len(member.pending) < AHEAD and (item := next(parts, None)) is not None:
        rows, part = item
        values = {f.name: getattr(part, f.name) for f in fields(part)}
        send(member.connection, {}, {name: v for name, v in values.items() if v is not None})
        member.pending.append(rows)


def _start_member() -> _Member:
    log = tempfile.TemporaryFile()  # noqa: SIM115
    # Products of small matrices: a process a core is enough.
    process, connection = start_worker("openmm_hvpcg.training.labels.worker", log, OMP_NUM_THREADS="1")
    return _Member(process, connection, log)


def _explain(member: _Member) -> BackendError:
    member.process.wait()
    member.errors.seek(0)
    tail = member.errors.read().decode(errors="replace").strip().splitlines()[-1:]
    return BackendError(
        f"a process that labels frames ended on its own (exit status {member.process.returncode}) {' '.join(tail)}",
        hint="free some memory or ask for fewer workers, and run the same again: it goes on where it was",
    )
