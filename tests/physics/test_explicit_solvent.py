"""Labels of a molecule in a box of water: the whole system's forces, wherever the box cuts the molecules."""

from __future__ import annotations

import logging
from pathlib import Path

import mdtraj as md
import numpy as np
import openmm
import pytest
import zarr
from openmm import unit

from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.atomistic.trajectories import import_trajectory
from openmm_hvpcg.config import InputSettings, LabelSettings
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.labels.label import label_frames
from openmm_hvpcg.training.labels.oracle import ForceOracle

SETTINGS = LabelSettings(force_map="harmonic", probes_per_frame=2, platform="CPU", workers=1, step_nm=1e-3, seed=7)
#: In double: at a distance of exactly the cutoff single precision decides whether a pair counts, and a step over it is
#: 100 kJ/mol/nm^2 of an HVP.
EXACT_SETTINGS = SETTINGS.model_copy(update={"platform": "Reference"})
N_FRAMES = 4
#: Multiples of this are exact in single precision up to 8 nm, and so are their sums.
GRID_NM = 2.0**-20


@pytest.fixture(scope="module")
def dipeptide() -> AtomisticSystem:
    settings = InputSettings(sequence="A", solvent="explicit", padding_nm=0.8, hydrogen_mass_amu=1.5)
    return build_atomistic_system(settings, temperature_K=300.0, name="ala")


@pytest.fixture(scope="module")
def bead_map(dipeptide: AtomisticSystem) -> BeadMap:
    return build_bead_map("backbone", dipeptide.topology)


def round_to_grid(values: np.ndarray) -> np.ndarray:
    return np.round(values / GRID_NM) * GRID_NM


@pytest.fixture(scope="module")
def trajectories(dipeptide: AtomisticSystem, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few frames of dynamics as they are; and moved by half a box, every atom wrapped into it by itself.

    Both files hold the same distances to the bit: all coordinates are multiples of a grid.
    """
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(dipeptide.system, integrator, openmm.Platform.getPlatformByName("CPU"))
    context.setPositions(dipeptide.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 100.0, 100)
    positions = np.empty((N_FRAMES, dipeptide.n_atoms, 3))
    for frame in positions:
        integrator.step(50)
        frame[:] = context.getState(getPositions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    assert dipeptide.box is not None
    edges = round_to_grid(np.diag(dipeptide.box))
    np.testing.assert_allclose(dipeptide.box, np.diag(edges), atol=GRID_NM)
    positions = round_to_grid(positions)
    # Half a box from the molecule's middle: whatever its place, the faces go through it.
    moved = positions - round_to_grid(positions[:, :22].mean(axis=1, keepdims=True))
    folder = tmp_path_factory.mktemp("water")
    files = {}
    for name, values in (("whole", positions), ("broken", moved - edges * np.floor(moved / edges))):
        trajectory = md.Trajectory(values, dipeptide.topology)
        trajectory.unitcell_vectors = np.repeat(np.diag(edges)[None], N_FRAMES, axis=0)
        files[name] = folder / f"{name}.trr"
        trajectory.save(str(files[name]))
    return files


@pytest.fixture(scope="module")
def labelled(
    dipeptide: AtomisticSystem, bead_map: BeadMap, trajectories: dict[str, Path]
) -> dict[str, tuple[Frames, LabelledFrames, Path]]:
    found = {}
    for name, file in trajectories.items():
        store = import_trajectory(dipeptide, [file], file.with_suffix(".zarr"), interval_ps=1.0, temperature_K=300.0)
        path = file.with_suffix(".labels")
        frames = store.read()
        found[name] = frames, label_frames(dipeptide, frames, bead_map, EXACT_SETTINGS, path, progress=False), path
    return found


def test_the_box_cuts_the_molecule(dipeptide: AtomisticSystem, trajectories: dict[str, Path]) -> None:
    """Otherwise the next test would not test anything."""
    broken = md.load(str(trajectories["broken"]), top=dipeptide.topology)
    solute = [(a.index, b.index) for a, b in dipeptide.topology.bonds if a.residue.name != "HOH"]
    assert dipeptide.topology.n_residues > 400
    assert (md.compute_distances(broken, solute, periodic=False).max(axis=1) > 1.0).all()


def test_labels_do_not_see_where_the_box_cuts(labelled: dict[str, tuple[Frames, LabelledFrames, Path]]) -> None:
    whole, broken = labelled["whole"][1], labelled["broken"][1]
    # What is left is the labels' own single precision, 1e-7 of forces and HVPs, and rounding in double of wrapped
    # distances.
    np.testing.assert_allclose(broken.positions, whole.positions, atol=1e-6)
    np.testing.assert_array_equal(broken.probes, whole.probes)
    np.testing.assert_allclose(broken.forces, whole.forces, rtol=1e-5, atol=1e-3)
    assert np.sqrt((whole.forces**2).mean()) > 100.0
    np.testing.assert_allclose(broken.hvps, whole.hvps, rtol=1e-5, atol=1.0)
    assert np.sqrt((whole.hvps**2).mean()) > 1e5


def test_labels_are_forces_of_the_whole_system(
    dipeptide: AtomisticSystem, labelled: dict[str, tuple[Frames, LabelledFrames, Path]]
) -> None:
    frames, data, path = labelled["broken"]
    assert frames.n_atoms == dipeptide.n_atoms
    assert frames.box is not None
    group = zarr.open_group(str(path), mode="r")
    maps, fold = np.asarray(group["fold_force_maps"]), np.asarray(group["fold"])
    with ForceOracle(dipeptide.system, "Reference") as oracle:
        forces = oracle(frames.positions[:1].astype(np.float64), frames.box[:1])
    # Labels are kept in single precision.
    np.testing.assert_allclose(data.forces[0], maps[fold[0]] @ forces[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("method", ["slice", "harmonic", "optimal", "optimal_cv"])
def test_no_force_map_weighs_solvent(
    dipeptide: AtomisticSystem,
    bead_map: BeadMap,
    labelled: dict[str, tuple[Frames, LabelledFrames, Path]],
    method: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = SETTINGS.model_copy(update={"force_map": method, "probes_per_frame": 1})
    with caplog.at_level(logging.INFO):
        data = label_frames(dipeptide, labelled["whole"][0], bead_map, settings, tmp_path / "x.zarr", progress=False)
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="r")
    solvent = [a.index for a in dipeptide.topology.atoms if a.residue.name in ("HOH", "NA", "CL")]
    assert len(solvent) > 1200
    for name in ("force_map", "fold_force_maps"):
        weights = np.asarray(group[name])
        assert not weights[..., solvent].any()
        np.testing.assert_allclose(weights @ bead_map.site_weights.T - np.eye(bead_map.n_beads), 0, atol=1e-9)
    # What it costs is said before, and kept.
    assert f"{dipeptide.n_atoms} atoms (22 in molecules with beads" in caplog.text
    assert f"{N_FRAMES * 3} force calls of all at" in caplog.text
    cost = data.attributes["cost"]
    assert cost["atoms"] == dipeptide.n_atoms
    assert cost["estimated_s"] == pytest.approx(N_FRAMES * 3 / cost["force_calls_per_second"])
