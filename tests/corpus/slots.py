"""Slots to judge kernels at: rows, tokens and images, odd sizes, single units, norms of every kind."""

from __future__ import annotations

from esper_core.blueprint.interface import BatchNorm, ConvGeometry, Layout, SlotInterface

FEATURES = SlotInterface(layout=Layout.FEATURES, in_width=12, out_width=7, hidden_width=3, activation="relu")
TOKENS = SlotInterface(layout=Layout.TOKENS, in_width=12, out_width=12, hidden_width=3, activation="gelu")


def described(slot: SlotInterface) -> str:
    """A slot in a few words."""
    size = "×".join(map(str, slot.in_size))
    extras = [slot.activation, "batch norm" if slot.norm else "", "foldable" if slot.foldable else ""]
    return " ".join(
        filter(None, [slot.layout.name.lower(), f"{slot.in_width}→{slot.hidden_width}→{slot.out_width}", size, *extras])
    )


def _conv(kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> ConvGeometry:
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return ConvGeometry(**{f"{name}_{axis}": value for name, value in pairs.items() for axis in "hw"})


def _rows(width_in: int, width_out: int, activation: str, **more: object) -> SlotInterface:
    return SlotInterface.model_validate(
        {"layout": Layout.FEATURES, "in_width": width_in, "out_width": width_out, "hidden_width": 3}
        | {"activation": activation, **more}
    )


def _image(channels: tuple[int, int], size: tuple[int, int], source: ConvGeometry, sink: ConvGeometry, **more: object):
    leaving = sink.leaving(source.leaving(size))
    return SlotInterface.model_validate(
        {"layout": Layout.IMAGE, "in_width": channels[0], "out_width": channels[1], "hidden_width": 5}
        | {"in_size": size, "out_size": leaving, "source": source, "sink": sink, "activation": "relu", **more}
    )


SLOTS = (
    _rows(1, 1, "relu"),
    _rows(2, 33, "tanh", foldable=True),
    _rows(64, 64, "gelu", foldable=True),
    _rows(17, 10, "", source_bias_free=True),
    _rows(16, 10, "relu", foldable=True, norm=BatchNorm()),
    _rows(16, 10, "silu", norm=BatchNorm(affine=False, track_running_stats=False)),
    _rows(13, 5, "sigmoid", foldable=True, source_bias_free=True, sink_bias_free=True),
    TOKENS,
    SlotInterface(layout=Layout.TOKENS, in_width=16, out_width=16, hidden_width=64, activation="gelu", foldable=True),
    SlotInterface(
        layout=Layout.TOKENS, in_width=9, out_width=4, hidden_width=8, in_size=(5,), out_size=(5,), activation="silu"
    ),
    SlotInterface(
        layout=Layout.TOKENS, in_width=3, out_width=3, hidden_width=8, in_size=(1,), out_size=(1,), activation="relu"
    ),
    _image((3, 8), (8, 8), _conv(3, padding=1), _conv(3, padding=1), foldable=True),
    _image((3, 8), (9, 7), _conv(3, stride=2, padding=1), _conv(1), norm=BatchNorm(), foldable=True),
    _image((1, 5), (13, 11), _conv(5, padding=2), _conv(3, stride=2), norm=BatchNorm(momentum=0.01)),
    _image((16, 16), (5, 5), _conv(3, padding=2, dilation=2), _conv(3, padding=1)),
    SlotInterface(
        layout=Layout.IMAGE, in_width=4, out_width=6, hidden_width=3, in_size=(7, 9), out_size=(2, 3), activation="silu"
    ),
)
"""Rows, tokens and images; odd sizes, single units, norms of every kind, layers without bias."""
