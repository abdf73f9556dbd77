"""Small labelled data with known answers, for the tests of the training room."""

from __future__ import annotations

import numpy as np

from openmm_hvpcg.config import PriorSettings
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.units import compute_kt

TEMPERATURE = 300.0
KT = compute_kt(TEMPERATURE)
SPECIES = "ABABC"
REST = np.array([[0, 0, 0], [0.15, 0, 0], [0.22, 0.13, 0], [0.37, 0.14, 0.03], [0.20, 0.2, 0.13]])
BONDS = [[0, 1], [1, 2], [2, 3], [2, 4]]
#: Priors switched off: a network on labels without them.
NO_PRIORS = PriorSettings(bonds=False, angles=False, dihedrals=False, repulsion=False)


def build_map(species: str = SPECIES, bonds: list[list[int]] = BONDS) -> BeadMap:
    n = len(species)
    return BeadMap(
        np.eye(n),
        tuple(species),
        np.full(n, 12.0),
        np.array(bonds),
        tuple(f"X{b}" for b in range(n)),
        tuple(("MOL", 1, 0) for _ in range(n)),
    )


def build_labels(
    n_frames: int = 240,
    n_probes: int = 3,
    force_noise: float = 0.0,
    seed: int = 0,
    name: str = "mol",
    stiffness: float = 2000.0,
    rest: np.ndarray = REST,
    n_samples: int | None = None,
    hvp_noise: float = 0.0,
) -> LabelledFrames:
    """Springs in the distances of all pairs: exact forces and HVPs, plus independent force noise.

    The noise of a frame comes with its Hessian share ``+beta n n^T``, as the hidden atoms' covariance does, so that the
    mean HVP target is the Hessian of the springs. With ``n_samples`` they are conditional averages: of so many samples
    for the force, and exact for the HVP and the covariance. ``hvp_noise`` is independent noise of the HVPs on top.
    """
    rng = np.random.default_rng(seed)
    n_beads = len(rest)
    positions = rest + 0.01 * rng.standard_normal((n_frames, n_beads, 3))
    turns = np.linalg.qr(rng.standard_normal((n_frames, 3, 3)))[0]
    turns *= np.sign(np.linalg.det(turns))[:, None, None]
    positions = (positions @ turns).astype(np.float32).astype(np.float64)
    probes = 2.0 * rng.integers(0, 2, (n_frames, n_probes, n_beads, 3)) - 1.0
    forces, hvps = _differentiate(positions, probes, stiffness, rest)
    noise = force_noise * rng.standard_normal(forces.shape)
    covariances = None
    if n_samples is None:
        hvps = hvps + np.einsum("tbx,tpcy,tcy->tpbx", noise, probes, noise) / KT
    else:
        covariances = (force_noise**2 * probes).astype(np.float32)
        hvps, noise = hvps + covariances / KT, noise / np.sqrt(n_samples)
    hvps = hvps + hvp_noise * rng.standard_normal(hvps.shape)
    return LabelledFrames(
        positions.astype(np.float32),
        (forces + noise).astype(np.float32),
        probes.astype(np.float32),
        hvps.astype(np.float32),
        np.repeat([0, 1], [n_frames // 2, n_frames - n_frames // 2]),
        build_map(SPECIES[:n_beads], [b for b in BONDS if max(b) < n_beads]),
        TEMPERATURE,
        {},
        name,
        covariances,
    )


def _differentiate(x: np.ndarray, v: np.ndarray, k: float, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forces and HVPs of ``sum_pairs k/2 (r - r0)^2`` by hand."""
    forces, hvps = np.zeros_like(x), np.zeros_like(v)
    for i in range(x.shape[1]):
        for j in range(i + 1, x.shape[1]):
            rest = np.linalg.norm(places[j] - places[i])
            d = x[:, j] - x[:, i]
            r = np.linalg.norm(d, axis=-1, keepdims=True)
            unit = d / r
            pull = k * (r - rest) * unit
            forces[:, i] += pull
            forces[:, j] -= pull
            dv = v[:, :, j] - v[:, :, i]
            along = np.einsum("tpx,tx->tp", dv, unit)[..., None] * unit[:, None]
            change = k * along + (k * (r - rest) / r)[:, None] * (dv - along)
            hvps[:, :, j] += change
            hvps[:, :, i] -= change
    return forces, hvps
