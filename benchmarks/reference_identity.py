"""The identity behind the PMF reference, on real molecules: CG Hessian-vector products against finite differences.

``v (grad grad W) v`` from ``<Q H Q^T> - beta Cov(Q f, Q f)`` at one configuration, and from mean forces at two
displaced ones, ``-v [<f>(R + h v) - <f>(R - h v)] / 2h``, each with its standard error. Are the errors honest? The
spread of mean forces between chains that differ in their seeds says how far they are. Usage:
``python benchmarks/reference_identity.py [--out benchmarks/results/reference_identity.json] [--scale 1]``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import InputSettings, ReferenceSettings, SamplingSettings
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, HeldSamples, Starts
from openmm_hvpcg.training.labels.probes import compute_soft_modes
from openmm_hvpcg.training.reference import PMFReference, average_samples, compute_reference
from openmm_hvpcg.units import compute_kt

TEMPERATURE = 300.0
BACKBONE = (
    "(resname ACE and name C) or (resname ALA and (name N or name CA or name CB or name C)) or (resname NME and name N)"
)
#: Name: sequence, beads, samples of each chain, MD steps between them.
MOLECULES = {"capped alanine, 6 beads": ("A", BACKBONE, 6000, 5), "capped AAGAA, C-alpha": ("AAGAA", "ca", 1500, 20)}
N_CONFIGURATIONS = 3
N_CHAINS = 4
N_BLOCKS = 10
HVP_EVERY = 2
EQUILIBRATION_STEPS = 1000
#: Displacement of the bead that moves most, nm: 2 % of a bond. Along soft directions a straight line strains bonds in
#: second order, so that longer steps would show.
STEP_NM = 0.0025


@dataclass(frozen=True)
class Case:
    """A molecule, its reference (for force map, step and start frames) and how its chains run."""

    system: AtomisticSystem
    frames: Frames
    bead_map: BeadMap
    reference: PMFReference
    n_samples: int
    stride: int

    def sample(
        self, starts: list[np.ndarray], probes: list[np.ndarray], seed: int, equilibrate: int
    ) -> list[HeldSamples]:
        reference = self.reference
        sampler = HeldSampler(
            self.system,
            self.bead_map,
            reference.attributes["platform"]["name"],
            reference.attributes["platform"]["properties"],
            reference.attributes["finite_difference"]["step_nm"],
            seed,
        )
        chains = Chains(self.n_samples, self.stride, HVP_EVERY, 2.0, 5.0, TEMPERATURE, equilibrate)
        parts = [
            Starts(np.array([k]), x[None], v[None], reference.force_map)
            for k, (x, v) in enumerate(zip(starts, probes, strict=True))
        ]
        return [samples for (samples,) in sampler.sample(parts, chains)]


def build_case(sequence: str, beads: str, n_samples: int, stride: int, folder: Path) -> Case:
    settings = InputSettings(sequence=sequence, hydrogen_mass_amu=3.0)
    system = build_atomistic_system(settings, temperature_K=TEMPERATURE, constraints="none", name=sequence)
    bead_map = build_bead_map(beads, system.topology)
    sampling = SamplingSettings(n_frames=200, stride=250, walkers=2, constraints="none", seed=11)
    frames = sample_frames(system, sampling, folder / "frames.zarr", progress=False).read()
    reference = compute_reference(
        system,
        frames,
        bead_map,
        ReferenceSettings(n_frames=N_CONFIGURATIONS, n_samples=100, probes=1),
        folder / "reference.zarr",
        progress=False,
    )
    return Case(system, frames, bead_map, reference, n_samples, stride)


def choose_directions(case: Case, k: int) -> dict[str, np.ndarray]:
    """Unit vectors (B, 3) that know nothing of the samples: elastic-network modes, and a random one."""
    _, modes = compute_soft_modes(case.reference.positions[k])
    drawn = np.random.default_rng([12, k]).standard_normal(len(modes))
    found = {"soft": modes[:, 0], "random": drawn / np.linalg.norm(drawn), "stiff": modes[:, -1]}
    return {name: v.reshape(-1, 3) for name, v in found.items()}


def project(samples: HeldSamples, v: np.ndarray) -> HeldSamples:
    """Along one direction alone, in the shape of one bead: errors of ``v H v`` then need no covariances."""
    forces = np.zeros((len(samples.forces), 1, 3))
    hvps = np.zeros((*samples.hvps.shape[:2], 1, 3))
    forces[:, 0, 0] = np.einsum("nbx,bx->n", samples.forces, v)
    hvps[:, :, 0, 0] = np.einsum("mpbx,bx->mp", samples.hvps, v)
    return HeldSamples(forces, hvps)


def average_forces(samples: HeldSamples) -> tuple[np.ndarray, np.ndarray]:
    """Mean (B, 3) and its standard error from blocks."""
    blocks = np.array([part.mean(axis=0) for part in np.array_split(samples.forces, N_BLOCKS)])
    return blocks.mean(axis=0), blocks.std(axis=0, ddof=1) / np.sqrt(N_BLOCKS)


def difference(forward: HeldSamples, backward: HeldSamples, h: float) -> tuple[np.ndarray, np.ndarray]:
    """``-(<f+> - <f->) / 2h`` (B, 3), and its standard error."""
    (f, ef), (b, eb) = average_forces(forward), average_forces(backward)
    return -(f - b) / (2 * h), np.hypot(ef, eb) / (2 * h)


def check_case(case: Case) -> list[dict[str, object]]:
    """One row for each configuration and direction."""
    frames = [case.frames.positions[i].astype(np.float64) for i in case.reference.frame.tolist()]
    directions = [choose_directions(case, k) for k in range(N_CONFIGURATIONS)]
    centres = case.sample(frames, [np.array(list(found.values())) for found in directions], 21, 0)
    none = np.empty((0, case.bead_map.n_beads, 3))
    jobs, moved = [], []
    for k, found in enumerate(directions):
        for p, (name, v) in enumerate(found.items()):
            h = STEP_NM / np.linalg.norm(v, axis=1).max()
            jobs.append((k, p, name, v, h))
            moved += [frames[k] + sign * h * case.reference.force_map.T @ v for sign in (1, -1)]
    ends = case.sample(moved, [none] * len(moved), 22, EQUILIBRATION_STEPS)
    rows = []
    for (k, p, name, v, h), forward, backward in zip(jobs, ends[::2], ends[1::2], strict=True):
        centre = HeldSamples(centres[k].forces, centres[k].hvps[:, p : p + 1])
        row = {"configuration": k, "direction": name, "step_nm": round(float(h), 5)}
        rows.append(row | compare(centre, forward, backward, v, h))
    return rows


def compare(
    centre: HeldSamples, forward: HeldSamples, backward: HeldSamples, v: np.ndarray, h: float
) -> dict[str, float]:
    """Both sides along v in kJ/mol/nm^2, and how they agree in all components."""
    beta = 1 / compute_kt(TEMPERATURE)
    along = project(centre, v)
    _, _, hvp, error = average_samples(along, np.array([[[1.0, 0.0, 0.0]]]), beta, N_BLOCKS)
    slope, slope_error = difference(project(forward, v), project(backward, v), h)
    _, _, hvps, hvp_errors = average_samples(centre, v[None], beta, N_BLOCKS)
    slopes, slope_errors = difference(forward, backward, h)
    z = (hvps[0] - slopes) / np.hypot(hvp_errors[0], slope_errors)
    figures = {
        "projected_hessian": along.hvps[:, 0, 0, 0].mean(),
        "hvp": hvp[0, 0, 0],
        "hvp_error": error[0, 0, 0],
        "difference": slope[0, 0],
        "difference_error": slope_error[0, 0],
        "z": (hvp[0, 0, 0] - slope[0, 0]) / np.hypot(error[0, 0, 0], slope_error[0, 0]),
        "mean_square_z_of_components": np.mean(z**2),
    }
    return {key: round(float(value), 2) for key, value in figures.items()}


def check_errors(case: Case) -> float:
    """Variance of the mean force between chains from one start over the squared error that each states; 1 is honest."""
    starts = [case.frames.positions[i].astype(np.float64) for i in case.reference.frame.tolist()] * N_CHAINS
    none = np.empty((0, case.bead_map.n_beads, 3))
    found = [average_forces(samples) for samples in case.sample(starts, [none] * len(starts), 23, 0)]
    means, errors = (np.array(values).reshape(N_CHAINS, -1) for values in zip(*found, strict=True))
    return round(float(means.var(axis=0, ddof=1).mean() / np.mean(errors**2)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of samples")
    arguments = parser.parse_args()
    results: dict[str, object] = {"command": "python benchmarks/reference_identity.py", "units": "kJ/mol/nm^2"}
    for name, (sequence, beads, n_samples, stride) in MOLECULES.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            case = build_case(sequence, beads, int(arguments.scale * n_samples), stride, Path(folder))
            rows, ratio = check_case(case), check_errors(case)
        z = np.array([row["z"] for row in rows], dtype=float)
        print(f"\n{name}: {case.n_samples} samples a chain, {time.perf_counter() - began:.0f} s")
        for row in rows:
            print(
                f"  {row['configuration']} {row['direction']:6} Q H Q {row['projected_hessian']:10.0f}"
                f"  HVP {row['hvp']:10.0f} +- {row['hvp_error']:6.0f}"
                f"  difference {row['difference']:10.0f} +- {row['difference_error']:6.0f}"
                f"  z {row['z']:5.2f}  components {row['mean_square_z_of_components']:.2f}"
            )
        print(f"  mean square z {np.mean(z**2):.2f} over {len(z)} directions; between chains / stated variance {ratio}")
        results[name] = {
            "samples": case.n_samples,
            "stride": case.stride,
            "mean_square_z": round(float(np.mean(z**2)), 2),
            "variance_between_chains_over_stated": ratio,
            "rows": rows,
        }
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
