"""Which tasks there are, and the rows of some of them together with what each is meant to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.tolaria.arena.arms import listed
from services.tolaria.arena.figures import Table
from services.tolaria.arena.task import Task
from services.tolaria.arena.trial import Row
from tests.bench.growth.strangers import STRANGERS
from tests.bench.growth.tasks import TASKS

SUITES: Mapping[str, tuple[Task, ...]] = {"growth": TASKS, "strangers": STRANGERS}


def named(name: str) -> Task:
    """The task of that name, of whichever suite."""
    return next(task for tasks in SUITES.values() for task in tasks if task.name == name)


def picked(suite: str, names: str | None) -> list[str]:
    """Names of a suite's tasks that are among ``names``, separated by commas; of all when None.

    Raises:
        InvalidInput: the suite has no such task.
    """
    there = [task.name for task in SUITES[suite]]
    wanted = there if names is None else listed(names, there, f"the suite {suite} has no task")
    return [name for name in there if name in wanted]


@dataclass(frozen=True)
class Contest:
    """A suite's rows."""

    table: Table
    tasks: Sequence[Task]

    def names(self, *groups: str) -> list[str]:
        """Tasks of those groups."""
        return [task.name for task in self.tasks if task.group in groups]

    def rows(self, arm: str, *groups: str) -> list[Row]:
        """An arm's rows on the tasks of those groups; of all when none is named."""
        names = self.names(*groups) if groups else [task.name for task in self.tasks]
        return [row for name in names for row in self.table.of(name, arm)]

    def gaps(self, arm: str, other: str, *groups: str) -> list[float]:
        """Mean points of ``arm`` above ``other``, per task that has both."""
        return [gap.value for name in self.names(*groups) if (gap := self.table.gap(name, arm, other))]
