"""A compiled host through a graft's life: blended, ten alphas, out again. How often it is compiled, and how long that holds it up."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from tests.bench.bench import Pace, Table
from tests.bench.compiled import BACKEND, first_call, prepare_compiler
from tests.bench.dormant import families
from tests.bench.figures import Row, Sample
from tests.bench.graft import grown
from tests.bench.nets import Family, step_of
from tests.unit.nn.graphs import Recorder

ALPHAS = tuple(step / 10 for step in range(1, 11))
STEPS = 5
"""Training steps at each alpha."""


def run(pace: Pace) -> list[Table]:
    counted, paused = [], []
    for family in families(pace, 1):
        pace.say(family.name)
        counts, pauses = _lived(family)
        counted.append(counts)
        paused += pauses
    return [
        Table(
            "Compilations of a host through a graft's life",
            counted,
            (
                f"Graphs compiled by {BACKEND} from one stage to the next; {len(ALPHAS)} alphas, {STEPS} training steps each. "
                "Breaks: places where a graph had to be split.",
            ),
        ),
        Table(
            "How long the first step takes after a change",
            paused,
            (
                "Wall clock. After blending the host is compiled anew, or found in the compiler's cache on disk where the same "
                "graph was compiled before on this machine; after an alpha nothing is.",
            ),
        ),
    ]


def _lived(family: Family) -> tuple[Row, list[Row]]:
    host, optimizer, _ = grown(family)
    graft = host.slots[family.slot_name].graft
    assert graft is not None
    graft.detach()
    graft.alpha.fill_(0.0)
    prepare_compiler()
    recorder = Recorder(lookup_backend(BACKEND))
    compiled: Any = torch.compile(host, backend=recorder)
    step = step_of(compiled, optimizer, family.rows(family.batch))
    counts: Row = {"what": family.name}

    def stage(name: str, seconds: float) -> Row:
        before = sum(value for value in counts.values() if isinstance(value, int))
        counts[name] = len(recorder.graphs) - before
        return Sample((seconds,)).row(f"{family.name}: {name}", "ms", 1e3)

    rows = [stage("dormant", first_call(step, family))]
    usual = [first_call(step, family) for _ in range(4 * STEPS)]
    graft.attach()
    rows.append(stage("blended", first_call(step, family)))
    first = []
    for alpha in ALPHAS:
        graft.alpha.fill_(alpha)
        first.append(first_call(step, family))
        for _ in range(STEPS - 1):
            step()
    stage("ten alphas", 0.0)
    rows.append(Sample(tuple(first)).row(f"{family.name}: an alpha", "ms", 1e3))
    usual_blended = [first_call(step, family) for _ in range(4 * STEPS)]
    graft.detach()
    rows.append(stage("out again", first_call(step, family)))
    rows.append(Sample(tuple(usual)).row(f"{family.name}: no change, dormant", "ms", 1e3))
    rows.append(Sample(tuple(usual_blended)).row(f"{family.name}: no change, blended", "ms", 1e3))
    counts["breaks"] = sum(counters["graph_break"].values())
    counts["alpha / no change"] = statistics.median(first) / statistics.median(usual_blended)
    return counts, rows
