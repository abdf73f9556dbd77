"""The report of a study: gather what its folder holds, compare, write ``report.html`` and ``summary.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import mdtraj as md
import numpy as np

from openmm_hvpcg._version import __version__
from openmm_hvpcg.analysis import Comparison, compare_runs, find_phi_psi, write_report, write_summary
from openmm_hvpcg.config import MoleculeSettings
from openmm_hvpcg.errors import InputError
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.simulation import load_result, load_run
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
    for arm in study.arms:
        if study.find_output("train", arm).exists():
            fit = load_fit(study.model_folder(arm))
            training[arm] = {**fit.metrics, "curves": fit.curves}
    simulation = {
        m.name: {arm: _read_run(study, arm, m.name) for arm in study.arms if has_run(study, f"{arm}/{m.name}")}
        for m in study.judged
    }
    evaluation = read_evaluation(study)
    provenance = _describe_study(study)
    if evaluation is not None:
        provenance["references"] = {name: m["reference"] for name, m in evaluation["molecules"].items()}
    pmf_errors = list_pmf_errors(evaluation)
    title = f"{', '.join(m.name for m in study.judged)}: coarse-grained potentials against the all-atom reference"
    results = (comparisons, training, simulation, provenance)
    write_report(study.report_folder, *results, title=title, pmf_errors=pmf_errors)
    write_summary(study.report_folder / "summary.json", *results, pmf_errors)


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
    )


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
    }


def _describe_study(study: Study) -> dict[str, Any]:
    p = study.protocol
    datasets = {}
    for molecule in study.trained:
        if study.dataset_path(molecule.name).exists():
            data = load_dataset(study.dataset_path(molecule.name))
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
