"""Synthetic CG trajectories for the tests of ``analysis``."""

from __future__ import annotations

from itertools import pairwise

import mdtraj as md
import numpy as np

from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap

KT = 0.00831446261815324 * 300.0

DIPEPTIDE = BeadMap(
    np.eye(6),
    ("ACE:C", "ALA:N", "ALA:CA", "ALA:CB", "ALA:C", "NME:N"),
    np.full(6, 12.0),
    np.array([[0, 1], [1, 2], [2, 3], [2, 4], [4, 5]]),
    ("C", "N", "CA", "CB", "C", "N"),
    (("ACE", 1, 0), *[("ALA", 2, 0)] * 4, ("NME", 3, 0)),
)


def build_chain_topology(n_beads: int) -> md.Topology:
    """A linear chain of beads B, one a residue, bonded in a row."""
    topology = md.Topology()
    chain = topology.add_chain()
    beads = [
        topology.add_atom("B", md.element.carbon, topology.add_residue("CG", chain, resSeq=i + 1))
        for i in range(n_beads)
    ]
    for a, b in pairwise(beads):
        topology.add_bond(a, b)
    return topology


def simulate_chain(
    n_frames: int,
    seed: int,
    *,
    walkers: int = 2,
    n_beads: int = 5,
    stiffness: float = 2.0e3,
    stride: int = 20,
) -> Frames:
    """Overdamped Langevin of a bead chain (harmonic bonds and 1-3 distances) at 300 K."""
    rng = np.random.default_rng(seed)
    x = np.zeros((walkers, n_beads, 3))
    x[:, :, 0] = 0.38 * np.arange(n_beads)
    x += 0.02 * rng.normal(size=x.shape)
    step = 0.05 / stiffness  # times mobility 1; far below the stability limit of about 0.5 / stiffness
    frames = np.empty((n_frames, walkers, n_beads, 3))
    for t in range(-n_frames // 10, n_frames):
        for _ in range(stride):
            force = np.zeros_like(x)
            for gap, length, k in ((1, 0.38, stiffness), (2, 0.6, 0.1 * stiffness)):
                d = x[:, gap:] - x[:, :-gap]
                r = np.linalg.norm(d, axis=-1, keepdims=True)
                pull = k * (r - length) * d / r
                force[:, :-gap] += pull
                force[:, gap:] -= pull
            x = x + step * force + np.sqrt(2 * KT * step) * rng.normal(size=x.shape)
        if t >= 0:
            frames[t] = x
    positions = frames.transpose(1, 0, 2, 3).reshape(-1, n_beads, 3)
    return Frames(
        positions,
        build_chain_topology(n_beads),
        300.0,
        np.repeat(np.arange(walkers), n_frames),
        interval_ps=0.5,
    )


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle: float, dihedral: np.ndarray) -> np.ndarray:
    """Points d (T, 3): length c-d, angle b-c-d, dihedral a-b-c-d (radians, IUPAC sign)."""
    axis = (c - b) / np.linalg.norm(c - b, axis=1, keepdims=True)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    dihedral = np.broadcast_to(dihedral, len(a))[:, None]
    return (
        c
        - length * np.cos(angle) * axis
        + length * np.sin(angle) * (np.cos(dihedral) * np.cross(normal, axis) + np.sin(dihedral) * normal)
    )


def build_dipeptide(phi_deg: np.ndarray, psi_deg: np.ndarray) -> np.ndarray:
    """Positions (T, 6, 3) nm of the beads of :data:`DIPEPTIDE` with given phi and psi."""
    phi, psi = np.radians(phi_deg), np.radians(psi_deg)
    before = np.zeros((len(phi), 3))
    n = before + np.array([0.133, 0.0, 0.0])
    angle = np.radians(122.0)
    ca = n + 0.146 * np.array([-np.cos(angle), np.sin(angle), 0.0])
    c = place(before, n, ca, 0.152, np.radians(111.0), phi)
    cb = place(before, n, ca, 0.153, np.radians(110.0), phi - np.radians(122.0))
    after = place(n, ca, c, 0.133, np.radians(116.0), psi)
    return np.stack([before, n, ca, cb, c, after], axis=1)


def sample_dipeptide(n_frames: int, seed: int, *, walkers: int = 2, helix: float = 0.4) -> Frames:
    """Phi and psi hopping between beta (-80, 120) and alpha_r (-70, -40); ``helix`` is alpha_r's share."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(walkers):
        fresh = rng.random(n_frames) < 0.05  # each frame draws a new state with probability 0.05
        fresh[0] = True
        drawn = rng.random(n_frames) < helix
        state = drawn[np.maximum.accumulate(np.where(fresh, np.arange(n_frames), 0))]
        centre = np.where(state[:, None], [-70.0, -40.0], [-80.0, 120.0])
        angles = centre + 12.0 * rng.normal(size=(n_frames, 2))
        positions = build_dipeptide(angles[:, 0], angles[:, 1])
        parts.append(positions + 0.003 * rng.normal(size=positions.shape))
    return Frames(np.concatenate(parts), DIPEPTIDE.to_topology(), 300.0, np.repeat(np.arange(walkers), n_frames), 0.5)
