"""Exporting: every file alone gives the network's outputs, folded or with a kernel beside; nothing half-written stays."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import esper_core as esper
from esper_core.errors import AlreadyExists, Corrupt, InvalidInput, Unsupported
from esper_core.nn.export import load
from esper_core.nn.export.bundle import FORMATS, TOLERANCE
from esper_core.nn.export.plain import plain
from esper_core.nn.export.program import program
from esper_core.nn.host import Host
from esper_core.nn.widen import fold
from tests.unit.nn.hosts import CLASSES, batches, make, perceptron, planted, wrapped

BESIDE = {
    "mlp": "bottleneck_mlp",
    "cnn": "conv_bypass_3x3",
    "resnet": "depthwise_separable",
    "transformer": "attention_block",
}
PLAIN_PYTHON = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("esper_core", "services"):
            raise ImportError(name + " is not for inference")
sys.meta_path.insert(0, Refuse())
try:
    import esper_core
    sys.exit("the block does not hold")
except ImportError:
    pass
import torch
from safetensors.torch import load_file
from onnx.reference import ReferenceEvaluator
import load
given = load_file("given")
x = given["x"]
with torch.no_grad():
    outputs = [load.load(".")(x), torch.export.load("model.pt2").module()(x)]
run = ReferenceEvaluator("model.onnx")
outputs.append(torch.from_numpy(run.run(None, {run.input_names[0]: x.numpy()})[0]))
print([float((output - given["y"]).abs().max()) for output in outputs])
"""


def grafted(family: str, alpha: float = 0.7) -> Host:
    host = wrapped(family, make(family)).eval()
    slot = next(iter(host.slots.values()))
    planted(slot, BESIDE[family])
    assert slot.graft is not None
    slot.graft.alpha.fill_(alpha)
    slot.graft.attach()
    return host


def rows(family: str, count: int = 8) -> Tensor:
    return batches(family, 1, size=count, seed=6)[0][0]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return model.eval()(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_a_kernel_beside_the_host_is_in_every_file(family: str, tmp_path: Path) -> None:
    host, inputs = grafted(family), rows(family)
    expected = outputs(host, inputs)
    done = esper.export(host, inputs, tmp_path / "out")
    assert [entry.format for entry in done] == list(FORMATS)
    for entry in done:
        assert entry.max_abs_diff <= entry.tolerance == pytest.approx(TOLERANCE * float(expected.abs().max()))
        assert entry.path.parent == tmp_path / "out"
        assert entry.bytes >= entry.path.stat().st_size > 0
    assert torch.equal(outputs(host, inputs), expected)
    bare = wrapped(family, make(family))
    assert float((outputs(bare, inputs) - expected).abs().max()) > 100 * done[0].tolerance


def test_a_folded_network_is_wider_and_nothing_else(tmp_path: Path) -> None:
    host, inputs = grafted("mlp"), rows("mlp")
    slot = next(iter(host.slots.values()))
    before = outputs(host, inputs)
    assert fold(host, slot, None)
    esper.export(host.model, inputs, tmp_path / "out", ["safetensors"])
    document = json.loads((tmp_path / "out" / "architecture.json").read_text())
    figures = {entry["path"]: entry["figures"] for entry in document["modules"]}
    assert figures["0"]["out_features"] == figures["2"]["in_features"] == slot.interface.hidden_width > 8
    assert [node["op"] for node in document["nodes"]] == ["aten.linear.default", "aten.relu.default"] * 3 + [
        "aten.linear.default"
    ]
    assert float((outputs(host, inputs) - before).abs().max()) <= 1e-5


def test_the_graph_has_none_of_the_guards_of_training() -> None:
    traced = program(plain(grafted("resnet")), (rows("resnet"),))
    names = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not {name for name in names if any(word in name for word in ("isfinite", "where", "zeros_like", "detach"))}
    (blend,) = [node for node in traced.graph.nodes if "alpha" in node.kwargs]
    assert blend.kwargs["alpha"] == pytest.approx(0.7)


@pytest.mark.parametrize("silence", ["muted", "broken"])
def test_a_kernel_without_a_say_is_left_out(silence: str, tmp_path: Path) -> None:
    host, inputs = grafted("mlp"), rows("mlp")
    graft = next(iter(host.slots.values())).graft
    assert graft is not None
    if silence == "muted":
        graft.muted = True
    else:
        next(graft.kernel.parameters()).data.fill_(torch.nan)
    esper.export(host, inputs, tmp_path / "out", ["safetensors"])
    document = json.loads((tmp_path / "out" / "architecture.json").read_text())
    assert not [name for name in document["tensors"] if "graft" in name]
    assert torch.equal(load.load(tmp_path / "out")(inputs), outputs(wrapped("mlp", make("mlp")), inputs))


def test_the_files_run_where_esper_cannot_be_imported(tmp_path: Path) -> None:
    host = grafted("resnet")
    done = esper.export(host, rows("resnet"), tmp_path / "out")
    fresh = batches("resnet", 1, size=5, seed=9)[0][0]
    save_file({"x": fresh, "y": outputs(host, fresh)}, tmp_path / "out" / "given")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_PYTHON],
        cwd=tmp_path / "out",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert max(json.loads(result.stdout)) <= done[0].tolerance
    (tmp_path / "out" / "given").unlink()
    for path in (tmp_path / "out").iterdir():
        if path.is_file() and path.name != "load.py":
            content = path.read_bytes()
            assert b"esper_core" not in content
            assert str(Path(esper.__file__).parents[1]).encode() not in content


