"""The benchmark phase: what one batch through a kernel costs on this machine. In the child only.

Every figure is taken from the artifact itself, on one thread. Times are wall-clock and so include whatever else the
machine is doing; the median bears that, the 99th percentile shows it.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper_core.blueprint.interface import SlotInterface
from esper_core.kernel.record import Measurement
from services.sandbox import peak_memory, target
from services.urabrask.safety import Make, awaken, gradient_norm, gradients, shapes

REPETITIONS = 30
WARM_UP = 3
BATCHES = (64, 8, 1)
BATCH_BYTES = 1 << 30
"""The largest batch whose activations stay below this is measured."""


def batch_for(activation_elements: int) -> int:
    """Rows to measure with: 64 unless one forward and backward pass would then hold more than ``BATCH_BYTES``."""
    per_row = activation_elements * 4 * 3  # float32; output, gradient and a temporary of each
    return next((rows for rows in BATCHES if rows * per_row <= BATCH_BYTES), BATCHES[-1])


def measure(make: Make, interface: SlotInterface, batch: int) -> Measurement:
    """Time ``batch`` rows, ``REPETITIONS`` times forward and as often forward and backward."""
    enters, _ = shapes(interface)
    x = torch.randn(batch, *enters, generator=torch.Generator().manual_seed(3))
    # One row alone has no variance between rows; a kernel that normalises by batch is then timed as in evaluation.
    module = awaken(make()).train(batch > 1)
    with peak_memory() as peak:
        backward = _timed(lambda: gradients(module, x), WARM_UP + REPETITIONS)[WARM_UP:]
    forward = _timed(lambda: _forward(module, x), WARM_UP + REPETITIONS)[WARM_UP:]
    first, _, found = gradients(module, x)
    second, _, _ = gradients(module, x)
    return Measurement(
        batch=batch,
        forward_seconds=statistics.median(forward),
        forward_seconds_p99=statistics.quantiles(forward, n=100, method="inclusive")[98],
        backward_seconds=statistics.median(backward),
        peak_memory_bytes=peak[0],
        precision_drift=_drift(module, x),
        gradient_norm=gradient_norm(found),
        deterministic=torch.equal(first, second),
        repetitions=REPETITIONS,
        target=target(),
    )


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
