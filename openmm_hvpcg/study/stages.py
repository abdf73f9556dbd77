"""The eight stages of a study; each resumes where it was killed and says what it skips."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np

from openmm_hvpcg.atomistic.flattening import DihedralBias, find_dihedrals
from openmm_hvpcg.atomistic.flexible import warn_of_fast_bonds
from openmm_hvpcg.atomistic.frame_choice import FrameChoice
from openmm_hvpcg.atomistic.sampling import sample_frames, sample_walker
from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.atomistic.trajectories import import_trajectory
from openmm_hvpcg.config import LabelSettings, MoleculeSettings, resolve_arm
from openmm_hvpcg.errors import HVPCGError, MappingError, StudyError, UnstableSimulationError
from openmm_hvpcg.frames import Frames, FramesStore, load_frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map, check_species
from openmm_hvpcg.simulation import load_result, simulate
from openmm_hvpcg.storage import write_json
from openmm_hvpcg.study.evaluating import evaluate_study, read_evaluation
from openmm_hvpcg.study.folder import LOG_NAME, Study, read_record, take_folder
from openmm_hvpcg.study.reporting import TIMES, has_run, make_report, read_times
from openmm_hvpcg.training.dataset import LabelledFrames, load_dataset
from openmm_hvpcg.training.export import export_potential
from openmm_hvpcg.training.fit import fit_potential, load_fit
from openmm_hvpcg.training.labels.force_maps import build_force_map
from openmm_hvpcg.training.labels.held import find_held_atoms
from openmm_hvpcg.training.labels.label import label_chunks
from openmm_hvpcg.training.labels.oracle import find_active_atoms, find_rigid_clusters
from openmm_hvpcg.training.reference import compute_reference, load_reference

logger = logging.getLogger(__name__)

#: Sets the seeds of frames without a bias apart from those with it.
PILOT_SEED = 1 << 29


def run_study(study: Study) -> dict[str, Any]:
    """Run every stage; returns the content of ``summary.json``.

    The reference and the evaluation against it are made where the protocol has a ``reference`` section.
    A simulation that blew up does not keep the others and the report from being made: the summary says which
    it was, and :func:`check_stable` raises for it.
    """
    with take_folder(study):
        for stage in ("sample", "label", "reference", "train", "export", "evaluate"):
            if study.protocol.reference is not None or stage not in ("reference", "evaluate"):
                _run_stage(study, stage)
        with contextlib.suppress(UnstableSimulationError):
            _run_stage(study, "simulate")
        return _run_stage(study, "compare")


def run_stage(study: Study, stage: str) -> Any:
    """Run one stage on all its units; finished ones are skipped.

    Raises
    ------
    HVPCGError
        What went wrong, the molecule or arm named.
    """
    with take_folder(study):
        return _run_stage(study, stage)


def check_stable(study: Study) -> None:
    """Raise :class:`UnstableSimulationError` if a simulation of the study blew up, with what it said."""
    for unit in study.list_units("simulate"):
        if has_run(study, unit):
            result = load_result(study.find_output("simulate", unit).parent)
            if not result.stable:
                raise UnstableSimulationError(f"{unit}: {result.message}")


def _run_stage(study: Study, stage: str) -> Any:
    with _log_to(study.out / LOG_NAME):
        began = time.perf_counter()
        result = STAGES[stage](study)
        seconds = time.perf_counter() - began
        logger.info("stage %s: done in %.1f s", stage, seconds)
        _add_time(study, stage, seconds)
    return result


def _sample(study: Study) -> None:
    _check_inputs(study)
    _do_units(study, "sample")


def _sample_molecule(study: Study, name: str) -> None:
    molecule = next(m for m in study.protocol.molecules if m.name == name)
    system = _build_system(study, name)
    path = study.frames_path(name)
    if molecule.input.trajectory is None:
        warn_of_fast_bonds(system, study.protocol.sampling.timestep_fs)
        bias = _find_bias(study, molecule, study.progress)
        sample_frames(system, study.protocol.sampling, path, bias=bias, progress=study.progress)
    else:
        import_trajectory(
            system,
            [study.base / f for f in molecule.input.trajectory],
            path,
            interval_ps=molecule.input.trajectory_interval_ps,
            temperature_K=study.protocol.temperature_K,
            choice=FrameChoice(
                molecule.input.trajectory_stride,
                molecule.input.trajectory_frames,
                molecule.input.trajectory_choice,
                study.protocol.sampling.seed,
                _make_map(study, name, system.topology),
            ),
        )


def _sample_part(study: Study, name: str, walkers: Sequence[int]) -> list[int]:
    """Make the frames of some walkers; returns the walkers that are to do."""
    molecule = next(m for m in study.protocol.molecules if m.name == name)
    if molecule.input.trajectory is not None:
        return []
    bias = _find_bias(study, molecule, progress=False)
    todo: list[int] = []
    for walker in walkers or (None,):
        system = _build_system(study, name)
        todo = sample_walker(system, study.protocol.sampling, study.frames_path(name), walker, bias=bias)
    return todo


def _find_bias(study: Study, molecule: MoleculeSettings, progress: bool) -> DihedralBias | None:
    """What a molecule that is only trained on is sampled with, from frames without it, which are sampled first."""
    if not study.protocol.is_flattened(molecule):
        return None
    sampling, system = study.protocol.sampling, _build_system(study, molecule.name)
    bead_map = _make_map(study, molecule.name, system.topology)
    pilot = sampling.model_copy(update={"n_frames": sampling.flatten_frames, "seed": sampling.seed ^ PILOT_SEED})
    frames = sample_frames(system, pilot, study.pilot_path(molecule.name), progress=progress).read()
    return DihedralBias.fit(bead_map.map_positions(frames.positions), bead_map, sampling.flatten)


def _label_molecule(study: Study, name: str) -> None:
    if study.protocol.labels.averaging is not None:
        warn_of_fast_bonds(_build_system(study, name), study.protocol.labels.averaging.timestep_fs)
    label_chunks(*_collect_label_inputs(study, name), progress=study.progress)


def _label_part(study: Study, name: str, chunks: Sequence[int]) -> list[int]:
    """Label some chunks; returns the chunks that are to do."""
    return label_chunks(*_collect_label_inputs(study, name), chunks, progress=False)


def _collect_label_inputs(study: Study, name: str) -> tuple[AtomisticSystem, Frames, BeadMap, LabelSettings, Path]:
    frames = _load_frames(study, name)
    system = _build_system(study, name)
    _check_same_system(study, system, frames)
    return system, frames, _build_map(study, name), study.protocol.labels, study.dataset_path(name)


def _reference_molecule(study: Study, name: str) -> None:
    frames = _load_frames(study, name)
    system = _build_system(study, name)
    _check_same_system(study, system, frames)
    bead_map = _build_map(study, name)
    find_held_atoms(system, bead_map)
    warn_of_fast_bonds(system, study.reference_settings.timestep_fs)
    compute_reference(
        system,
        frames,
        bead_map,
        study.reference_settings,
        study.reference_path(name),
        progress=study.progress,
    )


def _train_arm(study: Study, arm: str) -> None:
    training, model = resolve_arm(study.protocol, arm)
    stream = training.memory_gb is not None
    datasets = [_load_labels(study, m.name, stream) for m in study.trained]
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


def _export_arm(study: Study, arm: str) -> None:
    _require(study, "train", arm)
    fit = load_fit(study.model_folder(arm))
    frames = np.asarray(_load_labels(study, study.trained[0].name, stream=True).positions)
    check = export_potential(fit.network, fit.spec, study.potential_path(arm), frames, study.protocol.export.tabulate)
    write_json(
        study.model_folder(arm) / "check.json",
        [{"name": i.name, "value": i.value, "tolerance": i.tolerance, "reason": i.reason} for i in check.items],
    )


def _evaluate(study: Study) -> dict[str, Any] | None:
    for _ in _each_unit(study, "evaluate", study.list_units("evaluate")):
        for stage, units in (("reference", study.list_units("reference")), ("train", study.arms)):
            for unit in units:
                _require(study, stage, unit)
        references = {
            m.name: load_reference(study.reference_path(m.name), _build_map(study, m.name)) for m in study.judged
        }
        evaluate_study(study, references)
    return read_evaluation(study)


def _simulate(study: Study) -> None:
    _do_units(study, "simulate")
    check_stable(study)


def _simulate_unit(study: Study, unit: str) -> None:
    arm, molecule = unit.split("/")
    _require(study, "export", arm)
    bead_map = _build_map(study, molecule)
    starts = bead_map.map_positions(_load_frames(study, molecule).positions)
    try:
        result = simulate(
            study.potential_path(arm),
            starts,
            study.protocol.simulation,
            study.run_folder(arm, molecule),
            temperature_K=study.protocol.temperature_K,
            topology=bead_map,
            progress=study.progress,
        )
    except UnstableSimulationError as error:
        # The result says so too; the other simulations go on.
        logger.error("%s: %s", unit, error)
        return
    logger.info(
        "%s: %.2g ns in all, %.0f steps/s with %d replicas (%s, %s)",
        unit,
        result.simulated_ns,
        result.steps_per_second,
        result.replicas,
        result.backend,
        result.platform,
    )


def _compare(study: Study) -> dict[str, Any]:
    for _ in _each_unit(study, "compare", ["report"]):
        maps = {m.name: _build_map(study, m.name) for m in study.judged}
        make_report(study, maps, {m.name: _load_frames(study, m.name) for m in study.judged})
    return read_record(study.find_output("compare", "report"))


@dataclass(frozen=True)
class UnitWork:
    """What is done for one unit of a stage, here or by a worker of a cluster.

    Attributes
    ----------
    whole : does the unit, or what is left of it
    part : does some parts of it, where there are any, for ``whole`` to finish; given none, it only begins. Returns the
        parts that are to do
    share : parts of one task; None: so many that every worker gets a few tasks
    """

    whole: Callable[[Study, str], None]
    part: Callable[[Study, str, Sequence[int]], list[int]] | None = None
    share: int | None = None


#: Stages whose units do not depend on one another.
UNIT_WORK = {
    "sample": UnitWork(_sample_molecule, _sample_part, share=1),
    "label": UnitWork(_label_molecule, _label_part),
    "reference": UnitWork(_reference_molecule),
    "train": UnitWork(_train_arm),
    "export": UnitWork(_export_arm),
    "simulate": UnitWork(_simulate_unit),
}


def _do_units(study: Study, stage: str) -> None:
    """Do the units of a stage one after the other, or at once on a cluster."""
    units = study.list_units(stage)
    if study.cluster is None:
        for unit in _each_unit(study, stage, units):
            UNIT_WORK[stage].whole(study, unit)
        return
    left = [unit for unit in units if not _skip(study, stage, unit)]
    for unit in left:
        study.mark_begun(stage, unit)
    for molecule in study.list_molecules(stage, left):
        # Here, so that no two workers write the map of one molecule.
        _build_map(study, molecule)
    for unit in study.cluster.map_units(study, stage, left, UNIT_WORK[stage]):
        study.mark_done(stage, unit)


#: Stage name -> what runs it, in order.
STAGES: dict[str, Callable[[Study], Any]] = {
    "sample": _sample,
    "label": partial(_do_units, stage="label"),
    "reference": partial(_do_units, stage="reference"),
    "train": partial(_do_units, stage="train"),
    "export": partial(_do_units, stage="export"),
    "evaluate": _evaluate,
    "simulate": _simulate,
    "compare": _compare,
}


def _each_unit(study: Study, stage: str, units: list[str]) -> Iterator[str]:
    """The units still to do; each is marked done when the loop comes back for the next, errors name it."""
    for unit in units:
        if not _skip(study, stage, unit):
            study.mark_begun(stage, unit)
            yield unit
            study.mark_done(stage, unit)


def _skip(study: Study, stage: str, unit: str) -> bool:
    done = study.is_done(stage, unit)
    if done:
        logger.info("%s %s: done already, skipped", stage, unit)
    return done


def _build_system(study: Study, molecule: str) -> AtomisticSystem:
    """The AA system of a molecule; built once a process."""
    if molecule not in study.cache:
        settings = next(m for m in study.protocol.molecules if m.name == molecule)
        sampling = study.protocol.sampling
        logger.info("%s: building the all-atom system", molecule)
        study.cache[molecule] = build_atomistic_system(
            settings.input,
            temperature_K=study.protocol.temperature_K,
            constraints=sampling.constraints,
            name=molecule,
            base=study.base,
            flexible_beads=(lambda topology: _make_map(study, molecule, topology)) if sampling.flexible_beads else None,
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


def _check_inputs(study: Study) -> None:
    """Build every molecule that is still to sample, and its maps: what is wrong shows before hours of sampling."""
    maps: dict[str, BeadMap] = {}
    if all(study.is_done("sample", m.name) for m in study.protocol.molecules):
        return
    for molecule in study.protocol.molecules:
        if study.is_done("sample", molecule.name):
            topology = FramesStore.open(study.frames_path(molecule.name)).topology
            maps[molecule.name] = _make_map(study, molecule.name, topology)
            continue
        system = _build_system(study, molecule.name)
        bead_map = maps[molecule.name] = _make_map(study, molecule.name, system.topology)
        if (study.protocol.reference is not None and molecule in study.judged) or (
            study.protocol.labels.averaging is not None and molecule in study.trained
        ):
            find_held_atoms(system, bead_map)
        if molecule not in study.trained:
            continue
        try:
            if study.protocol.is_flattened(molecule):
                find_dihedrals(bead_map)
            build_force_map(
                "slice",
                bead_map.site_weights,
                find_rigid_clusters(system.system),
                find_active_atoms(system.system, system.topology, bead_map.site_weights),
                np.zeros((1, system.n_atoms, 3)),
            )
        except MappingError as error:
            raise MappingError(str(error), where=f"molecule {molecule.name}") from error
    check_species(maps, [m.name for m in study.trained])


def _require(study: Study, stage: str, unit: str) -> None:
    if not study.find_output(stage, unit).exists():
        raise StudyError(f"the {stage} stage of {unit} has not been run", where=study.out, hint=f"run {stage} first")


def _load_frames(study: Study, molecule: str) -> Frames:
    _require(study, "sample", molecule)
    return load_frames(study.frames_path(molecule))


def _load_labels(study: Study, molecule: str, stream: bool = False) -> LabelledFrames:
    _require(study, "label", molecule)
    return load_dataset(study.dataset_path(molecule), _build_map(study, molecule), stream=stream)


def _make_map(study: Study, molecule: str, topology: md.Topology) -> BeadMap:
    beads = study.protocol.mapping.beads
    try:
        if isinstance(beads, dict):
            return BeadMap.load(study.base / beads["json"], topology.n_atoms)
        return build_bead_map(beads, topology, **study.protocol.mapping.naming)
    except HVPCGError as error:
        raise type(error)(str(error), where=f"molecule {molecule}") from error


def _build_map(study: Study, molecule: str) -> BeadMap:
    """The bead map of a molecule; it is written beside the data, with the first frame as a CG PDB."""
    _require(study, "sample", molecule)
    store = FramesStore.open(study.frames_path(molecule))
    bead_map = _make_map(study, molecule, store.topology)
    path = study.map_path(molecule)
    if not path.exists() or BeadMap.load(path).hash != bead_map.hash:
        first = bead_map.map_positions(store.read().positions[0])
        bead_map.save_pdb(path.with_suffix(".pdb"), first)
        bead_map.save(path)
    return bead_map


def _show(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _add_time(study: Study, stage: str, seconds: float) -> None:
    """Wall time by stage, summed over resumed runs."""
    times = read_times(study)
    times[stage] = round(times.get(stage, 0.0) + seconds, 2)
    write_json(study.out / TIMES, times)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Add the package's log to a file while a stage runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("openmm_hvpcg")
    package.addHandler(handler)
    try:
        yield
    except HVPCGError as error:
        # The command line shows it; the file is what is left afterwards.
        handler.handle(logging.makeLogRecord({"name": __name__, "levelname": "ERROR", "msg": str(error)}))
        raise
    finally:
        package.removeHandler(handler)
        handler.close()
