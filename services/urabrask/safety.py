"""The safety phase: a kernel on ordinary, empty and extreme inputs, and what is wrong with it. In the child only.

A kernel is looked at twice: as it is inserted, where it must add exactly nothing and yet be able to learn; and awake,
with every weight moved off its initial value, as training will leave it, where it must stay finite, repeatable and
within the scale of its input. One that keeps statistics of its batches is looked at in evaluation mode as well, where those
it came with count. Inputs are drawn from a fixed seed: a verdict can be repeated.

What this does not show: that the kernel helps anybody. Only a run's own counterfactual can.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper_core.blueprint.interface import Layout, Shape, SlotInterface
from esper_core.kernel.record import RejectionReason
from services.urabrask import leaks
from services.urabrask.finding import Unfit

Make = Callable[[], nn.Module]
"""Loads a fresh copy of the kernel from its artifact."""

TOKENS = 8
"""Sequence length tried where the slot leaves it open."""
ROWS = 16
"""Batch that safety is tried with."""
ORDINARY = "an ordinary"
"""What unit-scale input is called."""
LARGE = 1e3
"""Scale of the extreme input."""
MAX_SCALE = 1e4
"""Root mean square that an awake kernel's output may reach on a unit-scale input."""
MAX_GRADIENT, MIN_GRADIENT = 1e6, 1e-10
"""Range that the norm of an awake kernel's parameter gradient must stay in; what a single weight gets counts from the lower
end on."""


def shapes(interface: SlotInterface) -> tuple[Shape, Shape]:
    """Per-sample shapes entering and leaving; an open sequence length is taken as ``TOKENS``."""
    if interface.layout is Layout.TOKENS and not interface.in_size:
        return (TOKENS, interface.in_width), (TOKENS, interface.out_width)
    return interface.in_shape, interface.out_shape


def check(make: Make, interface: SlotInterface, rows: int = ROWS) -> None:
    """Run every check on ``rows`` samples.

    Raises:
        Unfit: at the first one it fails.
        RuntimeError: from the kernel itself.
    """
    enters, leaves = shapes(interface)
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, *enters, generator=draw)
    inputs = {ORDINARY: normal, "a zero": torch.zeros_like(normal), "a large": normal * LARGE}
    _weights(make())
    modes = (True, False) if any(True for _ in make().buffers()) else (True,)
    looks = [(training, name, x) for training in modes for name, x in inputs.items()]
    for training, name, x in looks:
        _asleep(make().train(training), x, (rows, *leaves), name)
    _can_learn(make(), normal)
    reached = set[str]().union(*(_awake(awaken(make().train(training)), x, name) for training, name, x in looks))
    for name, parameter in make().named_parameters():
        if parameter.dim() > 1 and name not in reached:
            raise Unfit(RejectionReason.VANISHES, f"the gradient vanishes before weight {name}")
    _repeatable(make, normal)
    for training in modes:
        module, two = awaken(make().train(training)), normal if rows > 1 else torch.cat([normal, -normal])
        leaks.rows(module, two, interface)
        leaks.future(module, normal, interface)
    lasting = awaken(make())
    leaks.memory(lambda: gradients(lasting, normal))


def awaken(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, by a fixed draw scaled to its fan-in. In place."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    return module


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Output, gradient at the input and at each parameter, of a loss of unit scale: output times a fixed unit draw."""
    x = x.clone().requires_grad_()
    y = module(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)) / math.sqrt(y.numel())
    wanted = [x, *module.parameters()]
    at_input, *at_parameters = torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True)
    return y.detach(), torch.zeros_like(x) if at_input is None else at_input, list(at_parameters)


def gradient_norm(found: list[Tensor | None]) -> float:
    """Norm over all parameters' gradients."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in found if gradient is not None))


def _weights(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise Unfit(RejectionReason.WEIGHTS_NOT_FINITE, f"weight {name} holds values that are not finite")


def _asleep(module: nn.Module, x: Tensor, leaves: tuple[int, ...], name: str) -> None:
    before = x.clone()
    with torch.no_grad():
        y = module(x)
    if not torch.equal(x, before):
        raise Unfit(RejectionReason.MUTATES_INPUT, "it changes its input")
    if tuple(y.shape) != leaves:
        raise Unfit(RejectionReason.SHAPE, f"it gives shape {tuple(y.shape)} where the slot needs {leaves}")
    if torch.count_nonzero(y):
        most = float(y.abs().max())
        raise Unfit(
            RejectionReason.NOT_SILENT if math.isfinite(most) else RejectionReason.OUTPUT_NOT_FINITE,
            f"as inserted it adds up to {most:.3g} to the host for {name} input instead of nothing",
        )


def _can_learn(module: nn.Module, x: Tensor) -> None:
    _, _, at_parameters = gradients(module, x)
    norm = gradient_norm(at_parameters)
    if not math.isfinite(norm):
        raise Unfit(RejectionReason.GRADIENT_NOT_FINITE, f"as inserted its gradient's norm is {norm:.3g}")
    if norm < MIN_GRADIENT:
        raise Unfit(RejectionReason.CANNOT_LEARN, f"as inserted it cannot learn: its gradient's norm is {norm:.3g}")


def _awake(module: nn.Module, x: Tensor, name: str) -> set[str]:
    """Names of the parameters that a gradient of ordinary input reached, not just a trace of one."""
    y, at_input, at_parameters = gradients(module, x)
    if not torch.isfinite(y).all():
        raise Unfit(RejectionReason.OUTPUT_NOT_FINITE, f"its output is not finite for {name} input")
    gradients_by_name = dict(zip(dict(module.named_parameters()), at_parameters, strict=True))
    for what, gradient in {"input": at_input, **gradients_by_name}.items():
        if gradient is None:
            raise Unfit(RejectionReason.UNREACHED, f"no gradient reaches its weight {what}")
        if not torch.isfinite(gradient).all():
            raise Unfit(RejectionReason.GRADIENT_NOT_FINITE, f"the gradient at {what} is not finite for {name} input")
    if name != ORDINARY:
        return set()
    _scale(y, gradient_norm(at_parameters))
    return {what for what, gradient in gradients_by_name.items() if gradient_norm([gradient]) >= MIN_GRADIENT}


def _scale(y: Tensor, norm: float) -> None:
    if (rms := float(y.double().square().mean().sqrt())) > MAX_SCALE:
        raise Unfit(RejectionReason.EXPLODES, f"it explodes: an input of scale 1 comes out at scale {rms:.3g}")
    if not MIN_GRADIENT <= norm <= MAX_GRADIENT:
        raise Unfit(
            RejectionReason.VANISHES if norm < MIN_GRADIENT else RejectionReason.EXPLODES,
            f"its gradient's norm of {norm:.3g} is outside {MIN_GRADIENT:g} to {MAX_GRADIENT:g}",
        )


def _repeatable(make: Make, x: Tensor) -> None:
    module = awaken(make())
    first, _, first_gradients = gradients(module, x)
    again, _, again_gradients = gradients(module, x)
    fresh, _, _ = gradients(awaken(make()), x)
    same = all(
        a is not None and b is not None and torch.equal(a, b)
        for a, b in zip(first_gradients, again_gradients, strict=True)
    )
    if not (same and torch.equal(first, again) and torch.equal(first, fresh)):
        raise Unfit(RejectionReason.NONDETERMINISTIC, "two equal calls give different results")
