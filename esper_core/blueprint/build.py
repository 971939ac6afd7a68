"""A blueprint at a slot, made into an ``nn.Module`` that gives exact zeros until it has learnt something.

Initial weights depend on the seed alone: the global random state is neither read nor moved. Where the host normalises by
batch, a kernel keeps statistics of its own units, never the host's, so one that runs isolated cannot disturb it. Knows
nothing of devices, optimisers or slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_core.blueprint import activation as activations
from esper_core.blueprint.analyse import LIMITS, Limits, Step, analyse
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import INPUT, BlueprintIR
from esper_core.blueprint.ops import IMAGE, channels_of

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, activations.LEAKY_SLOPE),
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "identity": lambda x: x,
}
"""Each name of :mod:`esper_core.blueprint.activation` as a function of a tensor."""


class KernelModule(nn.Module):
    """An executable kernel; parameters are named ``<node>.<parameter>``, for example ``A.weight``.

    Raises:
        InvalidInput: from the constructor, as :func:`esper_core.blueprint.analyse.analyse` does.
    """

    def __init__(
        self,
        ir: BlueprintIR,
        interface: SlotInterface,
        symbols: Mapping[str, int] | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        super().__init__()
        self.analysis = analyse(ir, interface, symbols, limits)
        self.ir = ir
        self.interface = interface
        self.symbols = ir.bind(symbols)
        for step in self.analysis.steps:
            # Not add_module: a node may be called `forward` or `train` and must not shadow the method.
            self._modules[step.node.name] = MAKERS[step.node.op](step)

    def forward(self, x: Tensor) -> Tensor:
        """What to add to the span's output: (batch, *in_shape) → (batch, *out_shape)."""
        values = {INPUT: x.contiguous()}
        for step, module in zip(self.analysis.steps, self.children(), strict=True):
            values[step.node.name] = module(*(values[name] for name in step.node.inputs))
        return values[self.ir.output]


def skeleton(ir: BlueprintIR, interface: SlotInterface, symbols: Mapping[str, int] | None = None) -> KernelModule:
    """The module with its parameters on the meta device: names, shapes and dtypes without memory or values."""
    with torch.device("meta"):
        return KernelModule(ir, interface, symbols)


def build(
    ir: BlueprintIR, interface: SlotInterface, symbols: Mapping[str, int] | None = None, seed: int = 0
) -> KernelModule:
    """The module on the CPU in float32, initialised from ``seed`` (0 … 2^64-1), silent.

    Raises:
        InvalidInput: when the blueprint does not fit the interface or exceeds the limits.
    """
    module = skeleton(ir, interface, symbols).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, child in module.named_children():
        _initialise(child, generator, silent=name in module.analysis.silenced)
    return module


@torch.no_grad()
def _initialise(module: nn.Module, generator: torch.Generator, *, silent: bool) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.reset_running_stats()  # memory without values until now
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            # Kaiming-uniform for activations that pass half of their input.
            bound = math.sqrt(6.0 / parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
        elif name == "weight":
            parameter.fill_(1.0)
        else:
            parameter.zero_()
    if silent:
        leaving = module.out if isinstance(module, Attention) else module
        for parameter in leaving.parameters():
            parameter.zero_()


def example_input(interface: SlotInterface, batch: int, seed: int, tokens: int = 16) -> Tensor:
    """Standard normal (batch, *in_shape) from ``seed``; ``tokens`` long where the slot leaves that open."""
    shape = interface.in_shape
    if interface.layout is Layout.TOKENS and not interface.in_size:
        shape = (tokens, *shape[1:])
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


class Activation(nn.Module):
    """One named elementwise function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Attention(nn.Module):
    """Multi-head self-attention: (batch, tokens, features) → (batch, tokens, out)."""

    def __init__(self, features: int, width: int, heads: int, out: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(features, 3 * width)
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # (batch, heads, tokens, dim)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


class Scale(nn.Module):
    """One learnable factor per channel."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.rank = len(shape)
        self.weight = nn.Parameter(torch.ones(channels_of(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x * _per_channel(self.weight, self.rank)


class GlobalAveragePool(nn.Module):
    """Mean over tokens or over height and width: (batch, features)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.axes = (2, 3) if rank == IMAGE else (1,)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


class MatchOutputSize(nn.Module):
    """Average pooling to the slot's output size; nothing when it already has it."""

    def __init__(self, size: tuple[int, int], entering: tuple[int, int]) -> None:
        super().__init__()
        self.size, self.entering = size, entering
        ratio = (entering[0] // size[0], entering[1] // size[1])
        # Whole ratios take the plain pooling, whose gradient is deterministic on every device.
        self.ratio = ratio if (ratio[0] * size[0], ratio[1] * size[1]) == entering else None

    def forward(self, x: Tensor) -> Tensor:
        if self.size == self.entering:
            return x
        return F.avg_pool2d(x, self.ratio) if self.ratio else F.adaptive_avg_pool2d(x, self.size)


class Combine(nn.Module):
    """Sum or product of several inputs; the later ones may have one value per channel."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.product = step.node.op == "multiply"
        self.ranks = [len(shape) for shape in step.call.inputs]

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        for other, rank in zip(others, self.ranks[1:], strict=True):
            value = other if rank == self.ranks[0] else _per_channel(other, self.ranks[0])
            first = first * value if self.product else first + value
        return first


def _per_channel(values: Tensor, rank: int) -> Tensor:
    """(…, channels) made to broadcast over a batch of per-sample rank ``rank``."""
    if rank == IMAGE:
        return values[..., None, None]
    return values.unsqueeze(-2) if rank == 2 else values


def _linear(step: Step) -> nn.Module:
    return nn.Linear(step.call.shape[-1], step.call.numbers["out"], bias=step.call.bias)


def _conv(step: Step) -> nn.Module:
    geometry = step.call.geometry(step.node.op)
    return nn.Conv2d(
        step.call.shape[0],
        step.cost.shape[0],
        geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        bias=step.call.bias,
    )


def _attention(step: Step) -> nn.Module:
    n = step.call.numbers
    return Attention(step.call.shape[-1], n["width"], n["heads"], n["out"], causal=step.call.words["causal"] == "yes")


def _host_norm(step: Step) -> nn.Module:
    norm = step.call.interface.norm
    if norm is None:
        return nn.Identity()
    make = nn.BatchNorm2d if len(step.call.shape) == IMAGE else nn.BatchNorm1d
    return make(
        channels_of(step.call.shape),
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )


def _match(step: Step) -> nn.Module:
    (_, h, w), (_, oh, ow) = step.call.shape, step.cost.shape
    return MatchOutputSize((oh, ow), (h, w))


MAKERS: Mapping[str, Callable[[Step], nn.Module]] = {
    "linear": _linear,
    "conv": _conv,
    "depthwise_conv": _conv,
    "source_conv": _conv,
    "sink_conv": _conv,
    "attention": _attention,
    "scale": lambda step: Scale(step.call.shape),
    "group_norm": lambda step: nn.GroupNorm(step.call.numbers["groups"], step.call.shape[0]),
    "host_norm": _host_norm,
    "layer_norm": lambda step: nn.LayerNorm(step.call.shape[-1]),
    "activation": lambda step: Activation(step.call.words["kind"]),
    "global_average_pool": lambda step: GlobalAveragePool(len(step.call.shape)),
    "match_output_size": _match,
    "add": Combine,
    "multiply": Combine,
}
"""How each op of the registry is made."""
