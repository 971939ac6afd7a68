"""Every bench by name, in the order in which `make bench` runs them. Bench modules are imported when they run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from tests.bench.bench import Bench, Pace, Table

ABOUT = {
    "dormant": "a training step of the wrapped host, slots dormant or a seed in TRAINING, against the bare model",
    "compiled": "a compiled training step of the dormant host against the compiled bare model, and both graphs",
    "ramp": "a compiled host through a graft's life: compilations, and how long each change holds it up",
    "swap": "how long training stands still at the boundaries of a graft's life, binding to folding",
    "cache": "a kernel at hand and not at hand, and binding it to a slot",
    "telemetry": "an epoch boundary that measures nothing, with 1 to 10,000 slots",
    "boundary": "one measuring epoch boundary in training steps, and its share of training at the defaults",
    "graft": "a training step with a blended kernel, and after folding against a natively wider network",
    "decide": "Tamiyo.Step over mutual TLS with 1 to 200 slots, and the policy alone",
    "stream": "kernels to and from the library: throughput of 16 MiB, latency of a small one",
    "library": "finding kernels among a million: p50 and p99 of every shape of question, index plans, and right answers",
    "bus": "outbox to JetStream to inbox: events per second and end-to-end latency",
    "forge": "builds and evaluations per minute, and what they cost a training run next door",
    "karn": "designs that Karn finds against random search and against itself without its surrogate, at equal budgets (minutes)",
    "judge": "Urabrask's verdicts: what is rejected and why, how far figures repeat, seconds per verdict",
    "pipelines": "the forge's three pipelines over the catalogue: builds, loads, and native against eager (compiles: minutes)",
    "stack": "`up` cold and warm, and healing after kill -9 of each child",
    "seeds": "the demo over many seeds, its healthy twin, and a static network of the grown shape",
    "carve": "what carving frees and costs, against the run uncarved and a network as small from the start (minutes)",
    "presets": "every other task preset, a few seeds each (minutes: only when named)",
}
SLOW = ("presets", "karn", "compiled", "ramp", "library", "carve", "judge", "pipelines")
USUAL = tuple(name for name in ABOUT if name not in SLOW)
"""What runs when nothing is named, within six minutes on two free cores."""
GROUPS = {
    "exec": ("dormant", "compiled", "ramp", "swap", "cache", "telemetry", "boundary", "graft", "forge"),
}
"""Names that stand for several benches: ``exec`` is what the execution layer costs."""
ANY_DEVICE = frozenset(GROUPS["exec"])
"""Benches that run on a GPU as well."""


def expanded(names: Sequence[str]) -> list[str]:
    """The benches that ``names`` stand for, each once; unknown names as they are."""
    return list(dict.fromkeys(name for given in names for name in GROUPS.get(given, (given,))))


def bench(name: str) -> Bench:
    """The bench of that name."""

    def run(pace: Pace) -> list[Table]:
        found: list[Table] = importlib.import_module(f"tests.bench.{name}").run(pace)
        return found

    return Bench(name, ABOUT[name], run)
