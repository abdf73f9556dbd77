"""Networks by the name that ``model.kind`` gives them: the package's own, and anybody's ``torch.nn.Module``.

A network of one's own is named by where it can be imported, ``package.module:Name``: a class or a function that is
called as ``Name(n_species, settings, **options)`` with the :class:`~openmm_hvpcg.config.ModelSettings` of the arm and
what ``model.options`` holds. It returns a module whose ``forward(positions, species)`` takes frames (F, B, 3) nm of one
molecule with species indices (B,) and gives energies (F,) in units of kT at the training temperature. The name is all
that a training records, so its folder can be read wherever the name can be imported; an exported potential needs
nothing but itself. What the module has to satisfy, :func:`~openmm_hvpcg.training.models.check.check_model` tests.

A module that also takes species (F, B), those of each frame, as the package's own networks do, is trained on batches
that mix molecules of as many beads. Any other is trained on batches of one molecule each, and each step then leans
towards its molecule. :func:`~openmm_hvpcg.training.models.check.takes_many_molecules` finds out which it is.
"""

# TorchScript reads the annotations of buffers: they must be types, not the strings that
# `from __future__ import annotations` would make of them.

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.errors import ConfigError
from openmm_hvpcg.storage import hash_file
from openmm_hvpcg.training.models.painn import PaiNN
from openmm_hvpcg.training.models.schnet import SchNet
from openmm_hvpcg.training.models.torsions import add_torsions, split_network

#: The package's own networks by their ``kind``.
BUILDERS: dict[str, Callable[[int, ModelSettings, float], nn.Module]] = {"schnet": SchNet, "painn": PaiNN}


class ScaledNetwork(nn.Module):
    """A network of someone's own with its energy, in units of ``energy_scale`` kJ/mol, turned into kJ/mol."""

    energy_scale: Tensor

    def __init__(self, network: nn.Module, energy_scale: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))

    def forward(self, positions: Tensor, species: Tensor) -> Tensor:
        """Energies (F,) kJ/mol of frames (F, B, 3) nm with species (B,), or (F, B) where the network takes them."""
        energies: Tensor = self.network(positions, species)
        return self.energy_scale * energies


def build_network(n_species: int, settings: ModelSettings, energy_scale: float = 1.0) -> nn.Module:
    """The network that ``settings.kind`` names, new, with one of the dihedrals beside it if ``settings.torsions``.

    Parameters
    ----------
    n_species : species indices go from 0 to this, without it
    settings : of the network
    energy_scale : kJ/mol, the size of its energies

    Raises
    ------
    ConfigError
        A network of one's own cannot be imported or built, or is no ``torch.nn.Module``.
    """
    return add_torsions(build_base(n_species, settings, energy_scale), n_species, settings, energy_scale)


def build_base(n_species: int, settings: ModelSettings, energy_scale: float = 1.0) -> nn.Module:
    """The network that ``settings.kind`` names alone; see :func:`build_network`."""
    if not settings.is_foreign:
        return BUILDERS[settings.kind](n_species, settings, energy_scale)
    builder = import_builder(settings.kind)
    try:
        network = builder(n_species, settings, **(settings.options or {}))
    except Exception as error:  # anything that code which is not ours may raise
        raise ConfigError(
            f"model.kind: {settings.kind} cannot be built ({type(error).__name__}: {error})",
            hint="it is called with the number of species, the ModelSettings, and model.options by name",
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"model.kind: {settings.kind} gives no network", expected="a torch.nn.Module", got=type(network).__name__
        )
    return ScaledNetwork(network, energy_scale)


def import_builder(kind: str) -> Callable[..., Any]:
    """What ``package.module:Name`` names, to be called.

    Raises
    ------
    ConfigError
        There is no such module or name, importing it fails, or it cannot be called.
    """
    module_name, _, name = kind.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        raise ConfigError(
            f"model.kind: module {module_name} "
            + ("is not found" if missing else f"cannot be imported ({type(error).__name__}: {error})"),
            hint="install its package, or add the folder it lies in to the environment variable PYTHONPATH"
            if missing
            else None,
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            raise ConfigError(
                f"model.kind: {module_name} has no {name}", hint=f"did you mean {close[0]}?" if close else None
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise ConfigError(
            f"model.kind: {kind} cannot build networks",
            expected="a class or a function that returns a torch.nn.Module",
            got=f"an instance of {type(found).__name__}",
        )
    return found


def describe_source(settings: ModelSettings) -> dict[str, str]:
    """Where the code of a network of one's own lies and its hash, for provenance; empty for the package's own."""
    if not settings.is_foreign:
        return {}
    try:
        path = inspect.getsourcefile(import_builder(settings.kind))
    except TypeError:  # compiled code
        path = None
    return {} if path is None else {"network_source": path, "network_sha256": hash_file(path)}


def scale_energy(network: nn.Module, factor: float) -> None:
    """Multiply the network's energy by ``factor``, in place."""
    for part in split_network(network):
        if part is not None:
            part.energy_scale.mul_(factor)  # type: ignore[operator]
