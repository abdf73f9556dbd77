"""Beads on C-beta and on the caps: labels and priors of built peptides against what is known of their geometry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openmm
import pytest
import zarr

from openmm_hvpcg.atomistic.sampling import sample_frames
from openmm_hvpcg.atomistic.systems import AtomisticSystem, build_atomistic_system
from openmm_hvpcg.config import InputSettings, LabelSettings, PriorSettings, SamplingSettings
from openmm_hvpcg.frames import Frames
from openmm_hvpcg.mapping import BeadMap, build_bead_map
from openmm_hvpcg.prior_terms import PriorParameters, assign_prior_terms
from openmm_hvpcg.training.dataset import LabelledFrames
from openmm_hvpcg.training.fit_priors import fit_priors
from openmm_hvpcg.training.labels.label import label_frames

SAMPLING = SamplingSettings(
    n_frames=60, walkers=2, stride=50, equilibration_steps=200, constraints="hbonds", platform="Reference"
)
LABELS = LabelSettings(probes_per_frame=1, platform="Reference", workers=1, step_nm=1e-4)

#: A C-C bond is 0.153 nm, and CA to CA across a trans peptide bond 0.38 nm (cis 0.29). The second depends on the
#: angles at C and N, whose rest values in the force field are up to 3 degrees wider at proline's N: 0.01 nm.
TOLERANCE_NM = 0.013


@pytest.fixture(scope="module")
def peptide(tmp_path_factory: pytest.TempPathFactory) -> tuple[AtomisticSystem, Frames]:
    """ACE-ALA-VAL-PRO-GLY-NME with rigid bonds to hydrogen."""
    system = build_atomistic_system(
        InputSettings(sequence="AVPG", solvent="vacuum"), temperature_K=300.0, constraints="hbonds", name="avpg"
    )
    path = tmp_path_factory.mktemp("peptide") / "frames.zarr"
    return system, sample_frames(system, SAMPLING, path, progress=False).read()


def label(
    peptide: tuple[AtomisticSystem, Frames], beads: str, folder: Path
) -> tuple[BeadMap, LabelledFrames, PriorParameters]:
    system, frames = peptide
    bead_map = build_bead_map(beads, system.topology)
    data = label_frames(system, frames, bead_map, LABELS, folder / "labels.zarr", progress=False)
    return bead_map, data, fit_priors([(bead_map, data.positions)], PriorSettings(), 300.0)


def check_labels(system: openmm.System, bead_map: BeadMap, data: LabelledFrames, path: Path) -> None:
    """The force map inverts the bead map and takes nothing from forces along constraints."""
    assert np.isfinite(data.forces).all()
    assert np.isfinite(data.hvps).all()
    maps = np.asarray(zarr.open_group(str(path), mode="r")["fold_force_maps"])
    unit = np.broadcast_to(np.eye(bead_map.n_beads), (len(maps), bead_map.n_beads, bead_map.n_beads))
    np.testing.assert_allclose(maps @ bead_map.site_weights.T, unit, atol=1e-9)  # weights come from a linear solve
    constraints = [system.getConstraintParameters(k)[:2] for k in range(system.getNumConstraints())]
    assert constraints
    for i, j in constraints:
        np.testing.assert_allclose(maps[:, :, i], maps[:, :, j], atol=1e-9)


def test_beta_carbons(peptide: tuple[AtomisticSystem, Frames], tmp_path: Path) -> None:
    bead_map, data, priors = label(peptide, "ca+cb", tmp_path)
    check_labels(peptide[0].system, bead_map, data, tmp_path / "labels.zarr")
    for key, length in (("*:CA|*:CB", 0.153), ("PRO:CA|PRO:CB", 0.153), ("*:CA|*:CA", 0.38), ("PRO:CA|VAL:CA", 0.38)):
        assert priors.bonds[key][1] == pytest.approx(length, abs=TOLERANCE_NM), key
    # L residues by the CORN rule: with H towards the eye CO, R and N go clockwise, so that (N, R, CO) turns left.
    own = {key.split("|")[0]: row[1] for key, row in priors.impropers.items() if not key.startswith("*")}
    assert set(own) == {"VAL:CA", "PRO:CA"}
    shared = priors.impropers["*:CA|*:CA|*:CB|*:CA"][1]
    assert max(*own.values(), shared) < -0.2


def test_caps(peptide: tuple[AtomisticSystem, Frames], tmp_path: Path) -> None:
    bead_map, data, priors = label(peptide, "ca+caps", tmp_path)
    check_labels(peptide[0].system, bead_map, data, tmp_path / "labels.zarr")
    assert bead_map.species == ("ACE", "ALA", "VAL", "PRO", "GLY", "NME")
    for key in ("ACE|ALA", "ALA|VAL", "PRO|VAL", "GLY|PRO", "GLY|NME"):
        assert priors.bonds[key][1] == pytest.approx(0.38, abs=TOLERANCE_NM), key
    terms = assign_prior_terms(priors, bead_map.species, bead_map.bonds)
    assert [len(terms.bonds), len(terms.angles), len(terms.dihedrals)] == [5, 4, 3]


def test_a_peptide_of_two_residues_has_a_dihedral_with_caps_only() -> None:
    system = build_atomistic_system(InputSettings(sequence="AG", solvent="vacuum"), temperature_K=300.0, name="ag")
    for beads, n_dihedrals in (("ca", 0), ("ca+caps", 1), ("ca+cb", 0)):
        bead_map = build_bead_map(beads, system.topology)
        positions = np.repeat(bead_map.map_positions(system.positions)[None], 20, axis=0)
        priors = fit_priors([(bead_map, positions)], PriorSettings(), 300.0)
        assert len(assign_prior_terms(priors, bead_map.species, bead_map.bonds).dihedrals) == n_dihedrals


def test_impropers_of_two_peptides_are_shared_by_their_centre(
    peptide: tuple[AtomisticSystem, Frames],
) -> None:
    system, frames = peptide
    bead_map = build_bead_map("ca+cb", system.topology)
    positions = bead_map.map_positions(frames.positions)
    found = fit_priors([(bead_map, positions)] * 2, PriorSettings(), 300.0)
    kinds = "*:CA|*:CB|*:CA"
    assert set(found.impropers) == {f"VAL:CA|{kinds}", f"PRO:CA|{kinds}", f"*:CA|{kinds}", "*"}
    # Up to three bonds nothing repels, so no CA and CA of four residues do.
    assert set(found.repulsion) == {"*:CA|*:CB", "*:CB|*:CB", "*"}
    assert "VAL:CA|VAL:CB" in found.bonds
