"""From atoms to beads: :class:`BeadMap`, the linear configuration map R = M r, and its presets.

Only numpy is needed to use a map; building one from a selection takes an mdtraj topology. Theory:
``M`` acts on each Cartesian component alike and its rows sum to 1 (Noid et al., J. Chem. Phys. 128, 244114).
"""

from __future__ import annotations

import json
import operator
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import MappingError
from openmm_hvpcg.prior_terms import ANY, ATOM_SEPARATOR, CAPS, KEY_SEPARATOR
from openmm_hvpcg.storage import PathLike, atomic_path, compute_hash, write_json

if TYPE_CHECKING:
    import mdtraj as md

#: Rows of M must sum to 1 within this: weights come from decimal JSON, which rounds the last digits.
ROW_SUM_TOLERANCE = 1e-6

#: mdtraj counts the caps as protein; the methyl of NME is called C and is no carbonyl.
PRESETS = {
    "ca": "protein and name CA",
    "ca+cb": "protein and (name CA or name CB)",
    # The methyl carbons of the caps are where the CA of a residue more would be.
    "ca+caps": "(protein and name CA) or (resname ACE and name CH3) or (resname NME and (name C or name CH3))",
    "backbone": (
        "(protein and not resname NME and (name N or name CA or name C or name O or name CB))"
        " or (resname NME and name N)"
    ),
    "heavy": "protein and not element H",
}
#: Presets with one bead a residue: its name is their species.
ONE_A_RESIDUE = ("ca", "ca+caps")
#: Atoms that are much the same in all residues (proline's N is not), and what stands for the residue of their species.
BACKBONE_ATOMS, BACKBONE = ("N", "C", "O"), "BB"


