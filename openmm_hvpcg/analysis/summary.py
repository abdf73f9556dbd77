"""``summary.json``: every figure of a study, keys documented in :data:`SUMMARY_KEYS`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from openmm_hvpcg.analysis.compare import BASINS, Comparison
from openmm_hvpcg.analysis.distributions import Landscape, Moments, Observable
from openmm_hvpcg.analysis.divergences import Estimate
from openmm_hvpcg.storage import PathLike, write_json
from openmm_hvpcg.units import UNITS

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

Training = Mapping[str, Mapping[str, Any]]
Simulation = Mapping[str, Mapping[str, Mapping[str, Any]]]
#: Errors against the PMF reference: by molecule, then by arm, the ``pmf_`` keys.
PMFErrors = Mapping[str, Mapping[str, Mapping[str, Any]]]

_SPACES = {
    "tica1": "along TICA mode 1",
    "tica12": "over TICA modes 1 and 2 together",
    "phi_psi": "over phi and psi (dipeptides only)",
}
_KIND_KEYS = {
    "bond": "js_bonds_mean",
    "1-3 distance": "js_13_distances_mean",
    "distance": "js_distances_mean",
    "angle": "js_angles_mean",
    "dihedral": "js_dihedrals_mean",
}
_LABEL_KEYS = {
    "force_rmse_validation": "force error on the validation labels, rms per component (kJ/mol/nm)",
    "hvp_rmse_validation": "HVP error on the validation targets, rms per component (kJ/mol/nm^2)",
    "force_noise": "noise level of the force labels: no model's error falls below it (kJ/mol/nm)",
    "hvp_noise": "noise level of the HVP targets: no model's error falls below it (kJ/mol/nm^2)",
    "force_rmse_priors": "force error of the priors alone, without the network (kJ/mol/nm)",
    "hvp_rmse_priors": "HVP error of the priors alone, without the network (kJ/mol/nm^2)",
}
_PMF_KEYS = {
    "pmf_force_rmse": "mean-force error against the PMF reference, rms per component, its noise taken out (kJ/mol/nm)",
    "pmf_hvp_rmse": "the same of Hessian-vector products on probes with E[v v^T] = 1 (kJ/mol/nm^2)",
    "pmf_force_rmse_priors": "mean-force error of the arm's priors alone, without the network (kJ/mol/nm)",
    "pmf_hvp_rmse_priors": "error of Hessian-vector products of the arm's priors alone (kJ/mol/nm^2)",
}
PMF_KEYS = {
    **_PMF_KEYS,
    **{f"{key}_error": f"standard error of {key} over the configurations of the reference" for key in _PMF_KEYS},
}
_TRAINING_KEYS = {
    **_LABEL_KEYS,
    "n_frames": "frames used: of the reference, of an arm's CG run after burn-in, or of the training data",
    "n_validation_frames": "frames held out to validate on",
    "epochs": "training epochs run",
    "best_epoch": "epoch whose weights were kept, from 0",
    "force_weight": "weight of the force term in the loss",
    "hvp_weight": "weight of the HVP term in the loss",
    "covariance_share": "share of the Hessians' spread that covariances follow (training.covariance: ratio); else null",
    "network_share": "what of the network's energy was kept, 0 to 1; below 1 the held-out frames asked for less",
    "wall_time_s": "wall time of the training (s)",
    "peak_loss": "largest training loss of an epoch, over that of the priors alone",
}
#: Training figures that the report shows and the summary leaves out.
NOT_SUMMARISED = {
    "curves",
    "molecules",
    "diagnosis",
    "loss_terms",
    *(f"{term}_rmse_{kind}" for term in ("force", "hvp") for kind in ("training", "validation_error")),
}
_SIMULATION_KEYS = {
    "simulated_ns": "CG simulation, sum over the replicas (ns)",
    "steps_per_second": "CG steps per second of the whole System with all its replicas",
    "backend": "how OpenMM evaluated the network: torchforce or pythonforce",
    "platform": "OpenMM platform of the CG simulation",
    "replicas": "independent copies simulated at once",
    "n_steps": "CG steps of each replica",
    "timestep_fs": "CG time step (fs)",
    "stable": "false if the simulation blew up, null if there was none",
    "temperatures_K": "temperatures of the replica exchange, null without (K)",
    "swap_acceptance": "probability of swapping each two neighbouring temperatures (0 to 1)",
    "round_trips": "from the coldest temperature to the hottest and back, all replicas together",
}

#: Every key of ``summary.json`` and what it means. Null stands for a figure that does not exist.
SUMMARY_KEYS: dict[str, str] = {
    "format": "kind of file: openmm-hvpcg/summary",
    "format_version": "version of this layout",
    "units": "units of all figures whose key names none; divergences are in nats",
    "molecules": "by molecule name: reference and arms",
    "reference": "figures of the all-atom reference mapped on beads; null if the molecule was not compared",
    "arms": "at the top: training figures by arm; in a molecule: comparison and simulation figures by arm",
    "provenance": "what the study was made from, as given by its stages",
    "status": "ok, unstable (simulation blew up), skipped (not comparable) or missing (not run)",
    "message": "what went wrong where status is not ok, or a remark of the simulation",
    "temperature_K": "temperature (K)",
    "sampled_ns": "frames of the reference times their interval (ns)",
    "n_blocks": "time blocks of the reference behind its errors",
    "tica_features": "features TICA was fitted on, in words",
    "tica_n_features": "number of features",
    "tica_n_dimensions": "dimensions left of them after removing constant and redundant ones",
    "tica_lag_ps": "lag of TICA (ps)",
    "tica_timescales_ps": "implied timescales of the slowest modes of the reference (ps)",
    **{f"kl_{s}": f"Kullback-Leibler divergence KL(reference || model) {w} (nats)" for s, w in _SPACES.items()},
    **{f"kl_{s}_error": f"its standard error from time blocks of both ({w}, nats)" for s, w in _SPACES.items()},
    **{
        f"js_{s}": f"Jensen-Shannon divergence of model and reference {w}, 0 to 0.693 (nats)"
        for s, w in _SPACES.items()
    },
    **{f"js_{s}_error": f"its standard error from time blocks of both ({w}, nats)" for s, w in _SPACES.items()},
    **{
        f"{d}_{s}_sampling_floor": f"the same of one half of the reference against the other {w} (nats)"
        for d in ("kl", "js")
        for s, w in _SPACES.items()
    },
    "outside_reference_share": "share of frames beyond the reference's range of TICA mode 1 (0 to 1)",
    **{
        f"{q}_{m}_nm{e}": f"{m} of the {w} (nm)" if not e else f"standard error of the {m} of the {w} (nm)"
        for q, w in (("radius_of_gyration", "radius of gyration"), ("rmsd", "RMSD to the native structure"))
        for m in ("mean", "std")
        for e in ("", "_error")
    },
    "js_radius_of_gyration": "Jensen-Shannon divergence of the radius of gyration (nats)",
    "js_radius_of_gyration_error": "its standard error (nats)",
    "js_rmsd": "Jensen-Shannon divergence of the RMSD to native (nats)",
    "js_rmsd_error": "its standard error (nats)",
    **{
        key: f"mean Jensen-Shannon divergence over all internal coordinates of kind {kind} (nats)"
        for kind, key in _KIND_KEYS.items()
    },
    **{f"population_{basin}": f"share of frames in the phi/psi basin {basin} (0 to 1)" for basin in BASINS},
    **{f"population_{basin}_error": f"standard error of the share in {basin}" for basin in BASINS},
    "n_effective_frames": "frames of equal weight that would do as well as the weighted ones of a replica exchange",
    "observables": "list of internal coordinates, one entry each",
    "kind": "kind of internal coordinate: bond, 1-3 distance, distance, angle or dihedral",
    "label": "beads of the coordinate",
    "unit": "unit of its mean and std: nm or deg",
    "mean": "mean (of dihedrals: circular)",
    "mean_error": "standard error of the mean",
    "std": "standard deviation (of dihedrals: circular)",
    "std_error": "standard error of the standard deviation",
    "js": "Jensen-Shannon divergence of its distribution from the reference (nats)",
    "js_error": "standard error of js (nats)",
    **_TRAINING_KEYS,
    **_SIMULATION_KEYS,
    **PMF_KEYS,
}


def find_arms(molecule: str, comparison: Comparison | None, training: Training, simulation: Simulation) -> list[str]:
    """All arms a molecule must be reported for: trained, simulated or compared."""
    compared = [] if comparison is None else [*comparison.arms, *comparison.skipped]
    return list(dict.fromkeys([*training, *simulation.get(molecule, {}), *compared]))


def judge_arm(molecule: str, arm: str, comparison: Comparison | None, simulation: Simulation) -> tuple[str, str | None]:
    """Status of an arm of a molecule (ok, unstable, skipped, missing), and a message where it is not ok."""
    run = simulation.get(molecule, {}).get(arm)
    message = str(run.get("message") or "") if run else ""
    if run and run.get("stable") is False:
        return "unstable", message or "the CG simulation blew up"
    if comparison is not None and arm in comparison.arms:
        return "ok", message or None
    if comparison is not None and arm in comparison.skipped:
        return "skipped", comparison.skipped[arm]
    return "missing", message or "there is no CG run of this arm to compare"


def build_summary(
    comparisons: Mapping[str, Comparison],
    training: Training,
    simulation: Simulation,
    provenance: Mapping[str, Any],
    pmf_errors: PMFErrors | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json`` as JSON-ready values (NaN and infinity become null).

    Parameters
    ----------
    comparisons : by molecule
    training : by arm; the keys of it that :data:`SUMMARY_KEYS` documents are taken
    simulation : by molecule, then by arm
    provenance : anything that JSON holds
    pmf_errors : by molecule, then by arm: the keys of :data:`PMF_KEYS`; None where there is no PMF reference
    """
    molecules: dict[str, Any] = {}
    for molecule in dict.fromkeys([*comparisons, *simulation]):
        comparison = comparisons.get(molecule)
        molecules[molecule] = {
            "reference": None if comparison is None else _describe_reference(comparison),
            "arms": {
                arm: _describe_arm(molecule, arm, comparison, training, simulation)
                | {key: (pmf_errors or {}).get(molecule, {}).get(arm, {}).get(key) for key in PMF_KEYS}
                for arm in find_arms(molecule, comparison, training, simulation)
            },
        }
    for arm, figures in training.items():
        if unknown := set(figures) - set(_TRAINING_KEYS) - NOT_SUMMARISED:
            logger.info("arm %s: not in the summary: %s", arm, ", ".join(sorted(unknown)))
    content = {
        "format": "openmm-hvpcg/summary",
        "format_version": FORMAT_VERSION,
        "units": UNITS,
        "molecules": molecules,
        "arms": {arm: {key: figures.get(key) for key in _TRAINING_KEYS} for arm, figures in training.items()},
        "provenance": dict(provenance),
    }
    cleaned: dict[str, Any] = _clean(content)
    return cleaned


