"""torch.compile: whether a dormant host gives the compiler what the bare model gives it, and what a compiled step of it costs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from tests.bench.bench import Pace, Table
from tests.bench.device import settled
from tests.bench.dormant import families, wrapped
from tests.bench.figures import Row, interleaved, ratio_row
from tests.bench.nets import Family, adam, fresh, step_of
from tests.unit.nn.graphs import Recorder, differentiated, fresh_compiler

BACKEND = "inductor"


def run(pace: Pace) -> list[Table]:
    same, rows, against = [], [], []
    for family in families(pace, 1):
        pace.say(family.name)
        same.append(_compared(family))
        found = interleaved(_works(family), rounds=pace.rounds(60, 12), clock=family.clock)
        rows += [
            ratio_row(f"{family.name}: dormant", found["dormant"], found["bare"]),
            ratio_row(f"{family.name}: the bare model again", found["again"], found["bare"]),
        ]
        against.append(ratio_row(f"{family.name}: compiled / eager", found["bare"], found["eager"]))
    return [
        Table(
            "What the compiler is given: operations of the bare model and of the host with dormant slots",
            same,
            (
                "Captured: the graph Dynamo hands over. Forward, backward: after differentiation, in primitive operations. "
                "Equal: every operation with its arguments, in order, and every input's shape, type and layout.",
            ),
        ),
        Table(
            "Compiled training step of the host with dormant slots / of the compiled bare model",
            rows,
            (f"{BACKEND}; forward and backward compiled, the optimiser eager. 'again' is the noise floor.",),
        ),
        Table("What compiling brings the bare model at all", against),
    ]


def prepare_compiler() -> None:
    """Start from nothing compiled, and let nobody try for seconds what vector instructions there are."""
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    fresh_compiler()


def first_call(step: Callable[[], object], family: Family) -> float:
    """Wall seconds of a call after which all its work is done."""
    began = time.perf_counter()
    step()
    settled(family.device)
    return time.perf_counter() - began


def _compared(family: Family) -> Row:
    inputs, targets = family.rows(family.batch)
    found = []
    for module in (fresh(family), wrapped(family)):
        graphs = []
        for wrapped_backend in (_handed, differentiated):
            prepare_compiler()
            recorder = Recorder()
            compiled = torch.compile(module, backend=wrapped_backend(recorder))
            nn.functional.cross_entropy(compiled(inputs), targets).backward()
            graphs += recorder.graphs
        found.append(graphs)
    bare, dormant = found
    count: Callable[[int], str] = lambda place: f"{len(bare[place])} / {len(dormant[place])}"
    return {
        "what": family.name,
        "graphs": f"{len(bare)} / {len(dormant)}",
        "captured": count(0),
        "forward": count(1),
        "backward": count(2),
        "equal": "yes" if bare == dormant else "NO",
    }


def _handed(recorder: Recorder) -> Any:
    return recorder


def _works(family: Family) -> dict[str, Callable[[], None]]:
    batch = family.rows(family.batch)
    works = {}
    prepare_compiler()
    for name, module in (("bare", fresh(family)), ("again", fresh(family)), ("dormant", wrapped(family))):
        compiled: Any = torch.compile(module, backend=lookup_backend(BACKEND))
        works[name] = step_of(compiled, adam(module), batch)
        first_call(works[name], family)
    eager = fresh(family)
    return works | {"eager": step_of(eager, adam(eager), batch)}
