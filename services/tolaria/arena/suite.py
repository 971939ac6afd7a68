"""Runs every (task, seed, arm) on all cores and keeps each row as soon as it is there, so that a broken-off suite goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from esper_core.errors import Corrupt, Exhausted
from services.tolaria.arena.arms import ARMS
from services.tolaria.arena.task import Task
from services.tolaria.arena.trial import Row

Make = Callable[[], Task]
"""Makes a task in the process that runs it; must be picklable."""
Progress = Callable[[int, int, str], None]
"""Told (trials done, trials in all, what was last)."""


@dataclass(frozen=True)
class Errand:
    """All arms of one task and one seed, in one process, since some need others' rows."""

    make: Make
    task: str
    seed: int
    arms: tuple[str, ...]
    known: tuple[Row, ...]


class Ledger:
    """Rows in a file, one JSON line each.

    Args:
        path: made when absent; what it holds already is not run again.

    Raises:
        Corrupt: the file has a line that is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, int, str], Row | None] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                row = Row.model_validate(entry["row"]) if entry["row"] is not None else None
                self.rows[entry["task"], entry["seed"], entry["arm"]] = row
            except (ValueError, KeyError, TypeError, ValidationError) as error:
                if number == len(lines):
                    break  # cut short by whatever ended the last run
                raise Corrupt(
                    f"{path}, line {number}, is no row: {type(error).__name__}", hint="begin anew with --fresh"
                ) from None

    def add(self, task: str, seed: int, arm: str, row: Row | None) -> None:
        """Keep a row, or that the arm does not apply.

        Raises:
            Exhausted: when it cannot be written.
        """
        self.rows[task, seed, arm] = row
        entry = {"task": task, "seed": seed, "arm": arm, "row": row.model_dump(mode="json") if row else None}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise Exhausted(f"{self.path} cannot be written: {error.strerror}", hint="choose another --out") from None

    def found(self) -> list[Row]:
        """The rows, in order of task, seed and arm as they were run."""
        return [row for row in self.rows.values() if row is not None]


def run(
    tasks: Sequence[tuple[str, Make]],
    seeds: Sequence[int],
    arms: Sequence[str],
    ledger: Ledger,
    progress: Progress,
    workers: int | None = None,
) -> list[Row]:
    """Every arm on every task and seed that the ledger does not have yet.

    Args:
        tasks: name and maker of each.
        seeds: of each task.
        arms: names, those that others need first.
        ledger: what is there already; gets the new rows.
        progress: told of each row.
        workers: processes, one thread each; the cores of this machine when None.
    """
    errands = list(_errands(tasks, seeds, arms, ledger))
    total = len(tasks) * len(seeds) * len(arms)
    done = total - sum(len(errand.arms) for errand in errands)
    progress(done, total, "")
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers or _cores(), mp_context=context, initializer=_settled) as pool:
        waiting: dict[Future[list[tuple[str, Row | None]]], Errand] = {pool.submit(carry_out, e): e for e in errands}
        try:
            for future in as_completed(waiting):
                errand = waiting[future]
                for arm, row in future.result():
                    ledger.add(errand.task, errand.seed, arm, row)
                    done += 1
                    progress(done, total, f"{errand.task}, seed {errand.seed}")
        except BaseException:  # whatever ends this must not leave others training
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
                worker.join()
            raise
    return ledger.found()


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """Progress as a bar on a terminal, for ``run``."""
    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    clocks = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[last]}"))
    with Bar(*columns, *clocks, console=console) as bar:
        line = bar.add_task("trials", total=None, last="")
        yield lambda done, total, last: bar.update(line, completed=done, total=total, last=last)


def carry_out(errand: Errand) -> list[tuple[str, Row | None]]:
    """Run the errand's arms one after the other."""
    task = errand.make()
    setup = task.make(errand.seed)
    peers = {row.arm: row for row in errand.known}
    found: list[tuple[str, Row | None]] = []
    for name in errand.arms:
        arm = ARMS[name]
        row = arm.run(task, setup, name, errand.seed, peers) if arm.after is None or arm.after in peers else None
        if row is not None:
            peers[name] = row
        found.append((name, row))
    return found


def _errands(
    tasks: Sequence[tuple[str, Make]], seeds: Sequence[int], arms: Sequence[str], ledger: Ledger
) -> Iterator[Errand]:
    for seed in seeds:
        for name, make in tasks:
            missing = tuple(arm for arm in arms if (name, seed, arm) not in ledger.rows)
            known = tuple(row for (t, s, _), row in ledger.rows.items() if (t, s) == (name, seed) and row is not None)
            if missing:
                yield Errand(make, name, seed, missing, known)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settled() -> None:
    """One thread for arithmetic, and an end when whoever asked is gone, however it went."""
    import torch

    torch.set_num_threads(1)
    asker = multiprocessing.parent_process()
    if asker is not None:
        threading.Thread(target=_leave_after, args=(asker.sentinel,), daemon=True).start()


def _leave_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
