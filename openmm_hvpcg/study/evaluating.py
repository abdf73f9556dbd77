"""How far priors and arms are from the PMF reference: ``evaluation.json`` of a study."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from openmm_hvpcg._version import __version__
from openmm_hvpcg.errors import StudyError
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.study.folder import Study, read_record
from openmm_hvpcg.training.fit import FitResult, load_fit
from openmm_hvpcg.training.reference import PMFReference
from openmm_hvpcg.training.reference_errors import ReferenceErrors, compute_reference_errors
from openmm_hvpcg.units import UNITS

logger = logging.getLogger(__name__)

FORMAT = "openmm-hvpcg/evaluation"
FORMAT_VERSION = 1


def evaluate_study(study: Study, references: Mapping[str, PMFReference]) -> None:
    """Judge every trained arm, and its priors alone, on every reference; write ``evaluation.json``.

    Parameters
    ----------
    references : of each judged molecule

    Raises
    ------
    PotentialError
        A molecule has beads that an arm was never trained on.
    """
    fits = {arm: load_fit(study.model_folder(arm)) for arm in study.arms}
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "units": UNITS,
        "package_version": __version__,
        "made_from": study.describe_unit("evaluate", "evaluation"),
        "molecules": {name: _judge_molecule(reference, fits) for name, reference in references.items()},
    }
    write_json(study.evaluation_path, content)


def read_evaluation(study: Study) -> dict[str, Any] | None:
    """The evaluation of the trainings and references that there are now, or None.

    Raises
    ------
    StudyError
        The file is damaged, or of another version.
    """
    if not study.is_done("evaluate", "evaluation"):
        if study.evaluation_path.exists():
            logger.info("%s is of other trainings or references, and left out", study.evaluation_path)
        return None
    content = read_record(study.evaluation_path)
    found = (content.get("format"), content.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise StudyError(
            "not an evaluation of this version",
            expected=f"{FORMAT} {FORMAT_VERSION}",
            got=" ".join(map(str, found)),
            where=study.evaluation_path,
            hint="delete it and run evaluate again",
        )
    return content


def list_pmf_errors(evaluation: Mapping[str, Any] | None) -> dict[str, dict[str, dict[str, Any]]] | None:
    """Its figures by molecule and arm, as the report and the summary take them."""
    return None if evaluation is None else {name: m["arms"] for name, m in evaluation["molecules"].items()}


def _judge_molecule(reference: PMFReference, fits: Mapping[str, FitResult]) -> dict[str, Any]:
    """Figures by arm. Priors hang on the frames an arm was trained on, which all arms mostly share: judged once."""
    alone: dict[str, ReferenceErrors] = {}
    figures: dict[str, dict[str, float | None]] = {}
    for arm, fit in fits.items():
        key = repr(fit.spec.priors.to_dict())
        if key not in alone:
            alone[key] = compute_reference_errors(reference, fit.spec, None)
        priors, errors = alone[key], compute_reference_errors(reference, fit.spec, fit.network)
        figures[arm] = {**_show(errors, ""), **_show(priors, "_priors")}
        logger.info(
            "%s %s: mean-force error %.4g (priors alone %.4g) kJ/mol/nm, HVP error %.4g (%.4g) kJ/mol/nm^2",
            reference.name,
            arm,
            errors.force_rmse,
            priors.force_rmse,
            errors.hvp_rmse,
            priors.hvp_rmse,
        )
    return {"reference": _describe_reference(reference, next(iter(alone.values()))), "arms": figures}


def _show(errors: ReferenceErrors, suffix: str) -> dict[str, float | None]:
    """Under the keys of the summary; None for what is not known."""
    values = {
        f"pmf_force_rmse{suffix}": errors.force_rmse,
        f"pmf_force_rmse{suffix}_error": errors.force_rmse_error,
        f"pmf_hvp_rmse{suffix}": errors.hvp_rmse,
        f"pmf_hvp_rmse{suffix}_error": errors.hvp_rmse_error,
    }
    return {key: float(value) if np.isfinite(value) else None for key, value in values.items()}


def _describe_reference(reference: PMFReference, errors: ReferenceErrors) -> dict[str, Any]:
    """What the figures were measured against; sizes and noise are rms per component, like the errors."""
    facts = reference.attributes
    sizes = {key: getattr(errors, key) for key in ("force_size", "hvp_size", "force_noise", "hvp_noise")}
    return {
        "configurations": reference.n_frames,
        "probes": int(reference.probes.shape[1]),
        **sizes,
        "force_calls_per_configuration": facts["force_calls_per_configuration"],
        "platform": facts["platform"]["name"],
        "settings": facts["made_from"]["settings"],
    }
