"""Standard exercises: how well a kernel can learn what a slot of its interface may ask of it.

Each exercise is a small random teacher over inputs of low effective rank, as the features inside a network are. The kernel is trained
alone with Adam for a fixed number of steps; its mark is the share of the variance of held-back targets that it then explains. Everything
is drawn from fixed seeds and computed on one thread, so a mark can be repeated on one machine to the last bit.

What a mark does not say: that a host is short of exactly this. It ranks kernels by what they *could* take over, for the price they have.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_core.blueprint.build import KernelModule
from esper_core.blueprint.interface import Layout, Shape, SlotInterface
from esper_core.errors import InvalidInput
from esper_core.nn.chance import undisturbed

LEVELS = (1, 2, 3)
"""How hard: a teacher of level n reads 2^n directions of 3·2^n that the inputs vary in."""
FLOOR = -1.0
"""The mark of a kernel that diverges, and the least that any can get."""
STEPS = 100
"""Training steps of one exercise."""
ROWS, BATCH = 640, 128
"""Samples of one exercise, a fifth of them held back, and samples in one step; fewer where samples are large."""
ELEMENTS, BATCH_ELEMENTS = 1 << 18, 1 << 15
"""Numbers that all samples, and those of one step, may hold."""
KEPT_ELEMENTS = 1 << 23
"""Numbers that the backward pass of one step may keep."""
FEWEST = 4
"""Samples in one step with which a kernel is still taught."""
FLOPS = 10e9
"""Floating-point operations of one exercise; a kernel for which that is not enough is not taught."""
LEARNING_RATE = 0.02
"""At the first step; it falls along a cosine."""
TOKENS, SIDE = 8, 8
"""Longest sequence, and the least side of an image, that is taught with: kernels' weights do not depend on them."""


@dataclass(frozen=True)
class Mark:
    """How one exercise went."""

    name: str
    level: int
    explained: float
    """Share of the held-back variance, ``FLOOR`` to 1; 0 is what adding nothing explains."""
    steps: int


@dataclass(frozen=True)
class Exercise:
    """Inputs (rows, *in_shape) and targets (rows, *out_shape), these of mean 0 and variance 1."""

    name: str
    level: int
    inputs: Tensor
    targets: Tensor


def study(make: Callable[[], KernelModule], levels: Iterable[int] = LEVELS) -> list[Mark]:
    """The marks of every exercise, each learnt by a fresh kernel.

    Args:
        make: gives the kernel as it is inserted, adding nothing.
        levels: which of ``LEVELS``.

    Returns:
        Nothing for a kernel too dear to be taught within ``FLOPS``.
    """
    kernel = _resized(make())
    interface = kernel.interface
    open_length = interface.layout is Layout.TOKENS and not interface.in_size
    times = TOKENS if open_length else 1  # the analysis then counts one token
    flops, kept = (times * figure for figure in (kernel.analysis.flops, kernel.analysis.activation_elements))
    batch = min(
        BATCH,
        BATCH_ELEMENTS // _elements(interface),
        KEPT_ELEMENTS // max(1, kept),
        int(FLOPS / max(1, 3 * flops * STEPS)),  # forward, and twice that backward
    )
    if batch < FEWEST:
        return []
    return [learn(_resized(make()), exercise, batch) for level in levels for exercise in exercises(interface, level)]


def _resized(kernel: KernelModule) -> KernelModule:
    """The same weights over a smaller image or a shorter sequence, where those are large and its design allows it."""
    interface = _smaller(kernel.interface)
    if interface == kernel.interface:
        return kernel
    try:
        twin = KernelModule(kernel.ir, interface, kernel.symbols)
    except InvalidInput:
        return kernel
    twin.load_state_dict(kernel.state_dict(), assign=True)
    return twin


