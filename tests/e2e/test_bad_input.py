"""What people and programs get wrong: one line that says what is wrong, a hint, an exit code, no traceback; and nothing
is lost of what was right.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.cli.platform import Platform, dial
from esper_core.errors import Corrupt, Exhausted, InvalidInput, NotFound, Untrusted
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.pb.esper.urabrask.v1 import urabrask_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from services.tolaria.command import main as train
from tests.e2e.living import AFTER, NARROW, Grown, Living, until

pytestmark = pytest.mark.timeout(300)  # on a machine that is busy with other things
BLUEPRINT = """
name: odd
layouts: [FEATURES]
symbols: {width: 3}
output: up
nodes:
  - {name: down, op: linear, inputs: [input], attributes: {out: width}}
  - {name: up, op: linear, inputs: [down], attributes: {out: out_width}}
"""
NO_KERNEL = "kernel-" + "0" * 64
FILES = {
    "malformed.yaml": "model: {host: mlp, widths: [64, 2\ndataset: {name: digits}\n",
    "unknown-key.yaml": "optimization: {epoch: 3}\n",
    "image-host.yaml": "model: {host: cnn}\ndataset: {name: breast_cancer}\n",
    "token-host.yaml": "model: {host: transformer}\ndataset: {name: digits}\n",
    "no-span.yaml": "model: {widths: [64, 2]}\nmorphogenetic: {spans: [[fc1, fc9]]}\n",
    "no-data.yaml": "model: {host: cnn}\ndataset: {name: cifar10, path: /no/such/folder}\n",
    "op.yaml": BLUEPRINT.replace("op: linear, inputs: [down]", "op: linaer, inputs: [down]"),
    "symbol.yaml": BLUEPRINT.replace("width: 3", "width: 1000000000"),
}
CASES: dict[str, tuple[int, str, str, tuple[str, ...]]] = {
    # what is wrong: exit code, in the error, in the hint, arguments
    "malformed YAML": (2, "malformed.yaml, line 2", "indentation", ("train", "malformed.yaml")),
    "unknown key": (2, "optimization.epoch", "'epochs'", ("train", "unknown-key.yaml")),
    "images wanted": (2, "shape (30,)", "hosts for features: mlp", ("train", "image-host.yaml")),
    "tokens wanted": (2, "shape (64,)", "hosts for features: mlp", ("train", "token-host.yaml")),
    "no such span": (2, "fc9", "did you mean", ("train", "no-span.yaml")),
    "no such data": (3, "/no/such/folder", "data_batch_1.bin", ("train", "no-data.yaml")),
    "unknown preset": (3, "digit-narrow", "'digits-narrow'", ("train", "digit-narrow")),
    "nothing to resume": (3, "never", "--resume", ("train", "digits", "--resume", "--name", "never")),
    "unknown op": (2, "linaer", "'linear'", ("blueprint", "submit", "op.yaml")),
    "absurd symbol": (2, "1000000000", "", ("blueprint", "submit", "symbol.yaml")),
    "unknown blueprint": (3, "linear_bypas", "'linear_bypass'", ("blueprint", "show", "linear_bypas")),
    "unknown run": (3, "adaptatoin", "'adaptation'", ("runs", "show", "adaptatoin")),
    "unknown slot": (3, "fc2:fc9", f"{NARROW!r}", ("seed", "show", "fc2:fc9", "--run", "adaptation")),
    "unknown generation": (3, "generation 7", "", ("seed", "show", f"adaptation/{NARROW}/7")),
    "unknown kernel": (3, NO_KERNEL, "kernel list", ("kernel", "show", NO_KERNEL)),
    "no kernel id": (2, "xyz", "kernel list", ("kernel", "show", "xyz")),
    "kernel into an ended run": (5, "ended", "", ("seed", "transition", AFTER, "culled", "--run", "adaptation")),
    "never started": (3, "no platform under", "esperctl up", ("runs", "list", "--data-dir", "empty")),
    "nobody to train with": (3, "no platform under", "--offline", ("train", "digits", "--data-dir", "empty")),
    "unknown event type": (3, "Seedevent", "'SeedEvent'", ("bus", "events", "--type", "Seedevent")),
}
HEAVY = {
    *("images wanted", "tokens wanted", "no such span", "no such data"),
    *("nothing to resume", "nobody to train with"),
}
"""Each of these would import torch anew, for as many seconds; they are asked of the trainer's own command line here."""


