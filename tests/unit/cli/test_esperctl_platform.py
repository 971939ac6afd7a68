"""Every noun against a platform that answers by script: what is asked, what is shown, what a program reads."""

import base64
import json

import pytest

from esper_core.errors import IllegalTransition, NotFound
from esper_core.pb.esper.bus.v1.bus_pb2 import EpochCompleted, EventEnvelope
from esper_core.pb.esper.core.v1 import blueprint_pb2, decision_pb2, kernel_pb2, lifecycle_pb2, run_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2

KERNEL = "kernel-" + "3f" * 32
BLUEPRINT = "blueprint-" + "ab" * 32
INTERFACE = blueprint_pb2.SlotInterface(
    layout=1, in_width=64, out_width=32, hidden_width=8, activation="relu", foldable=True
)
RUN = run_pb2.Run(
    run_id="digits-1",
    state=2,
    host="mlp",
    dataset="digits",
    epochs=3,
    seed=7,
    morphogenetic=True,
    slots=[run_pb2.Slot(slot="fc1:fc2", interface=INTERFACE), run_pb2.Slot(slot="fc2:fc3", interface=INTERFACE)],
    latest=run_pb2.EpochMetrics(epoch=2, train_loss=0.5, validation_accuracy=0.875, parameters=12345),
    started="2025-01-02T03:04:05.678Z",
    results={"test_accuracy": 0.9},
)
SEED = lifecycle_pb2.Seed(
    seed_id="digits-1/fc1:fc2/1", run_id="digits-1", slot="fc1:fc2", generation=1, state=9, kernel_id=KERNEL,
    blueprint_name="widen", alpha=1.0, epoch=21, health=-1.0,
    history=[
        lifecycle_pb2.SeedEvent(
            seed_id="digits-1/fc1:fc2/1", run_id="digits-1", slot="fc1:fc2", source=1, target=2, epoch=5,
            reason="health 0.12 is under 0.3", measurements={"health": 0.12, "confidence": 0.97},
        ),
        lifecycle_pb2.SeedEvent(
            seed_id="digits-1/fc1:fc2/1", run_id="digits-1", slot="fc1:fc2", source=8, target=9, epoch=21, alpha=1.0,
            reason="pays its rent", command_id="0198c0de-1234-7abc-8def-000000000000",
        ),
    ],
)  # fmt: skip


def known(platform) -> None:
    """A script in which one run and one kernel exist."""

    def get_run(request):
        if request.run_id not in ("latest", "digits-1"):
            raise NotFound(f"no run {request.run_id}")
        return tolaria_pb2.GetRunResponse(run=RUN)

    platform.on("GetRun", get_run)
    other = run_pb2.Run(run_id="spirals-1")
    platform.on("ListRuns", lambda _: tolaria_pb2.ListRunsResponse(runs=[RUN, other]))
    platform.on("GetKernel", lambda request: urza_pb2.GetKernelResponse(kernel=record()))
    platform.on("GetEvaluation", never_judged)


def never_judged(request):
    raise NotFound(f"{request.kernel_id} was never looked at")


def record(**changes) -> kernel_pb2.KernelRecord:
    manifest = kernel_pb2.KernelManifest(kernel_id=KERNEL, blueprint_id=BLUEPRINT, parameters=300, flops=600)
    manifest.blueprint.name = "widen"
    return kernel_pb2.KernelRecord(manifest=manifest, status=2, tags=["cheap"], **changes)


def rows(page: str) -> list[list[str]]:
    return [line.split() for line in page.splitlines()]


def test_runs_list(platform, esperctl):
    known(platform)
    done = esperctl("runs", "list", "--state", "finished", "-n", "7")
    assert (platform.asked[0].state, platform.asked[0].page_size) == (run_pb2.RUN_STATE_FINISHED, 7)
    assert rows(done.stdout)[1] == [
        "digits-1", "FINISHED", "mlp", "digits", "3/3", "0.875", "yes", "2", "2025-01-02", "03:04:05",
    ]  # fmt: skip
    documents = json.loads(esperctl("runs", "list", "-o", "json").stdout)
    assert [document["run_id"] for document in documents] == ["digits-1", "spirals-1"]
    assert documents[0]["latest"]["parameters"] == 12345
    assert documents[1]["latest"] is None


def test_runs_show_with_history_and_by_prefix(platform, esperctl):
    known(platform)
    epochs = [run_pb2.EpochMetrics(epoch=0, train_loss=2.0), run_pb2.EpochMetrics(epoch=1, train_loss=1.0)]
    platform.on("GetRunHistory", lambda _: nissa_pb2.GetRunHistoryResponse(epochs=epochs))
    document = json.loads(esperctl("runs", "show", "dig", "-o", "json").stdout)
    assert [epoch["train_loss"] for epoch in document["history"]] == [2.0, 1.0]
    page = esperctl("runs", "show").stdout
    assert "test_accuracy 0.9" in page
    assert ["fc1:fc2", "64", "8", "32", "relu", "yes"] in rows(page)
    assert any(row[:4] == ["1", "1", "-", "-"] for row in rows(page))


