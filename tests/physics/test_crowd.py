"""Molecules of a crowd do not feel each other: forces, HVPs and distributions are those of each alone."""

from __future__ import annotations

import functools

import numpy as np
import openmm
import pytest
from openmm import unit

from openmm_hvpcg.atomistic.crowd import DRIFT_NM, Crowd, build_crowd
from openmm_hvpcg.atomistic.molecule import AtomisticSystem
from openmm_hvpcg.atomistic.systems import build_atomistic_system
from openmm_hvpcg.config import InputSettings
from openmm_hvpcg.errors import InputError, UnstableSimulationError
from openmm_hvpcg.training.labels.oracle import CROWD_ATOMS, ForceOracle, count_copies

SEQUENCES = ("G", "CP", "G", "AWK")


@functools.cache
def build(sequence: str, solvent: str = "obc2") -> AtomisticSystem:
    return build_atomistic_system(InputSettings(sequence=sequence, solvent=solvent), temperature_K=300.0, name=sequence)


def add_cmap(system: openmm.System) -> openmm.System:
    """The same with a torsion-torsion map over its first five atoms."""
    richer = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    force = openmm.CMAPTorsionForce()
    angles = np.arange(6) * np.pi / 3
    force.addMap(6, (5.0 * np.cos(angles)[:, None] * np.sin(angles)[None]).ravel().tolist())
    force.addTorsion(0, 0, 1, 2, 3, 1, 2, 3, 4)
    richer.addForce(force)
    return richer


def compute_forces(system: openmm.System, positions: np.ndarray) -> np.ndarray:
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions)
    forces = context.getState(getForces=True).getForces(asNumpy=True)
    return np.asarray(forces.value_in_unit(unit.kilojoule_per_mole / unit.nanometer))


@pytest.mark.parametrize("solvent", ["obc2", "vacuum"])
def test_forces_are_those_of_each_molecule_alone(solvent: str) -> None:
    """No cutoff within, nothing between; proline and cysteine bring other bonded terms."""
    molecules = [build(s, solvent) for s in SEQUENCES]
    systems = [add_cmap(m.system) for m in molecules]
    crowd = build_crowd(systems)
    rng = np.random.default_rng(1)
    positions = [m.positions + 0.003 * rng.standard_normal(m.positions.shape) for m in molecules]
    together = crowd.split(compute_forces(crowd.system, crowd.place(positions)))
    for system, x, forces in zip(systems, positions, together, strict=True):
        alone = compute_forces(system, x)
        # Double precision: coordinates of tens of nm have lost two of 16 digits, forces of stiff bonds 1e5 times those.
        np.testing.assert_allclose(forces, alone, atol=1e-6 * np.abs(alone).max())


def test_labels_of_many_configurations_at_once_are_those_of_one_at_a_time() -> None:
    """Also where the last call has fewer configurations than copies, and with two Contexts."""
    molecule = build("AWK")
    rng = np.random.default_rng(2)
    positions = molecule.positions + 0.003 * rng.standard_normal((9, *molecule.positions.shape))
    with (
        ForceOracle(molecule.system, "Reference") as one,
        ForceOracle(molecule.system, "Reference", workers=2, copies=2) as many,
    ):
        assert many.n_copies == 2
        expected = one(positions)
        # As above; a finite difference over 1e-4 nm keeps four digits of HVPs fewer, far below the noise of labels.
        np.testing.assert_allclose(many(positions), expected, atol=1e-6 * np.abs(expected).max())


def test_copies_are_for_small_molecules_on_a_gpu() -> None:
    system = build("AWK").system
    assert count_copies(system, "CUDA") == CROWD_ATOMS // system.getNumParticles()
    assert count_copies(system, "CPU") == 1
    held = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    held.addForce(openmm.CustomExternalForce("x^2"))
    assert count_copies(held, "CUDA") == 1


def test_a_stretched_molecule_is_not_cut() -> None:
    """The cutoff is longer than the molecule with all bonds in one line: the farthest pair still repels."""
    system = build("AWK").system
    crowd = build_crowd([system, system])
    assert (
        crowd.cutoff_nm
        > 1.5 * np.linalg.norm(build("AWK").positions[:, None] - build("AWK").positions[None], axis=-1).max()
    )


def test_place_and_split_give_positions_back() -> None:
    molecules = [build(s) for s in SEQUENCES]
    crowd = build_crowd([m.system for m in molecules])
    parts = crowd.split(crowd.place([m.positions for m in molecules]))
    for molecule, place, x in zip(molecules, crowd.places, parts, strict=True):
        np.testing.assert_allclose(x.mean(axis=0), place, atol=1e-9)
        np.testing.assert_allclose(x - place, molecule.positions - molecule.positions.mean(axis=0), atol=1e-9)


def make_pair() -> tuple[Crowd, np.ndarray]:
    molecule = build("G")
    crowd = build_crowd([molecule.system] * 2)
    return crowd, crowd.place([molecule.positions] * 2)


def test_drift_is_noticed_before_it_matters() -> None:
    crowd, positions = make_pair()
    shift = np.zeros_like(positions)
    half = crowd.offsets[1]
    assert not crowd.find_drifted(positions)
    towards = (crowd.places[1] - crowd.places[0]) / np.linalg.norm(crowd.places[1] - crowd.places[0])
    shift[:half] = 1.1 * DRIFT_NM * towards
    assert crowd.find_drifted(positions + shift)
    with pytest.raises(UnstableSimulationError, match="within the cutoff of each other"):
        crowd.find_drifted(positions + 3.5 * shift)


def test_blow_ups_are_noticed() -> None:
    crowd, positions = make_pair()
    torn = positions.copy()
    torn[0] += crowd.cutoff_nm
    with pytest.raises(UnstableSimulationError, match="longer than the cutoff"):
        crowd.find_drifted(torn)
    torn[0] = np.nan
    with pytest.raises(UnstableSimulationError, match="NaN"):
        crowd.find_drifted(torn)


def test_what_cannot_be_joined_is_refused_by_name() -> None:
    water = openmm.System()
    water.addParticle(16.0)
    water.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    with pytest.raises(InputError, match="MonteCarloBarostat cannot be shared"):
        build_crowd([water])
    with pytest.raises(InputError, match="at least one molecule"):
        build_crowd([])
    pieces = openmm.System()
    for _ in range(2):
        pieces.addParticle(1.0)
    pieces.addForce(openmm.NonbondedForce())
    with pytest.raises(InputError, match="one piece"):
        build_crowd([pieces])
    with pytest.raises(InputError, match="GBSAOBCForce is a force of some molecules"):
        build_crowd([build("G").system, build("G", "vacuum").system])
    cut = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(build("G").system))
    next(f for f in cut.getForces() if isinstance(f, openmm.NonbondedForce)).setNonbondedMethod(
        openmm.NonbondedForce.CutoffNonPeriodic
    )
    with pytest.raises(InputError, match="has a cutoff"):
        build_crowd([cut, cut])