def write_summary(
    path: PathLike,
    comparisons: Mapping[str, Comparison],
    training: Training,
    simulation: Simulation,
    provenance: Mapping[str, Any],
    pmf_errors: PMFErrors | None = None,
) -> dict[str, Any]:
    """Write ``summary.json``, whole or not at all; return its content. Arguments: :func:`build_summary`."""
    content = build_summary(comparisons, training, simulation, provenance, pmf_errors)
    write_json(path, content)
    return content


def _describe_reference(c: Comparison) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "n_frames": c.n_frames_reference,
        "sampled_ns": c.reference_ns,
        "n_blocks": c.n_blocks_reference,
        "temperature_K": c.temperature_K,
        "tica_features": c.feature_note,
        "tica_n_features": c.n_features,
        "tica_n_dimensions": c.slow_modes.n_dimensions,
        "tica_lag_ps": c.slow_modes.lag_ps,
        "tica_timescales_ps": c.slow_modes.timescales_ps.tolist(),
    }
    for space, landscape in _find_spaces(c).items():
        figures[f"kl_{space}_sampling_floor"] = landscape.kl_floor if landscape else None
        figures[f"js_{space}_sampling_floor"] = landscape.js_floor if landscape else None
    for observable in (c.radius_of_gyration, c.rmsd):
        if observable is not None:
            figures |= _describe_size(observable.kind, observable.reference)
    figures |= _describe_populations(c, None)
    figures["observables"] = [_describe_coordinate(o, o.reference, None) for o in c.coordinates]
    return figures


