"""Worker processes of the package: modules that are run with one end of a connection."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO


def start_worker(module: str, log: IO[bytes], **environment: str) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start ``python -m module FD``, and connect to it.

    The module finds this package, wherever the program that runs was started, and needs no guard in its main script.

    Parameters
    ----------
    module : to run; it takes the descriptor of its end of the connection as its argument
    log : gets what the process prints
    environment : variables it has beside those of this process
    """
    ours, theirs = socket.socketpair()
    search = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))
    connection = Connection(ours.detach())
    with contextlib.closing(theirs):
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in search if p), **environment},
        )
    return process, connection
