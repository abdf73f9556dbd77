"""A harmonic network of particles in OpenMM whose Hessian, free energy and noise are known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openmm

from openmm_hvpcg.units import compute_kt

TEMPERATURE = 300.0
KT = compute_kt(TEMPERATURE)


@dataclass(frozen=True)
class HarmonicNetwork:
    """``u = 1/2 sum_xyz r^T K r`` with K (A, A), the same for each Cartesian component."""

    system: openmm.System
    stiffness: np.ndarray

    def sample(self, n_frames: int, seed: int) -> np.ndarray:
        """Exact independent samples (T, A, 3) of the Boltzmann distribution."""
        covariance = KT * np.linalg.inv(self.stiffness)
        rng = np.random.default_rng(seed)
        factor = np.linalg.cholesky(covariance)
        return np.einsum("ab,tbx->tax", factor, rng.standard_normal((n_frames, len(factor), 3)))

    def compute_cg_stiffness(self, site_weights: np.ndarray) -> np.ndarray:
        """Hessian of the PMF: ``[M K^-1 M^T]^-1``, the Schur complement."""
        return np.linalg.inv(site_weights @ np.linalg.inv(self.stiffness) @ site_weights.T)


def build_network(n_atoms: int = 8, seed: int = 0) -> HarmonicNetwork:
    """Springs of rest length zero between random pairs and to the origin: quadratic in Cartesian coordinates."""
    rng = np.random.default_rng(seed)
    system = openmm.System()
    bonds = openmm.HarmonicBondForce()
    tether = openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    tether.addPerParticleParameter("k")
    stiffness = np.zeros((n_atoms, n_atoms))
    for i in range(n_atoms):
        system.addParticle(12.0)
        k = float(rng.uniform(50, 200))
        tether.addParticle(i, [k])
        stiffness[i, i] += k
    pairs = [(i, i + 1) for i in range(n_atoms - 1)] + [(0, 3), (2, 6), (1, 5)]
    for i, j in pairs:
        k = float(rng.uniform(500, 5000))
        bonds.addBond(i, j, 0.0, k)
        stiffness[i, i] += k
        stiffness[j, j] += k
        stiffness[i, j] -= k
        stiffness[j, i] -= k
    system.addForce(bonds)
    system.addForce(tether)
    return HarmonicNetwork(system, stiffness)


def slice_map(n_atoms: int, atoms: list[int]) -> np.ndarray:
    weights = np.zeros((len(atoms), n_atoms))
    weights[np.arange(len(atoms)), atoms] = 1.0
    return weights