def _describe_arm(
    molecule: str, arm: str, comparison: Comparison | None, training: Training, simulation: Simulation
) -> dict[str, Any]:
    status, message = judge_arm(molecule, arm, comparison, simulation)
    run = simulation.get(molecule, {}).get(arm, {})
    figures: dict[str, Any] = {"status": status, "message": message}
    figures |= {key: run.get(key) for key in _SIMULATION_KEYS}
    labels = training.get(arm, {}).get("molecules", {}).get(molecule, {})
    figures |= {key: labels.get(key) for key in _LABEL_KEYS}
    c = comparison if status == "ok" else None
    figures["n_frames"] = c.n_frames[arm] if c else None
    figures["n_effective_frames"] = c.n_effective.get(arm) if c else None
    spaces: dict[str, Landscape | None] = _find_spaces(c) if c else dict.fromkeys(_SPACES)
    for space, landscape in spaces.items():
        figures |= _describe_estimate(f"kl_{space}", landscape.kl[arm] if landscape else None)
        figures |= _describe_estimate(f"js_{space}", landscape.js[arm] if landscape else None)
    figures["outside_reference_share"] = c.tica1.outside[arm] if c else None
    for kind in ("radius_of_gyration", "rmsd"):
        observable: Observable | None = getattr(c, kind) if c else None
        figures |= _describe_size(kind, observable.arms[arm] if observable else None)
        figures |= _describe_estimate(f"js_{kind}", observable.landscape.js[arm] if observable else None)
    for kind, key in _KIND_KEYS.items():
        values = [o.landscape.js[arm].value for o in c.coordinates if o.kind == kind] if c else []
        figures[key] = float(np.mean(values)) if values else None
    if c is None:
        return figures
    figures |= _describe_populations(c, arm)
    figures["observables"] = [_describe_coordinate(o, o.arms[arm], o.landscape.js[arm]) for o in c.coordinates]
    return figures


