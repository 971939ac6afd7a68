"""The other task presets, a few seeds each, offline: what growing brings where it was not tuned for the demo."""

from __future__ import annotations

from tests.bench.bench import Pace, Table
from tests.bench.trials import Trial, summary_row, train

PRESETS = ("spirals", "teacher", "digits-cnn", "tokens", "breast-cancer", "digits")
SEEDS = 3
GLANCE = ("breast-cancer",)


def run(pace: Pace) -> list[Table]:
    chosen = GLANCE if pace.quick else PRESETS
    seeds = tuple(range(1 if pace.quick else SEEDS))
    pace.say(f"{len(seeds)} seeds each of {', '.join(chosen)}")
    found = train([Trial(name, name, seeds) for name in chosen], per_process=1)
    return [
        Table(
            "Test accuracy, grown in library mode against ungrown",
            [summary_row(name, results) for name, results in found.items()],
            (
                "gain in points with the sd of the paired difference; with so few seeds an interval says little. digits and "
                "breast-cancer are wide enough: there, not growing is right.",
            ),
        )
    ]
