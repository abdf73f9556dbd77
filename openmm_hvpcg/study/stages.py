"""The six stages of a study; each resumes where it was killed and says what it skips."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np

from openmm_hvpcg._version import __version__
from openmm_hvpcg.analysis import Comparison, compare_runs, find_phi_psi, write_report, write_summary
from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.atomistic.trajectories import import_trajectory
from openmm_hvpcg.config import MoleculeSettings, resolve_arm
from openmm_hvpcg.errors import HVPCGError, InputError, StudyError, UnstableSimulationError
from openmm_hvpcg.frames import Frames, load_frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.simulation import load_result, simulate
from openmm_hvpcg.simulation.run import RESULT_NAME
from openmm_hvpcg.storage import explain_disk_errors, write_json
from openmm_hvpcg.study.folder import LOG_NAME, Study, lock_study
from openmm_hvpcg.training.dataset import load_dataset
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import fit_potential, load_fit
from openmm_hvpcg.training.labels.label import label_frames
from openmm_hvpcg.units import PS_PER_FS

logger = logging.getLogger(__name__)


def run_study(study: Study) -> dict[str, Any]:
    """Run every stage; returns the content of ``summary.json``."""
    for stage in list(STAGES)[:-1]:
        run_stage(study, stage)
    return run_stage(study, "compare")


def run_stage(study: Study, stage: str) -> Any:
    """Run one stage on all its units; finished ones are skipped.

    Raises
    ------
    HVPCGError
        What went wrong, the molecule or arm named.
    """
    with lock_study(study), _log_to(study.out / LOG_NAME):
        began = time.perf_counter()
        result = STAGES[stage](study)
        seconds = time.perf_counter() - began
        logger.info("stage %s: done in %.1f s", stage, seconds)
        _add_time(study, stage, seconds)
    return result


def _sample(study: Study) -> None:
    for molecule in _each_molecule(study, "sample", study.protocol.molecules):
        system = _build_system(study, molecule.name)
        path = study.frames_path(molecule.name)
        if molecule.input.trajectory is None:
            sample_frames(system, study.protocol.sampling, path, progress=study.progress)
        else:
            import_trajectory(
                system,
                [study.base / f for f in molecule.input.trajectory],
                path,
                interval_ps=molecule.input.trajectory_interval_ps,
                temperature_K=study.protocol.temperature_K,
            )


def _label(study: Study) -> None:
    for molecule in _each_molecule(study, "label", study.trained):
        system = _build_system(study, molecule.name)
        frames = load_frames(study.frames_path(molecule.name))
        _check_same_system(study, system, frames)
        label_frames(
            system,
            frames,
            _build_map(study, molecule.name),
            study.protocol.labels,
            study.dataset_path(molecule.name),
            progress=study.progress,
        )


def _train(study: Study) -> None:
    for arm in _each_unit(study, "train", study.arms):
        training, model = resolve_arm(study.protocol, arm)
        datasets = [load_dataset(study.dataset_path(m.name), _build_map(study, m.name)) for m in study.trained]
        result = fit_potential(
            datasets, training, model, study.protocol.priors, study.model_folder(arm), arm=arm, progress=study.progress
        )
        figures = result.metrics
        logger.info(
            "%s: validation force error %.1f (priors %.1f, label noise %s) kJ/mol/nm, HVP error %.3g (priors %.3g,"
            " label noise %s) kJ/mol/nm^2, best of %d epochs: %d",
            arm,
            figures["force_rmse_validation"],
            figures["force_rmse_priors"],
            _show(figures["force_noise"]),
            figures["hvp_rmse_validation"],
            figures["hvp_rmse_priors"],
            _show(figures["hvp_noise"]),
            figures["epochs"],
            figures["best_epoch"] + 1,
        )


def _export(study: Study) -> None:
    for arm in _each_unit(study, "export", study.arms):
        fit = load_fit(study.model_folder(arm))
        frames = load_dataset(study.dataset_path(study.trained[0].name)).positions
        check = export_potential(fit.network, fit.spec, study.potential_path(arm), frames)
        write_json(
            study.model_folder(arm) / "check.json",
            [{"name": i.name, "value": i.value, "tolerance": i.tolerance, "reason": i.reason} for i in check.items],
        )


def _simulate(study: Study) -> None:
    unstable: list[UnstableSimulationError] = []
    units = [(arm, m) for m in study.judged for arm in study.arms]
    names = [f"{arm}/{m.name}" for arm, m in units]
    for name in _each_unit(study, "simulate", names):
        arm, molecule = units[names.index(name)]
        bead_map = _build_map(study, molecule.name)
        starts = bead_map.map_positions(load_frames(study.frames_path(molecule.name)).positions)
        try:
            result = simulate(
                study.potential_path(arm),
                starts,
                study.protocol.simulation,
                study.run_folder(arm, molecule.name),
                temperature_K=study.protocol.temperature_K,
                topology=bead_map,
                progress=study.progress,
            )
            logger.info(
                "%s: %.2f ns in all, %.0f steps/s with %d replicas (%s, %s)",
                name,
                result.simulated_ns,
                result.steps_per_second,
                result.replicas,
                result.backend,
                result.platform,
            )
        except UnstableSimulationError as error:
            logger.error("%s: %s", name, error)
            unstable.append(error)
    if len(unstable) == len(units):
        raise unstable[0]


def _compare(study: Study) -> dict[str, Any]:
    comparisons = {m.name: _compare_molecule(study, m) for m in study.judged}
    training = {}
    for arm in study.arms:
        if (study.model_folder(arm) / "training.json").exists():
            fit = load_fit(study.model_folder(arm))
            training[arm] = {**fit.metrics, "curves": fit.curves}
    simulation = {
        m.name: {arm: _read_run(study, arm, m.name) for arm in study.arms if _has_run(study, arm, m.name)}
        for m in study.judged
    }
    provenance = _describe_study(study)
    summary = write_summary(study.report_folder / "summary.json", comparisons, training, simulation, provenance)
    write_report(study.report_folder, comparisons, training, simulation, provenance, title=_title(study))
    return summary


#: Stage name -> what runs it, in order.
STAGES: dict[str, Callable[[Study], Any]] = {
    "sample": _sample,
    "label": _label,
    "train": _train,
    "export": _export,
    "simulate": _simulate,
    "compare": _compare,
}


def _each_unit(study: Study, stage: str, units: list[str]) -> Iterator[str]:
    """The units still to do; each is marked done when the loop comes back for the next, errors name it."""
    for unit in units:
        if study.is_done(stage, unit):
            logger.info("%s %s: done already, skipped", stage, unit)
            continue
        yield unit
        study.mark_done(stage, unit)


def _each_molecule(study: Study, stage: str, molecules: list[MoleculeSettings]) -> Iterator[MoleculeSettings]:
    by_name = {m.name: m for m in molecules}
    for name in _each_unit(study, stage, list(by_name)):
        yield by_name[name]


def _build_system(study: Study, molecule: str) -> AtomisticSystem:
    """The AA system of a molecule; built once a process."""
    if molecule not in study.cache:
        settings = next(m for m in study.protocol.molecules if m.name == molecule)
        logger.info("%s: building the all-atom system", molecule)
        study.cache[molecule] = build_atomistic_system(
            settings.input,
            temperature_K=study.protocol.temperature_K,
            constraints=study.protocol.sampling.constraints,
            name=molecule,
            base=study.base,
        )
    return study.cache[molecule]


def _check_same_system(study: Study, system: AtomisticSystem, frames: Frames) -> None:
    found = frames.provenance.get("system_hash")
    if found != system.system_hash:
        raise StudyError(
            "the frames are of another System than the one built now",
            where=study.frames_path(system.name),
            hint="input files or OpenMM's version changed since they were sampled: sample again in a new folder",
        )


def _build_map(study: Study, molecule: str) -> BeadMap:
    """The bead map of a molecule, as it was when its frames were made; written beside the data with a CG PDB."""
    path = study.map_path(molecule)
    if path.exists():
        return BeadMap.load(path)
    frames = load_frames(study.frames_path(molecule))
    beads = study.protocol.mapping.beads
    try:
        if isinstance(beads, dict):
            bead_map = BeadMap.load(study.base / beads["json"], frames.n_atoms)
        else:
            bead_map = build_bead_map(beads, frames.topology)
    except HVPCGError as error:
        raise type(error)(str(error), where=f"molecule {molecule}") from error
    with explain_disk_errors(path):
        first = bead_map.map_positions(frames.positions[:1]).astype(np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        md.Trajectory(first, bead_map.to_topology()).save_pdb(str(path.with_suffix(".pdb")))
        bead_map.save(path)
    return bead_map


def _compare_molecule(study: Study, molecule: MoleculeSettings) -> Comparison:
    bead_map = _build_map(study, molecule.name)
    frames = load_frames(study.frames_path(molecule.name))
    topology = bead_map.to_topology()
    reference = Frames(
        bead_map.map_positions(frames.positions).astype(np.float32),
        topology,
        frames.temperature_K,
        frames.walker,
        frames.interval_ps,
    )
    runs = {
        arm: _load_run(study, arm, molecule.name, topology)
        for arm in study.arms
        if _has_run(study, arm, molecule.name) and _read_run(study, arm, molecule.name)["n_frames"] > 0
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


def _has_run(study: Study, arm: str, molecule: str) -> bool:
    return (study.run_folder(arm, molecule) / RESULT_NAME).exists()


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


def _load_run(study: Study, arm: str, molecule: str, topology: md.Topology) -> Frames:
    """CG frames of all replicas, a walker each."""
    folder = study.run_folder(arm, molecule)
    result = load_result(folder)
    replicas = [md.load(str(folder / name), top=topology) for name in result.trajectories]
    interval = result.settings["save_every"] * result.settings["timestep_fs"] * PS_PER_FS
    return Frames(
        np.concatenate([r.xyz for r in replicas]),
        topology,
        result.temperature_K,
        np.repeat(np.arange(len(replicas)), [r.n_frames for r in replicas]),
        interval,
    )


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
        "stage_seconds": _read_times(study),
    }


def _given(settings: Any) -> dict[str, Any]:
    return {k: v for k, v in settings.model_dump(mode="json").items() if v is not None}


def _title(study: Study) -> str:
    return f"{', '.join(m.name for m in study.judged)}: coarse-grained potentials against the all-atom reference"


def _show(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _add_time(study: Study, stage: str, seconds: float) -> None:
    """Wall time by stage, summed over resumed runs."""
    times = _read_times(study)
    times[stage] = round(times.get(stage, 0.0) + seconds, 2)
    write_json(study.out / "stages" / "seconds.json", times)


def _read_times(study: Study) -> dict[str, float]:
    path = study.out / "stages" / "seconds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Add the package's log to a file while a stage runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("openmm_hvpcg")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()
