"""Where a network can grow: its data-flow graph, and the spans in it that a kernel can bridge.

The graph comes from ``torch.export`` run on example inputs, so any module whose forward exports is understood, however it is
written; parameters tell which module a node belongs to. Nothing of the export is executed in training: the eager module stays
as it is.

A *span* is a pair (source, sink) of linear or convolutional modules where all that the source computes flows, through operations
that no one else listens to, into the sink. A kernel over it reads what enters the source and adds to what leaves the sink.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper_core.blueprint.interface import ConvGeometry, Layout, SlotInterface
from esper_core.errors import InvalidInput, Unsupported

Growable = nn.Linear | nn.Conv2d

_ACTIVATIONS = {
    "aten.relu.default": "relu",
    "aten.relu_.default": "relu",
    "aten.silu.default": "silu",
    "aten.silu_.default": "silu",
    "aten.tanh.default": "tanh",
    "aten.sigmoid.default": "sigmoid",
}
_LAYERS = {"aten.linear.default", "aten.conv2d.default", "aten.conv2d.padding"}
_NEUTRAL = {"aten.alias.default", "aten.contiguous.default", "aten.clone.default", "aten.detach.default"}


@dataclass(frozen=True)
class Span:
    """A place for a slot: module paths of source and sink, and what a kernel would meet there."""

    source: str
    sink: str
    interface: SlotInterface

    @property
    def name(self) -> str:
        return f"{self.source}:{self.sink}"


@dataclass(frozen=True)
class HostGraph:
    """The host as a controller sees it.

    Attributes:
        modules: paths of the linear and convolutional modules in execution order.
        edges: (source, target) indices into ``modules``: what flows where, through anything in between.
        spans: the places for slots, in execution order.
    """

    modules: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]


def trace(model: nn.Module, inputs: tuple[Any, ...]) -> HostGraph:
    """Read the data flow of ``model`` off one example batch; changes neither the model nor any random state.

    Raises:
        InvalidInput: when the example does not fit the model.
        Unsupported: when the forward cannot be exported (data-dependent control flow, for one).
    """
    _try_out(model, inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            exported = torch.export.export(model, inputs, strict=False)
    except (RuntimeError, TypeError, ValueError, AttributeError) as problem:
        raise Unsupported(
            f"{type(model).__name__} cannot be traced: {_first_line(problem)}",
            hint="wrap a submodule whose forward has no data-dependent control flow",
        ) from problem
    return _Reader(model, exported).read()


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; modes and random state as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _try_out(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """One plain forward pass: a misfit shows here with the model's own words."""
    try:
        with quietly(model):
            model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        raise InvalidInput(
            f"the example inputs do not fit {type(model).__name__}: {_first_line(problem)}",
            hint="pass a batch shaped as in training, e.g. esper.wrap(model, next(iter(loader))[0])",
        ) from problem


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