def test_an_unknown_run_is_answered_with_the_nearest(platform, esperctl):
    known(platform)
    done = esperctl("runs", "show", "digist-1")
    assert done.exit_code == 3
    assert "digits-1" in done.stderr


def test_latest_without_any_run_says_how_to_start_one(platform, esperctl):
    def nothing(_request):
        raise NotFound("there is no run")

    platform.on("GetRun", nothing)
    done = esperctl("seed", "list")
    assert done.exit_code == 3
    assert "esperctl train" in done.stderr


def test_runs_watch_ends_with_the_run(platform, esperctl):
    known(platform)
    news = [
        run_pb2.Run(run_id="digits-1", state=1, epochs=3, latest=run_pb2.EpochMetrics(epoch=0, train_loss=1.5)),
        RUN,
    ]
    platform.on("WatchRun", lambda _: [tolaria_pb2.WatchRunResponse(run=run) for run in news])
    lines = [json.loads(line) for line in esperctl("runs", "watch", "-o", "json").stdout.splitlines()]
    assert [line["latest"]["epoch"] for line in lines] == [0, 2]
    done = esperctl("runs", "watch")
    assert "1/3" in done.stdout.splitlines()[0]
    assert "FINISHED" in done.stderr


def test_seed_list(platform, esperctl):
    known(platform)
    platform.on("ListSeeds", lambda _: kasmina_pb2.ListSeedsResponse(seeds=[SEED]))
    done = esperctl("seed", "list", "--run", "any", "--state", "training", "--state", "fossilized")
    assert platform.asked[-1].run_id == ""
    assert list(platform.asked[-1].states) == [4, 9]
    assert rows(done.stdout)[1] == [
        "digits-1", "fc1:fc2", "1", "FOSSILIZED", "21", "1", "-", "widen", "kernel-" + "3f" * 6,
    ]  # fmt: skip


def test_seed_show_tells_the_whole_story(platform, esperctl):
    known(platform)
    platform.on("GetSeed", lambda _: kasmina_pb2.GetSeedResponse(seed=SEED))
    page = esperctl("seed", "show", "fc1").stdout
    first = next(line for line in page.splitlines() if "DORMANT" in line)
    assert first.split()[:5] == ["5", "DORMANT", "→", "GERMINATED", "0"]
    assert "health 0.12 is under 0.3" in first
    assert "confidence=0.97 health=0.12" in first
    last = next(line for line in page.splitlines() if "FINE_TUNING" in line)
    assert last.split()[:5] == ["21", "FINE_TUNING", "→", "FOSSILIZED", "1"]
    assert not platform.asked[-1].HasField("generation")
    document = json.loads(esperctl("seed", "show", "digits-1/fc1:fc2/1", "-o", "json").stdout)
    assert platform.asked[-1].generation == 1
    assert [event["target"] for event in document["history"]] == ["GERMINATED", "FOSSILIZED"]


def test_a_mistyped_slot_is_answered_with_the_nearest(platform, esperctl):
    known(platform)
    done = esperctl("seed", "show", "fc1-fc2")
    assert done.exit_code == 3
    assert "fc1:fc2" in done.stderr


def test_germinate_orders_once_with_an_id_of_its_own(platform, esperctl):
    known(platform)

    def order(request):
        return kasmina_pb2.GerminateResponse(
            command=lifecycle_pb2.Command(
                command_id=request.command_id, run_id=request.run_id, slot=request.slot, target=2,
                kernel_id=request.kernel_id,
            )
        )  # fmt: skip

    platform.on("Germinate", order)
    done = esperctl("seed", "germinate", "fc2", "3f3f3f", "--style", "cosine", "--reason", "try it", "-o", "json")
    asked = platform.asked[-1]
    assert (asked.run_id, asked.slot, asked.kernel_id, asked.style) == ("digits-1", "fc2:fc3", KERNEL, 2)
    assert asked.reason == "try it"
    assert json.loads(done.stdout)["command_id"] == asked.command_id
    assert len(asked.command_id) == 36
    assert "seed show fc2:fc3 --run digits-1" in done.stderr


def test_a_refusal_keeps_its_hint_and_code(platform, esperctl):
    known(platform)

    def refuse(_request):
        raise IllegalTransition("a seed cannot go from DORMANT to CULLED", hint="next: GERMINATED")

    platform.on("Transition", refuse)
    done = esperctl("seed", "transition", "fc1", "culled")
    assert done.exit_code == 5
    assert done.stderr.splitlines() == ["error: a seed cannot go from DORMANT to CULLED", "hint: next: GERMINATED"]


