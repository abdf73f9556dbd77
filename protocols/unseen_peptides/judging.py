"""How well a model does on a peptide: CG runs beside the all-atom reference, and forces beside labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mdtraj as md
import numpy as np
import torch
from numpy.typing import NDArray

from openmm_hvpcg.analysis.compare import compare_runs, list_after_burn_in
from openmm_hvpcg.analysis.distributions import Landscape, Sample, compare_observable
from openmm_hvpcg.analysis.divergences import split_blocks
from openmm_hvpcg.config import AnalysisSettings
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import PotentialSpec
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.derivatives import EnergyFunction, compute_forces
from openmm_hvpcg.training.models.torsions import Bonded
from openmm_hvpcg.training.models.total import TotalEnergy

#: Beads at least this far apart along the chain, and this near in space, are in contact.
CONTACT_BEADS = 3
CONTACT_NM = 0.7
ARM = "arm"


def choose_beads(run: Frames, topology: md.Topology) -> Frames:
    """The beads of a run that ``topology`` has, by the number of their residue and their name, in its order."""
    place = {(a.residue.chain.index, a.residue.resSeq, a.name): a.index for a in run.topology.atoms}
    beads = [place[a.residue.chain.index, a.residue.resSeq, a.name] for a in topology.atoms]
    return Frames(run.positions[:, beads], topology, run.temperature_K, run.walker, run.interval_ps)


def bind_model(network: torch.nn.Module, spec: PotentialSpec, bead_map: BeadMap) -> TotalEnergy:
    """Priors and network as the energy of a molecule."""
    return TotalEnergy(network, replace(spec, bead_map=bead_map)).eval()


def find_residuals(energy: EnergyFunction, labels: LabelledFrames) -> NDArray[np.float64]:
    """What an energy of positions leaves of the force labels, (T, B, 3)."""
    return labels.forces - compute_forces(energy, torch.from_numpy(labels.positions).double()).numpy()


def find_torsions(bead_map: BeadMap, beads: tuple[str, ...]) -> torch.Tensor:
    """Rows (n, 4) of four bonded beads with these names, which may be listed from either end."""
    torsions = Bonded.find(bead_map).torsions
    names = [tuple(bead_map.names[bead] for bead in row) for row in torsions.tolist()]
    return torsions[[name in (beads, beads[::-1]) for name in names]]


def judge_forces(network: torch.nn.Module, spec: PotentialSpec, labels: LabelledFrames) -> dict[str, list[float]]:
    """Mean squares per component, (kJ/mol/nm)^2, of what the model and its priors alone leave of the force labels.

    One for each walker. All hold the noise of the labels, which differences of two models do not.
    """
    total = bind_model(network, spec, labels.bead_map)
    found = {"model": total.frame_energies, "priors": total.prior_energies}
    squares = {name: np.square(find_residuals(energy, labels)) for name, energy in found.items()}
    walkers = np.unique(labels.walker)
    return {name: [float(s[labels.walker == w].mean()) for w in walkers] for name, s in squares.items()}


def judge(reference: Frames, run: Frames, settings: AnalysisSettings, peptide: str) -> dict[str, Any]:
    """Divergences of a run from the reference, with errors and what two halves of the reference differ by."""
    comparison = compare_runs(reference, {ARM: run}, settings, molecule=peptide)
    if comparison.skipped:
        return {"stable": False, "message": comparison.skipped[ARM]}
    contacts = compare_contacts(reference, run, settings)
    size = comparison.radius_of_gyration
    mode = comparison.tica1
    return {
        "timescales_ps": [float(t) for t in comparison.slow_modes.timescales_ps],
        "tica1": describe(mode),
        "tica12": None if comparison.tica12 is None else describe(comparison.tica12),
        "radius_of_gyration": {**describe(size.landscape), "mean_nm": size.arms[ARM].mean.value}
        | {"reference_mean_nm": size.reference.mean.value, "mean_error_nm": size.arms[ARM].mean.error},
        "contacts": {**describe(contacts.landscape), "mean": contacts.arms[ARM].mean.value}
        | {"reference_mean": contacts.reference.mean.value, "mean_error": contacts.arms[ARM].mean.error},
        "distances_js": mean_js(comparison.coordinates, "distance"),
        "dihedrals_js": mean_js(comparison.coordinates, "dihedral"),
        "curve": {
            "centres": mode.bins.centres[0].tolist(),
            "reference": mode.reference.values.tolist(),
            "model": mode.arms[ARM].values.tolist(),
        },
    }


def describe(landscape: Landscape) -> dict[str, float]:
    return {
        "kl": landscape.kl[ARM].value,
        "kl_error": landscape.kl[ARM].error,
        "kl_floor": landscape.kl_floor,
        "js": landscape.js[ARM].value,
        "js_error": landscape.js[ARM].error,
        "js_floor": landscape.js_floor,
        "outside": landscape.outside[ARM],
    }


def mean_js(coordinates: Any, kind: str) -> float | None:
    found = [c.landscape.js[ARM].value for c in coordinates if c.kind == kind]
    return float(np.mean(found)) if found else None


def count_contacts(frames: Frames) -> NDArray[np.float64]:
    """Pairs of beads in contact, (T,)."""
    first, second = np.triu_indices(frames.n_atoms, CONTACT_BEADS)
    distances = np.linalg.norm(frames.positions[:, second] - frames.positions[:, first], axis=-1)
    return (distances < CONTACT_NM).sum(axis=1).astype(np.float64)


def compare_contacts(reference: Frames, run: Frames, settings: AnalysisSettings) -> Any:
    used = run.select(list_after_burn_in(run.walker, settings.burn_in))
    samples = [
        Sample(count_contacts(frames), split_blocks(frames.walker, settings.blocks)) for frames in (reference, used)
    ]
    n_values = int(samples[0].values.max() - samples[0].values.min()) + 1
    return compare_observable("contacts", "contacts", "", samples[0], {ARM: samples[1]}, max(5, n_values))
