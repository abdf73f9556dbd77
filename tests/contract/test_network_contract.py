"""What every network must satisfy before anything is trained; a kind is tested by being listed, ours or a user's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_hvpcg.config import ModelSettings
from openmm_hvpcg.training.derivatives import compute_forces, compute_forces_and_hvps
from openmm_hvpcg.training.export import script_network
from openmm_hvpcg.training.models.registry import BUILDERS, build_base

#: The package's own, a user's, and those that know left from right.
KINDS = (*ModelSettings.KINDS, "my_network:MyNetwork", "schnet, chiral", "painn, chiral")
CUTOFF = 0.9
SPECIES = torch.tensor([0, 1, 0, 2, 1, 0])
#: Around the first bead its neighbours' unit vectors cancel: norms of vectors are at zero there.
OCTAHEDRON = 0.4 * torch.tensor(
    [[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=torch.float64
)
OCTAHEDRON_SPECIES = torch.tensor([0, 1, 1, 1, 1, 1, 1])


def build_new(kind: str, interactions: int = 2, cutoff_nm: float = CUTOFF) -> torch.nn.Module:
    torch.manual_seed(3)
    kind, chiral, _ = kind.partition(", chiral")
    settings = ModelSettings(
        kind=kind,
        features=12,
        interactions=interactions,
        radial=10,
        cutoff_nm=cutoff_nm,
        chiral_channels=4 if chiral else 0,
    )
    return build_base(3, settings, 25.0)


def build_trained(kind: str, interactions: int = 2, cutoff_nm: float = CUTOFF) -> torch.nn.Module:
    """As training might leave it, in float64: a new network is zero everywhere."""
    network = build_new(kind, interactions, cutoff_nm).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


def bind(network: torch.nn.Module, species: Tensor = SPECIES) -> Callable[[Tensor], Tensor]:
    return lambda x: network(x, species)


def build_frames(n_frames: int = 3, n_beads: int = len(SPECIES), seed: int = 8) -> Tensor:
    steps = np.random.default_rng(seed).normal(size=(n_frames, n_beads, 3)) + np.array([0.8, 0.0, 0.0])
    return torch.from_numpy(np.cumsum(0.3 * steps / np.linalg.norm(steps, axis=-1, keepdims=True), axis=1))


def build_probes(frames: Tensor, n_probes: int = 2) -> Tensor:
    shape = (frames.shape[0], n_probes, *frames.shape[1:])
    return torch.from_numpy(np.random.default_rng(4).standard_normal(shape))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_kind_of_the_protocol_can_be_built() -> None:
    assert tuple(BUILDERS) == ModelSettings.KINDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_frames", "n_beads"), [(1, 2), (4, 6)])
def test_one_energy_a_frame_in_the_dtype_of_the_weights(
    kind: str, n_frames: int, n_beads: int, dtype: torch.dtype
) -> None:
    frames = build_frames(n_frames, n_beads).to(dtype)
    energies = build_trained(kind).to(dtype)(frames, SPECIES[:n_beads])
    assert (energies.shape, energies.dtype) == ((n_frames,), dtype)


def test_starts_as_zero(kind: str) -> None:
    assert (build_new(kind)(build_frames().float(), SPECIES) == 0).all()


def test_moving_and_turning_change_nothing(kind: str) -> None:
    """Mirroring too, but where channels are there to see it. Tolerances: rounding in double precision."""
    network, frames = build_trained(kind), build_frames()
    turn, _ = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3))))
    turn = turn * torch.linalg.det(turn)
    expected = network(frames, SPECIES)
    for other in (frames + 1.3, frames @ turn.T):
        torch.testing.assert_close(network(other, SPECIES), expected, rtol=1e-10, atol=1e-9)
    if "chiral" in kind:
        # In units of 25 kJ/mol: far more than rounding.
        assert float((network(-frames, SPECIES) - expected).abs().min()) > 1e-3
    else:
        torch.testing.assert_close(network(-frames, SPECIES), expected, rtol=1e-10, atol=1e-9)
    forces, turned = compute_forces(bind(network), frames), compute_forces(bind(network), frames @ turn.T)
    torch.testing.assert_close(turned, forces @ turn.T, rtol=1e-9, atol=1e-8)
    assert float(forces.abs().max()) > 1.0


def test_beads_of_one_species_are_alike_and_those_of_two_are_not(kind: str) -> None:
    network, frames = build_trained(kind), build_frames()
    expected = network(frames, SPECIES)
    alike, unlike = [2, 1, 0, 3, 4, 5], [1, 0, 2, 3, 4, 5]
    torch.testing.assert_close(network(frames[:, alike], SPECIES), expected, rtol=1e-10, atol=1e-9)
    assert float((network(frames[:, unlike], SPECIES) - expected).abs().min()) > 1e-3
    # Relabelling beads along with their species is no change either.
    torch.testing.assert_close(network(frames[:, unlike], SPECIES[unlike]), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_forces_and_hvps_are_the_derivatives(kind: str, symmetric: bool) -> None:
    """Against central differences in double: a step of 1e-5 nm leaves about 1e-7 of the value. At the centre of an
    octahedron too, where a bead's vectors vanish and a bare norm would have no second derivative."""
    network = build_trained(kind)
    frames = OCTAHEDRON.unsqueeze(0) if symmetric else build_frames()
    energy = bind(network, OCTAHEDRON_SPECIES if symmetric else SPECIES)
    probes, h = build_probes(frames), 1e-5
    forces, hvps = compute_forces_and_hvps(energy, frames, probes)
    for p in range(probes.shape[1]):
        v = probes[:, p]
        slope = ((energy(frames + h * v) - energy(frames - h * v)) / (2 * h)).detach()
        torch.testing.assert_close(-(forces * v).sum((1, 2)), slope, rtol=1e-5, atol=1e-5 * float(forces.abs().max()))
        change = -(compute_forces(energy, frames + h * v) - compute_forces(energy, frames - h * v)) / (2 * h)
        torch.testing.assert_close(hvps[:, p], change, rtol=1e-5, atol=1e-5 * float(hvps.abs().max()))
    assert float(hvps.abs().max()) > 1.0


