"""``esperctl carve`` against a platform that answers by script, and what the offline carver is told."""

from __future__ import annotations

import json
import sys

import pytest

from esper_core.errors import Conflict, NotFound
from esper_core.pb.esper.core.v1 import carve_pb2, run_pb2
from esper_core.pb.esper.emrakul.v1 import emrakul_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2

PLAN = emrakul_pb2.Plan(
    plan_id="0198c0de-1234-7abc-8def-000000000000",
    run_id="digits-1",
    state=carve_pb2.PLAN_STATE_REMOVED,
    epoch=20,
    issued_by="emrakul",
    reason="worth the least per parameter",
    proposal=carve_pb2.Proposal(
        cuts=[carve_pb2.Cut(cluster="fc1", units=[3, 17])], expected_change=0.0021, parameters=130, flops=258
    ),
    events=[
        carve_pb2.CarveEvent(
            run_id="digits-1", plan_id="0198c0de-1234-7abc-8def-000000000000", epoch=20, state=3,
            cuts=[carve_pb2.Cut(cluster="fc1", units=[3, 17])], accuracy_before=0.97, accuracy=0.97, reason="worth little",
        ),
        carve_pb2.CarveEvent(
            run_id="digits-1", plan_id="0198c0de-1234-7abc-8def-000000000000", epoch=23, state=4,
            cuts=[carve_pb2.Cut(cluster="fc1", units=[3, 17])], accuracy_before=0.97, accuracy=0.968, parameters=130,
            flops=258, reason="silenced for 3 epochs without harm",
        ),
    ],
)  # fmt: skip
ORDER = carve_pb2.CarveOrder(
    order_id="o-1", run_id="digits-1", plan_id=PLAN.plan_id, act=1, issued_by="operator", reason="smaller"
)


@pytest.fixture
def known(platform):
    """A script in which one run and one plan exist."""

    def get_run(request):
        if request.run_id not in ("latest", "digits-1"):
            raise NotFound(f"no run {request.run_id}")
        return tolaria_pb2.GetRunResponse(run=run_pb2.Run(run_id="digits-1", host="mlp", dataset="digits", epochs=3))

    platform.on("GetRun", get_run)
    platform.on("ListPlans", lambda _: emrakul_pb2.ListPlansResponse(plans=[PLAN]))
    platform.on("GetPlan", lambda _: emrakul_pb2.GetPlanResponse(plan=PLAN))
    return platform


def test_planning_says_what_would_go_and_orders_nothing(known, esperctl):
    known.on("PlanCarving", lambda _: emrakul_pb2.PlanCarvingResponse(plan=PLAN))
    done = esperctl("carve", "plan", "--max-parameters", "500", "--max-loss", "0.1", "--reason", "smaller")
    assert done.exit_code == 0, done.stderr
    request = known.asked[-1]
    assert (request.run_id, request.max_parameters, request.max_loss, request.reason) == (
        "digits-1",
        500,
        0.1,
        "smaller",
    )
    assert "fc1" in done.stdout
    assert "3 17" in done.stdout
    assert f"esperctl carve apply {PLAN.plan_id}" in done.stderr
    esperctl("carve", "plan")
    assert not known.asked[-1].HasField("max_parameters")
    assert not known.asked[-1].HasField("max_loss")


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_a_plan_is_ordered_by_a_prefix_of_its_id(known, esperctl, verb):
    known.on("ApplyPlan", lambda _: emrakul_pb2.ApplyPlanResponse(order=ORDER))
    known.on("UndoPlan", lambda _: emrakul_pb2.UndoPlanResponse(order=ORDER))
    done = esperctl("carve", verb, "0198c0de", "--reason", "smaller", "-o", "json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["order_id"] == "o-1"
    assert (known.asked[-1].plan_id, known.asked[-1].reason) == (PLAN.plan_id, "smaller")
    missing = esperctl("carve", verb, "0199")
    assert missing.exit_code == 3
    assert "no plan '0199'" in missing.stderr


def test_what_is_gone_is_not_undone(known, esperctl):
    def refuse(_):
        raise Conflict("the units are gone for good", hint="start another run from a checkpoint of before")

    known.on("UndoPlan", refuse)
    done = esperctl("carve", "undo", "0198")
    assert done.exit_code == 5
    assert "checkpoint of before" in done.stderr


def test_a_plan_is_shown_with_its_story(known, esperctl):
    done = esperctl("carve", "show", "0198")
    assert done.exit_code == 0, done.stderr
    for words in ("REMOVED", "130 parameters", "silenced for 3 epochs", "0.968"):
        assert words in done.stdout
    told = json.loads(esperctl("carve", "show", "0198", "-o", "json").stdout)
    assert [event["state"] for event in told["events"]] == ["SEDATED", "REMOVED"]


def test_plans_are_listed(known, esperctl):
    done = esperctl("carve", "list", "--run", "latest", "-n", "7")
    assert done.exit_code == 0, done.stderr
    assert (known.asked[-1].run_id, known.asked[-1].page_size) == ("digits-1", 7)
    assert "REMOVED" in done.stdout
    (listed,) = json.loads(esperctl("carve", "list", "-o", "json").stdout)
    assert listed["plan_id"] == PLAN.plan_id


def test_a_survey_is_shown(known, esperctl):
    survey = carve_pb2.CarveSurvey(
        run_id="digits-1", epoch=15, loss=0.2, parameters=900, flops=1800, room_parameters=90, room_loss=0.06,
        autonomous=True,
        clusters=[
            carve_pb2.Standing(cluster="fc1", units=64, least=1, candidates=[4], importance=[0.0125], change=[0.01]),
            carve_pb2.Standing(cluster="head", units=10, obstacle="its output is the network's"),
        ],
    )  # fmt: skip
    known.on("GetSurvey", lambda _: emrakul_pb2.GetSurveyResponse(survey=survey))
    done = esperctl("carve", "survey")
    assert done.exit_code == 0, done.stderr
    for words in ("fc1", "0.0125", "its output is the network's", "90"):
        assert words in done.stdout


def test_a_copy_is_made_by_a_process_of_its_own(told, esperctl, tmp_path):
    folder = tmp_path / "runs" / "digits-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    flags = ["--share", "0.3", "--max-drop", "0.01", "--fine-tune", "2", "--dry-run", "--name", "small"]
    done = esperctl("carve", "copy", "digits", *flags, "--data-dir", str(tmp_path), "-o", "json")
    assert done.exit_code == 0, done.stderr
    assert told[0][1:] == [
        sys.executable, "-P", "-m", "services.tolaria.carve", "digits-1", *flags, "--data-dir", str(tmp_path), "-o", "json",
    ]  # fmt: skip
    for wrong in (["--share", "1.5"], ["--name", "No Name"]):
        assert esperctl("carve", "copy", "digits", *wrong, "--data-dir", str(tmp_path)).exit_code == 2
    assert len(told) == 1


def test_help_says_which_way_is_for_what(esperctl):
    assert "carve copy" in esperctl("carve", "plan", "--help").stdout
    assert "gone for good" in " ".join(esperctl("carve", "undo", "--help").stdout.split())
