"""Where growth would pay: the part of the wanted update that a span cannot express.

With h the input of the span, H1 the sink's input with a one appended, and G the descent direction at the sink's output,

    G⊥ = G − H1 (H1ᵀH1 + εI)⁻¹ H1ᵀG        the update no change of the sink's own weights can make
    N  = hᵀG⊥ / n,   S = hᵀh / n,   F = GᵀG / n

    gain  = Σ σ_i(S^-½ N)²                 loss per unit step, to first order (Verbockhaven et al., "Growing Tiny Networks", 2024)
    score = Σ σ_i(S^-½ N F^-½)²            scale-free (Mitchell et al., "Self-Expanding Neural Networks", 2023)
    own   = ‖(H1ᵀH1/n)^-½ H1ᵀG/n‖²         what the sink's own weights could still gain
    share = gain / (gain + own)
    null  = the gain's mean over all permutations of G⊥'s rows: what chance alone would show (told, not judged by: a host that is
            merely under-trained stands out of it everywhere)

Rows are samples, tokens or places of an image. A row at which the loss hears nothing of what leaves the span, because its gradient there
is exactly zero (a token that nobody reads, a place that a maximum passes over), is no row: a change there costs nothing, and counting it
would thin out what the others want.

Everything is a function of sums over rows, kept in float64 per fold of the probe, so memory does not grow with the probe and
a delete-one jackknife over the folds costs no second pass. Any root of a moment gives the same singular values, so the roots
are Cholesky factors of the damped moments, which are several times cheaper than eigendecompositions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from esper_core.blueprint.interface import SlotInterface
from esper_core.errors import InvalidInput
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, LossFunction, Sight, look
from esper_core.nn.rows import entering_rows, inner_rows, leaving_rows
from esper_core.nn.vitals import Units, Vitals

FOLDS = 4
RIDGE = 1e-6
"""ε as a share of the mean eigenvalue."""
DOUBT = 0.05
"""A slot is surely healthy when the evidence against it is at most this sure."""
MAX_SPECTRUM = 64
MAX_ROWS = 1024
"""Rows taken from one batch of a layout with positions; more would be correlated neighbours."""


Rows = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Thresholds:
    """When the evidence counts: share of the wanted update, and gain as a fraction of a loss of reference."""

    share: float = 0.5
    gain_of_loss: float = 0.002

    def need(self, share: float, gain_of_loss: float) -> float:
        """How far both are passed: 1 = just both, 0 = no sign at all."""
        return min(share / self.share, gain_of_loss / self.gain_of_loss)


@dataclass(frozen=True)
class Evidence:
    """What the residual gradient says about one slot. Field names equal ``esper.core.v1.GrowthSignal``."""

    gain: float
    gain_relative: float
    share: float
    score: float
    gain_of_loss: float
    spectrum: tuple[float, ...]
    confidence: float
    samples: int
    unit_parameters: int
    null_gain: float = 0.0

    def need(self, thresholds: Thresholds) -> float:
        """How far both thresholds are passed."""
        return thresholds.need(self.share, self.gain_of_loss)


@dataclass
class Sums:
    """Second moments of one fold, float64.

    Shapes, with d = features entering, k = features of the sink's input + 1, m = features leaving:
    hh (d, d), ii (k, k), hi (d, k), hg (d, m), ig (k, m), gg (m, m).
    """

    hh: Tensor
    ii: Tensor
    hi: Tensor
    hg: Tensor
    ig: Tensor
    gg: Tensor
    rows: int

    @classmethod
    def of(cls, h: Tensor, i: Tensor, g: Tensor) -> Sums:
        """From the rows of one batch. Products in the rows' own precision, sums over batches in float64."""
        return cls(
            (h.T @ h).double(),
            (i.T @ i).double(),
            (h.T @ i).double(),
            (h.T @ g).double(),
            (i.T @ g).double(),
            (g.T @ g).double(),
            len(h),
        )

    def __add__(self, other: Sums) -> Sums:
        return self._with(other, 1.0)

    def __sub__(self, other: Sums) -> Sums:
        return self._with(other, -1.0)

    def _with(self, other: Sums, sign: float) -> Sums:
        return Sums(
            self.hh + sign * other.hh,
            self.ii + sign * other.ii,
            self.hi + sign * other.hi,
            self.hg + sign * other.hg,
            self.ig + sign * other.ig,
            self.gg + sign * other.gg,
            self.rows + int(sign) * other.rows,
        )


