"""Rebuild an exported network from architecture.json and model.safetensors. Needs torch and safetensors, nothing else.

    from load import load
    model = load("the/directory")       # an nn.Module in evaluation mode, on the CPU
    outputs = model(inputs)             # any batch size

Parameters carry the names they had in training and can be trained on; ``model.to(device)`` works. What acts only in
training (dropout, batch statistics) is as it was in evaluation mode. Nothing in the files is executed: an operation
that is not listed here is refused.

architecture.json, format ``esper.architecture/1``:

    format    "esper.architecture/1"
    weights   {"file": name beside it, "sha256": of that file}
    modules   [{"path", "type", "figures"}]: every module with its constructor's figures; for readers, not for rebuilding
    tensors   {name: {"kind": "parameter" | "buffer" | "constant", "dtype", "shape"}}: what stands in the weights file;
              constants are no part of the state_dict
    aliases   {name: name in tensors}: further names of a shared tensor
    inputs    [{"name", "dtype", "shape"}]: in calling order; the batch dimension is null
    nodes     [{"name", "op", "arguments", "module"}]: in an order in which they can be computed; ``op`` is an operator of
              ATen, spelled aten.NAME.OVERLOAD with its published argument names, or operator.NAME on whole numbers and
              tuples with arguments a, b; ``module`` is the path of the module that asked for it
    outputs   one argument, as below

An argument is null, a boolean, number or text for itself; a list of arguments; or one of

    {"value": name}          of an input or an earlier node
    {"tensor": name}         of a tensor
    {"tuple": [...]}, {"dict": {...}}
    {"dtype": name}, {"memory_format": name}
    {"number": "inf" | "-inf" | "nan"}
    {"device": "input"}      the device of the first input
"""

from __future__ import annotations

import difflib
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn

FORMAT = "esper.architecture/1"

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
MEMORY_FORMATS = {
    str(layout).removeprefix("torch."): layout
    for layout in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}
OPERATORS: Mapping[str, Callable[..., Any]] = {
    f"operator.{function.__name__}": function
    for function in (
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    )
}
_ATEN_NAMES = """
    _log_softmax.default _softmax.default _to_copy.default _unsafe_view.default abs.default adaptive_avg_pool1d.default
    adaptive_avg_pool2d.default adaptive_max_pool2d.default add.Scalar add.Tensor addmm.default alias.default all.default
    amax.default amin.default arange.default arange.start arange.start_step argmax.default avg_pool1d.default
    avg_pool2d.default baddbmm.default batch_norm.default bitwise_and.Tensor bitwise_not.default bmm.default cat.default
    chunk.default clamp.default clamp_max.default clamp_min.default clone.default constant_pad_nd.default
    contiguous.default conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default
    conv_transpose2d.input cos.default cumsum.default detach.default div.Scalar div.Tensor div.Tensor_mode
    dropout.default einsum.default elu.default embedding.default empty_like.default eq.Scalar eq.Tensor exp.default
    expand.default expand_as.default eye.default feature_dropout.default flatten.using_ints flip.default
    floor_divide.default full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default
    group_norm.default gt.Scalar gt.Tensor hardsigmoid.default hardswish.default hardtanh.default index.Tensor
    index_select.default instance_norm.default isfinite.default layer_norm.default le.Scalar le.Tensor
    leaky_relu.default linalg_vector_norm.default linear.default log.default log_softmax.int logical_and.default
    logical_not.default logical_or.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor matmul.default
    max.default max.dim max_pool1d.default max_pool2d.default maximum.default mean.default mean.dim min.default min.dim
    minimum.default mish.default mm.default movedim.int mul.Scalar mul.Tensor
    _native_batch_norm_legit_no_training.default native_layer_norm.default native_group_norm.default ne.Scalar ne.Tensor
    neg.default new_full.default new_ones.default new_zeros.default ones.default ones_like.default pad.default
    permute.default pixel_shuffle.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default
    reciprocal.default relu.default relu6.default remainder.Scalar repeat.default reshape.default rms_norm.default
    roll.default rsqrt.default rsub.Scalar scaled_dot_product_attention.default scalar_tensor.default select.int
    selu.default sigmoid.default sign.default silu.default sin.default slice.Tensor softmax.int softplus.default
    split.Tensor split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim squeeze.dims
    stack.default std.correction sub.Scalar sub.Tensor sum.default sum.dim_IntList sym_numel.default sym_size.int
    t.default tanh.default threshold.default to.device to.dtype to.dtype_layout topk.default transpose.int tril.default
    triu.default type_as.default unbind.int unflatten.int unsqueeze.default upsample_bilinear2d.vec
    upsample_nearest2d.vec var.correction view.default view_as.default where.ScalarOther where.ScalarSelf where.self
    zeros.default zeros_like.default
"""
ATEN = frozenset(f"aten.{name}" for name in _ATEN_NAMES.split())
"""Operators without side effects that a description may name."""


class ArchitectureError(ValueError):
    """The files describe no network that can be rebuilt; the message says where."""