@dataclass(frozen=True)
class BeadMap:
    """B beads as linear combinations of A atoms.

    Attributes
    ----------
    site_weights : (B, A) float64, rows sum to 1
    species : B names; beads of one species share every parameter of priors and network
    masses : (B,) amu, masses of the beads in CG dynamics
    bonds : (n, 2) int, pairs of bonded beads, each once with i < j
    names : B bead names (atom names of the CG topology)
    residues : B triples (residue name, residue number, chain index)
    """

    site_weights: NDArray[np.float64]
    species: tuple[str, ...]
    masses: NDArray[np.float64]
    bonds: NDArray[np.int64]
    names: tuple[str, ...]
    residues: tuple[tuple[str, int, int], ...]

    def __post_init__(self) -> None:
        weights = np.asarray(self.site_weights, dtype=np.float64)
        masses = np.asarray(self.masses, dtype=np.float64)
        if weights.ndim != 2 or weights.shape[0] == 0:
            raise MappingError("a bead map needs at least one bead", expected="weights (B, A)", got=weights.shape)
        n_beads = weights.shape[0]
        for label, values in (("species", self.species), ("masses", masses), ("names", self.names)):
            if len(values) != n_beads:
                raise MappingError(f"{label} do not match the beads", expected=n_beads, got=len(values))
        if len(self.residues) != n_beads:
            raise MappingError("residues do not match the beads", expected=n_beads, got=len(self.residues))
        if not np.isfinite(weights).all():
            raise MappingError("weights hold NaN or infinity")
        sums = weights.sum(axis=1)
        bad = np.flatnonzero(np.abs(sums - 1.0) > ROW_SUM_TOLERANCE)
        if len(bad):
            raise MappingError(
                f"weights of bead {bad[0]} ({self.names[bad[0]]}) do not sum to 1",
                expected=1,
                got=float(sums[bad[0]]),
            )
        # Without the atoms no bead uses: solvent would make this slow.
        rank = int(np.linalg.matrix_rank(weights[:, weights.any(axis=0)]))
        if rank < n_beads:
            raise MappingError(
                "beads overlap: some bead is a combination of the others",
                expected=f"{n_beads} independent beads",
                got=rank,
                hint="let every bead have an atom of its own",
            )
        if not (masses > 0).all():
            bead = int(np.argmin(masses > 0))
            raise MappingError(
                f"bead {bead} ({self.names[bead]}) has no mass",
                expected="a positive mass in amu",
                got=float(masses[bead]),
                hint="put beads on massive atoms, not on virtual sites",
            )
        unusable = [s for s in self.species if not s or KEY_SEPARATOR in s or s.partition(ATOM_SEPARATOR)[0] == ANY]
        if unusable:
            raise MappingError(
                "unusable species name",
                expected=f"text without {KEY_SEPARATOR!r}, and not {ANY!r} for any species",
                got=repr(unusable[0]),
            )
        object.__setattr__(self, "site_weights", weights)
        object.__setattr__(self, "masses", masses)
        object.__setattr__(self, "species", tuple(self.species))
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "bonds", _check_bonds(self.bonds, n_beads))

    @property
    def n_beads(self) -> int:
        return int(self.site_weights.shape[0])

    @property
    def n_atoms(self) -> int:
        return int(self.site_weights.shape[1])

    @property
    def hash(self) -> str:
        """Identifies the map: weights, species and bonds."""
        return compute_hash(self.site_weights, "\n".join(self.species), self.bonds)

    def map_positions(self, positions: NDArray[Any]) -> NDArray[np.float64]:
        """CG positions (..., B, 3) of atom positions (..., A, 3), nm."""
        if positions.shape[-2:] != (self.n_atoms, 3):
            raise MappingError(
                "positions do not fit the map", expected=f"(..., {self.n_atoms}, 3)", got=positions.shape
            )
        return np.einsum("ba,...ad->...bd", self.site_weights, positions.astype(np.float64), optimize=True)

    def to_dict(self) -> dict[str, Any]:
        """The map as JSON-ready values; :meth:`from_dict` with ``n_atoms`` gives it back."""
        beads = []
        for b in range(self.n_beads):
            atoms = np.flatnonzero(self.site_weights[b])
            name, number, chain = self.residues[b]
            beads.append(
                {
                    "name": self.names[b],
                    "species": self.species[b],
                    "mass_amu": float(self.masses[b]),
                    "atoms": atoms.tolist(),
                    "weights": self.site_weights[b, atoms].tolist(),
                    "residue": name,
                    "residue_number": number,
                    "chain": chain,
                }
            )
        return {"beads": beads, "bonds": self.bonds.tolist(), "n_atoms": self.n_atoms}

    @classmethod
    def from_dict(cls, content: dict[str, Any], n_atoms: int | None = None, where: object = None) -> BeadMap:
        """Build a map from the JSON contract ``{"beads": [...], "bonds": [...]}``.

        Parameters
        ----------
        content : the parsed JSON
        n_atoms : atoms of the molecule; taken from ``content["n_atoms"]`` where None
        where : file name for error messages

        Raises
        ------
        MappingError
            Not a bead map, not admissible, or one of a molecule of another size.
        """
        if not isinstance(content, dict) or not isinstance(content.get("beads"), list):
            raise MappingError("not a bead map", where=where, expected='{"beads": [...], "bonds": [...]}')
        beads, total = content["beads"], content.get("n_atoms", n_atoms)
        if not isinstance(total, int) or total < 1:
            raise MappingError("n_atoms is missing or wrong", where=where, expected="a positive integer", got=total)
        if n_atoms not in (None, total):
            raise MappingError(
                "the map is of another molecule",
                where=where,
                expected=f"{n_atoms} atoms (molecule)",
                got=f"{total} (map)",
            )
        weights = np.zeros((len(beads), total))
        for b, bead in enumerate(beads):
            _fill_row(weights[b], bead, b, where)
        try:
            return cls(
                weights,
                tuple(str(bead["species"]) for bead in beads),
                np.array([float(bead["mass_amu"]) for bead in beads]),
                content.get("bonds", []),
                tuple(str(bead["name"]) for bead in beads),
                tuple(
                    (
                        str(bead.get("residue", "CG")),
                        int(bead.get("residue_number", 1)),
                        int(bead.get("chain", 0)),
                    )
                    for bead in beads
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MappingError(f"a bead lacks a field or has a wrong one ({error})", where=where) from error
        except MappingError as error:
            raise MappingError(str(error), where=where) from error

    def save(self, path: PathLike) -> None:
        """Write the map as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: PathLike, n_atoms: int | None = None) -> BeadMap:
        """Read a map from JSON; ``n_atoms`` is needed where the file does not say it."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MappingError("no such map file", where=path) from error
        except (OSError, ValueError) as error:
            raise MappingError(f"not JSON ({error})", where=path) from error
        return cls.from_dict(content, n_atoms, where=path)

    def to_topology(self) -> md.Topology:
        """The CG topology with bonds."""
        import mdtraj as md

        topology = md.Topology()
        chains: dict[int, Any] = {}
        residues: dict[tuple[str, int, int], Any] = {}
        order: list[Any] = []
        for name, key in zip(self.names, self.residues, strict=True):
            if key[2] not in chains:
                chains[key[2]] = topology.add_chain()
            if key not in residues:
                residues[key] = topology.add_residue(key[0], chains[key[2]], resSeq=key[1])
            order.append(topology.add_atom(name, md.element.carbon, residues[key]))
        if [a.index for a in topology.atoms] != list(range(self.n_beads)):
            raise MappingError(
                "beads of one residue must be consecutive", hint="reorder the beads by chain and residue"
            )
        for i, j in self.bonds:
            topology.add_bond(order[i], order[j])
        return topology

    def save_pdb(self, path: PathLike, positions: NDArray[Any]) -> None:
        """Write bead positions (B, 3) nm as a PDB with a CONECT record for every bond, for VMD and PyMOL.

        mdtraj leaves the bonds of standard residues out; beads are too far apart for a viewer to guess them.
        """
        import mdtraj as md

        trajectory = md.Trajectory(np.asarray(positions, dtype=np.float32)[None], self.to_topology())
        with atomic_path(path) as temporary:
            trajectory.save_pdb(str(temporary))
            lines = temporary.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if not line.startswith(("CONECT", "END"))]
            serials = [line[6:11] for line in kept if line.startswith(("ATOM", "HETATM"))]
            bonds = [f"CONECT{serials[i]}{serials[j]}" for i, j in self.bonds]
            temporary.write_text("\n".join([*kept, *bonds, "END"]) + "\n", encoding="utf-8")


def find_end_marks(residues: Sequence[tuple[str, int, int]]) -> list[str]:
    """A mark for the residue of each bead.

    ``N-`` in the first residue of its chain that holds beads, ``C-`` in the last, ``NC-`` where that is the same, else
    nothing.
    """
    first = {key[2]: key for key in reversed(residues)}
    last = {key[2]: key for key in residues}
    marks = [("N" if key == first[key[2]] else "") + ("C" if key == last[key[2]] else "") for key in residues]
    return [f"{mark}-" if mark else "" for mark in marks]


def identify_residue(atom: Any) -> tuple[str, int, int]:
    """Residue of an mdtraj atom as a bead map names it: its name, number and chain."""
    return atom.residue.name, int(atom.residue.resSeq), int(atom.residue.chain.index)


def check_species(maps: Mapping[str, BeadMap], trained: Collection[str]) -> None:
    """Refuse molecules with species that no training molecule has: a network has no numbers for them.

    Parameters
    ----------
    maps : bead map of each molecule by name
    trained : names of those trained on

    Raises
    ------
    MappingError
        It names the first such molecule and its species.
    """
    known = {kind for name in trained for kind in maps[name].species}
    for name, bead_map in maps.items():
        unknown = sorted(set(bead_map.species) - known)
        if unknown:
            raise MappingError(
                f"no molecule that is trained on has beads of species {', '.join(unknown)}",
                where=f"molecule {name}",
                hint="the network cannot learn about them: add a training molecule that holds them, leave this molecule"
                " out, or choose beads whose species the molecules share (mapping.beads; mapping.ends gives the ends of"
                " chains their own)",
            )


def build_bead_map(beads: str, topology: md.Topology, *, ends: bool = False, share_backbone: bool = False) -> BeadMap:
    """Slice map from a preset of ``PRESETS`` or an mdtraj selection: one bead an atom.

    Beads are bonded where the atoms between them, if any, are not beads; those of ``ca+cb`` as if proline's ring were
    open at its N, or its CB would be bonded to the residue before. Species: the residue name for ``ca`` and
    ``ca+caps``, else ``RESIDUE:ATOM``, such as ``ALA:CA`` and ``ALA:CB`` for ``ca+cb``. Where a combination of species
    is rare, priors are shared by atom (:func:`~openmm_hvpcg.prior_terms.list_keys`): a bond of CA to CB with others of
    CA to CB, whatever the residues.

    Parameters
    ----------
    beads : preset or selection
    topology : of all atoms
    ends : beads in the first and last residue of a chain get species of their own (``N-ALA``, ``C-ALA``): an energy of
        distances and angles cannot tell the two ends of a chain apart by anything else
    share_backbone : N, C and O are of the same species in all residues (``BB:N``), but those of caps and proline's N:
        what is learnt of them then serves residues and neighbours that training has not seen together

    Raises
    ------
    MappingError
        The selection is not valid, or empty.
    """
    selection = PRESETS.get(beads, beads)
    try:
        atoms = np.sort(np.asarray(topology.select(selection), dtype=int))
    except Exception as error:
        raise MappingError(
            f"not a preset ({', '.join(PRESETS)}) or an mdtraj selection: {beads!r}",
            hint='an example of a selection: "name CA or name CB"',
        ) from error
    if len(atoms) == 0:
        raise MappingError(
            f"the selection {beads!r} holds no atom",
            hint=f"the molecule has {topology.n_atoms} atoms; check the names",
        )
    sites = [topology.atom(i) for i in atoms]
    massless = [a for a in sites if a.element is None or a.element.mass <= 0]
    if massless:
        raise MappingError(f"bead on the massless site {massless[0]}", hint="select massive atoms only")
    weights = np.zeros((len(atoms), topology.n_atoms))
    weights[np.arange(len(atoms)), atoms] = 1.0
    residues = [identify_residue(a) for a in sites]
    marks = find_end_marks(residues) if ends else [""] * len(sites)
    species = [
        m + (a.residue.name if beads in ONE_A_RESIDUE else _name_species(a, share_backbone))
        for m, a in zip(marks, sites, strict=True)
    ]
    bonds = [(a.index, b.index) for a, b in topology.bonds if not (beads == "ca+cb" and _closes_proline(a, b))]
    return BeadMap(
        weights,
        tuple(species),
        np.array([a.element.mass for a in sites]),
        contract_bonds(bonds, atoms.tolist(), topology.n_atoms),
        tuple(a.name for a in sites),
        tuple(residues),
    )


def _name_species(atom: Any, share_backbone: bool) -> str:
    """``ALA:CA``, or ``BB:N`` where backbone atoms are shared."""
    residue = atom.residue.name
    alike = atom.name in BACKBONE_ATOMS and residue not in CAPS and (residue, atom.name) != ("PRO", "N")
    return f"{BACKBONE if share_backbone and alike else residue}{ATOM_SEPARATOR}{atom.name}"


def _closes_proline(a: Any, b: Any) -> bool:
    return a.residue is b.residue and {a.name, b.name} == {"N", "CD"}


def contract_bonds(bonds: Sequence[tuple[int, int]], atoms: Sequence[int], n_atoms: int) -> NDArray[np.int64]:
    """Bonds between selected atoms: joined by a path of bonds whose inner atoms are not selected.

    Returns (n, 2) indices into ``atoms``, i < j, sorted.
    """
    neighbours: list[list[int]] = [[] for _ in range(n_atoms)]
    for i, j in bonds:
        neighbours[i].append(j)
        neighbours[j].append(i)
    bead_of = {atom: bead for bead, atom in enumerate(atoms)}
    found: set[tuple[int, int]] = set()
    for atom, bead in bead_of.items():
        seen, queue = {atom}, deque([atom])
        while queue:
            for neighbour in neighbours[queue.popleft()]:
                if neighbour in seen:
                    continue
                seen.add(neighbour)
                if neighbour in bead_of:
                    found.add((min(bead, bead_of[neighbour]), max(bead, bead_of[neighbour])))
                else:
                    queue.append(neighbour)
    return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)


