"""The benchmark phase: what one batch through a kernel costs on this machine. In the child only.

Every figure is taken from the artifact itself, on one thread. Times are wall-clock and so include whatever else the
machine is doing; the median bears that, the 99th percentile shows it.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.interface import Layout
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import Measurement, RejectionReason
from services.sandbox import peak_memory, target
from services.urabrask.finding import Unfit
from services.urabrask.safety import Make, awaken, gradient_norm, gradients, shapes

REPETITIONS = 30
WARM_UP = 3
BATCHES = (64, 8, 1)
UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    )
}
"""Operations that torch's counter passes over, by their shapes: (batch, heads, tokens, features) each."""
BATCH_BYTES = 1 << 30
"""The largest batch whose activations stay below this is measured."""


def batch_for(activation_elements: int) -> int:
    """Rows to measure with: 64 unless one forward and backward pass would then hold more than ``BATCH_BYTES``."""
    per_row = activation_elements * 4 * 3  # float32; output, gradient and a temporary of each
    return next((rows for rows in BATCHES if rows * per_row <= BATCH_BYTES), BATCHES[-1])


def measure(make: Make, manifest: KernelManifest, batch: int) -> Measurement:
    """Time ``batch`` rows, ``REPETITIONS`` times forward and as often forward and backward, and look at the gradient.

    Raises:
        Unfit: MANIFEST: it computes more than its papers say.
    """
    enters, _ = shapes(manifest.interface)
    x = torch.randn(batch, *enters, generator=torch.Generator().manual_seed(3))
    # One row alone has no variance between rows; a kernel that normalises by batch is then timed as in evaluation.
    module = awaken(make()).train(batch > 1)
    with peak_memory() as peak:
        backward = _timed(lambda: gradients(module, x), WARM_UP + REPETITIONS)[WARM_UP:]
    forward = _timed(lambda: _forward(module, x), WARM_UP + REPETITIONS)[WARM_UP:]
    first, at_input, found = gradients(module, x)
    second, _, _ = gradients(module, x)
    return Measurement(
        batch=batch,
        forward_seconds=statistics.median(forward),
        forward_seconds_p99=_p99(forward),
        backward_seconds=statistics.median(backward),
        backward_seconds_p99=_p99(backward),
        rows_per_second=batch * len(forward) / sum(forward),
        peak_memory_bytes=peak[0],
        counted_flops=counted(module, x, manifest),
        precision_drift=_drift(module, x),
        gradient_norm=gradient_norm(found),
        input_gradient_norm=gradient_norm([at_input]),
        gradient_ratio=_ratio(module, found),
        deterministic=torch.equal(first, second),
        repetitions=REPETITIONS,
        target=target(),
    )


def claimed_flops(manifest: KernelManifest) -> int:
    """FLOPs of one sample's forward pass by the papers; an open sequence length is taken as in ``shapes``."""
    interface = manifest.interface
    if interface.layout is Layout.TOKENS and not interface.in_size:
        length = shapes(interface)[0][:1]
        interface = interface.model_copy(update={"in_size": length, "out_size": length})
    return analyse(manifest.blueprint, interface, manifest.symbols).flops


def counted(module: nn.Module, x: Tensor, manifest: KernelManifest) -> int:
    """FLOPs of one sample's forward pass, counted while ``x`` goes through: products, convolutions, attention.

    Raises:
        Unfit: MANIFEST: they are more than the papers say.
    """
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        _forward(module, x)
    found = int(counter.get_total_flops()) // len(x)
    if found > (claimed := claimed_flops(manifest)):
        raise Unfit(RejectionReason.MANIFEST, f"it takes {found} FLOPs a sample where its papers say at most {claimed}")
    return found


def _ratio(module: nn.Module, found: list[Tensor | None]) -> float | None:
    """Gradient norm at the first layer's weights over that at the last layer's; None where nothing arrives there."""
    weights = [gradient for parameter, gradient in zip(module.parameters(), found, strict=True) if parameter.dim() > 1]
    first, last = (gradient_norm([weights[end]]) if weights else 0.0 for end in (0, -1))
    return first / last if last else None


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[98]


def _forward(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def _timed(work: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def _drift(module: nn.Module, x: Tensor) -> float:
    """Largest |float32 - float64| of the output, relative to its root mean square."""
    with torch.no_grad():
        single = module(x).double()
        double = copy.deepcopy(module).double()(x.double())
    scale = float(double.square().mean().sqrt())
    worst = float((single - double).abs().max())
    return worst / scale if scale else worst
