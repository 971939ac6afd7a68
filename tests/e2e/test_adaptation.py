"""One adaptation from end to end, on the real platform: a bottleneck found, a kernel built, measured, chosen, streamed,
trained, grafted, proven and folded in; and what every part of the platform has to say about it afterwards.
"""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from esper_core.blueprint.catalogue import catalogue
from esper_core.cli.platform import dial
from esper_core.lifecycle import State
from esper_core.nn import checkpoint
from esper_core.pb.esper.core.v1 import decision_pb2, kernel_pb2, run_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2, urabrask_pb2_grpc
from esper_core.pb.esper.urza.v1 import urza_pb2
from services.tolaria import experiment
from services.tolaria.config import read_run
from services.tolaria.plane import Offline
from tests.e2e.living import AFTER, NARROW, RUN, Grown, Living

pytestmark = pytest.mark.timeout(300)  # on a machine that is busy with other things
EPOCHS = RUN["optimization"]["epochs"]
LIFE = [State(number) for number in range(State.GERMINATED, State.FOSSILIZED + 1)]


def test_the_seed_went_through_every_state_in_order_with_epochs_and_reasons(grown: Grown) -> None:
    assert [event["target"] for event in grown.history] == [state.name for state in LIFE]
    assert [event["source"] for event in grown.history] == [State.DORMANT.name, *(s.name for s in LIFE[:-1])]
    epochs = [event.get("epoch", 0) for event in grown.history]
    assert epochs == sorted(epochs)
    at = dict(zip(LIFE, epochs, strict=True))
    # What the host knows nothing of waits for nothing but its kernel; a graft takes one step at a boundary.
    assert at[State.GERMINATED] == at[State.LOADING]
    assert at[State.TRAINING] == at[State.GRAFTING]
    grafted = epochs[LIFE.index(State.GRAFTING) :]
    assert len(set(grafted)) == len(grafted)
    assert all(event["reason"] for event in grown.history)
    assert {event["seed_id"] for event in grown.history} == {grown.seed["seed_id"]} == {f"adaptation/{NARROW}/0"}
    assert grown.history[-1]["measurements"]["contribution_lower"] > grown.history[-1]["measurements"]["rent"]


def test_people_see_the_same_story(platform: Living, grown: Grown) -> None:
    page = platform.esperctl("seed", "show", NARROW, "--run", "adaptation").stdout
    for event in grown.history:
        line = next(line for line in page.splitlines() if f"→ {event['target']}" in line)
        assert int(line.split()[0]) == event["epoch"]
        assert event["reason"] in line


async def test_its_kernel_was_built_from_the_catalogue_measured_and_signed_by_two(
    platform: Living, grown: Grown
) -> None:
    kernel_id = grown.seed["kernel_id"]
    async with dial(platform.data_dir) as api:
        record = (await api.urza.GetKernel(urza_pb2.GetKernelRequest(kernel_id=kernel_id))).kernel
        wishes = tezzeret_pb2.ListBuildsRequest(interface_id=record.interface_id, page_size=1000)
        builds = {build.kernel_id: build for build in (await api.tezzeret.ListBuilds(wishes)).builds}
        build = (await api.tezzeret.GetBuild(tezzeret_pb2.GetBuildRequest(build_id=builds[kernel_id].build_id))).build
        urabrask: Any = urabrask_pb2_grpc.UrabraskServiceStub(api.channel)  # type: ignore[no-untyped-call]
        asked = urabrask_pb2.GetEvaluationRequest(kernel_id=kernel_id)
        evaluation = (await urabrask.GetEvaluation(asked)).evaluation
    assert record.status == kernel_pb2.KERNEL_STATUS_VALIDATED
    assert record.manifest.blueprint_id == catalogue()[record.manifest.blueprint.name].id
    assert build.state == tezzeret_pb2.BUILD_STATE_DONE
    assert (build.blueprint_id, build.kernel_id) == (record.manifest.blueprint_id, kernel_id)
    assert record.manifest.provenance.parity_max_abs_diff <= 1e-5
    assert (evaluation.phase, evaluation.verdict) == (urabrask_pb2.PHASE_DONE, kernel_pb2.KERNEL_STATUS_VALIDATED)
    assert evaluation.measurement == record.measurement
    assert record.measurement.repetitions > 1
    assert 0 < record.measurement.forward_seconds <= record.measurement.forward_seconds_p99
    proof = await platform.read("kernel", "verify", kernel_id)
    assert proof["verified"] is True
    assert set(proof["signers"]) == {"build", "validation"}
    assert len(set(proof["signers"].values())) == 2


async def test_tamiyo_decided_it_and_knows_why(platform: Living, grown: Grown) -> None:
    async with dial(platform.data_dir) as api:
        asked = tamiyo_pb2.ListDecisionsRequest(run_id="adaptation", page_size=1000)
        decisions = (await api.tamiyo.ListDecisions(asked)).decisions
        policy = (await api.tamiyo.GetPolicyStatus(tamiyo_pb2.GetPolicyStatusRequest())).policy
    born = grown.history[0]
    [(decision, action)] = [
        (decision, action)
        for decision in decisions
        for action in decision.actions
        if action.command.command_id == born["command_id"]
    ]
    assert (decision.epoch, decision.policy_version) == (born["epoch"], policy.version)
    assert (action.command.slot, action.command.kernel_id) == (NARROW, grown.seed["kernel_id"])
    assert action.command.issued_by == "tamiyo"
    codes = {reason.code: reason for reason in action.reasons}
    unhealthy = codes[decision_pb2.REASON_CODE_UNHEALTHY]
    assert unhealthy.value < unhealthy.threshold
    assert decision_pb2.REASON_CODE_KERNEL_FITS_SPECTRUM in codes
    lived = [line["signal"]["decision_id"] for line in grown.training.boundaries() if line.get("signal")]
    assert sorted(lived) == sorted(decision.decision_id for decision in decisions)


