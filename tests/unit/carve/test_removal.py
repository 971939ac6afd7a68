"""Taking units out: whatever the geometry, the smaller network gives what the silenced one gives, or nothing is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_core.errors import Conflict
from esper_core.nn.carve.anatomy import dissect
from esper_core.nn.carve.removal import TOLERANCE, remove
from esper_core.nn.carve.sedation import Sedation
from tests.unit.carve.carved import Both, Encoder, Residual, batches, chain, convolutional, outputs, remembered, run_in

WIDTH = st.integers(2, 7)
NETS = st.one_of(
    st.builds(
        lambda widths, act, norm, bias: (chain(widths, act, norm, bias), (4,)),
        st.lists(WIDTH, min_size=1, max_size=3),
        st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU]),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(
        lambda channels, kernel, stride, norm: (convolutional(channels, kernel, stride, norm), (2, 8, 8)),
        st.lists(WIDTH, min_size=1, max_size=2),
        st.sampled_from([1, 3]),
        st.integers(1, 2),
        st.booleans(),
    ),
    st.builds(
        lambda *sizes: (Residual(*sizes), (2, 4, 4)), WIDTH, WIDTH, st.integers(1, 2), st.booleans(), st.booleans()
    ),
    st.builds(lambda width, ffn: (Encoder(width, ffn), (3, 4)), WIDTH, WIDTH),
    st.builds(lambda left, right: (Both(left, right), (4,)), WIDTH, WIDTH),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(net=NETS, seed=st.integers(0, 1000), data=st.data())
def test_the_smaller_network_equals_the_silenced_one(
    net: tuple[nn.Module, tuple[int, ...]], seed: int, data: st.DataObject
) -> None:
    model, shape = net
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    optimizer = run_in(model, shape=shape, seed=seed)
    inputs = batches(shape, 1, seed=seed + 1)[0][0]
    anatomy = dissect(model, (inputs[:2],))
    free = [cluster for cluster in anatomy.clusters.values() if not cluster.obstacle]
    assert free, {name: cluster.obstacle for name, cluster in anatomy.clusters.items()}
    sedations = []
    for cluster in free:
        units = data.draw(st.sets(st.integers(0, cluster.units - 1), max_size=cluster.units - 1))
        if units:
            sedations.append(Sedation(model, cluster, sorted(units)))
    for sedation in sedations:
        sedation.attach()
    expected = outputs(model, inputs)
    before = sum(parameter.numel() for parameter in model.parameters())
    memory = remembered(model, optimizer)
    keys = list(model.state_dict())
    removed = remove(model, optimizer, sedations, [(inputs,)])
    assert not any(sedation.asleep for sedation in sedations)
    assert (outputs(model, inputs) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert before - sum(parameter.numel() for parameter in model.parameters()) == removed.parameters
    assert list(model.state_dict()) == keys
    for name, kept in remembered(model, optimizer).items():
        moments, parameter = kept["exp_avg"], model.get_parameter(name)
        assert moments.shape == parameter.shape
        rows = torch.isin(memory[name]["exp_avg"], moments).sum() if moments.numel() else moments.numel()
        assert rows >= moments.numel()
        assert kept["step"] == memory[name]["step"]
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
    assert dissect(model, (inputs[:2],)).clusters.keys() == anatomy.clusters.keys()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(net=NETS)
def test_what_one_unit_costs_is_what_its_removal_frees(net: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = net
    inputs = batches(shape, 1, rows=4)[0][0]
    anatomy = dissect(model, (inputs,))
    for cluster in anatomy.clusters.values():
        if not cluster.obstacle:
            smaller = copy.deepcopy(model)
            removed = remove(smaller, None, [Sedation(smaller, cluster, [0])], [(inputs,)])
            assert removed.parameters == cluster.unit_parameters, cluster
            assert anatomy.flops - dissect(smaller, (inputs,)).flops == cluster.unit_flops, cluster


class Sneaky(nn.Module):
    """Reads its hidden units by another way, once it has been looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.honest = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        out: Tensor = self.second(hidden)
        return out if self.honest else out + hidden.sum(-1, keepdim=True)


class Failing(Sneaky):
    """Insists on its width, once it has been looked at."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if not self.honest:
            hidden = hidden.unflatten(-1, (2, 3)).flatten(-2)
        return self.second(torch.relu(hidden))


@pytest.mark.parametrize(
    ("kind", "reason"), [(Sneaky, "outputs differ by"), (Failing, "without the units the network fails")]
)
@pytest.mark.parametrize("asleep", [True, False])
def test_a_refused_removal_changes_nothing(kind: type[Sneaky], reason: str, asleep: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    optimizer = run_in(model)
    inputs = batches((4,), 1)[0][0]
    cluster = dissect(model, (inputs,)).clusters["first"]
    model.honest = False
    sedation = Sedation(model, cluster, [1, 4])
    if asleep:
        sedation.attach()
    tensors, memory, given = dict(model.named_parameters()), remembered(model, optimizer), outputs(model, inputs)
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    with pytest.raises(Conflict, match=reason):
        remove(model, optimizer, [sedation], [(inputs,)])
    assert sedation.asleep is asleep
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == {n: id(t) for n, t in tensors.items()}
    assert all(torch.equal(values[name], tensor) for name, tensor in model.named_parameters())
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    after = remembered(model, optimizer)
    assert after.keys() == memory.keys()
    assert all(torch.equal(after[n][k], memory[n][k]) for n in memory for k in memory[n])
    assert len(optimizer.state) == len(tensors)
    assert torch.equal(outputs(model, inputs), given)
    assert (model.first.out_features, model.second.in_features) == (6, 6)


def test_at_least_one_unit_stays() -> None:
    model = chain([2], nn.ReLU, norm=False, bias=True)
    inputs = batches((4,), 1)[0][0]
    cluster = dissect(model, (inputs,)).clusters["0"]
    with pytest.raises(Conflict, match="all 2 units of 0 would go"):
        remove(model, None, [Sedation(model, cluster, [0, 1])], [(inputs,)])
