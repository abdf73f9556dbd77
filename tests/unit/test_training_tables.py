"""Networks with splines for filters, forces written out and lists of near pairs, against the networks they are of."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.errors import InputError, PotentialError
from openmm_hvpcg.mapping import BeadMap
from openmm_hvpcg.potential import PotentialSpec, bind_molecule, load_potential
from openmm_hvpcg.prior_terms import PriorParameters, list_rows
from openmm_hvpcg.simulation.backends import evaluate_script
from openmm_hvpcg.simulation.system import CGPotential
from openmm_hvpcg.training import tabulation
from openmm_hvpcg.training.derivatives import compute_forces
from openmm_hvpcg.training.export import export_potential, script_network
from openmm_hvpcg.training.models import neighbours
from openmm_hvpcg.training.models.explicit_torsions import ExplicitTorsions
from openmm_hvpcg.training.models.neighbours import PairList, find_pairs_dense, find_pairs_in_cells
from openmm_hvpcg.training.models.registry import build_network
from openmm_hvpcg.training.models.spline import RadialTable, fit_spline
from openmm_hvpcg.training.models.tabulated import TabulatedSchNet
from openmm_hvpcg.training.models.torsions import Bonded, TorsionEnergy, bind_network
from openmm_hvpcg.training.tabulation import TABLE_TOLERANCE, tabulate_network

CUTOFF = 0.9
PRIORS = PriorParameters(
    {"*": (1500.0, 0.35)}, {"*": (50.0, -0.4)}, {"*": (1.0, 0.5, 0.2, 0.1, 0.3, 0.4)}, {}, {"*": (0.3,)}, 2.5
)


def build_map(n_beads: int, species: str = "ABC") -> BeadMap:
    kinds = tuple((species * n_beads)[:n_beads])
    bonds = np.array([[i, i + 1] for i in range(n_beads - 1)])
    names = tuple(f"X{b}" for b in range(n_beads))
    return BeadMap(
        np.eye(n_beads), kinds, np.full(n_beads, 15.0), bonds, names, tuple(("CG", b, 0) for b in range(n_beads))
    )


def build_trained(kind: str = "schnet", **options: Any) -> torch.nn.Module:
    """A network as training might leave it: all weights away from where they start."""
    values = {"kind": kind, "features": 16, "radial": 16, "cutoff_nm": CUTOFF, "torsions": False, **options}
    torch.manual_seed(4)
    network = build_network(3, ModelSettings.model_validate(values), 25.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network.eval()


def build_spec(n_beads: int) -> PotentialSpec:
    masses = dict.fromkeys("ABC", 15.0)
    return PotentialSpec(tuple("ABC"), build_map(n_beads), {}, masses, PRIORS, CUTOFF, 300.0)


def sample_globule(n_beads: int, n_frames: int = 1, seed: int = 0) -> np.ndarray:
    """Frames (T, B, 3) nm of beads on a jittered lattice, in a ball with the density of a protein's residues."""
    rng = np.random.default_rng(seed)
    n = int(np.ceil((2 * n_beads) ** (1 / 3))) + 1
    grid = 0.42 * (np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3) - (n - 1) / 2)
    ball = grid[np.argsort((grid**2).sum(1), kind="stable")[:n_beads]]
    return ball + 0.04 * rng.normal(size=(n_frames, n_beads, 3))


