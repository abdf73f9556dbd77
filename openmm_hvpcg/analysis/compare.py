"""Compare CG runs of one molecule with its all-atom reference, mapped on beads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg.analysis import observables as obs
from openmm_hvpcg.analysis.distributions import (
    Landscape,
    Observable,
    Sample,
    compare_observable,
    compare_samples,
    compute_shares,
)
from openmm_hvpcg.analysis.divergences import Estimate, split_blocks
from openmm_hvpcg.analysis.reweighting import count_effective
from openmm_hvpcg.analysis.slow_modes import SlowModes, fit_slow_modes
from openmm_hvpcg.config import AnalysisSettings
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.frames import Frames, check_finite
from openmm_hvpcg.units import NS_PER_PS

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

#: Frames a block needs for its errors to mean anything.
MIN_FRAMES_PER_BLOCK = 2
#: Temperatures of reference and run may differ by this share (rounding in files), not more.
TEMPERATURE_TOLERANCE = 1e-3

#: A bead farther out was thrown there by a simulation that blew up; squares of it would overflow.
FARTHEST_NM = 1.0e6

#: Basins of the Ramachandran plane, in degrees; together they cover it, each point once.
#: c7eq_pii: phi < 0 or > 130, psi > 50 or < -120 (C7eq, PII, C5). alpha_r: same phi, -120 <= psi <= 50.
#: alpha_l: 0 <= phi <= 130, 0 <= psi < 120. c7ax: the rest of 0 <= phi <= 130.
BASINS = ("c7eq_pii", "alpha_r", "alpha_l", "c7ax")


@dataclass(frozen=True)
class Comparison:
    """All that plots and summary need of one molecule.

    Attributes
    ----------
    molecule, temperature_K, settings : what was compared, and how
    n_frames_reference, reference_ns, n_blocks_reference : the reference
    n_frames : frames used of each arm, after burn-in
    n_effective : for arms whose frames are weighted, how many frames of equal weight would do as well
    slow_modes, feature_note, n_features : TICA of the reference
    tica1, tica12 : along mode 1, over modes 1 and 2 (None with one mode only)
    phi_psi : Ramachandran plane (None unless asked for), degrees
    populations : shares of :data:`BASINS` of the reference (key None) and of each arm
    coordinates : bonds, 1-3 and key distances, angles, dihedrals
    radius_of_gyration, rmsd : size, and RMSD to the native structure (None without one)
    skipped : arms that could not be compared, and why
    """

    molecule: str
    temperature_K: float
    settings: dict[str, Any]
    n_frames_reference: int
    reference_ns: float
    n_blocks_reference: int
    n_frames: dict[str, int]
    slow_modes: SlowModes
    feature_note: str
    n_features: int
    tica1: Landscape
    tica12: Landscape | None
    phi_psi: Landscape | None
    populations: dict[str | None, list[Estimate]]
    coordinates: tuple[Observable, ...]
    radius_of_gyration: Observable
    rmsd: Observable | None
    skipped: dict[str, str] = field(default_factory=dict)
    n_effective: dict[str, float] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.n_frames)


@dataclass(frozen=True)
class _Run:
    frames: Frames
    blocks: list[NDArray[np.intp]]
    weights: FloatArray | None = None

    def sample(self, values: FloatArray) -> Sample:
        return Sample(values, self.blocks, self.weights)


def compare_runs(
    reference: Frames,
    runs: Mapping[str, Frames],
    settings: AnalysisSettings,
    *,
    molecule: str,
    native: NDArray[np.floating] | None = None,
    phi_psi: tuple[obs.Quadruple, obs.Quadruple] | None = None,
    weights: Mapping[str, FloatArray] | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure how well CG runs reproduce the reference.

    Parameters
    ----------
    reference : all-atom frames mapped on beads, (T, B, 3) nm; TICA is fitted on them
    runs : CG frames by arm name, each replica a walker; may be empty
    settings : the ``analysis`` section; over two coordinates half as many bins an axis are used
    molecule : its name, for messages and titles
    native : (B, 3) nm, structure for the RMSD
    phi_psi : bead indices of phi and psi, see :func:`~openmm_hvpcg.analysis.observables.find_phi_psi`
    weights : by arm, where frames do not count alike: (T,) what each counts as a sample of the reference's
        temperature, see :mod:`~openmm_hvpcg.analysis.reweighting`; burn-in is left out whatever it weighs
    seed : of the random halves of the reference behind the sampling floor

    Raises
    ------
    InputError
        Runs, native structure or dihedrals that do not fit the reference; a reference too short for the lag;
        a molecule broken across a periodic boundary. A run too short, or blown up, is not an error: it is
        ``skipped``.
    """
    _check_inputs(reference, runs, molecule, native, phi_psi)
    least = MIN_FRAMES_PER_BLOCK * settings.blocks
    if reference.n_frames < least:
        raise InputError(
            "the reference is too short",
            expected=f"at least {least} frames",
            got=reference.n_frames,
            where=molecule,
        )
    base, models, skipped = _Run(reference, split_blocks(reference.walker, settings.blocks)), {}, {}
    for arm, frames in runs.items():
        kept = list_after_burn_in(frames.walker, settings.burn_in)
        used = frames if len(kept) == frames.n_frames else frames.select(kept)
        counted = _scale_weights(weights[arm][kept]) if weights and arm in weights else None
        reason = _find_reason_to_skip(used, least, counted)
        if reason:
            skipped[arm] = reason
            logger.warning("%s, arm %s: %s", molecule, arm, reason)
        else:
            models[arm] = _Run(used, split_blocks(used.walker, settings.blocks), counted)
    features = obs.build_features(reference.topology, settings.features)
    modes, tica1, tica12 = _compare_slow_modes(base, models, features, settings, molecule, seed)
    return Comparison(
        molecule=molecule,
        temperature_K=reference.temperature_K,
        settings=settings.model_dump(mode="json"),
        n_frames_reference=reference.n_frames,
        reference_ns=reference.n_frames * reference.interval_ps * NS_PER_PS,
        n_blocks_reference=len(base.blocks),
        n_frames={arm: run.frames.n_frames for arm, run in models.items()},
        slow_modes=modes,
        feature_note=features.note,
        n_features=features.n_features,
        tica1=tica1,
        tica12=tica12,
        coordinates=_compare_coordinates(base, models, settings.bins, seed),
        radius_of_gyration=_compare_scalar(
            "radius_of_gyration",
            "radius of gyration",
            obs.compute_radius_of_gyration,
            base,
            models,
            settings,
            seed,
        ),
        rmsd=None
        if native is None
        else _compare_scalar(
            "rmsd", "RMSD to native", lambda f: obs.compute_rmsd(f, native), base, models, settings, seed
        ),
        skipped=skipped,
        n_effective={arm: float(run.weights.sum()) for arm, run in models.items() if run.weights is not None},
        **_compare_phi_psi(base, models, settings, phi_psi, seed),
    )


