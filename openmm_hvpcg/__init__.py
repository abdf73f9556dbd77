"""Coarse-grained neural potentials trained by force and Hessian-vector-product matching, run in OpenMM.

The names a script needs most are here; each is imported when it is first used: ``import openmm_hvpcg`` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from openmm_hvpcg._version import __version__

_HOMES = {
    "AtomisticSystem": "openmm_hvpcg.atomistic.systems",
    "BeadMap": "openmm_hvpcg.mapping",
    "CGPotential": "openmm_hvpcg.simulation",
    "Frames": "openmm_hvpcg.frames",
    "build_atomistic_system": "openmm_hvpcg.atomistic.systems",
    "build_bead_map": "openmm_hvpcg.mapping",
    "check_potential": "openmm_hvpcg.simulation",
    "compare_runs": "openmm_hvpcg.analysis",
    "export_potential": "openmm_hvpcg.training.export",
    "fit_potential": "openmm_hvpcg.training.fit",
    "label_frames": "openmm_hvpcg.training.labels.label",
    "load_dataset": "openmm_hvpcg.training.dataset",
    "load_frames": "openmm_hvpcg.frames",
    "load_system": "openmm_hvpcg.simulation",
    "sample_frames": "openmm_hvpcg.atomistic.sampling",
    "save_system": "openmm_hvpcg.simulation",
    "simulate": "openmm_hvpcg.simulation",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openmm_hvpcg' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
