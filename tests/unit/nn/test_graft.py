"""Blending: nothing at alpha 0, the algebra's gradients at any alpha, and a host that survives whatever a kernel does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from esper_core.errors import Conflict
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host, Slot
from tests.unit.nn.hosts import (
    CLASSES,
    LOSS,
    batches,
    gradients,
    make,
    perceptron,
    planted,
    wrapped,
    wrapped_perceptron,
)

BLUEPRINTS = {
    "mlp": "bottleneck_mlp",
    "cnn": "conv_bypass_3x3",
    "resnet": "depthwise_separable",
    "transformer": "attention_block",
}


def grafted(family: str, alpha: float = 1.0) -> tuple[Host, Slot, Graft]:
    host = wrapped(family, make(family))
    slot = next(iter(host.slots.values()))
    planted(slot, BLUEPRINTS[family])
    assert slot.graft is not None
    slot.graft.alpha.fill_(alpha)
    slot.graft.attach()
    return host, slot, slot.graft


def loss_and_gradients(host: Host, family: str) -> tuple[float, dict[str, Tensor | None]]:
    inputs, targets = batches(family, 1, seed=6)[0]
    host.zero_grad()
    torch.manual_seed(0)
    loss = LOSS(host(inputs), targets)
    loss.backward()
    return loss.item(), gradients(host)


@pytest.mark.parametrize("family", BLUEPRINTS)
@pytest.mark.parametrize("training", [True, False])
def test_insertion_at_alpha_zero_changes_nothing(family: str, training: bool) -> None:
    bare = wrapped(family, make(family)).train(training)
    host, _, _ = grafted(family, alpha=0.0)
    host.train(training)
    (loss, grads), (its_loss, its_grads) = loss_and_gradients(bare, family), loss_and_gradients(host, family)
    assert abs(loss - its_loss) <= 1e-6
    for name, gradient in grads.items():
        torch.testing.assert_close(its_grads[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", BLUEPRINTS)
def test_muted_is_without(family: str) -> None:
    host, slot, graft = grafted(family)
    host.eval()
    inputs, _ = batches(family, 1, seed=6)[0]
    with torch.no_grad():
        blended = host(inputs)
        graft.muted = True
        muted = host(inputs)
        graft.muted = False
        slot.release()
        assert torch.equal(muted, host(inputs))
        assert not torch.equal(blended, muted)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, 1.7])
def test_gradients_are_those_of_the_algebra(alpha: float) -> None:
    """z = V·s(U·h + u) + v + α(B·s(A·h + a) + b), with δ = ∂L/∂z: every gradient written out."""
    torch.manual_seed(1)
    model = perceptron(6, 7, 5, 4, CLASSES, activation=nn.Tanh).double()
    host = wrapped_perceptron(model, 6, 7, 5, 4, CLASSES, activation=nn.Tanh)
    slot = host.slots["2:4"]
    kernel = planted(slot, "bottleneck_mlp", width=3)
    assert slot.graft is not None
    slot.graft.alpha.fill_(alpha)
    slot.graft.attach()
    seen: dict[str, Tensor] = {}
    last = model[4].register_forward_hook(lambda _m, _i, z: seen.update(z=z))
    inputs, targets = batches("mlp", 1)[0]
    x = inputs.double().requires_grad_()
    loss = LOSS(host(x), targets)
    loss.backward(retain_graph=True)
    (delta,) = torch.autograd.grad(loss, seen["z"])
    last.remove()
    slot.graft.detach()  # from here on the layers are only arithmetic
    own = dict(kernel.named_parameters())
    first, source, sink = model[0], model[2], model[4]
    with torch.no_grad():
        h = torch.tanh(first(x))
        inner, unit = torch.tanh(source(h)), torch.tanh(h @ own["A.weight"].T + own["A.bias"])
        z = sink(inner) + alpha * (unit @ own["B.weight"].T + own["B.bias"])
        back_unit = alpha * (delta @ own["B.weight"]) * (1 - unit**2)
        back_inner = (delta @ sink.weight) * (1 - inner**2)
        back_h = (back_unit @ own["A.weight"] + back_inner @ source.weight) * (1 - h**2)
    wanted = [
        (seen["z"], z),
        (own["B.weight"].grad, alpha * delta.T @ unit),
        (own["B.bias"].grad, alpha * delta.sum(0)),
        (own["A.weight"].grad, back_unit.T @ h),
        (own["A.bias"].grad, back_unit.sum(0)),
        (sink.weight.grad, delta.T @ inner),
        (sink.bias.grad, delta.sum(0)),
        (source.weight.grad, back_inner.T @ h),
        (source.bias.grad, back_inner.sum(0)),
        (first.weight.grad, back_h.T @ x),
        (first.bias.grad, back_h.sum(0)),
        (x.grad, back_h @ first.weight),
    ]
    for found, formula in wanted:
        torch.testing.assert_close(found, formula, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["cnn", "transformer"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_gradients_are_those_of_finite_differences(family: str, alpha: float) -> None:
    host, _, graft = grafted(family, alpha)
    host.double().eval()
    graft.double()
    inputs, targets = batches(family, 1, size=8)[0]
    x = inputs.double()

    def loss() -> Tensor:
        return LOSS(host(x), targets)

    loss().backward()
    for parameter in [*host.parameters(), *graft.kernel.parameters()]:
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)).double()
        step, found = 1e-6, (parameter.grad * direction).sum().item()
        with torch.no_grad():
            parameter += step * direction
            above = loss().item()
            parameter -= 2 * step * direction
            below = loss().item()
            parameter += step * direction
        assert found == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-7)


def test_moving_alpha_rebuilds_nothing() -> None:
    host, _, graft = grafted("mlp")
    inputs, _ = batches("mlp", 1)[0]
    before = (graft.alpha, graft.alpha.data_ptr(), list(graft._hooks), [id(m) for m in graft.modules()])
    with torch.no_grad():
        outputs = []
        for alpha in (0.0, 0.5, 1.0):
            graft.alpha.fill_(alpha)
            outputs.append(host(inputs))
    after = (graft.alpha, graft.alpha.data_ptr(), list(graft._hooks), [id(m) for m in graft.modules()])
    assert after[0] is before[0]
    assert after[1:] == before[1:]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_moving_alpha_recompiles_nothing() -> None:
    host, _, graft = grafted("mlp", alpha=0.0)
    inputs, _ = batches("mlp", 1)[0]
    counter = CompileCounter()
    compiled = torch.compile(host, backend=counter)
    for alpha in (0.0, 0.3, 1.0):
        graft.alpha.fill_(alpha)
        torch.testing.assert_close(compiled(inputs), host(inputs))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_attaching_twice_blends_once() -> None:
    host, _, graft = grafted("mlp")
    inputs, _ = batches("mlp", 1)[0]
    with torch.no_grad():
        once = host(inputs)
        graft.attach()
        assert torch.equal(host(inputs), once)
    graft.detach()
    assert not graft.attached
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in host.modules())


def test_a_slot_has_one_kernel_at_a_time() -> None:
    _, slot, _ = grafted("mlp")
    with pytest.raises(Conflict) as caught:
        planted(slot, "bottleneck_mlp")
    assert caught.value.hint
    slot.release()
    slot.release()
    planted(slot, "bottleneck_mlp")


def test_a_kernel_is_no_part_of_the_host() -> None:
    bare = wrapped("mlp", make("mlp"))
    host, _, _ = grafted("mlp")
    assert list(host.state_dict()) == list(bare.state_dict()) == list(bare.model.state_dict())
    assert [name for name, _ in host.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert host.parameter_count == bare.parameter_count


def test_a_sink_called_on_its_own_is_left_alone() -> None:
    _, slot, graft = grafted("mlp")
    x = torch.randn(3, 8)
    with torch.no_grad():
        found = slot.sink(x)
        graft.detach()
        assert torch.equal(found, slot.sink(x))


def test_the_kernel_takes_dtype_and_place_of_the_host() -> None:
    host = wrapped("mlp", make("mlp").double())
    slot = host.slots["0:2"]
    planted(slot, "bottleneck_mlp")
    assert slot.graft is not None
    assert {parameter.dtype for parameter in slot.graft.kernel.parameters()} == {torch.float64}
    assert slot.graft.alpha.dtype == torch.float64
