"""Data sets that ship with scikit-learn, generated ones, and CIFAR-10 from a local folder; split and standardised.

Everything is a pure function of (configuration, seed). Whole data sets are held in memory. Downloads nothing.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from esper_core.errors import InvalidInput, NotFound
from services.tolaria.config import DatasetConfig
from services.tolaria.order import generator

Rows = tuple[Tensor, Tensor]
"""inputs (rows, …) and targets: (rows,) class numbers, or (rows, outputs) values of a regression."""

_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_HINT = (
    "put CIFAR-10's binary version there: data_batch_1.bin … data_batch_5.bin and test_batch.bin, "
    "from cifar-10-binary.tar.gz"
)


@dataclass(frozen=True)
class Part:
    """One part of a data set.

    Attributes:
        inputs: (rows, …); bytes for images, which become floats batch by batch.
        targets: (rows,) class numbers or (rows, outputs) values.
        mean, scale: what turns raw inputs into standardised ones; broadcast against a batch.
    """

    inputs: Tensor
    targets: Tensor
    mean: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Tensor) -> Rows:
        """The batch of the given row numbers, standardised."""
        inputs = self.inputs[rows]
        if inputs.dtype is torch.uint8:
            inputs = (inputs.float() - self.mean) / self.scale
        return inputs, self.targets[rows]

    def in_batches(self, batch_size: int, limit: int | None = None) -> list[Rows]:
        """Its first ``limit`` rows as batches, in order."""
        rows = torch.arange(len(self) if limit is None else min(limit, len(self)))
        return [self.take(chunk) for chunk in torch.split(rows, batch_size)]

    def each(self, batch_size: int) -> Iterator[Rows]:
        """All rows, batch after batch, without holding them twice."""
        for chunk in torch.split(torch.arange(len(self)), batch_size):
            yield self.take(chunk)


@dataclass(frozen=True)
class Data:
    """A data set, ready to train on.

    Attributes:
        name: as configured.
        train, validation, test: its parts; disjoint.
        outputs: classes, or targets of a regression.
        tokens: vocabulary size when inputs are token numbers, otherwise 0.
        classification: whether targets are class numbers.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    outputs: int
    tokens: int = 0
    classification: bool = True

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch: cross-entropy, or squared error for a regression."""
        if self.classification:
            return nn.functional.cross_entropy(outputs, targets)
        return nn.functional.mse_loss(outputs, targets)


def prepare(config: DatasetConfig, seed: int, *, image: bool, device: str = "cpu") -> Data:
    """Make or read the data set, split it and standardise it by its training part.

    Args:
        config: which data and which shares.
        seed: of generation and split.
        image: whether digits should come as (1, 8, 8) images rather than 64 features.
        device: where the tensors shall lie.

    Raises:
        NotFound: the folder or a file of it is absent.
        InvalidInput: a file is malformed, or a part of the split would be empty.
    """
    fixed_test: Rows | None = None
    if config.name == "arrays" and config.path is not None:
        inputs, targets = arrays(config.path.expanduser())
    elif config.path is not None:  # which only cifar10 has besides
        inputs, targets, fixed_test = cifar10(config.path.expanduser())
    elif config.name in ("spirals", "teacher", "tokens"):
        inputs, targets = {"spirals": spirals, "teacher": teacher, "tokens": modular_sums}[config.name](config, seed)
    else:
        inputs, targets = bundled(config.name)
    if config.name == "digits" and image:
        inputs = inputs.reshape(-1, 1, 8, 8)
    classification = targets.ndim == 1
    outputs = int(targets.max()) + 1 if classification else targets.shape[1]
    if config.name == "teacher":
        outputs = config.classes
    train, validation, test = _split(len(inputs), config, seed, with_test=fixed_test is None)
    mean, scale = _standard(inputs[train])
    if not classification:
        centre, spread = _standard(targets[train])
        targets = (targets - centre) / spread

    def part(chosen: Tensor | None) -> Part:
        raw, wanted = fixed_test if chosen is None and fixed_test else (inputs[chosen], targets[chosen])
        if raw.is_floating_point():
            raw = (raw - mean) / scale
        return Part(raw.to(device), wanted.to(device), mean.to(device), scale.to(device))

    return Data(
        config.name,
        part(train),
        part(validation),
        part(None if fixed_test else test),
        outputs,
        tokens=config.modulus + 1 if config.name == "tokens" else 0,
        classification=classification,
    )


def bundled(name: str) -> Rows:
    """A set that ships with scikit-learn."""
    from sklearn import datasets  # 1 s, paid only by runs that need it

    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    regression = name in ("diabetes", "linnerud")
    wanted = np.asarray(targets, dtype=np.float32 if regression else np.int64)
    if regression and wanted.ndim == 1:
        wanted = wanted[:, None]
    return torch.from_numpy(np.asarray(inputs, dtype=np.float32)), torch.from_numpy(wanted)


def arrays(path: Path) -> Rows:
    """One's own data: a .npz file with ``inputs`` (rows, …) and ``targets``, whole numbers for classes, others for a regression.

    Nothing in the file is executed.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is no .npz, lacks an array, or the arrays do not belong together.
    """
    hint = "numpy.savez(PATH, inputs=..., targets=...): as many rows in both, numbers only"
    try:
        with np.load(path, allow_pickle=False) as file:
            inputs, targets = np.asarray(file["inputs"], dtype=np.float32), np.asarray(file["targets"])
    except FileNotFoundError:
        raise NotFound(f"dataset.path: there is no file {path}", hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{path} cannot be read: {error}", hint=hint) from None
    if inputs.ndim not in (2, 4) or targets.ndim not in (1, 2) or len(inputs) != len(targets):
        raise InvalidInput(f"{path} has inputs {inputs.shape} and targets {targets.shape}", hint=hint)
    classes = targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)
    if not np.isfinite(inputs).all() or (classes and targets.min() < 0):
        raise InvalidInput(f"{path} has values that are not finite, or negative classes", hint=hint)
    if classes:
        return torch.from_numpy(inputs), torch.from_numpy(targets.astype(np.int64))
    values = targets.astype(np.float32).reshape(len(targets), -1)
    if not np.isfinite(values).all():
        raise InvalidInput(f"{path} has targets that are not finite", hint=hint)
    return torch.from_numpy(inputs), torch.from_numpy(values)


def spirals(config: DatasetConfig, seed: int) -> Rows:
    """Two interleaved spirals in the plane, equal halves."""
    source = generator(seed, "spirals")
    half = (config.samples + 1) // 2
    along = torch.rand(half, generator=source).sqrt()
    angle = along * config.turns * 2 * math.pi
    arm = torch.stack((along * angle.cos(), along * angle.sin()), dim=1)
    points = torch.cat((arm, -arm))
    points = points + config.noise * torch.randn(points.shape, generator=source)
    return points, torch.arange(2).repeat_interleave(half)


def teacher(config: DatasetConfig, seed: int) -> Rows:
    """Normal inputs labelled by a random ReLU network; its logits are standardised so that every class occurs."""
    source = generator(seed, "teacher")
    inputs = torch.randn(config.samples, config.features, generator=source)
    hidden = inputs
    for width in config.teacher_widths:
        weight = torch.randn(hidden.shape[1], width, generator=source) * math.sqrt(2 / hidden.shape[1])
        hidden = (hidden @ weight + 0.5 * torch.randn(width, generator=source)).relu()
    logits = hidden @ torch.randn(hidden.shape[1], config.classes, generator=source)
    logits = (logits - logits.mean(0)) / logits.std(0).clamp_min(1e-6)
    return inputs, logits.argmax(1)


def modular_sums(config: DatasetConfig, seed: int) -> Rows:  # noqa: ARG001 - all pairs, whatever the seed
    """All token sequences [a, b, =] with target (a + b) modulo ``modulus``."""
    numbers = torch.arange(config.modulus)
    left, right = torch.meshgrid(numbers, numbers, indexing="ij")
    equals = torch.full((config.modulus**2,), config.modulus)
    pairs = torch.stack((left.flatten(), right.flatten(), equals), dim=1)
    return pairs, (pairs[:, 0] + pairs[:, 1]) % config.modulus


def cifar10(folder: Path) -> tuple[Tensor, Tensor, Rows]:
    """Training images (n, 3, 32, 32) as bytes, their labels, and the test part, from the published binary version."""
    nested = folder / "cifar-10-batches-bin"
    folder = nested if nested.is_dir() else folder
    if not folder.is_dir():
        raise NotFound(f"dataset.path: there is no folder {folder}", hint=_CIFAR_HINT)
    batches = sorted(folder.glob("data_batch_*.bin"))
    if not batches:
        raise NotFound(f"{folder} has no data_batch_*.bin", hint=_CIFAR_HINT)
    parts = [_cifar_file(path) for path in batches]
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, labels, _cifar_file(folder / "test_batch.bin")


def _cifar_file(path: Path) -> Rows:
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise NotFound(f"there is no {path}", hint=_CIFAR_HINT) from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", hint=_CIFAR_HINT) from None
    if not raw.size or raw.size % _CIFAR_RECORD:
        raise InvalidInput(
            f"{path} has {raw.size} bytes, which is no whole number of {_CIFAR_RECORD}-byte records", hint=_CIFAR_HINT
        )
    records = torch.from_numpy(raw).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise InvalidInput(f"{path} has label {int(labels.max())}; CIFAR-10 has 0 to 9", hint=_CIFAR_HINT)
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels


def _split(rows: int, config: DatasetConfig, seed: int, *, with_test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of the three parts; the test part is empty when the data bring their own."""
    order = torch.randperm(rows, generator=generator(seed, "split"))
    held, last = int(rows * config.validation_fraction), int(rows * config.test_fraction) if with_test else 0
    if held < 1 or rows - held - last < 2 or (with_test and last < 1):
        raise InvalidInput(
            f"{rows} rows cannot be split into training, validation and test part",
            hint="raise dataset.validation_fraction or dataset.test_fraction, or use more rows",
        )
    test, validation, train = order[:last], order[last : last + held], order[last + held :]
    return train, validation, test


def _standard(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per feature, or per channel for images; neutral for token numbers."""
    if values.dtype is torch.int64:
        return torch.zeros(()), torch.ones(())
    across = (0,) if values.ndim == 2 else (0, 2, 3)
    counted = (
        values[:10000].float() if values.dtype is torch.uint8 else values
    )  # a sample: as floats, all would not fit
    mean = counted.mean(across, keepdim=values.ndim > 2)
    scale = counted.std(across, keepdim=values.ndim > 2)
    if values.ndim > 2:
        mean, scale = mean[0], scale[0]
    return mean, torch.where(scale > 1e-6, scale, torch.ones_like(scale))