def test_the_hessian_is_symmetric_and_blind_to_translations(kind: str) -> None:
    frame = build_frames(1)
    n = 3 * frame.shape[1]
    units = torch.eye(n, dtype=torch.float64).reshape(1, n, -1, 3)
    _, hvps = compute_forces_and_hvps(bind(build_trained(kind)), frame, units)
    hessian = hvps.reshape(n, n)
    scale = float(hessian.abs().max())
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-10 * scale)
    shifts = torch.eye(3, dtype=torch.float64).repeat(frame.shape[1], 1)
    torch.testing.assert_close(hessian @ shifts, torch.zeros_like(shifts), rtol=0, atol=1e-10 * scale)


def test_script_gives_the_same_numbers(kind: str) -> None:
    """Energies, forces and HVPs, and again after TorchScript has rewritten itself; rounding in double precision."""
    network, frames = build_trained(kind), build_frames()
    script, probes = script_network(build_trained(kind)), build_probes(frames)
    forces, hvps = compute_forces_and_hvps(bind(network), frames, probes)
    for _ in range(3):
        torch.testing.assert_close(script(frames, SPECIES), network(frames, SPECIES), rtol=1e-12, atol=1e-10)
        found, products = compute_forces_and_hvps(bind(script), frames, probes)
        torch.testing.assert_close(found, forces, rtol=0, atol=1e-10 * float(forces.abs().max()))
        torch.testing.assert_close(products, hvps, rtol=0, atol=1e-10 * float(hvps.abs().max()))


def test_single_precision_is_close_to_double(kind: str) -> None:
    """float32 resolves 6e-8; sums that cancel lose up to three digits of it: 1e-4 of the largest force or product."""
    network, frames = build_trained(kind), build_frames()
    probes = build_probes(frames)
    forces, hvps = compute_forces_and_hvps(bind(network), frames, probes)
    single = compute_forces_and_hvps(bind(network.float()), frames.float(), probes.float())
    torch.testing.assert_close(single[0].double(), forces, rtol=0, atol=1e-4 * float(forces.abs().max()))
    torch.testing.assert_close(single[1].double(), hvps, rtol=0, atol=1e-4 * float(hvps.abs().max()))


