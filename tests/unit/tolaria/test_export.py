"""A finished run's network: recalled long after as it was, and exported from what its directory holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esper_core.errors import Conflict, Corrupt
from esper_core.nn.graft import Graft
from esper_core.nn.widen import fold
from services.tolaria import command, experiment, keepsake
from services.tolaria.config import TolariaConfig
from services.tolaria.export import main
from tests.unit.nn.hosts import planted
from tests.unit.tolaria.test_trainer_command import QUICK

MakeConfig = Callable[..., TolariaConfig]

HOSTS = {
    "mlp": ({"host": "mlp", "widths": [8, 4, 8]}, {"name": "digits"}, "bottleneck_mlp"),
    "cnn": ({"host": "cnn", "channels": [4, 2, 4]}, {"name": "digits"}, "conv_bypass_3x3"),
    "resnet": ({"host": "resnet", "channels": [4, 8], "blocks": 1}, {"name": "digits"}, "depthwise_separable"),
    "transformer": (
        {"host": "transformer", "width": 8, "heads": 2, "layers": 1, "ffn": [6]},
        {"name": "tokens", "modulus": 7},
        "bottleneck_mlp",
    ),
}


def kept(quick: MakeConfig, directory: Path, name: str, *, folded: bool) -> torch.nn.Module:
    """A host with one kernel, folded or beside, kept as a finished run keeps it."""
    model, dataset, blueprint = HOSTS[name]
    config = quick(model=model, dataset=dataset)
    data = experiment.load_data(config)
    host = experiment.build_host(config, data)
    slot = next(iter(host.slots.values()))
    planted(slot, "bottleneck_mlp" if folded and name != "cnn" else blueprint)
    graft = slot.graft
    assert graft is not None
    graft.alpha.fill_(1.0 if folded else 0.6)
    graft.attach()
    if not (folded and fold(host, slot, None)):
        assert not folded
        slot.sink.add_module("graft", graft)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    keepsake.keep(directory, config.model, data, host.model)
    return host.model.eval()


@pytest.mark.parametrize(("name", "folded"), [*((name, False) for name in HOSTS), ("mlp", True), ("transformer", True)])
def test_a_network_is_recalled_as_it_was(quick: MakeConfig, tmp_path: Path, name: str, folded: bool) -> None:
    model = kept(quick, tmp_path / "runs" / "one", name, folded=folded)
    recalled = keepsake.recall(tmp_path / "runs" / "one")
    assert torch.equal(recalled.model(recalled.inputs), model(recalled.inputs))
    assert recalled.model.state_dict().keys() == model.state_dict().keys()
    assert str(recalled.model) == str(model)
    assert any(isinstance(module, Graft) for module in recalled.model.modules()) != folded


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_is_exported_with_its_kernel(
    quick: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    kept(quick, tmp_path / "runs" / "one", name, folded=False)
    assert main(["one", "--data-dir", str(tmp_path), "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    figures = json.loads(out)
    assert [entry["format"] for entry in figures] == ["safetensors", "torch", "onnx"]
    assert all(entry["max_abs_diff"] <= entry["tolerance"] for entry in figures)
    assert all(Path(entry["path"]).parent == tmp_path / "runs" / "one" / "export" for entry in figures)


def test_a_real_run_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, grown and folded by the command itself; exported after its files were all there is."""
    (tmp_path / "quick.yaml").write_text(QUICK)
    place = ["--data-dir", str(tmp_path)]
    assert command.main([str(tmp_path / "quick.yaml"), "--offline", "--no-twin", "--name", "one", *place]) == 0
    capsys.readouterr()
    out = tmp_path / "elsewhere" / "net"
    assert main(["one", "--format", "safetensors", "--out", str(out), *place]) == 0
    text = capsys.readouterr().out
    assert "max abs diff" in text
    assert str(out / "model.safetensors") in text
    manifest = json.loads((out / "export.json").read_text())
    assert manifest["run"] == "one"
    assert len(manifest["standardisation"]["mean"]) == manifest["inputs"][0]["shape"][1] == 4


def test_runs_that_cannot_be_exported_say_why(
    quick: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "digits-one"
    kept(quick, run, "mlp", folded=True)

    def refused(name: str, *more: str) -> tuple[int, str]:
        code = main([name, "--data-dir", str(tmp_path), *more])
        out, err = capsys.readouterr()
        assert out == ""
        assert not (run / "export").exists()
        return code, err

    code, err = refused("digit-one")
    assert (code, "'digits-one'" in err) == (3, True)
    code, err = refused("digits-one", "--out", str(run))
    assert (code, "no export" in err) == (4, True)
    morphology = (run / "morphology.json").read_text()
    (run / "morphology.json").unlink()
    code, err = refused("digits-one")
    assert (code, "--resume" in err) == (5, True)
    for change in (
        {"format": "esper.morphology/2"},
        {"model": {"host": "mlp", "widths": [8]}},
        {"model": {"hots": "mlp"}},
    ):
        (run / "morphology.json").write_text(json.dumps(json.loads(morphology) | change))
        code, err = refused("digits-one")
        assert (code, "morphology" in err) == (10, True)
    (run / "model.safetensors").unlink()
    code, err = refused("digits-one")
    assert (code, "not finished" in err) == (5, True)
    with pytest.raises(SystemExit) as caught:
        main(["digits-one", "--format", "onyx"])
    assert caught.value.code == 2


def test_weights_that_give_something_else_are_noticed(quick: MakeConfig, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    kept(quick, run, "mlp", folded=False)
    morphology = (run / "morphology.json").read_text()
    alpha = json.loads(morphology)["beside"][0]["alpha"]
    (run / "morphology.json").write_text(morphology.replace(f'"alpha": {alpha}', '"alpha": 0.5'))
    with pytest.raises(Corrupt, match="outputs that differ"):
        keepsake.recall(run)
    raw = bytearray((run / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (run / "model.safetensors").write_bytes(raw)
    with pytest.raises(Corrupt, match="digest"):
        keepsake.recall(run)


def test_a_run_under_way_is_no_network_yet(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="not finished"):
        keepsake.recall(tmp_path)
