"""What a slot offers a kernel: the tensor that enters the span and the tensor the kernel's output is added to.

Field names equal those of ``esper.core.v1.SlotInterface``. Knows nothing of the host beyond these figures: that a
convolution pads with zeros, and that nothing but ``norm`` and ``activation`` stands between source and sink, is the word
of whoever sets ``foldable``.
"""

from __future__ import annotations

import enum
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from esper_core.blueprint import activation as activations
from esper_core.errors import InvalidInput, nearest
from esper_core.ids import content_id

MAX_WIDTH = 1 << 20
MAX_SIZE = 1 << 16

Shape = tuple[int, ...]
"""Of one sample: (features,), (tokens, features) or (channels, height, width)."""


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Layout(enum.IntEnum):
    """How a tensor is laid out; the numbers equal those of ``esper.core.v1.Layout``."""

    FEATURES = 1
    """(batch, features)"""
    TOKENS = 2
    """(batch, tokens, features)"""
    IMAGE = 3
    """(batch, channels, height, width)"""


class ConvGeometry(BaseModel):
    """Geometry of a two-dimensional convolution that pads with zeros."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel_h: int = Field(ge=1, le=1024)
    kernel_w: int = Field(ge=1, le=1024)
    stride_h: int = Field(default=1, ge=1, le=1024)
    stride_w: int = Field(default=1, ge=1, le=1024)
    padding_h: int = Field(default=0, ge=0, le=1024)
    padding_w: int = Field(default=0, ge=0, le=1024)
    dilation_h: int = Field(default=1, ge=1, le=1024)
    dilation_w: int = Field(default=1, ge=1, le=1024)
    groups: int = Field(default=1, ge=1, le=65536)

    @property
    def kernel(self) -> tuple[int, int]:
        return self.kernel_h, self.kernel_w

    @property
    def stride(self) -> tuple[int, int]:
        return self.stride_h, self.stride_w

    @property
    def padding(self) -> tuple[int, int]:
        return self.padding_h, self.padding_w

    @property
    def dilation(self) -> tuple[int, int]:
        return self.dilation_h, self.dilation_w

    def leaving(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that leaves when ``size`` enters; below 1 when the kernel does not fit."""
        h, w = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return h, w


