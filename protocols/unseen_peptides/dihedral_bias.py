"""What force labels say of a model along phi and psi of all residues and peptides at once; for backbone beads.

    python protocols/unseen_peptides/dihedral_bias.py LABELS.zip OUT/models/fm-800-1/fit OUT/models/hvp-800-1/fit

To the model's energy the sum of cos phi (sin phi, cos psi, sin psi) over all residues is added: the coefficient with
the least square of force residuals, kJ/mol, is shown, with its error over walkers. A model that has learnt all that
forces tell has none on the frames it was trained on; the error says how well forces know.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judging import bind_model, find_residuals, find_torsions
from numpy.typing import NDArray
from peptides import load_labels
from torch import Tensor

from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.fit import FitResult, load_fit
from openmm_hvpcg.training.models.priors import dihedral_angle

#: The beads of each dihedral, which may be listed from either end.
KINDS = {"phi": ("C", "N", "CA", "C"), "psi": ("N", "CA", "C", "N")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("fits", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    datasets = load_labels(options.labels)
    found = {}
    for folder in options.fits:
        found[folder.parent.name] = find_biases(load_fit(folder), datasets)
        for name, (value, error) in found[folder.parent.name].items():
            logging.info("%s: %s %+.2f ± %.2f kJ/mol", folder.parent.name, name, value, error)
    if options.out:
        command = "python protocols/unseen_peptides/dihedral_bias.py LABELS FIT ... --out OUT"
        write_json(options.out, {"command": command, "labels": options.labels.name, "coefficients": found})


def find_biases(fit: FitResult, datasets: list[LabelledFrames]) -> dict[str, tuple[float, float]]:
    """Coefficient and its error of every function, over all peptides."""
    torch.set_num_threads(1)
    products: dict[str, list[NDArray[np.float64]]] = {}
    for data in datasets:
        positions = torch.from_numpy(data.positions).double()
        residuals = find_residuals(bind_model(fit.network, fit.spec, data.bead_map).frame_energies, data)
        for name, function in list_functions(data.bead_map):
            forces = compute_forces(function, positions).numpy()
            both = np.stack([(forces * residuals).sum((1, 2)), (forces**2).sum((1, 2))])
            parts = [both[:, data.walker == w].sum(axis=1) for w in np.unique(data.walker)]
            products.setdefault(name, []).extend(parts)
    return {name: solve(np.stack(parts)) for name, parts in products.items()}


def list_functions(bead_map: BeadMap) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Sums over the dihedrals of each kind, (F,) of positions (F, B, 3)."""
    for kind, beads in KINDS.items():
        index = find_torsions(bead_map, beads)
        if len(index) == 0:
            raise SystemExit(f"dihedral_bias.py is for backbone beads, and there is no {kind} among {bead_map.names}")
        for name, wave in (("cos", torch.cos), ("sin", torch.sin)):
            yield f"{name} {kind}", bind(wave, index)


def bind(wave: Callable[[Tensor], Tensor], index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda positions: wave(dihedral_angle(positions, index)).sum(dim=1)


def solve(parts: NDArray[Any]) -> tuple[float, float]:
    """Coefficient from numerators and denominators (W, 2) of walkers, and its error."""
    numerators, denominators = parts.T
    value = numerators.sum() / denominators.sum()
    error = np.sqrt(np.square(numerators - value * denominators).sum()) / denominators.sum()
    return float(value), float(error)


if __name__ == "__main__":
    main()
