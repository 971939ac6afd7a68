"""Esper: networks that find their own bottlenecks and grow past them while they train.

    host = esper.wrap(model, example_inputs)
    grower = esper.Grower(host, optimizer, loss_fn, probe=batches, validation=held_back)
    for epoch in range(epochs):
        ...                       # your own loop over host and optimizer
        grower.step(epoch)
    plain, report = grower.finish()
    esper.export(plain, example_inputs, "exported")

Beside the grower, ``esper.Carver(host, optimizer, loss_fn, probe=batches, validation=held_back)`` takes out what no longer pays:
``carver.step(epoch, busy=grower.busy)`` after ``grower.step``, and ``carver.finish(epoch)`` before ``grower.finish()``.

The names load torch when first used, so that command line and control plane start without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper_core.control.carve.carver import Carver
    from esper_core.control.carve.settings import CarveSettings
    from esper_core.control.grower import Grower
    from esper_core.control.packet import Budget
    from esper_core.control.settings import GrowthSettings
    from esper_core.control.survey import score
    from esper_core.nn.export.bundle import export
    from esper_core.nn.host import wrap

__version__ = "0.1.0"
__all__ = ["Budget", "CarveSettings", "Carver", "Grower", "GrowthSettings", "__version__", "export", "score", "wrap"]

_HOME = {
    "Budget": "esper_core.control.packet",
    "CarveSettings": "esper_core.control.carve.settings",
    "Carver": "esper_core.control.carve.carver",
    "Grower": "esper_core.control.grower",
    "GrowthSettings": "esper_core.control.settings",
    "export": "esper_core.nn.export.bundle",
    "score": "esper_core.control.survey",
    "wrap": "esper_core.nn.host",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'esper_core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
