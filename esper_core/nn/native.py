"""A kernel's forward and backward pass as compiled code: two shared objects behind one autograd function.

The native part is a cache of what the blueprint says, for one kind of machine and a range of batch sizes; the kernel is
whole without it. The compiled objects do *not* check what they are given, so every call does: where shape, stride, dtype or
device of the input or of a parameter is another than at compilation, where the batch is out of range, autocast is on or a
compiler looks on, the module computes as ever, and both are counted (``Passes``). Loading executes what the objects contain:
whether their maker is trusted is settled before (:mod:`esper_core.kernel.native`). Traces nothing, and needs no compiler.

Two limits: gradients of gradients are refused, and results equal the eager ones up to rounding, so a run that uses native
kernels does not equal, bit for bit, one that does not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from esper_core.blueprint.interface import canonical_json
from esper_core.errors import Corrupt

MAGIC = b"ESPERNATIVE2"
MAX_HEADER = 65536
MAX_NATIVE_BYTES = 64 << 20
PARITY_LIMIT = 1e-4
"""Largest difference from the eager pass, relative to its scale, that counts as rounding."""
PARITY_ROWS = (5, 16)
"""Batch sizes at which it is compared; no size is compiled in, so any two tell."""
REBUILD = "have the kernel compiled anew"
NOT_BACK = "after the run was resumed its compiled code was not back yet"


@dataclass
class Passes:
    """How a kernel has run where it was asked to run natively.

    Attributes:
        native: forward passes by compiled code.
        gradients: backward passes by compiled code.
        eager: forward passes that were left to the module.
        why: of the last one of those.
    """

    native: int = 0
    gradients: int = 0
    eager: int = 0
    why: str = ""


class Place(BaseModel):
    """What one tensor must look like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(shape=tuple(tensor.shape), stride=tensor.stride())

    def fits(self, tensor: Tensor) -> bool:
        """Float32 on the CPU, of this shape and these strides."""
        return tensor.shape == self.shape and self._alike(tensor)

    def fits_batch(self, tensor: Tensor) -> bool:
        """The same of a batch with any number of rows."""
        return tensor.shape[1:] == self.shape[1:] and self._alike(tensor)

    def _alike(self, tensor: Tensor) -> bool:
        return tensor.stride() == self.stride and tensor.dtype is torch.float32 and tensor.is_cpu


