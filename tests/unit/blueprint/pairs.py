"""A host's two layers with all that may stand between, and the proof that a fold is exact there."""

import copy

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_core.blueprint.build import ACTIVATIONS, KernelModule, build, example_input
from esper_core.blueprint.fold import Fold, fold_terms, units
from esper_core.blueprint.interface import BatchNorm, ConvGeometry, Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR


class Pair(nn.Module):
    """source → norm → activation → sink, in float64."""

    def __init__(self, interface: SlotInterface) -> None:
        super().__init__()
        i, self.activation = interface, interface.activation
        self.source = _layer(i.in_width, i.hidden_width, i.source, bias=not i.source_bias_free)
        self.norm = _norm(i)
        self.sink = _layer(i.hidden_width, i.out_width, i.sink, bias=not i.sink_bias_free)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.sink(ACTIVATIONS[self.activation](self.norm(self.source(x))))

    def widened(self, fold: Fold) -> "Pair":
        wide = copy.deepcopy(self)
        for layer, name, extra, dim in (
            (wide.source, "weight", fold.source_weight, 0),
            (wide.source, "bias", fold.source_bias, 0),
            (wide.sink, "weight", fold.sink_weight, 1),
        ):
            if getattr(layer, name) is None:
                assert not extra.any()  # it would be lost
            else:
                setattr(layer, name, nn.Parameter(torch.cat([getattr(layer, name).detach(), extra], dim)))
        if self.sink.bias is None:
            assert not fold.sink_bias.any()
        else:
            wide.sink.bias = nn.Parameter(self.sink.bias.detach() + fold.sink_bias)
        assert set(fold.norm) == {name for name, value in self.norm.state_dict().items() if value.ndim}
        for name, extra in fold.norm.items():
            longer = torch.cat([getattr(self.norm, name).detach(), extra])
            setattr(wide.norm, name, nn.Parameter(longer) if name in ("weight", "bias") else longer)
        return wide


def _layer(width: int, out: int, geometry: ConvGeometry | None, *, bias: bool) -> nn.Linear | nn.Conv2d:
    if geometry is None:
        return nn.Linear(width, out, bias=bias)
    g = geometry
    return nn.Conv2d(width, out, g.kernel, stride=g.stride, padding=g.padding, dilation=g.dilation, bias=bias)


def _norm(interface: SlotInterface) -> nn.Module:
    if interface.norm is None:
        return nn.Identity()
    make = nn.BatchNorm2d if interface.layout is Layout.IMAGE else nn.BatchNorm1d
    return lived(make(interface.hidden_width, **interface.norm.model_dump()))


def lived(norm: nn.Module) -> nn.Module:
    """Running statistics and affine parameters as after some training."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, value in norm.state_dict().items():
            if value.ndim:
                value.uniform_(0.5 if name in ("weight", "running_var") else -0.5, 1.5, generator=generator)
    return norm


def trained(kernel: KernelModule) -> KernelModule:
    """Stand-in for training: every weight is some number, the biases and the running statistics too."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.normal_(generator=generator)
        for name, buffer in kernel.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return kernel.double()


def assert_exact(interface: SlotInterface, ir: BlueprintIR, symbols: dict[str, int], alpha: float) -> None:
    host, kernel = Pair(interface), trained(build(ir, interface, symbols))
    fold = fold_terms(kernel, interface, alpha)
    assert fold is not None
    assert fold.units == units(ir, interface, symbols) == len(fold.source_weight) == fold.sink_weight.shape[1]
    x = example_input(interface, batch=5, seed=4).double()
    wide = host.widened(fold)
    for training in (False, True):  # in this order: running statistics move in training
        for module in (host, kernel, wide):
            module.train(training)
        with torch.no_grad():
            wanted = (bare := host(x)) + alpha * kernel(x)
            error = (wide(x) - wanted).abs().max()
            moved = (wanted - bare).abs().max()
        assert error <= 1e-10 * max(1.0, wanted.abs().max().item())
        assert moved > 1e-3  # otherwise nothing was proven
    for name in ("running_mean", "running_var"):
        if name in fold.norm:  # what the wide norm has learnt is what the two have
            norm = next(child for child in kernel.children() if isinstance(child, nn.modules.batchnorm._BatchNorm))
            learnt = getattr(norm, name) - (0 if name == "running_var" else absorbed(kernel, interface))
            torch.testing.assert_close(getattr(wide.norm, name), torch.cat([getattr(host.norm, name), learnt]))


def absorbed(kernel: KernelModule, interface: SlotInterface) -> Tensor | int:
    """The kernel's first bias where the host's source has none."""
    return dict(kernel.named_parameters()).get("A.bias", torch.zeros(1)).detach() if interface.source_bias_free else 0


NORMS = st.builds(
    BatchNorm,
    eps=st.sampled_from((1e-5, 1e-3, 0.1)),
    momentum=st.sampled_from((0.0, 0.1, 1.0)),
    affine=st.booleans(),
    track_running_stats=st.booleans(),
)


def centred(kernel: int, stride: int = 1, dilation: int = 1) -> ConvGeometry:
    pad = dilation * (kernel // 2)
    return ConvGeometry(
        kernel_h=kernel, kernel_w=kernel, stride_h=stride, stride_w=stride, padding_h=pad, padding_w=pad,
        dilation_h=dilation, dilation_w=dilation,
    )  # fmt: skip
