"""The wrapped network: the user's own module, its data-flow graph, and the slots where kernels can be grafted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from esper_core.blueprint.interface import SlotInterface
from esper_core.errors import Conflict, InvalidInput
from esper_core.nn.between import WidenableNorm
from esper_core.nn.chance import undisturbed
from esper_core.nn.graft import Graft
from esper_core.nn.spans import choose
from esper_core.nn.trace import Growable, HostGraph, Span, trace


class Slot:
    """A place for one kernel at a time.

    Attributes:
        span: what tracing found there.
        name: ``<source path>:<sink path>``.
        source, sink: the spanned modules themselves.
        norm: the batch norm between them that is widened with them, or None.
        obstacle: why no kernel could ever be folded here; empty when a widening can.
        graft: the bound kernel, or None.
    """

    def __init__(self, span: Span, model: nn.Module) -> None:
        self.span = span
        self.name = span.name
        self.source_path, self.sink_path = span.source, span.sink
        self.source = model.get_submodule(span.source)
        self.sink = model.get_submodule(span.sink)
        self.norm_path, self.obstacle = span.norm, span.obstacle
        self.norm = cast(WidenableNorm, model.get_submodule(span.norm)) if span.norm else None
        self.graft: Graft | None = None
        self._around = tuple(
            {id(part): part for path in (span.source, span.sink) for part in _around(model, path)}.values()
        )

    @property
    def interface(self) -> SlotInterface:
        """What a kernel meets here; the widths follow the host as it grows, here or next door."""
        ends = self.layers
        if ends is None:
            return self.span.interface
        source, sink = ends
        groups = source.groups if isinstance(source, nn.Conv2d) else 1
        widths = {
            "in_width": source.weight.shape[1] * groups,
            "hidden_width": source.weight.shape[0],
            "out_width": sink.weight.shape[0],
        }
        return self.span.interface.model_copy(update=widths)

    @property
    def layers(self) -> tuple[Growable, Growable] | None:
        """Source and sink when both are layers that can be widened; None when the span is between blocks."""
        if isinstance(self.source, Growable) and isinstance(self.sink, Growable):
            return self.source, self.sink
        return None

    @property
    def unit_parameters(self) -> int:
        """Parameters that one more unit over the span would cost: a row, its bias, the norm's two, and a column."""
        if self.layers is None:
            return self.span.interface.in_width + 1 + self.span.interface.out_width
        source, sink = self.layers
        beside = [source.bias, *(self.norm.parameters() if self.norm is not None else ())]
        own = sum(parameter is not None for parameter in beside)
        return source.weight[0].numel() + own + sink.weight[:, 0].numel()

    @property
    def leader(self) -> nn.Parameter:
        """A parameter of the span: a kernel learns at its rate, by its schedule, on its device."""
        if self.layers is not None:
            return cast(nn.Parameter, self.layers[1].weight)
        return next(parameter for parameter in self.span_parameters() if parameter.is_floating_point())

    def span_parameters(self) -> list[nn.Parameter]:
        """Source's, norm's and sink's own parameters."""
        norm = self.norm.parameters() if self.norm is not None else ()
        return [*self.source.parameters(), *norm, *self.sink.parameters()]

    def bind(self, kernel: nn.Module) -> Graft:
        """Give the slot a kernel; the host does not notice until the graft is attached.

        Raises:
            Conflict: when it has one already.
        """
        if self.graft is not None:
            raise Conflict(f"slot {self.name} already has a kernel", hint="cull it first")
        self.graft = Graft(self.source, self.sink, kernel, like=self.leader, around=self._around, follows=self.norm)
        return self.graft

    def release(self) -> None:
        """Forget the kernel; the host is as it was without it."""
        if self.graft is not None:
            self.graft.detach()
            self.graft = None


class Host(nn.Module):
    """Behaves as the wrapped model: same forward, same ``state_dict`` keys, same parameters."""

    def __init__(self, model: nn.Module, graph: HostGraph, spans: Sequence[Span]) -> None:
        super().__init__()
        self.model = model
        self.graph = graph
        self.slots: dict[str, Slot] = {span.name: Slot(span, model) for span in spans}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    def slot(self, name: str) -> Slot:
        """The slot of that name.

        Raises:
            InvalidInput: when there is none.
        """
        if name not in self.slots:
            raise InvalidInput(f"no slot {name!r}", hint=f"slots: {', '.join(self.slots) or 'none'}")
        return self.slots[name]

    def require_slots(self) -> None:
        """Refuse a network that cannot grow.

        Raises:
            InvalidInput: when there is no slot.
        """
        if not self.slots:
            raise InvalidInput(
                f"{type(self.model).__name__} has no span to grow over",
                hint="a span is two linear or convolutional layers in a row; name blocks by spans=[(source, sink)]",
            )

    def can_widen(self, slot: Slot) -> bool:
        """Whether no kernel next door, blended or still learning, relies on the widths that folding at ``slot`` would change."""
        ends = {slot.source, slot.norm, slot.sink} - {None}
        return not any(
            other.graft is not None and ends & {other.source, other.norm, other.sink}
            for other in self.slots.values()
            if other is not slot
        )

    @property
    def parameter_count(self) -> int:
        """Parameters of the host as it stands, bound kernels not counted."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside, every module's own mode restored after; random state untouched."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with undisturbed():
                yield
        finally:
            for module, training in modes:
                module.training = training


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that contain the one at ``path``, the model first."""
    names = path.split(".")
    return (model.get_submodule(".".join(names[:depth])) for depth in range(len(names)))


def wrap(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    spans: Sequence[tuple[str, str]] | None = None,
) -> Host:
    """Find the places where ``model`` can grow.

    Args:
        model: any module whose forward ``torch.export`` understands.
        example_inputs: one batch as in training, a tensor or a tuple of arguments.
        spans: (source, sink) module paths; every span found when None.

    Raises:
        InvalidInput: when the example does not fit or a named span cannot be one.
        Unsupported: when the forward cannot be traced.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    graph = trace(model, inputs)
    return Host(model, graph, choose(model, inputs, graph, spans))
