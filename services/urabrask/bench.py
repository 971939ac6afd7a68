"""The bench, in a child process: a kernel's papers and bytes in, findings and figures out.

``python -m services.urabrask.bench`` speaks the protocol of ``services.sandbox``, which also says what it does not
protect against. What is wrong with a kernel is an answer (``unfit`` and ``reason``), not an error.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.build import KernelModule
from esper_core.errors import Corrupt, InvalidInput
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.pack import finite, load
from esper_core.kernel.record import Lesson, RejectionReason
from esper_core.nn.lessons import Mark, study
from services.sandbox import Job, Work, serve
from services.urabrask.finding import Unfit
from services.urabrask.measure import batch_for, measure
from services.urabrask.safety import ROWS, check

M = TypeVar("M", bound=nn.Module)
Found = tuple[KernelManifest, Callable[[], M], int]
"""What a job is about: the papers, how to make the kernel, and how many rows to run it with."""


def works(find: Callable[[Job], Found[M]], teach: Callable[[Callable[[], M]], list[Mark]]) -> dict[str, Work]:
    """The two phases by name, on what ``find`` makes of a job; ``teach`` gives what is fit its lessons."""

    def safety(job: Job) -> Job:
        manifest, make, batch = find(job)
        check(make, manifest.interface, min(ROWS, batch))
        return {}

    def benchmark(job: Job) -> Job:
        manifest, make, batch = find(job)
        found = measure(make, manifest, batch)
        lessons = tuple(Lesson(**asdict(mark)) for mark in teach(make))
        found = found.model_copy(update={"lessons": lessons})
        return {"measurement": found.model_dump(mode="json")}

    return {work.__name__: _answering(work) for work in (safety, benchmark)}


def from_artifact(job: Job) -> Found[KernelModule]:
    """The kernel in ``job["manifest"]`` and the file ``job["blob"]``.

    Raises:
        Unfit: ARTIFACT, WEIGHTS_NOT_FINITE or MANIFEST: they do not fit together.
    """
    manifest = KernelManifest.model_validate(job["manifest"])
    blob = Path(job["blob"]).read_bytes()
    try:
        load(blob, manifest)
        analysis = analyse(manifest.blueprint, manifest.interface, manifest.symbols)
    except Corrupt as error:
        raise Unfit(
            RejectionReason.ARTIFACT if finite(blob) else RejectionReason.WEIGHTS_NOT_FINITE, error.message
        ) from None
    except InvalidInput as error:
        raise Unfit(RejectionReason.MANIFEST, error.message) from None
    return manifest, lambda: load(blob, manifest), batch_for(analysis.activation_elements)


def _answering(work: Work) -> Work:
    def answer(job: Job) -> Job:
        try:
            return work(job)
        except Unfit as finding:
            return {"unfit": finding.message, "reason": finding.reason.name}

    return answer


def settle() -> None:
    """Whatever is done once in a child, before its first job: neither its time nor its memory is then any kernel's."""
    torch.set_num_threads(1)
    with FlopCounterMode(display=False):  # the first operation counted imports the compiler, which takes a second
        torch.zeros(1, 1).mm(torch.zeros(1, 1))
    gc.freeze()  # what was imported never becomes garbage; looking for leaks need not count it each time


if __name__ == "__main__":
    settle()
    serve(works(from_artifact, study))