def _smaller(interface: SlotInterface) -> SlotInterface:
    if interface.layout is not Layout.IMAGE:
        size = tuple(min(TOKENS, n) for n in interface.in_size)
        return interface.model_copy(update={"in_size": size, "out_size": size})
    times = max(1, min(interface.in_size) // SIDE)
    height, width = (n // times for n in interface.in_size)
    leaving = tuple(max(1, round(n / times)) for n in interface.out_size)
    if interface.source and interface.sink and interface.foldable:
        leaving = interface.sink.leaving(interface.source.leaving((height, width)))
    if min(leaving) < 1:
        return interface
    return interface.model_copy(update={"in_size": (height, width), "out_size": leaving})


def exercises(interface: SlotInterface, level: int) -> list[Exercise]:
    """What is asked at ``level``, the same every time."""
    entering, leaving = _shapes(interface)
    rows = _rows(interface)
    found = []
    for name, teacher in _TEACHERS[interface.layout].items():
        draw = torch.Generator().manual_seed(zlib.crc32(f"{name} {level}".encode()))
        inputs = _inputs(draw, rows, entering, 3 << level)
        with torch.no_grad():
            targets = _fitted(teacher(draw, inputs, 1 << level), leaving, draw)
        found.append(Exercise(name, level, inputs, _standard(targets)))
    return found


def learn(kernel: nn.Module, exercise: Exercise, batch: int) -> Mark:
    """Train ``kernel`` with ``batch`` rows a step, in place, and mark it on the rows held back."""
    with _one_thread(), undisturbed(), torch.enable_grad():
        torch.manual_seed(0)
        explained = _learnt(kernel, exercise, batch)
    return Mark(exercise.name, exercise.level, explained, STEPS)


def _learnt(kernel: nn.Module, exercise: Exercise, batch: int) -> float:
    held = len(exercise.inputs) // 5
    inputs, targets = exercise.inputs[held:], exercise.targets[held:]
    parameters = list(kernel.parameters())
    if not parameters:
        return 0.0
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    draw = torch.Generator().manual_seed(0)
    kernel.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (0.02 + 0.98 * math.cos(math.pi / 2 * step / STEPS) ** 2)
        chosen = torch.randint(len(inputs), (min(batch, len(inputs)),), generator=draw)
        loss = functional.mse_loss(kernel(inputs[chosen]), targets[chosen])
        if not math.isfinite(loss.item()):
            return FLOOR
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    kernel.eval()
    with torch.no_grad():
        errors = [
            (kernel(x) - y).double().square().sum()
            for x, y in zip(exercise.inputs[:held].split(batch), exercise.targets[:held].split(batch), strict=True)  # type: ignore[no-untyped-call]
        ]
    explained = 1 - float(sum(errors)) / float(exercise.targets[:held].double().square().sum())
    return max(FLOOR, explained) if math.isfinite(explained) else FLOOR


def _shapes(interface: SlotInterface) -> tuple[Shape, Shape]:
    if interface.layout is Layout.TOKENS and not interface.in_size:
        return (TOKENS, interface.in_width), (TOKENS, interface.out_width)
    return interface.in_shape, interface.out_shape


def _elements(interface: SlotInterface) -> int:
    return max(map(math.prod, _shapes(interface)))


def _rows(interface: SlotInterface) -> int:
    return max(5 * FEWEST, min(ROWS, ELEMENTS // _elements(interface)))


def _inputs(draw: torch.Generator, rows: int, shape: Shape, rank: int) -> Tensor:
    """(rows, *shape) of unit variance, varying in ``rank`` directions of the features and a little in all; smooth over an image."""
    width = shape[0] if len(shape) == 3 else shape[-1]
    rank = min(rank, width)
    mix = torch.randn(width, rank, generator=draw) / math.sqrt(rank)
    if len(shape) != 3:
        latent = torch.randn(rows, *shape[:-1], rank, generator=draw)
        return latent @ mix.T + 0.1 * torch.randn(rows, *shape, generator=draw)
    height, breadth = shape[1:]
    coarse = torch.randn(rows, rank, max(1, (height + 1) // 2), max(1, (breadth + 1) // 2), generator=draw)
    latent = functional.interpolate(coarse, (height, breadth), mode="nearest")
    image = torch.einsum("oc,nchw->nohw", mix, latent)
    return image + 0.1 * torch.randn(rows, *shape, generator=draw)


def _fitted(hidden: Tensor, shape: Shape, draw: torch.Generator) -> Tensor:
    """What the teacher's units, (rows, …, units) or (rows, units, height, width), say about every feature leaving."""
    if len(shape) == 3:
        hidden = functional.adaptive_avg_pool2d(hidden, (shape[1], shape[2]))
        return torch.einsum("ou,nuhw->nohw", torch.randn(shape[0], hidden.shape[1], generator=draw), hidden)
    return hidden @ torch.randn(hidden.shape[-1], shape[-1], generator=draw)


def _standard(targets: Tensor) -> Tensor:
    """Mean 0 for every feature, variance 1 overall: a constant explains nothing."""
    axes = (0, 2, 3) if targets.dim() == 4 else tuple(range(targets.dim() - 1))
    centred = targets - targets.mean(axes, keepdim=True)
    return centred / centred.square().mean().sqrt().clamp_min(1e-12)


Teacher = Callable[[torch.Generator, Tensor, int], Tensor]
"""Generator, inputs and number of units to the units' values."""


def _read(draw: torch.Generator, x: Tensor, units: int) -> Tensor:
    """Each unit's own direction of the features, of unit variance: (rows, …, units)."""
    read = x @ torch.randn(x.shape[-1], units, generator=draw)
    return read / read.std()


def _filtered(draw: torch.Generator, x: Tensor, units: int) -> Tensor:
    """Each unit's own 3×3 filter over the channels, of unit variance: (rows, units, height, width)."""
    seen = functional.conv2d(x, torch.randn(units, x.shape[1], 3, 3, generator=draw), padding=1)
    return seen / seen.std()


def _rectified(look: Teacher) -> Teacher:
    return lambda draw, x, units: functional.relu(look(draw, x, units))


def _product(look: Teacher) -> Teacher:
    return lambda draw, x, units: look(draw, x, units) * look(draw, x, units)


def _periodic(look: Teacher) -> Teacher:
    return lambda draw, x, units: torch.sin(2.0 * look(draw, x, units) + 0.5)


def _earlier(draw: torch.Generator, x: Tensor, units: int) -> Tensor:
    """Every token hears what the tokens up to itself have to say, by how well these answer its question."""
    question, answer, said = (_read(draw, x, units) for _ in range(3))
    scores = question @ answer.transpose(-1, -2) * (2 / math.sqrt(units))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ said


def _gated(draw: torch.Generator, x: Tensor, units: int) -> Tensor:
    """Every position's units are weighed by what the whole image shows."""
    overall = x.mean((2, 3)) * math.sqrt(x.shape[2] * x.shape[3] / 4)
    weights = torch.sigmoid(2 * _read(draw, overall, units))[:, :, None, None]
    local = torch.einsum("uc,nchw->nuhw", torch.randn(units, x.shape[1], generator=draw), x)
    return local / local.std() * weights


_TEACHERS: Mapping[Layout, Mapping[str, Teacher]] = {
    Layout.FEATURES: {
        "linear": _read,
        "rectified": _rectified(_read),
        "product": _product(_read),
        "periodic": _periodic(_read),
    },
    Layout.TOKENS: {
        "rectified": _rectified(_read),
        "product": _product(_read),
        "periodic": _periodic(_read),
        "earlier": _earlier,
    },
    Layout.IMAGE: {
        "filter": _filtered,
        "rectified-filter": _rectified(_filtered),
        "product-filter": _product(_filtered),
        "gated": _gated,
    },
}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