def list_after_burn_in(walker: NDArray[np.int64], share: float) -> NDArray[np.intp]:
    """Indices of the frames without the first ``share`` of every walker; ``walker`` (T,) of each frame."""
    keep = np.zeros(len(walker), dtype=bool)
    for w in dict.fromkeys(walker.tolist()):
        index = np.flatnonzero(walker == w)
        keep[index[int(share * len(index)) :]] = True
    return np.flatnonzero(keep)


def assign_basins(phi_psi: FloatArray) -> NDArray[np.intp]:
    """Index into :data:`BASINS` of each row (phi, psi) in degrees, -180 to 180."""
    phi, psi = phi_psi[:, 0], phi_psi[:, 1]
    right = (phi >= 0) & (phi <= 130)
    helical = (psi >= -120) & (psi <= 50)
    left_handed = (psi >= 0) & (psi < 120)
    return np.where(right, np.where(left_handed, 2, 3), np.where(helical, 1, 0))


def without_arms(comparison: Comparison, arms: Mapping[str, str]) -> Comparison:
    """The comparison with ``arms`` (name -> reason, say a simulation that blew up) moved to ``skipped``."""
    keep = [arm for arm in comparison.arms if arm not in arms]

    def trim(landscape: Landscape) -> Landscape:
        chosen = {
            name: {arm: getattr(landscape, name)[arm] for arm in keep} for name in ("arms", "kl", "js", "outside")
        }
        return replace(landscape, **chosen)  # type: ignore[arg-type]

    def trim_observable(o: Observable) -> Observable:
        return replace(o, landscape=trim(o.landscape), arms={arm: o.arms[arm] for arm in keep})

    c = comparison
    return replace(
        c,
        n_frames={arm: c.n_frames[arm] for arm in keep},
        n_effective={arm: n for arm, n in c.n_effective.items() if arm in keep},
        tica1=trim(c.tica1),
        tica12=None if c.tica12 is None else trim(c.tica12),
        phi_psi=None if c.phi_psi is None else trim(c.phi_psi),
        populations={name: p for name, p in c.populations.items() if name is None or name in keep},
        coordinates=tuple(trim_observable(o) for o in c.coordinates),
        radius_of_gyration=trim_observable(c.radius_of_gyration),
        rmsd=None if c.rmsd is None else trim_observable(c.rmsd),
        skipped={**c.skipped, **arms},
    )


