"""Data order, data sets and their splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_core.errors import InvalidInput, NotFound
from services.tolaria.config import DatasetConfig
from services.tolaria.datasets import Data, prepare
from services.tolaria.order import batches

SMALL = {"spirals": {"samples": 200}, "teacher": {"samples": 300, "classes": 3}, "tokens": {"modulus": 11}}
BUNDLED = ("digits", "breast_cancer", "wine", "iris", "diabetes", "linnerud")


@given(rows=st.integers(1, 300), size=st.integers(1, 64), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_every_row_comes_once_an_epoch_and_the_order_depends_on_nothing_else(
    rows: int, size: int, seed: int, epoch: int
) -> None:
    state = torch.get_rng_state()
    order = batches(rows, size, seed, epoch)
    torch.rand(3)
    assert sorted(torch.cat(order).tolist()) == list(range(rows))
    assert all(torch.equal(a, b) for a, b in zip(order, batches(rows, size, seed, epoch), strict=True))
    assert size == 1 or rows == 1 or min(map(len, order)) > 1
    torch.set_rng_state(state)


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = {tuple(torch.cat(batches(50, 8, seed, epoch)).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def equal(left: Data, right: Data) -> bool:
    return all(
        torch.equal(getattr(left, part).inputs, getattr(right, part).inputs)
        and torch.equal(getattr(left, part).targets, getattr(right, part).targets)
        for part in ("train", "validation", "test")
    )


@pytest.mark.parametrize("name", [*BUNDLED, *SMALL])
def test_a_data_set_is_a_function_of_its_seed(name: str) -> None:
    config = DatasetConfig(name=name, **SMALL.get(name, {}))  # type: ignore[arg-type]
    data = prepare(config, 3, image=False)
    assert equal(data, prepare(config, 3, image=False))
    assert not equal(data, prepare(config, 4, image=False))
    total = len(data.train) + len(data.validation) + len(data.test)
    assert len(data.test) == int(total * 0.2) == len(data.validation)
    if data.classification:
        assert int(data.train.targets.max()) < data.outputs


@pytest.mark.parametrize("name", [*BUNDLED, "spirals", "teacher"])
def test_inputs_are_standardised_by_the_training_part_alone(name: str) -> None:
    data = prepare(DatasetConfig(name=name, **SMALL.get(name, {})), 0, image=False)  # type: ignore[arg-type]
    mean, spread = data.train.inputs.mean(0), data.train.inputs.std(0)
    varies = spread > 0
    torch.testing.assert_close(mean[varies], torch.zeros_like(mean[varies]), atol=2e-5, rtol=0)
    torch.testing.assert_close(spread[varies], torch.ones_like(spread[varies]), atol=2e-4, rtol=0)
    assert data.test.inputs.mean(0).abs().max() > 1e-3


def test_rows_of_the_parts_are_disjoint() -> None:
    data = prepare(DatasetConfig(name="tokens", modulus=13), 0, image=False)
    rows = [tuple(row) for part in (data.train, data.validation, data.test) for row in part.inputs.tolist()]
    assert len(rows) == len(set(rows)) == 13 * 13


def test_the_modular_task_is_addition() -> None:
    data = prepare(DatasetConfig(name="tokens", modulus=7), 0, image=False)
    assert torch.equal((data.train.inputs[:, 0] + data.train.inputs[:, 1]) % 7, data.train.targets)
    assert (data.outputs, data.tokens) == (7, 8)


def write_cifar(folder: Path, images: int, seed: int = 0) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    raw = np.random.default_rng(seed).integers(0, 256, (images, 3073), dtype=np.uint8)
    raw[:, 0] %= 10
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        raw.tofile(folder / name)
    return raw


def test_cifar_is_read_from_its_binary_version(tmp_path: Path) -> None:
    raw = write_cifar(tmp_path / "cifar-10-batches-bin", 20)
    data = prepare(DatasetConfig(name="cifar10", path=tmp_path), 0, image=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 8, 20)
    assert data.test.inputs.dtype is torch.uint8
    assert np.array_equal(data.test.inputs.numpy(), raw[:, 1:].reshape(-1, 3, 32, 32))
    assert data.test.targets.tolist() == raw[:, 0].tolist()
    inputs, _ = data.train.take(torch.arange(32))
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("damage", ["absent", "empty", "short", "label"])
def test_a_wrong_cifar_folder_is_refused_with_what_belongs_there(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "data"
    if damage != "absent":
        folder.mkdir()
    if damage in ("short", "label"):
        write_cifar(folder, 5)
        target = folder / "data_batch_2.bin"
        target.write_bytes(target.read_bytes()[:-1] if damage == "short" else b"\xff" * 3073)
    with pytest.raises((NotFound, InvalidInput)) as caught:
        prepare(DatasetConfig(name="cifar10", path=folder), 0, image=True)
    assert "data_batch_1.bin" in caught.value.hint
