"""A further process of a training: ``python -m openmm_hvpcg.training.worker FOLDER PLACE``, a place in five words.

Started by :mod:`openmm_hvpcg.training.processes`, and of no use by hand.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from openmm_hvpcg.config import ModelSettings, TrainingSettings
from openmm_hvpcg.training.loop import train_network
from openmm_hvpcg.training.places import Place
from openmm_hvpcg.training.processes import READY, SCRATCH, leave_group, load_prepared


def main(folder: Path, place: Place) -> None:
    """Train with the others, on the settings and tensors in the folder of the training."""
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    made_from = json.loads((folder / "made_from.json").read_text(encoding="utf-8"))
    settings = TrainingSettings.model_validate(made_from["training"])
    model = ModelSettings.model_validate(made_from["model"])
    prepared = load_prepared(folder / SCRATCH)
    os.write(sys.stdout.fileno(), READY)
    train_network(prepared, settings, model, folder, place)
    leave_group()


def _end_with_the_first() -> None:
    """Wait for the end of the pipe from the first process, and end at once."""
    # Without Python's own buffer, whose lock would be in the way of a normal end.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Place.parse(sys.argv[2:]))
