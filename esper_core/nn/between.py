"""What stands between two layers of a host, as far as a widening kernel could repeat it for units of its own.

That is: at most one batch norm, then at most one elementwise activation, both working unit by unit. Everything else is named as an
obstacle: what mixes units (LayerNorm, GroupNorm), what has no name here.

Dropout works unit by unit too, and changes nothing of what a network computes once it is trained. A kernel has none, since drawing would
move the host's random state; its units come under the host's dropout when they are folded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from esper_core.blueprint.interface import BatchNorm

WidenableNorm = nn.BatchNorm1d | nn.BatchNorm2d

_ACTIVATIONS: Mapping[tuple[str, tuple[float, ...]], str] = {
    ("relu", ()): "relu",
    ("gelu", ()): "gelu",
    ("silu", ()): "silu",
    ("tanh", ()): "tanh",
    ("sigmoid", ()): "sigmoid",
    ("leaky_relu", ()): "leaky_relu",
    ("elu", ()): "elu",
    ("elu", (1.0,)): "elu",
    ("selu", ()): "selu",
    ("softplus", ()): "softplus",
    ("softplus", (1.0, 20.0)): "softplus",
    ("relu6", ()): "relu6",
    ("hardtanh", (0.0, 6.0)): "relu6",
    ("hardswish", ()): "hardswish",
    ("mish", ()): "mish",
}
"""By operation and its constants; one with others than the usual has no name."""
_NEUTRAL = {"alias", "contiguous", "clone", "detach"}
_DROPOUT = {"dropout", "feature_dropout"}
_BATCH_NORM = "batch_norm"
_MIXING = {
    "layer_norm": "LayerNorm",
    "group_norm": "GroupNorm",
    "instance_norm": "InstanceNorm",
    "rms_norm": "RMSNorm",
    "softmax": "softmax",
}


@dataclass(frozen=True)
class Between:
    """What was found.

    Attributes:
        activation: its name; empty when there is something else.
        norm, norm_path: the batch norm before it and its module's path; None and empty without one.
        obstacle: why a widening cannot repeat what stands there; empty when it can.
    """

    activation: str = ""
    norm: BatchNorm | None = None
    norm_path: str = ""
    obstacle: str = ""


class Norms:
    """The batch norms of an exported host, and whether each has a single place in its flow."""

    def __init__(self, model: nn.Module, nodes: Sequence[torch.fx.Node]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._calls = Counter(_module_path(node) for node in nodes if _operation(node) == _BATCH_NORM)
        self._names = Counter(
            id(tensor)
            for module in self.modules.values()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        )

    def find(self, node: torch.fx.Node) -> tuple[str, WidenableNorm] | str:
        """(path, module) of the batch norm computed at ``node``; why it cannot be widened otherwise."""
        path = _module_path(node)
        module = self.modules.get(path)
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            return "batch statistics are taken outside a BatchNorm module"
        assert isinstance(module, WidenableNorm)  # noqa: S101 - for the type checker
        tensors = [*module.parameters(), *module.buffers()]
        if self._calls[path] != 1 or any(self._names[id(tensor)] != 1 for tensor in tensors):
            return f"the norm {path} is used in more than one place"
        if module.momentum is None:
            return f"the norm {path} averages over all batches since its start, and new units start later"
        if (module.weight is None) != (module.bias is None):
            return f"the norm {path} has a factor per unit but no offset, a kernel's has both"
        if not (0 < module.eps <= 1 and 0 <= module.momentum <= 1):
            return f"the norm {path} has eps {module.eps} and momentum {module.momentum}: out of range"
        return path, module


def between(
    nodes: Sequence[torch.fx.Node], norms: Norms, source: nn.Linear | nn.Conv2d, shape: Sequence[int]
) -> Between:
    """Read the operations that follow one another from source to sink.

    Args:
        nodes: in order.
        norms: of the host.
        source: the layer before the first of them.
        shape: of what leaves it, (batch, ...).
    """
    activation, norm, path, drops = "", None, "", False
    for node in nodes:
        operation, name = _operation(node), _activation(node)
        if operation in _NEUTRAL:
            continue
        if operation in _DROPOUT:
            drops = drops or bool(node.args[1])
        elif name and not activation:
            activation = name
        elif operation == _BATCH_NORM and drops:
            return Between(
                obstacle="dropout stands before the norm, whose statistics a kernel's units would see without it"
            )
        elif operation == _BATCH_NORM and not norm and not activation:
            found = norms.find(node)
            if isinstance(found, str):
                return Between(obstacle=found)
            path, module = found
            if len(shape) != (4 if isinstance(source, nn.Conv2d) else 2):
                return Between(obstacle=f"the norm {path} is not per unit")
            norm = describe(module)
        else:
            return Between(obstacle=_obstacle(node, name))
    return Between(activation or "identity", norm, path)


def describe(norm: WidenableNorm) -> BatchNorm:
    """What a kernel must know of the norm to have one like it."""
    return BatchNorm(
        eps=norm.eps,
        momentum=norm.momentum or 0.0,
        affine=norm.weight is not None,
        track_running_stats=norm.running_mean is not None,
    )


def _operation(node: torch.fx.Node) -> str:
    """Name of an aten operation without its overload, the same in place or not."""
    return str(node.target).removeprefix("aten.").partition(".")[0].removesuffix("_")


def _activation(node: torch.fx.Node) -> str:
    operation = _operation(node)
    if operation == "gelu" and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    constants = tuple(value for value in node.args[1:] if isinstance(value, int | float))
    return _ACTIVATIONS.get((operation, constants), "") if len(node.args) == 1 + len(constants) else ""


def _obstacle(node: torch.fx.Node, name: str) -> str:
    operation = _operation(node)
    if operation in _MIXING:
        return f"{_MIXING[operation]} between the layers mixes units, so new ones would change the old"
    if operation == _BATCH_NORM:
        return "batch norm stands behind the activation, or there is more than one"
    if name:
        return "more than one activation stands between the layers"
    return f"{node.target} stands between the layers"


def _module_path(node: torch.fx.Node) -> str:
    """Path of the innermost module whose forward made the node; a later call's is marked ``@1`` and so on."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("", None))[0]
    return str(path).partition("@")[0]
