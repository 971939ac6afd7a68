"""``python -m services.tolaria.arena RUN.yaml``: does growing pay on one's own network and data, against every alternative?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from esper_core.errors import InvalidInput
from services.tolaria.arena import report
from services.tolaria.arena.arms import ARMS, chosen
from services.tolaria.arena.figures import Table, mean
from services.tolaria.arena.own import read_task
from services.tolaria.arena.suite import Ledger, run, shown
from services.tolaria.arena.trial import wrapped
from services.tolaria.edge import answered


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    arms = "\n".join(f"  {name:<14}{arm.about}" for name, arm in ARMS.items())
    out = argparse.ArgumentParser(
        prog="esperctl bench growth",
        description=f"{__doc__}\n\narms:\n{arms}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("run", metavar="RUN.yaml|PRESET", help="network, data and training: a file, or a preset's name")
    out.add_argument("--arms", help="which, separated by commas; default: all that apply")
    out.add_argument("--seeds", type=int, default=10, help="paired seeds (10)")
    out.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting")
    out.add_argument("--out", type=Path, default=Path("growth"), help="folder for rows and reports (growth)")
    out.add_argument("--fresh", action="store_true", help="forget the rows of an earlier, broken-off comparison")
    out.add_argument("-o", "--output", choices=("text", "json"), default="text")
    return out


def compare(asked: argparse.Namespace, console: Console) -> int:
    """Run what is missing, write the reports, print the table."""
    if asked.seeds < 1:
        raise InvalidInput(f"--seeds {asked.seeds} compares nothing", hint="1 or more; 10 for an interval worth having")
    arms = chosen(asked.arms)
    task = read_task(asked.run, tuple(asked.set))
    wrapped(task.make(0))  # what is wrong with network or data shows here, not in a worker
    path = asked.out / f"{task.name}.jsonl"
    if asked.fresh:
        path.unlink(missing_ok=True)
    ledger = Ledger(path)
    with shown(console) as progress:
        run([(task.name, partial(read_task, asked.run, tuple(asked.set)))], range(asked.seeds), arms, ledger, progress)
    table = Table(row for row in ledger.found() if row.arm in arms and row.seed < asked.seeds)
    opening = f"{asked.seeds} paired seeds: arms of a seed share data, initial weights and batches."
    page = report.Report(f"Growing {task.name}", opening, table, {task.name: task.about}).write(asked.out, task.name)
    if asked.output == "json":
        accuracy = {arm: mean(table.points(task.name, arm)).value for arm in table.arms(task.name)}
        print(json.dumps({"task": task.name, "points": accuracy, "report": str(page)}))  # noqa: T201
    else:
        Console().print(report.text(table, task.name))
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    asked = parser().parse_args(argv)
    console = Console(stderr=True)
    return answered(console, lambda: compare(asked, console), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
