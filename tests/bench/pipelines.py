"""The forge's three pipelines side by side: what each build costs, and what the kernel that comes of it does."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from esper_core.blueprint.build import example_input
from esper_core.blueprint.catalogue import candidates
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.kernel.manifest import KernelManifest, NativeFigures
from esper_core.kernel.pack import load
from services.sandbox import Job
from services.tezzeret import graph
from services.tezzeret.forge import forge
from services.tezzeret.native import PAYS, compile_native
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row

ROWS = 64
WIDTH = 16
REPETITIONS = 5
_CONV = {"kernel_h": 3, "kernel_w": 3, "padding_h": 1, "padding_w": 1}
SLOTS = (
    SlotInterface(layout=Layout.FEATURES, in_width=64, out_width=64, hidden_width=64, activation="relu", foldable=True),
    SlotInterface(
        layout=Layout.TOKENS, in_width=64, out_width=64, hidden_width=256, in_size=(16,), out_size=(16,), activation="gelu"
    ),
    SlotInterface(
        layout=Layout.IMAGE, in_width=16, out_width=16, hidden_width=16, in_size=(16, 16), out_size=(16, 16),
        activation="relu", source=_CONV, sink=_CONV,
    ),
)  # fmt: skip


def run(pace: Pace) -> list[Table]:
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    torch.set_num_threads(1)
    graph.ready()
    builds, kernels = [], []
    with tempfile.TemporaryDirectory(prefix="esper-bench-pipelines-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"
        for slot in SLOTS:
            fitting = candidates(slot, [WIDTH])
            for name, ir, symbols in fitting[: 1 if pace.quick else None]:
                what = f"{slot.layout.name.lower()} {name}"
                pace.say(what)
                job = {
                    "blueprint": ir.model_dump(mode="json"),
                    "interface": slot.model_dump(mode="json"),
                    "symbols": symbols,
                    "seed": 1,
                    "rows": ROWS,
                    "blob": f"{folder}/blob",
                    "native": f"{folder}/native",
                }
                build, kernel = _case(what, job, slot)
                builds.append(build)
                kernels.append(kernel)
    shipped = sum(bool(row["shipped"]) for row in kernels)
    return [
        Table(
            "Seconds to build, by pipeline",
            builds,
            (
                f"Catalogue designs of width {WIDTH} on three slots. fast: built, packed, rebuilt and compared; standard: also exported "
                f"as a graph and compared; aggressive: also compiled, compared and timed. Medians of {REPETITIONS}; compiling once. "
                "One thread, wall clock, compiler imported and its headers precompiled by the first.",
            ),
        ),
        Table(
            f"The kernel, eager and native, {ROWS} rows",
            kernels,
            (
                "Ratios are native over eager in processor seconds, medians of interleaved rounds; 'first call' is the first forward "
                f"and backward pass after loading. Shipped where a step takes less than {PAYS} of an eager one: {shipped} of "
                f"{len(kernels)}. fast and standard give the eager kernel.",
            ),
        ),
    ]


def _case(what: str, job: Job, slot: SlotInterface) -> tuple[Row, Row]:
    seconds: dict[str, float] = {}
    for pipeline in ("fast", "standard"):
        taken = []
        for _ in range(REPETITIONS):
            began = time.perf_counter()
            answer = forge({**job, "pipeline": pipeline})
            taken.append(time.perf_counter() - began)
        seconds[pipeline] = statistics.median(taken)
    manifest = KernelManifest.model_validate(answer["manifest"])
    began = time.perf_counter()
    figures = NativeFigures.model_validate(compile_native(job)["figures"])
    compiling = time.perf_counter() - began
    blob = Path(job["blob"]).read_bytes()
    loading, first = _eager(blob, manifest, slot)
    made = manifest.provenance
    build: Row = {
        "kernel": what,
        "fast s": seconds["fast"],
        "standard s": seconds["standard"],
        "aggressive s": seconds["standard"] + compiling,
        "graph ops": made.graph_ops,
        "joint ops": made.joint_ops,
        "graph diff": made.graph_max_abs_diff,
    }
    compiled = figures.repetitions > 0
    kernel: dict[str, Any] = {
        "kernel": what,
        "n": figures.repetitions,
        "forward": figures.forward_ratio if compiled else None,
        "step": figures.step_ratio if compiled else None,
        "load ms": figures.load_seconds * 1e3 if compiled else None,
        "eager load ms": loading * 1e3,
        "first call ms": figures.first_call_seconds * 1e3 if compiled else None,
        "eager first call ms": first * 1e3,
        "parity": figures.parity if compiled else None,
        "shipped": "yes" if figures.shipped else "",
        "why not": figures.reason,
    }
    return build, kernel


def _eager(blob: bytes, manifest: KernelManifest, slot: SlotInterface) -> tuple[float, float]:
    """Seconds to load the artifact, and of its first forward and backward pass."""
    loads, firsts = [], []
    x = example_input(slot, ROWS, seed=1)
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        module = load(blob, manifest)
        loaded = time.perf_counter()
        module(x).sum().backward()
        firsts.append(time.perf_counter() - loaded)
        loads.append(loaded - began)
    return statistics.median(loads), statistics.median(firsts)
