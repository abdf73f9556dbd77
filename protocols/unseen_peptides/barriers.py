"""How well force labels tell which of two basins of a dihedral is the deeper: with frames in equilibrium and others.

    python protocols/unseen_peptides/barriers.py data/unseen_peptides/labels.zip runs/flat/labels.zip --out OUT.json

All C-alpha dihedrals of all peptides are taken together. The mean of the labels along the dihedral, in bins of it, is
added up from the helix to the strand, over the barrier between them and the other way round. The sum is the work of the
mean force along that way, and its error that of the means: the bins on barriers, where few frames are in equilibrium,
make most of it. Archives of the same labels by other frames have to agree within errors.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peptides import choose_part, load_labels

from openmm_hvpcg.storage import write_json
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.models.priors import dihedral_angle
from openmm_hvpcg.training.models.torsions import Bonded

#: From where to where, degrees: helix and strand of C-alphas, by 120 and by -60 degrees.
WAYS = {"helix to strand by 120": (50, 195), "strand to helix by -60": (-165, 50)}
BIN = 14.5
PARTS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, nargs="+", help="archives of labels")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for path in options.labels:
        datasets = load_labels(path)
        for n_parts in PARTS:
            angles, forces = collect([choose_part(d, n_parts, 0) for d in datasets])
            name = f"{path}, {max(d.n_frames for d in datasets) // n_parts} frames a peptide"
            found[name] = {way: add_up(angles, forces, *ends) for way, ends in WAYS.items()}
            for way, figures in found[name].items():
                logging.info(
                    "%s, %s: %.2f ± %.2f kJ/mol, %d frames in the emptiest bin",
                    *(name, way, figures["difference"], figures["error"], figures["fewest"]),
                )
    if options.out:
        command = "python protocols/unseen_peptides/barriers.py LABELS ... --out OUT"
        write_json(options.out, {"command": command, "unit": "kJ/mol", "labels": found})


def collect(datasets: list[LabelledFrames]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Every dihedral of every frame, degrees, and the label along it, kJ/mol/rad."""
    angles, along = [], []
    for data in datasets:
        positions = torch.from_numpy(data.positions).double()
        for index in Bonded.find(data.bead_map).torsions:
            angles.append(dihedral_angle(positions, index[None])[:, 0].numpy())
            slope = -compute_forces(lambda x, i=index[None]: dihedral_angle(x, i)[:, 0], positions).numpy()
            along.append((data.forces * slope).sum((1, 2)) / (slope**2).sum((1, 2)))
    return np.degrees(np.concatenate(angles)), np.concatenate(along)


def add_up(angles: NDArray[np.float64], forces: NDArray[np.float64], start: float, end: float) -> dict[str, float]:
    """Minus the integral of the mean of ``forces`` from ``start`` to ``end``, degrees; its error; frames of a bin."""
    n_bins = max(1, round((end - start) / BIN))
    place = (angles - start) % 360 / (end - start) * n_bins
    inside = place < n_bins
    bins = place[inside].astype(np.int64)
    counts = np.bincount(bins, minlength=n_bins)
    if counts.min() < 2:
        raise SystemExit(f"no two frames in a bin of {BIN} degrees between {start} and {end}: more frames are needed")
    mean, square = (np.bincount(bins, forces[inside] ** k, minlength=n_bins) / counts for k in (1, 2))
    width = np.radians((end - start) / n_bins)
    error = width * np.sqrt(((square - mean**2) / (counts - 1)).sum())
    return {"difference": float(-width * mean.sum()), "error": float(error), "fewest": int(counts.min())}


if __name__ == "__main__":
    main()
