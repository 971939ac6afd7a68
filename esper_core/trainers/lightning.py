"""Growing inside a Lightning ``Trainer``.

import lightning.pytorch as pl
from torch.nn.functional import cross_entropy
from esper_core.trainers.lightning import GrowthCallback

growth = GrowthCallback(cross_entropy, module="net")       # the submodule that maps inputs to outputs
trainer = pl.Trainer(max_epochs=100, callbacks=[growth])
trainer.fit(lit, train_loader, validation_loader)          # ckpt_path="last" resumes, kernels and all
print(growth.report)                                       # lit.net is a plain, wider network
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

from torch import nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:  # the package under its other name
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

from esper_core.control.grower import Grower
from esper_core.control.harvest import GrowthReport
from esper_core.errors import InvalidInput, Unsupported, nearest
from esper_core.nn.probe import Batch, LossFunction
from esper_core.trainers.batches import GIVE_THEM, pair
from esper_core.trainers.calling import plainly
from esper_core.trainers.growth import Growth, Options


class GrowthCallback(Callback):
    """Grows one submodule of a LightningModule while it trains.

    Growth happens at the end of training epochs, after ``on_validation_end`` and before checkpoints of the epoch are written. Its part
    of a checkpoint is the callback's state; its figures are logged as ``esper/…``, so that other callbacks can monitor them. When fit
    ends the network is folded and ``report`` is there. One device and full precision only.

    Args:
        loss_fn: (outputs, targets) → mean loss over the batch; what signals and judgements go by.
        module: path of the submodule that is called with the inputs and gives the outputs.
        split: a batch of the data loaders → (inputs, targets), inputs a tensor or a tuple of arguments; batches are such pairs when None.
        options: see ``esper_core.trainers.growth.Options``.

    Example::

        growth = GrowthCallback(
            nn.functional.cross_entropy,
            module="net",
            split=lambda batch: (batch["image"], batch["label"]),
            budget=esper.Budget(parameters=10_000),
            settings=esper.GrowthSettings(warmup_epochs=5),
        )
        trainer = pl.Trainer(max_epochs=100, callbacks=[growth, ModelCheckpoint(save_last=True)])
        trainer.fit(lit, datamodule=data, ckpt_path="last")
        torch.save(lit.net.state_dict(), "grown.pt")
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        *,
        module: str = "model",
        split: Callable[[Any], Batch] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self.module = module
        self._split = split or pair
        self._growth = Growth(loss_fn, options)
        self._watch: Any = None
        self._fitting = False

    @property
    def grower(self) -> Grower:
        """The grower at work.

        Raises:
            InvalidInput: outside of ``fit``.
        """
        if self._growth.grower is None:
            raise InvalidInput("nothing grows now", hint="the grower is there while trainer.fit runs")
        return self._growth.grower

    @property
    def report(self) -> GrowthReport | None:
        """What growing did and what it brought; None until ``fit`` has ended."""
        return self._growth.report

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if self._fitting:
            refuse(trainer)
        self._unwatch()
        self._watch = self._growth.watch(self._model(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._growth.begin(
            self._model(pl_module),
            plainly,
            trainer.optimizers,
            self._split,
            {
                "probe": lambda: _single(trainer.train_dataloader, "training"),
                "validation": lambda: _single(trainer.val_dataloaders, "validation"),
            },
            trainer.current_epoch,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = self._growth.reached(trainer.current_epoch + 1)
        if figures:
            pl_module.log_dict(figures, on_step=False, on_epoch=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = self._growth.finish()
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwatch()

    def state_dict(self) -> dict[str, Any]:
        return self._growth.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:
            self._growth.load_state_dict(state_dict)
        elif _has_kernels(state_dict):
            raise Unsupported(
                "the checkpoint has kernels that are not part of the network yet",
                hint="resume it by trainer.fit, or evaluate a checkpoint written after fit has ended",
            )

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _model(self, pl_module: LightningModule) -> nn.Module:
        modules: dict[str, nn.Module] = dict(pl_module.named_modules())
        if self.module not in modules:
            known = ", ".join(name for name, _ in pl_module.named_children())
            raise InvalidInput(
                f"{type(pl_module).__name__} has no module {self.module!r}",
                hint=f"GrowthCallback(..., module=...) names the network; {nearest(self.module, known.split(', '))}",
            )
        return modules[self.module]


def refuse(trainer: Trainer) -> None:
    """Say no to what growing has not been made for.

    Raises:
        Unsupported: several processes, a strategy that wraps the network or keeps parameters of its own, or reduced precision.
    """
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1 or strategy != "SingleDeviceStrategy":
        raise Unsupported(
            f"growing with strategy {strategy} over {trainer.world_size} processes", hint="Trainer(devices=1)"
        )
    if trainer.precision != "32-true":
        raise Unsupported(f"growing with precision {trainer.precision}", hint='Trainer(precision="32-true")')


def _single(loaders: Any, which: str) -> Any:
    loader = loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders
    if loader is None:
        raise InvalidInput(f"the trainer has no {which} data loader", hint=GIVE_THEM)
    return loader


def _has_kernels(state: Mapping[str, Any]) -> bool:
    grower = state.get("grower")
    return bool(grower and any(graft["attached"] for graft in grower["grafts"].values()))