async def test_the_run_is_in_the_books(platform: Living, grown: Grown) -> None:
    async with dial(platform.data_dir) as api:
        finished = tolaria_pb2.ListRunsRequest(state=run_pb2.RUN_STATE_FINISHED)
        runs = {run.run_id: run for run in (await api.tolaria.ListRuns(finished)).runs}
        kept = (await api.nissa.GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id="adaptation"))).epochs
        seeds = (await api.kasmina.ListSeeds(kasmina_pb2.ListSeedsRequest(run_id="adaptation"))).seeds
    run = runs["adaptation"]
    assert {slot.slot for slot in run.slots} == {NARROW, AFTER}
    assert run.report == grown.figures["report"]
    for name in ("grown_accuracy", "ungrown_accuracy", "fossilized", "folded_max_abs_diff"):
        assert run.results[name] == grown.figures[name]
    assert [epoch.epoch for epoch in kept] == list(range(EPOCHS))
    figures = [line["figures"] for line in grown.training.boundaries()]
    assert [epoch.train_loss for epoch in kept] == [figure["train_loss"] for figure in figures]
    assert [epoch.parameters for epoch in kept] == [figure["parameters"] for figure in figures]
    states = {seed.seed_id: seed.state for seed in seeds}
    assert states[grown.seed["seed_id"]] == State.FOSSILIZED


def test_the_network_grew_and_folding_changed_nothing(grown: Grown) -> None:
    assert grown.figures["fossilized"] >= 1
    assert 0 <= grown.figures["folded_max_abs_diff"] <= 1e-5
    folded = grown.history[-1]["measurements"]["folded_max_abs_diff"]
    assert folded <= grown.figures["folded_max_abs_diff"]
    parameters = [line["figures"]["parameters"] for line in grown.training.boundaries()]
    assert parameters[-1] - parameters[0] == grown.figures["added_parameters"] > 0


def test_grown_and_ungrown_part_ways_at_the_graft_and_not_before(grown: Grown) -> None:
    mine = [line["figures"]["train_loss"] for line in grown.training.boundaries()]
    twin = [line["figures"]["train_loss"] for line in _lines(grown.training.directory / "twin" / "history.jsonl")]
    graft = grown.epoch_of(State.GRAFTING)
    assert mine[: graft + 1] == twin[: graft + 1]
    assert all(left != right for left, right in zip(mine[graft + 1 :], twin[graft + 1 :], strict=True))


def test_the_networks_are_what_was_reported_of_them(grown: Grown) -> None:
    """The grown one is nothing but four wider layers; both are scored anew on the test part."""
    directory = grown.training.directory
    config = read_run(str(directory.with_suffix(".yaml")))
    experiment.set_up(config)
    data = experiment.load_data(config)
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    widths = [weights[f"{layer}.weight"].shape[0] for layer in ("fc1", "fc2", "fc3", "head")]
    assert widths[0] == 64
    assert widths[1] > RUN["model"]["widths"][1]
    assert (
        sum(weight.numel() for weight in weights.values()) == grown.training.boundaries()[-1]["figures"]["parameters"]
    )
    outputs = by_hand(weights, data.test.inputs)
    accuracy = float((outputs.argmax(1) == data.test.targets).double().mean())
    assert accuracy == grown.figures["grown_accuracy"]

    host = experiment.build_host(config, data)
    learner = experiment.growing(config, data, host, Offline(), "adaptation")
    learner.load_state_dict(last(directory)["learner"])
    with torch.no_grad():
        assert float((learner.finish().model(data.test.inputs) - outputs).abs().max()) <= 1e-5

    twin = experiment.plain(config, data)
    twin.load_state_dict(last(directory / "twin")["learner"])
    ungrown = by_hand(twin.model.state_dict(), data.test.inputs)
    worse = float((ungrown.argmax(1) == data.test.targets).double().mean())
    assert worse == grown.figures["ungrown_accuracy"]
    assert accuracy >= worse + 0.05
    assert not torch.allclose(outputs, ungrown, atol=0.1)


def by_hand(weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """What a plain network of these weights answers, by the definition of its layers."""
    for layer in ("fc1", "fc2", "fc3"):
        inputs = torch.relu(inputs @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    return inputs @ weights["head.weight"].T + weights["head.bias"]


def test_the_report_needs_nothing_but_itself(grown: Grown) -> None:
    text = Path(grown.figures["report"]).read_text()
    page = Page()
    page.feed(text)
    assert not page.fetched
    assert page.scripts
    for shown in (NARROW, AFTER, "FOSSILIZED", *(event["reason"] for event in grown.history)):
        assert html.escape(shown) in text


class Page(HTMLParser):
    """Notes what a browser would fetch, and how many scripts the page brings along."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        wanted = [value for name, value in attrs if name in ("src", "href", "action", "srcset", "data") and value]
        self.fetched += [value for value in wanted if not value.startswith(("#", "data:"))]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last(directory: Path) -> dict[str, Any]:
    """The newest checkpoint under a run's directory."""
    state: dict[str, Any] = checkpoint.load(sorted((directory / "checkpoints").glob("epoch-*.ckpt"))[-1])
    return state
