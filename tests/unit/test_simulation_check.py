"""check_potential passes what is sound and names what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simulation_cases import (
    BONDS,
    BRANCHED,
    build_eager,
    build_frames,
    build_molecule,
    build_priors,
    script_potential,
)

from openmm_hvpcg.errors import BackendError, InputError, PotentialError
from openmm_hvpcg.simulation.check import check_potential
from openmm_hvpcg.simulation.system import CGPotential
from openmm_hvpcg.training.models.total import TotalEnergy


def test_sound_potential_passes() -> None:
    eager, spec = build_eager(build_molecule(BRANCHED, BONDS), build_priors())
    check = check_potential(CGPotential(script_potential(eager), spec), build_frames(5), eager=eager)
    check.raise_if_failed()
    names = " ".join(item.name for item in check.items)
    for word in (
        "eager",
        "finite differences",
        "translation",
        "rotation",
        "permutation",
        "torchforce",
        "pythonforce",
    ):
        assert word in names
    assert all(item.reason for item in check.items)


def test_wrong_eager_module_is_found() -> None:
    eager, spec = build_eager(build_molecule(BRANCHED, BONDS), build_priors())
    potential = CGPotential(script_potential(eager), spec)
    check = check_potential(potential, build_frames(2), eager=lambda x: 1.001 * eager(x))
    with pytest.raises(PotentialError, match="scripted against eager"):
        check.raise_if_failed("potential.pt")


class Broken(TotalEnergy):
    """Sound but for one flaw, added to the energy."""

    def __init__(self, network: torch.nn.Module, spec: object, flaw: int) -> None:
        super().__init__(network, spec)  # type: ignore[arg-type]
        self.flaw = flaw

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        frames = positions.reshape(-1, self.species.shape[0], 3)
        energy = self.frame_energies(frames)
        if self.flaw == 0:  # feels where the molecule is
            energy = energy + positions[:, 0].sum() ** 2
        if self.flaw == 1:  # feels how it is turned
            energy = energy + 10.0 * ((frames[:, 0, 0] - frames[:, 1, 0]) * 10.0) ** 2
        if self.flaw == 2:  # tells copies apart
            weight = torch.arange(1, frames.shape[0] + 1, device=positions.device, dtype=positions.dtype)
            energy = energy * weight
        if self.flaw == 3:  # forces that are not the gradient
            energy = energy + (frames - frames.detach()).pow(1).sum() * 5.0
        if self.flaw == 4:
            energy = energy / 0.0
        return energy.sum()


@pytest.mark.parametrize(
    ("flaw", "word"),
    [(0, "translation"), (1, "rotation"), (2, "permutation"), (3, "finite differences"), (4, "not finite")],
)
def test_each_flaw_is_named(flaw: int, word: str) -> None:
    eager, spec = build_eager(build_molecule(BRANCHED, BONDS), build_priors())
    potential = CGPotential(script_potential(Broken(eager.network, spec, flaw)), spec)
    check = check_potential(potential, build_frames(3), backend="pythonforce")
    assert not check.passed
    with pytest.raises(PotentialError, match=word):
        check.raise_if_failed()


def test_spec_with_other_priors_than_the_script_is_found() -> None:
    eager, _ = build_eager(build_molecule(BRANCHED, BONDS), build_priors())
    _, other = build_eager(build_molecule(BRANCHED, BONDS), build_priors(bond_k=1600.0))
    check = check_potential(CGPotential(script_potential(eager), other), build_frames(3), backend="pythonforce")
    with pytest.raises(PotentialError, match="native against torch priors"):
        check.raise_if_failed()


def test_refused_input() -> None:
    eager, spec = build_eager(build_molecule(BRANCHED, BONDS), build_priors())
    potential = CGPotential(script_potential(eager), spec)
    with pytest.raises(InputError, match="test frames"):
        check_potential(potential, np.zeros((2, 5, 3)))
    with pytest.raises(InputError, match="NaN"):
        check_potential(potential, np.full((2, 6, 3), np.nan))
    with pytest.raises(BackendError):
        check_potential(potential, build_frames(1), backend="nonsense")
