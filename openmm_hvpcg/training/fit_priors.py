"""Prior parameters from mapped data, by Boltzmann inversion of each internal coordinate's distribution.

Every key of :func:`~openmm_hvpcg.prior_terms.list_keys` that enough molecules share gets parameters, fitted over all
training molecules. Each occurrence of a term (this bond of this molecule) counts alike, however many frames its
molecule has: for a molecule never seen, an occurrence is one example, and how long it was sampled says nothing about
how common it is.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from openmm_hvpcg.config import PriorSettings
from openmm_hvpcg.errors import DataError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.prior_terms import (
    ANY,
    DIHEDRAL_ORDER,
    KEY_FORMS,
    NO_WALL,
    PriorGeometry,
    PriorParameters,
    bond_key,
    build_prior_geometry,
    is_general,
    list_keys,
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
#: The wall before straight angles: how far in cos(theta) from the frames it starts, how high it is where they are
#: straight, and beyond which start there is none. Without it one or two of 64 copies of peptides that training never
#: saw found a straight angle within 50 ps, and the dihedral prior tore them apart.
WALL_MARGIN = 0.02
WALL_HEIGHT_KT = 20.0
STRAIGHT = -0.97
#: How near two residues come, and how the neighbours of a bead stand, depends on the fold and the place in the chain.
#: A few molecules do not tell this for one combination of species, and an unseen one runs into the wall: with ten
#: peptides of five residues, C-alpha and C-beta beads and each held out in turn, such keys of two molecules changed
#: the prior forces on it by 63 to 157 kJ/mol/nm rms in all; without them it was 27.
CONTEXT_TERMS = ("impropers", "repulsion")

Table = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class _Occurrence:
    """What one molecule's frames say of one of its terms.

    ``summary`` is the mean and variance of a bond or of an angle's cosine, of the latter the lowest value too; the
    shares of the bins of a dihedral, the mean cosine and sine of an improper, the shortest distance of a pair;
    ``sharing`` the number of dihedrals about the same bond.
    """

    molecule: int
    n_frames: int
    summary: NDArray[np.float64]
    sharing: int = 1


def fit_priors(
    molecules: Sequence[tuple[BeadMap, NDArray[Any]]],
    settings: PriorSettings,
    temperature_K: float,
    log_densities: Sequence[NDArray[np.float64] | None] | None = None,
) -> PriorParameters:
    """Fit every prior term that ``settings`` switches on.

    Parameters
    ----------
    molecules : bead map and training positions (T, B, 3) nm of each molecule
    settings : which terms; a key needs ``min_molecules`` molecules, or all of them where there are fewer; where more
        than one is needed, keys of ``CONTEXT_TERMS`` are general
    temperature_K : temperature of the data
    log_densities : of a molecule whose frames were sampled with a bias along its dihedrals, ``ln p`` of each of them
        without it: coefficients (D, 2, n) of cos and sin of its multiples, in the order of the dihedrals. They stand
        for the frames' own distributions

    Raises
    ------
    DataError
        Fewer than ``MIN_FRAMES`` frames of some molecule.
    """
    kt = compute_kt(temperature_K)
    needed = settings.limit_to(len(molecules)).min_molecules
    found: dict[str, dict[str, list[_Occurrence]]] = {term: defaultdict(list) for term in KEY_FORMS}
    log_densities = log_densities or [None] * len(molecules)
    for number, ((bead_map, positions), known) in enumerate(zip(molecules, log_densities, strict=True)):
        if len(positions) < MIN_FRAMES:
            raise DataError(
                "too few frames to fit the priors",
                expected=f"at least {MIN_FRAMES} training frames",
                got=len(positions),
                hint="sample more frames",
            )
        _collect(found, number, bead_map, np.asarray(positions, dtype=np.float64), known)

    def fit(term: str, function: Callable[[list[_Occurrence]], tuple[float, ...]]) -> Table:
        return {
            key: function(occurrences)
            for key, occurrences in sorted(found[term].items())
            if key == ANY or len({o.molecule for o in occurrences}) >= needed
            if needed == 1 or term not in CONTEXT_TERMS or is_general(term, key)
        }

    parameters = PriorParameters(
        bonds=fit("bonds", lambda o: _fit_harmonic(o, kt, MIN_BOND_WIDTH_NM)) if settings.bonds else {},
        angles=fit("angles", lambda o: _fit_angle(o, kt, settings.angle_walls)) if settings.angles else {},
        dihedrals=fit("dihedrals", lambda o: _fit_dihedral(o, kt)) if settings.dihedrals else {},
        impropers=fit("impropers", lambda o: _fit_improper(o, kt)) if settings.dihedrals else {},
        repulsion=fit("repulsion", _fit_repulsion) if settings.repulsion else {},
        repulsion_epsilon=kt,
    )
    logger.info("priors fitted; terms with parameters of their own: %s", _count_own(molecules, parameters))
    return parameters


def _count_own(molecules: Sequence[tuple[BeadMap, NDArray[Any]]], parameters: PriorParameters) -> str:
    """How many terms of the training molecules have parameters of their species alone; the others share."""
    words = []
    for term, form in KEY_FORMS.items():
        table = getattr(parameters, term)
        keys = [
            form.join([bead_map.species[bead] for bead in atoms])
            for bead_map, _ in molecules
            for atoms in getattr(build_prior_geometry(bead_map.bonds, bead_map.n_beads), form.geometry).tolist()
        ]
        if table and keys:
            words.append(f"{sum(key in table for key in keys)} of {len(keys)} {term}")
    return ", ".join(words) or "there are none"


def _collect(
    found: dict[str, dict[str, list[_Occurrence]]],
    number: int,
    bead_map: BeadMap,
    positions: NDArray[np.float64],
    log_densities: NDArray[np.float64] | None,
) -> None:
    """Add what the frames of molecule ``number`` say of its terms, under every key of theirs."""
    geometry = build_prior_geometry(bead_map.bonds, bead_map.n_beads)
    species = np.asarray(bead_map.species, dtype=object)
    centres = [tuple(sorted(row[1:3])) for row in geometry.dihedrals.tolist()]
    sharing = {"dihedrals": [centres.count(centre) for centre in centres]}
    for term, summaries in _summarise(geometry, species, positions, log_densities).items():
        index = getattr(geometry, KEY_FORMS[term].geometry)
        counts = sharing.get(term, [1] * len(index))
        for atoms, summary, count in zip(index, summaries, counts, strict=True):
            occurrence = _Occurrence(number, len(positions), summary, count)
            for key in list_keys(term, tuple(species[atoms])):
                found[term][key].append(occurrence)


def _summarise(
    geometry: PriorGeometry,
    species: NDArray[np.object_],
    positions: NDArray[np.float64],
    log_densities: NDArray[np.float64] | None,
) -> dict[str, list[NDArray[np.float64]]]:
    """Summaries of every term of a molecule, in the order of ``geometry``; see :class:`_Occurrence`."""
    x = torch.from_numpy(positions)
    phi = dihedral_angle(x, torch.from_numpy(geometry.dihedrals)).numpy()
    improper = dihedral_angle(x, torch.from_numpy(geometry.impropers)).numpy()
    return {
        "bonds": [np.array([v.mean(), v.var()]) for v in _distances(positions, geometry.bonds).T],
        "angles": [
            np.array([v.mean(), v.var(), np.quantile(v, SHORTEST_SHARE)])
            for v in _cosines(positions, geometry.angles).T
        ],
        "dihedrals": [np.histogram(v, DIHEDRAL_BINS, (-np.pi, np.pi))[0] / len(v) for v in phi.T]
        if log_densities is None
        else list(_find_shares(log_densities)),
        "impropers": [np.array([np.cos(v).mean(), np.sin(v).mean()]) for v in improper.T],
        "repulsion": _find_shortest(species, geometry.pairs, _distances(positions, geometry.pairs)),
    }


def _find_shares(log_densities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares (D, DIHEDRAL_BINS) of the bins by the coefficients (D, 2, n) of ``ln p``."""
    values = log_densities.reshape(len(log_densities), -1) @ _expand_bins(log_densities.shape[2]).T
    return np.asarray(softmax(values, axis=1))


