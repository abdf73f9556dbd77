"""Prior parameters from mapped data, by Boltzmann inversion of each internal coordinate's distribution."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_hvpcg.config import PriorSettings
from openmm_hvpcg.errors import DataError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.prior_terms import (
    ANY,
    DIHEDRAL_ORDER,
    PriorParameters,
    bond_key,
    build_prior_geometry,
    chain_key,
    improper_key,
)
from openmm_hvpcg.training.models.priors import dihedral_angle
from openmm_hvpcg.units import compute_kt

logger = logging.getLogger(__name__)

#: Fewer frames do not fix a mean and a width; more than this is asked of nobody.
MIN_FRAMES = 20
#: A coordinate narrower than this is taken to be this wide: its spring would set the time step for nothing.
MIN_BOND_WIDTH_NM = 0.002
MIN_ANGLE_WIDTH = 0.01
#: Repulsion starts at this many times the shortest distances seen, but never beyond MAX_SIGMA_NM.
SIGMA_FACTOR = 1.1
MAX_SIGMA_NM = 0.6
SHORTEST_SHARE = 1e-3
DIHEDRAL_BINS = 60

Table = dict[str, tuple[float, ...]]


def fit_priors(
    molecules: Sequence[tuple[BeadMap, NDArray[Any]]], settings: PriorSettings, temperature_K: float
) -> PriorParameters:
    """Fit every prior term that ``settings`` switches on.

    Parameters
    ----------
    molecules : bead map and training positions (T, B, 3) nm of each molecule
    settings : which terms
    temperature_K : temperature of the data

    Raises
    ------
    DataError
        Fewer than ``MIN_FRAMES`` frames of some molecule.
    """
    kt = compute_kt(temperature_K)
    samples: dict[str, dict[str, list[NDArray[Any]]]] = defaultdict(lambda: defaultdict(list))
    sharing: dict[str, list[int]] = defaultdict(list)
    for bead_map, positions in molecules:
        if len(positions) < MIN_FRAMES:
            raise DataError(
                "too few frames to fit the priors",
                expected=f"at least {MIN_FRAMES} training frames",
                got=len(positions),
                hint="sample more frames",
            )
        _collect(samples, sharing, bead_map, np.asarray(positions, dtype=np.float64))

    def fit(term: str, function: Callable[[NDArray[Any]], tuple[float, ...]]) -> Table:
        table = {key: function(np.concatenate(values)) for key, values in sorted(samples[term].items())}
        if table:
            table[ANY] = function(np.concatenate([v for values in samples[term].values() for v in values]))
        return table

    dihedrals = fit("dihedrals", lambda x: _fit_dihedral(x, kt)) if settings.dihedrals else {}
    for key, row in dihedrals.items():
        # Dihedrals about one bond say the same thing: together they count once.
        share = (
            float(np.mean(sharing[key]))
            if key in sharing
            else float(np.mean([n for counts in sharing.values() for n in counts]))
        )
        dihedrals[key] = tuple(value / share for value in row)
    parameters = PriorParameters(
        bonds=fit("bonds", lambda x: _fit_harmonic(x, kt, MIN_BOND_WIDTH_NM)) if settings.bonds else {},
        angles=fit("angles", lambda x: _fit_harmonic(x, kt, MIN_ANGLE_WIDTH)) if settings.angles else {},
        dihedrals=dihedrals,
        impropers=fit("impropers", lambda x: _fit_improper(x, kt)) if settings.dihedrals else {},
        repulsion=fit("pairs", _fit_repulsion) if settings.repulsion else {},
        repulsion_epsilon=kt,
    )
    logger.info(
        "priors fitted: %s",
        ", ".join(f"{len(samples[t])} {t}" for t in ("bonds", "angles", "dihedrals", "impropers", "pairs")),
    )
    return parameters


def _collect(
    samples: dict[str, dict[str, list[NDArray[Any]]]],
    sharing: dict[str, list[int]],
    bead_map: BeadMap,
    positions: NDArray[np.float64],
) -> None:
    """Add this molecule's internal coordinates to the samples of each term, by species key."""
    geometry = build_prior_geometry(bead_map.bonds, bead_map.n_beads)
    names = np.asarray(bead_map.species, dtype=object)
    x = torch.from_numpy(positions)

    def add(term: str, index: NDArray[np.int64], values: NDArray[Any], key: Callable[..., str]) -> None:
        for column, atoms in enumerate(index):
            samples[term][key(tuple(names[atoms]))].append(values[:, column])

    add("bonds", geometry.bonds, _distances(positions, geometry.bonds), bond_key)
    add("pairs", geometry.pairs, _distances(positions, geometry.pairs), bond_key)
    add("angles", geometry.angles, _cosines(positions, geometry.angles), chain_key)
    for term, index, key in (
        ("dihedrals", geometry.dihedrals, chain_key),
        ("impropers", geometry.impropers, improper_key),
    ):
        add(term, index, dihedral_angle(x, torch.from_numpy(index)).numpy(), key)
    centres = [tuple(sorted(row[1:3])) for row in geometry.dihedrals.tolist()]
    for row, centre in zip(geometry.dihedrals, centres, strict=True):
        sharing[chain_key(tuple(names[row]))].append(centres.count(centre))


def _distances(positions: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.linalg.norm(positions[:, index[:, 1]] - positions[:, index[:, 0]], axis=-1)


def _cosines(positions: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    a = positions[:, index[:, 0]] - positions[:, index[:, 1]]
    b = positions[:, index[:, 2]] - positions[:, index[:, 1]]
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def _fit_harmonic(values: NDArray[Any], kt: float, min_width: float) -> tuple[float, ...]:
    """Spring constant kT/variance and mean."""
    return kt / max(float(values.var()), min_width**2), float(values.mean())


def _fit_dihedral(phi: NDArray[Any], kt: float) -> tuple[float, ...]:
    """Fourier series of ``-kT ln p``, weighted towards where the data are; empty bins hold one pseudo-count."""
    counts, edges = np.histogram(phi, bins=DIHEDRAL_BINS, range=(-np.pi, np.pi))
    p = (counts + 1.0) / (counts.sum() + DIHEDRAL_BINS)
    centres = 0.5 * (edges[1:] + edges[:-1])
    n = np.arange(1, DIHEDRAL_ORDER + 1)
    design = np.hstack([np.ones((DIHEDRAL_BINS, 1)), np.cos(centres[:, None] * n), np.sin(centres[:, None] * n)])
    weight = np.sqrt(p + 0.1 / DIHEDRAL_BINS)[:, None]
    coefficients = np.linalg.lstsq(design * weight, (-kt * np.log(p)) * weight[:, 0], rcond=None)[0]
    return tuple(float(c) for c in coefficients[1:])


def _fit_improper(phi: NDArray[Any], kt: float) -> tuple[float, ...]:
    """``k`` from the circular variance ``-2 ln R``, ``phi0`` the circular mean."""
    mean = np.exp(1j * phi).mean()
    variance = -2.0 * np.log(min(max(float(np.abs(mean)), 1e-3), 1.0))
    return kt / max(variance, MIN_ANGLE_WIDTH**2), float(np.angle(mean))


def _fit_repulsion(distances: NDArray[Any]) -> tuple[float, ...]:
    return (min(SIGMA_FACTOR * float(np.quantile(distances, SHORTEST_SHARE)), MAX_SIGMA_NM),)
