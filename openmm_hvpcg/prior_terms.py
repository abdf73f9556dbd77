"""The prior energy: its functional forms, its parameters by species, and the terms of one molecule.

Training fits the parameters, simulation turns the terms into OpenMM forces, the exported module evaluates the
same terms in torch; this module is what the three share. numpy alone.

Forms (r nm, angles rad, energies kJ/mol), each twice differentiable where the geometry is defined:

- bond       ``k/2 (r - r0)^2``
- angle      ``k/2 (cos(theta) - c0)^2 + h ((s - cos(theta)) / (1 + s))^3``, the second, a wall before straight
  angles, for cos(theta) < s alone; C2 at s, smooth at theta = 0 and pi too. Where an angle is straight, its dihedrals
  are not defined and their forces unbounded
- dihedral   ``sum_n a_n cos(n phi) + b_n sin(n phi)``, n = 1 .. ``DIHEDRAL_ORDER``
- improper   ``k (1 - cos(phi - phi0))`` with phi the dihedral (centre, n1, n2, n3); it keeps the handedness
  that a network of distances cannot see
- repulsion  ``epsilon ((sigma/r)^4 - 1)^3`` for r < sigma, else 0; C2 at sigma

A term gets the parameters of the most specific key that its table holds (:func:`list_keys`). The fit keeps the keys
that enough molecules share, so a rare combination of species gets the same general parameters in training as in a
molecule that training never saw, and the network learns on top of what it will be used on top of.
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
#: Comes before the atom in a species such as ``ALA:CB``.
ATOM_SEPARATOR = ":"
#: Residues that are no amino acids: their beads are a kind of their own.
CAPS = ("ACE", "NME")
#: Any species; as a whole key, parameters fitted over all of them.
ANY = "*"
#: Table of :class:`PriorParameters` -> parameters of one term.
PARAMETER_COUNTS = {"bonds": 2, "angles": 4, "dihedrals": 2 * DIHEDRAL_ORDER, "impropers": 2, "repulsion": 1}

#: Height and start of a wall before straight angles that is none.
NO_WALL = (0.0, 0.0)


def bond_key(species: Sequence[str]) -> str:
    """Key of a bond or pair; the order of the two species does not matter."""
    return KEY_SEPARATOR.join(sorted(species))


def chain_key(species: Sequence[str]) -> str:
    """Key of an angle or dihedral; it reads the same from either end."""
    return KEY_SEPARATOR.join(min(tuple(species), tuple(reversed(species))))


def improper_key(species: Sequence[str]) -> str:
    """Key of an improper (centre, n1, n2, n3); order matters."""
    return KEY_SEPARATOR.join(species)


def find_atom(species: str) -> str:
    """``*:CB`` of ``ALA:CB``, ``*`` of a species that names no atom."""
    _, separator, atom = species.rpartition(ATOM_SEPARATOR)
    return f"{ANY}{separator}{atom}" if separator else ANY


def find_kind(species: str) -> str:
    """What a species shares with those of other residues: its atom; a cap shares nothing."""
    return species if species in CAPS else find_atom(species)


@dataclass(frozen=True)
class KeyForm:
    """How the keys of one prior term are made.

    ``join`` makes a key of species in order; ``core`` are the positions that keep their species where the others are
    general: the vertex of an angle, the central pair of a dihedral, the centre of an improper; ``kind`` makes a species
    general; ``geometry`` is the field of :class:`PriorGeometry` and :class:`PriorTerms`.
    """

    join: Callable[[Sequence[str]], str]
    core: tuple[int, ...]
    geometry: str
    kind: Callable[[str], str] = find_kind


#: Table of :class:`PriorParameters` -> its keys.
KEY_FORMS = {
    "bonds": KeyForm(bond_key, (), "bonds"),
    "angles": KeyForm(chain_key, (1,), "angles"),
    "dihedrals": KeyForm(chain_key, (1, 2), "dihedrals"),
    "impropers": KeyForm(improper_key, (0,), "impropers"),
    # The two caps of a molecule meet too seldom to say how near they may come.
    "repulsion": KeyForm(bond_key, (), "pairs", find_atom),
}


def list_keys(term: str, species: Sequence[str]) -> list[str]:
    """Keys of a term, the most specific first.

    All its species; those at its core, the others as kinds (``KeyForm.kind``); kinds alone; ``ANY``. Of an angle
    between ALA, GLY and SER, in this order: ``ALA|GLY|SER``, ``*|GLY|*``, ``*``. Of one between ALA:CB, ALA:CA and
    GLY:CA: ``ALA:CB|ALA:CA|GLY:CA``, ``*:CB|ALA:CA|*:CA``, ``*:CB|*:CA|*:CA``, ``*``.

    Parameters
    ----------
    term : a key of ``KEY_FORMS``
    species : of the term's beads, in its order
    """
    form = KEY_FORMS[term]
    kinds = [form.kind(s) for s in species]
    core = [s if place in form.core else kind for place, (s, kind) in enumerate(zip(species, kinds, strict=True))]
    keys = [ANY if set(level) == {ANY} else form.join(level) for level in (species, core, kinds)]
    return list(dict.fromkeys([*keys, ANY]))


def is_general(term: str, key: str) -> bool:
    """Whether a key names no residue, but at the core of its term."""
    core = KEY_FORMS[term].core if key != ANY else ()
    parts = [part for place, part in enumerate(key.split(KEY_SEPARATOR)) if place not in core]
    return all(part.partition(ATOM_SEPARATOR)[0] == ANY for part in parts)


@dataclass(frozen=True)
class PriorParameters:
    """Parameters by species key; the JSON form of the prior in a potential file.

    ``bonds`` key -> (k kJ/mol/nm^2, r0 nm); ``angles`` key -> (k kJ/mol, c0, h kJ/mol, s), of files before version 2
    (k, c0) alone; ``dihedrals`` key -> (a_1..a_n, b_1..b_n) kJ/mol; ``impropers`` key -> (k kJ/mol, phi0 rad);
    ``repulsion`` key -> (sigma nm,); ``repulsion_epsilon`` kJ/mol. An empty dictionary switches a term off.
    """

    bonds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    angles: dict[str, tuple[float, ...]] = field(default_factory=dict)
    dihedrals: dict[str, tuple[float, ...]] = field(default_factory=dict)
    impropers: dict[str, tuple[float, ...]] = field(default_factory=dict)
    repulsion: dict[str, tuple[float, ...]] = field(default_factory=dict)
    repulsion_epsilon: float = 0.0

    def __post_init__(self) -> None:
        walled = {key: (*row, *NO_WALL) if len(row) == 2 else row for key, row in self.angles.items()}
        object.__setattr__(self, "angles", walled)
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


def _list_neighbours(bonds: NDArray[np.int64], n_beads: int) -> list[list[int]]:
    """The beads that each bead is bonded to, in order."""
    neighbours: list[list[int]] = [[] for _ in range(n_beads)]
    for i, j in bonds.tolist():
        neighbours[i].append(j)
        neighbours[j].append(i)
    return [sorted(entry) for entry in neighbours]


def build_prior_geometry(bonds: NDArray[np.int64], n_beads: int) -> PriorGeometry:
    """Enumerate angles, dihedrals, impropers and repelling pairs from the bonds of a molecule.

    Pairs joined by one, two or three bonds do not repel: the other terms speak for them.
    """
    neighbours = _list_neighbours(bonds, n_beads)
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


def list_rows(bonds: NDArray[np.int64], n_beads: int, length: int) -> NDArray[np.int64]:
    """Beads in a row along the bonds of a molecule (n, length), each row once; a length of at least four.

    A row goes upwards: its second bead comes before its last but one. Chains are numbered from their beginning, so that
    rows go along them.
    """
    neighbours = _list_neighbours(bonds, n_beads)
    rows: list[tuple[int, ...]] = [(bead,) for bead in range(n_beads)]
    for _ in range(length - 1):
        rows = [(*row, bead) for row in rows for bead in neighbours[row[-1]] if bead not in row]
    return np.array(sorted(row for row in rows if row[1] < row[-2]), dtype=np.int64).reshape(-1, length)


def assign_prior_terms(parameters: PriorParameters, species: Sequence[str], bonds: NDArray[np.int64]) -> PriorTerms:
    """The prior terms of a molecule from its species (B,) and bonds (n, 2).

    Raises
    ------
    PotentialError
        Neither parameters of its own nor general ones exist for a term that is switched on.
    """
    geometry = build_prior_geometry(bonds, len(species))
    names = np.asarray(species, dtype=object)
    index: dict[str, NDArray[np.int64]] = {}
    rows: dict[str, NDArray[np.float64]] = {}
    general = []
    for term, form in KEY_FORMS.items():
        table = getattr(parameters, term)
        atoms = getattr(geometry, form.geometry)[: None if table else 0]
        tuples = [tuple(names[row]) for row in atoms]
        keys = [_choose_key(term, table, combination) for combination in tuples]
        index[form.geometry] = atoms
        rows[form.geometry] = np.array([table[key] for key in keys]).reshape(-1, PARAMETER_COUNTS[term])
        n_general = sum(key != form.join(combination) for key, combination in zip(keys, tuples, strict=True))
        if n_general:
            general.append(f"{n_general} of {len(keys)} {term}")
    if general:
        # The fit tells it once; this runs for every System and script that is made.
        logger.debug("prior parameters shared by several species serve %s", ", ".join(general))
    return PriorTerms(PriorGeometry(**index), **rows, repulsion_epsilon=parameters.repulsion_epsilon)


def _choose_key(term: str, table: dict[str, tuple[float, ...]], species: tuple[str, ...]) -> str:
    """The most specific key of a term that the table holds."""
    keys = list_keys(term, species)
    found = next((key for key in keys if key in table), None)
    if found is None:
        raise PotentialError(
            f"no {term.removesuffix('s')} parameters for {keys[0]}",
            hint="train on a molecule that holds these species bonded this way",
        )
    return found
