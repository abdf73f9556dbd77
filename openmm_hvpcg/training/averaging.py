"""A running mean of a network's weights during training: steadier than the weights of any one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

#: In the first steps the decay of step n is (1 + n) / (WARMUP + n), so that the untrained weights are soon forgotten.
WARMUP = 10
#: Names of the weights of the last step, and of the mean, in a checkpoint.
CURRENT, AVERAGED = "network.", "averaged.module."


def average_weights(network: torch.nn.Module, decay: float) -> AveragedModel:
    """A copy of the network whose weights follow as ``w += (1 - decay) (new - w)`` on ``update_parameters``."""

    def follow(averaged: Any, current: Any, n: Any) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + int(n)) / (WARMUP + int(n))))(averaged, current, n)

    return AveragedModel(network, multi_avg_fn=follow).requires_grad_(False)


def pick_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to keep of a checkpoint's: the mean where there is one."""
    prefix = AVERAGED if any(k.startswith(AVERAGED) for k in state) else CURRENT
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