def _find_spaces(c: Comparison) -> dict[str, Landscape | None]:
    return {"tica1": c.tica1, "tica12": c.tica12, "phi_psi": c.phi_psi}


def _describe_estimate(key: str, found: Estimate | None) -> dict[str, Any]:
    return {key: found.value if found else None, f"{key}_error": found.error if found else None}


def _describe_size(kind: str, moments: Moments | None) -> dict[str, Any]:
    return {
        f"{kind}_mean_nm": moments.mean.value if moments else None,
        f"{kind}_mean_nm_error": moments.mean.error if moments else None,
        f"{kind}_std_nm": moments.std.value if moments else None,
        f"{kind}_std_nm_error": moments.std.error if moments else None,
    }


def _describe_populations(c: Comparison, name: str | None) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for basin, share in zip(BASINS, c.populations.get(name, []), strict=False):
        figures |= _describe_estimate(f"population_{basin}", share)
    return figures


def _describe_coordinate(o: Observable, moments: Moments, js: Estimate | None) -> dict[str, Any]:
    figures = {"kind": o.kind, "label": o.label, "unit": o.unit}
    figures |= _describe_estimate("mean", moments.mean) | _describe_estimate("std", moments.std)
    return figures if js is None else figures | _describe_estimate("js", js)


def _clean(value: Any) -> Any:
    """JSON-ready: numpy to Python, NaN and infinity to None, unknown types to text."""
    if isinstance(value, Mapping):
        return {str(key): _clean(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return _clean(value.tolist())
    if isinstance(value, (list, tuple, set)):
        return [_clean(entry) for entry in value]
    if isinstance(value, np.generic):
        return _clean(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
