"""What a person sees while it trains: a live picture on a terminal, plain lines anywhere else. Always on stderr."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from esper_core.control.carve.papers import CarveEvent, count
from esper_core.control.packet import AdaptationSignal, SeedEvent
from esper_core.lifecycle import State
from services.tolaria.history import Boundary, Figures

BARS = "▁▂▃▄▅▆▇█"
COLOURS = {
    State.DORMANT: "grey50",
    State.GERMINATED: "cyan",
    State.LOADING: "cyan",
    State.TRAINING: "blue",
    State.GRAFTING: "yellow",
    State.STABILIZATION: "yellow",
    State.EVALUATING: "magenta",
    State.FINE_TUNING: "magenta",
    State.FOSSILIZED: "green",
    State.CULLED: "red",
    State.ROLLED_BACK: "bold red",
}


class View(Protocol):
    """Shows a run."""

    def begin(self, title: str, epochs: int, done: int = 0) -> None:
        """A phase of ``epochs`` epochs begins, ``done`` of them trained before."""
        ...

    def epoch(self, boundary: Boundary) -> None: ...

    def say(self, text: str) -> None:
        """Something that is worth a line."""
        ...

    def waiting(self, what: str, done: int, of: int) -> None:
        """Progress of something that is waited for."""
        ...

    def close(self) -> None: ...


def view_for(console: Console, every: int) -> View:
    """The live picture when ``console`` is a terminal, plain lines when not."""
    return LiveView(console) if console.is_terminal else PlainView(console, every)


class PlainView:
    """One line per ``every`` epochs, and one per event."""

    def __init__(self, console: Console, every: int) -> None:
        self.console = console
        self.every = every
        self._epochs = 0
        self._waited = ""

    def begin(self, title: str, epochs: int, done: int = 0) -> None:
        self._epochs = epochs
        self.say(f"{title}: {epochs} epochs" + (f", going on after {done}" if done else ""))

    def epoch(self, boundary: Boundary) -> None:
        figures = boundary.figures
        for line in news(boundary):
            self.say(f"epoch {figures.epoch + 1}: {line}")
        if figures.epoch % self.every == 0 or figures.epoch + 1 == self._epochs:
            self.say(f"epoch {figures.epoch + 1}/{self._epochs}: {summary(boundary)}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def waiting(self, what: str, done: int, of: int) -> None:
        line = f"{what}: {done} of {of}"
        if line != self._waited:
            self._waited = line
            self.say(line)

    def close(self) -> None:
        pass


class LiveView:
    """Progress, curves, slots and the latest decisions, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._title, self._epochs, self._done = "", 0, 0
        self._started = time.monotonic()
        self._losses: deque[float] = deque(maxlen=60)
        self._scores: deque[float] = deque(maxlen=60)
        self._news: deque[str] = deque(maxlen=8)
        self._last: Boundary | None = None
        self._wait: tuple[str, int, int] | None = None

    def begin(self, title: str, epochs: int, done: int = 0) -> None:
        self._stop()
        self._title, self._epochs, self._done = title, epochs, done
        self._started = time.monotonic()
        self._losses.clear()
        self._scores.clear()
        self._news.clear()
        self._last = self._wait = None
        self._draw()

    def epoch(self, boundary: Boundary) -> None:
        self._last, self._wait = boundary, None
        self._done = boundary.figures.epoch + 1
        self._losses.append(boundary.figures.train_loss)
        if boundary.figures.validation_accuracy is not None:
            self._scores.append(boundary.figures.validation_accuracy)
        self._news.extend(f"epoch {self._done}: {line}" for line in news(boundary))
        self._draw()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def waiting(self, what: str, done: int, of: int) -> None:
        if self._wait is None:
            self._stop()  # the picture of the phase before stays
        self._wait = (what, done, of)
        self._draw()

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(self._picture(), console=self.console, refresh_per_second=5)
            self._live.start()
        self._live.update(self._picture())

    def _picture(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        seconds = time.monotonic() - self._started
        if self._wait is not None:
            what, done, of = self._wait
            grid.add_row(Spinner("dots"), Text(what, style="bold"), _bar(done, of), Text(f"{done} of {of}"))
            return grid
        grid.add_row(
            Spinner("dots"),
            Text(self._title, style="bold"),
            _bar(self._done, self._epochs),
            Text(f"epoch {self._done}/{self._epochs}  {seconds:.0f} s"),
        )
        parts: list[RenderableType] = [grid]
        if self._last is not None:
            parts.append(self._curves(self._last.figures))
            if self._last.slots:
                parts.append(slots_table(self._last))
        parts.extend(Text(line, style="dim") for line in self._news)
        return Group(*parts)

    def _curves(self, figures: Figures) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_row("  loss    ", Text(sparkline(list(self._losses)), style="cyan"), f"{figures.train_loss:.4f}")
        if figures.validation_accuracy is not None:
            shown = Text(sparkline(list(self._scores)), style="green")
            grid.add_row("  accuracy", shown, f"{figures.validation_accuracy:.1%} validation")
        return grid


def _bar(done: int, of: int) -> ProgressBar:
    return ProgressBar(total=max(of, 1), completed=done, width=30)


def sparkline(values: Sequence[float]) -> str:
    """``values`` as a row of bars between their least and their largest; a blank where one is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(
        BARS[int((value - low) / span * (len(BARS) - 1))] if math.isfinite(value) else " " for value in values
    )


def slots_table(boundary: Boundary) -> Table:
    """Every slot that is not dormant, then the least healthy ones, ten at most."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("slot", "state", "alpha", "health", "kernel", "age"):
        table.add_column(column)
    ranked = sorted(
        boundary.slots, key=lambda row: (row.state is State.DORMANT, 1.0 if row.health is None else row.health)
    )
    for row in ranked[:10]:
        table.add_row(
            row.slot,
            Text(row.state.name, style=COLOURS[row.state]),
            f"{row.alpha:.2f}" if row.alpha else "",
            "–" if row.health is None else f"{row.health:.2f}",
            row.blueprint_name,
            str(row.age),
        )
    if len(ranked) > 10:
        table.add_row(f"and {len(ranked) - 10} more")
    return table


def summary(boundary: Boundary) -> str:
    """The figures of an epoch in a line."""
    figures = boundary.figures
    parts = [f"loss {figures.train_loss:.4f}"]
    if figures.validation_loss is not None:
        parts.append(f"validation loss {figures.validation_loss:.4f}")
    if figures.validation_accuracy is not None:
        parts.append(f"accuracy {figures.validation_accuracy:.1%}")
    parts.append(f"{figures.parameters} parameters")
    parts.append(f"{figures.train_seconds + figures.boundary_seconds:.2f} s")
    return ", ".join(parts)


def news(boundary: Boundary) -> list[str]:
    """What happened at an epoch's end, a line each: decisions with reasons, then state changes."""
    lines = decisions(boundary.signal) if boundary.signal else []
    lines += [f"refused {order}" for order in boundary.refused]
    lines += [transition(event) for event in boundary.events]
    lines += [carving(event) for event in boundary.carved]
    if boundary.rolled_back:
        lines.append("rolled back to the last good state")
    return lines


def decisions(signal: AdaptationSignal) -> list[str]:
    """Each action of a decision with its reasons."""
    return [
        f"{signal.policy_version[:16]}: {action.command.target.name} {action.command.slot}, "
        f"confidence {action.confidence:.2f}, because "
        + "; ".join(reason.detail or reason.code.name.lower().replace("_", " ") for reason in action.reasons)
        for action in signal.actions
    ]


def transition(event: SeedEvent) -> str:
    """A state change in a line."""
    kernel = f" [{event.blueprint_name}]" if event.blueprint_name else ""
    return f"{event.slot} {event.source.name} → {event.target.name}{kernel}" + (
        f": {event.reason}" if event.reason else ""
    )


def carving(event: CarveEvent) -> str:
    """What became of units in a line."""
    units = count(event.cuts)
    places = ", ".join(f"{len(cut.units)} of {cut.cluster}" for cut in event.cuts)
    freed = f", {event.parameters} parameters freed" if event.parameters else ""
    return f"{units} unit{'s' if units != 1 else ''} {event.state.name} ({places}{freed}): {event.reason}"
