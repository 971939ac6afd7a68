"""What the benches compute from what they measure. The measuring itself is never tested: times are no facts."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.bench import __main__ as command
from tests.bench import report, telemetry
from tests.bench.bench import Bench, Outcome, Table
from tests.bench.figures import ENOUGH_FOR_P99, Sample, interleaved, mean_row, ratio_row
from tests.bench.registry import ABOUT, GROUPS, expanded


def test_quantiles_lie_between_the_order_statistics() -> None:
    sample = Sample((4.0, 1.0, 3.0, 2.0))
    assert sample.median == 2.5
    assert sample.quantile(0.0) == 1.0
    assert sample.quantile(1.0) == 4.0
    assert sample.quantile(0.25) == pytest.approx(1.75)
    assert Sample((7.0,)).quantile(0.99) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        Sample(())


def test_a_percentile_is_told_only_when_there_are_enough_values() -> None:
    few, many = Sample((1.0,) * (ENOUGH_FOR_P99 - 1)), Sample((1.0,) * ENOUGH_FOR_P99)
    assert few.row("x", "ms")["p99"] is None
    assert many.row("x", "ms", 1e3)["p99"] == 1e3


def test_a_ratio_is_taken_within_a_round_not_between_averages() -> None:
    row = ratio_row("a / b", over=[2.0, 20.0, 200.0], under=[1.0, 10.0, 400.0])
    assert row["ratio"] == 2.0
    assert row["min"] == 0.5
    assert (row["ms"], row["base ms"]) == (20_000.0, 10_000.0)
    with pytest.raises(ValueError, match="zip"):
        ratio_row("a / b", [1.0], [1.0, 2.0])


def test_the_interval_of_a_mean_is_students() -> None:
    row = mean_row("gain", [1.0, 2.0, 3.0])
    assert row["mean"] == 2.0
    assert row["sd"] == 1.0
    assert row["± 95 %"] == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2 degrees of freedom)
    assert mean_row("gain", [1.0])["± 95 %"] is None


def test_works_take_turns_in_equal_blocks() -> None:
    calls = {"a": 0, "b": 0}

    def work(name: str) -> None:
        calls[name] += 1

    found = interleaved({"a": lambda: work("a"), "b": lambda: work("b")}, rounds=4)
    assert {name: len(values) for name, values in found.items()} == {"a": 4, "b": 4}
    assert calls["a"] == calls["b"]


def test_another_clock_may_be_used() -> None:
    ticks = itertools.count(1)
    found = interleaved(
        {"a": lambda: None, "b": lambda: None}, rounds=2, clock=lambda _work, _times: float(next(ticks))
    )
    assert sorted(found["a"] + found["b"]) == [3.0, 4.0, 5.0, 6.0]  # 1 and 2 went to find the length of a block


def test_a_group_is_its_benches_each_once() -> None:
    assert expanded(["graft", "exec"])[0] == "graft"
    assert sorted(expanded(["graft", "exec"])) == sorted(GROUPS["exec"])
    assert set(GROUPS["exec"]) <= set(ABOUT)
    assert expanded(["nothing"]) == ["nothing"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no bench 'nothing'"),
        (["--seeds", "0"], "trains nothing"),
        pytest.param(
            ["exec", "--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_hint(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert "hint: " in told.err
    assert not told.out


def test_on_a_gpu_only_what_lives_there_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["graft", "bus", "--device", "cuda"]) == 2
    assert "'bus'" in capsys.readouterr().err


def test_many_slots_are_a_host_that_runs() -> None:
    host = telemetry.many(3, "cpu")
    assert [slot.name for slot in host.slots.values()] == ["0:1", "1:2", "2:3"]
    assert host(torch.ones(1, 2)).shape == (1, 2)


def test_the_report_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    path = tmp_path / "REPORT.md"
    table = Table("Some figures", [{"what": "a | b", "n": 3, "ratio": 1.0}], ("a note",))
    outcome = Outcome(Bench("dormant", "about it", lambda _: []), 1.0, [table])
    report.write({"cores": "2 cores", "date": "today"}, [outcome], path)
    first = path.read_text()
    assert "| a \\| b | 3 | 1.000 |" in first
    assert first.rstrip().endswith(f"## {report.READING}")
    path.write_text(first + "\nIt is what it is.\n")
    other = Outcome(Bench("stack", "about another", lambda _: []), 1.0, failed="no reason")
    report.write({"cores": "4 cores", "date": "tomorrow"}, [other], path)
    again = path.read_text()
    assert "Machine: 4 cores." in again
    assert "date today" in again
    assert again.index("About it") < again.index("no reason") < again.index("It is what it is.")
    report.write({"cores": "4 cores", "date": "tomorrow"}, [outcome], path)
    assert "date today" not in path.read_text()
    assert path.read_text().count("It is what it is.") == 1


def test_two_reports_at_once_keep_each_other_s_sections(tmp_path: Path) -> None:
    """The lock is the file's, not the process's: threads stand for processes here."""
    path = tmp_path / "REPORT.md"
    path.write_text("# x\n\n## Reading\n\n" + "so it is\n" * 5_000)
    names = report.ORDER[:6]

    def write(name: str) -> None:
        for _ in range(20):
            report.write({"cores": "2"}, [Outcome(Bench(name, "about it", lambda _: []), 1.0)], path)

    with ThreadPoolExecutor(len(names)) as pool:
        for _ in pool.map(write, names):
            pass
    text = path.read_text()
    assert [name for name in report.ORDER if f"\n## {name}\n" in text] == list(names)
    assert text.count("so it is") == 5_000
    assert sorted(file.name for file in tmp_path.iterdir()) == [".REPORT.md.lock", "REPORT.md"]
