"""``kernel bench``, ``kernel retag`` and what ``kernel show`` says of risk, against a platform that answers by script."""

from __future__ import annotations

import json
import statistics

import pytest

from esper_core.errors import NotFound
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2

KERNEL = "kernel-" + "3f" * 32
SECONDS = (0.002, 0.001, 0.004)


def evaluation(phase=urabrask_pb2.PHASE_DONE, seconds=0.001, **changes):
    measured = kernel_pb2.Measurement(
        batch=64, forward_seconds=seconds, forward_seconds_p99=2 * seconds, backward_seconds=3 * seconds,
        rows_per_second=64 / seconds, peak_memory_bytes=4096, repetitions=30, target="linux/x",
        lessons=[kernel_pb2.Lesson(name="copy", level=1, explained=0.75, steps=40)],
    )  # fmt: skip
    fields = {"verdict": 2, "risk": 0.25, "risk_model": "reports-60-abc", "measurement": measured, **changes}
    return urabrask_pb2.Evaluation(kernel_id=KERNEL, phase=phase, **fields)


@pytest.fixture
def judged(platform):
    """A judge that needs two looks for every measurement."""
    state = {"run": -1, "looks": 0}

    def evaluate(request):
        assert request.kernel_id == KERNEL
        state["run"] += 1
        state["looks"] = 0
        return urabrask_pb2.EvaluateResponse(evaluation=evaluation(urabrask_pb2.PHASE_QUEUED))

    def look(_request):
        state["looks"] += 1
        done = state["looks"] > 1
        phase = urabrask_pb2.PHASE_DONE if done else urabrask_pb2.PHASE_SAFETY
        return urabrask_pb2.GetEvaluationResponse(evaluation=evaluation(phase, SECONDS[state["run"]]))

    record = kernel_pb2.KernelRecord(manifest=kernel_pb2.KernelManifest(kernel_id=KERNEL), status=2)
    platform.on("GetKernel", lambda _: urza_pb2.GetKernelResponse(kernel=record))
    platform.on("Evaluate", evaluate)
    platform.on("GetEvaluation", look)
    return platform


def test_bench_measures_so_often_and_tells_the_spread(judged, esperctl):
    done = esperctl("kernel", "bench", "3f3f3f", "--repeat", "3", "-o", "json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert [run["forward_seconds"] for run in document["runs"]] == list(SECONDS)
    spread = document["figures"]["forward_seconds"]
    assert spread["n"] == 3
    assert spread["median"] == 0.002
    assert spread["iqr"] == pytest.approx(0.003 - 0.0015)
    assert spread["cv"] == pytest.approx(statistics.stdev(SECONDS) / statistics.mean(SECONDS))
    assert document["figures"]["backward_seconds_p99"]["n"] == 0
    assert document["figures"]["peak_memory_bytes"]["cv"] == 0
    assert document["figures"]["learned"]["median"] == 0.75
    assert (document["verdict"], document["risk"], document["risk_model"]) == ("VALIDATED", 0.25, "reports-60-abc")
    assert document["lessons"] == [{"name": "copy", "level": 1, "explained": 0.75, "steps": 40}]


def test_bench_on_paper(judged, esperctl):
    page = esperctl("kernel", "bench", "3f3f3f", "-N", "2").stdout
    lines = [line.split() for line in page.splitlines()]
    assert ["forward", "2", "1.5", "ms", "500", "µs", "47.1", "%"] in lines
    assert ["copy", "1", "0.75", "40"] in lines
    assert ["risk", "0.25", "by", "reports-60-abc"] in lines
    assert not any("forward+backward p99" in line for line in page.splitlines())


def test_one_run_has_no_spread(judged, esperctl):
    document = json.loads(esperctl("kernel", "bench", "3f3f3f", "--repeat", "1", "-o", "json").stdout)
    assert document["figures"]["rows_per_second"] == {"n": 1, "median": 32000.0, "iqr": None, "cv": None}


def test_bench_of_a_kernel_that_fails_says_why(judged, esperctl):
    unfit = evaluation(verdict=4, reason="it explodes", rejection=11)
    unfit.ClearField("measurement")
    judged.on("GetEvaluation", lambda _: urabrask_pb2.GetEvaluationResponse(evaluation=unfit))
    done = esperctl("kernel", "bench", "3f3f3f")
    assert done.exit_code == 5
    assert "is RETIRED: it explodes" in done.stderr


def test_bench_of_a_kernel_that_nobody_judges_ends(judged, esperctl):
    waiting = evaluation(urabrask_pb2.PHASE_QUEUED)
    judged.on("GetEvaluation", lambda _: urabrask_pb2.GetEvaluationResponse(evaluation=waiting))
    file = judged.data_dir / "endpoints.json"
    kept = file.read_bytes()
    file.write_text(json.dumps(json.loads(kept) | {"upkeep": {"verdict_seconds": 0.3}}))
    try:
        done = esperctl("kernel", "bench", "3f3f3f")
    finally:
        file.write_bytes(kept)
    assert done.exit_code == 9
    assert "not judged after 0.3 s: it waits for a judge" in done.stderr
    assert "esperctl status" in done.stderr


def test_retag_shows_what_changed(platform, esperctl):
    change = urabrask_pb2.TagChange(
        kernel_id=KERNEL, target="linux/x", removed=["latency:low"], added=["latency:medium"]
    )
    answer = urabrask_pb2.RetagResponse(examined=41, changed=1, changes=[change])
    platform.on("Retag", lambda _: answer)
    page = esperctl("kernel", "retag", "--dry-run").stdout
    assert platform.asked[-1].dry_run
    assert "1 of 41 would change" in page
    assert ["kernel-3f3f3f3f3f3f", "latency:low", "latency:medium", "linux/x"] in [
        line.split() for line in page.splitlines()
    ]
    document = json.loads(esperctl("kernel", "retag", "-o", "json").stdout)
    assert not platform.asked[-1].dry_run
    assert (document["examined"], document["changed"], document["dry_run"]) == (41, 1, False)
    assert document["changes"][0]["added"] == ["latency:medium"]


def test_show_tells_risk_and_fault(judged, esperctl):
    document = json.loads(esperctl("kernel", "show", "3f3f3f", "-o", "json").stdout)
    assert (document["risk"], document["risk_model"], document["rejection"]) == (0.25, "reports-60-abc", None)
    rejected = urabrask_pb2.Evaluation(kernel_id=KERNEL, phase=5, verdict=3, rejection=11)
    judged.on("GetEvaluation", lambda _: urabrask_pb2.GetEvaluationResponse(evaluation=rejected))
    assert ["fault", "EXPLODES"] in [line.split() for line in esperctl("kernel", "show", "3f3f3f").stdout.splitlines()]

    def unknown(_request):
        raise NotFound("never looked at")

    judged.on("GetEvaluation", unknown)
    document = json.loads(esperctl("kernel", "show", "3f3f3f", "-o", "json").stdout)
    assert (document["risk"], document["rejection"]) == (None, None)
