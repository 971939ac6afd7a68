"""Tables for the terminal, for programs, and for REPORT.md.

REPORT.md is machine, tables and date of one run, followed by a reading that a person writes: everything from the line
``## Reading`` on is kept when the tables are written anew, and says which run it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from tests.bench.bench import Outcome

PATH = Path(__file__).with_name("REPORT.md")
READING = "## Reading"
HEAD = """# What it costs and what it brings

Written by `python -m tests.bench --report`. Ratios come from runs side by side, block by block in turn, within one
process and one minute; absolute times are this machine's and this hour's.
"""


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


def show(out: Console, facts: dict[str, str], outcomes: Sequence[Outcome]) -> None:
    """Print every table."""
    out.print(" · ".join(f"{name} {value}" for name, value in facts.items()), style="dim", highlight=False)
    for outcome in outcomes:
        out.print(f"\n[bold]{outcome.bench.name}[/] [dim]{outcome.seconds:.0f} s[/]", highlight=False)
        if outcome.failed:
            out.print(f"  could not be run: {outcome.failed}", style="red", markup=False, highlight=False)
        for table in outcome.tables:
            columns = _columns(table.rows)
            drawn = RichTable(title=table.title, title_justify="left", header_style="dim", box=None, padding=(0, 2))
            for column in columns:
                drawn.add_column(column, justify="left" if column in ("what", "unit", "run") else "right")
            for row in table.rows:
                drawn.add_row(*(shown(row.get(column)) for column in columns))
            out.print(drawn)
            for note in table.notes:
                out.print(f"  {note}", style="dim", markup=False, highlight=False)


def plain(facts: dict[str, str], outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Everything as plain values."""
    return {
        "machine": facts,
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


def write(facts: dict[str, str], outcomes: Sequence[Outcome], path: Path = PATH) -> None:
    """Write the report, and keep the reading that is there."""
    parts = [HEAD, "| machine | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in facts.items())]
    for outcome in outcomes:
        parts.append(f"## {outcome.bench.name}\n\n{outcome.bench.about} ({outcome.seconds:.0f} s)\n")
        if outcome.failed:
            parts.append(f"Could not be run: {outcome.failed}\n")
        parts += [_markdown(table.title, table.rows, table.notes) for table in outcome.tables]
    parts.append(reading(path))
    path.write_text("\n".join(parts), encoding="utf-8")


def reading(path: Path) -> str:
    """What a person wrote below the tables, with its heading; only the heading when there is nothing yet."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    place = text.find(f"\n{READING}")
    return text[place + 1 :] if place >= 0 else f"{READING}\n"


def _columns(rows: Sequence[dict[str, object]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _markdown(title: str, rows: Sequence[dict[str, object]], notes: Sequence[str]) -> str:
    columns = _columns(rows)
    lines = [f"**{title}**\n", _line(columns), _line(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [_line([shown(row.get(column)) for column in columns]) for row in rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
