"""The loader that ships beside the weights: rebuilds what was described, and refuses what it cannot know or trust."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import esper_core as esper
from esper_core.nn.export import load
from esper_core.nn.export.architecture import describe
from esper_core.nn.export.plain import plain
from esper_core.nn.export.program import program
from tests.unit.nn.hosts import make, perceptron

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.Sigmoid, nn.ELU, nn.Softplus)
NORMS = (nn.Identity, nn.BatchNorm1d, nn.LayerNorm, lambda width: nn.GroupNorm(1, width))

layer = st.tuples(st.integers(1, 6), st.sampled_from(ACTIVATIONS), st.sampled_from(NORMS), st.booleans())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(layers=st.lists(layer, min_size=1, max_size=4), rows=st.integers(1, 5))
def test_a_network_survives_its_description(layers: list[Any], rows: int) -> None:
    torch.manual_seed(0)
    width, parts = 3, list[nn.Module]()
    for units, activation, norm, bias in layers:
        parts += [nn.Linear(width, units, bias=bias), norm(units), activation()]
        width = units
    model = nn.Sequential(*parts).eval()
    document, tensors = describe(model, program(model, (torch.randn(2, 3),)))
    again = load.Network(json.loads(json.dumps(document)), tensors).eval()
    inputs = torch.randn(rows, 3)
    assert torch.equal(again(inputs), model(inputs))
    assert again.state_dict().keys() == model.state_dict().keys()
    figures = [entry["figures"] for entry in document["modules"] if entry["type"] == "Linear"]
    assert [(one["out_features"], one["bias"]) for one in figures] == [(units, bias) for units, _, _, bias in layers]


@pytest.mark.parametrize("family", ["cnn", "resnet", "transformer"])
def test_a_host_survives_its_description(family: str) -> None:
    model = plain(make(family))
    inputs = torch.randn(3, *{"cnn": (2, 6, 6), "resnet": (2, 6, 6), "transformer": (5, 6)}[family])
    document, tensors = describe(model, program(model, (inputs,)))
    again = load.Network(json.loads(json.dumps(document)), tensors).eval()
    assert torch.allclose(again(inputs), model(inputs), rtol=0, atol=1e-6)
    assert {entry["path"]: entry["type"] for entry in document["modules"]} == {
        path: type(module).__name__ for path, module in model.named_modules()
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("load") / "out"
    esper.export(perceptron(3, 4, 2), torch.randn(4, 3), target, ["safetensors"])
    return target


def damaged(exported: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy whose description was changed."""
    document = json.loads((exported / "architecture.json").read_text())
    change(document)
    (folder / "architecture.json").write_text(json.dumps(document))
    (folder / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format="esper.architecture/2"), "esper.architecture/2"),
        (lambda d: d["nodes"][0].update(op="aten.liner.default"), "did you mean 'aten.linear.default'"),
        (lambda d: d["nodes"][0].update(op="aten.from_file.default"), "unknown op"),
        (lambda d: d["nodes"][0].update(op="os.system"), "unknown op"),
        (lambda d: d["nodes"].reverse(), "which is not there"),
        (lambda d: d.update(outputs={"value": "nothing"}), "'nothing', which is not there"),
        (lambda d: d["nodes"][0]["arguments"].update(weight={"tensor": "9.weight"}), "'9.weight', which is not there"),
        (lambda d: d["tensors"]["0.weight"].update(shape=[3, 4]), r"not float32 \[3, 4\]"),
        (lambda d: d["tensors"].update({"5.bias": {"kind": "buffer", "dtype": "int8", "shape": []}}), "no tensor '5.bias'"),
        (lambda d: d.pop("tensors"), "malformed"),
        (lambda d: d.update(nodes=3), "malformed"),
        (lambda d: d["weights"].update(sha256=hashlib.sha256(b"").hexdigest()), "digest"),
    ],
)  # fmt: skip
def test_a_description_that_lies_is_refused(
    exported: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    assert load.load(damaged(exported, tmp_path, lambda document: None))(torch.zeros(1, 3)).shape == (1, 2)
    with pytest.raises(load.ArchitectureError, match=says):
        load.load(damaged(exported, tmp_path, change))


def test_a_flipped_bit_of_the_weights_is_noticed(exported: Path, tmp_path: Path) -> None:
    weights = damaged(exported, tmp_path, lambda document: None) / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(load.ArchitectureError, match="digest"):
        load.load(tmp_path)


def test_weights_are_read_beside_the_description_only(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    folder = damaged(
        exported, tmp_path / "inner", lambda document: document["weights"].update(file="../model.safetensors")
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load.load(folder)


def test_every_listed_op_exists_and_changes_nothing() -> None:
    for name in load.ATEN:
        operation: Any = load.operation(name)
        assert not operation._schema.is_mutable, name


def test_what_ships_needs_torch_and_safetensors_alone(exported: Path) -> None:
    tree = ast.parse((exported / "load.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert foreign == {"torch", "safetensors"}
