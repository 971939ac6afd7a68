"""What a trainer's data loader gives to measure by: chosen by the seed alone, without a trace in the loader or in any random state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from esper_core.errors import InvalidInput
from esper_core.trainers.batches import collect, pair

ROWS = TensorDataset(torch.arange(100).unsqueeze(1).float(), torch.arange(100))


class Noisy(Dataset[Any]):
    """Samples drawn with all three random number generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(1) + random.random() + np.random.rand()
        return noise, torch.tensor(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return ((torch.tensor([float(i)]), torch.tensor(i)) for i in range(1000))


def labels(loader: Any, rows: int = 32, seed: int = 0) -> list[list[int]]:
    return [targets.tolist() for _, targets in collect(loader, pair, rows, seed)]


def test_rows_are_as_many_as_asked_in_batches_of_the_loaders_size() -> None:
    found = labels(DataLoader(ROWS, batch_size=12))
    assert [len(batch) for batch in found] == [12, 12, 8]
    assert len({row for batch in found for row in batch}) == 32
    every = labels(DataLoader(ROWS, batch_size=12), rows=1024)
    assert sorted(row for batch in every for row in batch) == list(range(100))


def test_rows_belong_together() -> None:
    for inputs, targets in collect(DataLoader(ROWS, batch_size=12), pair, 32, 0):
        assert torch.equal(inputs.squeeze(1), targets.float())


def test_only_the_seed_chooses() -> None:
    loader = DataLoader(ROWS, batch_size=16, shuffle=True)
    first = labels(loader)
    torch.manual_seed(99)
    assert labels(loader) == first != labels(loader, seed=1)
    assert first != [list(range(16)), list(range(16, 32))], "a data set in order would show one class only"


def test_nothing_random_is_touched() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, generator=generator)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1], generator.get_state())
    first, second = collect(loader, pair, 16, 5), collect(loader, pair, 16, 5)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1], generator.get_state())
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()
    assert torch.equal(before[3], after[3])


def test_a_stream_gives_its_first() -> None:
    assert labels(DataLoader(Stream(), batch_size=4), rows=6) == [[0, 1, 2, 3], [4, 5]]


def test_sequences_are_padded_to_one_length() -> None:
    rows = [(torch.ones(1 + index % 5), torch.tensor(index)) for index in range(20)]

    def padded(samples: Any) -> Any:
        inputs = torch.nn.utils.rnn.pad_sequence([inputs for inputs, _ in samples], batch_first=True)
        return inputs, torch.stack([target for _, target in samples])

    found = collect(DataLoader(rows, batch_size=4, collate_fn=padded), pair, 20, 0)
    assert {inputs.shape[1] for inputs, _ in found} == {5}


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ({"a": DataLoader(ROWS)}, "from a dict"),
        (DataLoader(ROWS, batch_size=None), "does not batch"),
        (DataLoader([], batch_size=4), "no rows"),
    ],
)
def test_what_gives_no_rows_is_refused(loader: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        labels(loader)
    assert "probe=" in caught.value.hint


def test_a_pair_may_have_several_inputs() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert pair([[x, y], y])[0] == (x, y)
    assert pair((x, y)) == (x, y)
    for other in ({"x": x, "y": y}, (x, y, y), x, ("x", y)):
        with pytest.raises(InvalidInput, match="no pair") as caught:
            pair(other)
        assert "split=" in caught.value.hint
