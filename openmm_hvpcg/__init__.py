"""Coarse-grained neural potentials trained by force and Hessian-vector-product matching, run in OpenMM."""

from openmm_hvpcg._version import __version__

__all__ = ["__version__"]
