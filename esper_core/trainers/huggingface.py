"""Growing inside the Hugging Face ``Trainer``.

from torch.nn.functional import cross_entropy
from transformers import Trainer
from esper_core.trainers.huggingface import GrowthCallback

trainer = Trainer(model, args, train_dataset=train, eval_dataset=held_back)
growth = GrowthCallback(trainer, cross_entropy)            # (logits, labels) → mean loss
trainer.add_callback(growth)
trainer.train()                                            # resume_from_checkpoint=True resumes, kernels and all
print(growth.report)                                       # model is a plain, wider network
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esper_core.control.grower import Grower
from esper_core.control.harvest import GrowthReport
from esper_core.errors import InvalidInput, NotFound, Unsupported
from esper_core.nn import checkpoint
from esper_core.nn.probe import Batch, LossFunction
from esper_core.trainers.batches import GIVE_THEM
from esper_core.trainers.growth import Growth, Options

FILE = "esper.ckpt"
"""What lies beside the trainer's own files in a checkpoint's folder."""


class GrowthCallback(TrainerCallback):
    """Grows the trainer's model while it trains.

    Growth happens when an epoch ends, before the trainer evaluates and saves. Its part of a checkpoint is ``esper.ckpt`` in the
    checkpoint's folder; its figures go through ``trainer.log`` as ``esper/…``. When training ends the network is folded and ``report``
    is there; ``model.config`` does not know the new widths, so load such weights with ``esper_core.nn.widen.conform``. One device
    and full precision only.

    Kernels are no submodules of the model, so ``max_grad_norm`` is applied to their gradients apart from the model's.

    Args:
        trainer: the trainer; it must not make its model anew (``model_init``).
        loss_fn: (logits, labels) → mean loss over the batch; what signals and judgements go by.
        labels: name of the targets in a batch; every other tensor in it is an argument of the model's forward.
        resume_from: folder of the checkpoint that is resumed, where it does not lie in ``args.output_dir``.
        options: see ``esper_core.trainers.growth.Options``.

    Example::

        args = TrainingArguments("out", num_train_epochs=20, save_strategy="epoch", report_to="tensorboard")
        trainer = Trainer(model, args, train_dataset=train, eval_dataset=held_back, data_collator=collate)
        growth = GrowthCallback(
            trainer,
            nn.functional.cross_entropy,
            budget=esper.Budget(parameters=100_000),
            settings=esper.GrowthSettings(warmup_epochs=3, evaluate_every=1),
        )
        trainer.add_callback(growth)
        trainer.train(resume_from_checkpoint=True)
    """

    def __init__(
        self,
        trainer: Trainer,
        loss_fn: LossFunction,
        *,
        labels: str = "labels",
        resume_from: str | Path | None = None,
        **options: Unpack[Options],
    ) -> None:
        refuse(trainer)
        self._trainer = trainer
        self._labels = labels
        self._resume_from = resume_from
        self._growth = Growth(loss_fn, options)
        # The weights of a checkpoint are loaded before any event that a callback hears of.
        self._watch = self._growth.watch(_model(trainer), lambda: plain_optimizer(trainer.optimizer))

    @property
    def grower(self) -> Grower:
        """The grower at work.

        Raises:
            InvalidInput: outside of ``train``.
        """
        if self._growth.grower is None:
            raise InvalidInput("nothing grows now", hint="the grower is there while trainer.train runs")
        return self._growth.grower

    @property
    def report(self) -> GrowthReport | None:
        """What growing did and what it brought; None until ``train`` has ended."""
        return self._growth.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        refuse(self._trainer)
        optimizer = plain_optimizer(given.get("optimizer"))
        if state.global_step:
            self._growth.load_state_dict(self._saved(args, state.global_step))
        names: list[str] = []
        figures = self._growth.begin(
            _model(self._trainer),
            _by_name(names),
            [] if optimizer is None else [optimizer],
            self._split(names),
            {"probe": lambda: given["train_dataloader"], "validation": self._validation},
            math.floor(state.epoch or 0),
        )
        self._log(figures, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log(self._growth.reached(math.ceil(state.epoch or 0)), control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self._growth.kernels, args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The trainer clears gradients by model.zero_grad, which does not know kernels.
        for parameter in self._growth.kernels:
            parameter.grad = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = _folder(args, state.global_step)
        if self._growth.grower is not None:
            checkpoint.save(folder / FILE, self._growth.state_dict())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._growth.go_back(checkpoint.load(Path(state.best_model_checkpoint) / FILE))
        self._log(self._growth.finish(), control)
        self._watch.remove()

    def _saved(self, args: TrainingArguments, step: int) -> checkpoint.Tree:
        places = [Path(place) for place in (self._resume_from, args.resume_from_checkpoint) if place]
        places.append(_folder(args, step))
        for place in places:
            if (place / FILE).exists():
                return checkpoint.load(place / FILE)
        raise NotFound(
            f"no {FILE} in {places[0]}, so growing cannot be resumed",
            hint="go back to an earlier checkpoint, or name the folder by GrowthCallback(..., resume_from=...)",
        )

    def _validation(self) -> Any:
        if self._trainer.eval_dataset is None or isinstance(self._trainer.eval_dataset, dict):
            raise InvalidInput("the trainer has no single evaluation data set", hint=GIVE_THEM)
        return self._trainer.get_eval_dataloader()

    def _split(self, names: list[str]) -> Callable[[Any], Batch]:
        """Take batches apart; the first one's names say what the model is called with."""

        def split(batch: Any) -> Batch:
            found = dict(batch)
            if not isinstance(found.get(self._labels), Tensor):
                raise InvalidInput(
                    f"a batch has no tensor {self._labels!r}, only {', '.join(found)}",
                    hint="name the targets by GrowthCallback(..., labels=...)",
                )
            targets = found.pop(self._labels)
            if not names:
                names.extend(found)
            return tuple(found[name] for name in names), targets

        return split

    def _log(self, figures: dict[str, float], control: TrainerControl) -> None:
        if figures:
            due = control.should_log
            self._trainer.log(dict(figures))
            control.should_log = due  # a log line of ours must not stand in for the trainer's own