class _Reader:
    """Turns an exported program into modules, edges and spans."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram) -> None:
        self.modules = dict(model.named_modules())
        parameters = exported.graph_signature.inputs_to_parameters
        aliases = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        named = dict(model.named_parameters(remove_duplicate=False))
        self.nodes = list(exported.graph.nodes)
        owner: dict[torch.fx.Node, str] = {}
        for node in self.nodes:
            if str(node.target) not in _LAYERS:
                continue
            weight = parameters.get(getattr(node.args[1], "name", ""), "")
            path, _, leaf = aliases.get(id(named.get(weight)), weight).rpartition(".")
            if leaf == "weight" and isinstance(self.modules.get(path), Growable):
                owner[node] = path
        # A module that is called twice, or whose weight is shared, has no single place in the flow.
        calls = Counter(owner.values())
        self.owner = {node: path for node, path in owner.items() if calls[path] == 1}

    def read(self) -> HostGraph:
        order = tuple(self.owner.values())
        index = {path: position for position, path in enumerate(order)}
        edges: set[tuple[int, int]] = set()
        reach: dict[torch.fx.Node, frozenset[int]] = {}
        for node in self.nodes:
            sources = frozenset[int]().union(*(reach[parent] for parent in node.all_input_nodes))
            if node in self.owner:
                me = index[self.owner[node]]
                edges |= {(source, me) for source in sources}
                sources = frozenset({me})
            reach[node] = sources
        spans = [span for node in self.owner if (span := self._span(node)) is not None]
        return HostGraph(order, tuple(sorted(edges)), tuple(spans))

    def _span(self, source: torch.fx.Node) -> Span | None:
        """Follow the only listener of each node until a growable module; None when there is none."""
        between: list[torch.fx.Node] = []
        node = source
        while True:
            listeners = [user for user in node.users if user.op == "call_function"]
            if len(listeners) != 1 or len(node.users) != 1:
                return None
            node = listeners[0]
            if node in self.owner:
                break
            if node.target is operator.getitem or len(_tensor_inputs(node)) != 1:
                return None
            between.append(node)
        interface = self._interface(source, node, between)
        return None if interface is None else Span(self.owner[source], self.owner[node], interface)

    def _interface(
        self, source: torch.fx.Node, sink: torch.fx.Node, between: list[torch.fx.Node]
    ) -> SlotInterface | None:
        entering, leaving = _shape(source.args[0]), _shape(sink)
        first, last = self.modules[self.owner[source]], self.modules[self.owner[sink]]
        activation, clean = _between(between)
        if isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d) and len(entering) == len(leaving) == 4:
            foldable = clean and all(_plain(conv) for conv in (first, last)) and _biased(first, last)
            return SlotInterface(
                layout=Layout.IMAGE,
                in_width=entering[1],
                out_width=leaving[1],
                hidden_width=first.out_channels,
                in_size=entering[2:],
                out_size=leaving[2:],
                activation=activation,
                source=_geometry(first),
                sink=_geometry(last),
                foldable=foldable,
            )
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and len(entering) == len(leaving):
            layout = {2: Layout.FEATURES, 3: Layout.TOKENS}.get(len(entering))
            if layout is None or entering[:-1] != leaving[:-1]:
                return None
            return SlotInterface(
                layout=layout,
                in_width=entering[-1],
                out_width=leaving[-1],
                hidden_width=first.out_features,
                activation=activation,
                foldable=clean and _biased(first, last),
            )
        return None


def _tensor_inputs(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Inputs that are activations rather than parameters or buffers."""
    return [parent for parent in node.all_input_nodes if parent.op != "placeholder"]


def _between(nodes: list[torch.fx.Node]) -> tuple[str, bool]:
    """(name of the single elementwise activation, whether there is nothing else); ("", False) when unclear."""
    names: list[str] = []
    for node in nodes:
        target = str(node.target)
        if target in _ACTIVATIONS:
            names.append(_ACTIVATIONS[target])
        elif target == "aten.gelu.default":
            names.append("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")
        elif target == "aten.leaky_relu.default" and len(node.args) == 1:  # the default slope, 0.01
            names.append("leaky_relu")
        elif target == "aten.dropout.default" and node.args[1] == 0.0:
            continue
        elif target not in _NEUTRAL:
            return "", False
    if len(names) > 1:
        return "", False
    return (names[0] if names else "identity"), True


def _biased(first: Growable, last: Growable) -> bool:
    """A widening brings biases; a layer without one has no place for them."""
    return first.bias is not None and last.bias is not None


def _plain(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _geometry(conv: nn.Conv2d) -> ConvGeometry:
    padding = conv.padding
    if isinstance(padding, str):
        total = [
            d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        padding = (total[0], total[1])
    return ConvGeometry(
        kernel_h=conv.kernel_size[0],
        kernel_w=conv.kernel_size[1],
        stride_h=conv.stride[0],
        stride_w=conv.stride[1],
        padding_h=padding[0],
        padding_w=padding[1],
        dilation_h=conv.dilation[0],
        dilation_w=conv.dilation[1],
        groups=conv.groups,
    )


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)
