"""The bench, in a child process: a kernel's papers and bytes in, findings and figures out.

``python -m services.urabrask.bench`` speaks the protocol of ``services.sandbox``, which also says what it does not
protect against. What is wrong with a kernel is an answer (``unfit``), not an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.build import KernelModule
from esper_core.errors import Corrupt, InvalidInput
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.pack import load
from esper_core.kernel.record import Lesson
from esper_core.nn.lessons import study
from services.sandbox import Job, serve
from services.urabrask.measure import batch_for, measure
from services.urabrask.safety import ROWS, Unfit, check


def safety(job: Job) -> Job:
    """The safety phase on the kernel in ``job["manifest"]`` and the file ``job["blob"]``."""
    try:
        manifest, make, batch = _kernel(job)
        check(make, manifest.interface, min(ROWS, batch))
    except Unfit as finding:
        return {"unfit": str(finding)}
    return {}


def benchmark(job: Job) -> Job:
    """The benchmark phase, likewise."""
    try:
        manifest, make, batch = _kernel(job)
        found = measure(make, manifest.interface, batch)
        lessons = tuple(Lesson(**asdict(mark)) for mark in study(make))
    except Unfit as finding:
        return {"unfit": str(finding)}
    return {"measurement": found.model_copy(update={"lessons": lessons}).model_dump(mode="json")}


def _kernel(job: Job) -> tuple[KernelManifest, Callable[[], KernelModule], int]:
    manifest = KernelManifest.model_validate(job["manifest"])
    blob = Path(job["blob"]).read_bytes()
    try:
        load(blob, manifest)
        analysis = analyse(manifest.blueprint, manifest.interface, manifest.symbols)
    except (Corrupt, InvalidInput) as error:
        raise Unfit(error.message) from None
    return manifest, lambda: load(blob, manifest), batch_for(analysis.activation_elements)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"safety": safety, "benchmark": benchmark})
