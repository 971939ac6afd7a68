"""The report of a run: one HTML file with everything in it, readable without a network and years from now.

Curves of the grown network beside its ungrown twin, the seeds' lives, decisions with reasons, figures of every seed.
Plots are drawn by plotly.js, copied from the installed plotly package into the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from esper_core.nn.checkpoint import write_atomic
from services.tolaria import charts
from services.tolaria.config import TolariaConfig
from services.tolaria.history import Boundary
from services.tolaria.result import RunResult

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.15rem;margin-top:2.2rem}p.sub{color:#57606a;margin-top:.2rem}
table{border-collapse:collapse;margin:.6rem 0}th,td{text-align:left;padding:.25rem .8rem .25rem 0;vertical-align:top}
td.n,th.n{text-align:right}th{color:#57606a;font-weight:600}tr+tr td{border-top:1px solid #d8dee4}
summary{cursor:pointer;font-weight:600;margin-top:1rem}pre{background:#f6f8fa;padding:.8rem;overflow:auto}
.big{font-size:1.9rem;font-weight:700}.cards{display:flex;gap:2.5rem;flex-wrap:wrap;margin:1rem 0}
.cards div span{color:#57606a}
"""
_DRAW = """
const drawn = new Set();
function draw(root) {
  for (const box of root.querySelectorAll('[data-chart]')) {
    if (drawn.has(box) || box.closest('details:not([open])')) continue;
    drawn.add(box);
    const chart = CHARTS[box.dataset.chart];
    Plotly.newPlot(box, chart.data, chart.layout, {responsive: true, displaylogo: false});
  }
}
draw(document);
for (const part of document.querySelectorAll('details')) part.addEventListener('toggle', () => draw(part));
"""


@dataclass(frozen=True)
class SeedRun:
    """One seed's figures and history; ``twin`` is empty without one."""

    result: RunResult
    grown: Sequence[Boundary]
    twin: Sequence[Boundary]


def write(path: Path, title: str, config: TolariaConfig, runs: Sequence[SeedRun], figures: dict[str, Any]) -> None:
    """Write the report of ``runs`` (one per seed) to ``path``.

    Args:
        path: the HTML file; its directory must exist.
        title: what the runs are called together.
        config: settings they share.
        runs: at least one.
        figures: from ``result.combined``.
    """
    plots: dict[str, Any] = {}
    body = [_summary(figures, runs), _chart(plots, "loss", charts.losses(runs))]
    if any(boundary.figures.validation_accuracy is not None for run in runs for boundary in (*run.grown, *run.twin)):
        body.append(_chart(plots, "accuracy", charts.accuracies(runs)))
    if len(runs) > 1:
        body.append("<h2>Every seed</h2>" + _seeds(runs))
    for number, run in enumerate(runs):
        if run.result.grown:
            body.append(_life(plots, number, run, shown=number == 0))
    body.append(f"<details><summary>Settings</summary><pre>{escape(_settings(config))}</pre></details>")
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><p class=sub>{escape(_subtitle(config, runs))}</p>{''.join(body)}"
        f"<script>{plotly()}</script><script>const CHARTS = {_inline(plots)};{_DRAW}</script></html>"
    )
    write_atomic(path, page.encode())


def plotly() -> str:
    return files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")


