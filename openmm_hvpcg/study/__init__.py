"""A study: one protocol, one output folder, six stages. Imports every room; only the command line imports it."""

from openmm_hvpcg.study.folder import Study, open_study
from openmm_hvpcg.study.stages import STAGES, run_stage, run_study

__all__ = ["STAGES", "Study", "open_study", "run_stage", "run_study"]
