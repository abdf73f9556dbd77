from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training_models import ENERGIES, SPECIES, build_random_network, sample_frames

from openmm_hvpcg.errors import BackendError, ConfigError
from openmm_hvpcg.training import derivatives
from openmm_hvpcg.training.derivatives import choose_hvp_method, compute_forces, compute_forces_and_hvps

METHODS = ["reverse", "forward"]
NETWORK = build_random_network()


def network_energy(x: torch.Tensor) -> torch.Tensor:
    return NETWORK(x, SPECIES)


# One network for all: it cannot be built within a transform of torch.func.
ENERGIES = {**ENERGIES, "network": network_energy}


def draw_probes(x: torch.Tensor, n: int, seed: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((len(x), n, *x.shape[1:])))


class BackwardOnly(torch.autograd.Function):
    """A square that can be differentiated backwards twice, and not forwards."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def backward_only_energy(x: torch.Tensor) -> torch.Tensor:
    return BackwardOnly.apply(x).sum((1, 2))


@pytest.mark.parametrize("n_probes", [1, 3])
@pytest.mark.parametrize("name", ENERGIES)
def test_methods_agree(name, n_probes):
    energy, x = ENERGIES[name], sample_frames()
    probes = draw_probes(x, n_probes)
    forces, hvps = compute_forces_and_hvps(energy, x, probes, method="reverse")
    # The same operations of doubles in another order: rounding, 1e-16 times a few hundred terms.
    close = {"rtol": 1e-10, "atol": 1e-12 * float(hvps.abs().max())}
    for a, b in zip(compute_forces_and_hvps(energy, x, probes, method="forward"), (forces, hvps), strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("n_probes", [1, 3])
def test_gradients_of_the_parameters_agree(n_probes):
    x = sample_frames()
    probes = draw_probes(x, n_probes)
    force_weights, hvp_weights = draw_probes(x, 1, 3)[:, 0], draw_probes(x, n_probes, 4)
    parameters = [p for n, p in NETWORK.named_parameters() if n != "readout.2.bias"]  # a constant energy
    gradients = []
    for method in METHODS:
        forces, hvps = compute_forces_and_hvps(network_energy, x, probes, True, method)
        loss = (force_weights * forces).sum() + 1e-2 * (hvp_weights * hvps).sum()
        gradients.append(torch.autograd.grad(loss, parameters))
    for a, b in zip(*gradients, strict=True):
        scale = float(a.abs().max())
        assert scale > 1e-3
        # Rounding of doubles, as above.
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_hvps_are_differences_of_forces(method):
    """Fourth-order differences: step 1e-3 nm was measured 1e-5 off, so 2e-4 nm leaves 5^4 less, 2e-8 of the largest.

    Rounding, 1e-15 of forces of some tens over the step, is less still.
    """
    x, h = sample_frames(), 2e-4
    probes = draw_probes(x, 2)
    _, hvps = compute_forces_and_hvps(network_energy, x, probes, method=method)
    for p in range(2):
        f = {k: compute_forces(network_energy, x + k * h * probes[:, p]) for k in (-2, -1, 1, 2)}
        numeric = -(8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
        torch.testing.assert_close(hvps[:, p], numeric, rtol=0.0, atol=1e-7 * float(hvps.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_are_taken_under_no_grad_too(method):
    """Validation runs under ``no_grad``; a graph that was asked for is kept all the same."""
    x = sample_frames()
    probes = draw_probes(x, 2)
    expected = compute_forces_and_hvps(network_energy, x, probes)
    for create_graph in (False, True):
        with torch.no_grad():
            forces, hvps = compute_forces_and_hvps(network_energy, x, probes, create_graph, method)
        # Rounding of doubles.
        torch.testing.assert_close((forces.detach(), hvps.detach()), expected, rtol=1e-10, atol=1e-9)
        assert forces.requires_grad == hvps.requires_grad == create_graph
    assert all(p.grad is None for p in NETWORK.parameters())


@pytest.mark.parametrize(
    ("reverse_ms", "forward_ms", "faster"),
    [
        ([9], [5], "forward"),
        ([5], [9], "reverse"),
        ([10], [9.5], "reverse"),  # too close to tell from noise
        ([90, 10], [9, 30, 8], "forward"),  # a busy moment does not count; the warm-up neither
        ([90, 10], [1, 30], "reverse"),
    ],
)
@pytest.mark.parametrize("create_graph", [True, False])
def test_choice_is_the_method_that_takes_less_time(monkeypatch, reverse_ms, forward_ms, faster, create_graph):
    """By a clock that only the two methods move; the last time of a list goes on."""
    clock = {"s": 0.0}
    monkeypatch.setattr(derivatives, "time", SimpleNamespace(perf_counter=lambda: clock["s"]))
    for name, times in (("_double_backward", reverse_ms), ("_forward_over_reverse", forward_ms)):

        def timed(*arguments, honest=getattr(derivatives, name), left=list(times)):  # noqa: B006, B008
            clock["s"] += 1e-3 * (left.pop(0) if len(left) > 1 else left[0])
            return honest(*arguments)

        monkeypatch.setattr(derivatives, name, timed)
    x = sample_frames()
    assert choose_hvp_method(network_energy, x, draw_probes(x, 1), create_graph=create_graph) == faster


def test_choice_times_the_gradient_by_the_parameters_and_leaves_no_trace(monkeypatch, caplog):
    network, x = build_random_network(), sample_frames()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    asked = []
    honest = torch.autograd.grad

    def spy(outputs, inputs, *arguments, **options):
        asked.append([inputs] if isinstance(inputs, torch.Tensor) else list(inputs))
        return honest(outputs, inputs, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    with caplog.at_level(logging.INFO):
        choose_hvp_method(lambda y: network(y, SPECIES), x, draw_probes(x, 1))
    wanted = {id(p) for p in network.parameters()}
    # A warm-up and at least one timed run of each method.
    assert sum({id(i) for i in inputs} == wanted for inputs in asked) >= 4
    assert all((p.grad == 1).all() for p in network.parameters())
    assert not x.requires_grad
    assert "ms on cpu" in caplog.text


@pytest.mark.parametrize("n_probes", [1, 2])
def test_energy_without_forward_mode(caplog, n_probes):
    x = sample_frames()
    probes = draw_probes(x, n_probes)
    with caplog.at_level(logging.INFO):
        assert choose_hvp_method(backward_only_energy, x, probes) == "reverse"
    assert "forward mode failed" in caplog.text
    torch.testing.assert_close(compute_forces_and_hvps(backward_only_energy, x, probes)[1], 2 * probes)
    with pytest.raises(BackendError, match="Use the method reverse"):
        compute_forces_and_hvps(backward_only_energy, x, probes, method="forward")


def test_unknown_method_is_refused():
    x = sample_frames()
    with pytest.raises(ConfigError, match="expected reverse or forward, got sideways"):
        compute_forces_and_hvps(backward_only_energy, x, draw_probes(x, 1), method="sideways")  # type: ignore[arg-type]
