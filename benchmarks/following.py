"""How far the covariance of forces follows the projected Hessian, by direction.

What the HVP target takes away, ``beta Cov(Q f)``, is larger where ``Q H Q`` is: by how much of it? The slope is taken
along what of the Hessian the beads tell, its mean over many small regions of other frames (an instrumental variable),
and for comparison along all of its spread, which frames whose hidden atoms happen to be stiff take part in. A slope of
1: what the Hessian varies by is all taken away again, and no curvature of the PMF. ``proportional`` are slopes against
what `training.covariance: ratio` expects with a share of one; see ``openmm_hvpcg/training/hessian_ratio.py``.

    python benchmarks/following.py FIT [LABELS ...] [--out benchmarks/results/following.json]

FIT is the folder of a finished training, LABELS are datasets of the molecules it is for; without any, those of
``protocols/unseen_peptides``. Errors are from stretches of the frames. One minute.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from density import FitResult, LabelledFrames, bind_potential, read_arguments
from torch import Tensor

from openmm_hvpcg.prior_terms import build_prior_geometry
from openmm_hvpcg.training.covariance import PooledCovariance
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.hessian_ratio import HessianRatio
from openmm_hvpcg.training.models.priors import dihedral_angle
from openmm_hvpcg.units import compute_kt

N_STRETCHES = 16
REGIONS, SEED = 4, 1


def list_directions(positions: Tensor, data: LabelledFrames) -> Iterator[tuple[str, Tensor]]:
    """Unit vectors (F, B, 3) along bonds, angles and dihedrals of the bonded beads, by kind."""
    x = positions.clone().requires_grad_(True)
    geometry = build_prior_geometry(data.bead_map.bonds, data.bead_map.n_beads)
    values = [("bond", (x[:, j] - x[:, i]).norm(dim=-1)) for i, j in geometry.bonds.tolist()]
    for i, j, k in geometry.angles.tolist():
        a, b = x[:, i] - x[:, j], x[:, k] - x[:, j]
        values.append(("angle", torch.acos((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1))))
    for row in torch.from_numpy(geometry.dihedrals):
        values.append(("dihedral", dihedral_angle(x, row[None])[:, 0]))
    for kind, value in values:
        (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        yield kind, gradient / gradient.flatten(1).norm(dim=1)[:, None, None]


def estimate(data: LabelledFrames, fit: FitResult) -> Iterator[tuple[str, np.ndarray]]:
    """Rows (stretches, 6) of products of a molecule, by kind of direction: see :func:`main`."""
    positions = torch.from_numpy(np.asarray(data.positions)).double()
    probes, hvps = (torch.from_numpy(np.asarray(a)).double() for a in (data.probes, data.hvps))
    energy = bind_potential(fit, data)
    forces = torch.cat([compute_forces(energy, x).detach() for x in positions.split(500)])
    beta = 1.0 / compute_kt(data.temperature_K)
    pooled = PooledCovariance(positions, REGIONS, SEED)
    left = pooled.fit(positions, torch.from_numpy(np.asarray(data.forces)).double() - forces)
    ratio = HessianRatio.build(pooled, positions, probes, hvps, SEED)
    v, off, told = (a.double() for a in (ratio.probes, ratio.deviations, ratio.told))
    excess = beta * ratio.compute_excess(pooled, positions, left)
    matrices = beta * ratio.compute_matrices(pooled)
    expected, told_of_it = (pooled.multiply(positions, matrices, a) for a in (off, told))

    def sum_up(*columns: Tensor) -> np.ndarray:
        """Products of the third column with the first two, of the first with itself and the third."""
        x, z, y, e, ze = columns
        found = [z * x, z * y, x * x, x * y, ze * e, ze * y]
        parts = np.array_split(np.arange(len(x)), N_STRETCHES)
        return np.stack([[float(f[part].sum()) for f in found] for part in parts])

    columns = (off, told, excess, expected, told_of_it)
    yield "all", sum_up(*(a.flatten(1) for a in columns))
    for kind, direction in list_directions(positions, data):
        u = pooled.turn(positions, direction[:, None])
        along = (v * u).sum(-1)
        yield kind, sum_up(*(((a * u).sum(-1) * along).mean(1) for a in columns))


def find_slope(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float]:
    """A slope and its standard error over stretches."""
    slope = top.sum() / bottom.sum()
    return float(slope), float(np.sqrt(np.sum((top - slope * bottom) ** 2)) / abs(bottom.sum()))


def main() -> None:
    fit, datasets, named, out = read_arguments(__doc__)
    found = defaultdict(list)
    for data in datasets:
        for kind, rows in estimate(data, fit):
            found[kind].append(rows)
    slopes = {}
    for kind, parts in found.items():
        zx, zy, xx, xy, ze, zy_of_it = np.concatenate(parts).T
        slopes[kind] = {
            "slope": find_slope(zy, zx),
            "slope_along_all_of_the_spread": find_slope(xy, xx),
            "proportional": find_slope(zy_of_it, ze),
        }
        print(kind, *(f"{name} {value:.2f} +- {error:.2f}" for name, (value, error) in slopes[kind].items()))
    if out:
        content = json.loads(out.read_text()) if out.exists() else {}
        content |= {
            "command": "python benchmarks/following.py FIT [LABELS], once for each",
            "what": "slope of beta Cov(Q f) against Q H Q and its standard error, by direction",
            ", ".join(d.name for d in datasets) if named else "protocols/unseen_peptides": {
                kind: {name: [round(v, 3) for v in pair] for name, pair in rows.items()}
                for kind, rows in slopes.items()
            },
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
