"""A run's configuration as a task: anyone's network and data among the arms."""

from __future__ import annotations

import torch

from services.tolaria.arena.task import Setup, Task
from services.tolaria.config import TolariaConfig, read_run
from services.tolaria.experiment import build_model, load_data, set_up
from services.tolaria.optimization import learning_rate, optimizer_for


def task_of(config: TolariaConfig) -> Task:
    """The run as a task: its network, its data, its optimiser and schedule; where it should grow nobody knows."""

    def make(seed: int) -> Setup:
        seeded = config.model_copy(update={"seed": seed})
        set_up(seeded)
        torch.set_num_threads(1)
        data = load_data(seeded)
        return Setup(lambda: build_model(seeded, data), data, spans=config.morphogenetic.spans)

    return Task(
        name=config.name,
        about=f"{config.model.host} on {config.dataset.name}",
        make=make,
        group="own",
        optimizer=lambda parameters: optimizer_for(config.optimization, parameters),
        epochs=config.optimization.epochs,
        batch_size=config.optimization.batch_size,
        rate=lambda epoch: learning_rate(config.optimization, epoch),
        settings=config.morphogenetic.growth,
        budget=config.morphogenetic.budget_parameters,
        probe_rows=config.morphogenetic.probe_samples,
    )


def read_task(run_file: str, settings: tuple[str, ...]) -> Task:
    """The task that a configuration spells."""
    return task_of(read_run(run_file, list(settings)))
