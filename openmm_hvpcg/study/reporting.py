"""The report of a study: gather what its folder holds, compare, write ``report.html`` and ``summary.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import mdtraj as md
import numpy as np
from numpy.typing import NDArray

from openmm_hvpcg._version import __version__
from openmm_hvpcg.analysis import (
    Comparison,
    compare_runs,
    compute_weights,
    find_phi_psi,
    write_report,
    write_summary,
)
from openmm_hvpcg.config import MoleculeSettings
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.simulation import load_ladder, load_result, load_run
from openmm_hvpcg.study.evaluating import list_pmf_errors, read_evaluation
from openmm_hvpcg.study.folder import RECORDS, Study, read_record
from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.fit import load_fit

TIMES = f"{RECORDS}/seconds.json"


def make_report(study: Study, maps: Mapping[str, BeadMap], frames: Mapping[str, Frames]) -> None:
    """Compare every finished run with the reference and write ``report.html`` and ``summary.json``.

    Parameters
    ----------
    maps, frames : bead map and AA frames of each judged molecule
    """
    comparisons = {m.name: _compare_molecule(study, m, maps[m.name], frames[m.name]) for m in study.judged}
    training = {}
    trained: dict[str, str] = {}
    for arm in study.arms:
        if study.find_output("train", arm).exists():
            fit = load_fit(study.model_folder(arm))
            training[arm] = {**fit.metrics, "curves": fit.curves}
            trained |= fit.spec.datasets
    simulation = {
        m.name: {arm: _read_run(study, arm, m.name) for arm in study.arms if has_run(study, f"{arm}/{m.name}")}
        for m in study.judged
    }
    evaluation = read_evaluation(study)
    provenance = _describe_study(study)
    held_out = [m.name for m in study.judged if m.name not in trained]
    provenance |= {"trained_on": list(trained), "held_out": held_out if trained else []}
    if evaluation is not None:
        provenance["references"] = {name: m["reference"] for name, m in evaluation["molecules"].items()}
    pmf_errors = list_pmf_errors(evaluation)
    title = f"{', '.join(m.name for m in study.judged)}: coarse-grained potentials against the all-atom reference"
    results = (comparisons, training, simulation, provenance)
    roles = describe_roles(list(trained), [m.name for m in study.judged], _find_twins(study, maps, list(trained)))
    write_report(study.report_folder, *results, title=title, pmf_errors=pmf_errors, roles=roles)
    write_summary(study.report_folder / "summary.json", *results, pmf_errors)


def describe_roles(trained: Sequence[str], judged: Sequence[str], twins: Mapping[str, str] | None = None) -> str:
    """Which molecules were trained on, and which were held out of what, in words.

    Parameters
    ----------
    trained : names of the molecules whose labels the arms were trained on, as their results record it
    judged : names of the molecules that are simulated and compared
    twins : held-out molecule -> training molecule that has the same beads
    """
    if not trained:
        return ""
    held_out = [name for name in judged if name not in trained]
    parts = [f"Trained on {', '.join(trained)}."]
    if held_out:
        parts.append(
            f"Held out: {', '.join(held_out)}; the priors, the normalisation, the training of the networks and the"
            " choice among their epochs know nothing of what is held out."
        )
    else:
        parts.append("No molecule was held out: these figures say nothing about molecules never trained on.")
    both = [name for name in judged if name in trained]
    if held_out and both:
        parts.append(f"Not held out, for they were trained on as well: {', '.join(both)}.")
    parts += [f"But {name} has the same beads as {twin}, which was trained on." for name, twin in (twins or {}).items()]
    return " ".join(parts)


def _find_twins(study: Study, maps: Mapping[str, BeadMap], trained: Sequence[str]) -> dict[str, str]:
    """Molecules that were held out by name, but are those of a training molecule by their beads."""
    known = {
        load_dataset(study.dataset_path(name), stream=True).bead_map.hash: name
        for name in trained
        if study.dataset_path(name).exists()
    }
    return {name: known[m.hash] for name, m in maps.items() if name not in trained and m.hash in known}


def has_run(study: Study, unit: str) -> bool:
    """Whether the simulation ``arm/molecule`` has ended, well or not."""
    return study.find_output("simulate", unit).exists()


def read_times(study: Study) -> dict[str, float]:
    """Wall seconds of each stage so far."""
    path = study.out / TIMES
    return read_record(path) if path.exists() else {}


def _compare_molecule(study: Study, molecule: MoleculeSettings, bead_map: BeadMap, frames: Frames) -> Comparison:
    topology = bead_map.to_topology()
    reference = Frames(
        bead_map.map_positions(frames.positions).astype(np.float32),
        topology,
        frames.temperature_K,
        frames.walker,
        frames.interval_ps,
    )
    runs = {
        arm: load_run(study.run_folder(arm, molecule.name), topology)
        for arm in study.arms
        if has_run(study, f"{arm}/{molecule.name}") and _read_run(study, arm, molecule.name)["n_frames"] > 0
    }
    return compare_runs(
        reference,
        runs,
        study.protocol.analysis,
        molecule=molecule.name,
        native=_load_native(study, molecule, bead_map),
        phi_psi=find_phi_psi(bead_map),
        weights=_weigh_runs(study, molecule.name, list(runs)),
    )


def _weigh_runs(study: Study, molecule: str, arms: list[str]) -> dict[str, NDArray[np.float64]]:
    """Weights of the frames of each arm's replica exchange at the study's temperature, burn-in left out."""
    found = {}
    for arm in arms:
        ladder = load_ladder(study.run_folder(arm, molecule))
        if ladder is None:
            continue
        used = slice(int(study.protocol.analysis.burn_in * ladder.energies.shape[1]), None)
        energies, states = ladder.energies[:, used], ladder.states[:, used]
        weights = np.zeros(ladder.energies.shape)
        coldest = float(ladder.temperatures_K[0])
        counted = compute_weights(energies.ravel(), states.ravel(), ladder.temperatures_K, coldest)
        weights[:, used] = counted.reshape(energies.shape)
        found[arm] = weights.ravel()
    return found


def _load_native(study: Study, molecule: MoleculeSettings, bead_map: BeadMap) -> Any:
    """Bead positions (B, 3) nm of the native structure, or None."""
    if molecule.native_pdb is None:
        return None
    path = study.base / molecule.native_pdb
    try:
        structure = md.load(str(path))
    except Exception as error:
        raise InputError(f"the native structure cannot be read ({error})", where=path) from error
    if structure.n_atoms != bead_map.n_atoms:
        raise InputError(
            "the native structure differs from the molecule",
            expected=f"{bead_map.n_atoms} atoms",
            got=structure.n_atoms,
            where=path,
        )
    return bead_map.map_positions(structure.xyz[0])


def _read_run(study: Study, arm: str, molecule: str) -> dict[str, Any]:
    result = load_result(study.run_folder(arm, molecule))
    exchange = result.exchange or {}
    return {
        "simulated_ns": result.simulated_ns,
        "steps_per_second": result.steps_per_second,
        "backend": result.backend,
        "platform": result.platform,
        "replicas": result.replicas,
        "n_steps": result.n_steps,
        "n_frames": result.n_frames,
        "timestep_fs": result.settings["timestep_fs"],
        "stable": result.stable,
        "message": result.message,
        "temperatures_K": exchange.get("temperatures_K"),
        "swap_acceptance": exchange.get("acceptance"),
        "round_trips": exchange.get("round_trips"),
    }


def _describe_study(study: Study) -> dict[str, Any]:
    p = study.protocol
    datasets = {}
    for molecule in study.trained:
        if study.dataset_path(molecule.name).exists():
            data = load_dataset(study.dataset_path(molecule.name), stream=True)
            datasets[molecule.name] = {
                "hash": data.hash,
                "frames": data.n_frames,
                "probes_per_frame": data.n_probes,
                "force_map": data.attributes["force_map"],
                "finite_difference_step_nm": data.attributes["finite_difference"]["step_nm"],
                "finite_difference_relative_error": data.attributes["finite_difference"]["relative_error"],
                "platform": data.attributes["platform"]["name"],
            }
    return {
        "package_version": __version__,
        "machine": platform.platform(),
        "temperature_K": p.temperature_K,
        "molecules": {m.name: {"role": m.role, **_given(m.input)} for m in p.molecules},
        "mapping": p.mapping.beads,
        "seeds": {s: getattr(p, s).seed for s in ("sampling", "labels", "training", "simulation")},
        "datasets": datasets,
        "stage_seconds": read_times(study),
    }


def _given(settings: Any) -> dict[str, Any]:
    return {k: v for k, v in settings.model_dump(mode="json").items() if v is not None}
