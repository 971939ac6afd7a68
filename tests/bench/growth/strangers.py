"""Tasks that growing was not developed on: other activations, optimisers, schedules, depths, norms, losses and sizes.

Drawn up in one sitting and run with the defaults as they were; no default was chosen by them: what is claimed of growing should hold here.
One of them, ``s-tokens``, showed a fault of the signal that was mended, and is no stranger since.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from services.tolaria.arena.task import Setup, Task
from services.tolaria.config import DatasetConfig
from services.tolaria.datasets import Data, prepare
from services.tolaria.hosts import Transformer, cnn, mlp
from services.tolaria.order import generator
from tests.bench.growth.tasks import (
    HELD,
    TRAIN,
    adam,
    as_it_is,
    data_of,
    digits,
    digits_data,
    narrowed,
    relabelled,
    slot_at,
    task,
)  # fmt: skip

TEST = 2048
HELD_BACK = 600
FEATURES = 30


def sgd(rate: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """With momentum."""
    return partial(torch.optim.SGD, lr=rate, momentum=0.9)


def _perceptron(
    inputs: int, widths: tuple[int, ...], outputs: int, seed: int, activation: str, norm: bool
) -> nn.Module:
    torch.manual_seed(seed)
    if not norm:
        return mlp((inputs,), widths, outputs, activation)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, units in enumerate(widths, 1):
        layers[f"fc{number}"] = nn.Linear(inputs, units)
        layers[f"bn{number}"] = nn.BatchNorm1d(units)
        layers[f"act{number}"] = nn.ReLU()
        inputs = units
    layers["head"] = nn.Linear(inputs, outputs)
    return nn.Sequential(layers)


def _random_network(
    seed: int, tag: str, outputs: int, widths: tuple[int, ...] = (24, 24), train: int = 2000, *, values: bool = False
) -> Data:
    """Normal inputs, labelled by a random tanh network of those hidden widths, or with its ``values`` to be met."""
    source = generator(seed, "strangers", tag)
    inputs = torch.randn(train + HELD_BACK + TEST, FEATURES, generator=source)
    hidden = inputs
    for width in widths:
        weight = 1.5 * torch.randn(hidden.shape[1], width, generator=source) / math.sqrt(hidden.shape[1])
        hidden = (hidden @ weight + 0.3 * torch.randn(width, generator=source)).tanh()
    wanted = hidden @ torch.randn(hidden.shape[1], outputs, generator=source)
    wanted = (wanted - wanted.mean(0)) / wanted.std(0)
    if not values:
        return data_of(inputs, wanted.argmax(1), seed, tag, train=train, held=HELD_BACK)
    parts = zip(*(t.split([train, HELD_BACK, TEST]) for t in (inputs, wanted)), strict=True)
    return Data(tag, *(as_it_is(*part) for part in parts), outputs=outputs, classification=False)


def _layers(width: int, narrow: int | None, position: int, layers: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Hidden widths, and the slot around the narrow one; all alike and no slot when none is ``narrow``."""
    if narrow is None:
        return (width,) * layers, ()
    return narrowed(width, narrow, position, layers), (slot_at(position, layers),)


def student(
    seed: int,
    narrow: int | None = 2,
    *,
    tag: str = "teacher",
    activation: str = "relu",
    norm: bool = False,
    layers: int = 3,
    width: int = 40,
    outputs: int = 8,
    **data: Any,
) -> Setup:
    """Learns from a random tanh network; one layer, which one the seed says, is ``narrow``."""
    widths, planted = _layers(width, narrow, seed % layers, layers)
    found = _random_network(seed, tag, outputs, **data)
    return Setup(lambda: _perceptron(FEATURES, widths, outputs, seed, activation, norm), found, planted)


def bits(seed: int, narrow: int | None = 2) -> Setup:
    """The parity of four of twelve noisy bits."""
    source = generator(seed, "strangers", "bits")
    drawn = torch.randint(2, (TRAIN + HELD + TEST, 12), generator=source)
    inputs = 2.0 * drawn - 1 + 0.1 * torch.randn(drawn.shape, generator=source)
    widths, planted = _layers(48, narrow, seed % 2, 2)
    data = data_of(inputs, drawn[:, :4].sum(1) % 2, seed, "bits", train=TRAIN, held=HELD)
    return Setup(lambda: _perceptron(12, widths, 2, seed, "relu", False), data, planted)


def rings(seed: int, narrow: int | None = 2) -> Setup:
    """Five rings of three classes in the plane, for a gelu network."""
    source = generator(seed, "strangers", "rings")
    radius = 5 * torch.rand(TRAIN + HELD + TEST, generator=source)
    angle = 2 * math.pi * torch.rand(len(radius), generator=source)
    inputs = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)
    widths, planted = _layers(32, narrow, 1 + seed % 2, 3)
    data = data_of(inputs, radius.long() % 3, seed, "rings", train=TRAIN, held=HELD)
    return Setup(lambda: _perceptron(2, widths, 3, seed, "gelu", False), data, planted)


def wine(seed: int, narrow: int | None = 1) -> Setup:
    """178 wines of three kinds: hardly any data."""
    widths, planted = _layers(24, narrow, seed % 2, 2)
    data = prepare(DatasetConfig(name="wine"), seed, image=False)
    return Setup(lambda: _perceptron(13, widths, 3, seed, "relu", False), data, planted)


