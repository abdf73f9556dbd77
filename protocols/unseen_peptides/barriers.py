"""How well force labels tell which of two basins of a dihedral is the deeper, and what models make of it.

    python protocols/unseen_peptides/barriers.py data/unseen_peptides/labels.zip runs/flat/labels.zip --out OUT.json
    python protocols/unseen_peptides/barriers.py runs/bb/labels.zip --fit runs/bb/study/models/fm-800-1/fit

The dihedrals of all peptides are taken together: those of C-alphas, or psi where there are backbone beads. The mean of
the labels along the dihedral, in bins of it, is added up from the helix to the strand, over the barrier between them
and the other way round. The sum is the work of the mean force along that way, and its error that of the means: the bins
on barriers, where few frames are in equilibrium, make most of it. Archives of the same labels by other frames have to
agree within errors.

With --fit it is the work of what the model leaves of the labels, which should be added to its energy: for all frames,
and for those where of the other dihedrals of the peptide few, some or all are in the helix.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dihedral_bias import KINDS
from judging import bind_model, find_residuals, find_torsions
from numpy.typing import NDArray
from peptides import choose_part, load_labels

from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.fit import FitResult, load_fit
from openmm_hvpcg.training.models.priors import dihedral_angle
from openmm_hvpcg.training.models.torsions import Bonded

#: From where to where, degrees: helix and strand, over the barrier between them and the other way round.
CALPHA = {"helix to strand": (50.0, 195.0), "strand to helix": (-165.0, 50.0)}
PSI = {"helix to strand": (-30.0, 145.0), "strand to helix": (145.0, 330.0)}
#: A dihedral this near to where the ways begin is in the helix.
HELIX_DEGREES = 50.0
#: Of the other dihedrals of the peptide, what share is in the helix.
CONTEXTS = {"few others helical": (-0.1, 0.34), "some": (0.34, 0.67), "most": (0.67, 0.99), "all": (0.99, 1.1)}
BIN = 14.5
PARTS = (1, 2, 4)


@dataclass(frozen=True)
class Samples:
    """Every dihedral of every frame (n,).

    Attributes
    ----------
    angles : degrees
    along : the label along the dihedral, or what a model leaves of it, kJ/mol/rad
    helical : share of the other dihedrals of the frame that are in the helix
    """

    angles: NDArray[np.float64]
    along: NDArray[np.float64]
    helical: NDArray[np.float64]

    def select(self, low: float, high: float) -> Samples:
        rows = (self.helical > low) & (self.helical <= high)
        return Samples(self.angles[rows], self.along[rows], self.helical[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, nargs="+", help="archives of labels")
    parser.add_argument("--fit", type=Path, help="folder of a finished training")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    fit = load_fit(options.fit) if options.fit else None
    found: dict[str, Any] = {}
    for path in options.labels:
        datasets = load_labels(path)
        for n_parts in PARTS if fit is None else PARTS[:1]:
            samples = collect([choose_part(d, n_parts, 0) for d in datasets], fit)
            name = f"{path}, {max(d.n_frames for d in datasets) // n_parts} frames a peptide"
            ways = choose_ways(datasets[0].bead_map)
            found[name] = {way: add_up(samples, *ends) for way, ends in ways.items()}
            if fit is not None:
                way, ends = next(iter(ways.items()))
                found[name] |= {f"{way}, {c}": add_up(samples.select(*r), *ends) for c, r in CONTEXTS.items()}
    for name, ways in found.items():
        for way, figures in ways.items():
            logging.info(
                "%s, %s: %.2f ± %.2f kJ/mol, %d frames in the emptiest bin",
                *(name, way, figures["difference"], figures["error"], figures["fewest"]),
            )
    if options.out:
        command = f"python protocols/unseen_peptides/barriers.py LABELS ...{' --fit FIT' if fit else ''} --out OUT"
        write_json(options.out, {"command": command, "unit": "kJ/mol", "labels": found})


def find_psi(bead_map: BeadMap) -> bool:
    """Whether there are backbone beads."""
    return set(KINDS["psi"]) <= set(bead_map.names)


def choose_ways(bead_map: BeadMap) -> dict[str, tuple[float, float]]:
    return PSI if find_psi(bead_map) else CALPHA


def choose_dihedrals(bead_map: BeadMap) -> torch.Tensor:
    """Rows (D, 4) of beads: all, or psi alone."""
    return find_torsions(bead_map, KINDS["psi"]) if find_psi(bead_map) else Bonded.find(bead_map).torsions


def collect(datasets: list[LabelledFrames], fit: FitResult | None = None) -> Samples:
    found: list[NDArray[np.float64]] = []
    for data in datasets:
        positions = torch.from_numpy(data.positions).double()
        left = data.forces
        if fit is not None:
            left = find_residuals(bind_model(fit.network, fit.spec, data.bead_map).frame_energies, data)
        dihedrals = choose_dihedrals(data.bead_map)
        angles = np.degrees(dihedral_angle(positions, dihedrals).numpy())
        centre = choose_ways(data.bead_map)["helix to strand"][0]
        in_helix = np.abs((angles - centre + 180) % 360 - 180) < HELIX_DEGREES
        for k, index in enumerate(dihedrals):
            slope = -compute_forces(lambda x, i=index[None]: dihedral_angle(x, i)[:, 0], positions).numpy()
            others = (in_helix.sum(axis=1) - in_helix[:, k]) / max(1, len(dihedrals) - 1)
            found.append(np.stack([angles[:, k], (left * slope).sum((1, 2)) / (slope**2).sum((1, 2)), others]))
    return Samples(*np.concatenate(found, axis=1))


def add_up(samples: Samples, start: float, end: float) -> dict[str, float]:
    """Minus the integral of the mean from ``start`` to ``end``, degrees; its error; frames in the emptiest bin."""
    n_bins = max(1, round((end - start) / BIN))
    place = (samples.angles - start) % 360 / (end - start) * n_bins
    inside = place < n_bins
    bins = place[inside].astype(np.int64)
    counts = np.bincount(bins, minlength=n_bins)
    if counts.min() < 2:
        raise SystemExit(f"no two frames in a bin of {BIN} degrees between {start} and {end}: more frames are needed")
    mean, square = (np.bincount(bins, samples.along[inside] ** k, minlength=n_bins) / counts for k in (1, 2))
    width = np.radians((end - start) / n_bins)
    error = width * np.sqrt(((square - mean**2) / (counts - 1)).sum())
    return {"difference": float(-width * mean.sum()), "error": float(error), "fewest": int(counts.min())}


if __name__ == "__main__":
    main()
