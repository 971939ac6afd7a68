"""The comparison as a page for people and as Markdown for a repository: every arm, bad results too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table as Grid

from esper_core.nn.checkpoint import write_atomic
from services.tolaria.arena.arms import ARMS
from services.tolaria.arena.figures import Table, mean
from services.tolaria.report import plotly

Cells = list[str]
HEAD: Cells = [
    "arm", "n", "accuracy %", "± 95 %", "above none", "above esper", "at full alpha", "added", "tried", "kept", "culled", "rolled back",
    "train GFLOP", "scoring %", "train s", "growing s",
]  # fmt: skip


def lines(table: Table, task: str) -> list[Cells]:
    """One line per arm that ran on the task."""
    return [_line(table, task, arm) for arm in table.arms(task)]


def _line(table: Table, task: str, arm: str) -> Cells:
    rows = table.of(task, arm)
    found = mean(table.points(task, arm))

    def average(values: Sequence[float], digits: int = 1) -> str:
        return f"{sum(values) / len(values):.{digits}f}" if values else "–"

    return [
        arm,
        str(len(rows)),
        f"{found.value:.2f}",
        f"{found.half:.2f}" if found.n > 1 else "–",
        str(table.gap(task, arm, "none") or "–") if arm != "none" else "–",
        str(table.gap(task, arm, "esper") or "–") if arm != "esper" else "–",
        average([100 * row.at_full[0] for row in rows if row.at_full], 2),
        average([row.added for row in rows], 0),
        average([len(row.slots) for row in rows]),
        average([len(row.kept) for row in rows]),
        average([row.culled for row in rows]),
        average([row.rolled_back for row in rows]),
        average([row.flops / 1e9 for row in rows], 2),
        average([100 * row.scoring_flops / row.flops for row in rows]),
        average([row.train_seconds for row in rows], 2),
        average([row.growing_seconds for row in rows], 2),
    ]


@dataclass(frozen=True)
class Report:
    """A comparison to be written down.

    Attributes:
        title: of the page.
        opening: what was run, when and where.
        table: the rows.
        about: one line per task.
        goals: head and lines of a table of goals; empty for none.
        verdicts: the goals for scripts.
    """

    title: str
    opening: str
    table: Table
    about: Mapping[str, str]
    goals: Sequence[Cells] = ()
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path, name: str) -> Path:
        """``name``.md, .html and .json under ``folder``; where the page is."""
        page = folder / f"{name}.html"
        write_atomic(folder / f"{name}.md", self.markdown().encode())
        write_atomic(page, self.page().encode())
        write_atomic(folder / f"{name}.json", json.dumps(self.document(), indent=1).encode())
        return page

    def markdown(self) -> str:
        """For a repository."""
        parts = [f"# {self.title}", self.opening]
        if self.goals:
            parts.append("## Goals\n\n" + _grid(self.goals))
        parts.append("## Arms\n\n" + "\n".join(f"- **{name}**: {ARMS[name].about}" for name in _shown(self.table)))
        for task in self.table.tasks:
            figures = _grid([HEAD, *lines(self.table, task)])
            parts.append(f"## {task}\n\n{self.about.get(task, '')}\n\n{figures}")
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """One HTML file that needs no network."""
        parts = [f"<h1>{escape(self.title)}</h1><p>{escape(self.opening)}</p>"]
        if self.goals:
            parts.append("<h2>Goals</h2>" + _html(self.goals))
        plots = []
        for number, task in enumerate(self.table.tasks):
            about = escape(self.about.get(task, ""))
            parts.append(f"<h2>{escape(task)}</h2><p>{about}</p><div id=plot{number}></div>")
            parts.append(f"<details><summary>Figures</summary>{_html([HEAD, *lines(self.table, task)])}</details>")
            plots.append(f"Plotly.newPlot('plot{number}', {_chart(self.table, task)});")
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(self.title)}</title><style>{_STYLE}</style>"
            f"{''.join(parts)}<script>{plotly()}</script><script>{''.join(plots)}</script></html>"
        )

    def document(self) -> dict[str, Any]:
        """For scripts: every row, and the verdicts on the goals."""
        rows = (row for task in self.table.tasks for arm in self.table.arms(task) for row in self.table.of(task, arm))
        key = {"task", "arm", "seed"}
        found = [{**row.model_dump(include=key), "metrics": row.model_dump(mode="json", exclude=key)} for row in rows]
        return {"rows": found, "goals": {name: dict(goal) for name, goal in self.verdicts.items()}}


def text(table: Table, task: str) -> Grid:
    """The task's lines for a terminal of eighty columns: what one looks at first."""
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    wanted = [
        HEAD.index(name) for name in ("arm", "n", "accuracy %", "± 95 %", "above none", "above esper", "added", "kept")
    ]
    for index in wanted:
        grid.add_column(HEAD[index], justify="right" if index else "left", no_wrap=True)
    for line in lines(table, task):
        grid.add_row(*(line[index] for index in wanted))
    return grid


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .7rem .2rem 0;text-align:left}tr+tr td{border-top:1px solid #d8dee4}"
    "summary{cursor:pointer}"
)


def _chart(table: Table, task: str) -> str:
    found = {arm: mean(table.points(task, arm)) for arm in table.arms(task)}
    bars: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": list(found),
        "y": [value.value for value in found.values()],
        "error_y": {"type": "data", "array": [value.half if value.n > 1 else 0.0 for value in found.values()]},
        "marker": {"size": 10, "color": ["#1a7f37" if arm == "esper" else "#57606a" for arm in found]},
    }
    seeds: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [arm for arm in found for _ in table.points(task, arm)],
        "y": [value for arm in found for value in table.points(task, arm)],
        "marker": {"size": 4, "color": "#8c959f", "opacity": 0.6},
    }
    layout = {"height": 300, "margin": {"l": 50, "r": 10, "t": 10, "b": 60}, "showlegend": False}
    return f"{json.dumps([seeds, bars])}, {json.dumps(layout)}".replace("<", "\\u003c")


def _shown(table: Table) -> list[str]:
    return [name for name in ARMS if any(name in table.arms(task) for task in table.tasks)]


def _grid(cells: Sequence[Cells]) -> str:
    head, *rest = cells
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rest])


def _html(cells: Sequence[Cells]) -> str:
    head, *rest = cells
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f"<table><tr>{top}</tr>{body}</table>"
