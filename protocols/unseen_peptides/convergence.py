"""Is the all-atom reference converged? Halves of it side by side, along the slowest mode.

    python protocols/unseen_peptides/convergence.py --out benchmarks/results/unseen_peptides

Half of the copies of a peptide started extended and half helical. Where these two halves agree no worse than two random
halves do, the start is forgotten. A half holds half of the copies: what all of them together are off by is about a
quarter of these divergences.

Where they do not agree, the moves between states that both halves saw still tell what the balance is: a Markov state
model of each half weighs its frames (Prinz et al., J. Chem. Phys. 134, 174105 (2011)). If halves so weighted agree, and
weighting changes little where all copies are taken together, then all copies together are near equilibrium.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from deeptime.clustering import KMeans
from deeptime.markov import TransitionCountEstimator
from deeptime.markov.msm import MaximumLikelihoodMSM
from numpy.typing import NDArray
from peptides import REFERENCES, list_peptides, load_reference
from report import save_profiles
from run import DATA, HERE

from openmm_hvpcg.analysis.distributions import Landscape, Sample, compare_samples
from openmm_hvpcg.analysis.divergences import split_blocks
from openmm_hvpcg.analysis.observables import build_features
from openmm_hvpcg.analysis.slow_modes import fit_slow_modes
from openmm_hvpcg.config import Protocol, load_protocol
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.storage import write_json, write_text

#: Of the Markov state models: clusters along the slow modes, and the lag.
N_STATES, N_MODES, LAG_FRAMES = 60, 4, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=Path, default=HERE / "protocol.yaml")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    protocol = load_protocol(options.protocol)
    names = [m.name for m in list_peptides(protocol, "test")]
    rows, curves = [], {}
    for name in names:
        frames, _ = load_reference(options.data / REFERENCES, name)
        row, curves[name] = compare_halves(frames, protocol)
        rows.append({"peptide": name, **row})
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "convergence.json", {"rows": rows})
    write_text(options.out / "convergence.md", make_table(rows))
    plot(curves, protocol.temperature_K, options.out / "convergence.png")


def compare_halves(frames: Frames, protocol: Protocol) -> tuple[dict[str, float], Landscape]:
    """KL of halves by start and by time, what random halves differ by, and the densities by start."""
    settings = protocol.analysis
    features = build_features(frames.topology, settings.features).compute(frames)
    trajectories = [features[frames.walker == w] for w in dict.fromkeys(frames.walker.tolist())]
    modes = fit_slow_modes(trajectories, settings.lag_frames, frames.interval_ps, N_MODES)
    coordinates = modes.project(features)
    mode, states = coordinates[:, :1], find_states(coordinates)
    place = np.concatenate([np.arange(len(t)) / len(t) for t in trajectories])

    def compare(first: Any, second: Any, weigh: tuple[bool, bool] = (False, False)) -> Landscape:
        samples = [
            Sample(
                mode[rows],
                split_blocks(frames.walker[rows], settings.blocks),
                weigh_frames(states, frames.walker, rows) if weighted else None,
            )
            for rows, weighted in zip((first, second), weigh, strict=True)
        ]
        return compare_samples(("TICA mode 1",), ("",), samples[0], {"other": samples[1]}, settings.bins)

    extended, helical = frames.walker % 2 == 0, frames.walker % 2 == 1
    every = np.ones(len(mode), dtype=bool)
    by_start = compare(extended, helical)
    weighted_by_start = compare(extended, helical, (True, True))
    weighted = compare(every, every, (True, False))
    by_time = compare(place < 0.5, place >= 0.5)
    everything = Sample(mode, split_blocks(frames.walker, settings.blocks))
    floor = compare_samples(("TICA mode 1",), ("",), everything, {}, settings.bins).kl_floor
    return {
        "timescale_ps": float(modes.timescales_ps[0]),
        "ns_a_copy": len(trajectories[0]) * frames.interval_ps * 1e-3,
        "copies": len(trajectories),
        "kl_by_start": by_start.kl["other"].value,
        "kl_by_start_error": by_start.kl["other"].error,
        "kl_by_start_weighted": weighted_by_start.kl["other"].value,
        "kl_weighted": weighted.kl["other"].value,
        "kl_by_time": by_time.kl["other"].value,
        "kl_random_halves": floor,
    }, by_start


def find_states(coordinates: NDArray[np.float64]) -> Any:
    """Clusters (T,) of frames along the slow modes (T, n)."""
    return KMeans(N_STATES, fixed_seed=1, n_jobs=1).fit_fetch(coordinates).transform(coordinates)


def weigh_frames(states: NDArray[np.int64], walker: NDArray[np.int64], rows: NDArray[np.bool_]) -> Any:
    """Weights of the frames of ``rows`` by the stationary distribution of a reversible Markov state model of them."""
    paths = [states[walker == w] for w in dict.fromkeys(walker[rows].tolist())]
    counts = TransitionCountEstimator(LAG_FRAMES, "sliding").fit_fetch(paths).submodel_largest()
    stationary = np.zeros(N_STATES)
    stationary[counts.state_symbols] = MaximumLikelihoodMSM().fit_fetch(counts).stationary_distribution
    found = states[rows]
    weights = (stationary / np.maximum(np.bincount(found, minlength=N_STATES), 1))[found]
    # As many frames of equal weight as do as well (Kish).
    return weights * weights.sum() / np.square(weights).sum()


def make_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| peptide | slowest mode, ps | copies x ns | KL, extended and helical starts | the same, weighted |"
        " weighted and as they are, all copies | first and second half of time | random halves |",
        "|" + " --- |" * 8,
    ]
    for r in rows:
        lines.append(
            f"| {r['peptide']} | {r['timescale_ps']:.0f} | {r['copies']} x {r['ns_a_copy']:.1f} |"
            f" {r['kl_by_start']:.3f} ± {r['kl_by_start_error']:.3f} | {r['kl_by_start_weighted']:.3f} |"
            f" {r['kl_weighted']:.3f} | {r['kl_by_time']:.3f} |"
            f" {r['kl_random_halves']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, Landscape], temperature_K: float, path: Path) -> None:
    """Free energies of the two halves."""
    figure, axes = plt.subplots(3, 3, figsize=(10, 8), layout="constrained", squeeze=False)
    for axis, (name, landscape) in zip(axes.flat, curves.items(), strict=False):
        for density, label in ((landscape.reference, "extended start"), (landscape.arms["other"], "helical start")):
            axis.plot(landscape.bins.centres[0], density.compute_free_energy(temperature_K)[0], label=label)
        axis.set_title(name)
    save_profiles(figure, axes, path)


if __name__ == "__main__":
    main()