def refuse(trainer: Trainer) -> None:
    """Say no to what growing has not been made for.

    Raises:
        Unsupported: several devices, sharding, reduced precision, or a model that is compiled, made anew or recomputed.
    """
    args = trainer.args
    obstacles = {
        f"{args.world_size} processes": args.world_size > 1,
        f"{args.n_gpu} GPUs at once": args.n_gpu > 1,
        "FSDP": bool(trainer.is_fsdp_enabled),
        "DeepSpeed": bool(trainer.is_deepspeed_enabled),
        "fp16": args.fp16,
        "bf16": args.bf16,
        "torch_compile": args.torch_compile,
        "gradient checkpointing": getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing,
        "model_init": trainer.model_init is not None,
    }
    for what, present in obstacles.items():
        if present:
            raise Unsupported(f"growing with {what}", hint="train one model on one device in full precision")


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimiser itself, out of what ``accelerate`` has wrapped it in."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer  # type: ignore[no-any-return]


def _model(trainer: Trainer) -> nn.Module:
    assert isinstance(trainer.model, nn.Module)  # noqa: S101
    return trainer.model


def _by_name(names: list[str]) -> Callable[..., Tensor]:
    """How the model is called with a batch's tensors, in the order of ``names``, for its logits."""

    def call(model: nn.Module, *inputs: Any) -> Tensor:
        return model(**dict(zip(names, inputs, strict=True))).logits  # type: ignore[no-any-return]

    return call


def _folder(args: TrainingArguments, step: int) -> Path:
    assert args.output_dir is not None  # noqa: S101
    return Path(args.output_dir) / f"checkpoint-{step}"
