"""A run from its settings to its figures: the ungrown twin, the grown network, and what the platform is told of it.

Everything of a run lies in ``<data_dir>/runs/<run>``: config.json, checkpoints, history.jsonl, twin/, spool/,
orders.jsonl, carve-orders.jsonl, result.json, model.safetensors, morphology.json, held-out.safetensors, report.html.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper_core.config import Endpoints, read_endpoints
from esper_core.control.carve.carver import Carver
from esper_core.control.grower import Grower
from esper_core.control.packet import Budget
from esper_core.errors import AlreadyExists, Conflict, Exhausted, InvalidInput, NotFound
from esper_core.nn.checkpoint import write_atomic
from esper_core.nn.host import Host, wrap
from services.tolaria import facts, hosts, keepsake
from services.tolaria.config import TolariaConfig, spelled
from services.tolaria.datasets import Data, prepare
from services.tolaria.learner import Finished, Growing, Learner, Plain
from services.tolaria.live import View
from services.tolaria.optimization import optimizer_for
from services.tolaria.plane import Offline, Online, Plane
from services.tolaria.report import SeedRun
from services.tolaria.result import RunResult
from services.tolaria.sculpting import Sculpting
from services.tolaria.trainer import Score, Stop, Trainer, score

VALIDATION_BATCH = 64
PROBE_BATCH = 256
_MAY_DIFFER = {"services", "logging", "checkpoint", "name"}


class Stopped(Exception):
    """A signal stopped the run at an epoch boundary; its checkpoint is safe.

    Attributes:
        signal: the signal's number.
        run_id: what to resume.
    """

    def __init__(self, signal: int, run_id: str, epoch: int) -> None:
        super().__init__(f"{run_id} stopped after epoch {epoch}")
        self.signal, self.run_id, self.epoch = signal, run_id, epoch


@dataclass
class Experiment:
    """One seed of one configuration.

    Args:
        config: the settings; ``config.seed`` is the seed.
        run_id: its name.
        grow: False for a baseline.
        twin: whether to train the ungrown twin too.
        resume: whether to go on with a run that was begun before.
        view: who shows it.
        stop: the wish to stop.
    """

    config: TolariaConfig
    run_id: str
    grow: bool
    twin: bool
    resume: bool
    view: View
    stop: Stop

    @property
    def directory(self) -> Path:
        return run_directory(self.config, self.run_id)

    def run(self) -> SeedRun:
        """Train, or go on where an interrupted run stopped.

        Raises:
            Stopped: by a signal.
            EsperError: bad settings, data, or disk; the platform was never started.
        """
        began = time.perf_counter()
        set_up(self.config)
        data = load_data(self.config)
        host = build_host(self.config, data) if self.grow else None
        slots = list(host.slots.values()) if host else []
        endpoints = self._endpoints()
        open_run(self.config, self.run_id, grow=self.grow, resume=self.resume)
        plane: Plane = Online(self.config, endpoints, self.run_id, self.directory) if endpoints else Offline()
        try:
            plane.register(slots, self._epochs_done())
            twin = self._twin(data) if self.twin and self.grow else None
            if host is not None and not self._epochs_done():
                plane.prepare(slots, self.view, self.stop)
            trainer = self._main(data, host, plane)
            finished = trainer.learner.finish()
            result = self._result(data, trainer, finished, twin, time.perf_counter() - began)
            keepsake.keep(self.directory, self.config.model, data, finished.model)
            write_json(self.directory / "result.json", result.model_dump())
            self._tell_end(plane, facts.FINISHED, _figures(result), "")
        except Stopped as stopped:
            self._tell_end(plane, facts.STOPPED, {}, f"signal {stopped.signal}")
            raise
        except (Exception, KeyboardInterrupt) as error:
            self._tell_end(plane, facts.FAILED, {}, f"{type(error).__name__}: {error}")
            raise
        finally:
            plane.close(self.view)
        return SeedRun(result, trainer.boundaries, twin.boundaries if twin else [])

    def _endpoints(self) -> Endpoints | None:
        """Where the platform is; None when the run does without one."""
        if self.config.services.offline:
            return None
        try:
            return read_endpoints(self.config.services.data_dir)
        except NotFound as error:
            if not self.grow:
                return None
            raise NotFound(error.message, hint="start it with `esperctl up`, or train without it: --offline") from None

    def _epochs_done(self) -> int:
        checkpoints = sorted((self.directory / "checkpoints").glob("epoch-*.ckpt"))
        return int(checkpoints[-1].stem.removeprefix("epoch-")) if checkpoints else 0

    def _twin(self, data: Data) -> Trainer:
        learner = plain(self.config, data)
        trainer = Trainer(self.config, data, learner, self.directory / "twin", (self.view,))
        return self._train(trainer, f"{self.run_id}, ungrown twin")

    def _main(self, data: Data, host: Host | None, plane: Plane) -> Trainer:
        learner: Learner = plain(self.config, data)
        watchers: tuple[Any, ...] = (self.view,)
        if host is not None:
            learner = growing(self.config, data, host, plane, self.run_id)
            watchers = (self.view, plane)
        trainer = Trainer(self.config, data, learner, self.directory, watchers, plane.facts)
        return self._train(trainer, self.run_id)

    def _train(self, trainer: Trainer, title: str) -> Trainer:
        trainer.resume()
        self.view.begin(title, self.config.optimization.epochs, trainer.epoch)
        if not trainer.train(self.stop):
            raise Stopped(self.stop.signal, self.run_id, trainer.epoch)
        return trainer

    def _result(
        self, data: Data, trainer: Trainer, finished: Finished, twin: Trainer | None, seconds: float
    ) -> RunResult:
        main = score(finished.model, data, data.test)
        other: Score | None = score(twin.learner.model, data, data.test) if twin else None
        grown, ungrown = (main, other) if self.grow else (None, main)
        return RunResult(
            run=self.run_id,
            seed=self.config.seed,
            grown=self.grow,
            ungrown_accuracy=ungrown.accuracy if ungrown else None,
            ungrown_loss=ungrown.loss if ungrown else None,
            grown_accuracy=grown.accuracy if grown else None,
            grown_loss=grown.loss if grown else None,
            fossilized=finished.fossilized,
            culled=finished.culled,
            rolled_back=finished.rolled_back,
            parameters=sum(parameter.numel() for parameter in finished.model.parameters()),
            added_parameters=finished.added_parameters,
            carved_parameters=finished.carved_parameters,
            folded_max_abs_diff=finished.folded_max_abs_diff,
            train_seconds=sum(boundary.figures.train_seconds for boundary in trainer.boundaries),
            boundary_seconds=sum(boundary.figures.boundary_seconds for boundary in trainer.boundaries),
            wall_seconds=seconds,
        )

    def _tell_end(self, plane: Plane, state: Any, results: dict[str, float], reason: str) -> None:
        if plane.facts is not None:
            report = str(self.directory / "report.html") if state == facts.FINISHED else ""
            plane.facts.ended(state, results, reason, report, max(self._epochs_done() - 1, 0))


def set_up(config: TolariaConfig) -> None:
    """Threads and device, as configured.

    Raises:
        InvalidInput: there is no such device.
    """
    torch.set_num_threads(config.threads)
    if config.device.startswith("cuda"):
        wanted = int(config.device.partition(":")[2] or 0)
        if not torch.cuda.is_available() or wanted >= torch.cuda.device_count():
            raise InvalidInput(f"there is no device {config.device} here", hint="use device: cpu")


def load_data(config: TolariaConfig) -> Data:
    """The run's data on the run's device."""
    image = config.model.host in ("cnn", "resnet")
    return prepare(config.dataset, config.data_seed, image=image, device=config.device)


def build_model(config: TolariaConfig, data: Data) -> nn.Module:
    """The run's network, freshly initialised by its seed, on its device."""
    torch.manual_seed(config.seed)
    return hosts.build(config.model, data.sample_shape, data.tokens, data.outputs).to(config.device)


