"""Urabrask's bench for kernels of both kinds: real artifacts, and those modules that only code could bring.

``python -m tests.corpus.child`` does what ``python -m services.urabrask.bench`` does; a manifest whose pipeline is the
name of a class in ``tests.corpus.modules`` stands for that class. It dies of whatever that raises, like any child.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from esper_core.kernel.manifest import KernelManifest
from esper_core.nn.lessons import Mark
from services.sandbox import Job, serve
from services.urabrask.bench import Found, from_artifact, settle, works
from tests.corpus.modules import FAULTS, Adapter

_ALL: tuple[type[nn.Module], ...] = (Adapter, *FAULTS)
CLASSES = {cls.__name__: cls for cls in _ALL}


def fresh(cls: type[Adapter]) -> nn.Module:
    """A new one, with the same weights every time."""
    torch.manual_seed(0)
    return cls()


def find(job: Job) -> Found[nn.Module]:
    manifest = KernelManifest.model_validate(job["manifest"])
    cls = CLASSES.get(manifest.pipeline)
    return from_artifact(job) if cls is None else (manifest, lambda: fresh(cls), 64)


def teach(_: Callable[[], nn.Module]) -> list[Mark]:
    """No lessons: they take longer than all the rest, and no verdict depends on them."""
    return []


if __name__ == "__main__":
    settle()
    serve(works(find, teach))
