"""From a trained arm to a potential file; the only TorchScript compilation of the package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from openmm_hvpcg.errors import PotentialError
from openmm_hvpcg.potential import PotentialSpec, save_potential
from openmm_hvpcg.simulation.check import PotentialCheck, check_potential
from openmm_hvpcg.storage import PathLike, atomic_path
from openmm_hvpcg.training.models.total import TotalEnergy

logger = logging.getLogger(__name__)


def script_potential(module: TotalEnergy) -> torch.jit.ScriptModule:
    """The module as TorchScript, ready for :func:`openmm_hvpcg.potential.save_potential`."""
    return script_network(module)


def script_network(module: torch.nn.Module, where: object = None) -> torch.jit.ScriptModule:
    """Any energy module as TorchScript.

    Raises
    ------
    PotentialError
        TorchScript does not take it; a network of one's own may hold what it has no word for.
    """
    try:
        return torch.jit.script(module.eval())
    except Exception as error:  # torch raises of many kinds
        raise PotentialError(
            f"not scriptable ({_shorten(str(error))})",
            where=where,
            hint="type the arguments and buffers, in a file without `from __future__ import annotations`",
        ) from error


def _shorten(message: str) -> str:
    """What TorchScript says first, and the place it means: between them it may list every variant of an operation."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    place = next((i for i, line in enumerate(lines) if "<--- HERE" in line), 0)
    file = next((line for line in reversed(lines[:place]) if line.startswith('File "')), None)
    return lines[0] + (f" {file}: {lines[place - 1]}" if file else "")


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
