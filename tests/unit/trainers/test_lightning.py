"""The Lightning callback with the real package: growth in ``fit``, and interrupted runs that are the uninterrupted ones bit for bit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper_core.errors import Corrupt, EsperError, InvalidInput, Unsupported
from esper_core.lifecycle import State
from esper_core.trainers.lightning import GrowthCallback, refuse
from tests.unit.control.growing import Silent, held, owned, settings
from tests.unit.nn.hosts import LOSS, batches, equal, perceptron
from tests.unit.trainers.ordering import Ordering

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SLOT = "2:4"
EPOCHS = 14


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Lit(pl.LightningModule):
    """A classifier with a narrow place, its rate falling by a schedule."""

    def __init__(self, widths: tuple[int, ...] = (6, 8, 2, 8, 6), activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = perceptron(*widths, activation=activation)

    def training_step(self, batch: Any, index: int) -> Any:
        return LOSS(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", LOSS(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2, amsgrad=True)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)]


def loader(seed: int, shuffle: bool = False) -> DataLoader[Any]:
    data = batches("mlp", 8, seed=seed)
    return DataLoader(
        TensorDataset(torch.cat([inputs for inputs, _ in data]), torch.cat([targets for _, targets in data])),
        batch_size=64,
        shuffle=shuffle,
    )


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = EPOCHS, **options: Any) -> pl.Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        **{"gradient_clip_val": 0.5, "log_every_n_steps": 1, "enable_checkpointing": False} | silent | options,
    )


def growing(**options: Any) -> GrowthCallback:
    given = {"controller": Ordering(SLOT, 1), "settings": settings(evaluate_every=1), "module": "net"} | options
    return GrowthCallback(LOSS, **given)


class Fit:
    """One run, all of its checkpoints kept."""

    def __init__(
        self, folder: Path, growth: GrowthCallback, lit: Lit | None = None, resume: Path | None = None, **options: Any
    ) -> None:
        self.lit, self.growth, self.folder = lit or Lit(), growth, folder
        keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, **options.pop("when", {}))
        self.trainer = trainer(folder, growth, keep, enable_checkpointing=True, **options)
        self.trainer.fit(self.lit, loader(11), loader(12), ckpt_path=resume)

    def checkpoint(self, state: State) -> Path:
        """The first one with the seed in that state."""
        for epoch in range(EPOCHS):
            path = self.folder / f"epoch={epoch}.ckpt"
            saved = torch.load(path, weights_only=False)["callbacks"]["GrowthCallback"]
            if saved["grower"]["seeds"][SLOT]["state"] == state.value:
                return path
        raise AssertionError(f"the seed never was {state.name}")

    def like(self, other: Fit) -> bool:
        """Whether both ended with the same network, optimiser and schedule, bit for bit."""
        mine, yours = (
            [dict(run.lit.state_dict()), run.trainer.optimizers[0].state_dict(), run.growth.state_dict()["ended"]]
            for run in (self, other)
        )
        return equal(mine, yours)


@functools.cache
def whole(kind: str, folder: Path) -> Fit:
    return Fit(folder / kind, KINDS[kind][0](), KINDS[kind][1]())


KINDS: dict[str, tuple[Callable[[], GrowthCallback], Callable[[], Lit]]] = {
    "folded": (growing, Lit),
    "beside": (
        lambda: growing(controller=Ordering(SLOT, 1, "low_rank")),
        functools.partial(Lit, activation=nn.Tanh),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def test_a_kernel_is_grown_and_folded(folder: Path) -> None:
    run = whole("folded", folder)
    report = run.growth.report
    assert report is not None
    assert (report.fossilized, report.beside, report.unfinished) == (1, (), ())
    fresh = Lit()
    sizes = [sum(parameter.numel() for parameter in lit.net.parameters()) for lit in (fresh, run.lit)]
    assert report.added_parameters == sizes[1] - sizes[0] > 0
    assert run.lit.net[2].out_features > fresh.net[2].out_features
    assert sorted(held(run.trainer.optimizers[0])) == sorted(owned(run.lit))
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9 ** (EPOCHS // 3))
    assert not any(module._forward_hooks for module in run.lit.modules())
    torch.save(run.lit.net, folder / "net.pt")  # nothing of the run hangs on to the network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [State.TRAINING, State.GRAFTING, State.FINE_TUNING, State.FOSSILIZED])
def test_resumed_equals_uninterrupted(kind: str, state: State, folder: Path, tmp_path: Path) -> None:
    run = whole(kind, folder)
    # A folded kernel's slot has its next seed at once; the last checkpoint but two is of that time.
    over = kind == "folded" and state is State.FOSSILIZED
    path = run.folder / f"epoch={EPOCHS - 3}.ckpt" if over else run.checkpoint(state)
    callback, lit = KINDS[kind]
    again = Fit(tmp_path, callback(), lit(), resume=path)
    assert again.trainer.current_epoch == EPOCHS
    assert not (tmp_path / "epoch=0.ckpt").exists(), "it began anew"
    assert again.like(run)
    if over:
        assert torch.load(path, weights_only=False)["state_dict"]["net.2.weight"].shape != Lit().net[2].weight.shape


class Constant(Lit):
    """Lightning itself forgets a schedule's step when it resumes from an epoch's last batch."""

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()[0]


@pytest.mark.parametrize(
    "when", [{"save_on_train_epoch_end": False}, {"every_n_train_steps": 4}], ids=["validated", "last batch"]
)
def test_a_checkpoint_from_before_the_epochs_end_is_resumed_too(when: dict[str, Any], tmp_path: Path) -> None:
    """The boundary of that epoch is still to be lived."""
    run = Fit(tmp_path / "whole", growing(), Constant(), when=when)
    path = run.checkpoint(State.GRAFTING)
    saved = torch.load(path, weights_only=False)
    assert saved["epoch"] == saved["callbacks"]["GrowthCallback"]["boundaries"]
    again = Fit(tmp_path / "again", growing(), Constant(), resume=path, when=when)
    assert again.like(run)


def test_a_fit_that_was_cut_off_goes_on_in_the_same_process(folder: Path, tmp_path: Path) -> None:
    class Cut(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if growth.grower.alpha(SLOT) == 1:
                raise RuntimeError("power cut")

    run, lit, growth = whole("folded", folder), Lit(), growing()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, growth, Cut()).fit(lit, loader(11), loader(12))
    again = Fit(tmp_path, growth, lit, resume=run.checkpoint(State.GRAFTING))
    assert again.like(run)


def test_its_part_of_a_checkpoint_is_tensors_and_plain_values(folder: Path, tmp_path: Path) -> None:
    saved = torch.load(whole("folded", folder).checkpoint(State.GRAFTING), weights_only=False)["callbacks"]
    torch.save(saved["GrowthCallback"], tmp_path / "state.pt")
    assert equal(torch.load(tmp_path / "state.pt", weights_only=True), saved["GrowthCallback"])


def test_a_finished_run_is_trained_on(folder: Path, tmp_path: Path) -> None:
    run = whole("folded", folder)
    run.trainer.save_checkpoint(tmp_path / "finished.ckpt")
    again = Fit(tmp_path, growing(controller=Silent()), resume=tmp_path / "finished.ckpt", epochs=EPOCHS + 1)
    assert again.trainer.current_epoch == EPOCHS + 1
    assert again.lit.net[2].weight.shape == run.lit.net[2].weight.shape


def test_without_a_kernel_training_is_as_it_was(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [growing(controller=Silent())]):
        lit = Lit()
        torch.manual_seed(5)
        trainer(tmp_path, *callbacks, epochs=3).fit(lit, loader(11, shuffle=True), loader(12))
        ends.append((dict(lit.state_dict()), torch.get_rng_state()))
    assert equal(*ends)


def test_figures_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    growth = growing()
    run = trainer(tmp_path, growth, logger=logger)
    run.fit(Lit(), loader(11), loader(12))
    assert growth.report is not None
    shown = run.callback_metrics
    assert {f"esper/health/{SLOT}", f"esper/alpha/{SLOT}", "esper/rolled_back"} <= set(shown)
    assert shown["esper/fossilized"] == growth.report.fossilized == 1
    assert shown["esper/added_parameters"] == growth.report.added_parameters
    assert "esper/folded_max_abs_diff" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_batches_of_another_kind_are_split(tmp_path: Path) -> None:
    class Named(Lit):
        def training_step(self, batch: Any, index: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), index)

    rows = [{"x": inputs, "y": target} for inputs, target in loader(11).dataset]  # type: ignore[attr-defined]
    growth = growing(split=lambda batch: (batch["x"], batch["y"]), validation=[{"x": x, "y": y} for x, y in loader(12)])
    run = trainer(tmp_path, growth, epochs=1)
    run.fit(Named(), DataLoader(rows, batch_size=64))
    with pytest.raises(InvalidInput, match="x, y") as caught:
        trainer(tmp_path, growing(), epochs=1).fit(Named(), DataLoader(rows, batch_size=64), loader(12))
    assert "split=" in caught.value.hint


def no_optimizer() -> Lit:
    class Still(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)

    return Still()


@pytest.mark.parametrize(
    ("lit", "options", "loaders", "kind", "words", "hint"),
    [
        (Lit, {"module": "nett"}, (11, 12), InvalidInput, "no module 'nett'", "'net'"),
        (Lit, {}, (11,), InvalidInput, "no validation data loader", "validation="),
        (Lit, {"probe": []}, (11, 12), InvalidInput, "no probe rows", "probe="),
        (no_optimizer, {}, (11, 12), InvalidInput, "0 of the trainer's 1 optimisers", "parameters"),
        (functools.partial(Lit, (6, 6)), {}, (11, 12), InvalidInput, "no span", "spans="),
    ],
)
def test_what_cannot_work_is_said(
    lit: Any, options: Any, loaders: Any, kind: type[EsperError], words: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words) as caught:
        trainer(tmp_path, growing(**options), epochs=1).fit(lit(), *map(loader, loaders))
    assert hint in caught.value.hint


def test_several_processes_and_other_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="DDPStrategy"):
        refuse(trainer(tmp_path, strategy="ddp", devices=2))
    with pytest.raises(Unsupported, match="bf16-mixed"):
        trainer(tmp_path, growing(), precision="bf16-mixed").fit(Lit(), loader(11), loader(12))


def test_another_networks_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    path = whole("folded", folder).folder / f"epoch={EPOCHS - 3}.ckpt"
    with pytest.raises(Corrupt, match=r"began with weight \[2, 8\] and is built with \[3, 8\]"):
        trainer(tmp_path, growing()).fit(Lit((6, 8, 3, 8, 6)), loader(11), loader(12), ckpt_path=path)


def test_evaluation_without_the_kernels_is_refused(folder: Path, tmp_path: Path) -> None:
    run = whole("folded", folder)
    with pytest.raises(Unsupported, match="kernels"):
        trainer(tmp_path, growing()).validate(Lit(), loader(12), ckpt_path=run.checkpoint(State.GRAFTING))
    later = run.folder / f"epoch={EPOCHS - 1}.ckpt"
    (result,) = trainer(tmp_path, growing()).validate(Lit(), loader(12), ckpt_path=later, verbose=False)
    assert result["loss"] == pytest.approx(run.trainer.callback_metrics["loss"].item(), rel=1e-6)
