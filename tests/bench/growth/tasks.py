"""The development tasks. A planted layer's position moves with the seed, so that no rule can learn where it is.

Acceptance uses other tasks with other generators: nothing in the product may be tuned to these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from services.tolaria.arena.task import Setup, Task
from services.tolaria.config import DatasetConfig
from services.tolaria.datasets import Data, Part, prepare
from services.tolaria.hosts import cnn, mlp
from services.tolaria.order import generator

TRAIN, HELD = 1536, 512


def adam(rate: float, decay: float = 0.0) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Adam; the fused kind, which takes two thirds of a small network's step time off."""
    return partial(torch.optim.AdamW, lr=rate, weight_decay=decay, fused=True)


def as_it_is(inputs: Tensor, targets: Tensor) -> Part:
    """A part whose inputs are not standardised any more."""
    return Part(inputs, targets, torch.zeros(()), torch.ones(()))


def relabelled(data: Data, share: float, source: torch.Generator) -> Data:
    """The same, but for a share of the training and validation labels, which are drawn anew."""

    def noisy(part: Part) -> Part:
        drawn = torch.randint(data.outputs, part.targets.shape, generator=source)
        hit = torch.rand(part.targets.shape, generator=source) < share
        return replace(part, targets=torch.where(hit, drawn, part.targets))

    return replace(data, train=noisy(data.train), validation=noisy(data.validation))


def data_of(inputs: Tensor, targets: Tensor, seed: int, name: str, *, train: int, held: int) -> Data:
    """Split by the seed and standardised by the training part."""
    order = torch.randperm(len(inputs), generator=generator(seed, name, "split"))
    parts = order[:train], order[train : train + held], order[train + held :]
    mean, scale = inputs[parts[0]].mean(0), inputs[parts[0]].std(0).clamp_min(1e-6)
    made = [as_it_is((inputs[rows] - mean) / scale, targets[rows]) for rows in parts]
    return Data(name, made[0], made[1], made[2], int(targets.max()) + 1)


