"""From a potential file to CG molecular dynamics in OpenMM; see :class:`CGPotential` and :func:`simulate`."""

from openmm_hvpcg.simulation.check import PotentialCheck, check_potential
from openmm_hvpcg.simulation.results import Ladder, SimulationResult, load_ladder, load_result, load_run
from openmm_hvpcg.simulation.run import simulate
from openmm_hvpcg.simulation.serialization import load_system, save_system
from openmm_hvpcg.simulation.system import CGPotential

__all__ = [
    "CGPotential",
    "Ladder",
    "PotentialCheck",
    "SimulationResult",
    "check_potential",
    "load_ladder",
    "load_result",
    "load_run",
    "load_system",
    "save_system",
    "simulate",
]
