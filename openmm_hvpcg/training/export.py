"""From a trained arm to a potential file; the only TorchScript compilation of the package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from openmm_hvpcg.potential import PotentialSpec, save_potential
from openmm_hvpcg.simulation.check import PotentialCheck, check_potential
from openmm_hvpcg.storage import PathLike, atomic_path
from openmm_hvpcg.training.models.total import TotalEnergy

logger = logging.getLogger(__name__)


def script_potential(module: TotalEnergy) -> torch.jit.ScriptModule:
    """The module as TorchScript, ready for :func:`openmm_hvpcg.potential.save_potential`."""
    return torch.jit.script(module.eval())


def export_potential(
    network: torch.nn.Module, spec: PotentialSpec, path: PathLike, positions: NDArray[Any]
) -> PotentialCheck:
    """Script priors + network, check the result on ``positions``, and write it to ``path``.

    Parameters
    ----------
    network : energies (F,) from positions (F, B, 3) and species (B,)
    spec : priors, species and provenance; its bead map is the molecule the file is bound to
    path : the potential file
    positions : (T, B, 3) nm, frames of that molecule to check on

    Returns
    -------
    PotentialCheck, all passed

    Raises
    ------
    PotentialError
        A check failed; nothing is written.
    """
    module = TotalEnergy(network, spec).eval()
    script = script_potential(module)
    with atomic_path(path) as temporary:
        save_potential(temporary, script, spec)
        check = check_potential(temporary, positions, eager=module)
        check.raise_if_failed(where=Path(path))
    logger.info("%s: exported, %d checks passed", path, len(check.items))
    return check
