"""Checkpoint files come back as they were, or not at all."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from esper_core.errors import Corrupt, InvalidInput, NotFound
from esper_core.nn import checkpoint

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) * 3
    return raw.to(draw(st.sampled_from(DTYPES)))


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
trees = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=8) | st.integers(-9, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return (
            isinstance(right, Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.reshape(-1).view(torch.uint8).tolist() == right.reshape(-1).view(torch.uint8).tolist()
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    return bool(left == right)


@quick
@given(trees)
def test_a_tree_comes_back_as_it_was(tmp_path: Path, tree: Any) -> None:
    checkpoint.save(tmp_path / "c", tree)
    assert same(checkpoint.load(tmp_path / "c"), tree)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_optimizer_comes_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c", optimizer.state_dict())
    assert same(checkpoint.load(tmp_path / "c"), optimizer.state_dict())


def test_views_and_transposes_are_stored_by_value(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    checkpoint.save(tmp_path / "c", {"row": whole[1], "turned": whole.t(), "again": whole})
    back = checkpoint.load(tmp_path / "c")
    assert torch.equal(back["row"], whole[1])
    assert torch.equal(back["turned"], whole.t())


@quick
@given(st.data())
def test_no_damage_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    tree = {"weights": torch.arange(6.0), "epoch": 3, "name": "digits"}
    path = tmp_path / "c"
    checkpoint.save(path, tree)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with contextlib.suppress(Corrupt):
        assert same(checkpoint.load(path), tree)  # a flip in the header's padding changes nothing


def test_a_damaged_weight_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"weights": torch.ones(64)})
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Corrupt, match="digest") as caught:
        checkpoint.load(path)
    assert caught.value.hint


@pytest.mark.parametrize("value", [object(), {1.5: 0}, {"deep": {True: 1}}, b"bytes", {1, 2}])
def test_what_is_no_tree_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidInput):
        checkpoint.save(tmp_path / "c", value)
    assert not list(tmp_path.iterdir())


def test_a_tree_too_deep_is_refused(tmp_path: Path) -> None:
    tree: Any = 0
    for _ in range(checkpoint.MAX_DEPTH + 2):
        tree = [tree]
    with pytest.raises(InvalidInput):
        checkpoint.save(tmp_path / "c", tree)


def test_no_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        checkpoint.load(tmp_path / "none")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"epoch": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