def plain(config: TolariaConfig, data: Data) -> Plain:
    """A freshly initialised network that will only be trained."""
    model = build_model(config, data)
    return Plain(model, optimizer_for(config.optimization, model.parameters()))


def build_host(config: TolariaConfig, data: Data) -> Host:
    """The same network, wrapped, with its slots."""
    example, _ = data.train.take(torch.arange(min(2, len(data.train))))
    return wrap(build_model(config, data), example, spans=config.morphogenetic.spans)


def growing(config: TolariaConfig, data: Data, host: Host, plane: Plane, run_id: str) -> Growing:
    """The wrapped network with everything that lets it grow."""
    torch.manual_seed(config.seed)
    optimizer = optimizer_for(config.optimization, host.parameters())
    grower = Grower(
        host,
        optimizer,
        data.loss,
        probe=data.train.in_batches(PROBE_BATCH, config.morphogenetic.probe_samples),
        validation=data.validation.in_batches(VALIDATION_BATCH),
        budget=Budget(parameters=config.morphogenetic.budget_parameters),
        settings=config.morphogenetic.growth,
        controller=plane.controller,
        source=plane.source,
        run_id=run_id,
        seed=config.seed,
    )
    return Growing(host, optimizer, grower, plane.orders, _sculpting(config, data, host, optimizer, plane, run_id))