@pytest.mark.parametrize(("word", "number"), [("culled", 10), ("rolled_back", 11), ("CULLED", 10)])
def test_transition_targets(platform, esperctl, word, number):
    known(platform)
    platform.on("Transition", lambda request: kasmina_pb2.TransitionResponse())
    assert esperctl("seed", "transition", "fc1", word).exit_code == 0
    assert platform.asked[-1].target == number


def test_load_and_unload(platform, esperctl):
    known(platform)
    platform.on("LoadKernel", lambda _: kasmina_pb2.LoadKernelResponse())
    platform.on("UnloadKernel", lambda _: kasmina_pb2.UnloadKernelResponse())
    esperctl("kernel", "load", "3f3f3f", "fc1")
    assert (platform.asked[-1].slot, platform.asked[-1].kernel_id) == ("fc1:fc2", KERNEL)
    first = platform.asked[-1].command_id
    esperctl("kernel", "unload", "fc1")
    assert platform.asked[-1].slot == "fc1:fc2"
    assert platform.asked[-1].command_id not in ("", first)


def test_seed_watch_is_lines(platform, esperctl):
    known(platform)
    platform.on("WatchSeeds", lambda _: [kasmina_pb2.WatchSeedsResponse(event=event) for event in SEED.history])
    done = esperctl("seed", "watch", "-o", "json")
    assert [json.loads(line)["target"] for line in done.stdout.splitlines()] == ["GERMINATED", "FOSSILIZED"]
    assert platform.asked[-1].until_run_ends
    assert "DORMANT → GERMINATED" in esperctl("seed", "watch").stdout.splitlines()[0]


def test_kernel_list_asks_for_the_slot_s_interface(platform, esperctl):
    from esper_core.blueprint.interface import SlotInterface
    from esper_core.rpc.convert import from_proto

    known(platform)
    platform.on("QueryKernels", lambda _: urza_pb2.QueryKernelsResponse(kernels=[record()]))
    platform.on("GetBlueprint", lambda _: urza_pb2.GetBlueprintResponse(blueprint_id=BLUEPRINT))
    arguments = ["--slot", "fc1", "--status", "validated", "--tag", "cheap", "--blueprint", "widen"]
    done = esperctl("kernel", "list", *arguments)
    asked = platform.asked[-1]
    assert asked.interface_id == from_proto(INTERFACE, SlotInterface).id
    assert (asked.status, list(asked.required_tags), asked.blueprint_id) == (2, ["cheap"], BLUEPRINT)
    assert rows(done.stdout)[1] == ["kernel-" + "3f" * 6, "VALIDATED", "widen", "-", "300", "600", "-", "cheap", "-"]


def test_kernel_show_has_measurements_only_when_there_are_some(platform, esperctl):
    known(platform)
    assert "forward" not in esperctl("kernel", "show", "3f3f3f").stdout
    measured = record(measurement=kernel_pb2.Measurement(batch=64, forward_seconds=0.00025, deterministic=True))
    platform.on("GetKernel", lambda _: urza_pb2.GetKernelResponse(kernel=measured))
    assert ["forward", "250", "µs"] in rows(esperctl("kernel", "show", "3f3f3f").stdout)


def test_decisions_show_figures_and_reasons(platform, esperctl):
    known(platform)
    reason = decision_pb2.Reason(code=1, detail="health is low", value=0.12, threshold=0.3)
    action = decision_pb2.AdaptationAction(confidence=0.97, expected_gain=0.4, reasons=[reason])
    action.command.MergeFrom(lifecycle_pb2.Command(slot="fc1:fc2", target=2, kernel_id=KERNEL))
    acted = decision_pb2.AdaptationSignal(decision_id="0198-a", run_id="digits-1", epoch=5, actions=[action])
    waited = decision_pb2.AdaptationSignal(
        decision_id="0198-b", run_id="digits-1", epoch=6, abstentions=[decision_pb2.Reason(code=7)]
    )

    def pages(request):
        if request.page_token:
            return tamiyo_pb2.ListDecisionsResponse(decisions=[acted])
        return tamiyo_pb2.ListDecisionsResponse(decisions=[waited], next_page_token="more")

    platform.on("ListDecisions", pages)
    page = esperctl("decisions", "show", "0198-a").stdout
    assert ["UNHEALTHY", "0.12", "0.3", "health", "is", "low"] in rows(page)
    assert esperctl("decisions", "show", "0198").exit_code == 2
    platform.on("ListDecisions", lambda _: tamiyo_pb2.ListDecisionsResponse(decisions=[waited, acted]))
    listed = esperctl("decisions", "list", "--actions").stdout.splitlines()
    assert platform.asked[-1].actions_only
    assert listed[1].split() == ["0198-b", "digits-1", "6", "wait", "GRAFT_IN_FLIGHT"]
    assert "fc1:fc2 to GERMINATED with kernel-3f3f3f3f3f3f" in listed[2]
    assert "health is low" in listed[2]


