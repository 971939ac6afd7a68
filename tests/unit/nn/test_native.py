"""Compiled code in the place of a module's own forward: equal gradients, never given what it was not compiled for.

One kernel is compiled, really, for all tests here; that takes most of their time.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule, build, example_input
from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout as SlotLayout
from esper_core.blueprint.interface import SlotInterface
from esper_core.control.grower import Grower
from esper_core.control.roles import LoadedKernel
from esper_core.errors import Corrupt, Untrusted
from esper_core.lifecycle import State
from esper_core.nn.graft import Graft
from esper_core.nn.host import wrap
from esper_core.nn.native import NOT_BACK, PARITY_LIMIT, Forward, Native, Passes, pack, parity, unpack
from services.tezzeret.native import ROWS_TAKEN, compiled
from tests.unit.control.growing import QUICK, Given, Silent, order

ROWS = 16
SPAN = "0:2"
SLOT = SlotInterface(layout=SlotLayout.FEATURES, in_width=12, out_width=7, hidden_width=3, activation="relu")


def kernel(seed: int = 0, width: int = 5) -> KernelModule:
    """Awake: no parameter is zero."""
    module = build(catalogue()["bottleneck_mlp"], SLOT, {"width": width}, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return module


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """The native part of ``kernel()``, whatever its weights are."""
    settings = {"TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            yield compiled(kernel(), example_input(SLOT, ROWS, seed=0))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])]


def test_outputs_and_every_gradient_equal_the_eager_ones_while_it_trains(blob: bytes) -> None:
    native, passes, eager, ours = Native(blob), Passes(), kernel(), kernel()
    assert 0 <= parity(native, ours, ROWS) <= PARITY_LIMIT
    native.attach(ours, passes)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (eager, ours)]
    sizes = (ROWS, 2, 3 * ROWS + 1, 7, 256)
    for number, rows in enumerate(sizes):
        x = example_input(SLOT, rows, seed=number)
        for a, b in zip(gradients(eager, x), gradients(ours, x), strict=True):
            torch.testing.assert_close(a, b, rtol=PARITY_LIMIT, atol=PARITY_LIMIT)
        for module, optimizer in zip((eager, ours), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert passes == Passes(native=2 * len(sizes), gradients=2 * len(sizes))
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_it_was_not_compiled_for_is_computed_by_the_module_and_counted(blob: bytes) -> None:
    native, passes, eager, ours = Native(blob), Passes(), kernel(), kernel()
    native.attach(ours, passes)
    fewest, most = native.layout.rows
    assert (fewest, most) == ROWS_TAKEN
    x = example_input(SLOT, ROWS, seed=3)
    refused = {
        f"a batch of {fewest - 1} rows": x[: fewest - 1],
        f"a batch of {most + 1} rows": torch.zeros(most + 1, SLOT.in_width),
        "strides (1, 16)": x.t().contiguous().t(),
    }
    for number, (why, other) in enumerate(refused.items(), start=1):
        assert torch.equal(ours(other), eager(other))
        assert passes.eager == number
        assert why in passes.why
    eager.double(), ours.double()
    assert torch.equal(ours(x.double()), eager(x.double()))
    assert "float64" in passes.why
    eager.float(), ours.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert passes.why == "autocast"
    turned = torch.randn(5, 12).t().contiguous().t()  # the same shape, other strides
    ours.get_submodule("A").weight = nn.Parameter(turned)
    ours(x)
    assert passes.why == "A.weight is no longer as it was"
    assert (passes.native, passes.gradients, passes.eager) == (0, 0, 6)


def test_it_is_only_attached_to_a_module_that_it_computes(blob: bytes) -> None:
    native = Native(blob)
    with pytest.raises(Corrupt, match="another module"):
        native.attach(kernel(width=6), Passes())
    other = build(catalogue()["bottleneck_mlp"], SLOT.model_copy(update={"activation": "tanh"}), {"width": 5})
    with pytest.raises(Corrupt, match="differs"):
        native.attach(other, Passes())
    assert "forward" not in vars(other)


def test_a_graft_and_copies_of_its_kernel_run_natively(blob: bytes) -> None:
    passes, module = Passes(), kernel()
    Native(blob).attach(module, passes)
    source, sink = nn.Linear(12, 12), nn.Linear(12, 7)
    graft = Graft(source, sink, module, like=sink.weight)
    graft.attach()
    graft.alpha.fill_(1.0)
    x = example_input(SLOT, ROWS, seed=1)
    blended = sink(source(x))
    assert passes.native == 1
    torch.testing.assert_close(blended, nn.functional.linear(source.forward(x), sink.weight, sink.bias) + module(x))
    again = copy.deepcopy(module)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)
    copied = again.forward
    assert isinstance(copied, Forward)
    again(x)
    assert (passes.native, copied.passes.native) == (3, 4)  # what a copy does, counts for itself
    with torch.no_grad():
        again.get_parameter("B.bias").add_(1.0)
    assert not torch.equal(again(x), module(x))


def loaded(native: Native) -> LoadedKernel:
    module = build(catalogue()["bottleneck_mlp"], SLOT, {"width": 5}, 0)
    return LoadedKernel("kernel-1", module.ir, SLOT, {"width": 5}, dict(module.state_dict()), native)


def growing(source: Given) -> Grower:
    """A grower over a fresh host whose one slot the kernel fits."""
    torch.manual_seed(0)
    host = wrap(nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 7)), torch.zeros(2, 12))
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 12, generator=draw), torch.randn(8, 7, generator=draw)) for _ in range(4)]
    return Grower(
        host, torch.optim.Adam(host.parameters(), 1e-3), nn.functional.mse_loss, probe=data, validation=data,
        settings=QUICK, controller=Silent(), source=source,
    )  # fmt: skip


def grafted(native: Native) -> Grower:
    """Its seed has learnt natively and is blended in."""
    grower = growing(Given(loaded(native)))
    grower.command(order(SPAN, State.GERMINATED, kernel_id="kernel-1"))
    for epoch in range(10):
        grower.step(epoch, train_loss=1.0)
        if grower.seeds[0].state is State.GRAFTING:
            return grower
    raise AssertionError(grower.seeds[0].state)


def test_a_resumed_seed_counts_what_is_eager_until_its_compiled_code_is_back(blob: bytes) -> None:
    native = Native(blob)
    before = grafted(native)
    (seed,) = before.seeds
    assert seed.execution == "native"
    assert seed.passes.gradients > 0
    source = Given(None)
    after = growing(source)
    after.load_state_dict(before.state_dict())
    (again,) = after.seeds
    assert (again.native, again.passes) == (True, seed.passes)
    x, had = torch.ones(4, 12), again.passes.native
    eager = after.plot.host(x)
    assert (again.passes.native, again.passes.eager) == (had, seed.passes.eager + 1)
    assert again.execution == f"native, but for {NOT_BACK}"
    source.kernel = loaded(native)
    after.step(20, train_loss=1.0)
    graft, was = after.plot.host.slots[SPAN].graft, before.plot.host.slots[SPAN].graft
    assert graft is not None
    assert was is not None
    graft.alpha.copy_(was.alpha)
    had, left = again.passes.native, again.passes.eager
    torch.testing.assert_close(after.plot.host(x), eager)
    assert (again.passes.native, again.passes.eager) == (had + 1, left)


def test_compiled_code_that_never_comes_back_is_told_and_what_it_did_stays_told(blob: bytes) -> None:
    before = grafted(Native(blob))
    after = growing(Given(Untrusted("its key was revoked")))
    after.load_state_dict(before.state_dict())
    event = after.step(20, train_loss=1.0).events[0]
    assert event.execution == "eager: its key was revoked"
    assert event.measurements["native_gradients"] == before.seeds[0].passes.gradients > 0


def test_compiled_code_that_comes_back_after_its_seed_has_ended_is_not_asked_for(blob: bytes) -> None:
    before, source = grafted(Native(blob)), Given(None)
    after = growing(source)
    after.load_state_dict(before.state_dict())
    after.command(order(SPAN, State.ROLLED_BACK))
    assert after.step(20, train_loss=1.0).events[-1].target is State.ROLLED_BACK
    source.kernel = Untrusted("nobody asks")
    after.step(21, train_loss=1.0)
    assert after.seeds[0].eager == ""


def test_gradients_of_gradients_are_refused_rather_than_wrong(blob: bytes) -> None:
    module = kernel()
    Native(blob).attach(module, Passes())
    x = example_input(SLOT, ROWS, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_a_damaged_blob_is_refused(blob: bytes) -> None:
    layout, forward, backward = unpack(blob)
    assert pack(layout, forward, backward) == blob
    for broken in (b"", b"x" + blob, blob[:-1], blob + b"x", blob[:12] + b"\xff\xff\xff\xff" + blob[16:]):
        with pytest.raises(Corrupt):
            unpack(broken)
    with pytest.raises(Corrupt):
        unpack(blob[:16] + b"[" + blob[17:])
    short = layout.model_copy(update={"forward_bytes": 100, "backward_bytes": 100})
    with pytest.raises(Corrupt, match="cannot be loaded"):
        Native(pack(short, forward[:100], backward[:100]))
