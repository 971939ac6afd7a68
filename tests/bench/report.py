"""Tables for the terminal, for programs, and for REPORT.md.

REPORT.md has one section per bench, each with its date and revision, and a reading that a person writes. Measuring some
benches again replaces their sections and leaves the others and the reading alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from tests.bench.bench import Outcome
from tests.bench.registry import ABOUT

PATH = Path(__file__).with_name("REPORT.md")
READING = "Reading"
ORDER = tuple(ABOUT)
MACHINE = ("processor", "cores", "memory", "system", "python", "torch", "grpcio", "device")
HEAD = """# What it costs and what it brings

Written by `python -m tests.bench --report`; the last section by a person. Ratios come from runs side by side, block by
block in turn, within one process; absolute times are this machine's and that hour's. "load" is how many processes wanted
to run in the last 1, 5 and 15 minutes, ours among them.

Machine: {machine}.
"""
Facts = Mapping[str, str]


def shown(value: object) -> str:
    """A cell."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1000:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2g}"


def show_machine(out: Console, facts: Facts) -> None:
    """Print what it is measured on."""
    out.print(" · ".join(f"{name} {value}" for name, value in facts.items()), style="dim", highlight=False)


def show(out: Console, outcome: Outcome) -> None:
    """Print a bench's tables, or why there are none."""
    out.print(f"\n[bold]{outcome.bench.name}[/] [dim]{outcome.seconds:.0f} s[/]", highlight=False)
    if outcome.failed:
        out.print(f"  could not be run: {outcome.failed}", style="red", markup=False, highlight=False)
    for table in outcome.tables:
        columns = _columns(table.rows)
        drawn = RichTable(title=table.title, title_justify="left", header_style="dim", box=None, padding=(0, 2))
        for column in columns:
            drawn.add_column(column, justify="left" if column in ("what", "unit") else "right")
        for row in table.rows:
            drawn.add_row(*(shown(row.get(column)) for column in columns))
        out.print(drawn)
        for note in table.notes:
            out.print(f"  {note}", style="dim", markup=False, highlight=False)


def plain(facts: Facts, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Everything as plain values."""
    return {
        "machine": dict(facts),
        "benches": [
            {
                "name": outcome.bench.name,
                "seconds": round(outcome.seconds, 2),
                "failed": outcome.failed,
                "tables": [{"title": t.title, "rows": t.rows, "notes": list(t.notes)} for t in outcome.tables],
            }
            for outcome in outcomes
        ],
    }


def write(facts: Facts, outcomes: Sequence[Outcome], path: Path = PATH) -> None:
    """Write the sections of these benches; those of other benches, and the reading, stay as they are.

    Others may write theirs at the same time: each takes its turn, and what stands there is whole at any moment.
    """
    with _turn(path):
        _replace(path, _revised(facts, outcomes, path))


def _revised(facts: Facts, outcomes: Sequence[Outcome], path: Path) -> str:
    sections = _sections(path.read_text(encoding="utf-8") if path.exists() else "")
    reading = sections.pop(READING, f"## {READING}\n")
    sections |= {outcome.bench.name: _section(facts, outcome) for outcome in outcomes}
    machine = ", ".join(facts[name] for name in MACHINE if name in facts)
    kept = [sections[name] for name in ORDER if name in sections]
    return "\n".join([HEAD.format(machine=machine), *kept, reading])


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Alone at ``path`` among all processes; the lock file stays, for whoever removed it would let two in."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def _sections(text: str) -> dict[str, str]:
    """The report's parts by their headings, headings included."""
    parts = text.split("\n## ")[1:]
    return {part.splitlines()[0]: f"## {part.rstrip()}\n" for part in parts}


def _section(facts: Facts, outcome: Outcome) -> str:
    when = ", ".join(f"{name} {facts[name]}" for name in ("date", "revision", "mode", "load") if name in facts)
    parts = [
        f"## {outcome.bench.name}\n",
        f"{outcome.bench.about[0].upper()}{outcome.bench.about[1:]}. Took {outcome.seconds:.0f} s; {when}.\n",
    ]
    if outcome.failed:
        parts.append(f"Could not be run: {outcome.failed}\n")
    return "\n".join([*parts, *(_markdown(table.title, table.rows, table.notes) for table in outcome.tables)])


def _columns(rows: Sequence[dict[str, object]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _markdown(title: str, rows: Sequence[dict[str, object]], notes: Sequence[str]) -> str:
    columns = _columns(rows)
    lines = [f"**{title}**\n", _line(columns), _line(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [_line([shown(row.get(column)) for column in columns]) for row in rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
