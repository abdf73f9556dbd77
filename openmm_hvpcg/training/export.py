"""From a trained arm to a potential file; the only TorchScript compilation of the package."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from openmm_hvpcg.errors import InputError, PotentialError
from openmm_hvpcg.potential import PotentialSpec, save_potential
from openmm_hvpcg.simulation.check import CheckItem, PotentialCheck, check_potential
from openmm_hvpcg.storage import PathLike, atomic_path
from openmm_hvpcg.training.models.torsions import split_network
from openmm_hvpcg.training.models.total import TotalEnergy, TotalEnergyAndForces
from openmm_hvpcg.training.tabulation import TABLE_TOLERANCE, Table, tabulate_network

logger = logging.getLogger(__name__)

TABULATE = ("auto", "on", "off")


def script_potential(module: TotalEnergy) -> torch.jit.ScriptModule:
    """The module as TorchScript, ready for :func:`openmm_hvpcg.potential.save_potential`."""
    return script_network(module)


def script_network(module: torch.nn.Module, where: object = None) -> torch.jit.ScriptModule:
    """Any energy module as TorchScript, its weights fixed: forces come cheaper.

    Raises
    ------
    PotentialError
        TorchScript does not take it; a network of one's own may hold what it has no word for.
    """
    try:
        return torch.jit.script(copy.deepcopy(module).eval().requires_grad_(False))
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
    network: torch.nn.Module, spec: PotentialSpec, path: PathLike, positions: NDArray[Any], tabulate: str = "auto"
) -> PotentialCheck:
    """Script priors + network, check the result on ``positions``, and write it to ``path``.

    Parameters
    ----------
    network : energies (F,) from positions (F, B, 3) and species (B,)
    spec : priors, species and provenance; its bead map is the molecule the file is bound to
    path : the potential file
    positions : (T, B, 3) nm, frames of that molecule to check on
    tabulate : ``auto`` writes the filters of a network that has such as splines, with forces that need no automatic
        differentiation, where the error allows it (:func:`~openmm_hvpcg.training.tabulation.tabulate_network`); ``on``
        insists on it; ``off`` writes the network as it is

    Returns
    -------
    PotentialCheck, all passed

    Raises
    ------
    PotentialError
        A check failed, or there is no table where one was asked for; nothing is written.
    """
    module = TotalEnergy(network, spec).eval()
    base, torsions = split_network(network)
    table = _find_table(base, spec, path, positions, tabulate)
    scripted = module if table is None else TotalEnergyAndForces(table.network, spec, torsions)
    script = script_network(scripted)
    with atomic_path(path) as temporary:
        save_potential(temporary, script, spec)
        check = check_potential(temporary, positions, eager=module)
        if table is not None:
            check = PotentialCheck((*check.items, *_list_errors(table)))
        check.raise_if_failed(where=Path(path))
    logger.info("%s: exported, %d checks passed", path, len(check.items))
    return check


def _find_table(
    network: torch.nn.Module, spec: PotentialSpec, path: PathLike, positions: NDArray[Any], tabulate: str
) -> Table | None:
    """The network with its filters as splines, or None where that is not wanted or not exact enough."""
    if tabulate not in TABULATE:
        raise InputError("no such choice of tabulate", expected=", ".join(TABULATE), got=repr(tabulate))
    if tabulate == "off":
        return None
    try:
        table = tabulate_network(network, spec, positions)
    except PotentialError as error:
        if tabulate == "on":
            raise
        logger.warning("%s: exported without tables: %s", path, error)
        return None
    logger.info(
        "%s: filters tabulated, %d intervals a nm; errors of %s",
        path,
        table.per_nm,
        ", ".join(f"{name} {error:.1e}" for name, error in table.errors.items()),
    )
    return table


def _list_errors(table: Table) -> list[CheckItem]:
    """The errors of a table as checks of a potential."""
    return [
        CheckItem(f"tables: {name}", error, TABLE_TOLERANCE, "root mean square error of the splines, in float64")
        for name, error in table.errors.items()
    ]