def _mlp(inputs: int, widths: tuple[int, ...], outputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp((inputs,), widths, outputs, "relu")


def slot_at(position: int, layers: int) -> str:
    """Slot around hidden layer ``position`` (from 0) of an MLP with ``layers`` hidden layers."""
    return f"fc{position + 1}:{'head' if position + 1 == layers else f'fc{position + 2}'}"


def narrowed(width: int, narrow: int, position: int, layers: int = 3) -> tuple[int, ...]:
    """Hidden widths, all alike but the one at ``position``."""
    return tuple(narrow if layer == position else width for layer in range(layers))


def teacher_data(seed: int, widths: tuple[int, ...], *, features: int = 20, classes: int = 6) -> Data:
    """Normal inputs labelled by a random ReLU network of those hidden widths."""
    source = generator(seed, "growth", "teacher", *widths)
    inputs = torch.randn(TRAIN + HELD + 2048, features, generator=source)
    hidden = inputs
    for width in widths:
        weight = torch.randn(hidden.shape[1], width, generator=source) * math.sqrt(2 / hidden.shape[1])
        hidden = (hidden @ weight + 0.5 * torch.randn(width, generator=source)).relu()
        hidden = hidden / hidden.square().mean().sqrt()
    logits = hidden @ torch.randn(hidden.shape[1], classes, generator=source)
    logits = (logits - logits.mean(0)) / logits.std(0).clamp_min(1e-6)
    return data_of(inputs, logits.argmax(1), seed, "teacher", train=TRAIN, held=HELD)


def teacher(seed: int, narrow: int = 2) -> Setup:
    """A narrow layer in a student of a wide teacher."""
    position = seed % 3
    widths = narrowed(32, narrow, position)
    data = teacher_data(seed, (16, 16, 16))
    return Setup(lambda: _mlp(20, widths, 6, seed), data, (slot_at(position, 3),))


def teacher_wide(seed: int) -> Setup:
    """Its healthy twin."""
    return Setup(lambda: _mlp(20, (32, 32, 32), 6, seed), teacher_data(seed, (16, 16, 16)), ())


def rightly_narrow(seed: int) -> Setup:
    """The teacher passes through two units itself, and the student is as narrow there."""
    position = seed % 2
    widths = tuple(2 if layer == position else 16 for layer in range(3))
    data = teacher_data(seed, widths)
    return Setup(lambda: _mlp(20, narrowed(32, 2, position), 6, seed), data, ())


def decoy(seed: int) -> Setup:
    """Two layers are narrow; the teacher needs only one of them wider, and it is not the narrowest."""
    right, wrong = (seed % 2, 2) if seed % 4 < 2 else (2, seed % 2)
    teacher_widths = tuple(2 if layer == wrong else 16 for layer in range(3))
    widths = tuple(2 if layer == wrong else 3 if layer == right else 32 for layer in range(3))
    data = teacher_data(seed, teacher_widths)
    return Setup(lambda: _mlp(20, widths, 6, seed), data, (slot_at(right, 3),))


def dead(seed: int) -> Setup:
    """Nominally wide, but all units of one layer except two can never fire; nor can they in rivals that begin wider."""
    position = seed % 3

    def deaden(network: nn.Module) -> None:
        layer = network.get_submodule(f"fc{position + 1}")
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.bias[2:32] = -50.0

    data = teacher_data(seed, (16, 16, 16))
    return Setup(lambda: _mlp(20, (32, 32, 32), 6, seed), data, (slot_at(position, 3),), flaw=deaden)


def spirals_data(seed: int) -> Data:
    """Two interleaved spirals of two turns."""
    source = generator(seed, "growth", "spirals")
    half = (TRAIN + HELD + 1024) // 2
    along = torch.rand(half, generator=source).sqrt()
    angle = along * 2 * 2 * math.pi
    arm = torch.stack((along * angle.cos(), along * angle.sin()), dim=1)
    points = torch.cat((arm, -arm)) + 0.02 * torch.randn(2 * half, 2, generator=source)
    return data_of(points, torch.arange(2).repeat_interleave(half), seed, "spirals", train=TRAIN, held=HELD)


def spirals(seed: int, narrow: int = 2) -> Setup:
    """A narrow second or third layer; the first reads two features only."""
    position = 1 + seed % 2
    widths = narrowed(32, narrow, position)
    return Setup(lambda: _mlp(2, widths, 2, seed), spirals_data(seed), (slot_at(position, 3),))


def spirals_wide(seed: int) -> Setup:
    """Its healthy twin."""
    return Setup(lambda: _mlp(2, (32, 32, 32), 2, seed), spirals_data(seed), ())


def digits_data(seed: int, noise: float = 0.0, *, image: bool = False) -> Data:
    """scikit-learn's digits; a share of the training labels may be drawn anew."""
    data = prepare(DatasetConfig(name="digits"), seed, image=image)
    if not noise:
        return data
    return relabelled(data, noise, generator(seed, "growth", "noise"))


def digits(seed: int, narrow: int = 2) -> Setup:
    """A narrow layer among three."""
    position = seed % 3
    widths = narrowed(64, narrow, position)
    return Setup(lambda: _mlp(64, widths, 10, seed), digits_data(seed), (slot_at(position, 3),))


def digits_wide(seed: int) -> Setup:
    """Its healthy twin."""
    return Setup(lambda: _mlp(64, (64, 64, 64), 10, seed), digits_data(seed), ())


def digits_noisy(seed: int) -> Setup:
    """Wide enough; three labels in ten are wrong, and no growth can mend that."""
    return Setup(lambda: _mlp(64, (64, 64, 64), 10, seed), digits_data(seed, 0.3), ())


def digits_conv(seed: int) -> Setup:
    """A convolutional stage of a single channel, late, where only four numbers pass."""

    def model() -> nn.Sequential:
        torch.manual_seed(seed)
        return cnn((1, 8, 8), (8, 16, 1, 32), 10, "relu")

    return Setup(model, digits_data(seed, image=True), ("conv3:conv4",))


def sums(seed: int, narrow: int = 3) -> Setup:
    """Addition modulo 23 of two noisy one-hot numbers through a narrow layer: all sums are seen, none is left to guess."""
    modulus, position = 23, seed % 2
    source = generator(seed, "growth", "sums")
    pairs = torch.randint(modulus, (TRAIN + HELD + 2048, 2), generator=source)
    inputs = torch.cat([nn.functional.one_hot(pairs[:, side], modulus) for side in (0, 1)], 1).float()
    inputs = inputs + 0.1 * torch.randn(inputs.shape, generator=source)
    widths = narrowed(64, narrow, position, 2)
    data = data_of(inputs, pairs.sum(1) % modulus, seed, "sums", train=TRAIN, held=HELD)
    return Setup(lambda: _mlp(2 * modulus, widths, modulus, seed), data, (slot_at(position, 2),))


def breast_cancer(seed: int) -> Setup:
    """Diagnosis; two layers of 32 are plenty."""
    data = prepare(DatasetConfig(name="breast_cancer"), seed, image=False)
    return Setup(lambda: _mlp(30, (32, 32), 2, seed), data, ())


def even(seed: int) -> Setup:
    """All layers are equally small; there is no best place, and uniform growth is hard to beat."""
    return Setup(lambda: _mlp(20, (6, 6, 6), 6, seed), teacher_data(seed, (16, 16, 16)))


def uneven(seed: int) -> Setup:
    """Two of four layers are too small, by different amounts."""
    order = [3, 6, 32, 32]
    widths = tuple(order[(layer + seed) % 4] for layer in range(4))
    return Setup(lambda: _mlp(20, widths, 6, seed), teacher_data(seed, (16, 16, 16, 16)))


ROUNDS = 64 * (32 + 1 + 32)
"""Budget of the tasks with many rounds: 64 units between layers of 32."""


USUAL = adam(3e-3)
"""The optimiser where none is named."""


def task(
    name: str,
    make: Callable[[int], Setup],
    group: str,
    optimizer: Callable[..., torch.optim.Optimizer] = USUAL,
    **more: Any,
) -> Task:
    """What ``make`` sets up, told about by its docstring unless ``about`` is given; ``more`` are the task's other fields."""
    return Task(name, more.pop("about", make.__doc__ or ""), make, group, optimizer, **more)


TASKS: tuple[Task, ...] = (
    task("teacher", teacher, "narrow", adam(3e-3)),
    task("digits", digits, "narrow", adam(2e-3)),
    task("spirals", spirals, "narrow", adam(3e-3), epochs=60),
    task("dead", dead, "narrow", adam(3e-3)),
    task("sums", sums, "narrow", adam(5e-3), epochs=100),
    task("digits-conv", digits_conv, "narrow", adam(3e-3), epochs=40),
    task("decoy", decoy, "decoy", adam(3e-3)),
    task("teacher-wide", teacher_wide, "healthy", adam(3e-3)),
    task("digits-wide", digits_wide, "healthy", adam(2e-3)),
    task("spirals-wide", spirals_wide, "healthy", adam(3e-3), epochs=60),
    task("breast-cancer", breast_cancer, "healthy", adam(1e-3)),
    task("digits-noisy", digits_noisy, "healthy", adam(2e-3)),
    task("under-trained", teacher_wide, "healthy", adam(3e-4), about="A wide student at a tenth of the learning rate."),
    task("rightly-narrow", rightly_narrow, "rightly narrow", adam(3e-3)),
    task("even", even, "even", adam(3e-3), epochs=120, budget=ROUNDS // 8),
    task("uneven", uneven, "uneven", adam(3e-3), epochs=120, budget=ROUNDS // 2),
)