def operation(name: str) -> Callable[..., Any]:
    """What ``name`` computes.

    Raises:
        ArchitectureError: it is not listed; names the nearest that is.
    """
    if name in OPERATORS:
        return OPERATORS[name]
    if name not in ATEN:
        close = difflib.get_close_matches(name, [*ATEN, *OPERATORS], n=1)
        raise ArchitectureError(f"unknown op {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)  # type: ignore[no-any-return]


def load(directory: str | Path) -> Network:
    """The network under ``directory``, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: a file is absent.
        ArchitectureError: a file is damaged or of another format, the two do not belong together, or an op is unknown.
    """
    folder = Path(directory)
    try:
        document = json.loads((folder / "architecture.json").read_bytes())
        if document["format"] != FORMAT:
            raise ArchitectureError(f"the description is of format {document['format']!r}, this reads {FORMAT!r}")
        name, digest = document["weights"]["file"], document["weights"]["sha256"]
        data = (folder / Path(name).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ArchitectureError(f"{name} is damaged or belongs to another description: its digest differs")
        return Network(document, parse_tensors(data)).eval()
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ArchitectureError(f"architecture.json is malformed: {problem!r}") from problem


class Network(nn.Module):
    """What a description describes.

    Args:
        document: the content of architecture.json.
        tensors: of the weights file.
    """

    def __init__(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        kept: dict[str, Tensor] = {}
        for name, facts in document["tensors"].items():
            kept[name] = self._keep(name, facts, _checked(name, facts, tensors))
        for name, first in document["aliases"].items():
            self._keep(name, document["tensors"][first], kept[first])
        self._inputs: list[str] = [entry["name"] for entry in document["inputs"]]
        self._nodes = [(node["name"], operation(node["op"]), node["arguments"]) for node in document["nodes"]]
        self._outputs = document["outputs"]
        self._dying = self._check_flow()

    def forward(self, *inputs: Tensor) -> Any:
        """Evaluate node after node."""
        if len(inputs) != len(self._inputs):
            raise TypeError(f"the network takes {len(self._inputs)} inputs: {', '.join(self._inputs)}")
        values: dict[str, Any] = dict(zip(self._inputs, inputs, strict=True))
        device = inputs[0].device
        for (name, function, arguments), dying in zip(self._nodes, self._dying, strict=True):
            given = {key: self._resolve(argument, values, device) for key, argument in arguments.items()}
            aten = isinstance(function, torch._ops.OpOverload)
            values[name] = function(**given) if aten else function(*given.values())
            for gone in dying:
                del values[gone]
        return self._resolve(self._outputs, values, device)

    def _resolve(self, argument: Any, values: Mapping[str, Any], device: torch.device) -> Any:
        if isinstance(argument, list):
            return [self._resolve(item, values, device) for item in argument]
        if not isinstance(argument, dict):
            return argument
        ((kind, content),) = argument.items()
        if kind == "value":
            return values[content]
        if kind == "tensor":
            owner, leaf = self._owners[content]
            return owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
        if kind == "tuple":
            return tuple(self._resolve(item, values, device) for item in content)
        if kind == "dict":
            return {key: self._resolve(item, values, device) for key, item in content.items()}
        return device if kind == "device" else _CONSTANTS[kind](content)

    def _keep(self, name: str, facts: Mapping[str, Any], tensor: Tensor) -> Tensor:
        """Register a tensor under its dotted name; the modules on the way are empty containers."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            below = owner._modules.get(part)
            if (
                below is None
            ):  # not add_module: a layer may be called `forward` or `train` and must not shadow the method
                below = owner._modules[part] = nn.Module()
            owner = below
        if facts["kind"] == "parameter":
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            owner._parameters[leaf] = tensor
        else:
            owner._buffers[leaf] = tensor
            if facts["kind"] == "constant":
                owner._non_persistent_buffers_set.add(leaf)
        self._owners[name] = (owner, leaf)
        return tensor

    def _check_flow(self) -> list[list[str]]:
        """Refuse a reference to what is not there yet; for each node, the values that nothing after it reads."""
        known = set(self._inputs)
        last: dict[str, int] = {}
        for position, (name, _, arguments) in enumerate(self._nodes):
            given = list(arguments.values())
            self._check_references(given, known, name)
            last |= dict.fromkeys(_named(given, "value"), position)
            last.setdefault(name, position)
            known.add(name)
        self._check_references(self._outputs, known, "outputs")
        dying: list[list[str]] = [[] for _ in self._nodes]
        for value in last.keys() - set(_named(self._outputs, "value")):
            dying[last[value]].append(value)
        return dying

    def _check_references(self, argument: Any, known: set[str], where: str) -> None:
        for kind, names in (("value", known), ("tensor", self._owners.keys())):
            if missing := [name for name in _named(argument, kind) if name not in names]:
                raise ArchitectureError(f"{where} reads {kind} {missing[0]!r}, which is not there")


_CONSTANTS: Mapping[str, Callable[[str], Any]] = {
    "dtype": DTYPES.__getitem__,
    "memory_format": MEMORY_FORMATS.__getitem__,
    "number": float,
}


def _named(argument: Any, kind: str) -> Iterator[str]:
    """Names that an argument, or a mapping or list of them, refers to by ``kind``."""
    if isinstance(argument, list):
        for item in argument:
            yield from _named(item, kind)
    elif isinstance(argument, dict):
        for key, content in argument.items():
            if key == kind and isinstance(content, str):
                yield content
            else:
                yield from _named(content, kind)


def _checked(name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ArchitectureError(f"the weights have no tensor {name!r}")
    tensor = tensors[name]
    if list(tensor.shape) != facts["shape"] or tensor.dtype != DTYPES.get(facts["dtype"]):
        raise ArchitectureError(
            f"tensor {name!r} is {tensor.dtype} of shape {list(tensor.shape)}, not {facts['dtype']} {facts['shape']}"
        )
    return tensor
