"""Settings of a run: presets, files, --set, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_core import presets
from esper_core.errors import EsperError, InvalidInput, NotFound
from services.tolaria.config import read_run


@pytest.mark.parametrize("name", sorted(presets.available()))
def test_every_preset_is_described_and_valid(name: str) -> None:
    assert len(presets.available()[name]) > 10
    assert read_run(name).name == name


def test_settings_are_laid_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "My_Run.yaml"
    path.write_text("optimization: {epochs: 7}\n")
    config = read_run(str(path), ["optimization.learning_rate=0.5", "model.widths=[8, 2]", "seed=9"])
    assert (config.name, config.seed) == ("my-run", 9)
    assert (config.optimization.epochs, config.optimization.learning_rate) == (7, 0.5)
    assert config.model.widths == (8, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optimization: {epoch: 3}", "epochs"),
        ("modle: {host: mlp}", "model"),
        ("model: {host: cnn, widths: [3]}", "mlp"),
        ("model: {host: rnn}", "mlp, cnn"),
        ("dataset: {name: digits, noise: 0.1}", "spirals"),
        ("dataset: {name: cifar10}", "binary version"),
        ("dataset: {validation_fraction: 0.6, test_fraction: 0.6}", "0.2"),
        ("model: {host: transformer, width: 30, heads: 4}", "heads"),
        ("model: {widths: [0]}", "widths"),
        ("name: 'No Name'", "digits-1"),
        ("morphogenetic: {growth: {ramp_epoch: 3}}", "ramp_epochs"),
        ("optimization: [", "indentation"),
    ],
)
def test_what_cannot_be_is_refused_with_a_hint(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_run(str(path))
    assert says in f"{caught.value.message} {caught.value.hint}"


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(NotFound) as caught:
        read_run("digits-narow")
    assert "digits-narrow" in caught.value.hint


@pytest.mark.parametrize("setting", ["epochs", "=3", "optimization..epochs=3", "seed.x=1", "optimization.epochs=["])
def test_a_malformed_setting_is_refused(setting: str) -> None:
    with pytest.raises(EsperError) as caught:
        read_run("digits", ["seed=1", setting])
    assert caught.value.exit_code == 2