def _expand_bins(order: int) -> NDArray[np.float64]:
    """Cosines and sines (DIHEDRAL_BINS, 2 order) of the multiples of the bins' centres."""
    centres = (np.arange(DIHEDRAL_BINS) + 0.5) * 2.0 * np.pi / DIHEDRAL_BINS - np.pi
    multiples = centres[:, None] * np.arange(1, order + 1)
    return np.hstack([np.cos(multiples), np.sin(multiples)])


def _find_shortest(
    species: NDArray[np.object_], pairs: NDArray[np.int64], distances: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Shortest distance of each pair, by a quantile over all pairs of the same species in the molecule."""
    columns: dict[str, list[int]] = defaultdict(list)
    keys = [bond_key(tuple(species[atoms])) for atoms in pairs]
    for column, key in enumerate(keys):
        columns[key].append(column)
    shortest = {key: np.quantile(distances[:, own], SHORTEST_SHARE, keepdims=True)[0] for key, own in columns.items()}
    return [shortest[key] for key in keys]


def _distances(positions: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.linalg.norm(positions[:, index[:, 1]] - positions[:, index[:, 0]], axis=-1)


def _cosines(positions: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    a = positions[:, index[:, 0]] - positions[:, index[:, 1]]
    b = positions[:, index[:, 2]] - positions[:, index[:, 1]]
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def _fit_harmonic(occurrences: list[_Occurrence], kt: float, min_width: float) -> tuple[float, ...]:
    """Spring constant kT/variance and mean."""
    means, variances = np.array([o.summary[:2] for o in occurrences]).T
    variance = variances.mean() + means.var()
    return kt / max(float(variance), min_width**2), float(means.mean())


def _fit_angle(occurrences: list[_Occurrence], kt: float, with_wall: bool) -> tuple[float, ...]:
    """Spring, and a wall that starts a little beyond the straightest angle seen; none where angles are straight."""
    start = min(float(o.summary[2]) for o in occurrences) - WALL_MARGIN
    wall = (WALL_HEIGHT_KT * kt, start) if with_wall and start > STRAIGHT else NO_WALL
    return (*_fit_harmonic(occurrences, kt, MIN_ANGLE_WIDTH), *wall)


def _fit_dihedral(occurrences: list[_Occurrence], kt: float) -> tuple[float, ...]:
    """Fourier series of ``-kT ln p``, weighted towards where the data are; empty bins hold one pseudo-count.

    Dihedrals about one bond say the same thing: together they count once.
    """
    n_frames = sum(o.n_frames for o in occurrences)
    counts = n_frames * np.mean([o.summary for o in occurrences], axis=0)
    p = (counts + 1.0) / (counts.sum() + DIHEDRAL_BINS)
    design = np.hstack([np.ones((DIHEDRAL_BINS, 1)), _expand_bins(DIHEDRAL_ORDER)])
    weight = np.sqrt(p + 0.1 / DIHEDRAL_BINS)[:, None]
    coefficients = np.linalg.lstsq(design * weight, (-kt * np.log(p)) * weight[:, 0], rcond=None)[0]
    share = np.mean([o.sharing for o in occurrences])
    return tuple(float(c) for c in coefficients[1:] / share)


def _fit_improper(occurrences: list[_Occurrence], kt: float) -> tuple[float, ...]:
    """``k`` from the circular variance ``-2 ln R``, ``phi0`` the circular mean."""
    cosine, sine = np.mean([o.summary for o in occurrences], axis=0)
    variance = -2.0 * np.log(min(max(float(np.hypot(cosine, sine)), 1e-3), 1.0))
    return kt / max(variance, MIN_ANGLE_WIDTH**2), float(np.arctan2(sine, cosine))


def _fit_repulsion(occurrences: list[_Occurrence]) -> tuple[float, ...]:
    """The least of all, so that shared parameters push nothing apart that some molecule holds together."""
    return (min(SIGMA_FACTOR * min(float(o.summary[0]) for o in occurrences), MAX_SIGMA_NM),)
