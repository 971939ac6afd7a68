"""Tasks that growing was not developed on: other activations, optimisers, schedules, depths, norms, losses and sizes.

Drawn up in one sitting and run with the defaults as they were; no default was chosen by them: what is claimed of growing should hold here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from services.tolaria.arena.task import Setup, Task
from services.tolaria.config import DatasetConfig
from services.tolaria.datasets import Data, Part, prepare
from services.tolaria.hosts import Transformer, cnn, mlp
from services.tolaria.order import generator
from tests.bench.growth.tasks import HELD, TRAIN, adam, data_of, digits, digits_data, narrowed, slot_at

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
    return Data(tag, *(_as_it_is(*part) for part in parts), outputs=outputs, classification=False)


def _as_it_is(inputs: Tensor, targets: Tensor) -> Part:
    return Part(inputs, targets, torch.zeros(()), torch.ones(()))


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
    position = seed % layers
    widths = (width,) * layers if narrow is None else narrowed(width, narrow, position, layers)
    planted = () if narrow is None else (slot_at(position, layers),)
    found = _random_network(seed, tag, outputs, **data)
    return Setup(lambda: _perceptron(FEATURES, widths, outputs, seed, activation, norm), found, planted)


def bits(seed: int, narrow: int | None = 2) -> Setup:
    """The parity of four of twelve noisy bits."""
    source, position = generator(seed, "strangers", "bits"), seed % 2
    drawn = torch.randint(2, (TRAIN + HELD + TEST, 12), generator=source)
    inputs = 2.0 * drawn - 1 + 0.1 * torch.randn(drawn.shape, generator=source)
    widths = (48, 48) if narrow is None else narrowed(48, narrow, position, 2)
    planted = () if narrow is None else (slot_at(position, 2),)
    data = data_of(inputs, drawn[:, :4].sum(1) % 2, seed, "bits", train=TRAIN, held=HELD)
    return Setup(lambda: _perceptron(12, widths, 2, seed, "relu", False), data, planted)


def rings(seed: int, narrow: int | None = 2) -> Setup:
    """Five rings of three classes in the plane, for a gelu network."""
    source, position = generator(seed, "strangers", "rings"), 1 + seed % 2
    radius = 5 * torch.rand(TRAIN + HELD + TEST, generator=source)
    angle = 2 * math.pi * torch.rand(len(radius), generator=source)
    inputs = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)
    widths = (32, 32, 32) if narrow is None else narrowed(32, narrow, position)
    planted = () if narrow is None else (slot_at(position, 3),)
    data = data_of(inputs, radius.long() % 3, seed, "rings", train=TRAIN, held=HELD)
    return Setup(lambda: _perceptron(2, widths, 3, seed, "gelu", False), data, planted)


def wine(seed: int, narrow: int | None = 1) -> Setup:
    """178 wines of three kinds: hardly any data."""
    position = seed % 2
    widths = (24, 24) if narrow is None else narrowed(24, narrow, position, 2)
    planted = () if narrow is None else (slot_at(position, 2),)
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
    data = Data("tokens", *(_as_it_is(*part) for part in parts), outputs=7, tokens=12)

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(8, 12, 24, 2, (ffn,), 7, "relu")

    return Setup(model, data, ("blocks.0.fc1:blocks.0.fc2",) if ffn == 1 else ())


def noisy(seed: int) -> Setup:
    """Wide enough; four training labels in ten are drawn anew."""
    setup, source = student(seed, None, tag="noisy"), generator(seed, "strangers", "noise")

    def spoilt(part: Part) -> Part:
        drawn = torch.randint(8, part.targets.shape, generator=source)
        hit = torch.rand(part.targets.shape, generator=source) < 0.4
        return Part(part.inputs, torch.where(hit, drawn, part.targets), part.mean, part.scale)

    data = setup.data
    return Setup(setup.model, Data("noisy", spoilt(data.train), spoilt(data.validation), data.test, 8), ())


def rightly_narrow(seed: int) -> Setup:
    """The teacher passes through three units itself, and the student is as narrow there."""
    data = _random_network(seed, "through-three", 8, (24, 3, 24))
    return Setup(lambda: _perceptron(FEATURES, narrowed(40, 3, 1), 8, seed, "relu", False), data, ())


def _falling(rate: float, epochs: int) -> Callable[[int], float]:
    return lambda epoch: rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def _task(
    name: str,
    about: str,
    make: Callable[[int], Setup],
    group: str,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    **more: Any,
) -> Task:
    return Task(name, about, make, group, optimizer or adam(3e-3), **more)


_SMALL: dict[str, Any] = {"epochs": 80, "batch_size": 32}

STRANGERS: tuple[Task, ...] = (
    _task("s-tanh", "A tanh student with a layer of two units.", partial(student, activation="tanh"), "narrow", adam(2e-3)),
    _task("s-deep", "Six gelu layers, one of two units.", partial(student, activation="gelu", layers=6, width=32), "narrow", adam(2e-3)),
    _task("s-sgd", "A narrow student trained by SGD with momentum.", student, "narrow", sgd(0.05)),
    _task("s-norm", "A batch norm after every layer, one of two units.", partial(student, norm=True), "narrow"),
    _task("s-values", "A regression on four values through one unit; points are minus the squared error.",
          partial(student, narrow=1, tag="values", outputs=4, values=True), "narrow"),
    _task("s-rows", "Four times the rows, larger batches, half the epochs.", partial(student, tag="rows", train=8000), "narrow",
          adam(2e-3), epochs=25, batch_size=128),
    _task("s-bits", bits.__doc__ or "", bits, "narrow", epochs=60),
    _task("s-rings", rings.__doc__ or "", rings, "narrow", epochs=60),
    _task("s-wine", wine.__doc__ or "", wine, "narrow", **_SMALL),
    _task("s-digits-sgd", "Digits through two units, trained by SGD with momentum.", digits, "narrow", sgd(0.05)),
    _task("s-digits-falling", "Digits through two units, the learning rate falling to nothing.", digits, "narrow",
          rate=_falling(3e-3, 50)),
    _task("s-conv", early_channel.__doc__ or "", early_channel, "narrow", epochs=40),
    _task("s-tokens", tokens.__doc__ or "", tokens, "narrow", epochs=40),
    _task("s-tanh-wide", "The tanh student's healthy twin.", partial(student, narrow=None, activation="tanh"), "healthy", adam(2e-3)),
    _task("s-sgd-wide", "The healthy twin under SGD.", partial(student, narrow=None), "healthy", sgd(0.05)),
    _task("s-norm-wide", "The healthy twin with batch norms.", partial(student, narrow=None, norm=True), "healthy"),
    _task("s-values-wide", "The regression's healthy twin.",
          partial(student, narrow=None, tag="values", outputs=4, values=True), "healthy"),
    _task("s-bits-wide", "Parity's healthy twin.", partial(bits, narrow=None), "healthy", epochs=60),
    _task("s-rings-wide", "The rings' healthy twin.", partial(rings, narrow=None), "healthy", epochs=60),
    _task("s-wine-wide", "The wines' healthy twin.", partial(wine, narrow=None), "healthy", **_SMALL),
    _task("s-tokens-wide", "The transformer with an MLP of 64 units.", partial(tokens, ffn=64), "healthy", epochs=40),
    _task("s-diabetes", diabetes.__doc__ or "", diabetes, "healthy", adam(2e-3), epochs=60, batch_size=32),
    _task("s-few", "Wide, with 250 rows to learn from.", partial(student, narrow=None, tag="few", train=250), "healthy",
          adam(2e-3), epochs=60, batch_size=32),
    _task("s-noisy", noisy.__doc__ or "", noisy, "healthy", adam(2e-3)),
    _task("s-rightly-narrow", rightly_narrow.__doc__ or "", rightly_narrow, "rightly narrow"),
)  # fmt: skip