def _check_inputs(
    reference: Frames,
    runs: Mapping[str, Frames],
    molecule: str,
    native: NDArray[np.floating] | None,
    phi_psi: tuple[obs.Quadruple, obs.Quadruple] | None,
) -> None:
    obs.check_whole(reference, f"{molecule}, reference")
    names = [atom.name for atom in reference.topology.atoms]
    for arm, frames in runs.items():
        where = f"{molecule}, arm {arm}"
        if [atom.name for atom in frames.topology.atoms] != names:
            raise InputError(
                "beads of the run are not those of the reference",
                expected=f"{len(names)} beads {' '.join(names[:8])}",
                got=f"{frames.n_atoms} beads {' '.join(a.name for a in list(frames.topology.atoms)[:8])}",
                where=where,
                hint="map the reference with the map that the potential was trained with",
            )
        if abs(frames.temperature_K / reference.temperature_K - 1.0) > TEMPERATURE_TOLERANCE:
            raise InputError(
                "temperatures of run and reference differ",
                expected=f"{reference.temperature_K} K",
                got=f"{frames.temperature_K} K",
                where=where,
                hint="a CG potential of one temperature is compared at that temperature",
            )
        obs.check_whole(frames, where)
    if native is not None:
        if np.shape(native) != (reference.n_atoms, 3):
            raise InputError(
                "the native structure does not fit the beads",
                expected=(reference.n_atoms, 3),
                got=np.shape(native),
                where=molecule,
            )
        check_finite(np.asarray(native)[None], "positions of the native structure", molecule)
    for beads in phi_psi or ():
        if len(set(beads)) != 4 or not all(0 <= b < reference.n_atoms for b in beads):
            raise InputError(
                "phi and psi need four different beads each",
                expected=f"indices 0 to {reference.n_atoms - 1}",
                got=tuple(beads),
                where=molecule,
            )


def _scale_weights(weights: FloatArray) -> FloatArray:
    """Weights that sum to the number of frames of equal weight that would do as well."""
    return weights * (count_effective(weights) / weights.sum())


def _find_reason_to_skip(used: Frames, least: int, weights: FloatArray | None) -> str | None:
    if weights is not None and weights.sum() < least:
        return (
            f"too few frames count at the target temperature: they are worth {weights.sum():.0f}, at least {least} are"
            " needed"
        )
    if used.n_frames < least:
        return f"too short to compare: {used.n_frames} frames after burn-in, at least {least} are needed"
    if np.abs(used.positions).max() > FARTHEST_NM:
        return f"beads left the physical range: a coordinate beyond {FARTHEST_NM:.0e} nm"
    return None


