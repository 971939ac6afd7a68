"""The Hugging Face callback with the real ``Trainer``: a transformer grows, and interrupted runs are the uninterrupted ones."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from esper_core.errors import Corrupt, EsperError, InvalidInput, NotFound, Unsupported
from esper_core.lifecycle import State
from esper_core.nn import checkpoint
from esper_core.nn.widen import conform
from esper_core.trainers.huggingface import FILE, GrowthCallback
from tests.unit.control.growing import Silent, held, owned, settings
from tests.unit.nn.hosts import LOSS, equal
from tests.unit.trainers.ordering import Ordering

LAYER = "bert.encoder.layer.0"
SLOT = f"{LAYER}.intermediate.dense:{LAYER}.output.dense"
EPOCHS = 13
STEPS = 4
UNITS = 2


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


def bert(units: int, dropout: float = 0.0) -> BertForSequenceClassification:
    """One layer of attention and of ``units`` in between, weights such that all of them matter; fewer are the first of more."""
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=units,
        max_position_embeddings=4,
        num_labels=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    layer, generator = model.bert.encoder.layer[0], torch.Generator().manual_seed(7)
    weights = {layer.intermediate.dense: (16, 8), layer.output.dense: (8, 16), model.classifier: (4, 8)}
    weights |= {model.bert.embeddings.word_embeddings: (8, 8), model.bert.pooler.dense: (8, 8)}
    with torch.no_grad():
        for module, shape in weights.items():
            rows, columns = module.weight.shape
            module.weight.copy_(torch.randn(shape, generator=generator)[:rows, :columns])
        layer.output.dense.weight.mul_(4)
    return model


def labelled(seed: int, count: int = 256) -> list[dict[str, Any]]:
    """Three tokens, and what a network of sixteen units says of them."""
    tokens = torch.randint(1, 8, (count, 3), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = bert(16).eval()(input_ids=tokens).logits.argmax(1)
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Longest first: what a collator with dynamic padding gives."""
    ids = nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    labels = torch.stack([sample["labels"] for sample in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def trainer(folder: Path, model: nn.Module | None = None, **changes: Any) -> Trainer:
    given = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 256 // STEPS,
        "per_device_eval_batch_size": 256,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    names = ("train_dataset", "eval_dataset", "data_collator", "compute_metrics", "model_init")
    parts = {"train_dataset": labelled(1), "eval_dataset": labelled(2)}
    parts |= {name: changes.pop(name) for name in names if name in changes}
    args = TrainingArguments(str(folder), **given | changes)
    model = None if "model_init" in parts else model or bert(UNITS)
    made = Trainer(model, args, **parts)
    made.callback_handler.callbacks = [
        c for c in made.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"
    ]
    return made


def growing(made: Trainer, **options: Any) -> GrowthCallback:
    given = {"controller": Ordering(SLOT, 1), "settings": settings(evaluate_every=1)} | options
    growth = GrowthCallback(made, LOSS, **given)
    made.add_callback(growth)
    return growth


class Run:
    """A run from start to end, or from a checkpoint on."""

    def __init__(self, folder: Path, resume: Path | None = None, **changes: Any) -> None:
        self.folder = folder
        self.trainer = trainer(folder, **changes)
        self.growth = growing(self.trainer, resume_from=resume)
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    def checkpoint(self, state: State) -> Path:
        """The first one with the seed in that state."""
        for epoch in range(1, EPOCHS):
            path = self.folder / f"checkpoint-{epoch * STEPS}"
            if checkpoint.load(path / FILE)["grower"]["seeds"][SLOT]["state"] == state.value:
                return path
        raise AssertionError(f"the seed never was {state.name}")

    def like(self, other: Run) -> bool:
        """Whether both ended with the same network, optimiser and schedule, bit for bit."""
        mine, yours = (
            [dict(run.trainer.model.state_dict()), run.trainer.optimizer.state_dict()] for run in (self, other)
        )
        return equal(mine, yours)


@functools.cache
def whole(folder: Path) -> Run:
    return Run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole(tmp_path_factory.getbasetemp() / "whole")


def width(model: Any) -> int:
    return int(model.get_submodule(f"{LAYER}.intermediate.dense").out_features)


def test_a_kernel_is_grown_and_folded(run: Run) -> None:
    report, model = run.growth.report, run.trainer.model
    assert report is not None
    assert (report.fossilized, report.beside, report.unfinished) == (1, (), ())
    assert report.added_parameters == model.num_parameters() - bert(UNITS).num_parameters() > 0
    assert width(model) > UNITS
    assert isinstance(run.trainer.optimizer, AcceleratedOptimizer)
    assert sorted(held(run.trainer.optimizer)) == sorted(owned(model))
    assert not any(module._forward_hooks or module._load_state_dict_pre_hooks for module in model.modules())


def test_figures_are_logged_beside_the_trainers_own(run: Run) -> None:
    report, history = run.growth.report, run.trainer.state.log_history
    assert report is not None
    ours = [line for line in history if "esper/fossilized" in line]
    assert len(ours) == EPOCHS + 1
    assert sum("loss" in line for line in history) == sum("eval_loss" in line for line in history) == EPOCHS
    assert {f"esper/alpha/{SLOT}", f"esper/health/{SLOT}"} <= {key for line in ours for key in line}
    assert ours[-1]["esper/added_parameters"] == report.added_parameters
    assert ours[-1]["esper/folded_max_abs_diff"] == report.folded_max_abs_diff


@pytest.mark.parametrize("state", [State.GRAFTING, State.FOSSILIZED])
def test_resumed_equals_uninterrupted(state: State, run: Run, tmp_path: Path) -> None:
    # A folded kernel's slot has its next seed at once; the last checkpoint but one is of that time.
    over = state is State.FOSSILIZED
    path = run.folder / f"checkpoint-{(EPOCHS - 1) * STEPS}" if over else run.checkpoint(state)
    again = Run(tmp_path, resume=path)
    assert again.trainer.state.global_step == EPOCHS * STEPS
    assert not (tmp_path / f"checkpoint-{STEPS}").exists(), "it began anew"
    assert again.like(run)
    if over:
        loaded = load_file(path / "model.safetensors")
        assert loaded[f"{LAYER}.intermediate.dense.weight"].shape[0] > UNITS


def test_a_checkpoint_from_before_the_epochs_end_is_resumed_too(tmp_path: Path) -> None:
    """Written at the last step: the boundary of that epoch is still to be lived."""
    steps = {"save_strategy": "steps", "save_steps": STEPS, "num_train_epochs": 8}
    run = Run(tmp_path / "whole", **steps)
    again = Run(tmp_path / "again", resume=run.checkpoint(State.GRAFTING), **steps)
    assert again.like(run)


def test_the_best_checkpoint_comes_back_with_its_kernel(run: Run, tmp_path: Path) -> None:
    """The best epoch was one with a kernel beside a narrower network than the last one's."""
    best = int(run.checkpoint(State.FINE_TUNING).name.split("-")[1]) // STEPS
    epochs = iter(range(1, EPOCHS + 2))
    made = trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="fit",
        compute_metrics=lambda _: {"fit": float(next(epochs) == best)},
    )
    growth = growing(made)
    made.train()
    assert growth.report is not None
    assert growth.report.unfinished == (SLOT,)
    assert width(made.model) > UNITS
    losses = {line["epoch"]: line["eval_loss"] for line in made.state.log_history if "eval_loss" in line}
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-4)
    assert losses[best] != pytest.approx(losses[EPOCHS], rel=1e-2)


