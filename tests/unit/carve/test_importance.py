"""What units are worth: equal to closing each gate by hand, zero for what is dead, without leaving a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.errors import InvalidInput
from esper_core.nn.carve.anatomy import dissect
from esper_core.nn.carve.importance import KERNEL, weigh
from esper_core.nn.host import wrap
from tests.unit.carve.carved import LOSS, Residual, batches, chain, run_in
from tests.unit.nn.hosts import perceptron


@pytest.mark.parametrize(
    ("cluster", "columns"), [("stem", {"inner.0": 1, "inner.1": 1, "head": 16}), ("inner.1", {"outer.1": 1})]
)
def test_equal_to_scaling_every_reader_by_hand(cluster: str, columns: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Residual(channels=3, inner=4, blocks=2, norm=True, flat=True).double()
    data = [(inputs.double(), targets) for inputs, targets in batches((2, 4, 4), 3)]
    host = wrap(model, data[0][0][:2])
    worth = weigh(host, dissect(model, (data[0][0][:2],)), data, LOSS)[cluster]
    model.eval().requires_grad_(False)
    for unit in range(model.get_submodule(cluster).weight.shape[0]):
        losses = []
        for factor in (1 - 1e-5, 1 + 1e-5):
            scaled = copy.deepcopy(model)
            for path, width in columns.items():
                with torch.no_grad():
                    scaled.get_submodule(path).weight[:, unit * width : (unit + 1) * width] *= factor
            losses.append(torch.cat([LOSS(scaled(inputs), targets, reduction="none") for inputs, targets in data]))
        slopes = (losses[1] - losses[0]) / 2e-5
        assert worth.importance[unit] == pytest.approx(float(slopes.square().mean() / 2), abs=1e-7)
        assert worth.change[unit] == pytest.approx(float(slopes.square().mean() / 2 - slopes.mean()), abs=1e-7)


def test_what_is_never_active_is_worth_nothing() -> None:
    torch.manual_seed(0)
    model = chain([6], nn.ReLU, norm=False, bias=True)
    with torch.no_grad():
        model[0].bias[2] = -1e3
    data = batches((4,))
    host = wrap(model, data[0][0][:2])
    worth = weigh(host, dissect(model, (data[0][0][:2],)), data, LOSS)["0"]
    assert worth.importance[2] == 0
    assert all(value > 0 for unit, value in enumerate(worth.importance) if unit != 2)


def test_a_kernel_beside_the_host_is_weighed_whole() -> None:
    torch.manual_seed(0)
    model = perceptron(4, 5, 3).double()
    data = [(inputs.double(), targets) for inputs, targets in batches((4,))]
    host = wrap(model, data[0][0][:2])
    (slot,) = host.slots.values()
    graft = slot.bind(build(catalogue()["bottleneck_mlp"], slot.interface, {"width": 4}).double())
    for parameter in graft.kernel.parameters():
        nn.init.normal_(parameter, std=0.3)
    graft.alpha.fill_(0.7)
    graft.attach()
    worths = weigh(host, dissect(model, (data[0][0][:2],)), data, LOSS)
    assert set(worths) == {KERNEL + slot.name}  # the layers around it must keep their widths
    losses = []
    for alpha in (0.7 * (1 - 1e-5), 0.7 * (1 + 1e-5)):
        graft.alpha.fill_(alpha)
        with torch.no_grad():
            losses.append(torch.cat([LOSS(host(inputs), targets, reduction="none") for inputs, targets in data]))
    slopes = (losses[1] - losses[0]) / 2e-5
    found = worths[KERNEL + slot.name]
    assert found.importance[0] == pytest.approx(float(slopes.square().mean() / 2), abs=1e-7)
    assert found.change[0] == pytest.approx(float(slopes.square().mean() / 2 - slopes.mean()), abs=1e-7)
    assert not graft.kernel._forward_hooks


class Folded(nn.Module):
    """Reads positions as if they were samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.tanh(self.first(x)).flatten(0, 1)
        return self.second(rows).view(len(x), -1, 3).mean(1)


def test_where_rows_are_no_samples_the_mean_slope_counts() -> None:
    torch.manual_seed(0)
    model, data = Folded(), batches((2, 4), 1)
    worth = weigh(wrap(model, data[0][0][:2], spans=[]), dissect(model, (data[0][0][:2],)), data, LOSS)["first"]
    for importance, change in zip(worth.importance, worth.change, strict=True):
        assert importance == pytest.approx((importance - change) ** 2 / 2, rel=1e-5)


def test_measuring_leaves_no_trace() -> None:
    model = Residual(channels=3, inner=4, blocks=1, norm=True, flat=False)
    run_in(model, shape=(2, 4, 4))
    model.zero_grad()
    host = wrap(model, batches((2, 4, 4))[0][0][:2])
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    weigh(host, dissect(model, (batches((2, 4, 4))[0][0][:2],)), batches((2, 4, 4)), LOSS)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = perceptron(4, 5, 3)
    host = wrap(model, torch.randn(2, 4))
    anatomy = dissect(model, (torch.randn(2, 4),))
    with pytest.raises(InvalidInput, match="the loss on a probe batch is"):
        weigh(host, anatomy, batches((4,)), lambda outputs, _: outputs.sum() * float("nan"))
    with pytest.raises(InvalidInput, match="no batches"):
        weigh(host, anatomy, [], LOSS)
