"""What labels cost, said before it is spent."""

from __future__ import annotations

import logging

import numpy as np

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.training.labels.oracle import find_active_atoms

logger = logging.getLogger(__name__)


def state_cost(system: AtomisticSystem, bead_map: BeadMap, n_calls: int, calls_per_second: float) -> dict[str, float]:
    """Log how many atoms, force calls and seconds labels take at a measured rate; JSON-ready for the dataset."""
    seconds = n_calls / calls_per_second
    weighed = find_active_atoms(system.system, system.topology, bead_map.site_weights)
    logger.info(
        "%s: %d atoms (%d in molecules with beads, which alone force maps weigh), %d force calls of all at %.3g/s:"
        " about %s",
        system.name or "molecule",
        system.n_atoms,
        int(np.count_nonzero(weighed)),
        n_calls,
        calls_per_second,
        _show_time(seconds),
    )
    return {"atoms": system.n_atoms, "force_calls_per_second": calls_per_second, "estimated_s": seconds}


def _show_time(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"
