"""The report's plots as plain plotly.js figures: dictionaries of data and layout, holding only finite numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esper_core.lifecycle import State
from services.tolaria.history import Boundary

if TYPE_CHECKING:
    from services.tolaria.report import SeedRun

GROWN, TWIN = "#1a7f37", "#8c959f"
STATES = {
    State.DORMANT: "#d8dee4",
    State.GERMINATED: "#79c0ff",
    State.LOADING: "#54aeff",
    State.TRAINING: "#0969da",
    State.GRAFTING: "#d4a72c",
    State.STABILIZATION: "#bf8700",
    State.EVALUATING: "#a475f9",
    State.FINE_TUNING: "#8250df",
    State.FOSSILIZED: "#1a7f37",
    State.CULLED: "#cf222e",
    State.ROLLED_BACK: "#82071e",
}
_LAYOUT: dict[str, Any] = {
    "margin": {"l": 70, "r": 20, "t": 50, "b": 90},
    "height": 340,
    "font": {"family": "system-ui, sans-serif"},
    "legend": {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom"},
}


def losses(runs: Sequence[SeedRun]) -> dict[str, Any]:
    """Training and validation loss of every network."""
    data = []
    for name, colour, boundaries, first in _networks(runs):
        epochs = [boundary.figures.epoch + 1 for boundary in boundaries]
        for what, dash in (("train_loss", "dot"), ("validation_loss", "solid")):
            values = [_finite(getattr(boundary.figures, what)) for boundary in boundaries]
            kind = "training" if what == "train_loss" else "validation"
            data.append(_line(f"{name}, {kind}", colour, epochs, values, first, dash=dash))
    return _chart(data, "Loss", "loss", log=True)


def accuracies(runs: Sequence[SeedRun]) -> dict[str, Any]:
    """Validation accuracy of every network."""
    data = [
        _line(
            name,
            colour,
            [boundary.figures.epoch + 1 for boundary in boundaries],
            [_finite(boundary.figures.validation_accuracy) for boundary in boundaries],
            first,
        )
        for name, colour, boundaries, first in _networks(runs)
    ]
    return _chart(data, "Validation accuracy", "accuracy")


def lanes(boundaries: Sequence[Boundary]) -> dict[str, Any]:
    """A lane per slot, coloured by the state its seed was in after each epoch."""
    slots = [row.slot for row in boundaries[-1].slots] if boundaries else []
    bars: dict[State, dict[str, list[Any]]] = {}
    for slot in slots:
        for state, begin, end in _stretches(boundaries, slot):
            bar = bars.setdefault(state, {"y": [], "base": [], "x": []})
            bar["y"].append(slot)
            bar["base"].append(begin)
            bar["x"].append(end - begin)
    data = [
        {"type": "bar", "orientation": "h", "name": state.name, "marker": {"color": STATES[state]}, **bars[state]}
        for state in State
        if state in bars
    ]
    chart = _chart(data + _ends(boundaries), "The seeds' lives", "")
    chart["layout"].update(barmode="overlay", height=190 + 36 * len(slots), bargap=0.35)
    chart["layout"]["yaxis"].update(automargin=True, type="category")
    return chart


def _ends(boundaries: Sequence[Boundary]) -> list[dict[str, Any]]:
    """A mark where a graft ended: a folded one leaves its lane at once to the slot's next seed."""
    marks = {State.FOSSILIZED: "star", State.CULLED: "x", State.ROLLED_BACK: "triangle-down"}
    found = [
        (event.target, event.slot, boundary.figures.epoch + 1, event.reason)
        for boundary in boundaries
        for event in boundary.events
        if event.target in marks
    ]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"{state.name} here",
            "marker": {"symbol": symbol, "size": 15, "color": STATES[state], "line": {"width": 1, "color": "white"}},
            "y": [slot for target, slot, _, _ in found if target is state],
            "x": [epoch for target, _, epoch, _ in found if target is state],
            "text": [reason for target, _, _, reason in found if target is state],
        }
        for state, symbol in marks.items()
        if any(target is state for target, *_ in found)
    ]


def per_slot(boundaries: Sequence[Boundary], what: str, title: str) -> dict[str, Any]:
    """A line per slot of one of its figures."""
    values: dict[str, list[float | None]] = {}
    for index, boundary in enumerate(boundaries):
        for row in boundary.slots:
            values.setdefault(row.slot, [None] * len(boundaries))[index] = _finite(getattr(row, what))
    epochs = [boundary.figures.epoch + 1 for boundary in boundaries]
    data = [
        {"type": "scatter", "mode": "lines", "name": slot, "x": epochs, "y": line, "connectgaps": True}
        for slot, line in values.items()
    ]
    chart = _chart(data, title, what)
    chart["layout"]["yaxis"]["range"] = [-0.03, 1.03]
    return chart


def _networks(runs: Sequence[SeedRun]) -> list[tuple[str, str, Sequence[Boundary], bool]]:
    """Name, colour, history and whether it is the first of its kind, which alone gets a place in the legend."""
    found = []
    for number, run in enumerate(runs):
        main = ("grown", GROWN) if run.result.grown else ("ungrown", TWIN)
        found.append((*main, run.grown, number == 0))
        if run.twin:
            found.append(("ungrown twin", TWIN, run.twin, number == 0))
    return found


def _stretches(boundaries: Sequence[Boundary], slot: str) -> list[tuple[State, int, int]]:
    """(state, first epoch, epoch after the last) of each unbroken stretch."""
    found: list[tuple[State, int, int]] = []
    for boundary in boundaries:
        epoch = boundary.figures.epoch + 1
        for row in boundary.slots:
            if row.slot != slot:
                continue
            if found and found[-1][0] is row.state:
                found[-1] = (row.state, found[-1][1], epoch + 1)
            else:
                found.append((row.state, epoch, epoch + 1))
    return found


def _line(
    name: str, colour: str, x: list[int], y: list[float | None], legend: bool, *, dash: str = "solid"
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "legendgroup": name,
        "showlegend": legend,
        "x": x,
        "y": y,
        "line": {"color": colour, "dash": dash, "width": 1.6},
    }


def _chart(data: list[dict[str, Any]], title: str, y: str, *, log: bool = False) -> dict[str, Any]:
    layout = {
        **_LAYOUT,
        "title": {"text": title},
        "xaxis": {"title": {"text": "epoch"}},
        "yaxis": {"title": {"text": y}, "type": "log" if log else "-"},
    }
    return {"data": data, "layout": layout}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
