"""Comparison of CG runs with the all-atom reference: figures, plots, report, summary."""

from openmm_hvpcg.analysis.compare import Comparison, compare_runs
from openmm_hvpcg.analysis.observables import find_phi_psi
from openmm_hvpcg.analysis.report import write_report
from openmm_hvpcg.analysis.reweighting import compute_weights
from openmm_hvpcg.analysis.summary import SUMMARY_KEYS, write_summary

__all__ = [
    "SUMMARY_KEYS",
    "Comparison",
    "compare_runs",
    "compute_weights",
    "find_phi_psi",
    "write_report",
    "write_summary",
]
