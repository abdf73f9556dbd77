"""Silence for C libraries that write to standard output or error on their own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hide_c_output() -> Iterator[None]:
    """Send what is written to file descriptors 1 and 2 to nowhere, for the whole process, while it lasts.

    For short calls into libraries that print from C, such as the DCD reader of mdtraj; a redirection of
    ``sys.stdout`` does not reach them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)
