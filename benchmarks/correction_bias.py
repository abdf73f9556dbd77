"""Bias of the HVP target against the model's force error: centred correction and, for contrast, the uncentred one.

A harmonic network of 8 atoms, 3 of them beads: the PMF's force and Hessian are known, and so is the ensemble of the
hidden atoms at fixed beads. Targets are averaged over points with exactly that ensemble's mean and covariance (the
targets are quadratic, so the averages are exact), which shows the bias far below the noise; the noise of one label
comes from samples. Usage: ``python benchmarks/correction_bias.py [--out benchmarks/results/correction_bias.json]``
(a plot of the same name goes beside it).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

from openmm_hvpcg.training.losses import compute_hvp_target
from openmm_hvpcg.units import compute_kt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Array = NDArray[np.float64]
N_ATOMS, BEADS = 8, [1, 4, 6]
KT = compute_kt(300.0)
SEED = 0


@dataclass(frozen=True)
class Labels:
    """Projected forces (T, B, 3) and HVPs (T, P, B, 3) at one bead configuration with probes (P, B, 3)."""

    forces: Array
    hvps: Array
    probes: Array

    def compute_targets(self, model_force: Array, centred: bool) -> Array:
        """Targets (T, P, B, 3) for a model's force (B, 3)."""
        if centred:
            arrays = (self.hvps, self.forces - model_force, np.broadcast_to(self.probes, self.hvps.shape))
            return compute_hvp_target(*(torch.from_numpy(np.array(a)) for a in arrays), 1 / KT).numpy()
        along = np.einsum("tbx,pbx->tp", self.forces, self.probes)
        model_along = np.einsum("bx,pbx->p", model_force, self.probes)
        raw = along[:, :, None, None] * self.forces[:, None]
        return self.hvps - (raw - model_along[:, None, None] * model_force) / KT


def build_stiffness(rng: np.random.Generator) -> Array:
    """Springs of rest length zero along a chain and across it, and to the origin: bonds of 500 to 5000 kJ/mol/nm^2."""
    stiffness = np.diag(rng.uniform(50, 200, N_ATOMS))
    for i, j in [(i, i + 1) for i in range(N_ATOMS - 1)] + [(0, 3), (2, 6), (1, 5)]:
        spring = np.zeros(N_ATOMS)
        spring[i], spring[j] = 1, -1
        stiffness += rng.uniform(500, 5000) * np.outer(spring, spring)
    return stiffness


def build_labels(n_samples: int) -> tuple[Labels, Labels, Array, Array]:
    """Labels at the exact points and at random samples; the PMF's force (B, 3) and HVPs (P, B, 3)."""
    rng = np.random.default_rng(SEED)
    stiffness = build_stiffness(rng)
    rest = np.setdiff1d(np.arange(N_ATOMS), BEADS)
    bead_block, hidden = stiffness[np.ix_(BEADS, BEADS)], stiffness[np.ix_(rest, rest)]
    coupling = stiffness[np.ix_(BEADS, rest)]
    schur = bead_block - coupling @ np.linalg.solve(hidden, coupling.T)
    beads = 0.1 * rng.standard_normal((len(BEADS), 3))
    mean = -np.linalg.solve(hidden, coupling.T @ beads)
    factor = np.linalg.cholesky(KT * np.linalg.inv(hidden))
    probes = rng.choice([-1.0, 1.0], (8, len(BEADS), 3))

    def label(offsets: Array) -> Labels:
        """The slice map: forces on the beads, and the beads' own block of the Hessian."""
        forces = -np.einsum("bc,cx->bx", bead_block, beads) - np.einsum("ba,tax->tbx", coupling, mean + offsets)
        hvps = np.broadcast_to(np.einsum("bc,pcx->pbx", bead_block, probes), (len(offsets), *probes.shape))
        return Labels(forces, hvps, probes)

    n = 3 * len(rest)
    unit = np.sqrt(n) * np.concatenate([np.eye(n), -np.eye(n)]).reshape(2 * n, len(rest), 3)
    exact, sampled = (
        label(np.einsum("ab,tbx->tax", factor, z)) for z in (unit, rng.standard_normal((n_samples, *unit.shape[1:])))
    )
    return exact, sampled, -schur @ beads, np.einsum("bc,pcx->pbx", schur, probes)


def compute_rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


def measure(n_samples: int) -> dict[str, object]:
    """Root mean squares per component of bias and noise against that of the force error; slopes of log against log."""
    exact, sampled, force, hvps = build_labels(n_samples)
    direction = np.random.default_rng(SEED + 1).standard_normal(force.shape)
    direction /= compute_rms(direction)
    rows = []
    for size in np.logspace(-2, 3, 16):
        model = force - size * direction
        row = {"force_error": float(size)}
        for name, centred in (("centred", True), ("uncentred", False)):
            row[f"{name}_bias"] = compute_rms(exact.compute_targets(model, centred).mean(0) - hvps)
            row[f"{name}_noise"] = compute_rms(sampled.compute_targets(model, centred).std(0))
        along = np.einsum("bx,pbx->p", size * direction, exact.probes)
        row["theory"] = compute_rms(along[:, None, None] * size * direction / KT)
        rows.append(row)
    logs = {k: np.log10([row[k] for row in rows]) for k in rows[0]}
    small = logs["force_error"] <= 0
    slopes = {
        n: float(np.polyfit(logs["force_error"][small], logs[f"{n}_bias"][small], 1)[0])
        for n in ("centred", "uncentred")
    }
    return {
        "hvp_rms": compute_rms(hvps),
        "force_rms": compute_rms(force),
        "force_noise_rms": compute_rms(sampled.forces.std(0)),
        "slopes_below_1_kj_mol_nm": slopes,
        "largest_departure_from_theory": max(abs(r["centred_bias"] / r["theory"] - 1) for r in rows),
        "rows": rows,
    }


def plot(result: dict, path: Path) -> None:
    """Bias of both forms, the noise of one label and the size of the HVPs, log-log."""
    x = [row["force_error"] for row in result["rows"]]
    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name, mark, text in (("uncentred", "s", "uncentred"), ("centred", "o", "centred (used)")):
        slope = result["slopes_below_1_kj_mol_nm"][name]
        (line,) = axes.loglog(
            x, [r[f"{name}_bias"] for r in result["rows"]], mark, ms=4, label=f"bias, {text}: slope {slope:.2f}"
        )
        noise = [r[f"{name}_noise"] for r in result["rows"]]
        axes.loglog(x, noise, "--", lw=1, color=line.get_color(), label=f"noise of one label, {text}")
    axes.loglog(x, [r["theory"] for r in result["rows"]], "k-", lw=0.8, label=r"$\beta\,e\,(e\cdot v)$", zorder=0)
    axes.axhline(result["hvp_rms"], color="grey", ls=":", label="PMF HVP")
    axes.set(xlabel="force error of the model, kJ/mol/nm", ylabel="rms per component, kJ/mol/nm$^2$")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--samples", type=int, default=20000)
    arguments = parser.parse_args()
    result = measure(arguments.samples)
    print(json.dumps(result, indent=1))
    if arguments.out:
        content = {
            "command": "python benchmarks/correction_bias.py",
            "date": date.today().isoformat(),
            "seed": SEED,
            "samples": arguments.samples,
            "units": "forces kJ/mol/nm, HVPs kJ/mol/nm^2, root mean squares per component",
        }
        arguments.out.write_text(json.dumps({**content, **result}, indent=1) + "\n")
        plot(result, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
