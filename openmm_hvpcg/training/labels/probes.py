"""Random probes for Hessian-vector products: their laws, seeds and second moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import ConfigError

#: E[v v^T] of each law: S = 1 makes the HVP loss an unbiased estimate of the Frobenius-norm objective (theory note).
PROBE_SECOND_MOMENTS = {"rademacher": "identity", "normal": "identity"}


def draw_probes(law: str, frames: NDArray[np.int64], n_probes: int, n_beads: int, seed: int) -> NDArray[np.float32]:
    """Probes (n, P, B, 3), independent for each frame.

    A frame's probes depend on ``seed`` and the frame's index alone, whatever chunk, worker or order it is labelled in.
    """
    if law not in PROBE_SECOND_MOMENTS:
        raise ConfigError("no such probe law", expected=", ".join(PROBE_SECOND_MOMENTS), got=law)
    probes = np.empty((len(frames), n_probes, n_beads, 3), dtype=np.float32)
    for row, frame in zip(probes, frames.tolist(), strict=True):
        generator = np.random.default_rng([seed, frame])
        if law == "rademacher":
            row[:] = 2.0 * generator.integers(0, 2, size=row.shape) - 1.0
        else:
            row[:] = generator.standard_normal(row.shape)
    return probes