@dataclass
class Tally:
    """Sums per fold and the losses, for one slot, with the samples seen and the rows that they have (tokens, places; one for features)."""

    samples: int = 0
    rows: int = 0
    folds: list[Sums | None] = field(default_factory=lambda: [None] * FOLDS)
    losses: list[float] = field(default_factory=list)

    def add_batch(self, number: int, rows: Rows, loss: float) -> None:
        """Spread a batch's rows over the folds, beginning at another one each time, so that all fill evenly."""
        self.losses.append(loss)
        parts = [part.tensor_split(FOLDS) for part in rows]
        for offset, (h, i, g) in enumerate(zip(*parts, strict=True)):
            if len(h):
                fold, sums = (number + offset) % FOLDS, Sums.of(h, i, g)
                held = self.folds[fold]
                self.folds[fold] = sums if held is None else held + sums

    @property
    def positions(self) -> float:
        """Rows of one sample."""
        return self.rows / self.samples

    @property
    def filled(self) -> list[Sums]:
        return [fold for fold in self.folds if fold is not None]

    def total(self) -> Sums:
        first, *rest = self.filled
        return sum(rest, start=first)


@dataclass(frozen=True)
class Reading:
    """What one pass over the probe says of one slot; ``probed`` is the samples that it took."""

    evidence: Evidence
    vitals: Vitals
    probed: int


def measure(
    host: Host,
    slots: Iterable[Slot],
    batches: Iterable[Batch],
    loss_fn: LossFunction,
    thresholds: Thresholds,
    reference: float | None = None,
    glance: float = math.inf,
) -> dict[str, Reading]:
    """Evidence and vital signs of every slot from one pass over the probe batches.

    Few samples make a gain look larger than it is, never smaller by much: what wants nothing on a part of the probe wants nothing.

    Args:
        reference: the loss whose fraction a gain must be: that which the run began with, say, since near a loss of nothing any gain
            looks large. The probe's own loss when None or smaller than that.
        glance: samples after which the pass ends if every slot is surely healthy by then.

    Raises:
        InvalidInput: when the loss is not a finite scalar, or there are no batches.
    """
    places = list(slots)
    tallies = {slot.name: Tally() for slot in places}
    units = {slot.name: Units() for slot in places}
    seen = 0

    def found(slot: Slot) -> Reading:
        evidence = conclude(tallies[slot.name], slot.unit_parameters, thresholds, reference)
        return Reading(evidence, units[slot.name].conclude(), seen)

    for number, (loss, sights) in enumerate(look(host, places, batches, loss_fn)):
        for slot in places:
            sight, interface = sights[slot.name], slot.interface
            units[slot.name].add(sight.inner, sight.descent, interface.layout)
            rows, samples = _rows(sight, interface), len(sight.entering)
            tallies[slot.name].samples += samples
            tallies[slot.name].rows += len(rows[0])
            tallies[slot.name].add_batch(number, _thinned(rows, samples), loss)
        seen += samples
        if seen >= glance:
            glance = math.inf
            if readings := _if_healthy(places, found):
                return readings
    if any(not tally.losses for tally in tallies.values()):
        raise InvalidInput(
            "the probe has no batches", hint="pass a list of (inputs, targets), 1024 samples or more in all"
        )
    return {slot.name: found(slot) for slot in places}


def _if_healthy(places: Sequence[Slot], found: Callable[[Slot], Reading]) -> dict[str, Reading]:
    """What there is to say of every slot if each is surely healthy; nothing at the first that is not, or that is mute."""
    readings: dict[str, Reading] = {}
    for slot in places:
        reading = readings[slot.name] = found(slot)
        if reading.evidence.confidence > DOUBT or not reading.evidence.gain or reading.vitals.dead_unit_ratio == 1:
            return {}
    return readings


def _rows(sight: Sight, interface: SlotInterface) -> Rows:
    """What enters, what the sink reads and what should leave, row by row; only rows that the loss hears, as long as it hears any."""
    rows = (
        entering_rows(sight.entering, interface),
        inner_rows(sight.inner, interface),
        leaving_rows(sight.descent, interface),
    )
    heard = rows[2].ne(0).any(dim=1)
    count = int(heard.sum())
    return rows if count in (0, len(heard)) else (rows[0][heard], rows[1][heard], rows[2][heard])


def _thinned(rows: Rows, samples: int) -> Rows:
    """Every k-th row, k without a factor in common with the positions, or each sample would show the same few of them."""
    every = max(1, math.ceil(len(rows[0]) / max(MAX_ROWS, samples)))
    while every > 1 and math.gcd(every, len(rows[0]) // samples) > 1:
        every += 1
    return rows[0][::every], rows[1][::every], rows[2][::every]


def conclude(tally: Tally, unit_parameters: int, thresholds: Thresholds, reference: float | None = None) -> Evidence:
    """Turn sums into evidence; its confidence is Φ(log need / standard error), the error from a delete-one jackknife."""
    folds, total = tally.filled, tally.total()
    loss = max(abs(sum(tally.losses) / len(tally.losses)), reference or 0.0)

    def evidence(fit: Fit) -> Evidence:
        return _evidence(fit, tally.positions, loss, unit_parameters)

    fit = Fit.of(total)
    whole, whitened = evidence(fit), fit.whitened
    parts = [evidence(Fit.of(total - fold)).need(thresholds) for fold in folds] if len(folds) > 1 else []
    # σ² as eigenvalues of the smaller Gram matrix: several times cheaper than the singular values themselves.
    wide = whitened.shape[1] > whitened.shape[0]
    gram = whitened @ whitened.T if wide else whitened.T @ whitened
    spectrum = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0) * tally.positions
    return replace(
        whole,
        score=float(_solved(damped_root(total.gg / total.rows), whitened.T).square().sum()),
        spectrum=tuple(spectrum[:MAX_SPECTRUM].tolist()),
        confidence=_confidence(whole.need(thresholds), parts),
        null_gain=null_gain(fit) * tally.positions,
    )


