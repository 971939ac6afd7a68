"""A run that is small and quick, and grows within a few epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_core.config import load
from services.tolaria.config import TolariaConfig

QUICK_GROWTH = {
    "warmup_epochs": 2,
    "evaluate_every": 1,
    "training_steps": 20,
    "training_epochs": 3,
    "training_patience": 3,
    "ramp_epochs": 2,
    "settle_epochs": 1,
    "fine_tune_epochs": 1,
    "settle_sigmas": 100.0,
    "embargo_epochs": 1,
}
MakeConfig = Callable[..., TolariaConfig]


@pytest.fixture
def quick(tmp_path: Path) -> MakeConfig:
    """``quick(section={...})`` makes the configuration of a small offline run with growth."""
    torch.set_num_threads(1)

    def make(**sections: Any) -> TolariaConfig:
        given: dict[str, Any] = {
            "name": "quick",
            "model": {"widths": [16, 1, 16]},
            "dataset": {"name": "iris", "validation_fraction": 0.3},
            "optimization": {"epochs": 14, "batch_size": 16, "learning_rate": 0.01},
            "morphogenetic": {"growth": QUICK_GROWTH},
            "services": {"offline": True, "data_dir": str(tmp_path)},
        }
        for name, value in sections.items():
            merge = isinstance(value, dict) and name in given and "host" not in value
            given[name] = {**given[name], **value} if merge else value
        return load(TolariaConfig, given)

    return make