class Layout(BaseModel):
    """How the two objects are called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[int, int]
    """Fewest and most rows of a batch."""
    entering: Place
    """A batch; its number of rows is that of the example it was traced with."""
    parameters: tuple[tuple[str, Place], ...] = Field(max_length=4096)
    """Names and looks, in the order in which they are passed after the batch."""
    kept: tuple[int, ...] = Field(max_length=4096)
    """What the backward pass is given first: -1 - i for the i-th input of the forward pass, n for its n-th output."""
    forward_bytes: int = Field(ge=1, le=MAX_NATIVE_BYTES)
    backward_bytes: int = Field(ge=1, le=MAX_NATIVE_BYTES)


def pack(layout: Layout, forward: bytes, backward: bytes) -> bytes:
    """One blob of both objects."""
    header = canonical_json(layout.model_dump(mode="json"))
    return b"".join((MAGIC, len(header).to_bytes(4, "big"), header, forward, backward))


def unpack(blob: bytes) -> tuple[Layout, bytes, bytes]:
    """What ``pack`` was given.

    Raises:
        Corrupt: it is no such blob.
    """
    start = len(MAGIC) + 4
    size = int.from_bytes(blob[len(MAGIC) : start], "big")
    if not blob.startswith(MAGIC) or size > MAX_HEADER:
        raise Corrupt("no native kernel", hint=REBUILD)
    try:
        layout = Layout.model_validate_json(blob[start : start + size])
    except ValidationError as error:
        raise Corrupt("the native kernel's header is malformed", hint=REBUILD) from error
    middle = start + size + layout.forward_bytes
    if len(blob) != middle + layout.backward_bytes:
        raise Corrupt("the native kernel is cut short", hint=REBUILD)
    return layout, blob[start + size : middle], blob[middle:]


class Native:
    """A loaded pair of objects. Never copied: copies of a module share it.

    Args:
        blob: as ``pack`` made it, from a trusted maker: loading runs it.

    Raises:
        Corrupt: from the constructor, when it cannot be loaded.
    """

    def __init__(self, blob: bytes) -> None:
        self.layout, forward, backward = unpack(blob)
        with tempfile.TemporaryDirectory(prefix="esper-native-") as folder:
            self._forward = _loaded(Path(folder) / "forward.pt2", forward)
            self._backward = _loaded(Path(folder) / "backward.pt2", backward)

    def attach(self, module: nn.Module, passes: Passes) -> None:
        """From now on ``module`` computes natively what fits, and ``passes`` counts.

        Raises:
            Corrupt: it is for a module with other parameters, or does not compute what the module does.
        """
        named = dict(module.named_parameters())
        if tuple((name, Place.of(parameter)) for name, parameter in named.items()) != self.layout.parameters:
            raise Corrupt("the native kernel is for another module's parameters", hint=REBUILD)
        difference = max(parity(self, module, rows) for rows in PARITY_ROWS)
        if not difference <= PARITY_LIMIT:
            raise Corrupt(f"the native kernel differs from its module by {difference:.3g}", hint=REBUILD)
        module.forward = Forward(module, self, passes)

    def run(self, inputs: Sequence[Tensor], passes: Passes) -> Tensor:
        """The pass over the batch and the parameters, which the caller has checked; differentiable once."""
        return _Pass.apply(self, passes, *inputs)  # type: ignore[no-any-return, no-untyped-call]

    def misfit(self, x: Tensor, parameters: Sequence[Tensor]) -> str:
        """Why the objects may not be given these; empty when they may."""
        layout = self.layout
        if not layout.entering.fits_batch(x):
            return f"a batch of {tuple(x.shape)}, strides {x.stride()}, {x.dtype} on {x.device.type}"
        if not layout.rows[0] <= len(x) <= layout.rows[1]:
            return f"a batch of {len(x)} rows"
        if len(parameters) != len(layout.parameters):
            return f"{len(parameters)} parameters"
        for (name, place), parameter in zip(layout.parameters, parameters, strict=True):
            if not place.fits(parameter):
                return f"{name} is no longer as it was"
        return ""

    def __deepcopy__(self, _: Mapping[int, Any]) -> Native:
        return self

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self._forward.boxed_run([tensor.detach() for tensor in inputs])  # type: ignore[no-any-return]

    def backward(self, kept: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        return self._backward.boxed_run([*kept, gradient])  # type: ignore[no-any-return]


def expect(module: nn.Module, passes: Passes) -> None:
    """Count what ``module`` computes as eager until a native part is attached."""
    module.forward = Forward(module, None, passes)


class Forward:
    """What stands in the place of a module's own ``forward``."""

    def __init__(self, module: nn.Module, native: Native | None, passes: Passes) -> None:
        self.module, self.native, self.passes = module, native, passes

    def __call__(self, x: Tensor) -> Tensor:
        leaving: Tensor
        if torch.compiler.is_compiling():
            leaving = type(self.module).forward(self.module, x)
            return leaving
        parameters = list(self.module.parameters())
        why = self._why_not(x, parameters)
        if self.native is None or why:
            self.passes.eager += 1
            self.passes.why = why
            leaving = type(self.module).forward(self.module, x)
            return leaving
        return self.native.run((x, *parameters), self.passes)

    def _why_not(self, x: Tensor, parameters: Sequence[Tensor]) -> str:
        if self.native is None:
            return NOT_BACK
        return "autocast" if torch.is_autocast_enabled("cpu") else self.native.misfit(x, parameters)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, native: Native, passes: Passes, *inputs: Tensor) -> Tensor:
        leaving, *values = native.forward(inputs)
        passes.native += 1
        ctx.native, ctx.passes = native, passes
        ctx.save_for_backward(*(inputs[-1 - k] if k < 0 else values[k] for k in native.layout.kept))
        return leaving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found = ctx.native.backward([t.detach() for t in ctx.saved_tensors], gradient.contiguous())
        ctx.passes.gradients += 1
        return None, None, *found


def parity(native: Native, module: nn.Module, rows: int) -> float:
    """Largest difference between native and eager, each relative to the eager's scale: outputs and every gradient.

    On a drawn batch of ``rows`` and drawn parameters of the module's shapes, so that a kernel that starts silent is compared awake.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((rows, *native.layout.entering.shape[1:]), generator=draw).requires_grad_()
    inputs = [x, *(_awake(parameter, draw) for parameter in module.parameters())]
    names = [name for name, _ in native.layout.parameters]
    y = torch.func.functional_call(
        _Eager(module), {f"module.{n}": p for n, p in zip(names, inputs[1:], strict=True)}, x
    )
    weight = torch.randn(y.shape, generator=draw)
    eager = [y, *torch.autograd.grad(y, inputs, weight)]
    z = native.run(inputs, Passes())
    ours = [z, *torch.autograd.grad(z, inputs, weight)]
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-6))
        for a, b in zip(ours, eager, strict=True)
    )


class _Eager(nn.Module):
    """A module's own forward, whatever stands in its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)


def _awake(parameter: Tensor, draw: torch.Generator) -> Tensor:
    scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
    moved = parameter.detach() + scale * torch.randn(parameter.shape, generator=draw)
    return moved.requires_grad_()


def _loaded(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except RuntimeError as error:
        raise Corrupt("the native kernel cannot be loaded", hint=REBUILD) from error
