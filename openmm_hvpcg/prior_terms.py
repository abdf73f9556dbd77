"""The prior energy: its functional forms, its parameters by species, and the terms of one molecule.

Training fits the parameters, simulation turns the terms into OpenMM forces, the exported module evaluates the
same terms in torch; this module is what the three share. numpy alone.

Forms (r nm, angles rad, energies kJ/mol), each twice differentiable where the geometry is defined:

- bond       ``k/2 (r - r0)^2``
- angle      ``k/2 (cos(theta) - c0)^2``, smooth at theta = 0 and pi too
- dihedral   ``sum_n a_n cos(n phi) + b_n sin(n phi)``, n = 1 .. ``DIHEDRAL_ORDER``
- improper   ``k (1 - cos(phi - phi0))`` with phi the dihedral (centre, n1, n2, n3); it keeps the handedness
  that a network of distances cannot see
- repulsion  ``epsilon ((sigma/r)^4 - 1)^3`` for r < sigma, else 0; C2 at sigma
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import PotentialError

logger = logging.getLogger(__name__)

DIHEDRAL_ORDER = 3
#: Joins species into keys; no species may hold it.
KEY_SEPARATOR = "|"
#: Parameters under this key were fitted over all species and serve those that training never saw.
ANY = "*"
#: Table of :class:`PriorParameters` -> parameters of one term.
PARAMETER_COUNTS = {"bonds": 2, "angles": 2, "dihedrals": 2 * DIHEDRAL_ORDER, "impropers": 2, "repulsion": 1}


def bond_key(species: Sequence[str]) -> str:
    """Key of a bond or pair; the order of the two species does not matter."""
    return KEY_SEPARATOR.join(sorted(species))


def chain_key(species: Sequence[str]) -> str:
    """Key of an angle or dihedral; it reads the same from either end."""
    return KEY_SEPARATOR.join(min(tuple(species), tuple(reversed(species))))


def improper_key(species: Sequence[str]) -> str:
    """Key of an improper (centre, n1, n2, n3); order matters."""
    return KEY_SEPARATOR.join(species)


@dataclass(frozen=True)
class PriorParameters:
    """Parameters by species key; the JSON form of the prior in a potential file.

    ``bonds`` key -> (k kJ/mol/nm^2, r0 nm); ``angles`` key -> (k kJ/mol, cos0); ``dihedrals`` key ->
    (a_1..a_n, b_1..b_n) kJ/mol; ``impropers`` key -> (k kJ/mol, phi0 rad); ``repulsion`` key -> (sigma nm,);
    ``repulsion_epsilon`` kJ/mol. An empty dictionary switches a term off.
    """

    bonds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    angles: dict[str, tuple[float, ...]] = field(default_factory=dict)
    dihedrals: dict[str, tuple[float, ...]] = field(default_factory=dict)
    impropers: dict[str, tuple[float, ...]] = field(default_factory=dict)
    repulsion: dict[str, tuple[float, ...]] = field(default_factory=dict)
    repulsion_epsilon: float = 0.0

    def __post_init__(self) -> None:
        for name, width in PARAMETER_COUNTS.items():
            for key, values in getattr(self, name).items():
                if len(values) != width or not np.isfinite(values).all():
                    raise PotentialError(
                        f"{name} parameters of {key} are malformed", expected=f"{width} numbers", got=values
                    )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PriorParameters:
        try:
            terms = {
                name: {str(k): tuple(float(x) for x in v) for k, v in content[name].items()}
                for name in PARAMETER_COUNTS
            }
            return cls(**terms, repulsion_epsilon=float(content["repulsion_epsilon"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PotentialError(f"prior parameters are malformed ({error})") from error


@dataclass(frozen=True)
class PriorGeometry:
    """Index tuples of the prior terms of a molecule: what is bonded, bent, twisted, and what repels.

    ``bonds`` (n,2), ``angles`` (n,3) with the vertex in the middle, ``dihedrals`` (n,4), ``impropers`` (n,4)
    with the centre first, ``pairs`` (n,2) more than three bonds apart.
    """

    bonds: NDArray[np.int64]
    angles: NDArray[np.int64]
    dihedrals: NDArray[np.int64]
    impropers: NDArray[np.int64]
    pairs: NDArray[np.int64]


@dataclass(frozen=True)
class PriorTerms:
    """Prior terms of one molecule: indices and, row by row, their parameters (:class:`PriorParameters`)."""

    geometry: PriorGeometry
    bonds: NDArray[np.float64]
    angles: NDArray[np.float64]
    dihedrals: NDArray[np.float64]
    impropers: NDArray[np.float64]
    pairs: NDArray[np.float64]
    repulsion_epsilon: float


def build_prior_geometry(bonds: NDArray[np.int64], n_beads: int) -> PriorGeometry:
    """Enumerate angles, dihedrals, impropers and repelling pairs from the bonds of a molecule.

    Pairs joined by one, two or three bonds do not repel: the other terms speak for them.
    """
    neighbours: list[list[int]] = [[] for _ in range(n_beads)]
    for i, j in bonds.tolist():
        neighbours[i].append(j)
        neighbours[j].append(i)
    for entry in neighbours:
        entry.sort()
    angles = [(a, c, b) for c in range(n_beads) for a, b in combinations(neighbours[c], 2)]
    dihedrals = [
        (a, i, j, b)
        for i, j in bonds.tolist()
        for a in neighbours[i]
        for b in neighbours[j]
        if a != j and b != i and a != b
    ]
    impropers = [(c, *three) for c in range(n_beads) for three in combinations(neighbours[c], 3)]
    near = {tuple(sorted(pair)) for pair in bonds.tolist()}
    near |= {tuple(sorted((a, b))) for a, _, b in angles} | {tuple(sorted((t[0], t[3]))) for t in dihedrals}
    pairs = [pair for pair in combinations(range(n_beads), 2) if pair not in near]
    return PriorGeometry(
        np.asarray(bonds, dtype=np.int64).reshape(-1, 2),
        *(
            np.array(rows, dtype=np.int64).reshape(-1, width)
            for rows, width in ((angles, 3), (dihedrals, 4), (impropers, 4), (pairs, 2))
        ),
    )


def assign_prior_terms(parameters: PriorParameters, species: Sequence[str], bonds: NDArray[np.int64]) -> PriorTerms:
    """The prior terms of a molecule from its species (B,) and bonds (n, 2).

    A combination of species the fit never saw gets the parameters fitted over all species, with a warning.

    Raises
    ------
    PotentialError
        Neither parameters of its own nor general ones exist for a term that is switched on.
    """
    geometry = build_prior_geometry(bonds, len(species))
    names = np.asarray(species, dtype=object)

    def look_up(
        what: str, table: dict[str, tuple[float, ...]], index: NDArray[np.int64], key: Callable[..., str]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        if not table or len(index) == 0:
            return index[:0], np.zeros((0, len(next(iter(table.values()), ()))))
        rows, missing = [], set()
        for atoms in index:
            name = key(tuple(names[atoms]))
            if name not in table:
                missing.add(name)
            rows.append(table.get(name, table.get(ANY)))
        if any(row is None for row in rows):
            raise PotentialError(
                f"no {what} parameters for {', '.join(sorted(missing)[:5])}",
                hint="train on a molecule that holds these species bonded this way",
            )
        if missing:
            logger.warning("%s parameters fitted over all species serve %s", what, ", ".join(sorted(missing)[:10]))
        return index, np.array(rows, dtype=np.float64)

    bond_index, bond_rows = look_up("bond", parameters.bonds, geometry.bonds, bond_key)
    angle_index, angle_rows = look_up("angle", parameters.angles, geometry.angles, chain_key)
    dihedral_index, dihedral_rows = look_up("dihedral", parameters.dihedrals, geometry.dihedrals, chain_key)
    improper_index, improper_rows = look_up("improper", parameters.impropers, geometry.impropers, improper_key)
    pair_index, pair_rows = look_up("repulsion", parameters.repulsion, geometry.pairs, bond_key)
    return PriorTerms(
        PriorGeometry(bond_index, angle_index, dihedral_index, improper_index, pair_index),
        bond_rows.reshape(-1, 2),
        angle_rows.reshape(-1, 2),
        dihedral_rows.reshape(-1, 2 * DIHEDRAL_ORDER),
        improper_rows.reshape(-1, 2),
        pair_rows.reshape(-1, 1),
        parameters.repulsion_epsilon,
    )
