"""The op registry: what each operation takes, what shape it gives and what it costs.

All arithmetic is on Python ints and nothing is allocated, so a blueprint from a stranger is judged without
building it. Shapes are those of one sample; rank tells the layout: (features,), (tokens, features) or
(channels, height, width).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from esper_core.blueprint import activation as activations
from esper_core.blueprint.interface import ConvGeometry, Shape, SlotInterface
from esper_core.blueprint.refusal import Refusal

FEATURES, TOKENS, IMAGE = 1, 2, 3
"""Ranks of a per-sample shape."""


class Kind(enum.Enum):
    """What an attribute's text means."""

    WIDTH = enum.auto()
    """A width expression of at least 1."""
    COUNT = enum.auto()
    """A width expression of at least 0."""
    STRIDE = enum.auto()
    """A width expression of at least 1, or ``source`` / ``sink``: the stride of that host layer (1 when unknown)."""
    WORD = enum.auto()
    """One of a few words."""


@dataclass(frozen=True)
class Attribute:
    """An attribute an op understands; required unless it has a default."""

    kind: Kind
    default: str | None = None
    words: tuple[str, ...] = ()


class Silence(enum.Enum):
    """How an op can be made to give zeros at first and still pass a gradient to what shall learn."""

    HERE = enum.auto()
    """Zero its own weight and bias."""
    THROUGH = enum.auto()
    """Zero its input: it gives zero for zero, with a slope."""
    EVERY = enum.auto()
    """Zero all its inputs."""
    ONE = enum.auto()
    """Zero exactly one input; zeroing more would stop the gradient."""
    NEVER = enum.auto()
    """Not zero for zero, or flat there."""


@dataclass(frozen=True)
class Cost:
    """What one op gives and takes. FLOPs: multiply-adds times two, plus one per element of an elementwise op."""

    shape: Shape
    parameters: int = 0
    flops: int = 0
    extra: int = 0
    """Elements kept for the backward pass beside the output itself."""


@dataclass(frozen=True)
class Call:
    """One op with its attributes resolved and its inputs' shapes known."""

    interface: SlotInterface
    inputs: tuple[Shape, ...]
    numbers: Mapping[str, int] = field(default_factory=dict)
    """WIDTH and COUNT attributes."""
    words: Mapping[str, str] = field(default_factory=dict)
    """WORD attributes; ``host``, ``source`` and ``sink`` already replaced."""
    stride: tuple[int, int] = (1, 1)

    @property
    def shape(self) -> Shape:
        return self.inputs[0]

    @property
    def bias(self) -> bool:
        return self.words.get("bias") == "yes"

    def geometry(self, op: str) -> ConvGeometry:
        """Geometry of a convolution op; ``source_conv`` and ``sink_conv`` take the host's, ungrouped.

        Raises:
            Refused: BAD_SHAPE when the slot has no such geometry.
        """
        if op in ("source_conv", "sink_conv"):
            side = op.removesuffix("_conv")
            host = self.interface.source if side == "source" else self.interface.sink
            if host is None:
                raise Refusal.BAD_SHAPE.because(
                    f"the slot has no {side} convolution to copy", hint="use conv with its own geometry"
                )
            return host.model_copy(update={"groups": 1})
        n = self.numbers
        groups = self.shape[0] if op == "depthwise_conv" else n["groups"]
        k, p, d = n["kernel"], n["padding"], n.get("dilation", 1)
        if max(k, p, d, *self.stride) > 1024 or groups > 65536:
            raise Refusal.BAD_SHAPE.because(
                "convolution geometry is out of range", hint="at most 1024 each, and 65536 groups"
            )
        (sh, sw) = self.stride
        return ConvGeometry(
            kernel_h=k,
            kernel_w=k,
            stride_h=sh,
            stride_w=sw,
            padding_h=p,
            padding_w=p,
            dilation_h=d,
            dilation_w=d,
            groups=groups,
        )


@dataclass(frozen=True)
class Op:
    """An entry of the registry."""

    name: str
    cost: Callable[[Call], Cost]
    """Raises Refused when the inputs' shapes do not suit."""
    attributes: Mapping[str, Attribute]
    silence: Silence
    ranks: tuple[int, ...] = (FEATURES, TOKENS, IMAGE)
    """Ranks of the first input that it accepts."""
    arity: tuple[int, int] = (1, 1)
    """Fewest and most inputs."""


