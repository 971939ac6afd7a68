"""A network called the way its trainer calls it (arguments by name, an output object), seen as growing sees one: tensors in, one out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from esper_core.errors import InvalidInput, nearest
from esper_core.nn.host import Host, wrap
from esper_core.nn.trace import HostGraph, Span, quietly

Call = Callable[..., Any]
"""(network, *inputs) → outputs. A plain function: the network is copied together with how it is called."""


def plainly(model: nn.Module, *inputs: Any) -> Any:
    """The inputs in their order, the output as it is."""
    return model(*inputs)


class CalledHost(Host):
    """A host whose forward is ``call``; slots, parameters and ``state_dict`` are named as in the network itself."""

    def __init__(self, model: nn.Module, graph: HostGraph, spans: Sequence[Span], call: Call) -> None:
        super().__init__(model, graph, spans)
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.model, *args, **kwargs)


def host_of(
    model: nn.Module, inputs: Any, call: Call, within: str = "", spans: Sequence[tuple[str, str]] | None = None
) -> CalledHost:
    """Find the places where ``model`` can grow.

    Args:
        inputs: one batch, a tensor or a tuple.
        within: path of the submodule that is traced and grown, where the whole cannot be traced; the whole when empty.
        spans: (source, sink) paths from ``model``; every span found when None.

    Raises:
        InvalidInput: when the inputs do not fit, or a named module does not exist or does not run.
        Unsupported: when the forward cannot be traced.
    """
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    part, call_part = model, call
    if within:
        part = _submodule(model, within)
        args, call_part = _as_it_runs(model, part, args, call, within)
    pairs = None if spans is None else [(_inside(a, within), _inside(b, within)) for a, b in spans]
    found = wrap(_Called(part, call_part), args, pairs)
    prefix = f"{within}." if within else ""

    def renamed(path: str) -> str:
        return prefix + path.removeprefix("model.") if path else ""

    def moved(span: Span) -> Span:
        return replace(span, source=renamed(span.source), sink=renamed(span.sink), norm=renamed(span.norm))

    modules = tuple(renamed(path) for path in found.graph.modules)
    graph = HostGraph(modules, found.graph.edges, tuple(moved(span) for span in found.graph.spans))
    return CalledHost(model, graph, [moved(slot.span) for slot in found.slots.values()], call)


class _Called(nn.Module):
    """What is traced: a network and how it is called."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(self.model, *args)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path not in modules:
        raise InvalidInput(f"the network has no module {path!r}", hint=nearest(path, filter(None, modules)))
    return modules[path]


def _inside(path: str, within: str) -> str:
    """A path from the network as one from what is traced."""
    if within and not path.startswith(f"{within}."):
        raise InvalidInput(f"{path!r} is not inside {within!r}", hint="name spans of the part that is traced")
    return "model." + (path.removeprefix(f"{within}.") if within else path)


def _as_it_runs(
    model: nn.Module, part: nn.Module, args: tuple[Any, ...], call: Call, path: str
) -> tuple[tuple[Any, ...], Call]:
    """The part's own arguments in one run of the whole, all in a tuple, and how to call it with that."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = part.register_forward_pre_hook(lambda _module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with quietly(model):
            call(model, *args)
    finally:
        hook.remove()
    if not seen:
        raise InvalidInput(f"{path!r} does not run when the network does", hint="name a module that the forward calls")
    ordered, named = seen[0]
    names = tuple(named)

    def call_part(part: nn.Module, *inputs: Any) -> Any:
        return part(*inputs[: len(ordered)], **dict(zip(names, inputs[len(ordered) :], strict=True)))

    return (*ordered, *named.values()), call_part
