"""The comparison as a page for people and as Markdown for a repository: every arm, bad results too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table as Grid

from services.tolaria.arena.arms import ARMS
from services.tolaria.arena.figures import Table, mean
from services.tolaria.arena.trial import Row
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


def markdown(table: Table, about: Mapping[str, str], opening: str, goals: Sequence[Cells]) -> str:
    """The whole report.

    Args:
        table: the rows.
        about: one line per task.
        opening: what was run, when and where.
        goals: head and lines of a table of goals; empty for none.
    """
    parts = [opening]
    if goals:
        parts.append("## Goals\n\n" + _grid(goals))
    parts.append("## Arms\n\n" + "\n".join(f"- **{name}**: {ARMS[name].about}" for name in _shown(table)))
    parts += [f"## {task}\n\n{about.get(task, '')}\n\n" + _grid([HEAD, *lines(table, task)]) for task in table.tasks]
    return "\n\n".join(parts) + "\n"


def text(table: Table, task: str) -> Grid:
    """The task's lines for a terminal."""
    grid = Grid(*HEAD, box=None)
    for line in lines(table, task):
        grid.add_row(*line)
    return grid


def page(table: Table, about: Mapping[str, str], title: str, opening: str, goals: Sequence[Cells]) -> str:
    """The same as one HTML file that needs no network."""
    parts = [f"<h1>{escape(title)}</h1><p>{escape(opening)}</p>"]
    if goals:
        parts.append("<h2>Goals</h2>" + _html(goals))
    plots = []
    for number, task in enumerate(table.tasks):
        parts.append(f"<h2>{escape(task)}</h2><p>{escape(about.get(task, ''))}</p><div id=plot{number}></div>")
        parts.append(f"<details><summary>Figures</summary>{_html([HEAD, *lines(table, task)])}</details>")
        plots.append(f"Plotly.newPlot('plot{number}', {_chart(table, task)});")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"{''.join(parts)}<script>{plotly()}</script><script>{''.join(plots)}</script></html>"
    )


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


def document(rows: Sequence[Row], goals: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The rows and goals for scripts."""
    return {
        "rows": [
            {
                "task": row.task,
                "arm": row.arm,
                "seed": row.seed,
                "metrics": row.model_dump(mode="json", exclude={"task", "arm", "seed"}),
            }
            for row in rows
        ],
        "goals": {name: dict(goal) for name, goal in goals.items()},
    }