def _count_bins_2d(n_bins: int) -> int:
    """Half the bins an axis over two coordinates: the frames must do for the square of it."""
    return max(4, n_bins // 2)


def _compare_slow_modes(
    base: _Run,
    models: Mapping[str, _Run],
    features: obs.FeatureSet,
    settings: AnalysisSettings,
    molecule: str,
    seed: int,
) -> tuple[SlowModes, Landscape, Landscape | None]:
    values, walker = features.compute(base.frames), base.frames.walker
    trajectories = [values[walker == w] for w in dict.fromkeys(walker.tolist())]
    try:
        modes = fit_slow_modes(trajectories, settings.lag_frames, base.frames.interval_ps)
    except InputError as error:
        raise InputError(str(error), where=molecule) from error
    reference = base.sample(modes.project(values))
    arms = {arm: run.sample(modes.project(features.compute(run.frames))) for arm, run in models.items()}
    axes, units = ("TICA mode 1", "TICA mode 2"), ("", "")

    def landscape(n: int, n_bins: int) -> Landscape:
        first = {arm: s.with_values(s.values[:, :n]) for arm, s in arms.items()}
        return compare_samples(
            axes[:n], units[:n], reference.with_values(reference.values[:, :n]), first, n_bins, seed=seed
        )

    both = landscape(2, _count_bins_2d(settings.bins)) if modes.n_modes > 1 else None
    return modes, landscape(1, settings.bins), both


def _compare_coordinates(base: _Run, models: Mapping[str, _Run], n_bins: int, seed: int) -> tuple[Observable, ...]:
    coordinates = obs.find_coordinates(base.frames.topology, base.frames)
    values = obs.compute_coordinates(base.frames, coordinates)
    arm_values = {arm: obs.compute_coordinates(run.frames, coordinates) for arm, run in models.items()}
    return tuple(
        compare_observable(
            coordinate.kind,
            coordinate.label,
            coordinate.unit,
            base.sample(values[:, c]),
            {arm: run.sample(arm_values[arm][:, c]) for arm, run in models.items()},
            n_bins,
            seed=seed,
        )
        for c, coordinate in enumerate(coordinates)
    )


def _compare_scalar(
    kind: str,
    label: str,
    compute: Any,
    base: _Run,
    models: Mapping[str, _Run],
    settings: AnalysisSettings,
    seed: int,
) -> Observable:
    arms = {arm: run.sample(compute(run.frames)) for arm, run in models.items()}
    return compare_observable(kind, label, "nm", base.sample(compute(base.frames)), arms, settings.bins, seed=seed)


def _compare_phi_psi(
    base: _Run,
    models: Mapping[str, _Run],
    settings: AnalysisSettings,
    phi_psi: tuple[obs.Quadruple, obs.Quadruple] | None,
    seed: int,
) -> dict[str, Any]:
    if phi_psi is None:
        return {"phi_psi": None, "populations": {}}
    reference = base.sample(obs.compute_phi_psi(base.frames, phi_psi))
    arms = {arm: run.sample(obs.compute_phi_psi(run.frames, phi_psi)) for arm, run in models.items()}
    landscape = compare_samples(
        ("phi", "psi"),
        ("deg", "deg"),
        reference,
        arms,
        _count_bins_2d(settings.bins),
        period=(-180.0, 180.0),
        seed=seed,
    )
    populations: dict[str | None, list[Estimate]] = {}
    for name, sample in [(None, reference), *arms.items()]:
        states = sample.with_values(assign_basins(sample.values).astype(np.float64))
        populations[name] = compute_shares(states, len(BASINS))
    return {"phi_psi": landscape, "populations": populations}
