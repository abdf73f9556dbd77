"""What is measured on CG frames: features for slow modes, internal coordinates, size, RMSD, phi and psi.

Beads are taken as they lie (no minimum image): a molecule must be whole. Lengths in nm, angles in degrees.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mdtraj as md
import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import InputError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
Quadruple = tuple[int, int, int, int]
FeatureKind = Literal["distances", "dihedrals", "distances+dihedrals"]

#: More features than this cost time and noise and add no slow mode.
MAX_FEATURES = 500
#: Internal coordinates compared of each kind; evenly spaced along the chain beyond that.
MAX_COORDINATES = 200
#: Nonbonded distances compared: end to end, and those that vary most in the reference.
N_KEY_DISTANCES = 6


@dataclass(frozen=True)
class FeatureSet:
    """Which pair distances and dihedrals describe a configuration.

    Attributes
    ----------
    pairs : (n, 2) bead indices
    dihedrals : (m, 4) bead indices; each gives a cosine and a sine
    note : what was chosen, in words
    """

    pairs: NDArray[np.int64]
    dihedrals: NDArray[np.int64]
    note: str

    @property
    def n_features(self) -> int:
        return len(self.pairs) + 2 * len(self.dihedrals)

    def compute(self, frames: Frames) -> FloatArray:
        """Features (T, n_features) of frames (T, B, 3): distances in nm, then cosines, then sines."""
        trajectory = _to_trajectory(frames)
        parts = []
        if len(self.pairs):
            parts.append(md.compute_distances(trajectory, self.pairs, periodic=False))
        if len(self.dihedrals):
            angles = md.compute_dihedrals(trajectory, self.dihedrals, periodic=False)
            parts += [np.cos(angles), np.sin(angles)]
        return np.concatenate(parts, axis=1).astype(np.float64)


@dataclass(frozen=True)
class Coordinate:
    """One internal coordinate: its kind, a label such as ``N2-CA2-C2`` and the beads it is made of."""

    kind: Literal["bond", "1-3 distance", "distance", "angle", "dihedral"]
    label: str
    beads: tuple[int, ...]

    @property
    def unit(self) -> str:
        return "deg" if self.kind in ("angle", "dihedral") else "nm"


def build_features(topology: md.Topology, kind: FeatureKind) -> FeatureSet:
    """Choose features: distances of unbonded beads, dihedrals along bonds, or both; at most about 500.

    With too many pairs, neighbours |i - j| <= 2 are left out; if that is not enough, only every k-th bead is
    used. ``note`` says so.

    Raises
    ------
    InputError
        One bead alone; dihedrals asked for in a topology that has none.
    """
    no_pairs, no_dihedrals = np.empty((0, 2), dtype=np.int64), np.empty((0, 4), dtype=np.int64)
    pairs, pair_note = _choose_pairs(topology) if "distances" in kind else (no_pairs, "")
    dihedrals, dihedral_note = _choose_dihedrals(topology) if "dihedrals" in kind else (no_dihedrals, "")
    if not len(pairs) and not len(dihedrals):
        raise InputError(
            "the CG topology has no dihedrals to use as features",
            expected="four beads in a row joined by bonds",
            hint="set analysis.features to distances, or give the bead map bonds",
        )
    features = FeatureSet(pairs, dihedrals, ", ".join(note for note in (pair_note, dihedral_note) if note))
    logger.info("features for slow modes: %s", features.note)
    return features


def find_coordinates(topology: md.Topology, reference: Frames) -> list[Coordinate]:
    """Internal coordinates to compare: bonds, 1-3 distances, key nonbonded distances, angles, dihedrals.

    Key nonbonded distances are end to end and those that vary most in ``reference`` among beads three or more
    bonds apart. Kinds with more than ``MAX_COORDINATES`` members are thinned evenly.
    """
    bonds, angles, dihedrals = find_bonded_terms(topology)
    groups: list[tuple[Literal["bond", "1-3 distance", "distance", "angle", "dihedral"], list[tuple[int, ...]]]]
    groups = [
        ("bond", list(bonds)),
        ("1-3 distance", sorted({(min(i, k), max(i, k)) for i, _, k in angles})),
        ("distance", _find_key_distances(topology, reference)),
        ("angle", list(angles)),
        ("dihedral", list(dihedrals)),
    ]
    names = [f"{atom.name}{atom.residue.resSeq}" for atom in topology.atoms]
    return [
        Coordinate(kind, "-".join(names[bead] for bead in beads), beads)
        for kind, members in groups
        for beads in _thin(members, MAX_COORDINATES)
    ]


def compute_coordinates(frames: Frames, coordinates: Sequence[Coordinate]) -> FloatArray:
    """Values (T, n) of ``coordinates``, nm or degrees (dihedrals from -180 to 180)."""
    trajectory = _to_trajectory(frames)
    values = np.empty((frames.n_frames, len(coordinates)))
    functions = {2: md.compute_distances, 3: md.compute_angles, 4: md.compute_dihedrals}
    for n_beads, function in functions.items():
        columns = [c for c, coordinate in enumerate(coordinates) if len(coordinate.beads) == n_beads]
        if columns:
            beads = np.array([coordinates[c].beads for c in columns])
            found = function(trajectory, beads, periodic=False).astype(np.float64)
            values[:, columns] = found if n_beads == 2 else np.degrees(found)
    return values


def compute_radius_of_gyration(frames: Frames) -> FloatArray:
    """Radius of gyration (T,) in nm, every bead with the same weight."""
    return np.asarray(md.compute_rg(_to_trajectory(frames)), dtype=np.float64)


def compute_rmsd(frames: Frames, native: NDArray[np.floating]) -> FloatArray:
    """RMSD (T,) in nm of all beads to ``native`` (B, 3) nm after the best superposition."""
    # Copies: md.rmsd centres what it is given in place.
    target = md.Trajectory(np.array(native, dtype=np.float32)[None], frames.topology)
    trajectory = md.Trajectory(frames.positions.copy(), frames.topology)
    return np.asarray(md.rmsd(trajectory, target), dtype=np.float64)


def compute_phi_psi(frames: Frames, phi_psi: tuple[Quadruple, Quadruple]) -> FloatArray:
    """Phi and psi (T, 2) in degrees, -180 to 180, IUPAC sign."""
    angles = md.compute_dihedrals(_to_trajectory(frames), np.array(phi_psi), periodic=False)
    return np.degrees(angles.astype(np.float64))


def find_phi_psi(bead_map: BeadMap) -> tuple[Quadruple, Quadruple] | None:
    """Bead indices of phi (C, N, CA, C) and psi (N, CA, C, N) of a dipeptide-like map, else None.

    Dipeptide-like: exactly one residue has beads N, CA and C, with N bonded to a bead C of another residue
    and C to a bead N of another residue.
    """
    neighbours: list[list[int]] = [[] for _ in range(bead_map.n_beads)]
    for i, j in bead_map.bonds.tolist():
        neighbours[i].append(j)
        neighbours[j].append(i)
    names, residues = bead_map.names, bead_map.residues
    by_residue: dict[tuple[str, int, int], dict[str, int]] = {}
    for bead, residue in enumerate(residues):
        by_residue.setdefault(residue, {})[names[bead]] = bead
    found = []
    for residue, beads in by_residue.items():
        if not {"N", "CA", "C"} <= beads.keys():
            continue
        before = [b for b in neighbours[beads["N"]] if names[b] == "C" and residues[b] != residue]
        after = [b for b in neighbours[beads["C"]] if names[b] == "N" and residues[b] != residue]
        if len(before) == 1 and len(after) == 1:
            n, ca, c = beads["N"], beads["CA"], beads["C"]
            found.append(((before[0], n, ca, c), (n, ca, c, after[0])))
    return found[0] if len(found) == 1 else None


def find_bonded_terms(
    topology: md.Topology,
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]], list[Quadruple]]:
    """Bonds, angles and proper dihedrals of the bond graph, each once, sorted."""
    neighbours = _find_neighbours(topology)
    bonds = sorted((i, j) for i, linked in enumerate(neighbours) for j in linked if i < j)
    angles = sorted((i, j, k) for j, linked in enumerate(neighbours) for i in linked for k in linked if i < k)
    dihedrals = sorted(
        (i, j, k, m) for j, k in bonds for i in neighbours[j] for m in neighbours[k] if i != k and m != j and i != m
    )
    return bonds, angles, dihedrals


def check_whole(frames: Frames, name: str) -> None:
    """Raise :class:`InputError` if a bond of a periodic trajectory is longer than half the box."""
    pairs, _, _ = find_bonded_terms(frames.topology)
    if frames.box is None or not pairs:
        return
    longest = md.compute_distances(_to_trajectory(frames), np.array(pairs), periodic=False).max(axis=1)
    half_box = 0.5 * np.linalg.norm(frames.box, axis=2).min(axis=1)
    broken = np.flatnonzero(longest > half_box)
    if len(broken):
        raise InputError(
            f"a molecule is broken across the periodic boundary, first in frame {int(broken[0])}",
            expected=f"bonds shorter than half the box ({half_box[broken[0]]:.2f} nm)",
            got=f"{longest[broken[0]]:.2f} nm",
            where=name,
            hint="make molecules whole before mapping",
        )


def _to_trajectory(frames: Frames) -> md.Trajectory:
    return md.Trajectory(frames.positions, frames.topology)


def _find_neighbours(topology: md.Topology) -> list[list[int]]:
    neighbours: list[set[int]] = [set() for _ in range(topology.n_atoms)]
    for a, b in topology.bonds:
        neighbours[a.index].add(b.index)
        neighbours[b.index].add(a.index)
    return [sorted(linked) for linked in neighbours]


def _choose_pairs(topology: md.Topology) -> tuple[NDArray[np.int64], str]:
    n_beads = topology.n_atoms
    if n_beads < 2:
        raise InputError("one bead has no slow modes to compare", expected="at least 2 beads", got=n_beads)
    every = np.stack(np.triu_indices(n_beads, 1), axis=1).astype(np.int64)
    bonds, _, _ = find_bonded_terms(topology)
    bonded = np.zeros((n_beads, n_beads), dtype=bool)
    if bonds:
        bonded[tuple(np.array(bonds).T)] = True
    pairs = every[~bonded[every[:, 0], every[:, 1]]]
    if len(pairs) < 2:
        return every, f"all {len(every)} pair distances"
    if len(pairs) <= MAX_FEATURES:
        return pairs, f"{len(pairs)} distances of unbonded beads"
    pairs = every[every[:, 1] - every[:, 0] > 2]
    if len(pairs) <= MAX_FEATURES:
        return pairs, f"{len(pairs)} distances of beads more than 2 apart"
    stride = 2
    while len(strided := pairs[(pairs % stride == 0).all(axis=1)]) > MAX_FEATURES:
        stride += 1
    return strided, f"{len(strided)} distances among one bead in {stride}, more than 2 apart"


def _choose_dihedrals(topology: md.Topology) -> tuple[NDArray[np.int64], str]:
    _, _, dihedrals = find_bonded_terms(topology)
    chosen = _thin(dihedrals, MAX_FEATURES // 2)
    if not chosen:
        return np.empty((0, 4), dtype=np.int64), ""
    thinned = f" of {len(dihedrals)}" if len(chosen) < len(dihedrals) else ""
    return np.array(chosen, dtype=np.int64), f"cosine and sine of {len(chosen)}{thinned} dihedrals"


def _find_key_distances(topology: md.Topology, reference: Frames) -> list[tuple[int, ...]]:
    """End to end, then the distances that vary most among beads at least three bonds apart."""
    neighbours = _find_neighbours(topology)
    candidates = []
    for i in range(topology.n_atoms):
        near, shell = {i}, {i}
        for _ in range(2):
            shell = {m for j in shell for m in neighbours[j]} - near
            near |= shell
        candidates += [(i, j) for j in range(i + 1, topology.n_atoms) if j not in near]
    if not candidates:
        return []
    pool = _thin(candidates, 2 * MAX_FEATURES)
    spread = md.compute_distances(_to_trajectory(reference), np.array(pool), periodic=False).std(axis=0)
    ranked = [pool[p] for p in np.argsort(-spread, kind="stable")]
    ends = (0, topology.n_atoms - 1)
    first = [ends] if ends in candidates else []
    return list(dict.fromkeys([*first, *ranked]))[:N_KEY_DISTANCES]


def _thin(members: Sequence[tuple[int, ...]], limit: int) -> list[tuple[int, ...]]:
    if len(members) <= limit:
        return list(members)
    return [members[int(m)] for m in np.linspace(0, len(members) - 1, limit).round()]
