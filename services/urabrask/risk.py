"""Risk: how likely a graft of a kernel is to be culled or rolled back, from what was measured of it. Pure.

Before ``ENOUGH`` field reports the answer is the constant ``UNKNOWN``, for every kernel: nothing is known. From then on
a logistic regression on the reports answers, calibrated by Platt's scaling on predictions for kernels that it had not
seen (J. Platt, "Probabilistic outputs for support vector machines", 1999). A model is a handful of numbers: it is stored
as JSON and needs no library to answer.

What it does not know: the host. Two networks may be served very differently by the same kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from esper_core.blueprint import widening
from esper_core.blueprint.interface import Layout, canonical_json
from esper_core.errors import InvalidInput
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import Measurement

UNKNOWN = 0.5
"""Starting constant: as likely as not."""
CONSTANT = "constant-1"
"""Version of that answer."""
ENOUGH = 40
"""Reports from which on a model is fitted; a starting constant, like the three below."""
EACH = 10
"""Of them at least so many of either outcome."""
KERNELS = 10
"""About at least so many kernels."""
REFIT = 20
"""New reports after which the model is fitted anew."""
FOLDS = 5
STRENGTH = 1.0
"""Inverse of the ridge penalty on standardised features."""

Row = tuple[float | None, ...]
"""A kernel's features; None where something was not measured."""
NAMES = (
    "log parameters",
    "log FLOPs",
    "nodes",
    "foldable",
    "tokens",
    "image",
    "log seconds per row",
    "log bytes per row",
    "log drift",
    "log gradient norm",
    "log gradient at the input",
    "log gradient ratio",
    "learned",
)
"""What a row holds."""


def design(manifest: KernelManifest) -> dict[str, float]:
    """What the papers contribute, by name."""
    return {
        "parameters": manifest.parameters,
        "flops": manifest.flops,
        "nodes": len(manifest.blueprint.nodes),
        "foldable": float(widening.units(manifest.blueprint, manifest.interface, manifest.symbols) > 0),
        "tokens": float(manifest.interface.layout is Layout.TOKENS),
        "image": float(manifest.interface.layout is Layout.IMAGE),
    }


def features(papers: Mapping[str, float], measured: Measurement) -> Row:
    """The row for a kernel, in the order of ``NAMES``; ``papers`` as from ``design``."""
    return (
        math.log1p(papers["parameters"]),
        math.log1p(papers["flops"]),
        papers["nodes"],
        papers["foldable"],
        papers["tokens"],
        papers["image"],
        _log(measured.forward_seconds / measured.batch),
        _log(measured.peak_memory_bytes / measured.batch + 1),
        _log(measured.precision_drift),
        _log(measured.gradient_norm),
        _log(measured.input_gradient_norm),
        _log(measured.gradient_ratio),
        measured.learned,
    )


def _log(value: float | None) -> float | None:
    return None if value is None else math.log(max(value, 1e-12))


class Model(BaseModel):
    """A fitted model.

    Attributes:
        reports: how many it was fitted on.
        means, scales: by which features are standardised; an unknown one counts as the mean.
        weights, bias: of the logistic regression.
        slope, offset: of the calibration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    reports: int
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    slope: float
    offset: float

    @property
    def version(self) -> str:
        """``reports-<how many>-<digest>``."""
        return f"reports-{self.reports}-{sha256(canonical_json(self.model_dump(mode='json')))[:8]}"

    def risk(self, row: Row) -> float:
        """Probability that a graft of the kernel with these features fails."""
        scaled = (
            0.0 if value is None else (value - mean) / scale
            for value, mean, scale in zip(row, self.means, self.scales, strict=True)
        )
        logit = self.bias + sum(weight * value for weight, value in zip(self.weights, scaled, strict=True))
        return _sigmoid(self.slope * logit + self.offset)


def assess(model: Model | None, row: Row) -> tuple[float, str]:
    """Risk and the version of what told it; the constant without a model."""
    return (UNKNOWN, CONSTANT) if model is None else (model.risk(row), model.version)


def enough(kernels: Sequence[str], failed: Sequence[bool]) -> bool:
    """Whether these reports suffice for a model."""
    failures = sum(failed)
    return (
        len(failed) >= ENOUGH
        and EACH <= failures <= len(failed) - EACH
        and len(set(kernels)) >= KERNELS
        and min(len({k for k, f in zip(kernels, failed, strict=True) if f is what}) for what in (True, False)) >= FOLDS
    )


def fit(rows: Sequence[Row], kernels: Sequence[str], failed: Sequence[bool]) -> Model:
    """Learn from reports: the features of each report's kernel, its name, and whether the graft failed.

    Raises:
        InvalidInput: there are too few, see ``enough``.
    """
    if not enough(kernels, failed):
        raise InvalidInput(
            f"{len(failed)} field reports are too few to learn from", hint=f"{ENOUGH} or more, of both outcomes"
        )
    # Imported here: what only asks an existing model, as nearly everybody does, needs neither of them.
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    table = np.array([[math.nan if value is None else value for value in row] for row in rows])
    known = ~np.isnan(table)
    counts = np.maximum(known.sum(axis=0), 1)
    means = np.where(known, table, 0.0).sum(axis=0) / counts
    centred = np.where(known, table - means, 0.0)
    scales = np.sqrt((centred**2).sum(axis=0) / counts)
    scales = np.where(scales > 0, scales, 1.0)
    x, y = centred / scales, np.array(failed, dtype=int)

    learner: Any = LogisticRegression
    folds: Any = StratifiedGroupKFold
    ridge = {"C": STRENGTH, "max_iter": 1000}
    unseen = cross_val_predict(
        learner(**ridge), x, y, groups=np.array(kernels), cv=folds(FOLDS), method="decision_function"
    )
    calibration = learner(C=1e6, max_iter=1000).fit(unseen[:, None], y)
    learnt = learner(**ridge).fit(x, y)
    return Model(
        reports=len(failed),
        means=tuple(means.tolist()),
        scales=tuple(scales.tolist()),
        weights=tuple(learnt.coef_[0].tolist()),
        bias=float(learnt.intercept_[0]),
        slope=float(calibration.coef_[0, 0]),
        offset=float(calibration.intercept_[0]),
    )


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))
