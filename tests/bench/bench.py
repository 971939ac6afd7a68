"""A bench, what it is given, and what it gives back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.bench.figures import Row
from tests.bench.ground import Ground


@dataclass(frozen=True)
class Table:
    """Figures of one kind.

    Attributes:
        title: what was measured.
        rows: lines with equal keys, in order.
        notes: what a reader must know to read them rightly.
    """

    title: str
    rows: list[Row]
    notes: tuple[str, ...] = ()


@dataclass
class Pace:
    """How thorough to be, and what benches share.

    Attributes:
        quick: a glance rather than a measurement.
        seeds: how many seeds the growing benches train.
        platform: whether seeds also go through the platform.
        ground: the real servers, started when first asked for.
        device: where hosts live, ``cpu`` or ``cuda``.
    """

    quick: bool
    seeds: int
    platform: bool
    ground: Ground
    device: str = "cpu"

    def rounds(self, full: int, quick: int) -> int:
        """How often."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Progress, for a person who waits."""
        print(f"  {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Bench:
    """One thing to measure.

    Attributes:
        name: as on the command line.
        about: one line.
        run: measures it.
    """

    name: str
    about: str
    run: Callable[[Pace], list[Table]]


@dataclass
class Outcome:
    """What a bench brought: tables, or the reason why not."""

    bench: Bench
    seconds: float
    tables: list[Table] = field(default_factory=list)
    failed: str = ""
