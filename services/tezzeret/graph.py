"""A kernel as a graph of ATen operations: exported, compared with the eager module, and counted. In the child only.

The graph is a check and a record, not an artifact: what is kept of it is its digest and its number of operations, for
formats that hold whole graphs unpickle what they read. Two builds of one kernel on one toolchain have equal digests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from esper_core.blueprint.build import KernelModule
from esper_core.blueprint.refusal import Refusal
from esper_core.errors import Internal
from esper_core.ids import sha256


@dataclass(frozen=True)
class Graph:
    """What was found.

    Attributes:
        sha256: of the exported graph's canonical text.
        ops: ATen operations in it.
        joint_ops: ATen operations of forward and backward together.
        max_abs_diff: largest difference between eager module and exported graph: outputs and every gradient.
    """

    sha256: str
    ops: int
    joint_ops: int
    max_abs_diff: float


def ready() -> None:
    """Import what tracing needs, so that no build pays for it or is charged with its memory."""
    import torch._functorch.aot_autograd
    import torch.export  # noqa: F401


def examine(module: KernelModule, x: Tensor) -> Graph:
    """Export ``module`` for batches like ``x`` and compare.

    Raises:
        Refused: UNREACHABLE_GRADIENT, when the joint graph gives some weight no gradient.
        Internal: torch cannot export it.
    """
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    try:
        exported = torch.export.export(module, (x.detach(),), strict=False)
        both = joint(module, x) if not any(True for _ in module.buffers()) else None
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise Internal(f"{module.ir.name} cannot be exported: {reason}", hint="report the blueprint") from error
    if both is not None:
        _check_gradients(module, both)
    difference = max(
        float((a - b).abs().max())
        for a, b in zip(_trace(module, module, x), _trace(exported.module(), module, x), strict=True)
    )
    return Graph(
        sha256=sha256(canonical(exported.graph).encode()),
        ops=_ops(exported.graph.nodes),
        joint_ops=_ops(both.graph.nodes) if both is not None else 0,
        max_abs_diff=difference,
    )


def joint(module: KernelModule, x: Tensor, *, any_rows: bool = False) -> fx.GraphModule:
    """Forward and backward as one graph over (batch, parameters) and the output's gradient.

    Args:
        module: the kernel.
        x: an example batch.
        any_rows: whether the number of rows is a symbol instead of the example's.

    Raises:
        RuntimeError: torch cannot trace it.
    """
    from torch._functorch.aot_autograd import aot_export_joint_simple

    names = [name for name, _ in module.named_parameters()]

    def forward(entering: Tensor, *parameters: Tensor) -> tuple[Tensor]:
        leaving = functional_call(module, dict(zip(names, parameters, strict=True)), (entering,))
        return (leaving if module.ir.nodes[-1].op not in VIEWS else leaving.clone(),)

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *module.parameters())]
    if any_rows:
        leaves = _with_any_rows(leaves)
    traced = aot_export_joint_simple(forward, tuple(leaves), trace_joint=True)
    assert isinstance(traced, fx.GraphModule)  # noqa: S101 - what the name says
    return traced


def _with_any_rows(leaves: list[Tensor]) -> list[Tensor]:
    """Stand-ins without data; the first one's first size is a symbol."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    batch, *others = leaves
    sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (batch.dim() - 1)
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [
        mode.from_tensor(batch, symbolic_context=context),
        *(mode.from_tensor(tensor, static_shapes=True) for tensor in others),
    ]


VIEWS = frozenset({"attention", "linear", "match_output_size"})
"""Ops whose output may be a view of what they computed; the joint graph takes none."""


def canonical(graph: fx.Graph) -> str:
    """One line per node: what it does and to which nodes, by place; free of names, addresses and source positions."""
    place = {node: number for number, node in enumerate(graph.nodes)}

    def told(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{place[value]}"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(map(told, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {told(value[key])}' for key in sorted(value))}}}"
        return repr(value)

    def line(node: fx.Node) -> str:
        called = node.target if node.op == "call_function" else ""
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        return f"{node.op} {called} {told(node.args)} {told(dict(node.kwargs))} {shape}"

    return "\n".join(line(node) for node in graph.nodes)


def _ops(nodes: Iterable[fx.Node]) -> int:
    return sum(node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) for node in nodes)


def _check_gradients(module: KernelModule, both: fx.GraphModule) -> None:
    output: Any = next(node for node in both.graph.nodes if node.op == "output")
    _, _, *gradients = output.args[0]  # the output itself and the batch's gradient come first
    for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
        if gradient is None:
            hint = "take out what stops it, or the weight"
            raise Refusal.UNREACHABLE_GRADIENT.because(f"no gradient reaches weight {name}", hint=hint)


def _trace(run: Any, module: KernelModule, x: Tensor) -> list[Tensor]:
    """Outputs, and gradients at the input and every parameter, for one drawn gradient."""
    x = x.detach().clone().requires_grad_()
    weights = list(run.parameters())
    y = run(x)
    draw = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((y * draw).sum(), [x, *weights], allow_unused=True)
    named = dict(zip([name for name, _ in run.named_parameters()], found[1:], strict=True))
    ordered = [found[0], *(named[name] for name, _ in module.named_parameters())]
    return [y.detach(), *(gradient for gradient in ordered if gradient is not None)]
