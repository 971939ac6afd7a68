"""Silencing: read as zero everywhere, no gradient, no key of the state, and undone bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_core.nn.carve.anatomy import dissect
from esper_core.nn.carve.sedation import Sedation
from tests.unit.carve.carved import LOSS, Residual, batches, chain, outputs, remembered, run_in

SHAPE = (2, 4, 4)


def residual() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Residual(channels=5, inner=4, blocks=2, norm=True, flat=True)
    return model, run_in(model, shape=SHAPE)


def sedated(model: nn.Module, cluster: str, units: list[int]) -> Sedation:
    inputs = batches(SHAPE, 1)[0][0]
    return Sedation(model, dissect(model, (inputs,)).clusters[cluster], units)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cluster", ["stem", "inner.1"])
def test_undone_bit_for_bit(training: bool, cluster: str) -> None:
    model, _ = residual()
    model.train(training)
    twin, inputs = copy.deepcopy(model), batches(SHAPE, 1)[0][0]
    keys = list(model.state_dict())
    sedation = sedated(model, cluster, [1, 2])
    sedation.attach()
    assert not torch.equal(outputs(model, inputs), outputs(twin, inputs))  # in evaluation mode: batch norms see nothing
    assert list(model.state_dict()) == keys
    sedation.detach()
    assert torch.equal(model(inputs), twin(inputs))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_silenced_units_get_no_gradient_and_send_none() -> None:
    model, _ = residual()
    sedation = sedated(model, "inner.0", [0, 3])
    sedation.attach()
    inputs, targets = batches(SHAPE, 1)[0]
    model.zero_grad()
    LOSS(model(inputs), targets).backward()
    assert model.inner[0].weight.grad[[0, 3]].abs().max() == 0
    assert model.norms[0].weight.grad[[0, 3]].abs().max() == 0
    assert model.outer[0].weight.grad[:, [0, 3]].abs().max() == 0
    assert model.inner[0].weight.grad[[1, 2]].abs().min() > 0


def test_a_silenced_nan_is_silent() -> None:
    model, _ = residual()
    sedation = sedated(model, "inner.0", [2])
    with torch.no_grad():
        model.inner[0].weight[2] = float("nan")
    inputs = batches(SHAPE, 1)[0][0]
    assert outputs(model, inputs).isnan().any()
    sedation.attach()
    assert outputs(model, inputs).isfinite().all()


def test_waking_gives_units_and_their_moments_back_and_leaves_the_rest() -> None:
    model, optimizer = residual()
    sedation = sedated(model, "stem", [0, 4])
    weights, moments = copy.deepcopy(model.state_dict()), remembered(model, optimizer)
    kept = sedation.keep(optimizer)
    sedation.attach()
    for inputs, targets in batches(SHAPE, 3, seed=5):
        optimizer.zero_grad()
        LOSS(model(inputs), targets).backward()
        optimizer.step()  # momentum and weight decay move the silenced ones too
    assert not torch.equal(model.stem.weight[0], weights["stem.weight"][0])
    trained = copy.deepcopy(model.state_dict())
    sedation.detach()
    sedation.put_back(kept, optimizer)
    assert torch.equal(model.stem.weight[[0, 4]], weights["stem.weight"][[0, 4]])
    assert torch.equal(model.inner[1].weight[:, [0, 4]], weights["inner.1.weight"][:, [0, 4]])
    assert torch.equal(model.head.weight[:, :16], weights["head.weight"][:, :16])
    assert torch.equal(model.stem.weight[1:4], trained["stem.weight"][1:4])
    assert torch.equal(model.inner[1].weight[:, 1:4], trained["inner.1.weight"][:, 1:4])
    now = remembered(model, optimizer)
    assert torch.equal(now["stem.weight"]["exp_avg"][[0, 4]], moments["stem.weight"]["exp_avg"][[0, 4]])
    assert not torch.equal(now["stem.weight"]["exp_avg"][1], moments["stem.weight"]["exp_avg"][1])


def test_units_wake_in_a_layer_that_has_grown_meanwhile() -> None:
    model = chain([4, 4], nn.ReLU, norm=False, bias=True)
    inputs = torch.randn(3, 4)
    sedation = Sedation(model, dissect(model, (inputs,)).clusters["0"], [1])
    kept = sedation.keep(None)
    sedation.attach()
    before = outputs(model, inputs)
    reader = model[2]
    reader.weight = nn.Parameter(torch.cat([reader.weight, torch.randn(2, 4)]))  # a row more is another's business
    model[4].weight = nn.Parameter(torch.cat([model[4].weight, torch.zeros(3, 2)], 1))
    reader.bias = nn.Parameter(torch.cat([reader.bias, torch.zeros(2)]))
    assert torch.allclose(outputs(model, inputs), before)
    with torch.no_grad():
        reader.weight[:, 1] = 7
    sedation.detach()
    sedation.put_back(kept, None)
    assert torch.equal(reader.weight[:4, 1], kept["reads 2.weight"][""][:, 0])
    assert (reader.weight[4:, 1] == 7).all()


def test_a_compiled_network_follows() -> None:
    model = chain([4, 4], nn.ReLU, norm=False, bias=True).eval()
    inputs = torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(inputs)
        sedation = Sedation(model, dissect(model, (inputs,)).clusters["0"], [0, 1, 2])
        sedation.attach()
        assert torch.equal(compiled(inputs), model(inputs))
        assert not torch.equal(compiled(inputs), before)
        sedation.detach()
        assert torch.equal(compiled(inputs), before)
