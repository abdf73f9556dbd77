"""Labels of a few frames: what a process computes in one go, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import InputError
from openmm_hvpcg.training.labels.frame_maps import FrameMaps
from openmm_hvpcg.training.labels.hvp import ForceFunction
from openmm_hvpcg.training.labels.probes import ProbeLaw, draw_probes

Labels = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Recipe:
    """What the labels of a frame depend on beside the System: force maps ``weights`` (K, B, A), probes and step."""

    law: ProbeLaw
    n_probes: int
    seed: int
    step_nm: float
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """Frames to label.

    Attributes
    ----------
    index : (n,) of each frame, for its probes and for messages
    fold : (n,) its force map
    positions : (n, A, 3) nm
    beads : (n, B, 3) nm
    box : (n, 3, 3) nm, or None
    """

    index: NDArray[np.int64]
    fold: NDArray[np.int64]
    positions: NDArray[np.float32]
    beads: NDArray[np.float32]
    box: NDArray[Any] | None = None

    def select(self, rows: slice) -> Part:
        """Some of the frames."""
        box = None if self.box is None else self.box[rows]
        return Part(self.index[rows], self.fold[rows], self.positions[rows], self.beads[rows], box)


def label_part(force_function: ForceFunction, recipe: Recipe, part: Part) -> Labels:
    """Bead ``positions`` (n, B, 3), projected ``forces`` (n, B, 3), ``probes`` and ``hvps`` (n, P, B, 3) of frames.

    They do not depend on which frames are labelled together, where forces do not.

    Raises
    ------
    InputError
        Forces of a frame, which it names, are not finite.
    """
    try:
        return _label(force_function, recipe, part)
    except InputError:
        for k, frame in enumerate(part.index.tolist()):
            try:
                _label(force_function, recipe, part.select(slice(k, k + 1)))
            except InputError as error:
                raise InputError(str(error), where=f"frame {frame}") from error
        raise


def _label(force_function: ForceFunction, recipe: Recipe, part: Part) -> Labels:
    n_beads = recipe.weights.shape[1]
    probes = draw_probes(recipe.law, part.index, recipe.n_probes, n_beads, recipe.seed, part.beads)
    maps = FrameMaps(recipe.weights, part.fold)
    forces = maps.project(force_function(part.positions.astype(np.float64), part.box))
    hvps = maps.compute_hvps(force_function, part.positions, probes, recipe.step_nm, part.box)
    return {
        "positions": part.beads,
        "forces": forces.astype(np.float32),
        "probes": probes,
        "hvps": hvps.astype(np.float32),
    }
