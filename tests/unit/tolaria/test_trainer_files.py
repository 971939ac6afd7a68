"""What a run keeps on disk: checkpoints, history, orders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper_core.control.packet import Command
from esper_core.errors import Corrupt, Exhausted
from esper_core.lifecycle import State
from esper_core.nn import checkpoint
from services.tolaria.checkpoints import Checkpoints
from services.tolaria.history import Boundary, Figures, History
from services.tolaria.orders import Orders


def test_the_last_few_checkpoints_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    for epoch in range(1, 8):
        kept.save(epoch, {"epoch": epoch})
    assert [path.name for path in kept.paths()] == [f"epoch-{epoch:08d}.ckpt" for epoch in (5, 6, 7)]
    assert kept.latest() == {"epoch": 7}


def test_a_damaged_checkpoint_is_set_aside_and_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, {"epoch": 1})
    newest = kept.save(2, {"epoch": 2, "weights": torch.ones(8)})
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 4
    newest.write_bytes(raw)
    assert kept.latest() == {"epoch": 1}
    assert "checkpoint.damaged" in capsys.readouterr().err
    assert newest.with_suffix(".damaged").exists()
    assert kept.latest() == {"epoch": 1}


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    assert kept.latest() is None
    kept.save(1, {}).write_bytes(b"?")
    with pytest.raises(Corrupt):
        kept.latest()


def test_half_a_checkpoint_is_never_seen(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, {"epoch": 1})
    half = tmp_path / ".epoch-00000002.ckpt.99.tmp"
    half.write_bytes(b"half")
    assert kept.latest() == {"epoch": 1}
    assert Checkpoints(tmp_path).latest() == {"epoch": 1}
    assert not half.exists()


def test_a_full_disk_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    kept = Checkpoints(tmp_path)
    kept.save(1, {"epoch": 1})
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(Exhausted) as caught:
        kept.save(2, {"epoch": 2})
    assert "--resume" in caught.value.hint
    assert kept.latest() == {"epoch": 1}


def boundary(epoch: int, loss: float = 0.5) -> Boundary:
    figures = Figures(
        epoch=epoch, step=epoch, train_loss=loss, learning_rate=0.1, train_seconds=1, boundary_seconds=1, parameters=3
    )
    return Boundary(figures=figures)


def test_history_keeps_what_a_checkpoint_counts_and_cuts_off_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = History(path, 0)
    for epoch in range(5):
        first.append(boundary(epoch))
    first.close()
    with path.open("ab") as file:
        file.write(b'{"figures": {"epo')
    again = History(path, 3)
    assert [line.figures.epoch for line in again.boundaries] == [0, 1, 2]
    again.append(boundary(3, float("nan")))
    again.close()
    third = History(path, 4)
    third.close()
    lines = third.boundaries
    assert lines[3].figures.train_loss != lines[3].figures.train_loss


def test_a_history_with_a_hole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b"{}\n")
    for epochs in (1, 2):
        with pytest.raises(Corrupt):
            History(path, epochs)


def order(number: int) -> Command:
    return Command(command_id=f"c{number}", run_id="r", slot="a:b", target=State.CULLED, issued_by="operator")


def test_orders_survive_a_restart_and_come_once(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    orders = Orders(path, Command, "command_id")
    for number in (1, 2, 1):
        orders.keep(order(number))
    assert [command.command_id for command in orders.take()] == ["c1", "c2"]
    assert orders.take() == []
    orders.close()
    with path.open("ab") as file:
        file.write(b'{"command_id": "cut sh')
    again = Orders(path, Command, "command_id")
    again.keep(order(2))
    again.keep(order(3))
    assert [command.command_id for command in again.take()] == ["c1", "c2", "c3"]
    again.close()
    third = Orders(path, Command, "command_id")
    assert len(third.take()) == 3
    third.close()
