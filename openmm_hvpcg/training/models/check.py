"""Is a network fit to be trained, exported and simulated? What a ``torch.nn.Module`` of one's own has to satisfy.

Everything is tried on random chains of beads, with the weights moved a little from where they are (a new network may be
zero everywhere, and zero passes any test), in double precision, where rounding hides nothing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from openmm_hvpcg.errors import HVPCGError, PotentialError
from openmm_hvpcg.training.derivatives import compute_forces, compute_forces_and_hvps
from openmm_hvpcg.training.export import script_network

logger = logging.getLogger(__name__)

SEED = 20240301
N_FRAMES = 4
#: Of the tensor's root mean square, or absolute where that is zero.
WEIGHT_NOISE = 0.1
#: The distance of neighbours along the chain, as a share of the cutoff: some pairs are within it, some beyond.
STEP = 0.35
#: Symmetries hold to rounding, 1e-16 times the cancellation in sums; this is relative to how much energies vary.
SYMMETRY_TOLERANCE = 1e-7
#: Central differences in double: the step squared times a third derivative over the first, or rounding over the step.
DIFFERENCE_STEP_NM = 1e-5
DIFFERENCE_TOLERANCE = 1e-4
#: float32 resolves 6e-8; sums that cancel lose three digits of it.
FLOAT32_TOLERANCE = 1e-3
#: Points of the path on which jumps are looked for: so many pairs in all.
PATH_PAIRS, PATH_POINTS = 20000, (16, 300)
#: Halvings of each piece of the path: what still changes over 1e-8 of a piece is a jump.
HALVINGS = 26
#: A jump counts from this share of the largest value on.
JUMP_TOLERANCE = 1e-4


def check_model(network: nn.Module, species: Tensor, cutoff_nm: float, name: str = "the network") -> None:
    """Check that a network keeps the contract of every network of this package.

    It is scriptable; gives energies (F,) of its weights' dtype from positions (F, B, 3) nm and species (B,), each
    frame's from that frame alone, the same in training and evaluation mode; does not change when the molecule is moved
    or turned; its forces and Hessian-vector products are its derivatives, without jumps, and can be trained on; and it
    computes much the same in single precision. The network itself is not changed.

    Parameters
    ----------
    network : the module
    species : (B,) species indices of a molecule that it will be trained on
    cutoff_nm : sets the size of the random molecules
    name : of the network, for messages

    Raises
    ------
    PotentialError
        The first thing that does not hold.
    """
    moved = _copy_moved(network, name)
    frames = _sample_chains(len(species), cutoff_nm)
    species = species.cpu()
    _check_output(moved, species, frames, name)
    _check_modes(moved, species, frames, name)
    _check_symmetries(moved, species, frames, name)
    _check_derivatives(moved, species, frames, name)
    _check_smoothness(moved, species, frames[:1], cutoff_nm, name)
    _check_script(moved, species, frames, name)
    _check_single_precision(moved, species, frames, name)
    with torch.no_grad(), _foreign_code(name, "evaluating it"):
        start = copy.deepcopy(network).cpu().double()(frames, species)
    if bool((start != 0).any()):
        logger.warning(
            "%s: its energy is not zero to begin with: training sets out from noise on top of the priors; zeros as the"
            " weights of its last layer would mend that",
            name,
        )


def takes_many_molecules(
    network: nn.Module, n_beads: int, n_species: int, cutoff_nm: float, name: str = "the network"
) -> bool:
    """Whether a network that keeps the contract also takes species (F, B), another molecule in every frame.

    Parameters
    ----------
    network, cutoff_nm, name : as for :func:`check_model`
    n_beads : of the molecules it is tried on
    n_species : the network knows
    """
    moved = _copy_moved(network, name)
    frames = _sample_chains(n_beads, cutoff_nm)
    many = torch.randint(n_species, (N_FRAMES, n_beads), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        single = torch.cat([moved(frame, kinds) for frame, kinds in zip(frames.split(1), many, strict=True)])
        try:
            energies = moved(frames, many)
            _check_same(energies, single, "many molecules at once give other energies", name)
        except Exception as error:  # anything that code which is not ours may raise
            logger.info("%s does not take many molecules at once (%s): batches hold one each", name, error)
            return False
    return energies.shape == single.shape


@contextlib.contextmanager
def _foreign_code(name: str, what: str, hint: str | None = None) -> Iterator[None]:
    """Code that is not ours may raise anything; what it raises becomes a :class:`PotentialError`."""
    try:
        yield
    except HVPCGError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise PotentialError(f"{what} failed ({reason})", where=name, hint=hint) from error


def _copy_moved(network: nn.Module, name: str) -> nn.Module:
    """A copy in double precision with its weights moved."""
    with torch.random.fork_rng(devices=[]), _foreign_code(name, "copying it"):
        torch.manual_seed(SEED)
        return _move_weights(copy.deepcopy(network).cpu().double())


def _move_weights(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            size = float(parameter.square().mean().sqrt()) or 1.0
            parameter.add_(WEIGHT_NOISE * size * torch.randn_like(parameter))
    return network


def _sample_chains(n_beads: int, cutoff_nm: float) -> Tensor:
    """Random chains (N_FRAMES, B, 3) nm, of another size each, whose beads keep at least half a step apart."""
    generator = torch.Generator().manual_seed(SEED)
    frames = []
    for k in range(N_FRAMES):
        step = STEP * cutoff_nm * (0.8 + 0.4 * k / (N_FRAMES - 1))
        beads = [torch.zeros(3, dtype=torch.float64)]
        while len(beads) < n_beads:
            direction = torch.randn(3, generator=generator, dtype=torch.float64) + torch.tensor([0.6, 0.0, 0.0])
            place = beads[-1] + step * direction / direction.norm()
            if min(float((place - bead).norm()) for bead in beads) > 0.5 * step:
                beads.append(place)
        frames.append(torch.stack(beads))
    return torch.stack(frames)


def _evaluate(network: nn.Module, species: Tensor, frames: Tensor, name: str) -> Tensor:
    with torch.no_grad(), _foreign_code(name, "evaluating it"):
        energies: Tensor = network(frames, species)
    return energies


def _check_output(network: nn.Module, species: Tensor, frames: Tensor, name: str) -> None:
    energies = _evaluate(network, species, frames, name)
    if not isinstance(energies, Tensor):
        raise PotentialError("its output is no tensor", expected="energies (F,)", got=type(energies), where=name)
    if energies.shape != frames.shape[:1]:
        raise PotentialError(
            f"its output has the wrong shape for {frames.shape[0]} frames",
            expected=f"one energy a frame, ({frames.shape[0]},)",
            got=tuple(energies.shape),
            where=name,
        )
    if energies.dtype != torch.float64:
        raise PotentialError(
            "its output has not the dtype of its weights and the positions",
            expected=torch.float64,
            got=energies.dtype,
            where=name,
            hint="make new tensors with positions.new_zeros and the like, constants as buffers",
        )
    if not bool(torch.isfinite(energies).all()):
        raise PotentialError("its energies are not finite", where=name)
    if float(energies.std()) <= 1e-12 * float(energies.abs().max()):
        raise PotentialError("its energy does not depend on the positions", where=name)


def _check_same(found: Tensor, expected: Tensor, problem: str, name: str, hint: str | None = None) -> None:
    """Energies that have to be equal, but for rounding."""
    worst = float((found - expected).abs().max() / expected.std())
    if not worst <= SYMMETRY_TOLERANCE:
        raise PotentialError(
            f"{problem} (by {worst:.2g} of how much energies vary)",
            expected=f"at most {SYMMETRY_TOLERANCE:g}",
            where=name,
            hint=hint,
        )


def _check_modes(network: nn.Module, species: Tensor, frames: Tensor, name: str) -> None:
    energies = _evaluate(network.eval(), species, frames, name)
    single = torch.cat([_evaluate(network, species, frame, name) for frame in frames.split(1)])
    _check_same(single, energies, "the energy of a frame depends on the other frames of its batch", name)
    trained = _evaluate(copy.deepcopy(network).train(), species, frames, name)
    hint = "leave out dropout and batch normalisation"
    _check_same(trained, energies, "its energies differ between training and evaluation mode", name, hint)


def _check_symmetries(network: nn.Module, species: Tensor, frames: Tensor, name: str) -> None:
    energies = _evaluate(network, species, frames, name)
    shift = torch.tensor([1.7, -0.9, 0.6], dtype=torch.float64)
    shifted = _evaluate(network, species, frames + shift, name)
    hint = "use differences of positions only"
    _check_same(shifted, energies, "its energy changes when the molecule is moved", name, hint)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64))
    turn = turn * torch.linalg.det(turn)  # a rotation, not a reflection
    hint = "use distances, or scalar products of vectors"
    turned = _evaluate(network, species, frames @ turn.T, name)
    _check_same(turned, energies, "its energy changes when the molecule is turned", name, hint)


def _check_derivatives(network: nn.Module, species: Tensor, frames: Tensor, name: str) -> None:
    """Forces and HVPs against central differences; and what training needs of both, derivatives by the weights."""
    probe = torch.randn(frames.shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        energies: Tensor = network(x, species)
        return energies

    hint = "use operations that torch differentiates twice; no detach, no numpy, no rounding"
    with _foreign_code(name, "differentiating its energy", hint):
        compute_forces(energy, frames)
    with _foreign_code(name, "differentiating its energy twice", hint):
        forces, hvps = compute_forces_and_hvps(energy, frames, probe[:, None], create_graph=True)
        parameters = [p for p in network.parameters() if p.requires_grad]
        total = (forces**2).sum() + (hvps**2).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
    if all(gradient is None for gradient in gradients):
        raise PotentialError("its forces depend on no trainable parameter", where=name)
    h = DIFFERENCE_STEP_NM
    with torch.no_grad(), _foreign_code(name, "evaluating it"):
        slope = (energy(frames + h * probe) - energy(frames - h * probe)) / (2 * h)
    change = (compute_forces(energy, frames + h * probe) - compute_forces(energy, frames - h * probe)) / (2 * h)
    for what, found, expected in (
        ("forces are not minus the gradient of its energy", -(forces * probe).sum((1, 2)), slope),
        ("Hessian-vector products are not the derivative of its forces", hvps[:, 0], -change),
    ):
        scale = float(expected.square().mean().sqrt())
        worst = float((found - expected).detach().abs().max()) / scale if scale > 0 else 0.0
        if not worst <= DIFFERENCE_TOLERANCE:
            raise PotentialError(
                f"its {what}: they differ from finite differences by {worst:.2g} of their size", where=name, hint=hint
            )


def _check_smoothness(network: nn.Module, species: Tensor, frame: Tensor, cutoff_nm: float, name: str) -> None:
    """No jump of energy, force or curvature on a path that stretches a chain until all its pairs are beyond the cutoff.

    The path is cut into pieces, and every piece is halved again and again, following the half over which the quantity
    changes most. The change over what is left is nothing, unless there is a jump in it.
    """
    n_pairs = max(1, frame.shape[1] * (frame.shape[1] - 1) // 2)
    n_points = min(max(PATH_PAIRS // n_pairs, PATH_POINTS[0]), PATH_POINTS[1])
    noise = torch.randn(frame.shape, generator=torch.Generator().manual_seed(SEED + 1), dtype=torch.float64)
    start = 0.6 * frame
    closest = float(torch.pdist(frame[0]).min())
    along = (1.3 * cutoff_nm / closest - 0.6) * frame + 0.1 * closest * noise

    def compute(t: Tensor) -> Tensor:
        """Energy and its first and second derivative along the path, (3, 3, m), at the points (3, m)."""
        x = start + t.flatten()[:, None, None] * along
        v = along.expand_as(x)
        energies = network(x, species).detach()
        forces, hvps = compute_forces_and_hvps(lambda y: network(y, species), x, v[:, None])
        values = torch.stack((energies, -(forces * v).sum((1, 2)), (hvps[:, 0] * v).sum((1, 2))))
        return values.reshape(3, *t.shape)

    def pick(values: Tensor) -> Tensor:
        """Row q of the values of quantity q."""
        return values.diagonal().T

    grid = torch.linspace(0.0, 1.0, n_points, dtype=torch.float64)
    values = compute(grid[None])[:, 0]
    scales = torch.stack((values[0].max() - values[0].min(), values[1].abs().max(), values[2].abs().max()))
    low, high = grid[:-1].repeat(3, 1), grid[1:].repeat(3, 1)
    at_low, at_high = values[:, :-1], values[:, 1:]
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        at_middle = pick(compute(middle))
        left = (at_middle - at_low).abs() > (at_high - at_middle).abs()
        low, at_low = torch.where(left, low, middle), torch.where(left, at_low, at_middle)
        high, at_high = torch.where(left, middle, high), torch.where(left, at_middle, at_high)
    jumps = (at_high - at_low).abs().amax(dim=1) / scales.clamp_min(1e-300)
    for what, jump in zip(("energy", "force", "second derivative"), jumps.tolist(), strict=True):
        if not jump <= JUMP_TOLERANCE:
            raise PotentialError(
                f"its {what} jumps, by {jump:.2g} of its size, as a molecule is stretched",
                where=name,
                hint="use smooth activations (tanh, SiLU; no ReLU), and end the cutoff without slope and curvature",
            )


def _check_script(network: nn.Module, species: Tensor, frames: Tensor, name: str) -> None:
    script = script_network(copy.deepcopy(network), where=name)
    energies = _evaluate(network, species, frames, name)
    for _ in range(3):  # TorchScript rewrites itself after its first calls
        _check_same(_evaluate(script, species, frames, name), energies, "its TorchScript gives other energies", name)
    with _foreign_code(name, "differentiating its TorchScript"):
        forces = compute_forces(lambda x: script(x, species), frames)
    expected = compute_forces(lambda x: network(x, species), frames)
    if not float((forces - expected).abs().max()) <= SYMMETRY_TOLERANCE * float(expected.square().mean().sqrt()):
        raise PotentialError("its TorchScript gives other forces", where=name)


def _check_single_precision(network: nn.Module, species: Tensor, frames: Tensor, name: str) -> None:
    single = copy.deepcopy(network).float()
    with _foreign_code(name, "evaluating it in single precision", "make constants buffers, which follow .float()"):
        energies = single(frames.float(), species)
        if energies.dtype != torch.float32:
            raise PotentialError(
                "its output has not the dtype of its weights", expected=torch.float32, got=energies.dtype, where=name
            )
        forces = compute_forces(lambda x: single(x, species), frames.float()).double()
    expected = compute_forces(lambda x: network(x, species), frames)
    worst = float((forces - expected).abs().max() / expected.square().mean().sqrt())
    if not worst <= FLOAT32_TOLERANCE:
        raise PotentialError(
            f"its forces in single precision are off by {worst:.2g} of their size",
            expected=f"at most {FLOAT32_TOLERANCE:g}",
            where=name,
        )
