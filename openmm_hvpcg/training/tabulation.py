"""Is a network as good with its filters as splines? How many intervals they need, and how far off they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openmm_hvpcg.errors import PotentialError
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.models.schnet import SchNet
from openmm_hvpcg.training.models.tabulated import TabulatedSchNet, build_filters
from openmm_hvpcg.units import compute_kt

#: Root mean square of an error over that of what it is an error of.
TABLE_TOLERANCE = 1e-5
#: Intervals in a nanometre that are tried, coarsest first. The error of the spline falls with the sixth power, that of
#: its slope from coefficients in float32 grows.
RESOLUTIONS = (160, 224, 320, 448, 640, 896)
#: Of the pair list: a bead moves half of it in some tens of steps.
SKIN_NM = 0.1
GRID_POINTS = 4001
MAX_FRAMES = 10
#: Of the filters' slopes by central differences of fourth order: their error is 1e-9 where filters vary over 0.02 nm.
STEP_NM = 2e-4


@dataclass(frozen=True)
class Table:
    """A network with its filters as splines.

    Attributes
    ----------
    network : the module that is exported
    per_nm : intervals of the splines in a nanometre
    errors : root mean square errors by what they are of, relative to its root mean square, in float64
    """

    network: TabulatedSchNet
    per_nm: int
    errors: dict[str, float]


def tabulate_network(network: torch.nn.Module, spec: PotentialSpec, positions: NDArray[Any]) -> Table:
    """The network with its filters as splines, as coarse as keeps the errors within ``TABLE_TOLERANCE``.

    Errors are measured in float64, on a grid of distances for the filters and their slopes, and for energies and forces
    on frames of the molecule of ``spec``.

    Parameters
    ----------
    network : energies (F,) from positions (F, B, 3) and species (B,)
    positions : (T, B, 3) nm

    Raises
    ------
    PotentialError
        It is no network of this kind, or no spline is good enough.
    """
    if type(network) is not SchNet:
        raise PotentialError(
            "only the filters of a schnet can be tabulated",
            expected="a network of kind schnet",
            got=type(network).__name__,
        )
    frames = torch.from_numpy(np.asarray(positions, dtype=np.float64))
    frames = frames[np.linspace(0, len(frames) - 1, min(MAX_FRAMES, len(frames))).astype(int)]
    species = torch.from_numpy(spec.compute_species_index())
    exact = copy.deepcopy(network).cpu().double().eval()
    energies = exact(frames, species).detach()
    forces = compute_forces(lambda x: exact(x, species), frames)
    errors: dict[str, float] = {}
    for per_nm in RESOLUTIONS:
        table = TabulatedSchNet(copy.deepcopy(network).cpu().float(), per_nm, SKIN_NM).eval()
        double = copy.deepcopy(table).double()
        errors = _measure_filters(network, double)
        if max(errors.values()) <= TABLE_TOLERANCE:
            with torch.no_grad():
                found, gradient = double(frames.reshape(-1, 3), species)
            errors["energies"] = _compare(found - energies, energies - energies.mean(), compute_kt(spec.temperature_K))
            errors["forces"] = _compare(gradient.view(frames.shape) + forces, forces)
            if max(errors.values()) <= TABLE_TOLERANCE:
                return Table(table, per_nm, errors)
    worst = max(errors, key=lambda name: errors[name])
    raise PotentialError(
        f"filters as splines of {RESOLUTIONS[-1]} intervals a nm change the {worst} by {errors[worst]:.2g} of it",
        expected=f"at most {TABLE_TOLERANCE:g}",
        hint="fewer radial functions make filters that vary less",
    )


def _measure_filters(network: SchNet, table: TabulatedSchNet) -> dict[str, float]:
    """Errors of the filters and of their slopes over all distances up to the cutoff."""
    compute = build_filters(network)
    # Beyond the cutoff filters are zero; differences across it would not be slopes.
    r = np.linspace(0.0, network.cutoff_nm - 3 * STEP_NM, GRID_POINTS)
    near, far = (compute(r + k * STEP_NM) - compute(r - k * STEP_NM) for k in (1, 2))
    slopes = torch.from_numpy((8 * near - far) / (12 * STEP_NM))
    values = torch.from_numpy(compute(r))
    with torch.no_grad():
        found, found_slopes = table.table(torch.from_numpy(r))
    return {"filters": _compare(found - values, values), "slopes": _compare(found_slopes - slopes, slopes)}


def _compare(error: torch.Tensor, exact: torch.Tensor, least: float = 0.0) -> float:
    """Root mean square of an error over that of the exact values, or over ``least`` where that is more."""
    size = max(float(exact.square().mean().sqrt()), least)
    deviation = float(error.square().mean().sqrt())
    return deviation / size if deviation > 0 else 0.0
