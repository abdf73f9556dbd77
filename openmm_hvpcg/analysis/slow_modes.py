"""Slow modes of the reference by time-lagged independent component analysis (TICA, deeptime).

Fitted on the reference alone and applied to every data set, so that all are seen along the same coordinates.
Pérez-Hernández et al., J. Chem. Phys. 139, 015102 (2013).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.errors import InputError

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

#: Pairs of frames a lag apart for each dimension kept: fewer fit noise.
PAIRS_PER_DIMENSION = 10
#: Principal components of the standardised features below this share of the largest are rounding or
#: redundant.
MIN_RELATIVE_VARIANCE = 1e-6
#: A feature whose spread is below this share of its size does not vary.
MIN_RELATIVE_SPREAD = 1e-6


@dataclass(frozen=True)
class SlowModes:
    """A fitted linear map from features to the slowest modes.

    Attributes
    ----------
    kept : (F,) features that vary
    mean : (F',) of the kept features
    whitening : (F', D) standardised features -> D uncorrelated components of unit variance
    timescales_ps : (n_modes,) implied timescales -lag / ln|eigenvalue|, NaN for an eigenvalue that is not
        between 0 and 1
    lag_ps : the lag
    n_pairs : frame pairs a lag apart that it was fitted on
    model : the deeptime model of the last step
    """

    kept: NDArray[np.bool_]
    mean: FloatArray
    whitening: FloatArray
    timescales_ps: FloatArray
    lag_ps: float
    n_pairs: int
    model: Any

    @property
    def n_modes(self) -> int:
        return len(self.timescales_ps)

    @property
    def n_dimensions(self) -> int:
        return int(self.whitening.shape[1])

    def project(self, features: FloatArray) -> FloatArray:
        """Modes (T, n_modes), slowest first, of unit variance in the reference, of features (T, F)."""
        components = (features[:, self.kept] - self.mean) @ self.whitening
        return np.asarray(self.model.transform(components), dtype=np.float64)[:, : self.n_modes]


def fit_slow_modes(
    trajectories: Sequence[FloatArray], lag_frames: int, interval_ps: float, n_modes: int = 2
) -> SlowModes:
    """Fit TICA on the features of independent trajectories; the lag never crosses from one to the next.

    Features are standardised and reduced to principal components first: constant and redundant ones drop
    out, and no more dimensions are kept than one for every ten pairs of frames.

    Parameters
    ----------
    trajectories : (T_w, F) features of each walker, any lengths
    lag_frames, interval_ps : the lag, and the time between frames
    n_modes : modes wanted; fewer come back where the features span fewer dimensions

    Raises
    ------
    InputError
        Walkers too short for the lag; no feature varies.
    """
    from deeptime.decomposition import TICA  # takes a second, which every command would feel

    usable = [np.asarray(t, dtype=np.float64) for t in trajectories if len(t) > lag_frames]
    n_pairs = sum(len(t) - lag_frames for t in usable)
    if n_pairs < PAIRS_PER_DIMENSION * n_modes:
        raise InputError(
            "the reference is too short for the TICA lag",
            expected=f"at least {PAIRS_PER_DIMENSION * n_modes} pairs of frames {lag_frames} frames apart",
            got=f"{n_pairs} in walkers of {', '.join(str(len(t)) for t in trajectories) or 'no'} frames",
            hint="sample more frames or lower analysis.lag_frames",
        )
    if len(usable) < len(trajectories):
        logger.warning("%d walkers are too short for the lag and left out", len(trajectories) - len(usable))
    kept, mean, whitening = _whiten(np.concatenate(usable), n_pairs // PAIRS_PER_DIMENSION)
    components = [(t[:, kept] - mean) @ whitening for t in usable]
    n_modes = min(n_modes, whitening.shape[1])
    model = TICA(lagtime=lag_frames, dim=n_modes, scaling=None).fit_from_timeseries(components).fetch_model()
    eigenvalues = np.asarray(model.singular_values[:n_modes], dtype=np.float64)
    lag_ps = lag_frames * interval_ps
    timescales = np.full(n_modes, np.nan)
    decays = (eigenvalues > 0) & (eigenvalues < 1)
    timescales[decays] = -lag_ps / np.log(eigenvalues[decays])
    return SlowModes(kept, mean, whitening, timescales, lag_ps, n_pairs, model)


def _whiten(features: FloatArray, max_dimensions: int) -> tuple[NDArray[np.bool_], FloatArray, FloatArray]:
    """Which features vary, their mean, and the matrix to at most ``max_dimensions`` whitened components."""
    mean, spread = features.mean(axis=0), features.std(axis=0)
    kept = spread > MIN_RELATIVE_SPREAD * np.maximum(np.abs(mean), 1e-9)
    if not kept.any():
        raise InputError(
            "no feature of the reference varies, so that it has no slow mode",
            expected="frames that differ",
            got=f"{features.shape[1]} constant features",
            hint="check the reference frames and the bead map",
        )
    mean, spread = mean[kept], spread[kept]
    standardised = (features[:, kept] - mean) / spread
    variances, vectors = np.linalg.eigh(standardised.T @ standardised / len(features))
    order = np.argsort(variances)[::-1]
    n_kept = min(int((variances > MIN_RELATIVE_VARIANCE * variances.max()).sum()), max_dimensions)
    logger.info("TICA on %d dimensions of %d features", n_kept, features.shape[1])
    chosen = order[:n_kept]
    return kept, mean, vectors[:, chosen] / np.sqrt(variances[chosen]) / spread[:, None]