def compute_exact(
    network: torch.nn.Module, frames: np.ndarray, species: torch.Tensor, bead_map: BeadMap | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Energies and forces of the network itself in float64, by automatic differentiation."""
    bonded = Bonded.find(build_map(frames.shape[1]) if bead_map is None else bead_map)
    energy, x = bind_network(copy.deepcopy(network).double(), species, bonded), torch.from_numpy(frames)
    return energy(x).detach().numpy(), compute_forces(energy, x).numpy()


def test_spline_follows_a_function_and_its_slope() -> None:
    def function(r: np.ndarray) -> np.ndarray:
        return np.stack((np.sin(9 * r), np.exp(-3 * r)), 1) * np.clip(1 - (r / CUTOFF) ** 2, 0, None)[:, None] ** 3

    table = RadialTable(fit_spline(function, CUTOFF, 320), CUTOFF, 320).double()
    r = np.linspace(0, 1.2 * CUTOFF, 4001)
    values, slopes = table(torch.from_numpy(r))
    # Coefficients are stored in float32, 6e-8 of order one; slopes suffer from that over an interval of 0.0031 nm.
    np.testing.assert_allclose(values, function(r), atol=1e-7)
    h = 1e-5
    # The differences are across the cutoff, or across 0, at some points.
    exact = (function(r + h) - function(r - h)) / (2 * h)
    np.testing.assert_allclose(slopes[1:], exact[1:], atol=1e-7 / 0.0031)
    # The slopes are those of the spline itself.
    x = torch.from_numpy(r)
    found = (table(x + h)[0] - table(x - h)[0]) / (2 * h)
    # 1e-5^2 / 6 of a third derivative of up to 1e3, and rounding, 1e-16 over the step.
    torch.testing.assert_close(slopes[1:], found[1:], rtol=0, atol=1e-7)


def test_spline_is_zero_beyond_the_cutoff_and_for_what_is_not_a_number() -> None:
    table = RadialTable(fit_spline(lambda r: ((CUTOFF - r) ** 3)[:, None], CUTOFF, 64), CUTOFF, 64)
    outside = torch.tensor([CUTOFF, 1.01 * CUTOFF, 50.0, float("inf"), float("nan")])
    for found in table(outside):
        assert torch.equal(found, torch.zeros(5, 1))
    assert float(table(torch.tensor([0.99 * CUTOFF]))[0].abs()) > 0


CLOUDS = {
    "globules": sample_globule(120, 3),
    "far apart": 5.0 * np.random.default_rng(1).normal(size=(2, 60, 3)),
    "a line": np.arange(90)[None, :, None] * np.array([0.3, 0.0, 0.0]),
    "on top of each other": np.zeros((2, 7, 3)),
    "one bead": np.zeros((3, 1, 3)),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_both_searches_find_every_near_pair_in_order(name: str) -> None:
    x, reach = CLOUDS[name], 1.0
    n_beads = x.shape[1]
    distances = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    expected = [
        (k * n_beads + i, k * n_beads + j)
        for k in range(len(x))
        for i, j in zip(*np.nonzero(np.triu(distances[k] < reach, 1)), strict=True)
    ]
    for find in (find_pairs_dense, find_pairs_in_cells):
        found = find(torch.from_numpy(x), reach)
        assert list(zip(*found.tolist(), strict=True)) == expected


def test_sums_over_the_pairs_of_each_bead() -> None:
    """Three copies make a group of two and one of the third; each has blocks of its own."""
    n_beads = 150
    pairs = PairList(CUTOFF, 0.1)
    x = torch.from_numpy(sample_globule(n_beads, 3).reshape(-1, 3))
    pairs.update(x, n_beads)
    assert pairs.group_bounds == [0, 300, 450]
    counts = []
    for group, n in enumerate((300, 150)):
        blocks = pairs.list_blocks(group)
        assert len(blocks) > 1
        sums = [neighbours.sum_by_bead(b, torch.ones(len(b.pairs), 1)) for b in blocks]
        counts.append(neighbours.add_up(sums, blocks, n, 1))
    distances = torch.cdist(x.view(3, n_beads, 3), x.view(3, n_beads, 3))
    assert torch.equal(torch.cat(counts).flatten(), ((distances < CUTOFF + 0.1).sum(2) - 1).flatten().float())


@pytest.mark.parametrize("options", [{}, {"chiral_channels": 4}, {"interactions": 1}, {"interactions": 3}], ids=str)
@pytest.mark.parametrize(("n_beads", "n_copies"), [(2, 1), (6, 5), (50, 2), (300, 1), (150, 3)])
def test_equals_the_network(options: dict[str, int], n_beads: int, n_copies: int) -> None:
    """In float64, so that what is left is the spline; all pairs, a list, cells; one block and many."""
    network = build_trained(**options)
    frames = sample_globule(n_beads, n_copies)
    species = torch.from_numpy(build_spec(n_beads).compute_species_index())
    energies, forces = compute_exact(network, frames, species)
    table = TabulatedSchNet(network, 320, 0.1).double()
    with torch.no_grad():
        found, gradient = table(torch.from_numpy(frames.reshape(-1, 3)), species)
    # The largest error, where TABLE_TOLERANCE bounds the root mean square one. Forces of one pair alone may be small.
    largest = np.abs(gradient.numpy().reshape(forces.shape) + forces).max()
    assert largest < TABLE_TOLERANCE * max(forces.std(), 5.0)
    np.testing.assert_allclose(found, energies, atol=TABLE_TOLERANCE * n_beads * 0.1)


def test_list_does_not_show_in_the_result() -> None:
    """Beads wander off by far more than the skin; the list that was kept gives what a new one does, to the last bit."""
    network, spec = build_trained(), build_spec(180)
    species = torch.from_numpy(spec.compute_species_index())
    kept = TabulatedSchNet(network, 256, 0.1)
    generator = torch.Generator().manual_seed(3)
    x = torch.from_numpy(sample_globule(180, 2).reshape(-1, 3))
    builds = 0
    with torch.no_grad():
        for _ in range(25):
            x = x + 0.012 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            before = kept.pair_list.reference
            energies, gradient = kept(x, species)
            builds += kept.pair_list.reference is not before
            fresh_energies, fresh_gradient = TabulatedSchNet(network, 256, 0.1)(x, species)
            assert torch.equal(energies, fresh_energies)
            assert torch.equal(gradient, fresh_gradient)
    assert 3 < builds < 25


def test_knows_left_from_right() -> None:
    network, frames = build_trained(chiral_channels=4), sample_globule(8)
    species = torch.from_numpy(build_spec(8).compute_species_index())
    table = TabulatedSchNet(network, 320, 0.1)
    with torch.no_grad():
        one, other = (float(table(torch.from_numpy(sign * frames[0]), species)[0]) for sign in (1, -1))
    exact, mirrored = (float(compute_exact(network, sign * frames, species)[0][0]) for sign in (1, -1))
    assert abs(exact - mirrored) > 1e-2
    # Energies of some hundred kJ/mol in float32.
    assert one - other == pytest.approx(exact - mirrored, abs=1e-3)


@pytest.mark.parametrize("n_copies", [1, 3])
@pytest.mark.parametrize("shape", ["a chain", "a tree", "four", "three"])
def test_dihedrals_equal_their_network(shape: str, n_copies: int) -> None:
    n_beads = {"four": 4, "three": 3}.get(shape, 15)
    bonds = np.array([[i, i + 1] for i in range(n_beads - 1)])
    if shape == "a tree":
        bonds[-4:, 0] = [2, 5, 5, 12]
    torch.manual_seed(2)
    network = TorsionEnergy(3, 16, 10.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    rows = [torch.from_numpy(list_rows(bonds, n_beads, length)) for length in (4, 5)]
    species = torch.arange(n_beads) % 3
    x = torch.cumsum(0.3 * torch.randn(n_copies, n_beads, 3, dtype=torch.float64), dim=1)
    exact = copy.deepcopy(network).double()
    # The cast to float32 and back rounds the scaled weights, 6e-8 of energies of some ten kJ/mol a row.
    explicit = torch.jit.freeze(script_network(ExplicitTorsions(network).double()))
    with torch.no_grad():
        energies, gradient = explicit(x.reshape(-1, 3), species, *rows)
    np.testing.assert_allclose(energies, exact(x, species, *rows).detach(), rtol=1e-6, atol=1e-5)
    if len(rows[0]):
        forces = compute_forces(lambda y: exact(y, species, *rows), x)
        torch.testing.assert_close(gradient.view(x.shape), -forces, rtol=0, atol=1e-6 * float(forces.std()))
    else:
        assert not gradient.any()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, PotentialSpec, Path]:
    network, spec = build_trained(chiral_channels=2, torsions=True), build_spec(40)
    path = tmp_path_factory.mktemp("tables") / "potential.pt"
    check = export_potential(network, spec, path, sample_globule(40, 3))
    errors = {item.name: item.value for item in check.items if item.name.startswith("tables")}
    assert set(errors) == {"tables: filters", "tables: slopes", "tables: energies", "tables: forces"}
    assert all(0 < error <= TABLE_TOLERANCE for error in errors.values())
    return network, spec, path


def test_tables_are_the_default_of_an_export(exported) -> None:
    network, _, path = exported
    script, _ = load_potential(path)
    script.include_priors = False
    frame = sample_globule(40, 1, seed=9)
    energies, forces = compute_exact(network, frame, script.species)
    for _ in range(3):
        energy, found = evaluate_script(script, frame[0])
        # The network runs in float32: 6e-8 times the cancellation in its sums.
        assert energy == pytest.approx(energies[0], rel=1e-5)
        assert np.abs(found - forces[0]).max() < 1e-4 * forces.std()
        script.outputs_forces = not script.outputs_forces


def test_forces_of_priors_and_network_together(exported) -> None:
    script, _ = load_potential(exported[2])
    frames = np.concatenate(sample_globule(40, 2))
    by_differentiation = evaluate_script(script, frames)
    script.outputs_forces = True
    energy, forces = evaluate_script(script, frames)
    assert energy == pytest.approx(by_differentiation[0], rel=1e-9)
    # The same gradient of the network; that of the priors in float64 either way.
    np.testing.assert_allclose(forces, by_differentiation[1], rtol=1e-9, atol=1e-9)


def test_energies_of_frames_one_by_one(exported) -> None:
    script, _ = load_potential(exported[2])
    frames = sample_globule(40, 3)
    energies = script.frame_energies(torch.from_numpy(frames))
    single = [evaluate_script(script, frame)[0] for frame in frames]
    # Sums of float32 numbers in the same order.
    np.testing.assert_allclose(energies.detach(), single, rtol=1e-12)


def test_bound_to_another_molecule_after_use(exported) -> None:
    network, spec, path = exported
    script, _ = load_potential(path)
    script.include_priors = False
    frame = sample_globule(40)
    evaluate_script(script, frame[0])
    for n_beads, order in ((40, "CAB"), (7, "BC")):
        other = build_map(n_beads, order)
        bind_molecule(script, spec, other)
        species = torch.from_numpy(spec.compute_species_index(other))
        assert torch.equal(script.species, species)
        expected, _ = compute_exact(network, frame[:, :n_beads], species, other)
        assert evaluate_script(script, frame[0, :n_beads])[0] == pytest.approx(expected[0], rel=1e-5)


def test_frozen_script_equals_the_module() -> None:
    """openmmtorch freezes what it runs, which has changed shapes before; several blocks, lists made anew."""
    network, frames = build_trained(chiral_channels=2), sample_globule(300, 3)
    species = torch.from_numpy(build_spec(300).compute_species_index())
    table = TabulatedSchNet(network, 320, 0.1).eval()
    frozen = torch.jit.freeze(script_network(copy.deepcopy(table)))
    with torch.no_grad():
        for frame in (*frames, frames[0]):
            x = torch.from_numpy(frame)
            # The same operations, perhaps fused: float32 rounds 6e-8 of hundreds.
            torch.testing.assert_close(frozen(x, species), table(x, species), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", ["torchforce", "pythonforce"])
@pytest.mark.parametrize("priors", ["native", "torch"])
def test_in_openmm(exported, backend: str, priors: str) -> None:
    potential = CGPotential.load(exported[2])
    system = potential.createSystem(replicas=2, backend=backend, priors=priors)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    for seed in range(2):
        frames = np.concatenate(sample_globule(40, 2, seed))
        context.setPositions(frames)
        state = context.getState(energy=True, forces=True)
        energy, forces = evaluate_script(potential.script, frames)
        found = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        assert state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) == pytest.approx(energy, rel=1e-6)
        np.testing.assert_allclose(found, forces, atol=1e-5 * forces.std())


def test_identity_does_not_depend_on_use(exported) -> None:
    """Of a potential without a file: the hash of its script."""
    script, spec = load_potential(exported[2])
    before = CGPotential(script, spec).hash
    evaluate_script(script, sample_globule(40)[0])
    assert CGPotential(script, spec).hash == before


def test_positions_that_are_not_numbers_give_no_numbers(exported) -> None:
    """OpenMM reports such a run; the look-up must not fail before it does."""
    script, _ = load_potential(exported[2])
    script.include_priors = False
    frame = sample_globule(40)[0]
    frame[3, 1] = np.nan
    for outputs_forces in (False, True):
        script.outputs_forces = outputs_forces
        assert np.isnan(evaluate_script(script, frame)[1]).any()


def test_tables_that_are_not_exact_enough_are_refused(tmp_path: Path, monkeypatch, caplog) -> None:
    network, spec, frames = build_trained(), build_spec(6), sample_globule(6, 3)
    monkeypatch.setattr(tabulation, "TABLE_TOLERANCE", 1e-9)
    with pytest.raises(PotentialError, match=r"splines of \d+ intervals a nm change the (slopes|filters)"):
        export_potential(network, spec, tmp_path / "on.pt", frames, tabulate="on")
    assert list(tmp_path.iterdir()) == []
    with caplog.at_level(logging.WARNING, "openmm_hvpcg"):
        assert export_potential(network, spec, tmp_path / "auto.pt", frames).passed
    assert "exported without tables: filters as splines" in caplog.text
    assert not hasattr(load_potential(tmp_path / "auto.pt")[0], "outputs_forces")


def test_what_can_be_asked_of_an_export(tmp_path: Path) -> None:
    network, spec, frames = build_trained(), build_spec(6), sample_globule(6, 3)
    export_potential(network, spec, tmp_path / "off.pt", frames, tabulate="off")
    assert not hasattr(load_potential(tmp_path / "off.pt")[0], "outputs_forces")
    with pytest.raises(InputError, match="tabulate"):
        export_potential(network, spec, tmp_path / "no.pt", frames, tabulate="yes")
    with pytest.raises(PotentialError, match="only the filters of a schnet"):
        export_potential(build_trained("painn"), spec, tmp_path / "no.pt", frames, tabulate="on")


def test_a_network_that_is_still_zero_can_be_tabulated() -> None:
    settings = ModelSettings.model_validate({"features": 8, "radial": 8, "cutoff_nm": CUTOFF, "torsions": False})
    table = tabulate_network(build_network(3, settings, 25.0), build_spec(6), sample_globule(6, 3))
    assert table.errors["forces"] == 0.0


def test_pairs_grow_with_the_beads_not_their_square() -> None:
    counts = []
    for n_beads in (500, 4000):
        pairs = PairList(CUTOFF, 0.1)
        pairs.update(torch.from_numpy(sample_globule(n_beads)[0]), n_beads)
        counts.append(len(pairs.pairs) / n_beads)
    # A bead inside has 56 neighbours; a smaller ball has more of its beads at the surface.
    assert counts[0] < counts[1] < 60