def test_kernels_are_clipped_and_their_gradients_cleared(tmp_path: Path) -> None:
    norms, left = [], []

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            kernels = growth._growth.kernels
            if kernels:
                norms.append(float(torch.stack([p.grad.norm() for p in kernels if p.grad is not None]).norm()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            left.extend(parameter.grad for parameter in growth._growth.kernels)

    made = trainer(tmp_path, num_train_epochs=7, save_strategy="no", max_grad_norm=1e-3)
    growth = growing(made)
    made.add_callback(Watching())
    made.train()
    assert len(norms) >= STEPS
    assert 0 < max(norms) <= 1e-3 * (1 + 1e-5)
    assert left
    assert all(gradient is None for gradient in left)


def test_without_a_kernel_training_is_as_it_was(tmp_path: Path) -> None:
    ends = []
    for grows in (False, True):
        made = trainer(tmp_path, bert(UNITS, dropout=0.1), num_train_epochs=2, save_strategy="no")
        if grows:
            growing(made, controller=Silent())
        made.train()
        ends.append((dict(made.model.state_dict()), torch.get_rng_state()))
    assert equal(*ends)


def test_sequences_of_several_lengths_are_measured(tmp_path: Path) -> None:
    rows = [row | {"input_ids": row["input_ids"][: 2 + index % 2]} for index, row in enumerate(labelled(1))]
    made = trainer(tmp_path, num_train_epochs=5, save_strategy="no", train_dataset=rows, data_collator=padded)
    growth = growing(made)
    seen: set[State] = set()

    class Watching(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.update(seed.state for seed in growth.grower.seeds)

    made.add_callback(Watching())
    made.train()
    assert State.TRAINING in seen, seen


def test_a_grown_networks_weights_are_loaded_into_a_fresh_one(run: Run) -> None:
    weights = load_file(run.folder / f"checkpoint-{EPOCHS * STEPS}" / "model.safetensors")
    fresh = bert(UNITS)
    assert set(conform(fresh, weights)) == {f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"}
    fresh.load_state_dict(weights)
    ids = torch.stack([row["input_ids"] for row in labelled(3, 16)])
    assert torch.equal(fresh.eval()(input_ids=ids).logits, run.trainer.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("changes", "options", "kind", "words", "hint"),
    [
        ({"bf16": True}, {}, Unsupported, "bf16", "full precision"),
        ({"torch_compile": True}, {}, Unsupported, "torch_compile", "one device"),
        ({"model_init": lambda: bert(UNITS)}, {}, Unsupported, "model_init", "one model"),
        ({"eval_dataset": None, "eval_strategy": "no"}, {}, InvalidInput, "no single evaluation", "validation="),
        ({}, {"labels": "label"}, InvalidInput, "no tensor 'label', only input_ids, labels", "labels="),
        ({}, {"probe": []}, InvalidInput, "no probe rows", "probe="),
    ],
)
def test_what_cannot_work_is_said(
    changes: Any, options: Any, kind: type[EsperError], words: str, hint: str, tmp_path: Path
) -> None:
    def attempt() -> None:
        made = trainer(tmp_path, num_train_epochs=1, save_strategy="no", **changes)
        growing(made, **options)
        made.train()

    with pytest.raises(kind, match=words) as caught:
        attempt()
    assert hint in caught.value.hint


def test_a_checkpoint_without_its_growing_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / f"checkpoint-{STEPS * 4}"
    shutil.copytree(run.folder / path.name, path)
    (path / FILE).unlink()
    with pytest.raises(NotFound, match=FILE):
        Run(tmp_path, resume=path)


def test_growing_of_other_weights_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / f"checkpoint-{STEPS * 4}"
    shutil.copytree(run.folder / path.name, path)
    shutil.copy(run.folder / f"checkpoint-{STEPS * 3}" / FILE, path / FILE)
    with pytest.raises(Corrupt, match="not of the loaded weights"):
        Run(tmp_path, resume=path)