class Constant(nn.Module):
    """What makes the exporters talk: an output that is a constant, and one that is the input."""

    def forward(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(5.0), output


def test_exporting_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    esper.export(Constant(), rows("mlp"), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


class Forked(nn.Module):
    """Two inputs, shared weights, a buffer outside the state, an in-place activation, structured outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        mixed = self.norm(self.act(self.first(left))) + self.second(right)
        low = mixed.masked_fill(mixed < 0, float("-inf")).softmax(-1) * torch.arange(4.0)
        return {"mixed": mixed + self.shift, "parts": (low, mixed.view(mixed.shape[0] * 2, 2))}


def test_a_description_holds_structures_shared_weights_and_constants(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Forked().eval()
    given = (torch.randn(6, 4), torch.randn(6, 4))
    esper.export(model, given, tmp_path / "out", ["safetensors", "torch"])
    again = load.load(tmp_path / "out")
    found, expected = again(*given), model(*given)
    assert found.keys() == expected.keys()
    assert torch.equal(found["mixed"], expected["mixed"])
    assert all(map(torch.equal, found["parts"], expected["parts"]))
    assert again.state_dict().keys() == model.state_dict().keys()
    weights = dict(again.named_parameters(remove_duplicate=False))
    assert weights["first.weight"] is weights["second.weight"]
    found["mixed"].sum().backward()
    assert weights["first.weight"].grad is not None


def test_one_row_is_enough_and_any_number_follows(tmp_path: Path) -> None:
    model = make("cnn")
    esper.export(model, rows("cnn", 1), tmp_path / "out", ["torch"])
    many = rows("cnn", 33)
    found = torch.export.load(tmp_path / "out" / "model.pt2").module()(many)
    assert torch.allclose(found, outputs(model, many), atol=1e-6)


def test_an_onnx_model_names_what_enters_and_leaves(tmp_path: Path) -> None:
    import onnx

    model = Forked().eval()
    esper.export(model, (torch.randn(6, 4), torch.randn(6, 4)), tmp_path / "out", ["onnx"])
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    shapes = {
        value.name: [entry.dim_param or entry.dim_value for entry in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "left": ["batch", 4],
        "right": ["batch", 4],
        "output_0": ["batch", 4],
        "output_1": ["batch", 4],
        "output_2": ["2*batch", 2],
    }


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    model, inputs, target = make("mlp"), rows("mlp"), tmp_path / "out"
    esper.export(model, inputs, target, ["safetensors", "torch"])
    (target / "__pycache__").mkdir()
    esper.export(model, inputs, target, ["torch"])
    assert sorted(path.name for path in target.iterdir()) == ["export.json", "model.pt2"]
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(AlreadyExists):
        esper.export(model, inputs, target, ["torch"])
    assert (target / "thesis.tex").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_differs_is_an_error_and_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, target = make("mlp"), rows("mlp"), tmp_path / "out"
    esper.export(model, inputs, target, ["torch"])
    before = (target / "model.pt2").read_bytes()
    network = load.Network.forward
    monkeypatch.setattr(load.Network, "forward", lambda self, *given: network(self, *given) * (1 + 1e-4))
    with pytest.raises(Corrupt, match="safetensors"):
        esper.export(model, inputs, target)
    assert (target / "model.pt2").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxscript" else found(name, *more)
    )
    with pytest.raises(Unsupported, match="onnxscript") as caught:
        esper.export(make("mlp"), rows("mlp"), tmp_path / "out")
    assert "esper[export]" in caught.value.hint
    assert not list(tmp_path.iterdir())
    esper.export(make("mlp"), rows("mlp"), tmp_path / "out", ["safetensors", "torch"])


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, 3, 2)


class Exotic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.seen


@pytest.mark.parametrize(
    ("model", "inputs", "names", "error", "says"),
    [
        (perceptron(6, CLASSES), torch.randn(4, 6), ["onyx"], InvalidInput, "onyx"),
        (perceptron(6, CLASSES), torch.randn(4, 6), [], InvalidInput, "no format"),
        (perceptron(6, CLASSES), torch.randn(4, 7), ["torch"], InvalidInput, "do not fit"),
        (perceptron(6, CLASSES), (torch.randn(4, 6), 3), ["torch"], InvalidInput, "no batch"),
        (perceptron(6, CLASSES), torch.full((4, 6), torch.nan), ["torch"], InvalidInput, "not finite"),
        (Branching(), torch.randn(4, 6), ["torch"], Unsupported, "cannot be exported"),
        (FixedBatch(), torch.randn(4, 6), ["torch"], Unsupported, "cannot be exported"),
        (Exotic(), torch.randn(4, 6), ["safetensors"], Unsupported, "bessel_j0"),
        (Counting(), torch.randn(4, 6), ["torch"], Unsupported, "buffers"),
    ],
)
def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    model: nn.Module,
    inputs: Tensor,
    names: list[str],
    error: type[Exception],
    says: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        esper.export(model, inputs, tmp_path / "out", names)
    assert not list(tmp_path.iterdir())
