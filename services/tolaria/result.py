"""What came of a run, or of several with different seeds: figures for people, scripts and the platform."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from scipy.special import stdtrit


class RunResult(BaseModel):
    """One seed: the grown network beside its ungrown twin.

    Attributes:
        ungrown_accuracy, grown_accuracy: on the test part; None for a regression, or when that network was not trained.
        ungrown_loss, grown_loss: mean loss on the test part.
        folded_max_abs_diff: largest |folded - unfolded| output on the test part; None when nothing was folded.
        carved_parameters: what carving took out; not taken off ``added_parameters``.
        grown: False for a baseline: ``grown_*`` are then unset.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    seed: int
    grown: bool
    ungrown_accuracy: float | None = None
    grown_accuracy: float | None = None
    ungrown_loss: float | None = None
    grown_loss: float | None = None
    fossilized: int = 0
    culled: int = 0
    rolled_back: int = 0
    parameters: int = 0
    added_parameters: int = 0
    carved_parameters: int = 0
    folded_max_abs_diff: float | None = None
    train_seconds: float = 0.0
    boundary_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def gain(self) -> float | None:
        """Accuracy of the grown network above its twin's; for a regression, how much its loss is below."""
        if self.ungrown_accuracy is not None and self.grown_accuracy is not None:
            return self.grown_accuracy - self.ungrown_accuracy
        if self.ungrown_accuracy is None and self.ungrown_loss is not None and self.grown_loss is not None:
            return self.ungrown_loss - self.grown_loss
        return None


def interval(values: Sequence[float]) -> float | None:
    """Half width of the 95 % t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))


def combined(results: Sequence[RunResult], report: str) -> dict[str, Any]:
    """The final figures: of the one run, or means over seeds with the figures of each under ``seeds``.

    ``fossilized`` is the sum over seeds, ``folded_max_abs_diff`` the largest; what is not finite becomes None.
    """
    gains = [gain for result in results if (gain := result.gain) is not None]
    diffs = [result.folded_max_abs_diff for result in results if result.folded_max_abs_diff is not None]
    out: dict[str, Any] = {
        "run": results[0].run,
        "ungrown_accuracy": _mean([result.ungrown_accuracy for result in results]),
        "grown_accuracy": _mean([result.grown_accuracy for result in results]),
        "ungrown_loss": _mean([result.ungrown_loss for result in results]),
        "grown_loss": _mean([result.grown_loss for result in results]),
        "fossilized": sum(result.fossilized for result in results),
        "culled": sum(result.culled for result in results),
        "rolled_back": sum(result.rolled_back for result in results),
        "added_parameters": _mean([float(result.added_parameters) for result in results]),
        "carved_parameters": _mean([float(result.carved_parameters) for result in results]),
        "folded_max_abs_diff": max(diffs) if diffs else None,
        "gain_mean": _mean(list(gains)) if gains else None,
        "gain_std": statistics.stdev(gains) if len(gains) > 1 else None,
        "gain_interval_95": interval(gains),
        "wall_seconds": round(sum(result.wall_seconds for result in results), 3),
        "report": report,
    }
    if len(results) > 1:
        out["seeds"] = [{**result.model_dump(), "gain": result.gain} for result in results]
    return {key: _finite(value) for key, value in out.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
