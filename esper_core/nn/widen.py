"""Making a kernel part of the host: rows for the source, columns for the sink, channels for the norm between them, and the
optimiser's memory of all.

After folding, the host is a plain network again, wider by the kernel's units; nothing of the kernel remains. Parameters change shape, so
they are new objects: whoever keeps a list of them must ask the model again. The optimiser is told here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule
from esper_core.blueprint.fold import Origin, fold_terms
from esper_core.blueprint.widening import widening
from esper_core.errors import Conflict, Corrupt
from esper_core.nn.between import WidenableNorm
from esper_core.nn.host import Host, Slot
from esper_core.nn.trace import Growable

Widenable = Growable | WidenableNorm


def fold(host: Host, slot: Slot, optimizer: torch.optim.Optimizer | None) -> bool:
    """Fold the slot's kernel, at its present alpha, into source, norm and sink; the slot is empty afterwards.

    Returns:
        False, and nothing changed, when there is an ``obstacle``.

    Raises:
        Conflict: when the slot has no kernel.
    """
    if slot.graft is None:
        raise Conflict(f"slot {slot.name} has no kernel to fold")
    kernel = cast(KernelModule, slot.graft.kernel)
    terms = None if obstacle(host, slot) else fold_terms(kernel, slot.interface, float(slot.graft.alpha))
    if terms is None or slot.layers is None:
        return False
    source, sink = slot.layers
    parameters = dict(kernel.named_parameters())
    grow = _Growth(optimizer, parameters)
    grow.replace(source, "weight", terms.source_weight, 0, terms.origins.get("source_weight"))
    if source.bias is not None:
        grow.replace(source, "bias", terms.source_bias, 0, terms.origins.get("source_bias"))
    grow.replace(sink, "weight", terms.sink_weight, 1, terms.origins.get("sink_weight"))
    if sink.bias is not None:
        with torch.no_grad():
            sink.bias.add_(terms.sink_bias)
    for name, extra in terms.norm.items():
        if name in ("weight", "bias"):
            grow.replace(cast(nn.Module, slot.norm), name, extra, 0, terms.origins.get(f"norm.{name}"))
        else:
            old = getattr(slot.norm, name)
            setattr(slot.norm, name, torch.cat([old, extra.to(old)]))
    _set_widths(source)
    _set_widths(sink)
    if slot.norm is not None:
        slot.norm.num_features += terms.units
    forget(optimizer, list(parameters.values()))
    slot.release()
    return True


def obstacle(host: Host, slot: Slot) -> str:
    """Why the slot's kernel cannot become part of the host's own weights now; empty when it can.

    Raises:
        Conflict: when the slot has no kernel.
    """
    if slot.graft is None:
        raise Conflict(f"slot {slot.name} has no kernel to fold")
    if slot.obstacle:
        return slot.obstacle
    kernel = cast(KernelModule, slot.graft.kernel)
    if widening(slot.interface, kernel.ir.output, kernel.analysis) is None:
        return f"{kernel.ir.name} is no widening of the spanned layer"
    return "" if host.can_widen(slot) else "the kernel of a neighbouring slot relies on the present widths"


def adopt(optimizer: torch.optim.Optimizer, like: nn.Parameter, parameters: list[nn.Parameter]) -> None:
    """Let the optimiser train new parameters in the group of ``like``: same learning rate, schedule and decay, fresh state.

    Raises:
        Conflict: when the optimiser does not hold ``like``.
    """
    for group in optimizer.param_groups:
        if any(parameter is like for parameter in group["params"]):
            group["params"].extend(parameters)
            return
    raise Conflict(
        "the optimiser does not hold the slot's own parameters", hint="build it over host.parameters() after wrapping"
    )


def forget(optimizer: torch.optim.Optimizer | None, parameters: list[nn.Parameter]) -> None:
    """Take parameters and their state out of the optimiser."""
    if optimizer is None:
        return
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def morphology(host: Host) -> dict[str, list[int]]:
    """Extents of every layer and batch norm: with this, a fresh host is made to fit the weights of one that has grown or been carved.

    The weight's shape of a layer, the number of channels of a norm.
    """
    return {path: extent(module) for path, module in host.model.named_modules() if isinstance(module, Widenable)}


def reshape(model: nn.Module, optimizer: torch.optim.Optimizer | None, shapes: Mapping[str, list[int]]) -> None:
    """Give a network the shapes of another; the values, and what an optimiser remembers of them, are to be loaded afterwards.

    Raises:
        Corrupt: when the shapes differ from this network's in more than widths.
    """
    for path, shape in shapes.items():
        module = cast(Widenable, model.get_submodule(path))
        present = extent(module)
        if present == list(shape):
            continue
        if len(present) != len(shape) or present[2:] != list(shape[2:]):
            raise Corrupt(
                f"{path} has weight {present}, the checkpoint {list(shape)}", hint="it belongs to another host"
            )
        for name, size in (("weight", shape), ("bias", shape[:1])):
            old = getattr(module, name)
            if old is not None and list(old.shape) != list(size):
                _swap(optimizer, module, name, old.new_empty(size))
                if optimizer is not None:
                    optimizer.state.pop(old, None)
        if isinstance(module, WidenableNorm):
            for name in _statistics(module):
                setattr(module, name, getattr(module, name).new_empty(shape))
            module.num_features = shape[0]
        else:
            _set_widths(module)


def conform(
    model: nn.Module, state: Mapping[str, Any], prefix: str = "", optimizer: torch.optim.Optimizer | None = None
) -> dict[str, list[int]]:
    """Give layers and batch norms the widths that a grown network's weights have; the values are to be loaded afterwards.

    Args:
        state: a ``state_dict`` with names from ``prefix`` on.
        optimizer: where replaced parameters are replaced too.

    Returns:
        Extents that the changed modules had, by path.

    Raises:
        Corrupt: when a layer differs in more than its widths.
    """
    had: dict[str, list[int]] = {}
    wanted: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Widenable):
            continue
        held = (state.get(f"{prefix}{path}.{name}") for name in ("weight", "running_mean"))
        shape = next((list(value.shape) for value in held if isinstance(value, Tensor)), None)
        if shape is not None and shape != extent(module):
            had[path], wanted[path] = extent(module), shape
    reshape(model, optimizer, wanted)
    return had


class _Growth:
    """Replaces one parameter after the other by a longer one, its optimiser state carried along."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, kernel: Mapping[str, nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.kernel = kernel

    def replace(self, module: nn.Module, name: str, extra: Tensor, dim: int, origin: Origin | None) -> None:
        old = cast(nn.Parameter, getattr(module, name))
        new = _swap(self.optimizer, module, name, torch.cat([old.detach(), extra.to(old)], dim))
        if self.optimizer is None or old not in self.optimizer.state:
            return
        state = self.optimizer.state.pop(old)
        theirs = self.optimizer.state.get(self.kernel[origin.parameter], {}) if origin else {}
        place: Callable[[Tensor], Tensor] = origin.place if origin else torch.clone
        rule = next(group for group in self.optimizer.param_groups if any(held is new for held in group["params"]))

        def longer(key: str, value: Tensor) -> Tensor:
            if key not in theirs:
                return torch.cat([value, torch.zeros_like(extra).to(value)], dim)
            return torch.cat([value, place(theirs[key]) * _age_ratio(key, rule, state, theirs)], dim)

        self.optimizer.state[new] = {
            key: longer(key, value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


_DECAYS = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
"""Averages that the Adam family corrects for their age, and which of its betas each decays by."""


def _age_ratio(key: str, rule: Mapping[str, Any], state: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Adam divides an average by 1 − βᵗ; a younger one is scaled so that at the older one's t the quotient is as it was."""
    if key not in _DECAYS or "betas" not in rule or not float(theirs.get("step", 0)):
        return 1.0
    beta = float(rule["betas"][_DECAYS[key]])
    older, younger = (1 - float(beta ** float(ages["step"])) for ages in (state, theirs))
    return older / younger


def _swap(optimizer: torch.optim.Optimizer | None, module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """Put a new parameter in the old one's place, in the module and in the optimiser's groups."""
    old = getattr(module, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    return new


def _statistics(norm: WidenableNorm) -> list[str]:
    """Names of the running statistics that it keeps per channel."""
    return [name for name, buffer in norm.named_buffers(recurse=False) if buffer.ndim == 1]


def extent(module: Widenable) -> list[int]:
    """A layer's weight shape, a norm's number of channels."""
    return [module.num_features] if isinstance(module, WidenableNorm) else list(module.weight.shape)


def _set_widths(module: Growable) -> None:
    out_width, in_width = module.weight.shape[:2]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = out_width, in_width
    else:
        module.out_channels, module.in_channels = out_width, in_width * module.groups
