"""The formats: each writes its files and hands back a way to run what was just written."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from esper_core.errors import Unsupported
from esper_core.nn.export import load
from esper_core.nn.export.architecture import describe
from esper_core.nn.export.program import quietly

WEIGHTS, ARCHITECTURE, LOADER = "model.safetensors", "architecture.json", "load.py"
PROGRAM, ONNX = "model.pt2", "model.onnx"
ONNX_LIMIT = 2 * 10**9
"""Bytes; a single ONNX file is a protobuf message, which ends at 2 GiB."""


@dataclass(frozen=True)
class Written:
    """What a format wrote.

    Attributes:
        files: names under the directory, the one to load first.
        run: the output tensors, flat, of the network read back from the files.
    """

    files: tuple[str, ...]
    run: Callable[[tuple[Tensor, ...]], list[Tensor]]


Writer = Callable[[nn.Module, ExportedProgram, Path], Written]


def write_safetensors(model: nn.Module, exported: ExportedProgram, folder: Path) -> Written:
    """Weights, description, and the module that joins them."""
    document, tensors = describe(model, exported)
    data = safetensors.torch.save(tensors)
    document = {
        "format": document.pop("format"),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest()},
        **document,
    }
    (folder / WEIGHTS).write_bytes(data)
    (folder / ARCHITECTURE).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / LOADER).write_bytes(Path(load.__file__).read_bytes())
    return Written((WEIGHTS, ARCHITECTURE, LOADER), _runner(load.load(folder)))


def write_torch(_model: nn.Module, exported: ExportedProgram, folder: Path) -> Written:
    """A program for ``torch.export.load``."""
    with quietly():
        torch.export.save(exported, folder / PROGRAM)
        return Written((PROGRAM,), _runner(torch.export.load(folder / PROGRAM).module()))


def write_onnx(_model: nn.Module, exported: ExportedProgram, folder: Path) -> Written:
    """A model for ONNX runtimes, checked and run by onnx's own reference."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    size = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())
    if size > ONNX_LIMIT:
        raise Unsupported(f"{size} bytes of weights do not fit an ONNX file", hint="export it as safetensors or torch")
    path = folder / ONNX
    try:
        with quietly():
            made = torch.onnx.export(exported, dynamo=True, verbose=False, external_data=False)
            assert made is not None  # noqa: S101
            _name_the_outputs(made.model.graph)
            proto = made.model_proto
    except torch.onnx.errors.OnnxExporterError as problem:
        words = str(problem).strip().splitlines()[0]
        raise Unsupported(
            f"ONNX cannot express this network: {words}", hint="export it as safetensors or torch"
        ) from problem
    _name_the_batch(proto)
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)
    evaluator = ReferenceEvaluator(str(path))

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in zip(evaluator.input_names, inputs, strict=True)}
        return [torch.from_numpy(np.array(value)) for value in evaluator.run(None, feed)]

    return Written((ONNX,), run)


def _name_the_outputs(graph: Any) -> None:
    """``output``, or ``output_0`` …: names that do not hang on how the network is written; inputs keep theirs."""
    taken = {value.name for value in graph.inputs}
    for number, value in enumerate(graph.outputs):
        name = "output" if len(graph.outputs) == 1 else f"output_{number}"
        if name not in taken and value.name not in taken:
            value.name = name


def _name_the_batch(proto: Any) -> None:
    """Call the symbolic dimension ``batch`` wherever it stands, products of it included."""
    symbol = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dimension.dim_param)


WRITERS: Mapping[str, Writer] = {"safetensors": write_safetensors, "torch": write_torch, "onnx": write_onnx}


def require(name: str) -> None:
    """Make sure that the packages a format needs are there.

    Raises:
        Unsupported: they are not.
    """
    missing = [package for package in _NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise Unsupported(
            f"format {name} needs {' and '.join(missing)}, which is not installed",
            hint="pip install 'esper[export]', or choose the formats safetensors and torch",
        )


_NEEDS = {"onnx": ("onnx", "onnxscript")}


def _runner(module: Callable[..., Any]) -> Callable[[tuple[Tensor, ...]], list[Tensor]]:
    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(module(*inputs)) if isinstance(leaf, Tensor)]

    return run
