"""Feature maps as rows: the windows a convolution sees, and the way back."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import assume, example, given, settings
from torch import Tensor
from torch.nn import functional

from esper_core.blueprint.interface import ConvGeometry, Layout, SlotInterface
from esper_core.nn.rows import MAX_TAPS, entering_rows, inner_rows, leaving_map, leaving_rows

geometries = st.builds(
    ConvGeometry,
    kernel_h=st.integers(1, 4),
    kernel_w=st.integers(1, 3),
    stride_h=st.integers(1, 2),
    stride_w=st.integers(1, 3),
    padding_h=st.integers(0, 2),
    padding_w=st.integers(0, 1),
    dilation_h=st.integers(1, 2),
    dilation_w=st.integers(1, 2),
)


ONE = ConvGeometry(kernel_h=1, kernel_w=1, stride_h=2, stride_w=2, padding_h=2, padding_w=1)
WIDE = ConvGeometry(kernel_h=4, kernel_w=3, dilation_h=2, dilation_w=2)
"""Of these, the rows reach less far than the image's padding."""


def image(source: ConvGeometry, sink: ConvGeometry, channels: int = 2) -> SlotInterface | None:
    """A slot of these geometries over a 9×8 image; None when nothing would be left of it."""
    middle = source.leaving((9, 8))
    out = sink.leaving(middle)
    if min(*middle, *out) < 1:
        return None
    return SlotInterface(
        layout=Layout.IMAGE, in_width=channels, out_width=4, hidden_width=3, in_size=(9, 8), out_size=out,
        activation="relu", source=source, sink=sink, foldable=True,
    )  # fmt: skip


def convolved(x: Tensor, weight: Tensor, conv: ConvGeometry) -> Tensor:
    return functional.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation)


@settings(deadline=None, max_examples=80)
@given(geometries, geometries)
def test_inner_rows_times_weights_are_the_sinks_output(source: ConvGeometry, sink: ConvGeometry) -> None:
    interface = image(source, sink)
    assume(interface is not None)
    assert interface is not None
    inner = torch.randn(2, 3, *source.leaving((9, 8)), dtype=torch.float64)
    weight, bias = torch.randn(4, 3, *sink.kernel, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    z = convolved(inner, weight, sink) + bias[:, None, None]
    rows = inner_rows(inner, interface)
    found = rows @ torch.cat([weight.flatten(1).T, bias[None]])
    torch.testing.assert_close(found, leaving_rows(z, interface))
    assert torch.equal(leaving_map(leaving_rows(z, interface), z, interface), z)


@settings(deadline=None, max_examples=80)
@example(ONE, WIDE)
@given(geometries, geometries)
def test_entering_rows_are_the_sources_windows_on_the_grid_that_leaves(
    source: ConvGeometry, sink: ConvGeometry
) -> None:
    """What a unit of the source computes at every sink-stride-th place is a linear function of these rows."""
    interface = image(source, sink)
    assume(interface is not None)
    assert interface is not None
    entering = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    weight = torch.randn(5, 2, *source.kernel, dtype=torch.float64)
    grid = convolved(entering, weight, source)[:, :, :: sink.stride_h, :: sink.stride_w]
    found = entering_rows(entering, interface) @ weight.flatten(1).T
    height, width = (min(a, b) for a, b in zip(grid.shape[2:], interface.out_size, strict=True))
    maps = leaving_map(found, torch.empty(2, 5, *interface.out_size), interface)
    torch.testing.assert_close(maps[..., :height, :width], grid[..., :height, :width])


def test_very_wide_windows_are_read_at_their_centre() -> None:
    conv = ConvGeometry(kernel_h=3, kernel_w=3, padding_h=1, padding_w=1)
    channels = MAX_TAPS // 9 + 1
    interface = image(conv, conv, channels)
    assert interface is not None
    entering = torch.randn(2, channels, 9, 8)
    rows = entering_rows(entering, interface)
    assert torch.equal(rows, entering.permute(0, 2, 3, 1).flatten(0, 2))


def test_tokens_and_features_are_rows_already() -> None:
    tokens = SlotInterface(layout=Layout.TOKENS, in_width=6, out_width=4, hidden_width=3, activation="relu")
    x = torch.randn(2, 5, 6)
    assert torch.equal(entering_rows(x, tokens), x.reshape(10, 6))
    rows = inner_rows(x, tokens)
    assert torch.equal(rows[:, :6], x.reshape(10, 6))
    assert torch.equal(rows[:, 6], torch.ones(10))
    assert torch.equal(leaving_map(leaving_rows(x, tokens), x, tokens), x)


def test_where_no_single_convolution_stands_each_place_has_its_neighbourhood() -> None:
    blocks = SlotInterface(
        layout=Layout.IMAGE, in_width=2, out_width=3, hidden_width=3, in_size=(8, 8), out_size=(4, 4)
    )
    x = torch.randn(2, 2, 8, 8)
    wanted = functional.avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(entering_rows(x, blocks), wanted)
