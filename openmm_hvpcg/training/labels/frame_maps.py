"""The force map of each frame (cross-fitting), and how noisy labels are by map."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.atomistic.systems import AtomisticSystem
from openmm_hvpcg.errors import DataError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import PathLike, read_array
from openmm_hvpcg.training.labels.force_maps import METHODS, ForceMap, fit_force_maps
from openmm_hvpcg.training.labels.hvp import ForceFunction, compute_projected_hvps
from openmm_hvpcg.training.labels.oracle import find_active_atoms, find_rigid_clusters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameMaps:
    """Force maps by fold, none of which has seen the forces of the frames it projects.

    A map fitted to a frame's own forces makes its label too small (see
    :mod:`openmm_hvpcg.training.labels.force_maps`). All are admissible: the mean label is the same for each.

    Attributes
    ----------
    weights : (K, B, A)
    fold : (T,) the map of each frame
    """

    weights: NDArray[np.float64]
    fold: NDArray[np.int64]

    @classmethod
    def read(cls, group: Any, path: PathLike) -> FrameMaps:
        """From a dataset; one made before there were folds has one map."""
        if "fold_force_maps" in group:
            weights, fold = read_array(group, "fold_force_maps", path), read_array(group, "fold", path)
        else:
            weights = read_array(group, "force_map", path)[None]
            fold = np.zeros(group["done"].shape, dtype=np.int64)
        # What a lost chunk reads as.
        if not np.isfinite(weights).all() or not np.isin(fold, np.arange(len(weights))).all():
            raise DataError("the force maps are damaged", where=path, hint="make the file again")
        return cls(weights, fold)

    def select(self, rows: slice | NDArray[np.int64]) -> FrameMaps:
        """The maps of some frames."""
        return FrameMaps(self.weights, self.fold[rows])

    def project(self, forces: NDArray[Any]) -> NDArray[np.float64]:
        """Bead forces (T, B, 3) of the atom forces (T, A, 3) of all frames, in order."""
        projected = np.empty((len(forces), self.weights.shape[1], 3))
        for k in np.unique(self.fold):
            projected[self.fold == k] = np.matmul(self.weights[k], forces[self.fold == k])
        return projected

    def compute_hvps(
        self,
        force_function: ForceFunction,
        positions: NDArray[Any],
        probes: NDArray[Any],
        step_nm: float,
        boxes: NDArray[Any] | None = None,
    ) -> NDArray[np.float64]:
        """Projected HVPs of all frames, in order; see :func:`compute_projected_hvps`."""
        hvps = np.empty(probes.shape)
        for k in np.unique(self.fold):
            own = self.fold == k
            boxes_k = None if boxes is None else boxes[own]
            hvps[own] = compute_projected_hvps(
                force_function, positions[own], probes[own], self.weights[k], step_nm, boxes_k
            )
        return hvps


@dataclass(frozen=True)
class MapSample:
    """Frames that maps are fitted to and judged on.

    Attributes
    ----------
    system, bead_map : whose maps they are
    forces : (T, A, 3) AA forces, kJ/mol/nm
    fold : (T,) fold of each
    """

    system: AtomisticSystem
    bead_map: BeadMap
    forces: NDArray[np.float64]
    fold: NDArray[np.int64]

    def fit(self, method: str) -> tuple[ForceMap, FrameMaps]:
        """A map by name, of the whole sample, and those of the folds."""
        site_weights, topology = self.bead_map.site_weights, self.system.topology
        whole, by_fold = fit_force_maps(
            method,
            site_weights,
            find_rigid_clusters(self.system.system),
            find_active_atoms(self.system.system, topology, site_weights),
            self.forces,
            np.array([(a.index, b.index) for a, b in topology.bonds], dtype=np.int64).reshape(-1, 2),
            self.fold,
        )
        return whole, FrameMaps(by_fold, self.fold)


def compare_force_maps(
    sample: MapSample,
    force_function: ForceFunction,
    rows: NDArray[np.int64],
    positions: NDArray[Any],
    probes: NDArray[Any],
    step_nm: float,
    boxes: NDArray[Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Root mean squares of projected forces and HVPs for each map, ``{map: {"forces": , "hvps": }}``.

    The mean force is the same for all maps, so that what one has more than another is noise; fitted maps are judged on
    frames they have not seen. Costs two force calls a map and probe.

    Parameters
    ----------
    sample : frames of the force figure, all of them
    force_function : AA forces
    rows : (n,) rows of the sample used for the HVP figure
    positions, probes, boxes : (n, A, 3) nm, (n, P, B, 3), and (n, 3, 3) nm or None: theirs
    step_nm : of the finite differences
    """
    comparison = {}
    for method in METHODS:
        _, maps = sample.fit(method)
        hvps = maps.select(rows).compute_hvps(force_function, positions, probes, step_nm, boxes)
        comparison[method] = {"forces": _rms(maps.project(sample.forces)), "hvps": _rms(hvps)}
    logger.info(
        "rms of projected forces (kJ/mol/nm) and HVPs (kJ/mol/nm^2) by force map: %s",
        ", ".join(f"{name} {rms['forces']:.0f} and {rms['hvps']:.3g}" for name, rms in comparison.items()),
    )
    return comparison


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))
