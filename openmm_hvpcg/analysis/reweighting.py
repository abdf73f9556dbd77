r"""Frames of all temperatures of a replica exchange, weighted to count at one of them.

The multistate Bennett acceptance ratio (Shirts and Chodera, J. Chem. Phys. 129, 124105 (2008)): a frame of energy U
counts at 1/kT = beta in proportion to ``exp(-beta U) / sum_k N_k exp(f_k - beta_k U)``, with N_k frames and reduced
free energy f_k of state k. The f_k make the weights of each state sum to one; they minimise a convex function.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from openmm_hvpcg.errors import InputError
from openmm_hvpcg.units import compute_kt

FloatArray = NDArray[np.float64]

#: Largest gradient, as a share of the frames, that the free energies are left with.
TOLERANCE = 1e-9


def compute_weights(
    energies: FloatArray, states: NDArray[np.int64], temperatures_K: FloatArray, temperature_K: float
) -> FloatArray:
    """Weights (n,) that sum to one of frames as samples of one temperature.

    Parameters
    ----------
    energies : (n,) kJ/mol of each frame, by the one potential that all were sampled with
    states : (n,) index of the temperature each was sampled at
    temperatures_K : (K,)
    temperature_K : of the distribution that is wanted

    Raises
    ------
    InputError
        No frames, or an index that is not one of a temperature.
    """
    n_states = len(temperatures_K)
    if not len(energies) or len(energies) != len(states) or not 0 <= states.min() <= states.max() < n_states:
        raise InputError(
            "energies and states do not fit", expected=f"states 0 to {n_states - 1}", got=f"{len(energies)} frames"
        )
    counts = np.bincount(states, minlength=n_states).astype(np.float64)
    sampled = np.flatnonzero(counts)
    betas = np.array([1.0 / compute_kt(t) for t in np.asarray(temperatures_K)[sampled]])
    # Only differences of energies count; around their mean nothing grows large.
    shifted = energies - energies.mean()
    means = np.bincount(states, shifted, n_states)[sampled] / counts[sampled]
    free_energies = _solve(shifted, betas, counts[sampled], means)
    mixture = logsumexp(free_energies + np.log(counts[sampled]) - np.outer(shifted, betas), axis=1)
    logarithms = -shifted / compute_kt(temperature_K) - mixture
    return np.asarray(np.exp(logarithms - logsumexp(logarithms)))


def count_effective(weights: FloatArray) -> float:
    """How many frames of equal weight would do as well (Kish): (sum w)^2 / sum w^2."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _solve(energies: FloatArray, betas: FloatArray, counts: FloatArray, means: FloatArray) -> FloatArray:
    """Reduced free energies (K,) of the sampled states, the first zero; ``means`` (K,) of their energies."""
    if len(betas) == 1:
        return np.zeros(1)
    exponents, total = np.log(counts) - np.outer(energies, betas), counts.sum()

    def share(f: FloatArray) -> tuple[float, FloatArray]:
        """The function to minimise, and the probability (n, K) that a frame of its energy comes from each state."""
        terms = exponents + np.append(0.0, f)
        mixture = logsumexp(terms, axis=1)
        value = (mixture.sum() - counts[1:] @ f) / total
        return float(value), np.exp(terms - mixture[:, None])

    def objective(f: FloatArray) -> tuple[float, FloatArray]:
        value, shares = share(f)
        return value, ((shares.sum(axis=0) - counts) / total)[1:]

    def curvature(f: FloatArray) -> FloatArray:
        shares = share(f)[1]
        return np.asarray(((np.diag(shares.sum(axis=0)) - shares.T @ shares) / total)[1:, 1:])

    # df/dbeta is the mean energy.
    guess = np.cumsum(0.5 * (means[1:] + means[:-1]) * np.diff(betas))
    options = {"gtol": TOLERANCE}
    found = minimize(objective, guess, jac=True, hess=curvature, method="trust-exact", options=options)
    return np.append(0.0, found.x)
