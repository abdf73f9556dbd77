"""A bias that depends on the beads alone: frames on the barriers of dihedrals, where equilibrium has next to none.

The mean force at beads R is an average over the hidden atoms at these beads. A bias ``b(R)`` leaves their distribution
as it is: ``exp(-beta (u + b))`` is ``exp(-beta u)`` times a constant where R is given. So frames that are sampled with
the bias and labelled without it have the labels that any frames have, HVPs and covariances among them. What differs is
how often which R is seen. Which of two basins is the deeper follows from the mean force all the way from one to the
other, and the error of their difference is that of the barrier between them, of which few frames in equilibrium know.
Source: Chen, Görlich, Fuchs, Zavadlav, arXiv:2510.11148 (2025), with umbrella sampling and metadynamics.

Here the bias takes a share of the potential of mean force of each dihedral of beads away, as its distribution in
frames without the bias tells it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mdtraj as md
import numpy as np
import openmm
from numpy.typing import NDArray
from scipy.optimize import minimize

from openmm_hvpcg.errors import MappingError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.prior_terms import list_rows
from openmm_hvpcg.units import compute_kt

#: Terms cos(n phi), sin(n phi) of ln p, up to this n.
ORDER = 4
#: The n-th coefficient times n is held at zero as if by so many frames: what was never seen stays bounded.
PRIOR_FRAMES = 1.0
GRID = 720


@dataclass(frozen=True)
class DihedralBias:
    """``share * kT * sum ln p(phi)`` over dihedrals of beads.

    Attributes
    ----------
    bead_map : of the molecule that is sampled
    dihedrals : (D, 4) beads
    log_densities : (D, 2, ORDER), coefficients of the cosines and sines of ``ln p``, see :func:`fit_log_density`
    share : of the potentials of mean force, 0 to 1, that is taken away
    n_frames : that told the densities
    """

    bead_map: BeadMap
    dihedrals: NDArray[np.int64]
    log_densities: NDArray[np.float64]
    share: float
    n_frames: int

    @classmethod
    def fit(cls, positions: NDArray[np.floating], bead_map: BeadMap, share: float) -> DihedralBias:
        """Of frames (T, B, 3) nm of the beads, sampled without a bias; errors as :func:`find_dihedrals`."""
        dihedrals = find_dihedrals(bead_map)
        trajectory = md.Trajectory(np.asarray(positions, dtype=np.float32), bead_map.to_topology())
        angles = md.compute_dihedrals(trajectory, dihedrals, periodic=False).astype(np.float64)
        return cls(bead_map, dihedrals, np.stack([fit_log_density(a) for a in angles.T]), share, len(positions))

    def add_to(self, system: openmm.System, temperature_K: float) -> openmm.System:
        """A copy of the System with the bias."""
        terms = "+".join(f"a{n}*cos({n}*phi)+b{n}*sin({n}*phi)" for n in range(1, ORDER + 1))
        force = openmm.CustomCentroidBondForce(4, f"scale*({terms}); phi=dihedral(g1,g2,g3,g4)")
        force.addGlobalParameter("scale", self.share * compute_kt(temperature_K))
        for letter in "ab":
            for n in range(1, ORDER + 1):
                force.addPerBondParameter(f"{letter}{n}")
        for weights in self.bead_map.site_weights:
            atoms = np.flatnonzero(weights)
            force.addGroup(atoms.tolist(), weights[atoms].tolist())
        for beads, coefficients in zip(self.dihedrals.tolist(), self.log_densities, strict=True):
            force.addBond(beads, coefficients.ravel().tolist())
        biased = openmm.XmlSerializer.clone(system)
        biased.addForce(force)
        return biased

    def describe(self) -> dict[str, Any]:
        """JSON-ready, for the provenance of frames."""
        return {
            "share": self.share,
            "frames": self.n_frames,
            "dihedrals": self.dihedrals.tolist(),
            "log_densities": np.round(self.log_densities, 6).tolist(),
        }


def find_dihedrals(bead_map: BeadMap) -> NDArray[np.int64]:
    """Beads (D, 4) that are bonded in a row.

    Raises
    ------
    MappingError
        There are none.
    """
    dihedrals = list_rows(bead_map.bonds, bead_map.n_beads, 4)
    if len(dihedrals) == 0:
        raise MappingError(
            "sampling.flatten acts on dihedrals of beads, and no four of them are bonded in a row",
            hint="set sampling.flatten: 0, or choose other beads",
        )
    return dihedrals


def fit_log_density(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """``ln p`` of angles (T,), rad, but for a constant: coefficients (2, ORDER) of cos(n phi) and sin(n phi).

    They maximise the likelihood with a penalty on steep ones.
    """
    orders = np.arange(1, ORDER + 1)
    means = _expand(angles).mean(axis=0)
    basis = _expand(np.linspace(-np.pi, np.pi, GRID, endpoint=False))
    penalty = PRIOR_FRAMES / len(angles) * np.tile(orders, 2) ** 2

    def loss(c: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = basis @ c
        top = logits.max()
        weights = np.exp(logits - top)
        value = top + np.log(weights.mean()) - means @ c + penalty @ c**2 / 2
        return float(value), basis.T @ (weights / weights.sum()) - means + penalty * c

    found = minimize(loss, np.zeros(2 * ORDER), jac=True, method="BFGS")
    return np.asarray(found.x).reshape(2, ORDER)


def _expand(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines and sines (T, 2 ORDER) of the multiples of angles (T,)."""
    multiples = np.arange(1, ORDER + 1) * angles[:, None]
    return np.concatenate([np.cos(multiples), np.sin(multiples)], axis=1)
