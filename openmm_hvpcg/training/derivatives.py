"""Forces and Hessian-vector products of any energy function, by automatic differentiation.

An HVP is the derivative of the gradient along a probe. Backward mode gets it as the gradient of ``grad U . v`` (double
backward), forward mode as the tangent that v carries through the gradient (forward over reverse): Pearlmutter, Neural
Comput. 6, 147 (1994). Both are exact; :func:`choose_hvp_method` measures which is faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from openmm_hvpcg.errors import BackendError, ConfigError

logger = logging.getLogger(__name__)

#: Energies (F,) kJ/mol of positions (F, B, 3) nm; frame f's energy depends on frame f alone.
EnergyFunction = Callable[[Tensor], Tensor]

#: ``reverse``: double backward. ``forward``: forward over reverse.
HVPMethod = Literal["reverse", "forward"]

#: Timed repeats of each method stop here, seconds or number; the first one is always done.
TIMING_BUDGET_S = 0.2
TIMING_REPEATS = 5
#: Forward mode has to win by this factor: the choice should not turn with the noise of the clock.
FORWARD_MUST_SAVE = 0.9


def compute_forces(energy: EnergyFunction, positions: Tensor, create_graph: bool = False) -> Tensor:
    """Forces ``-grad U`` (F, B, 3), kJ/mol/nm, of frames (F, B, 3) nm."""
    with torch.enable_grad():
        x = positions.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=create_graph)
    return -gradient


def compute_forces_and_hvps(
    energy: EnergyFunction,
    positions: Tensor,
    probes: Tensor,
    create_graph: bool = False,
    method: HVPMethod = "reverse",
) -> tuple[Tensor, Tensor]:
    """Forces (F, B, 3) and HVPs ``+(grad grad U) v`` (F, P, B, 3).

    Parameters
    ----------
    energy : see :data:`EnergyFunction`
    positions : (F, B, 3) nm
    probes : (F, P, B, 3)
    create_graph : keep the graph, for a loss on the results
    method : see :data:`HVPMethod`; the results are the same to rounding

    Raises
    ------
    BackendError
        Forward mode was asked for and failed, for example because an operation of ``energy`` has none.
    ConfigError
        There is no such method.
    """
    if method == "reverse":
        return _double_backward(energy, positions, probes, create_graph)
    if method != "forward":
        raise ConfigError("no such method for HVPs", expected=" or ".join(get_args(HVPMethod)), got=method)
    try:
        return _forward_over_reverse(energy, positions, probes, create_graph)
    except RuntimeError as error:  # torch has no narrower one for what lacks forward mode or batching
        reason = str(error).split("\n")[0]
        raise BackendError(f"HVPs in forward mode failed ({reason})", hint="use the method reverse") from error


def choose_hvp_method(
    energy: EnergyFunction, positions: Tensor, probes: Tensor, *, create_graph: bool = True
) -> HVPMethod:
    """The faster method for HVPs, measured on the device of ``positions``.

    Each method is run once to warm up and then a few times in turn; the best time counts. Gradients already on the
    parameters are left alone. An energy without forward mode gets ``reverse``, and the log says why.

    Parameters
    ----------
    energy, positions, probes : as for :func:`compute_forces_and_hvps`; a batch of the size that will be used
    create_graph : time a training step, with the gradient of a loss by the parameters; else the HVPs alone
    """
    parameters = _find_parameters(energy, positions) if create_graph else []

    def measure(method: HVPMethod) -> float:
        _synchronise(positions.device)
        began = time.perf_counter()
        forces, hvps = compute_forces_and_hvps(energy, positions, probes, create_graph, method)
        if parameters:
            torch.autograd.grad((forces**2).mean() + (hvps**2).mean(), parameters, allow_unused=True)
        _synchronise(positions.device)
        return time.perf_counter() - began

    measure("reverse")
    try:
        measure("forward")
    except BackendError as error:
        logger.info("HVPs by reverse: %s", error)
        return "reverse"
    began, best = time.perf_counter(), {"reverse": float("inf"), "forward": float("inf")}
    for _ in range(TIMING_REPEATS):
        best = {
            "reverse": min(best["reverse"], measure("reverse")),
            "forward": min(best["forward"], measure("forward")),
        }
        if time.perf_counter() - began > TIMING_BUDGET_S:
            break
    choice: HVPMethod = "forward" if best["forward"] < FORWARD_MUST_SAVE * best["reverse"] else "reverse"
    logger.info(
        "HVPs by %s: double backward %.3g ms, forward over reverse %.3g ms on %s",
        choice,
        1e3 * best["reverse"],
        1e3 * best["forward"],
        positions.device,
    )
    return choice


def _double_backward(
    energy: EnergyFunction, positions: Tensor, probes: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """One pass for the gradient, one more backward through it for each probe."""
    with torch.enable_grad():
        x = positions.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        n_probes = probes.shape[1]
        # A loop shares the gradient's pass among the probes; frames repeated for each probe would not, and were slower
        # (benchmarks/training.py).
        products = [
            torch.autograd.grad(
                (gradient * probes[:, p]).sum(),
                x,
                create_graph=create_graph,
                retain_graph=create_graph or p < n_probes - 1,
            )[0]
            for p in range(n_probes)
        ]
        forces, hvps = -gradient, torch.stack(products, dim=1)
    return (forces, hvps) if create_graph else (forces.detach(), hvps.detach())


def _forward_over_reverse(
    energy: EnergyFunction, positions: Tensor, probes: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """Tangents of the gradient: one pass for the gradient, all probes at once through its linearisation."""
    x, v = positions.detach(), probes.to(positions)
    gradient = torch.func.grad(lambda y: energy(y).sum())

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(gradient, (x,), (tangent,))

    with torch.set_grad_enabled(create_graph):
        if v.shape[1] == 1:  # without the overhead of vmap, a fifth of the step
            value, product = push(v[:, 0])
            return -value, product[:, None]
        values, products = torch.func.vmap(push, in_dims=1, out_dims=(0, 1))(v)
        return -values[0], products


def _find_parameters(energy: EnergyFunction, positions: Tensor) -> list[Tensor]:
    """Leaves that the energy depends on and that ask for a gradient."""
    with torch.enable_grad():
        root = energy(positions.detach()).sum().grad_fn
    seen, found, waiting = set(), [], [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [function for function, _ in node.next_functions]
    return found


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