def test_nothing_acts_beyond_the_cutoff(kind: str) -> None:
    """Two molecules out of each other's reach: energies add, and each feels what it feels alone."""
    network = build_trained(kind)
    left, right = build_frames(2, 3), build_frames(2, 3, seed=9)
    right = right + torch.tensor([float(left[..., 0].max() - right[..., 0].min()) + 1.01 * CUTOFF, 0.0, 0.0])
    both, species = torch.cat((left, right), dim=1), SPECIES
    alone = network(left, species[:3]) + network(right, species[3:])
    torch.testing.assert_close(network(both, species), alone, rtol=1e-12, atol=1e-10)
    forces = compute_forces(bind(network, species), both)
    torch.testing.assert_close(forces[:, :3], compute_forces(bind(network, species[:3]), left), rtol=1e-10, atol=1e-9)


def test_every_weight_is_trained_by_forces_and_hvps(kind: str) -> None:
    """All but the last bias, a constant of the energy."""
    network, frames = build_trained(kind), build_frames()
    forces, hvps = compute_forces_and_hvps(bind(network), frames, build_probes(frames), create_graph=True)
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad((forces**2).sum() + (hvps**2).sum(), parameters, allow_unused=True)
    idle = {name for name, g in zip(names, gradients, strict=True) if g is None or not bool((g != 0).any())}
    assert idle <= {"readout.2.bias"}


def build_angle(degrees: float) -> Tensor:
    half = np.deg2rad(degrees) / 2
    ends = [[0, 0, 0], [np.sin(half), np.cos(half), 0], [-np.sin(half), np.cos(half), 0]]
    return 0.7 * torch.tensor(ends, dtype=torch.float64)


def build_ring(n: int) -> np.ndarray:
    """A regular polygon of edge 0.6 nm."""
    angles = 2 * np.pi * np.arange(n) / n
    return 0.3 / np.sin(np.pi / n) * np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)


#: Two molecules whose beads have the same neighbours at the same distances within the cutoff of 0.9 nm. The ends of
#: the angle are 1.07 and 1.39 nm apart; the next-nearest corners of the hexagon 1.04 nm.
LOOK_ALIKES = {
    "angle": (build_angle(100.0), build_angle(165.0), torch.tensor([0, 1, 1])),
    "hexagon": (
        torch.from_numpy(build_ring(6)),
        torch.from_numpy(np.concatenate([build_ring(3), build_ring(3) + 5.0])),
        torch.zeros(6, dtype=torch.long),
    ),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
@pytest.mark.parametrize("interactions", [1, 3])
def test_painn_tells_apart_what_distances_cannot(case: str, interactions: int) -> None:
    """Two environments that are one for messages of distances alone, however many there are of them.

    A network that passes messages weighted by distances within a cutoff colours the beads as the Weisfeiler-Leman test
    does with distances as edge labels: a bent and a stretched molecule whose ends do not see each other, or a hexagon
    and two triangles of its edge, get the same colours (Pozdnyakov and Ceriotti, Mach. Learn.: Sci. Technol. 3, 045020
    (2022)). The vectors of PaiNN add up to different lengths at a bead's two neighbours after one interaction.
    """
    first, second, species = LOOK_ALIKES[case]
    energies = {
        kind: [float(build_trained(kind, interactions)(x.unsqueeze(0), species).detach()) for x in (first, second)]
        for kind in ModelSettings.KINDS
    }
    assert energies["schnet"][0] == pytest.approx(energies["schnet"][1], rel=1e-10)
    # In units of 25 kJ/mol: far more than rounding, 1e-12.
    assert abs(energies["painn"][0] - energies["painn"][1]) > 1e-2


def test_left_and_right_are_told_apart_by_what_is_not_planar() -> None:
    """A planar molecule is its own mirror image, and no channel may say otherwise; a mirrored helix is another one."""
    network = build_trained("schnet, chiral")
    flat, turns = build_frames(1) * torch.tensor([1.0, 1.0, 0.0]), 1.7 * torch.arange(6, dtype=torch.float64)
    helix = torch.stack((0.23 * torch.cos(turns), 0.23 * torch.sin(turns), 0.15 * torch.arange(6)), dim=1)[None]
    species = torch.zeros(6, dtype=torch.long)
    for frames, least, most in ((flat, 0.0, 1e-9), (helix, 1e-2, 1e6)):
        images = network(torch.cat((frames, -frames)), species).detach()
        assert least <= abs(float(images[0] - images[1])) <= most
