"""Slots of every layout, foldable and not."""

import pytest

from esper_core.blueprint.interface import BatchNorm, ConvGeometry, Layout, SlotInterface

WINDOW = ConvGeometry(kernel_h=3, kernel_w=3, padding_h=1, padding_w=1)
STRIDED = WINDOW.model_copy(update={"stride_h": 2, "stride_w": 2})
PLAIN = ConvGeometry(kernel_h=3, kernel_w=3)


def _rows(layout: Layout, activation: str, *, foldable: bool = True, tokens: tuple[int, ...] = ()) -> SlotInterface:
    return SlotInterface(
        layout=layout,
        in_width=12,
        out_width=10,
        hidden_width=3,
        in_size=tokens,
        out_size=tokens,
        activation=activation,
        foldable=foldable,
    )


def _image(
    source: ConvGeometry, sink: ConvGeometry, out: int, activation: str, *, foldable: bool = True
) -> SlotInterface:
    return SlotInterface(
        layout=Layout.IMAGE,
        in_width=4,
        out_width=6,
        hidden_width=3,
        in_size=(9, 8),
        out_size=(out, out - 1) if foldable else (out, out),
        activation=activation,
        source=source,
        sink=sink,
        foldable=foldable,
    )


INTERFACES = {
    "features": _rows(Layout.FEATURES, "relu"),
    "features-identity": _rows(Layout.FEATURES, "identity"),
    "features-unknown": _rows(Layout.FEATURES, "", foldable=False),
    "tokens": _rows(Layout.TOKENS, "gelu"),
    "tokens-counted": _rows(Layout.TOKENS, "gelu_tanh", tokens=(5,)),
    "image": _image(WINDOW, WINDOW, 9, "silu"),
    "image-strided": _image(STRIDED, WINDOW, 5, "relu"),
    "image-unpadded": _image(PLAIN, PLAIN, 5, "relu"),
    "image-pooled": _image(WINDOW, WINDOW, 4, "", foldable=False),
}


_FREE = {"source_bias_free": True, "sink_bias_free": True}
INTERFACES |= {
    "features-free": INTERFACES["features"].model_copy(update=_FREE),
    "features-norm": INTERFACES["features"].model_copy(update={"norm": BatchNorm()}),
    "image-norm": INTERFACES["image-strided"].model_copy(update=_FREE | {"norm": BatchNorm(affine=False)}),
}


@pytest.fixture(params=INTERFACES.values(), ids=INTERFACES.keys())
def interface(request: pytest.FixtureRequest) -> SlotInterface:
    """One after the other."""
    return request.param


@pytest.fixture
def features() -> SlotInterface:
    """(batch, 12) → (batch, 10) over three relu units."""
    return INTERFACES["features"]
