"""The arms of the accuracy study: labels, settings and pace of each, for each molecule, as the search left them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """Which labels an arm is trained on, and how.

    ``pace`` is the passes over the data and the learning rate by number of frames; ``by_size`` holds settings of one
    size alone; ``probes`` None takes all of the labels'.
    """

    labels: str
    settings: dict[str, Any]
    pace: dict[int, tuple[int, float]]
    probes: int | None = None
    by_size: dict[int, dict[str, Any]] = field(default_factory=dict)


AS_IN_THE_PAPER = {"hvp_weight": 1.0, "covariance": "frame"}
POOLED = {"hvp_weight": "balanced", "covariance": "pooled", "covariance_frames": 7000.0}
SAMPLED = {"hvp_weight": 1.0, "covariance": "sample", "weight_decay": 0.01}


def list_arms(
    forces: dict[int, tuple[int, float]],
    pooled: dict[int, tuple[int, float]],
    averaged: dict[int, tuple[int, float]],
) -> dict[str, Arm]:
    """The five arms at the pace of force matching, of pooled and of averaged labels."""
    # With many frames a share of each frame's own covariance that is right for few drowns the rest in noise.
    more_pooling = {16000: {"covariance_frames": 50000.0}}
    return {
        "fm": Arm("optimal", {"hvp_weight": 0.0}, forces),
        "hvp slice": Arm("slice", AS_IN_THE_PAPER, forces),
        "hvp optimal": Arm("optimal", AS_IN_THE_PAPER, forces, probes=4),
        "best": Arm("optimal", POOLED, pooled, by_size=more_pooling),
        "best averaged": Arm("averaged", SAMPLED, averaged),
    }


#: Noisy labels are overfitted in more steps than those of the first table of each molecule; alanine's pooled targets
#: are quiet enough to go on learning.
ARMS = {
    "alanine": list_arms(
        {250: (300, 3e-3), 1000: (100, 3e-3), 4000: (80, 1e-2), 16000: (30, 1e-2)},
        {250: (300, 1e-2), 1000: (400, 1e-2), 4000: (160, 1e-2), 16000: (40, 1e-2)},
        {250: (300, 1e-2), 1000: (100, 1e-2), 4000: (160, 1e-2)},
    ),
    "pentapeptide": list_arms(
        {250: (60, 3e-3), 1000: (30, 3e-3), 4000: (20, 3e-3), 16000: (15, 3e-3)},
        {250: (60, 5e-3), 1000: (60, 5e-3), 4000: (80, 1e-2), 16000: (30, 1e-2)},
        {250: (60, 1e-2), 1000: (40, 1e-2), 4000: (40, 1e-2)},
    ),
}
NAMES = tuple(ARMS["alanine"])
