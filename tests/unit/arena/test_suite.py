"""The suite keeps every row at once, goes on where it was broken off, and tells damage."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path

import pytest

from esper_core.errors import Corrupt, InvalidInput
from services.tolaria.arena.suite import Errand, Ledger, carry_out, run
from services.tolaria.arena.task import Task
from tests.unit.arena.contests import contest


def test_a_broken_off_suite_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    told: list[tuple[int, int]] = []
    options = ([("contest", contest)], [0])
    first = run(*options, ["none"], Ledger(path), lambda done, total, _: told.append((done, total)), workers=1)
    assert told[-1] == (1, 1)
    again = Ledger(path)
    assert again.found() == first
    told.clear()
    rows = run(*options, ["none"], again, lambda done, total, _: told.append((done, total)), workers=1)
    assert told == [(1, 1)]
    assert rows == first


def broken() -> Task:
    raise InvalidInput("no such data")


def test_a_trial_that_fails_ends_the_others_and_not_after_they_are_done(tmp_path: Path) -> None:
    """The other one would train for years; the test's own time limit would tell."""
    tasks = [("endless", partial(contest, 1 << 40)), ("broken", broken)]
    with pytest.raises(InvalidInput, match="no such data"):
        run(tasks, [0], ["none"], Ledger(tmp_path / "rows.jsonl"), lambda *_: None, workers=2)
    assert not multiprocessing.active_children()


def test_an_arm_that_does_not_apply_is_remembered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rows.jsonl")
    ledger.add("contest", 0, "adapter", None)
    again = Ledger(tmp_path / "rows.jsonl")
    assert ("contest", 0, "adapter") in again.rows
    assert again.found() == []


def test_rows_depend_on_the_seed_alone() -> None:
    errand = Errand(contest, "contest", 1, ("none",), ())
    (first,), (second,) = carry_out(errand), carry_out(errand)
    assert first[1] is not None
    assert second[1] is not None
    clock = {"train_seconds"}
    assert first[1].model_dump(exclude=clock) == second[1].model_dump(exclude=clock)


def test_a_line_cut_short_at_the_end_is_run_again_and_one_before_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Ledger(path).add("contest", 0, "adapter", None)
    whole = path.read_text()
    path.write_text(whole + '{"task": "con')
    assert len(Ledger(path).rows) == 1
    path.write_text('{"task": "con\n' + whole)
    with pytest.raises(Corrupt, match="line 1"):
        Ledger(path)