@dataclass(frozen=True)
class Answer:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
async def answers(platform: Living, grown: Grown, folder: Path) -> dict[str, Answer]:
    """What every wrong command came to; afterwards the right ones still work and have lost nothing."""
    await until(lambda: _settled(platform), 120)  # the grown host's new slots have been offered kernels as well
    before = await _everything(platform)
    room = asyncio.Semaphore(2)

    async def ask(case: str) -> Answer:
        arguments = [str(folder / part) if (folder / part).exists() else part for part in CASES[case][3]]
        if case in HEAVY:
            return _train(platform, *arguments[1:])
        async with room:
            done = await asyncio.to_thread(platform.esperctl, *arguments)
        return Answer(done.returncode, done.stdout, done.stderr)

    answers = dict(zip(CASES, await asyncio.gather(*map(ask, CASES)), strict=True))
    assert await _everything(platform) == before
    assert platform.status().healthy
    return answers


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_in_one_line_with_a_hint_and_an_exit_code(answers: dict[str, Answer], case: str) -> None:
    code, error, hint, _ = CASES[case]
    done = answers[case]
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert "Traceback" not in done.stderr
    if hint:
        assert lines[1].startswith("hint: ")
        assert hint in lines[1]
    assert len(lines) <= 2


@pytest.fixture
async def api(platform: Living) -> AsyncIterator[Platform]:
    async with dial(platform.data_dir) as api:
        yield api


WRONG_CALLS: dict[str, tuple[type[Exception], str, Callable[[Platform], Any]]] = {
    "empty and malformed fields": (
        InvalidInput,
        "kernel_id",
        lambda api: api.kasmina.Germinate(kasmina_pb2.GerminateRequest(run_id="", slot="", kernel_id="x")),
    ),
    "a state no order can ask for": (
        InvalidInput,
        "target",
        lambda api: api.kasmina.Transition(
            kasmina_pb2.TransitionRequest(run_id="r", slot="s", target=State.TRAINING)  # type: ignore[arg-type]
        ),
    ),
    "an enum nobody defined": (
        InvalidInput,
        "state",
        lambda api: api.tolaria.ListRuns(tolaria_pb2.ListRunsRequest(state=77)),  # type: ignore[arg-type]
    ),
    "a page without end": (
        InvalidInput,
        "page_size",
        lambda api: api.kasmina.ListSeeds(kasmina_pb2.ListSeedsRequest(page_size=4_000_000)),
    ),
    "a token of nobody's": (
        InvalidInput,
        "token",
        lambda api: api.urza.QueryKernels(urza_pb2.QueryKernelsRequest(page_token="'; DROP TABLE")),
    ),
    "five megabytes": (
        Exhausted,
        "larger than max",
        lambda api: api.urza.GetBlueprint(urza_pb2.GetBlueprintRequest(blueprint_id="x" * 5_000_000)),
    ),
    "an unknown run": (
        NotFound,
        "nobody",
        lambda api: api.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id="nobody")),
    ),
    "an unknown build": (
        NotFound,
        "build-",
        lambda api: api.tezzeret.GetBuild(tezzeret_pb2.GetBuildRequest(build_id="build-" + "0" * 64)),
    ),
    "an order for nobody": (
        NotFound,
        "nobody",
        lambda api: api.kasmina.Germinate(
            kasmina_pb2.GerminateRequest(run_id="nobody", slot=NARROW, kernel_id=NO_KERNEL)
        ),
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
async def test_a_wrong_call_is_refused_for_what_is_wrong_with_it(api: Platform, case: str) -> None:
    kind, says, call = WRONG_CALLS[case]
    with pytest.raises(kind, match=says) as caught:
        await call(api)
    assert type(caught.value) is kind
    assert (await api.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id="latest"))).run.run_id


async def test_bytes_that_are_no_message(api: Platform) -> None:
    garble: Any = api.channel.unary_unary("/esper.urza.v1.UrzaService/GetBlueprint", lambda data: data)
    for data in (b"\xff\xfe\xff", b"\x0a\xff", b"\x00" * 64):
        with pytest.raises((InvalidInput, grpc.aio.AioRpcError)) as caught:
            await garble(data)
        assert "Traceback" not in str(caught.value)
        assert type(caught.value) is InvalidInput


async def test_a_bomb_is_kept_as_the_text_it_is_and_never_built(api: Platform) -> None:
    node = blueprint_pb2.BlueprintNode
    bomb = blueprint_pb2.BlueprintIR(
        name="bomb",
        schema_version=1,
        nodes=[
            node(name="down", op="linear", inputs=["input"], attributes={"out": "1000000 * 1000"}),
            node(name="up", op="linear", inputs=["down"], attributes={"out": "out_width"}),
        ],
        output="up",
        layouts=[blueprint_pb2.LAYOUT_FEATURES],
    )
    stored = await api.urza.UploadBlueprint(urza_pb2.UploadBlueprintRequest(blueprint=bomb))
    interface = SlotInterface(layout=Layout.FEATURES, in_width=8, out_width=8, hidden_width=2, activation="relu")
    request = tezzeret_pb2.SubmitBuildRequest(
        blueprint_id=stored.blueprint_id, interface=to_proto(interface, blueprint_pb2.SlotInterface)
    )
    with pytest.raises(InvalidInput, match="1000000"):
        await api.tezzeret.SubmitBuild(request)


