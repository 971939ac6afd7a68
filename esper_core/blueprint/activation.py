"""Facts about the elementwise activations that a host may use and a blueprint may name. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping

NAMES = (
    "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "selu", "softplus", "relu6", "hardswish",
    "mish", "identity",
)  # fmt: skip
"""As torch has them, with their usual constants; ``gelu`` is the exact form, ``gelu_tanh`` its approximation."""

LEAKY_SLOPE = 0.01

MIRROR: Mapping[str, float] = {
    "relu": 1.0,
    "gelu": 1.0,
    "gelu_tanh": 1.0,
    "silu": 1.0,
    "leaky_relu": 1.0 + LEAKY_SLOPE,
    "softplus": 1.0,
    "hardswish": 1.0,
}
"""c where s(x) - s(-x) = c·x for every x: two mirrored units carry a linear map through the activation exactly."""

OPEN_AT_ZERO = frozenset({"gelu", "gelu_tanh", "silu", "tanh", "elu", "selu", "hardswish", "mish", "identity"})
"""s(0) = 0 with a slope of a half or more there: a zero passes unchanged and a gradient still comes back."""
