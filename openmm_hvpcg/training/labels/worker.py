"""A process that labels frames: ``python -m openmm_hvpcg.training.labels.worker FD``.

Started by :mod:`openmm_hvpcg.training.labels.team`, and of no use by hand. It writes no file, sends what it computes
through the connection it was given, and ends with the process at the other end.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray

from openmm_hvpcg.errors import HVPCGError
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.training.labels.parts import Part, Recipe, label_part
from openmm_hvpcg.training.labels.probes import ProbeLaw

Arrays = dict[str, NDArray[Any]]


def send(connection: Connection, header: dict[str, Any], arrays: Arrays) -> None:
    """Send a message: what JSON can say, and arrays."""
    layout = {name: (values.dtype.str, values.shape) for name, values in arrays.items()}
    connection.send_bytes(json.dumps({**header, "arrays": layout}).encode())
    for values in arrays.values():
        connection.send_bytes(values.tobytes())


def receive(connection: Connection) -> tuple[dict[str, Any], Arrays]:
    """The message that :func:`send` sent at the other end."""
    header: dict[str, Any] = json.loads(connection.recv_bytes())
    arrays = {}
    for name, (dtype, shape) in header.pop("arrays").items():
        arrays[name] = np.frombuffer(connection.recv_bytes(), dtype=dtype).reshape(shape)
    return header, arrays


def main() -> None:
    """Say that it is there, take a recipe, then label one part after the other."""
    # An interruption from the terminal is the first process's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    send(connection, {}, {})
    parts: queue.SimpleQueue[tuple[dict[str, Any], Arrays]] = queue.SimpleQueue()
    threading.Thread(target=_read_ahead, args=(connection, parts), daemon=True).start()
    header, arrays = parts.get()
    system = openmm.XmlSerializer.deserialize(header["system"])
    recipe = Recipe(ProbeLaw(**header["law"]), header["n_probes"], header["seed"], header["step_nm"], **arrays)
    with ForceOracle(system, header["platform"], header["properties"]) as oracle:
        while True:
            _, arrays = parts.get()
            try:
                answer: tuple[dict[str, Any], Arrays] = {}, label_part(oracle, recipe, Part(**arrays))
            except HVPCGError as error:
                answer = {"error": str(error), "kind": type(error).__name__}, {}
            except (openmm.OpenMMException, ValueError) as error:
                answer = {"error": f"labelling failed ({error})", "kind": "BackendError"}, {}
            send(connection, *answer)


def _read_ahead(connection: Connection, parts: queue.SimpleQueue[tuple[dict[str, Any], Arrays]]) -> None:
    """Take what comes, so that the sender never waits for a force call; end at once when it is gone."""
    try:
        while True:
            parts.put(receive(connection))
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
