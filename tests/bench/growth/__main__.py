"""``make bench-growth``: every arm on every development task; goes on where it was broken off."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from esper_core.errors import InvalidInput
from esper_core.nn.checkpoint import write_atomic
from services.tolaria.arena import report
from services.tolaria.arena.arms import chosen
from services.tolaria.arena.figures import Table
from services.tolaria.arena.suite import Ledger, run, shown
from services.tolaria.edge import answered
from tests.bench.growth.contest import SUITES, Contest, named, picked
from tests.bench.growth.goals import judged
from tests.bench.machine import machine

OUT = Path("build/bench")
_TITLES = {"growth": "Does growing pay?", "strangers": "Does growing pay where it was not developed?"}


def main() -> int:
    """Run what is missing, then write report and figures."""
    options = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    options.add_argument("--suite", choices=SUITES, default="growth", help="growth: developed on; strangers: never")
    options.add_argument("--seeds", type=int, default=10, help="paired seeds of every task (10)")
    options.add_argument("--tasks", help="some tasks only, separated by commas")
    options.add_argument("--arms", help="some arms only, separated by commas")
    options.add_argument("--out", type=Path, default=OUT, help="where rows and reports go (build/bench)")
    options.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    options.add_argument("--report", type=Path, help="also write the Markdown report there")
    asked = options.parse_args()
    console = Console(stderr=True)
    return answered(console, lambda: _run(asked, console), "stopped; the same command goes on from here")


def _run(asked: argparse.Namespace, console: Console) -> int:
    if asked.seeds < 1:
        raise InvalidInput(f"--seeds is {asked.seeds}", hint="one or more; ten or more for intervals worth reading")
    arms = chosen(asked.arms)
    suite = SUITES[asked.suite]
    names = picked(asked.suite, asked.tasks)
    path = asked.out / f"{asked.suite}.jsonl"
    if asked.fresh:
        path.unlink(missing_ok=True)
    ledger, began = Ledger(path), time.monotonic()
    tasks = [(name, partial(named, name)) for name in names]
    with shown(console) as progress:
        run(tasks, range(asked.seeds), arms, ledger, progress)
    rows = [row for row in ledger.found() if row.task in names and row.seed < asked.seeds and row.arm in arms]
    table, minutes = Table(rows), (time.monotonic() - began) / 60
    goals = judged(Contest(table, suite))
    about = {task.name: task.about for task in suite}
    opening = (
        f"{len(rows)} trials, {asked.seeds} paired seeds, this time {minutes:.1f} minutes. "
        f"Arms of a task and seed share data, initial weights and batches. " + " · ".join(machine().values())
    )
    cells = [["goal", "figure", "value", "target", "met"], *(_goal_line(name, goal) for name, goal in goals.items())]
    written = report.Report(_TITLES[asked.suite], opening, table, about, cells, goals)
    page = written.write(asked.out, asked.suite)
    if asked.report:
        write_atomic(asked.report, (written.markdown() + _reading(asked.report)).encode())
    for line_cells in cells[1:]:
        print("  ".join(line_cells))
    print(page, file=sys.stderr)
    return 0


def _reading(path: Path) -> str:
    """What a person wrote under the figures, kept when they are measured again."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, words = before.partition("\n## Reading\n")
    return mark + words


def _goal_line(name: str, goal: dict[str, float | str | bool | None]) -> list[str]:
    value = goal["value"]
    shown = "not measured" if value is None else f"{value:.3g}"
    verdict = "–" if goal["met"] is None else "yes" if goal["met"] else "no"
    return [name, str(goal["about"]), shown, str(goal["target"]), verdict]


if __name__ == "__main__":
    sys.exit(main())
