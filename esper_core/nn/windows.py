"""The windows of the host's convolutions, as numbers; and which layers can take further units at all."""

from __future__ import annotations

from torch import nn

from esper_core.blueprint.interface import ConvGeometry


def geometry(conv: nn.Conv2d) -> ConvGeometry:
    """Its geometry; paddings given as words become numbers, the smaller one where the two sides differ."""
    padding = _padding(conv)
    return ConvGeometry(
        kernel_h=conv.kernel_size[0],
        kernel_w=conv.kernel_size[1],
        stride_h=conv.stride[0],
        stride_w=conv.stride[1],
        padding_h=padding[0] // 2,
        padding_w=padding[1] // 2,
        dilation_h=conv.dilation[0],
        dilation_w=conv.dilation[1],
        groups=conv.groups,
    )


def entering(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what enters the module, from that of what its operation reads: padding other than with zeros is done in between."""
    if isinstance(layer, nn.Linear) or layer.padding_mode == "zeros":
        return shape
    return (*shape[:-2], *(size - both for size, both in zip(shape[-2:], _padding(layer), strict=True)))


def unwidenable(layer: nn.Linear | nn.Conv2d, side: str) -> str:
    """Why the layer, at that side of a span, could not take units that the same kernel would have; empty when it could."""
    if isinstance(layer, nn.Linear):
        return ""
    if layer.groups != 1:
        return f"the {side} convolution has {layer.groups} groups, and a new unit would belong to one of them only"
    if layer.padding_mode != "zeros":
        return f"the {side} convolution pads by {layer.padding_mode}, a kernel with zeros"
    if any(both % 2 for both in _padding(layer)):
        return f"the {side} convolution pads its two sides unequally"
    return ""


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """(rows, columns) added in all, both sides together."""
    if isinstance(conv.padding, str):
        same = conv.padding == "same"
        h, w = (d * (k - 1) * same for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return h, w
    return 2 * int(conv.padding[0]), 2 * int(conv.padding[1])
