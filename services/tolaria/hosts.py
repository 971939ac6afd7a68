"""Host networks: MLP, small CNN, CIFAR-style ResNet, tiny transformer; plain modules that ``torch.fx`` can trace.

No dropout, no data-dependent control flow. Knows neither slots nor seeds: a host is an ordinary ``nn.Module``.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from esper_core.errors import InvalidInput, NotFound, nearest
from services.tolaria.config import ModelConfig

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def build(config: ModelConfig, sample_shape: tuple[int, ...], tokens: int, outputs: int) -> nn.Module:
    """The host that ``config`` names, initialised from torch's global generator.

    Args:
        config: which host and how large.
        sample_shape: shape of one input: (features,), (channels, h, w), or (length,) of token numbers.
        tokens: size of the vocabulary when inputs are token numbers, otherwise 0.
        outputs: classes, or targets of a regression.

    Raises:
        InvalidInput: host and data do not fit each other.
    """
    if config.factory is not None:
        return from_file(config.factory, sample_shape, outputs)
    kind = "tokens" if tokens else {1: "features", 3: "images"}.get(len(sample_shape), "inputs of another rank")
    wanted = {"mlp": ("features", "images"), "cnn": ("images",), "resnet": ("images",), "transformer": ("tokens",)}
    if kind not in wanted[config.host]:
        fitting = ", ".join(host for host, kinds in wanted.items() if kind in kinds)
        raise InvalidInput(
            f"host {config.host} takes {' or '.join(wanted[config.host])}, the data are {kind} of shape {sample_shape}",
            hint=f"hosts for {kind}: {fitting}" if fitting else "choose another data set",
        )
    if config.host == "mlp":
        return mlp(sample_shape, config.widths, outputs, config.activation)
    if config.host == "cnn":
        smallest = 2 ** (len(config.channels) - 1)
        if min(sample_shape[1:]) < smallest:
            raise InvalidInput(
                f"{len(config.channels)} cnn stages need images of {smallest} x {smallest} or more, "
                f"not {sample_shape[1]} x {sample_shape[2]}",
                hint="use fewer channels, e.g. model.channels: [16, 32]",
            )
        return cnn(sample_shape, config.channels, outputs, config.activation)
    if config.host == "resnet":
        return ResNet(sample_shape[0], config.channels, config.blocks, outputs)
    ffn = config.ffn if len(config.ffn) == config.layers else config.ffn * config.layers
    return Transformer(sample_shape[0], tokens, config.width, config.heads, ffn, outputs, config.activation)


def from_file(factory: str, sample_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """One's own network: runs ``FILE.py`` and calls ``FUNCTION(sample_shape, outputs)``.

    The file is code and does what it likes: whoever writes the settings decides what runs.

    Raises:
        NotFound: no such file or function.
        InvalidInput: the file or the function fails, or gives no ``nn.Module``.
    """
    path, _, name = factory.rpartition(":")
    spec = importlib.util.spec_from_file_location("own_network", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise NotFound(f"model.factory: there is no file {path}", hint="paths are seen from the present folder")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        made = function(sample_shape, outputs) if callable(function) else None
    except Exception as problem:
        raise InvalidInput(f"{factory} failed: {type(problem).__name__}: {problem}") from problem
    if function is None:
        raise NotFound(f"{path} has no {name}", hint=nearest(name, vars(module)))
    if not isinstance(made, nn.Module):
        raise InvalidInput(f"{factory} gave {type(made).__name__}", hint="it must return a torch.nn.Module")
    return made


def mlp(sample_shape: tuple[int, ...], widths: tuple[int, ...], outputs: int, activation: str) -> nn.Sequential:
    """fc1, act1, fc2, … head; images are flattened first."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(sample_shape) > 1:
        layers["flatten"] = nn.Flatten()
    width = int(torch.Size(sample_shape).numel())
    for number, units in enumerate(widths, 1):
        layers[f"fc{number}"] = nn.Linear(width, units)
        layers[f"act{number}"] = _ACTIVATIONS[activation]()
        width = units
    layers["head"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)


def cnn(sample_shape: tuple[int, ...], channels: tuple[int, ...], outputs: int, activation: str) -> nn.Sequential:
    """conv1, act1, conv2, … each after the first halving the image; then global mean and head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = sample_shape[0]
    for number, units in enumerate(channels, 1):
        layers[f"conv{number}"] = nn.Conv2d(width, units, 3, stride=1 if number == 1 else 2, padding=1)
        layers[f"act{number}"] = _ACTIVATIONS[activation]()
        width = units
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut past them (projected where the shape changes)."""

    def __init__(self, width: int, units: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, units, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(units)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(units, units, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(units)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width != units:
            self.shortcut = nn.Sequential(nn.Conv2d(width, units, 1, stride=stride, bias=False), nn.BatchNorm2d(units))

    def forward(self, x: Tensor) -> Tensor:  # (batch, width, h, w) -> (batch, units, h / stride, w / stride)
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(inner + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """The CIFAR ResNet: a 3x3 stem without pooling, stages of basic blocks, global mean, head."""

    def __init__(self, width: int, channels: tuple[int, ...], blocks: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(width, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
        )
        stages: list[nn.Module] = []
        before = channels[0]
        for number, units in enumerate(channels):
            first = BasicBlock(before, units, stride=1 if number == 0 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(units, units, stride=1) for _ in range(blocks - 1))))
            before = units
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(before, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, h, w) -> (batch, outputs)
        out: Tensor = self.head(torch.flatten(self.pool(self.stages(self.stem(x))), 1))
        return out


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.size = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width), the same back
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)  # (batch, heads, tokens, size)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm transformer block whose feed-forward part is two plain linear layers, fc1 and fc2."""

    def __init__(self, width: int, heads: int, ffn: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.act = _ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width), the same back
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Learnt embeddings and positions, blocks, and a head that reads the last token."""

    def __init__(
        self, length: int, tokens: int, width: int, heads: int, ffn: tuple[int, ...], outputs: int, activation: str
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, units, activation) for units in ffn))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length) of token numbers -> (batch, outputs)
        hidden = self.norm(self.blocks(self.embedding(x) + self.position))
        out: Tensor = self.head(hidden[:, -1])
        return out