def _sculpting(
    config: TolariaConfig, data: Data, host: Host, optimizer: torch.optim.Optimizer, plane: Plane, run_id: str
) -> Sculpting | None:
    """What carves the host; None when the settings say that nothing does."""
    settings = config.morphogenetic.carve
    if not settings.enabled:
        return None
    carver = Carver(
        host,
        optimizer,
        data.loss,
        probe=data.train.in_batches(PROBE_BATCH, config.morphogenetic.probe_samples),
        validation=data.validation.in_batches(VALIDATION_BATCH),
        settings=settings,
        autonomous=settings.autonomous and not plane.sculpted,
        run_id=run_id,
    )
    return Sculpting(carver, plane.carve_orders, config.checkpoint.every_epochs, config.optimization.epochs)


def run_directory(config: TolariaConfig, run_id: str) -> Path:
    """Where a run's files are."""
    return config.services.data_dir.expanduser() / "runs" / run_id


def open_run(config: TolariaConfig, run_id: str, *, grow: bool, resume: bool) -> None:
    """Make the run's directory, or make sure that it is the one to go on in.

    Raises:
        AlreadyExists: it is there and ``resume`` was not asked for.
        NotFound: it is not there and ``resume`` was.
        Conflict: it was begun with other settings.
        Exhausted: it cannot be made.
    """
    directory = run_directory(config, run_id)
    path = directory / "config.json"
    mine = {**config.model_dump(mode="json"), "grow": grow}
    if not resume:
        if path.exists():
            raise AlreadyExists(
                f"there is a run {run_id} already", hint="go on with --resume, or choose another --name"
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(path, mine)
        except OSError as error:
            raise Exhausted(
                f"{directory} cannot be written: {error.strerror}", hint="choose another --data-dir"
            ) from None
        return
    if not path.exists():
        raise NotFound(f"there is no run {run_id} under {directory.parent}", hint="start it without --resume")
    mine, theirs = spelled(mine), spelled(json.loads(path.read_text(encoding="utf-8")))
    different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if foreign := [key for key in different if key not in _MAY_DIFFER]:
        raise Conflict(
            f"run {run_id} was begun with other settings: {', '.join(foreign)}",
            hint=f"compare with {path}, or start another run",
        )


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON for people and programs, replaced whole."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def _figures(result: RunResult) -> dict[str, float]:
    """The figures that the platform keeps."""
    named = result.model_dump(exclude={"run", "grown", "seed"})
    return {name: float(value) for name, value in named.items() if value is not None}
