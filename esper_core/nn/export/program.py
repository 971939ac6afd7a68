"""A network's data flow as ``torch.export`` sees it, with a batch of any size and no trace of where it was made."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from esper_core.errors import InvalidInput, Unsupported
from esper_core.nn.chance import undisturbed

_TALKATIVE = ("torch.onnx._internal.exporter._registration", "onnx_ir", "onnxscript")
_TELLTALE = ("stack_trace", "from_node", "source_fn_stack")
"""What torch notes of a node's origin: file names and source lines of this machine."""


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what exporters say about themselves: a deprecated type of their own, an absent torchvision, skipped savings."""
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def batch_of(inputs: tuple[Any, ...]) -> int:
    """Rows of a batch.

    Raises:
        InvalidInput: an input is no tensor with a leading batch dimension that all share.
    """
    sizes = {value.shape[0] if isinstance(value, Tensor) and value.ndim else None for value in inputs}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise InvalidInput(
            "the example inputs are no batch", hint="pass tensors whose first dimension is the batch, the same in each"
        )
    return int(next(size for size in sizes if size is not None))


def program(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The exported program of ``model`` in its present mode; the batch dimension may be any number from 1.

    Args:
        model: free of grafts.
        inputs: a batch of one row or more.

    Raises:
        Unsupported: the forward has data-dependent control flow, fixes its batch size, or changes its own state.
    """
    if batch_of(inputs) == 1:  # a dimension of one would be taken for a constant
        inputs = tuple(torch.cat([value, value]) for value in inputs)
    batch = Dim("batch", min=1)
    try:
        with torch.no_grad(), undisturbed(), quietly():
            exported = torch.export.export(model, inputs, dynamic_shapes=_shapes(model, inputs, batch), strict=False)
            if any(_mutates(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})
    except (RuntimeError, TypeError, ValueError, AttributeError) as problem:
        words = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise Unsupported(
            f"{type(model).__name__} cannot be exported: {words}",
            hint="its forward must work on any batch size and have no data-dependent control flow",
        ) from problem
    if exported.graph_signature.buffers_to_mutate or exported.graph_signature.user_inputs_to_mutate:
        raise Unsupported(
            f"{type(model).__name__} changes its own buffers or its inputs in evaluation mode",
            hint="only a network whose outputs are its whole effect can be exported",
        )
    for node in exported.graph.nodes:
        _forget_origin(node)
    return exported


def _forget_origin(node: torch.fx.Node) -> None:
    for key in _TELLTALE:
        node.meta.pop(key, None)
    if "nn_module_stack" in node.meta:  # which module asked for it: (path, type's full name)
        node.meta["nn_module_stack"] = {
            key: (path, kind if kind.startswith("torch.") else kind.rpartition(".")[2])
            for key, (path, kind) in node.meta["nn_module_stack"].items()
        }


def _shapes(model: nn.Module, inputs: tuple[Tensor, ...], batch: Dim) -> Any:
    """For each argument of ``forward``, which of its dimensions may vary."""
    each = tuple({0: batch} for _ in inputs)
    takes = inspect.signature(model.forward).parameters.values()
    return (each,) if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes) else each


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
