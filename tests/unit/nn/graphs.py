"""What a compiler is given, so that it can be counted and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

Operation = tuple[str, str, str]
Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Recorder:
    """A backend for ``torch.compile`` that keeps every graph it is given and then compiles it with another.

    Args:
        backend: what compiles; runs the graph as it is when None.
    """

    def __init__(self, backend: Compile | None = None) -> None:
        self.graphs: list[list[Operation]] = []
        self._backend = backend

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(operations(graph))
        return graph if self._backend is None else self._backend(graph, example_inputs)


def differentiated(recorder: Recorder) -> Any:
    """A backend that gives ``recorder`` what is left after differentiation: a forward graph and a backward one of primitive operations."""
    from functorch.compile import make_boxed_func

    def compile_(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(recorder(graph, example_inputs))  # type: ignore[no-any-return]

    return aot_autograd(fw_compiler=compile_)


def operations(graph: fx.GraphModule) -> list[Operation]:
    """Every node in order: its kind, what it does, and to what. Where a parameter is found in the model does not matter.

    Nodes are named by their place; an input is described by its shape, type and device.
    """
    places = {node: f"%{place}" for place, node in enumerate(graph.graph.nodes)}

    def told(value: Any) -> str:
        return str(fx.node.map_arg(value, lambda node: places[node]))

    found = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            found.append((node.op, "", _described(node.meta.get("example_value", node.meta.get("val")))))
        else:
            found.append((node.op, str(node.target), f"{told(node.args)} {told(node.kwargs)}"))
    return found


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{tuple(value.shape)} {value.dtype} {value.device} {value.requires_grad} {value.stride()}"


def fresh_compiler() -> None:
    """Forget everything that was compiled or counted before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
