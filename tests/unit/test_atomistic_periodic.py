"""Molecules put where float32 can hold them."""

from __future__ import annotations

import numpy as np

from openmm_hvpcg.atomistic.periodic import label_molecules, recentre, wrap_molecules

#: A triclinic box in OpenMM's reduced form.
BOX = np.array([[3.0, 0.0, 0.0], [0.5, 2.8, 0.0], [-0.7, 0.9, 2.5]])


def test_recentre_keeps_shape() -> None:
    positions = np.random.default_rng(0).normal(size=(4, 7, 3)) + 50.0
    centred = recentre(positions)
    # 50 nm in double precision is known to 1e-14.
    np.testing.assert_allclose(centred.mean(axis=1), 0.0, atol=1e-12)
    np.testing.assert_allclose(np.diff(centred, axis=1), np.diff(positions, axis=1), atol=1e-12)


def test_label_molecules() -> None:
    np.testing.assert_array_equal(label_molecules(7, [(5, 2), (2, 0), (3, 6)]), [0, 1, 0, 2, 3, 0, 2])


def test_wrap_undoes_any_box_shift() -> None:
    rng = np.random.default_rng(1)
    molecules = np.repeat(np.arange(30), 3)
    # Near the first molecule: the nearest image is then the molecule itself.
    positions = np.repeat(rng.uniform(-0.6, 0.6, size=(30, 3)), 3, axis=0) + rng.normal(scale=0.05, size=(90, 3))
    shifts = rng.integers(-4, 5, size=(30, 3)) @ BOX
    wrapped = wrap_molecules(positions + shifts[molecules], BOX, molecules)
    expected = positions - positions[molecules == 0].mean(axis=0) + BOX.sum(axis=0) / 2
    np.testing.assert_allclose(wrapped, expected, atol=1e-12)
