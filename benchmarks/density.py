"""How much the density of the frames tells of the mean force beside projected forces, and beside Hessian labels.

Add ``c phi(R)`` to the energy of a trained potential: which c is best? For c near zero each kind of label gives an
estimate, a mean over frames divided by a constant:

- forces: ``< grad phi . (F - q) > / < |grad phi|^2 >``;
- density: ``< grad phi . F + kT lap phi > / < |grad phi|^2 >``, by parts;
- density, forces along bonds: what ``training.density`` does (``openmm_hvpcg/training/density.py``);
- HVPs: ``< (grad grad phi) v . (t(v) - (grad grad U) v) > / < |(grad grad phi) v|^2 >``, each
  frame's own covariance in t.

How far each scatters is seen from its means over walkers, which know nothing of each other: what frames of one walker
share is in it. For combinations of forces and density the share of the latter and the variance, over that of forces
alone, where it is least, and with HVPs.

    python benchmarks/density.py FIT [LABELS ...] [--out benchmarks/results/density.json]

FIT is the folder of a finished training, LABELS are datasets of the molecules it is for; without any, those of
``protocols/unseen_peptides``. One minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.density import compute_density_labels
from openmm_hvpcg.training.derivatives import EnergyFunction, compute_forces_and_hvps
from openmm_hvpcg.training.fit import FitResult, load_fit
from openmm_hvpcg.training.losses import compute_density_excess, compute_hvp_target
from openmm_hvpcg.training.models.priors import dihedral_angle
from openmm_hvpcg.training.models.torsions import Bonded, bind_network
from openmm_hvpcg.training.models.total import TotalEnergy
from openmm_hvpcg.training.projection import LinkProjector
from openmm_hvpcg.units import compute_kt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "protocols" / "unseen_peptides"))
from peptides import LABELS, LabelledFrames, load_labels

DATA = Path(__file__).resolve().parents[1] / "data" / "unseen_peptides"
#: Peptides with at least so many beads: those with distances of beads four apart.
MIN_BEADS = 6
NARROW_NM = 0.03
#: Means over at least so many stretches of frames give the scatter.
MIN_PARTS = 16
SOURCES = ("forces", "density", "density_but_along_bonds", "hvps")
#: Estimates that are combined, forces first.
COMBINATIONS = {"density": [0, 1], "density_but_along_bonds": [0, 2], "hvps": [0, 3], "all": [0, 2, 3]}
Function = Callable[[Tensor], Tensor]


def list_functions(positions: Tensor, bonded: Bonded) -> Iterator[tuple[str, Function]]:
    """Functions (F,) of positions (F, B, 3): of every dihedral, bond and distance, by kind."""
    for row in bonded.torsions:
        for n in (1, 2, 3):
            yield f"cos {n} dihedral", lambda x, row=row, n=n: torch.cos(n * dihedral_angle(x, row[None])[:, 0])
            yield f"sin {n} dihedral", lambda x, row=row, n=n: torch.sin(n * dihedral_angle(x, row[None])[:, 0])
    n_beads = positions.shape[1]
    for apart in (1, 2, 3, 4):
        for i in range(n_beads - apart):
            r = (positions[:, i + apart] - positions[:, i]).norm(dim=-1)
            mean, spread = float(r.mean()), float(r.std())
            distance = lambda x, i=i, j=i + apart: (x[:, j] - x[:, i]).norm(dim=-1)  # noqa: E731
            if apart == 1:
                yield "bond, square", lambda x, d=distance, m=mean: (d(x) - m) ** 2
                continue
            for name, width in (("its spread", spread), (f"{NARROW_NM} nm", NARROW_NM)):
                yield (
                    f"distance of beads {apart} apart, bump of {name}",
                    lambda x, d=distance, m=mean, w=width: torch.exp(-0.5 * ((d(x) - m) / w) ** 2),
                )


def bind_potential(fit: FitResult, data: LabelledFrames) -> EnergyFunction:
    """Priors and network, in double, as a function of positions (F, B, 3) of a molecule."""
    priors = TotalEnergy(torch.nn.Identity(), replace(fit.spec, bead_map=data.bead_map)).double()
    species = torch.from_numpy(fit.spec.compute_species_index(data.bead_map))
    network = bind_network(fit.network.double(), species, Bonded.find(data.bead_map))
    return lambda x: network(x) + priors.prior_energies(x)


def estimate(data: LabelledFrames, fit: FitResult) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """For each function its estimates (4, W), see ``SOURCES``, by the frames of each walker."""
    x, q, v, p = (torch.from_numpy(a).double() for a in (data.positions, data.forces, data.probes, data.hvps))
    forces, hvps = compute_forces_and_hvps(bind_potential(fit, data), x, v)
    kt = compute_kt(data.temperature_K)
    missing = compute_hvp_target(p, q - forces, v, 1.0 / kt) - hvps
    bonds = torch.from_numpy(data.bead_map.bonds).long()
    projector = LinkProjector(x, bonds)
    labels = [compute_density_labels(x, forces, v, b, kt) for b in (bonds[:0], bonds)]
    walkers = list(split_walkers(data.walker))
    for name, function in list_functions(x, Bonded.find(data.bead_map)):
        slope, products = compute_forces_and_hvps(function, x, v)
        size, curvature = (slope**2).sum((1, 2)).mean(), (products**2).sum((-1, -2)).mean()
        along_bonds = slope - projector.remove(slope[:, None])[:, 0]
        density, others = (-compute_density_excess(slope, products, *part, 1.0 / kt) for part in labels)
        values = torch.stack(
            [
                -(slope * (forces - q)).sum((1, 2)) / size,
                density / size,
                (others - (along_bonds * (forces - q)).sum((1, 2))) / size,
                (products * missing).sum((-1, -2)).mean(1) / curvature,
            ]
        )
        yield name, np.stack([values[:, rows].mean(1).numpy() for rows in walkers], axis=1)


def split_walkers(walker: NDArray[np.int64]) -> Iterator[Tensor]:
    """Frames that are far apart in time from each other: those of each walker, in parts where walkers are few."""
    numbers = np.unique(walker)
    for k in numbers:
        for part in np.array_split(np.flatnonzero(walker == k), -(-MIN_PARTS // len(numbers))):
            yield torch.from_numpy(part)


def combine(covariance: NDArray[np.float64], which: list[int]) -> tuple[float, NDArray[np.float64]]:
    """Least variance of a combination of some estimates, and their shares: equal ones for those that are the same."""
    chosen = covariance[np.ix_(which, which)]
    inverse = np.linalg.inv(chosen + 1e-6 * np.diag(chosen.diagonal()))
    return 1.0 / inverse.sum(), inverse.sum(axis=1) / inverse.sum()


def read_arguments(description: str | None) -> tuple[FitResult, list[LabelledFrames], bool, Path | None]:
    """The training, the labels of its molecules, whether these were named by the user, and where results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fit", type=Path)
    parser.add_argument("labels", type=Path, nargs="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    datasets = [load_dataset(path) for path in arguments.labels]
    kept = [] if datasets else [d for d in load_labels(DATA / LABELS) if d.bead_map.n_beads >= MIN_BEADS]
    return load_fit(arguments.fit), datasets or kept, bool(datasets), arguments.out


def main() -> None:
    fit, datasets, named, out = read_arguments(__doc__)
    found = defaultdict(list)
    for data in datasets:
        for name, values in estimate(data, fit):
            found[name].append((np.cov(values) / values.shape[1], values.mean(axis=1)))
    rows = {}
    for name, estimates in found.items():
        covariance, means = (np.mean(part, axis=0) for part in zip(*estimates, strict=True))
        alone = covariance[0, 0]
        rows[name] = {
            "functions": len(estimates),
            **{f"error_{s}": float(f"{covariance[k, k] ** 0.5:.3g}") for k, s in enumerate(SOURCES)},
            **{f"mean_{s}": float(f"{means[k]:.3g}") for k, s in enumerate(SOURCES)},
        }
        for name_of, which in COMBINATIONS.items():
            least, shares = combine(covariance, which)
            rows[name][f"share_{name_of}"] = round(float(shares[1]), 2)
            rows[name][f"variance_{name_of}"] = round(float(least / alone), 3)
        print(name, *(f"{key} {value:g}" for key, value in rows[name].items()))
    if out:
        content = {
            "command": "python benchmarks/density.py FIT" + (" LABELS" if named else ""),
            "molecules": len(datasets) if named else "protocols/unseen_peptides",
            "units": "kJ/mol (bond: kJ/mol/nm^2); variances over that of forces alone",
            "rows": rows,
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
