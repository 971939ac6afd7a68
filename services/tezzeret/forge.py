"""The forge itself, in a child process: blueprint, interface and seed in, a safetensors blob and figures out.

The artifact is the same whatever the pipeline: the blueprint in the manifest and the initial weights as safetensors. ``fast``
stops there, after comparing what was built with what the artifact gives; the others also export the graph and compare
that (:mod:`services.tezzeret.graph`). What ``aggressive`` compiles besides is :mod:`services.tezzeret.native`'s.

``python -m services.tezzeret.forge`` speaks the protocol of ``services.sandbox``, which also says what it does not
protect against. Knows no key, no network and no database: the parent signs and stores.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper_core.blueprint.build import KernelModule, build, example_input
from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.errors import Internal
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.pack import load, pack
from services.sandbox import Job, peak_memory, serve
from services.tezzeret.graph import examine, ready
from services.tezzeret.toolchain import COMPILER, here

PARITY_ROWS = 4
GRAPH_LIMIT = 1e-5
"""The exported graph runs the same operations; room for one that a platform carries out in another order."""
PARITY_LIMIT = 1e-6
"""The module rebuilt from the artifact may differ by this much; on one machine it does not differ at all."""


def forge(job: Job) -> Job:
    """Build one kernel and write its blob to ``job["blob"]``.

    Args:
        job: ``blueprint``, ``interface``, ``symbols``, ``pipeline``, ``seed`` and ``blob``, the path to write to.

    Returns:
        ``{"manifest": …}``, complete but for a signature.

    Raises:
        Refused: the blueprint does not fit, is too large, or leaves a weight without gradient.
        Internal: what was rebuilt from the artifact, or the exported graph, does not compute what was built.
    """
    if job["pipeline"] != "fast":
        ready()
    started = time.perf_counter()
    ir = BlueprintIR.model_validate(job["blueprint"])
    interface = SlotInterface.model_validate(job["interface"])
    with peak_memory() as peak:
        module = build(ir, interface, job["symbols"], job["seed"])
        blob = pack(module.state_dict())
        papers = {"symbols": job["symbols"], "seed": job["seed"], "pipeline": job["pipeline"]}
        draft = KernelManifest.describe(ir, interface, blob, Provenance(), **papers)
        difference = parity(module, load(blob, draft), interface)
    if not difference <= PARITY_LIMIT:  # also catches NaN
        raise Internal(f"rebuilt from its artifact, {ir.name} differs by {difference:.3g}", hint="report the blueprint")
    graph = {} if job["pipeline"] == "fast" else _graph(module, interface)
    provenance = Provenance(
        compiler=COMPILER,
        toolchain=dict(here().versions),
        target=here().target,
        build_seconds=time.perf_counter() - started,
        peak_memory_bytes=peak[0],
        parity_max_abs_diff=difference,
        **graph,
    )
    Path(job["blob"]).write_bytes(blob)
    return {"manifest": KernelManifest.describe(ir, interface, blob, provenance, **papers).model_dump(mode="json")}


def _graph(module: KernelModule, interface: SlotInterface) -> dict[str, Any]:
    found = examine(module, example_input(interface, PARITY_ROWS, seed=0))
    if not found.max_abs_diff <= GRAPH_LIMIT:  # also catches NaN
        message = f"exported as a graph, {module.ir.name} differs by {found.max_abs_diff:.3g}"
        raise Internal(message, hint="report the blueprint")
    return {
        "graph_sha256": found.sha256,
        "graph_ops": found.ops,
        "joint_ops": found.joint_ops,
        "graph_max_abs_diff": found.max_abs_diff,
    }


def parity(built: KernelModule, rebuilt: KernelModule, interface: SlotInterface) -> float:
    """Largest absolute difference between two modules: outputs, input and parameter gradients, and the parameters."""
    x = example_input(interface, PARITY_ROWS, seed=0)
    pairs = zip(_trace(built, x), _trace(rebuilt, x), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def _trace(module: KernelModule, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()
    parameters = list(module.parameters())
    gradients = [leaf.grad for leaf in (x, *parameters) if leaf.grad is not None]
    return [y.detach(), *gradients, *(parameter.detach() for parameter in parameters)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"forge": forge})