def _inline(value: Any) -> str:
    """JSON that may stand in a script element; what is not finite was replaced before."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _subtitle(config: TolariaConfig, runs: Sequence[SeedRun]) -> str:
    seeds = ", ".join(str(run.result.seed) for run in runs)
    return (
        f"{config.model.host} on {config.dataset.name}, {config.optimization.epochs} epochs, "
        f"seed{'s' if len(runs) > 1 else ''} {seeds}"
    )


def _settings(config: TolariaConfig) -> str:
    return json.dumps(config.model_dump(mode="json", exclude={"services"}), indent=2)


def _summary(figures: dict[str, Any], runs: Sequence[SeedRun]) -> str:
    cards = [
        (percent_text(figures["ungrown_accuracy"]), "ungrown, test accuracy"),
        (percent_text(figures["grown_accuracy"]), "grown, test accuracy"),
        (gain_text(figures), "gain" + (", mean ± 95 % interval" if figures["gain_interval_95"] is not None else "")),
        (str(figures["fossilized"]), "grafts kept"),
    ]
    if figures["ungrown_accuracy"] is None and figures["grown_accuracy"] is None:
        cards[:2] = [
            (number_text(figures["ungrown_loss"]), "ungrown, test loss"),
            (number_text(figures["grown_loss"]), "grown, test loss"),
        ]
    shown = "".join(
        f"<div><div class=big>{escape(value)}</div><span>{escape(what)}</span></div>" for value, what in cards
    )
    rows = [
        ("Run", figures["run"] if len(runs) == 1 else ", ".join(run.result.run for run in runs)),
        (
            "Test loss, ungrown → grown",
            f"{number_text(figures['ungrown_loss'])} → {number_text(figures['grown_loss'])}",
        ),
        (
            "Grafts kept / culled / rolled back",
            f"{figures['fossilized']} / {figures['culled']} / {figures['rolled_back']}",
        ),
        ("Parameters added" + (" (mean)" if len(runs) > 1 else ""), number_text(figures["added_parameters"])),
        ("Parameters carved" + (" (mean)" if len(runs) > 1 else ""), number_text(figures["carved_parameters"])),
        ("Largest |folded − unfolded| output", number_text(figures["folded_max_abs_diff"])),
        ("Wall seconds", number_text(figures["wall_seconds"])),
    ]
    return f"<div class=cards>{shown}</div>" + _table(("", ""), rows)


def _seeds(runs: Sequence[SeedRun]) -> str:
    rows = [
        (
            run.result.run,
            str(run.result.seed),
            percent_text(run.result.ungrown_accuracy),
            percent_text(run.result.grown_accuracy),
            points_text(run.result),
            f"{run.result.fossilized} / {run.result.culled} / {run.result.rolled_back}",
            str(run.result.added_parameters),
            number_text(run.result.folded_max_abs_diff),
        )
        for run in runs
    ]
    head = (
        "run",
        "seed",
        "ungrown",
        "grown",
        "gain",
        "kept / culled / rolled back",
        "parameters added",
        "fold difference",
    )
    return _table(head, rows)


def _life(plots: dict[str, Any], number: int, run: SeedRun, *, shown: bool) -> str:
    """What became of one run's seeds: lanes, alpha, health, decisions, events."""
    parts = [
        _chart(plots, f"lanes-{number}", charts.lanes(run.grown)),
        _chart(
            plots,
            f"alpha-{number}",
            charts.per_slot(run.grown, "alpha", "Alpha: how much of a kernel reaches the host"),
        ),
        _chart(
            plots, f"health-{number}", charts.per_slot(run.grown, "health", "Health: below 0.3 a slot asks for growth")
        ),
        "<h2>Decisions</h2>",
        _table(("epoch", "policy", "action", "confidence", "reasons"), _decisions(run.grown)),
        "<h2>State changes</h2>",
        _table(("epoch", "slot", "from", "to", "kernel", "alpha", "reason", "measured"), _events(run.grown)),
    ]
    if carved := _carved(run.grown):
        head = (
            "epoch",
            "units",
            "state",
            "reason",
            "loss before → now",
            "accuracy before → now",
            "parameters",
            "FLOPs",
        )
        parts += ["<h2>Carving</h2>", _table(head, carved)]
    state = " open" if shown else ""
    return f"<details{state}><summary>Seeds of {escape(run.result.run)}</summary>{''.join(parts)}</details>"


def _decisions(boundaries: Iterable[Boundary]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for boundary in boundaries:
        if boundary.signal is None:
            continue
        for action in boundary.signal.actions:
            reasons = "; ".join(
                f"{reason.code.name}{f' ({reason.detail})' if reason.detail else ''}" for reason in action.reasons
            )
            rows.append(
                (
                    str(boundary.figures.epoch + 1),
                    boundary.signal.policy_version[:16],
                    f"{action.command.target.name} {action.command.slot}",
                    f"{action.confidence:.2f}",
                    reasons,
                )
            )
    return rows


def _events(boundaries: Iterable[Boundary]) -> list[tuple[str, ...]]:
    return [
        (
            str(boundary.figures.epoch + 1),
            event.slot,
            event.source.name,
            event.target.name,
            event.blueprint_name,
            f"{event.alpha:.2f}",
            event.reason,
            ", ".join(f"{name} {number_text(value)}" for name, value in event.measurements.items()),
        )
        for boundary in boundaries
        for event in boundary.events
    ]


def _carved(boundaries: Iterable[Boundary]) -> list[tuple[str, ...]]:
    return [
        (
            str(boundary.figures.epoch + 1),
            ", ".join(f"{len(cut.units)} of {cut.cluster}" for cut in event.cuts),
            event.state.name,
            event.reason,
            f"{number_text(event.loss_before)} → {number_text(event.loss)}",
            f"{percent_text(event.accuracy_before)} → {percent_text(event.accuracy)}",
            f"−{event.parameters}" if event.parameters else "",
            f"−{event.flops}" if event.flops else "",
        )
        for boundary in boundaries
        for event in boundary.carved
    ]


def _chart(plots: dict[str, Any], name: str, chart: dict[str, Any]) -> str:
    plots[name] = chart
    return f'<div data-chart="{name}"></div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "<p class=sub>none</p>"
    top = f"<tr>{''.join(f'<th>{escape(cell)}' for cell in head)}</tr>" if any(head) else ""
    return f"<table>{top}{''.join('<tr>' + ''.join(f'<td>{escape(cell)}' for cell in row) for row in rows)}</table>"


def percent_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def number_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def points_text(result: RunResult) -> str:
    if result.gain is None:
        return "–"
    return f"{100 * result.gain:+.1f} points" if result.grown_accuracy is not None else f"{result.gain:+.4g} loss"


def gain_text(figures: dict[str, Any]) -> str:
    mean, half = figures["gain_mean"], figures["gain_interval_95"]
    if mean is None:
        return "–"
    if figures["grown_accuracy"] is None:
        return f"{mean:+.3g}" + (f" ± {half:.2g}" if half is not None else "")
    return f"{100 * mean:+.1f}" + (f" ± {100 * half:.1f}" if half is not None else "") + " points"
