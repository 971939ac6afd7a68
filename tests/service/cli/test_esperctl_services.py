"""The nouns on the real services: a run tells its story over the bus, and an operator reads it and gives orders."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from pydantic import SecretStr

from esper_core.cli.train import TRAINER
from esper_core.config import ENDPOINTS_FILE
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1.run_pb2 import RUN_STATE_FINISHED
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from tests.service.cli.conftest import run_esperctl
from tests.service.platform import INTERFACE, SLOT, Stage, until

Call = Callable[..., Awaitable["CompletedProcess[str]"]]


@pytest.fixture
def esperctl(stage: Stage, tmp_path: Path) -> Call:
    """`esperctl` in a process of its own, pointed at the stage."""
    shown = stage.endpoints.model_dump(mode="json")
    for name in type(stage.endpoints).model_fields:
        value = getattr(stage.endpoints, name)
        if isinstance(value, SecretStr):
            shown[name] = value.get_secret_value()
    (tmp_path / ENDPOINTS_FILE).write_text(json.dumps(shown))

    async def call(*arguments: str) -> CompletedProcess[str]:
        return await asyncio.to_thread(run_esperctl, tmp_path, *arguments)

    return call


async def read(esperctl: Call, *arguments: str) -> Any:
    """The JSON of a command that succeeds."""
    done = await esperctl(*arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def known(stage: Stage, run_id: str) -> bool:
    """Whether the run and its seeds have arrived."""
    await stage.stub("tolaria").GetRun(tolaria_pb2.GetRunRequest(run_id=run_id))
    return bool((await stage.stub("kasmina").ListSeeds(kasmina_pb2.ListSeedsRequest(run_id=run_id))).seeds)


async def test_a_run_is_listed_shown_and_watched(stage: Stage, esperctl: Call, run_id: str) -> None:
    await stage.register(run_id)
    for epoch, loss in enumerate((2.0, 1.0, 0.5)):
        await stage.epoch(run_id, epoch, loss)
    await stage.end(run_id)

    async def ended() -> bool:
        found = await stage.stub("tolaria").GetRun(tolaria_pb2.GetRunRequest(run_id=run_id))
        history = await stage.stub("nissa").GetRunHistory(nissa_pb2.GetRunHistoryRequest(run_id=run_id))
        return found.run.state == RUN_STATE_FINISHED and len(history.epochs) == 3

    await until(ended, 30)
    shown = await read(esperctl, "runs", "show", "latest")
    assert shown["run_id"] == run_id
    assert [epoch["train_loss"] for epoch in shown["history"]] == [2.0, 1.0, 0.5]
    assert shown["results"] == {"test_accuracy": 0.75}
    assert run_id in [run["run_id"] for run in await read(esperctl, "runs", "list", "--state", "finished")]
    watched = await esperctl("runs", "watch", run_id, "-o", "json")
    assert watched.returncode == 0, watched.stderr
    assert json.loads(watched.stdout.splitlines()[-1])["state"] == "FINISHED"


async def test_a_seed_s_history_is_told_with_reasons_and_figures(stage: Stage, esperctl: Call, run_id: str) -> None:
    await stage.register(run_id)
    await stage.seed(run_id, State.DORMANT, State.GERMINATED, 3, reason="health is low", measurements={"health": 0.125})
    await stage.seed(run_id, State.GERMINATED, State.LOADING, 4, reason="memory granted")

    async def told() -> bool:
        found = await stage.stub("kasmina").GetSeed(kasmina_pb2.GetSeedRequest(run_id=run_id, slot=SLOT))
        return len(found.seed.history) == 2

    await until(told, 30)
    page = (await esperctl("seed", "show", "--run", run_id)).stdout
    first = next(line for line in page.splitlines() if "DORMANT" in line)
    assert first.split()[:4] == ["3", "DORMANT", "→", "GERMINATED"]
    assert "health is low" in first
    assert "health=0.125" in first
    seeds = await read(esperctl, "seed", "list", "--run", run_id)
    assert [(seed["slot"], seed["state"]) for seed in seeds] == [(SLOT, "LOADING")]


async def test_an_order_is_durable_and_an_impossible_one_refused(stage: Stage, esperctl: Call, run_id: str) -> None:
    kernel_id = await stage.kernel(seed=41)
    await stage.register(run_id)

    await until(lambda: known(stage, run_id), 30)
    order = await read(esperctl, "seed", "germinate", SLOT, kernel_id[:19], "--run", run_id, "--reason", "try it")
    assert (order["target"], order["kernel_id"], order["issued_by"]) == ("GERMINATED", kernel_id, "operator")

    async def on_the_bus() -> bool:
        request = nissa_pb2.ListEventsRequest(run_id=run_id, type="esper.core.v1.Command")
        return bool((await stage.stub("nissa").ListEvents(request)).events)

    await until(on_the_bus, 30)
    events = await read(esperctl, "bus", "events", "--run", run_id, "--type", "Command")
    assert [event["payload"]["command_id"] for event in events] == [order["command_id"]]
    refused = await esperctl("seed", "transition", SLOT, "rolled_back", "--run", run_id)
    assert refused.returncode == 5
    assert "hint: " in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_kernels_are_found_by_slot_and_pulled(stage: Stage, esperctl: Call, run_id: str, tmp_path: Path) -> None:
    kernel_id = await stage.kernel(seed=42)
    await stage.register(run_id)

    await until(lambda: known(stage, run_id), 30)
    listed = await read(esperctl, "kernel", "list", "--slot", SLOT, "--run", run_id, "--status", "validated")
    assert kernel_id in [kernel["manifest"]["kernel_id"] for kernel in listed]
    assert (await read(esperctl, "kernel", "show", kernel_id[7:19]))["interface_id"] == INTERFACE.id
    pulled = await read(esperctl, "kernel", "pull", kernel_id, "--to", str(tmp_path / "kernels"))
    blob = Path(pulled["blob"])
    assert await asyncio.to_thread(blob.read_bytes) == b"weights 42"
    assert (await esperctl("kernel", "verify", str(blob))).returncode == 0
    await asyncio.to_thread(blob.write_bytes, b"weights 43")
    assert (await esperctl("kernel", "verify", pulled["blob"])).returncode == 10


async def test_blueprints_are_submitted_once_and_found_by_name(stage: Stage, esperctl: Call, tmp_path: Path) -> None:
    design = tmp_path / "design.yaml"
    design.write_text(
        "name: by-hand\nlayouts: [FEATURES]\nsymbols: {width: 3}\noutput: out\nnodes:\n"
        "  - {name: down, op: linear, inputs: [input], attributes: {out: width}}\n"
        "  - {name: out, op: linear, inputs: [down], attributes: {out: out_width}}\n"
    )
    first = await read(esperctl, "blueprint", "submit", str(design))
    again = await read(esperctl, "blueprint", "submit", str(design))
    assert (first["created"], again["created"]) == (True, False)
    shown = await read(esperctl, "blueprint", "show", "by-hand")
    assert shown["blueprint_id"] == first["blueprint_id"]
    assert shown["created_by"] == "operator"


async def test_names_that_do_not_exist_are_3_with_a_hint(stage: Stage, esperctl: Call) -> None:
    for arguments in (
        ["runs", "show", "no-such-run"],
        ["kernel", "show", "kernel-" + "0" * 64],
        ["blueprint", "show", "no-such-blueprint"],
        ["policy", "load", "no-such-policy"],
        ["decisions", "show", "no-such-decision", "--run", "any"],
    ):
        done = await esperctl(*arguments)
        assert (done.returncode, done.stdout) == (3, ""), (arguments, done.stderr)
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


async def test_the_policy_in_force(stage: Stage, esperctl: Call) -> None:
    found = await read(esperctl, "policy", "status")
    assert found["policy"]["active"] is True
    assert found["policy"]["kind"] == "heuristic"
    assert (await read(esperctl, "policy", "load", found["policy"]["version"]))["version"] == found["policy"]["version"]


def test_the_trainer_is_a_module_that_exists() -> None:
    import importlib.util

    assert importlib.util.find_spec(f"{TRAINER}.__main__") is not None
