"""The training loop: epochs, vital signs, epoch boundaries, checkpoints; touches no network and waits for nobody.

Interrupted and resumed, a run on the CPU gives the same bytes as one that was never interrupted: everything that can
differ between two epochs (weights, optimiser, growth, random state, counters) is in the checkpoint, and the order of
rows is a function of seed and epoch.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from esper_core.errors import Corrupt
from esper_core.log import get
from services.tolaria.checkpoints import Checkpoints
from services.tolaria.config import TolariaConfig
from services.tolaria.datasets import Data, Part
from services.tolaria.history import Boundary, Figures, History
from services.tolaria.learner import Learner
from services.tolaria.optimization import learning_rate
from services.tolaria.order import batches

if TYPE_CHECKING:
    from services.tolaria.facts import Facts

log = get(__name__)
CHECKPOINT_VERSION = 1
SCORE_BATCH = 1024


class Watcher(Protocol):
    """Someone who is told of every epoch, on the training thread: shows it, reports it, sends it on."""

    def epoch(self, boundary: Boundary) -> None: ...


class Stop:
    """A wish to stop, from a signal; heeded at the next epoch boundary.

    Attributes:
        signal: the signal's number, 0 while nobody wishes to stop.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        """SIGINT and SIGTERM ask to stop; a second one ends the process at once."""
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


@dataclass(frozen=True)
class Score:
    """How a network does on one part of the data.

    Attributes:
        loss: mean loss.
        accuracy: share of rows classified rightly; None for a regression.
    """

    loss: float
    accuracy: float | None


def score(model: nn.Module, data: Data, part: Part) -> Score:
    """Loss and accuracy of ``model`` in evaluation mode; its mode is restored."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=part.inputs.device)
    right = torch.zeros((), dtype=torch.int64, device=part.inputs.device)
    with torch.no_grad():
        for inputs, targets in part.each(SCORE_BATCH):
            outputs = model(inputs)
            loss += data.loss(outputs, targets) * len(inputs)
            if data.classification:
                right += (outputs.argmax(1) == targets).sum()
    model.train(was_training)
    return Score(float(loss) / len(part), float(right) / len(part) if data.classification else None)


def train_rows(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, order: Sequence[Tensor]) -> float:
    """One step per batch of row numbers of the training part; the mean loss, read once at the end."""
    part = data.train
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=part.inputs.device)
    for rows in order:
        inputs, targets = part.take(rows)
        loss = data.loss(model(inputs), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(rows)
    return float(total) / sum(len(rows) for rows in order)


class Trainer:
    """Trains one learner on one data set, with its checkpoints and history under ``directory``.

    Args:
        config: the run's settings; ``seed`` decides the order of rows.
        data: what to train on.
        learner: what to train.
        directory: of this run; made when absent.
        watchers: told of every epoch after its checkpoint is safe.
        facts: tells the platform of every epoch, exactly once; None without a platform.
    """

    def __init__(
        self,
        config: TolariaConfig,
        data: Data,
        learner: Learner,
        directory: Path,
        watchers: tuple[Watcher, ...] = (),
        facts: Facts | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.learner = learner
        self.watchers = watchers
        self.facts = facts
        self.directory = directory
        self.checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep)
        self.epoch = 0
        self.step = 0
        self.history: History | None = None

    @property
    def boundaries(self) -> list[Boundary]:
        """What happened so far."""
        return self.history.boundaries if self.history else []

    def resume(self) -> bool:
        """Take up the newest checkpoint; False when there is none yet.

        Raises:
            Corrupt: no checkpoint is whole, or the history it counts is not.
        """
        state = self.checkpoints.latest()
        if state is None:
            return False
        if state.get("version") != CHECKPOINT_VERSION:
            raise Corrupt(
                f"checkpoint of version {state.get('version')!r}, this build reads {CHECKPOINT_VERSION}",
                hint="go on with the release that wrote it",
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self.learner.load_state_dict(state["learner"])
        self.history = History(self.directory / "history.jsonl", self.epoch)
        if self.facts is not None and self.boundaries:
            self.facts.catch_up(self.boundaries[-1], state["facts"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return True

    def train(self, stop: Stop) -> bool:
        """Train to the last epoch, or to the boundary at which ``stop`` is heeded.

        Returns:
            Whether the last epoch was reached.

        Raises:
            Exhausted: a checkpoint could not be written.
        """
        if self.history is None:
            self.history = History(self.directory / "history.jsonl", 0)
        last = self.config.optimization.epochs
        try:
            while self.epoch < last and not stop.signal:
                boundary = self._epoch()
                self.history.append(boundary)
                self.epoch += 1
                if self.epoch % self.config.checkpoint.every_epochs == 0 or self.epoch == last or stop.signal:
                    self.checkpoints.save(self.epoch, self._state())
                if self.facts is not None:
                    self.facts.epoch(boundary)
                for watcher in self.watchers:
                    watcher.epoch(boundary)
        finally:
            self.history.close()
        return self.epoch >= last

    def _epoch(self) -> Boundary:
        """Train one epoch, look at the held-back data, and do what the boundary asks for."""
        rate = learning_rate(self.config.optimization, self.epoch)
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate
        started = time.perf_counter()
        loss = self._train_rows()
        trained = time.perf_counter()
        held = score(self.learner.model, self.data, self.data.validation)
        figures = Figures(
            epoch=self.epoch,
            step=self.step,
            train_loss=loss,
            validation_loss=held.loss,
            validation_accuracy=held.accuracy,
            learning_rate=rate,
            train_seconds=trained - started,
            boundary_seconds=0.0,
            parameters=sum(parameter.numel() for parameter in self.learner.model.parameters()),
        )
        boundary = self.learner.boundary(figures)
        figures = boundary.figures.model_copy(update={"boundary_seconds": time.perf_counter() - trained})
        return boundary.model_copy(update={"figures": figures})

    def _train_rows(self) -> float:
        """One pass over the training part; the mean loss."""
        size = self.config.optimization.batch_size
        order = batches(len(self.data.train), size, self.config.seed, self.epoch)
        loss = train_rows(self.learner.model, self.learner.optimizer, self.data, order)
        self.step += len(order)
        return loss

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "version": CHECKPOINT_VERSION,
            "epoch": self.epoch,
            "step": self.step,
            "learner": self.learner.state_dict(),
            "rng": torch.get_rng_state(),
            "facts": self.facts.position if self.facts is not None else 0,
        }
        if self.config.device.startswith("cuda"):
            state["cuda_rng"] = torch.cuda.get_rng_state_all()
        return state
