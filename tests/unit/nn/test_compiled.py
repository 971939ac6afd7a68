"""Under ``torch.compile``: a dormant host is the bare one op for op, and a compiled host follows whatever its grafts do."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from esper_core.nn.mark import mark, unmark
from tests.unit.nn.graphs import Recorder, differentiated, fresh_compiler
from tests.unit.nn.hosts import LOSS, batches, gradients, make, perceptron, planted, wrapped, wrapped_perceptron
from tests.unit.nn.test_broken_kernels import BadGradient, Says, slot_with
from tests.unit.nn.test_graft import BLUEPRINTS, grafted

Compiled = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    fresh_compiler()
    yield
    fresh_compiler()


def stepped(compiled: Compiled, family: str) -> None:
    inputs, targets = batches(family, 1)[0]
    LOSS(compiled(inputs), targets).backward()


@pytest.mark.parametrize("family", BLUEPRINTS)
def test_a_dormant_host_compiles_to_the_bare_model_op_for_op(family: str) -> None:
    captured, derived = [], []
    for module in (make(family), wrapped(family, make(family))):
        for found, backend in ((captured, lambda recorder: recorder), (derived, differentiated)):
            fresh_compiler()
            recorder = Recorder()
            stepped(torch.compile(module, backend=backend(recorder)), family)
            found.append(recorder.graphs)
    assert [len(graphs) for graphs in captured] == [1, 1]
    assert [len(graphs) for graphs in derived] == [2, 2]  # forward and backward
    assert captured[0] == captured[1]
    assert derived[0] == derived[1]


@pytest.mark.parametrize("family", BLUEPRINTS)
def test_ten_alphas_are_trained_through_one_graph(family: str) -> None:
    host, _, graft = grafted(family, alpha=0.0)
    twin, _, its = grafted(family, alpha=0.0)
    recorder = Recorder()
    compiled = torch.compile(host, backend=recorder)
    inputs, targets = batches(family, 1)[0]
    for step in range(11):
        for module, model, part in ((compiled, host, graft), (twin, twin, its)):
            part.alpha.fill_(step / 10)
            model.zero_grad()
            torch.manual_seed(step)
            LOSS(module(inputs), targets).backward()
        found, wanted = gradients(host), gradients(twin)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert len(recorder.graphs) == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def compiled_whole(host: Any, _slot: Any, backend: Recorder) -> Compiled:
    return torch.compile(host, backend=backend)  # type: ignore[no-any-return]


def compiled_model(host: Any, _slot: Any, backend: Recorder) -> Compiled:
    return torch.compile(host.model, backend=backend)  # type: ignore[no-any-return]


def compiled_in_place(host: Any, _slot: Any, backend: Recorder) -> Compiled:
    host.compile(backend=backend)
    return host  # type: ignore[no-any-return]


def compiled_ends(host: Any, slot: Any, backend: Recorder) -> Compiled:
    slot.source.compile(backend=backend)
    slot.sink.compile(backend=backend)
    return host  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *((family, compiled_whole) for family in BLUEPRINTS),
        ("mlp", compiled_model),
        ("transformer", compiled_in_place),
        ("cnn", compiled_ends),
    ],
)
def test_a_host_compiled_before_follows_its_graft(family: str, way: Callable[..., Compiled]) -> None:
    host, slot, graft = grafted(family)
    graft.detach()
    host.eval()
    recorder = Recorder()
    compiled = way(host, slot, recorder)
    inputs, _ = batches(family, 1)[0]

    @torch.no_grad()
    def seen() -> Tensor:
        result = compiled(inputs)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(result, host(inputs))
        return result

    dormant = seen()
    graphs = len(recorder.graphs)
    graft.attach()
    blended = seen()
    assert not torch.equal(blended, dormant)
    graft.alpha.fill_(0.5)
    assert not torch.equal(seen(), blended)
    after = len(recorder.graphs)
    assert after > graphs
    graft.detach()
    assert torch.equal(seen(), dormant)
    assert len(recorder.graphs) == after  # what was compiled while it was dormant serves again


def test_a_second_graft_between_two_others_is_seen() -> None:
    widths = (6, 5, 5, 5, 5, 4)
    host = wrapped_perceptron(perceptron(*widths), *widths).eval()
    first, between, last = list(host.slots.values())[:3]
    grafts = []
    for slot in (first, last, between):
        planted(slot, "bottleneck_mlp")
        assert slot.graft is not None
        slot.graft.alpha.fill_(1)
        grafts.append(slot.graft)
    assert {first.sink, last.source} == {between.source, between.sink}
    compiled = torch.compile(host, backend=Recorder())
    inputs, _ = batches("mlp", 1)[0]
    for act in (grafts[0].attach, grafts[1].attach, grafts[2].attach, grafts[0].detach, grafts[2].detach):
        act()
        torch.testing.assert_close(compiled(inputs), host(inputs))
    grafts[1].detach()
    assert all("forward" not in module.__dict__ for module in host.modules())


@pytest.mark.parametrize("kernel", [partial(Says, float("nan")), BadGradient], ids=["nan", "bad gradient"])
def test_compiled_a_broken_kernel_is_left_out_and_counted_as_ever(kernel: Callable[[], nn.Module]) -> None:
    (host, graft), (twin, its) = slot_with(kernel()), slot_with(kernel())
    inputs, targets = batches("mlp", 1)[0]
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)
    for count in (1, 2):
        for module, model in ((compiled, host), (twin, twin)):
            model.zero_grad()
            LOSS(module(inputs), targets).backward()
        assert graft.errors == its.errors == count
        for name, gradient in gradients(twin).items():
            torch.testing.assert_close(gradients(host)[name], gradient)


def test_a_mark_leaves_no_trace_and_a_foreign_forward_stays() -> None:
    module, x = nn.Linear(3, 2), torch.ones(1, 3)
    plain = module(x)
    unmark(module)
    mark(module)
    mark(module)
    assert torch.equal(module(x), plain)
    assert inspect.signature(module.forward) == inspect.signature(nn.Linear.forward.__get__(module))
    torch.testing.assert_close(torch.export.export(module, (), {"input": x}).module()(input=x), plain)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.zero_()
        assert torch.equal(twin(x)[0], twin.bias)  # it runs its own weights, not those it was copied from
    unmark(module)
    assert "forward" not in module.__dict__
    module.forward = foreign = lambda given: given * 2  # type: ignore[method-assign]
    mark(module)
    assert torch.equal(module(x), x * 2)
    unmark(module)
    assert module.__dict__["forward"] is foreign
