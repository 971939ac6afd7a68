"""An exported program as data: the content of architecture.json, whose format :mod:`esper_core.nn.export.load` documents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_unflatten

from esper_core.errors import Unsupported
from esper_core.nn.export.load import DTYPES, FORMAT, MEMORY_FORMATS, OPERATORS, ArchitectureError, operation

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MEMORY_NAMES = {layout: name for name, layout in MEMORY_FORMATS.items()}
_OPERATOR_NAMES: Mapping[Any, str] = {function: name for name, function in OPERATORS.items()}
_OTHERWISE = "export it as torch or onnx instead"


@dataclass(frozen=True)
class _Value:
    """What a node computes, while the outputs are put in order."""

    name: str


def describe(model: nn.Module, exported: ExportedProgram) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of ``model``, but for ``weights``, and the tensors that it names.

    Args:
        model: what was exported.
        exported: its program.

    Raises:
        Unsupported: an operation, argument or output that the format has no word for.
    """
    tensors, aliases = _state(model)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    read: dict[str, str] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            name = str(spec.target)
            read[spec.arg.name] = name = aliases.get(name, name)
            if name not in tensors:  # a constant, or a buffer that is no part of the state
                tensors[name] = exported.constants[name].detach().contiguous()
    state = model.state_dict()
    reader = _Reader(read)
    inputs = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    document = {
        "format": FORMAT,
        "modules": [
            {"path": path, "type": type(module).__name__, "figures": figures(module)}
            for path, module in model.named_modules()
        ],
        "tensors": {
            name: {
                "kind": "parameter" if name in own else "buffer" if name in state else "constant",
                "dtype": _word(_DTYPE_NAMES, tensor.dtype),
                "shape": [*tensor.shape],
            }
            for name, tensor in tensors.items()
        },
        "aliases": aliases,
        "inputs": [_input(inputs[str(name)]) for name in exported.graph_signature.user_inputs],
        "nodes": [reader.node(node) for node in exported.graph.nodes if node.op == "call_function"],
        "outputs": _outputs(exported, reader),
    }
    return document, tensors


def figures(module: nn.Module) -> dict[str, Any]:
    """What a module was constructed with, where it still knows: plain values of its constructor's parameters."""
    found: dict[str, Any] = {}
    for name in inspect.signature(type(module).__init__).parameters:
        if name == "self" or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if name == "bias" and (value is None or isinstance(value, Tensor)):
            found[name] = value is not None
        elif _is_plain(value):
            found[name] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the state by name, and the further names of those that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, aliases


def _input(node: torch.fx.Node) -> dict[str, Any]:
    value = node.meta["val"]
    return {"name": node.name, "dtype": _word(_DTYPE_NAMES, value.dtype), "shape": [None, *map(int, value.shape[1:])]}


def _outputs(exported: ExportedProgram, reader: _Reader) -> Any:
    """The outputs in the structure in which the forward gives them."""
    (given,) = exported.graph.output_node().args
    spec = exported.call_spec.out_spec
    assert spec is not None and isinstance(given, (list, tuple))  # noqa: S101, PT018
    leaves = [_Value(node.name) if isinstance(node, torch.fx.Node) else node for node in given]
    return reader.structure(tree_unflatten(leaves, spec))


class _Reader:
    """Turns nodes into entries; ``tensors`` are the placeholders that stand for one."""

    def __init__(self, tensors: Mapping[str, str]) -> None:
        self.tensors = tensors

    def node(self, node: torch.fx.Node) -> dict[str, Any]:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = str(target)
            arguments = [argument.name for argument in target._schema.arguments]
            given = dict(zip(arguments, node.args, strict=False)) | node.kwargs
            given.pop("layout", None)  # strided, as every tensor of a host
        else:
            name = _OPERATOR_NAMES[target] if target in _OPERATOR_NAMES else getattr(target, "__name__", str(target))
            given = dict(zip("ab", node.args, strict=False))
        try:
            operation(name)
        except ArchitectureError as problem:
            raise Unsupported(f"architecture.json has no word for {name}: {problem}", hint=_OTHERWISE) from None
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return {
            "name": node.name,
            "op": name,
            "arguments": {key: self.argument(value) for key, value in given.items()},
            "module": stack[-1][0] if stack else "",
        }

    def argument(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return {"tensor": self.tensors[value.name]} if value.name in self.tensors else {"value": value.name}
        if isinstance(value, (list, tuple)):
            return [self.argument(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": _word(_DTYPE_NAMES, value)}
        if isinstance(value, torch.memory_format):
            return {"memory_format": _word(_MEMORY_NAMES, value)}
        if isinstance(value, torch.device):
            return {"device": "input"}
        raise Unsupported(f"architecture.json has no word for a {type(value).__name__}", hint=_OTHERWISE)

    def structure(self, value: Any) -> Any:
        if isinstance(value, _Value):
            return {"tensor": self.tensors[value.name]} if value.name in self.tensors else {"value": value.name}
        if type(value) is tuple:
            return {"tuple": [self.structure(item) for item in value]}
        if type(value) is list:
            return [self.structure(item) for item in value]
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.structure(item) for key, item in value.items()}}
        if value is None:
            return None
        raise Unsupported(
            f"architecture.json has no word for an output of type {type(value).__name__}", hint=_OTHERWISE
        )


def _word(words: Mapping[Any, str], value: Any) -> str:
    if value not in words:
        raise Unsupported(f"architecture.json has no word for {value}", hint=_OTHERWISE)
    return words[value]