def _fill_row(row: NDArray[np.float64], bead: Any, index: int, where: object) -> None:
    try:
        atoms, weights = [operator.index(a) for a in bead["atoms"]], [float(w) for w in bead["weights"]]
    except (KeyError, TypeError, ValueError) as error:
        raise MappingError(f"bead {index} needs lists 'atoms' and 'weights' ({error})", where=where) from error
    if len(atoms) != len(weights) or len(set(atoms)) != len(atoms):
        raise MappingError(
            f"bead {index}: atoms and weights must match, each atom once",
            expected=f"{len(atoms)} weights",
            got=len(weights),
            where=where,
        )
    outside = [a for a in atoms if not 0 <= a < len(row)]
    if outside:
        raise MappingError(
            f"bead {index} names an atom that does not exist",
            expected=f"0 to {len(row) - 1}",
            got=outside[0],
            where=where,
        )
    row[atoms] = weights


def _check_bonds(bonds: Any, n_beads: int) -> NDArray[np.int64]:
    try:
        pairs = np.array([[operator.index(b) for b in bond] for bond in bonds], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise MappingError(f"bonds are not pairs of bead numbers ({error})") from error
    if len(pairs) == 0:
        return np.empty((0, 2), dtype=np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise MappingError("bonds are not pairs of bead numbers", expected="(n, 2)", got=pairs.shape)
    if pairs.min() < 0 or pairs.max() >= n_beads or (pairs[:, 0] == pairs[:, 1]).any():
        raise MappingError("a bond names beads that do not exist or joins a bead to itself", got=pairs.tolist())
    return np.unique(np.sort(pairs, axis=1), axis=0).reshape(-1, 2)
