"""Spans chosen by name: two of the network's own, or any two modules between which a kernel could make a detour.

A pair of whole blocks, such as ("layer1.0", "layer1.1"), spans everything from what enters the first to what leaves the second. There is
no single layer to widen then, so a kernel over it stays beside the host instead of being folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.errors import InvalidInput, nearest
from esper_core.nn.trace import HostGraph, Span, quietly

_LAYOUTS = {2: Layout.FEATURES, 3: Layout.TOKENS, 4: Layout.IMAGE}


def choose(
    model: nn.Module, inputs: tuple[Any, ...], graph: HostGraph, pairs: Sequence[tuple[str, str]] | None
) -> tuple[Span, ...]:
    """The spans named by module path; all that were found when ``pairs`` is None.

    Raises:
        InvalidInput: when a module does not exist, or no tensor of one layout enters the first and leaves the second.
    """
    if pairs is None:
        return graph.spans
    found = {span.name: span for span in graph.spans}
    return tuple(found.get(f"{source}:{sink}") or _detour(model, inputs, graph, source, sink) for source, sink in pairs)


@dataclass
class _Visit:
    """What a module was given and gave back, in the order of calls."""

    calls: int = 0
    began: int = 0
    ended: int = 0
    entering: Any = None
    leaving: Any = None
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)


def _detour(model: nn.Module, inputs: tuple[Any, ...], graph: HostGraph, source: str, sink: str) -> Span:
    modules = dict(model.named_modules())
    for path in (source, sink):
        if not path or path not in modules:
            raise InvalidInput(f"the network has no module {path!r}", hint=nearest(path, filter(None, modules)))
    first, last = _visit(model, inputs, modules[source], modules[sink])
    name = f"({source!r}, {sink!r})"
    spans = ", ".join(span.name for span in graph.spans) or "none"
    if first.calls != 1 or last.calls != 1 or first.began > last.ended:
        raise InvalidInput(
            f"{name} is no span: each must run once, the first before the second ends", hint=f"found: {spans}"
        )
    interface = _interface(first.entering, last.leaving, last.entering)
    if interface is None:
        raise InvalidInput(f"{name} is no span: the layout changes on the way", hint=f"found: {spans}")
    return Span(
        source, sink, interface, obstacle="the span is between blocks, and no single layer of it could be widened"
    )


def _visit(model: nn.Module, inputs: tuple[Any, ...], source: nn.Module, sink: nn.Module) -> tuple[_Visit, _Visit]:
    """Run once and watch both modules."""
    clock = iter(range(1 << 30))
    visits = (_Visit(), _Visit())

    def watch(visit: _Visit, module: nn.Module) -> None:
        def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
            visit.calls, visit.began, visit.entering = visit.calls + 1, next(clock), args[0] if args else None

        def end(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            visit.ended, visit.leaving = next(clock), output

        visit.hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    watch(visits[0], source)
    watch(visits[1], sink)
    try:
        with quietly(model):
            model(*inputs)
    finally:
        for hook in (*visits[0].hooks, *visits[1].hooks):
            hook.remove()
    return visits


def _interface(entering: Any, leaving: Any, inner: Any) -> SlotInterface | None:
    tensors = (entering, leaving, inner)
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        return None
    if not entering.ndim == leaving.ndim == inner.ndim or entering.ndim not in _LAYOUTS:
        return None
    layout = _LAYOUTS[entering.ndim]
    if layout is Layout.IMAGE:
        return SlotInterface(
            layout=layout,
            in_width=entering.shape[1],
            out_width=leaving.shape[1],
            hidden_width=inner.shape[1],
            in_size=tuple(entering.shape[2:]),
            out_size=tuple(leaving.shape[2:]),
        )
    if entering.shape[:-1] != leaving.shape[:-1] or inner.shape[:-1] != leaving.shape[:-1]:
        return None
    widths = {"in_width": entering.shape[-1], "out_width": leaving.shape[-1], "hidden_width": inner.shape[-1]}
    return SlotInterface(layout=layout, **widths)