def diabetes(seed: int) -> Setup:
    """A small, noisy regression; two layers of 24 are plenty."""
    data = prepare(DatasetConfig(name="diabetes"), seed, image=False)
    return Setup(lambda: _perceptron(10, (24, 24), 1, seed, "relu", False), data, ())


def early_channel(seed: int) -> Setup:
    """A convolutional stage of a single channel, early, in a gelu network on digits."""

    def model() -> nn.Sequential:
        torch.manual_seed(seed)
        return cnn((1, 8, 8), (16, 1, 32), 10, "gelu")

    return Setup(model, digits_data(seed, image=True), ("conv2:conv3",))


def tokens(seed: int, ffn: int = 1) -> Setup:
    """First plus last of eight tokens modulo seven, six distracting ones between, for a transformer whose only MLP is narrow."""
    source = generator(seed, "strangers", "tokens")
    inputs = torch.randint(12, (2 * TRAIN + HELD + TEST, 8), generator=source)
    parts = zip(*(t.split([2 * TRAIN, HELD, TEST]) for t in (inputs, (inputs[:, 0] + inputs[:, -1]) % 7)), strict=True)
    data = Data("tokens", *(as_it_is(*part) for part in parts), outputs=7, tokens=12)

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(8, 12, 24, 2, (ffn,), 7, "relu")

    return Setup(model, data, ("blocks.0.fc1:blocks.0.fc2",) if ffn == 1 else ())


def noisy(seed: int) -> Setup:
    """Wide enough; four training labels in ten are drawn anew."""
    setup = student(seed, None, tag="noisy")
    return replace(setup, data=relabelled(setup.data, 0.4, generator(seed, "strangers", "noise")))


def rightly_narrow(seed: int) -> Setup:
    """The teacher passes through three units itself, and the student is as narrow there."""
    data = _random_network(seed, "through-three", 8, (24, 3, 24))
    return Setup(lambda: _perceptron(FEATURES, narrowed(40, 3, 1), 8, seed, "relu", False), data, ())


def _falling(rate: float, epochs: int) -> Callable[[int], float]:
    return lambda epoch: rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


_SMALL: dict[str, Any] = {"epochs": 80, "batch_size": 32}

STRANGERS: tuple[Task, ...] = (
    task(
        "s-tanh",
        partial(student, activation="tanh"),
        "narrow",
        adam(2e-3),
        about="A tanh student with a layer of two units.",
    ),
    task(
        "s-deep",
        partial(student, activation="gelu", layers=6, width=32),
        "narrow",
        adam(2e-3),
        about="Six gelu layers, one of two units.",
    ),
    task("s-sgd", student, "narrow", sgd(0.05), about="A narrow student trained by SGD with momentum."),
    task("s-norm", partial(student, norm=True), "narrow", about="A batch norm after every layer, one of two units."),
    task(
        "s-values",
        partial(student, narrow=1, tag="values", outputs=4, values=True),
        "narrow",
        about="A regression on four values through one unit; points are minus the squared error.",
    ),
    task(
        "s-rows",
        partial(student, tag="rows", train=8000),
        "narrow",
        adam(2e-3),
        epochs=25,
        batch_size=128,
        about="Four times the rows, larger batches, half the epochs.",
    ),
    task("s-bits", bits, "narrow", epochs=60),
    task("s-rings", rings, "narrow", epochs=60),
    task("s-wine", wine, "narrow", **_SMALL),
    task("s-digits-sgd", digits, "narrow", sgd(0.05), about="Digits through two units, trained by SGD with momentum."),
    task(
        "s-digits-falling",
        digits,
        "narrow",
        rate=_falling(3e-3, 50),
        about="Digits through two units, the learning rate falling to nothing.",
    ),
    task("s-conv", early_channel, "narrow", epochs=40),
    task("s-tokens", tokens, "narrow", epochs=40),
    task(
        "s-tanh-wide",
        partial(student, narrow=None, activation="tanh"),
        "healthy",
        adam(2e-3),
        about="The tanh student's healthy twin.",
    ),
    task("s-sgd-wide", partial(student, narrow=None), "healthy", sgd(0.05), about="The healthy twin under SGD."),
    task(
        "s-norm-wide", partial(student, narrow=None, norm=True), "healthy", about="The healthy twin with batch norms."
    ),
    task(
        "s-values-wide",
        partial(student, narrow=None, tag="values", outputs=4, values=True),
        "healthy",
        about="The regression's healthy twin.",
    ),
    task("s-bits-wide", partial(bits, narrow=None), "healthy", epochs=60, about="Parity's healthy twin."),
    task("s-rings-wide", partial(rings, narrow=None), "healthy", epochs=60, about="The rings' healthy twin."),
    task("s-wine-wide", partial(wine, narrow=None), "healthy", **_SMALL, about="The wines' healthy twin."),
    task(
        "s-tokens-wide", partial(tokens, ffn=64), "healthy", epochs=40, about="The transformer with an MLP of 64 units."
    ),
    task("s-diabetes", diabetes, "healthy", adam(2e-3), epochs=60, batch_size=32),
    task(
        "s-few",
        partial(student, narrow=None, tag="few", train=250),
        "healthy",
        adam(2e-3),
        epochs=60,
        batch_size=32,
        about="Wide, with 250 rows to learn from.",
    ),
    task("s-noisy", noisy, "healthy", adam(2e-3)),
    task("s-rightly-narrow", rightly_narrow, "rightly narrow"),
)