@dataclass(frozen=True)
class Fit:
    """What the sink's own weights can make of the sums, and what is left.

    Attributes:
        inner_root, entering_root: factors of H1ᵀH1 (k, k) and of S (d, d).
        weights: the best change of the sink's own weights, (k, m).
        whitened: S^-½ N, (d, m).
    """

    sums: Sums
    inner_root: Tensor
    entering_root: Tensor
    weights: Tensor
    whitened: Tensor

    @classmethod
    def of(cls, sums: Sums) -> Fit:
        inner_root, entering_root = damped_root(sums.ii), damped_root(sums.hh / sums.rows)
        weights = torch.cholesky_solve(sums.ig, inner_root)
        residual = (sums.hg - sums.hi @ weights) / sums.rows  # N
        return cls(sums, inner_root, entering_root, weights, _solved(entering_root, residual))


def _evidence(fit: Fit, positions: float, loss: float, unit_parameters: int) -> Evidence:
    """Gain and share, without what only the whole probe is asked for.

    A unit acts at every position of a sample, so what it gains per sample is its gain per row times the positions.
    """
    sums, n = fit.sums, fit.sums.rows
    gain = float(fit.whitened.square().sum()) * positions
    own = float(_solved(fit.inner_root, sums.ig).square().sum()) / n * positions
    squared = float(torch.trace(sums.gg)) / n * positions
    return Evidence(
        gain=gain,
        gain_relative=gain / squared if squared > 0 else 0.0,
        share=gain / (gain + own) if gain + own > 0 else 0.0,
        score=0.0,
        gain_of_loss=gain / loss if loss else 0.0,
        spectrum=(),
        confidence=0.0,
        samples=n,
        unit_parameters=unit_parameters,
    )


def null_gain(fit: Fit) -> float:
    """Mean of ‖S^-½ N‖² over all n! permutations of G⊥'s rows, in closed form.

    Of K = G⊥G⊥ᵀ only the means on and off the diagonal survive permuting (first permutation moment, as of the RV coefficient: Kazi-Aoual
    et al., 1995), and both follow from the sums.
    """
    sums, weights, n = fit.sums, fit.weights, fit.sums.rows
    power = float(torch.trace(sums.gg) - 2 * (weights * sums.ig).sum() + (weights * (sums.ii @ weights)).sum())
    # The last feature of the sink's input is the one.
    drift = float((sums.ig[-1] - sums.ii[-1] @ weights).square().sum())
    on, off = power / n, (drift - power) / (n * max(n - 1, 1))
    freedom = n * float(torch.trace(torch.cholesky_solve(sums.hh / n, fit.entering_root)))
    centre = float(_solved(fit.entering_root, sums.hi[:, -1:]).square().sum())
    return max(0.0, ((on - off) * freedom + off * centre) / n**2)  # 0 up to rounding where what enters never varies


def damped_root(moment: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric positive semidefinite matrix, damped by ε."""
    ridge = RIDGE * float(torch.trace(moment)) / len(moment) or RIDGE
    while True:
        damped = moment.clone()
        damped.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            root: Tensor = factor
            return root
        ridge *= 10  # products of single-precision rows may be indefinite by a rounding error


def _solved(root: Tensor, matrix: Tensor) -> Tensor:
    """The moment of that root to the power -½ times ``matrix``, up to a rotation."""
    solved: Tensor = torch.linalg.solve_triangular(root, matrix, upper=False)
    return solved


def _confidence(need: float, parts: list[float]) -> float:
    """P(need > 1) for a normal log need."""
    if need <= 0 or len(parts) < 2 or min(parts) <= 0:
        return 0.0
    logs = [math.log(part) for part in parts]
    mean = sum(logs) / len(logs)
    error = math.sqrt((len(logs) - 1) / len(logs) * sum((value - mean) ** 2 for value in logs))
    if error == 0:
        return 1.0 if need > 1 else 0.0
    return 0.5 * math.erfc(-math.log(need) / error / math.sqrt(2))