async def test_a_pulled_kernel_that_was_altered_is_refused(platform: Living, grown: Grown, tmp_path: Path) -> None:
    pulled = await platform.read("kernel", "pull", grown.seed["kernel_id"], "--to", str(tmp_path))
    blob, record = Path(pulled["blob"]), Path(pulled["record"])
    assert platform.esperctl("kernel", "verify", str(blob)).returncode == 0
    _flip(blob, -1)
    _refused(platform.esperctl("kernel", "verify", str(blob)), Corrupt.exit_code)
    _flip(blob, -1)
    _vouch_for_oneself(record)
    _refused(platform.esperctl("kernel", "verify", str(blob)), Untrusted.exit_code)


async def test_a_kernel_altered_in_the_store_is_refused_by_everyone(
    platform: Living, grown: Grown, api: Platform, tmp_path: Path
) -> None:
    """By who verifies it, by who pulls it, and by the run that was ordered to grow with it."""
    settings = {"optimization": {"epochs": 15}, "morphogenetic": {"growth": {"warmup_epochs": 1000}}}
    training = platform.train("tampered", "--no-twin", settings=settings)
    await training.reaches(1)
    with training.paused():
        await until(lambda: _known(api, "tampered"))
        found = await platform.read("kernel", "list", "--slot", AFTER, "--run", "tampered", "--status", "validated")
        kernel = found[-1]["manifest"]
        [stored] = (platform.data_dir / "s3").rglob(kernel["blob_sha256"])
        _flip(stored, -1)
        order = await platform.read("seed", "germinate", AFTER, kernel["kernel_id"], "--run", "tampered")
    try:
        _refused(platform.esperctl("kernel", "verify", kernel["kernel_id"]), Corrupt.exit_code)
        _refused(platform.esperctl("kernel", "pull", kernel["kernel_id"], "--to", str(tmp_path)), Corrupt.exit_code)
        assert not _files(tmp_path)
        assert await training.ends() == 0, training.stderr
        changes = [event.message for event in training.told() if event.envelope.type == "esper.core.v1.SeedEvent"]
        assert [change.target for change in changes][:3] == [State.GERMINATED, State.LOADING, State.CULLED]
        assert changes[0].command_id == order["command_id"]
        assert "damaged" in changes[2].reason or "digest" in changes[2].reason
        assert json.loads(training.stdout)["culled"] == 1
        assert "Traceback" not in training.stderr
    finally:
        _flip(stored, -1)
    assert (await platform.read("kernel", "verify", kernel["kernel_id"]))["verified"] is True


def _train(platform: Living, *arguments: str) -> Answer:
    """The training command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("ESPER_DATA_DIR", str(platform.data_dir))
        code = train(arguments)
    return Answer(code, out.getvalue(), err.getvalue())


def _flip(path: Path, offset: int) -> None:
    """One bit of a file; the same again undoes it."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def _vouch_for_oneself(record: Path) -> None:
    """The builder's statement in place of the one about the measurement."""
    told = json.loads(record.read_text())
    told["attestations"][1] = told["attestations"][0]
    record.write_text(json.dumps(told))


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


def _refused(done: CompletedProcess[str], code: int) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert "\nhint: " in done.stderr
    assert "Traceback" not in done.stderr


async def _everything(platform: Living) -> tuple[Message, ...]:
    """What the library and the books hold."""
    async with dial(platform.data_dir) as api:
        return (
            await api.tolaria.ListRuns(tolaria_pb2.ListRunsRequest()),
            await api.urza.ListBlueprints(urza_pb2.ListBlueprintsRequest()),
            await api.urza.QueryKernels(urza_pb2.QueryKernelsRequest(page_size=1000)),
        )


async def _settled(platform: Living) -> bool:
    """Whether nothing waits to be built, judged or tagged anew, and a second look sees what the first one saw."""
    async with dial(platform.data_dir) as api:
        builds = (await api.tezzeret.ListBuilds(tezzeret_pb2.ListBuildsRequest(page_size=1000))).builds
        kernels = (await api.urza.QueryKernels(urza_pb2.QueryKernelsRequest(page_size=1000))).kernels
        tagged = not (await api.urabrask.Retag(urabrask_pb2.RetagRequest(dry_run=True))).changed
    ended = (tezzeret_pb2.BUILD_STATE_DONE, tezzeret_pb2.BUILD_STATE_FAILED)
    judged = all(kernel.status != kernel_pb2.KERNEL_STATUS_COMPILED for kernel in kernels)
    if not (tagged and judged and all(build.state in ended for build in builds)):
        return False
    seen = await _everything(platform)
    await asyncio.sleep(1)
    return await _everything(platform) == seen


async def _known(api: Platform, run_id: str) -> bool:
    seeds = await api.kasmina.ListSeeds(kasmina_pb2.ListSeedsRequest(run_id=run_id))
    return bool(seeds.seeds)
