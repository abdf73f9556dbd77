"""How much a Hessian label says beside a force label, direction by direction.

With its beads held, a molecule's projected force along a unit direction u scatters by s_f, and the HVP target ``u H u -
beta (u . d)^2`` by s_t; s_p is what of it is left where the covariance is known. A force tells the PMF's slope, a HVP
its curvature: over a length L of the PMF the two weigh alike where ``s_t L = s_f``. So HVP labels tell more than force
labels of what is shorter than the resolution ``s_f / s_t``, and next to nothing of what is much longer: one is worth
``(s_f / s_t / L)^2`` force labels. Averaging over samples at fixed beads changes neither ratio. L can be read off the
PMF: the rms of its slope over that of its curvature.

How well is the covariance known that is pooled over frames alike (`training.covariance: pooled`), or that also follows
the Hessian (`ratio`)? Its error, against the covariance at the held beads, has to be small beside the PMF's curvature.
Usage: ``python benchmarks/information.py [--out benchmarks/results/information.json]``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from reference_identity import BACKBONE, TEMPERATURE

from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings, ReferenceSettings, SamplingSettings
from openmm_hvpcg.mapping import build_bead_map
from openmm_hvpcg.training.covariance import PooledCovariance
from openmm_hvpcg.training.hessian_ratio import HessianRatio, find_share
from openmm_hvpcg.training.labels.held import Chains, HeldSampler, HeldSamples, Starts
from openmm_hvpcg.training.labels.hvp import compute_projected_hvps
from openmm_hvpcg.training.labels.oracle import ForceOracle
from openmm_hvpcg.training.labels.probes import compute_soft_modes, draw_probes
from openmm_hvpcg.training.reference import compute_reference
from openmm_hvpcg.units import compute_kt

#: Name: sequence, beads.
MOLECULES = {"capped alanine, 6 beads": ("A", BACKBONE), "capped AAGAA, C-alpha": ("AAGAA", "ca")}
#: Frames, 1 ps apart, that covariances are pooled over; configurations of them that are held, samples at each, and MD
#: steps between them.
N_FRAMES, N_CONFIGURATIONS, N_SAMPLES, STRIDE, HVP_EVERY = 1600, 50, 400, 20, 2
REGIONS, N_PROBES = 4, 4


@dataclass(frozen=True)
class Held:
    """A held configuration: unit ``modes`` (m, B, 3), softest first, ``samples`` there with HVPs along them, and the
    variances of forces along them (m,) by the covariance that was ``pooled`` over other frames, and by the one that
    ``followed`` the Hessian, too."""

    modes: NDArray[np.float64]
    samples: HeldSamples
    pooled: NDArray[np.float64]
    followed: NDArray[np.float64]


def sample_held(sequence: str, beads: str, folder: Path) -> tuple[list[Held], float]:
    """All held configurations of a molecule, and the share of the Hessians' spread that covariances follow."""
    settings = InputSettings(sequence=sequence, hydrogen_mass_amu=3.0)
    system = build_atomistic_system(settings, temperature_K=TEMPERATURE, constraints="none", name=sequence)
    bead_map = build_bead_map(beads, system.topology)
    sampling = SamplingSettings(n_frames=N_FRAMES, stride=500, walkers=2, constraints="none", seed=31)
    frames = sample_frames(system, sampling, folder / "frames.zarr", progress=False).read()
    # For its force map and finite-difference step.
    few = ReferenceSettings(n_frames=2, n_samples=40, probes=1)
    made = compute_reference(system, frames, bead_map, few, folder / "r.zarr", progress=False)
    platform, step = made.attributes["platform"], made.attributes["finite_difference"]["step_nm"]
    everything = frames.positions.astype(np.float64)
    positions = everything[:: N_FRAMES // N_CONFIGURATIONS]
    modes = [compute_soft_modes(x)[1].T.reshape(-1, *x.shape) for x in bead_map.map_positions(positions)]
    with ForceOracle(system.system, platform["name"], platform["properties"]) as oracle:
        forces = made.force_map @ oracle(everything)
        probes = draw_probes("rademacher", np.arange(N_FRAMES), N_PROBES, bead_map.n_beads, 34).astype(np.float64)
        hvps = compute_projected_hvps(oracle, everything, probes, made.force_map, step)
    x = torch.from_numpy(bead_map.map_positions(everything))
    pooled = PooledCovariance(x, REGIONS, seed=33)
    left = pooled.fit(x, torch.from_numpy(forces))
    ratio = HessianRatio.build(pooled, x, torch.from_numpy(probes), torch.from_numpy(hvps), seed=33)
    ratio.share = find_share([ratio.regress(pooled, x, left)])
    held = x[:: N_FRAMES // N_CONFIGURATIONS]
    directions = torch.from_numpy(np.stack(modes))
    products = pooled.apply(held, directions)
    sampler = HeldSampler(system, bead_map, platform["name"], platform["properties"], step, 32)
    starts = [Starts(np.array([k]), r[None], modes[k][None], made.force_map) for k, r in enumerate(positions)]
    samples = [s for (s,) in sampler.sample(starts, Chains(N_SAMPLES, STRIDE, HVP_EVERY, 2.0, 5.0, TEMPERATURE))]
    means = torch.from_numpy(np.stack([s.hvps.mean(axis=0) for s in samples]))
    changed = products + ratio.compute_change(pooled, held, ratio.subtract_means(pooled, held, directions, means))
    along = [torch.einsum("tkbx,tkbx->tk", directions, p).numpy() for p in (products, changed)]
    return [Held(*row) for row in zip(modes, samples, *along, strict=True)], ratio.share


def measure(held: list[Held]) -> list[dict[str, float]]:
    """A row for each mode, from the softest: root mean squares over configurations."""
    beta = 1.0 / compute_kt(TEMPERATURE)
    along, noise, target, hessians, slope, curvature, error, error_followed, chance = ([] for _ in range(9))
    for place in held:
        force = np.einsum("kbx,nbx->nk", place.modes, place.samples.forces)
        hessian = np.einsum("kbx,mkbx->mk", place.modes, place.samples.hvps)
        deviation = force - force.mean(axis=0)
        along.append(force.var(axis=0, ddof=1))
        noise.append(hessian.var(axis=0, ddof=1))
        target.append((hessian - beta * deviation[::HVP_EVERY] ** 2).var(axis=0, ddof=1))
        hessians.append(hessian.mean(axis=0))
        slope.append(force.mean(axis=0))
        curvature.append(hessian.mean(axis=0) - beta * along[-1])
        error.append(beta * (place.pooled - along[-1]))
        error_followed.append(beta * (place.followed - along[-1]))
        first, second = np.array_split(force, 2)
        chance.append(beta * (first.var(axis=0, ddof=1) - second.var(axis=0, ddof=1)) / 2)
    rms = lambda values: np.sqrt(np.mean(np.square(values), axis=0))  # noqa: E731
    s_f, s_p, s_t = (np.sqrt(np.mean(v, axis=0)) for v in (along, noise, target))
    # Of the difference, what the few samples at held beads cannot tell is taken out.
    pooled, followed = (np.sqrt(np.maximum(rms(e) ** 2 - rms(chance) ** 2, 0.0)) for e in (error, error_followed))
    columns = {
        "force_noise": s_f,
        "projected_hessian_noise": s_p,
        "target_noise": s_t,
        "projected_hessian": np.mean(hessians, axis=0),
        "pmf_curvature_mean": np.mean(curvature, axis=0),
        "pmf_curvature": np.sqrt(np.maximum(rms(curvature) ** 2 - rms(chance) ** 2, 0.0)),
        "pooled_covariance_error": pooled,
        "ratio_covariance_error": followed,
        "pmf_force": rms(slope),
        "resolution_nm": s_f / s_t,
        "resolution_known_covariance_nm": s_f / s_p,
    }
    return [{name: float(f"{values[k]:.3g}") for name, values in columns.items()} for k in range(len(s_f))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, object] = {
        "command": "python benchmarks/information.py",
        "units": "kJ/mol/nm, kJ/mol/nm^2, nm",
        "held": {"configurations": N_CONFIGURATIONS, "samples": N_SAMPLES, "stride": STRIDE, "hvp_every": HVP_EVERY},
        "pooled": {"frames": N_FRAMES, "regions": REGIONS},
    }
    for name, (sequence, beads) in MOLECULES.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            held, share = sample_held(sequence, beads, Path(folder))
            rows = measure(held)
        print(f"\n{name}, {time.perf_counter() - began:.0f} s; share {share:.2f}; modes from the softest")
        for k, row in enumerate(rows):
            print(k, *(f"{key} {value:g}" for key, value in row.items()))
        results[name] = rows
        results[f"{name}, share"] = round(share, 3)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