def _elementwise(call: Call) -> Cost:
    return Cost(call.shape, flops=math.prod(call.shape))


def _linear(call: Call) -> Cost:
    *lead, width = call.shape
    out = call.numbers["out"]
    return Cost((*lead, out), width * out + out * call.bias, 2 * math.prod(lead) * width * out)


def _conv(op: str) -> Callable[[Call], Cost]:
    def cost(call: Call) -> Cost:
        channels, h, w = call.shape
        geometry = call.geometry(op)
        out = channels if op == "depthwise_conv" else call.numbers["out"]
        if channels % geometry.groups or out % geometry.groups:
            raise Refusal.BAD_SHAPE.because(
                f"{geometry.groups} groups divide {channels} → {out} channels unevenly", hint="use groups 1"
            )
        size = geometry.leaving((h, w))
        if min(size) < 1:
            raise Refusal.BAD_SHAPE.because(
                f"a {geometry.kernel} kernel does not fit a {h}×{w} image", hint="pad more, or use kernel 1"
            )
        weights = out * (channels // geometry.groups) * math.prod(geometry.kernel)
        return Cost((out, *size), weights + out * call.bias, 2 * weights * math.prod(size))

    return cost


def _group_norm(call: Call) -> Cost:
    channels, groups = call.shape[0], call.numbers["groups"]
    if channels % groups:
        raise Refusal.BAD_SHAPE.because(f"{groups} groups divide {channels} channels unevenly", hint="use groups 1")
    if math.prod(call.shape) // groups < 2:
        raise Refusal.UNREACHABLE_GRADIENT.because(
            "one value per group has no variance to normalise by", hint="use fewer groups"
        )
    return Cost(call.shape, 2 * channels, 4 * math.prod(call.shape))


def _host_norm(call: Call) -> Cost:
    norm = call.interface.norm
    if norm is None:
        return Cost(call.shape, extra=-math.prod(call.shape))  # the identity keeps nothing: its output is its input
    return Cost(call.shape, 2 * channels_of(call.shape) * norm.affine, 4 * math.prod(call.shape))


def _layer_norm(call: Call) -> Cost:
    if call.shape[-1] < 2:
        raise Refusal.UNREACHABLE_GRADIENT.because(
            "one feature has no variance to normalise by", hint="normalise a wider tensor"
        )
    return Cost(call.shape, 2 * call.shape[-1], 4 * math.prod(call.shape))


def channels_of(shape: Shape) -> int:
    """Features or channels of a per-sample shape."""
    return shape[0] if len(shape) == IMAGE else shape[-1]


def _pool(call: Call) -> Cost:
    return Cost((channels_of(call.shape),), flops=math.prod(call.shape))


def _match(call: Call) -> Cost:
    size = call.interface.out_size
    if len(size) != 2:
        raise Refusal.BAD_SHAPE.because(
            "only IMAGE slots have an output size to match", hint="leave match_output_size out"
        )
    shape = (call.shape[0], *size)
    return Cost(shape, flops=0 if shape == call.shape else max(math.prod(call.shape), math.prod(shape)))


def _combine(call: Call) -> Cost:
    for other in call.inputs[1:]:
        if other not in (call.shape, (channels_of(call.shape),)):
            raise Refusal.BAD_SHAPE.because(
                f"shapes {call.shape} and {other} do not combine",
                hint="equal shapes, or one value per channel after the first",
            )
    return Cost(call.shape, flops=(len(call.inputs) - 1) * math.prod(call.shape))


def _scale(call: Call) -> Cost:
    return Cost(call.shape, channels_of(call.shape), math.prod(call.shape))


def _attention(call: Call) -> Cost:
    tokens, features = call.shape
    width, heads, out = (call.numbers[name] for name in ("width", "heads", "out"))
    if width % heads:
        raise Refusal.BAD_SHAPE.because(
            f"{heads} heads divide width {width} unevenly", hint="make width a multiple of heads"
        )
    weights = 3 * width * features + width * out
    scores = heads * tokens * tokens
    return Cost(
        (tokens, out),
        weights + 3 * width + out,
        2 * tokens * weights + 4 * tokens * tokens * width,
        scores + 3 * tokens * width,
    )


_OUT = {"out": Attribute(Kind.WIDTH)}
_BIAS = {"bias": Attribute(Kind.WORD, "yes", ("yes", "no", "source", "sink"))}
"""``source`` / ``sink``: yes where that layer of the host has a place for one."""
_WINDOW = {
    "kernel": Attribute(Kind.WIDTH, "1"),
    "stride": Attribute(Kind.STRIDE, "1"),
    "padding": Attribute(Kind.COUNT, "0"),
    "dilation": Attribute(Kind.WIDTH, "1"),
}
_ACTIVATION = {
    "kind": Attribute(Kind.WORD, "host", ("host", *activations.NAMES)),
    "otherwise": Attribute(Kind.WORD, "", ("", *activations.NAMES)),
}
_ATTENTION = {
    "width": Attribute(Kind.WIDTH),
    "heads": Attribute(Kind.WIDTH, "1"),
    "causal": Attribute(Kind.WORD, "yes", ("yes", "no")),
}

_ROW = (FEATURES, TOKENS)
_ENTRIES = (
    Op("linear", _linear, {**_OUT, **_BIAS}, Silence.HERE, _ROW),
    Op(
        "conv",
        _conv("conv"),
        {**_OUT, **_WINDOW, "groups": Attribute(Kind.WIDTH, "1"), **_BIAS},
        Silence.HERE,
        (IMAGE,),
    ),
    Op("depthwise_conv", _conv("depthwise_conv"), {**_WINDOW, **_BIAS}, Silence.HERE, (IMAGE,)),
    Op("source_conv", _conv("source_conv"), {**_OUT, **_BIAS}, Silence.HERE, (IMAGE,)),
    Op("sink_conv", _conv("sink_conv"), {**_OUT, **_BIAS}, Silence.HERE, (IMAGE,)),
    Op("attention", _attention, {**_ATTENTION, **_OUT}, Silence.HERE, (TOKENS,)),
    Op("scale", _scale, {}, Silence.HERE),
    Op("group_norm", _group_norm, {"groups": Attribute(Kind.WIDTH, "1")}, Silence.HERE, (IMAGE,)),
    Op("layer_norm", _layer_norm, {}, Silence.HERE, _ROW),
    # The host's own batch norm with statistics of its own; the identity where the span has none.
    Op("host_norm", _host_norm, {}, Silence.NEVER),
    Op("activation", _elementwise, _ACTIVATION, Silence.NEVER),
    Op("global_average_pool", _pool, {}, Silence.THROUGH, (TOKENS, IMAGE)),
    Op("match_output_size", _match, {}, Silence.THROUGH, (IMAGE,)),
    Op("add", _combine, {}, Silence.EVERY, arity=(2, 8)),
    Op("multiply", _combine, {}, Silence.ONE, arity=(2, 8)),
)

REGISTRY: Mapping[str, Op] = {op.name: op for op in _ENTRIES}
"""Every op by name."""

BANNED: Mapping[str, str] = {
    "dropout": "it draws random numbers, and so would move the host's: equal seeds would no longer give equal runs",
    "random": "a kernel draws no random numbers: equal seeds must give equal runs",
    "noise": "a kernel draws no random numbers: equal seeds must give equal runs",
    "batch_norm": "a kernel shares no running statistics with its host; use group_norm, layer_norm or host_norm",
    "detach": "it stops the gradient of everything before it",
    "round": "its gradient is zero everywhere",
    "argmax": "it has no gradient",
    "custom": "a blueprint is data: it names operations of the registry and brings none",
    "python": "a blueprint is data, never code",
    "eval": "a blueprint is data, never code",
    "load": "a kernel reads nothing but what enters it",
}
"""Operations that somebody may think of and that no kernel may contain, each with the reason."""


def silence(op: str, words: Mapping[str, str]) -> Silence:
    """How a resolved op can be silenced; an activation's answer depends on which it is."""
    if op == "activation" and words["kind"] in activations.OPEN_AT_ZERO:
        return Silence.THROUGH
    return REGISTRY[op].silence
