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
from typing import Any, cast

import torch
from torch import nn

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.errors import InvalidInput, Unsupported
from esper_core.nn.between import Between, Norms, between
from esper_core.nn.chance import undisturbed
from esper_core.nn.windows import entering, geometry, unwidenable

Growable = nn.Linear | nn.Conv2d

_LAYERS = {"aten.linear.default", "aten.conv2d.default", "aten.conv2d.padding"}


@dataclass(frozen=True)
class Span:
    """A place for a slot.

    Attributes:
        source, sink: module paths.
        interface: what a kernel would meet there.
        norm: module path of the batch norm between them; empty when there is none that could be widened.
        obstacle: why no kernel could become part of the host's own weights there; empty when one could.
    """

    source: str
    sink: str
    interface: SlotInterface
    norm: str = ""
    obstacle: str = ""

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
        with torch.no_grad(), undisturbed():
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
        with torch.no_grad(), undisturbed():
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
        self.norms = Norms(model, self.nodes)

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
        passed: list[torch.fx.Node] = []
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
            passed.append(node)
        first, last = (cast(Growable, self.modules[self.owner[end]]) for end in (source, node))
        found = between(passed, self.norms, first, _shape(source))
        obstacle = unwidenable(first, "source") or unwidenable(last, "sink") or found.obstacle
        reads = entering(first, _shape(source.args[0]))
        interface = _interface(reads, _shape(node), first, last, found, foldable=not obstacle)
        if interface is None:
            return None
        return Span(self.owner[source], self.owner[node], interface, found.norm_path, obstacle)


def _interface(
    reads: tuple[int, ...],
    leaving: tuple[int, ...],
    first: Growable,
    last: Growable,
    found: Between,
    *,
    foldable: bool,
) -> SlotInterface | None:
    common = {
        "activation": found.activation,
        "norm": found.norm,
        "source_bias_free": first.bias is None,
        "sink_bias_free": last.bias is None,
        "foldable": foldable,
    }
    if isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d) and len(reads) == len(leaving) == 4:
        return SlotInterface(
            layout=Layout.IMAGE,
            in_width=reads[1],
            out_width=leaving[1],
            hidden_width=first.out_channels,
            in_size=reads[2:],
            out_size=leaving[2:],
            source=geometry(first),
            sink=geometry(last),
            **common,
        )
    if isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and len(reads) == len(leaving):
        layout = {2: Layout.FEATURES, 3: Layout.TOKENS}.get(len(reads))
        if layout is None or reads[:-1] != leaving[:-1]:
            return None
        return SlotInterface(
            layout=layout,
            in_width=reads[-1],
            out_width=leaving[-1],
            hidden_width=first.out_features,
            **common,
        )
    return None


def _tensor_inputs(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Inputs that are activations rather than parameters or buffers."""
    return [parent for parent in node.all_input_nodes if parent.op != "placeholder"]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)
