"""Feature maps as rows: one row per sample, token or image position, so that every layout meets the same algebra."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from esper_core.blueprint.interface import ConvGeometry, Layout, SlotInterface

MAX_TAPS = 1024
"""Widest patch row; beyond it only the centre tap of a patch is used, so that the algebra stays cheap."""


def entering_rows(tensor: Tensor, interface: SlotInterface) -> Tensor:
    """What a kernel could read, (rows, features): the source's patches on the grid that leaves the span."""
    if interface.layout is not Layout.IMAGE:
        return tensor.flatten(0, -2)
    if interface.source is None or interface.sink is None:
        return _pooled(tensor, interface.out_size)
    stride = (
        interface.source.stride_h * interface.sink.stride_h,
        interface.source.stride_w * interface.sink.stride_w,
    )
    return _patches(tensor, interface.source, stride, interface.out_size)


def inner_rows(tensor: Tensor, interface: SlotInterface) -> Tensor:
    """What the sink reads, (rows, features + 1): its patches and a one for its bias."""
    if interface.layout is not Layout.IMAGE:
        rows = tensor.flatten(0, -2)
    elif interface.sink is None:
        rows = _pooled(tensor, interface.out_size)
    else:
        rows = _patches(tensor, interface.sink, interface.sink.stride, interface.out_size)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def leaving_rows(tensor: Tensor, interface: SlotInterface) -> Tensor:
    """What leaves the sink, (rows, features)."""
    if interface.layout is not Layout.IMAGE:
        return tensor.flatten(0, -2)
    return tensor.permute(0, 2, 3, 1).flatten(0, 2)


def leaving_map(rows: Tensor, like: Tensor, interface: SlotInterface) -> Tensor:
    """Inverse of ``leaving_rows``: rows back in the shape of ``like``."""
    if interface.layout is not Layout.IMAGE:
        return rows.reshape(like.shape)
    batch, channels, height, width = like.shape
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _pooled(tensor: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(batch · grid positions, channels): each position's own neighbourhood, where no single convolution says which."""
    return functional.adaptive_avg_pool2d(tensor, (grid[0], grid[1])).permute(0, 2, 3, 1).flatten(0, 2)


def _patches(tensor: Tensor, conv: ConvGeometry, stride: tuple[int, int], grid: tuple[int, ...]) -> Tensor:
    """(batch · grid positions, channels · taps). Positions outside the image are zero, as the convolution sees them."""
    channels = tensor.shape[1]
    kernel, padding, dilation = conv.kernel, conv.padding, conv.dilation
    if channels * kernel[0] * kernel[1] > MAX_TAPS:
        centre = tuple(d * (k - 1) // 2 - p for k, p, d in zip(kernel, padding, dilation, strict=True))
        tensor = tensor[:, :, max(centre[0], 0) :, max(centre[1], 0) :]
        kernel, padding, dilation = (1, 1), (max(-centre[0], 0), max(-centre[1], 0)), (1, 1)
    reach = [d * (k - 1) + 1 + s * (g - 1) for k, s, d, g in zip(kernel, stride, dilation, grid, strict=True)]
    size = tensor.shape[2:]
    after = [max(0, r - n - p) for r, n, p in zip(reach, size, padding, strict=True)]
    padded = functional.pad(tensor, (padding[1], after[1], padding[0], after[0]))[:, :, : reach[0], : reach[1]]
    unfolded = functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    return unfolded.transpose(1, 2).flatten(0, 1)
