"""A walker's OpenMM state on disk, with the frames it belongs to."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from openmm_hvpcg.storage import atomic_path, compute_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a walker, and the frames and equilibration steps that lie before it."""

    frame: int
    equilibrated: int
    platform: str
    state: bytes


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    header = {
        "frame": checkpoint.frame,
        "equilibrated": checkpoint.equilibrated,
        "platform": checkpoint.platform,
        "sha256": compute_hash(checkpoint.state),
    }
    with atomic_path(path) as temporary:
        temporary.write_bytes(json.dumps(header).encode() + b"\n" + checkpoint.state)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """A checkpoint, or None if there is none or it is damaged."""
    try:
        header_line, _, state = path.read_bytes().partition(b"\n")
        header = json.loads(header_line)
        if header["sha256"] == compute_hash(state):
            return Checkpoint(int(header["frame"]), int(header["equilibrated"]), str(header["platform"]), state)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning("%s is damaged and not used", path)
    return None