def logged(name: str, payload: str) -> nissa_pb2.LoggedEvent:
    metrics = run_pb2.EpochMetrics(epoch=3, step=2**60, train_loss=0.5)
    data = EpochCompleted(run_id="digits-1", metrics=metrics).SerializeToString()
    envelope = EventEnvelope(event_id="e1", type=f"esper.bus.v1.{name}", payload=data, epoch=3, producer="tolaria")
    envelope.created.FromJsonString("2025-01-02T03:04:05.678Z")
    return nissa_pb2.LoggedEvent(subject="system.events.epoch.digits-1", envelope=envelope, payload_json=payload)


def test_bus_tail_opens_the_payload(platform, esperctl):
    event = logged("EpochCompleted", '{"metrics": {"train_loss": 0.5}}')
    platform.on("WatchEvents", lambda _: [nissa_pb2.WatchEventsResponse(event=event)])
    done = esperctl("bus", "tail", "--type", "EpochCompleted", "-o", "json")
    document = json.loads(done.stdout)
    assert document["payload"]["metrics"]["train_loss"] == 0.5
    assert document["payload"]["metrics"]["step"] == 2**60
    assert document["epoch"] == 3
    assert platform.asked[-1].type == "esper.bus.v1.EpochCompleted"
    assert "03:04:05.678  system.events.epoch.digits-1  EpochCompleted" in esperctl("bus", "tail").stdout


def test_a_payload_of_a_later_version_stays_closed(platform, esperctl):
    event = logged("Unheard", "{}")
    platform.on("WatchEvents", lambda _: [nissa_pb2.WatchEventsResponse(event=event)])
    document = json.loads(esperctl("bus", "tail", "-o", "json").stdout)
    assert base64.b64decode(document["payload"]) == event.envelope.payload


def test_bus_events_of_before(platform, esperctl):
    event = logged("EpochCompleted", "{}")
    platform.on("ListEvents", lambda _: nissa_pb2.ListEventsResponse(events=[event]))
    assert rows(esperctl("bus", "events").stdout)[1][2:] == [
        "system.events.epoch.digits-1", "3", "tolaria", "EpochCompleted", "{}",
    ]  # fmt: skip


def test_an_unknown_event_type_is_answered_with_the_nearest(platform, esperctl):
    done = esperctl("bus", "tail", "--type", "SeedEvnt")
    assert done.exit_code == 3
    assert "SeedEvent" in done.stderr
    assert platform.asked == []


def test_dead_letters_tell_why(platform, esperctl):
    letter = nissa_pb2.DeadLetter(consumer="kasmina", subject="s", event_id="e", reason="no envelope", data=b"abc")
    platform.on("ListDeadLetters", lambda _: nissa_pb2.ListDeadLettersResponse(letters=[letter]))
    assert rows(esperctl("bus", "dead-letters").stdout)[1] == ["-", "kasmina", "s", "e", "3", "no", "envelope"]


def test_builds_and_policy(platform, esperctl):
    build = tezzeret_pb2.Build(build_id="build-" + "0" * 64, state=4, blueprint_name="widen", reason="does not fit")
    platform.on("ListBuilds", lambda _: tezzeret_pb2.ListBuildsResponse(builds=[build]))
    page = esperctl("build", "list", "--state", "failed").stdout
    assert platform.asked[-1].state == tezzeret_pb2.BUILD_STATE_FAILED
    assert "FAILED" in page
    assert "does not fit" in page
    policy = tamiyo_pb2.Policy(version="policy-1", kind="heuristic", parameters={"health": 0.3}, active=True)
    platform.on("GetPolicyStatus", lambda _: tamiyo_pb2.GetPolicyStatusResponse(policy=policy, decisions=4))
    assert "health 0.3" in esperctl("policy", "status").stdout
    platform.on("LoadPolicy", lambda _: tamiyo_pb2.LoadPolicyResponse(policy=policy))
    assert json.loads(esperctl("policy", "load", "policy-1", "-o", "json").stdout)["active"] is True


def test_hostile_text_from_elsewhere_cannot_reach_the_terminal(platform, esperctl):
    hostile = run_pb2.Run(run_id="x", host="\x1b]0;owned\x07", dataset="[red]not markup[/red]")
    platform.on("ListRuns", lambda _: tolaria_pb2.ListRunsResponse(runs=[hostile]))
    page = esperctl("runs", "list").stdout
    assert "\x1b" not in page
    assert "\x07" not in page
    assert "[red]not" in page