class BatchNorm(BaseModel):
    """Batch normalisation of a host: one mean and one variance per channel, over the batch and every position.

    A channel's values depend on no other channel, so channels with statistics of their own can be appended exactly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eps: float = Field(default=1e-5, gt=0, le=1)
    """Added to the variance before its root is taken."""
    momentum: float = Field(default=0.1, ge=0, le=1)
    """Share of the newest batch in the running statistics."""
    affine: bool = True
    """Whether it learns a factor and an offset per channel."""
    track_running_stats: bool = True
    """Whether it keeps running statistics for evaluation; otherwise every batch is measured by its own."""


_YOUNGER = frozenset({"norm", "source_bias_free", "sink_bias_free"})
"""Fields of a slot that came after the first kernels had been signed."""


class SlotInterface(BaseModel):
    """The two tensors of a slot and, where known, the layers between them.

    Raises:
        InvalidInput: from the constructor, when the figures contradict one another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout
    in_width: int = Field(ge=1, le=MAX_WIDTH)
    """Features or channels entering the span."""
    out_width: int = Field(ge=1, le=MAX_WIDTH)
    """Features or channels leaving the span."""
    hidden_width: int = Field(ge=1, le=MAX_WIDTH)
    """Units or channels of the spanned layer."""
    in_size: tuple[int, ...] = ()
    """(height, width) entering for IMAGE; () or (tokens,) for TOKENS; () for FEATURES."""
    out_size: tuple[int, ...] = ()
    """The same for what leaves."""
    activation: str = ""
    """The one elementwise activation between source and sink; empty when there is more or something else."""
    source: ConvGeometry | None = None
    """Geometry of the spanned convolution; None unless IMAGE."""
    sink: ConvGeometry | None = None
    """Geometry of the convolution after it; None unless IMAGE."""
    foldable: bool = False
    """Whether nothing but ``norm`` and ``activation`` stands between source and sink: a widening can become host weights."""
    norm: BatchNorm | None = None
    """The normalisation between source and activation; None when there is none. Not for TOKENS."""
    source_bias_free: bool = False
    """Whether the spanned layer has no bias."""
    sink_bias_free: bool = False
    """Whether the layer after it has no bias."""

    @property
    def id(self) -> str:
        """``interface-<sha256>`` over the canonical bytes: equal interfaces have equal names everywhere."""
        return content_id("interface", canonical_json(self.model_dump(mode="json")))

    @property
    def in_shape(self) -> Shape:
        """Per-sample shape entering; TOKENS of unknown length count as one token, so costs are then per token."""
        return self._shape(self.in_width, self.in_size)

    @property
    def out_shape(self) -> Shape:
        """Per-sample shape that a kernel must give."""
        return self._shape(self.out_width, self.out_size)

    def takes_bias(self, side: str) -> bool:
        """Whether an affine op of a kernel in the place of the host's ``side``, source or sink, shall have a bias.

        Not before a norm, which subtracts it again, nor where folding would find no place for it.
        """
        if side == "source":
            return self.norm is None and not (self.foldable and self.source_bias_free)
        return not (self.foldable and self.sink_bias_free)

    @model_serializer(mode="wrap")
    def _sparing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out younger fields that say nothing: ids and signatures from before them stay as they were."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name not in _YOUNGER or value}

    def _shape(self, width: int, size: tuple[int, ...]) -> Shape:
        if self.layout is Layout.IMAGE:
            return (width, *size)
        if self.layout is Layout.TOKENS:
            return (*(size or (1,)), width)
        return (width,)

    @model_validator(mode="after")
    def _consistent(self) -> SlotInterface:
        ranks = {Layout.FEATURES: (0,), Layout.TOKENS: (0, 1), Layout.IMAGE: (2,)}[self.layout]
        sizes = (self.in_size, self.out_size)
        if any(len(size) not in ranks or not all(1 <= n <= MAX_SIZE for n in size) for size in sizes):
            raise InvalidInput(
                f"sizes {self.in_size} and {self.out_size} do not suit layout {self.layout.name}",
                hint="IMAGE has (height, width), TOKENS () or (tokens,), FEATURES (); each 1 to 65536",
            )
        if self.layout is Layout.TOKENS and self.in_size != self.out_size:
            raise InvalidInput(
                "the number of tokens changes over the span", hint="only spans that keep it can be slots"
            )
        if self.activation and self.activation not in activations.NAMES:
            hint = f"{nearest(self.activation, activations.NAMES)} leave it empty for anything else"
            raise InvalidInput(f"unknown activation {self.activation!r}", hint=hint)
        if self.layout is not Layout.IMAGE and (self.source or self.sink):
            raise InvalidInput("only IMAGE slots have convolution geometry", hint="leave source and sink unset")
        if self.layout is Layout.TOKENS and self.norm:
            raise InvalidInput(
                "batch normalisation over tokens is not per feature", hint="leave norm unset, and foldable=False"
            )
        if self.foldable:
            self._check_foldable()
        return self

    def _check_foldable(self) -> None:
        if not self.activation:
            raise InvalidInput("a foldable slot needs its activation's name", hint="set activation, or foldable=False")
        if self.layout is not Layout.IMAGE:
            return
        if self.source is None or self.sink is None:
            raise InvalidInput(
                "a foldable IMAGE slot needs both geometries", hint="set source and sink, or foldable=False"
            )
        h, w = self.in_size
        if self.sink.leaving(self.source.leaving((h, w))) != self.out_size:
            raise InvalidInput(
                f"source and sink do not lead from {self.in_size} to {self.out_size}",
                hint="something else changes the size in between: foldable=False",
            )
