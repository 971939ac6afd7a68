"""The services' process as a whole: how it starts, what it holds, how it waits for what is away, how it stops."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from esper_core.config import ENDPOINTS_FILE, Endpoints
from esper_core.errors import EsperError, InvalidInput, Unavailable
from esper_core.local.credentials import revealed
from esper_core.local.services import serving
from esper_core.pb.esper.core.v1 import telemetry_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.nissa.v1 import nissa_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.rpc.convert import to_proto
from services import composition
from services.__main__ import main
from tests.service.bus.conftest import NatsServer
from tests.service.platform import Stage, on_free_ports, until, visiting
from tests.service.tamiyo.test_decisions import packet

Launch = Callable[..., Any]


@pytest.fixture
async def launch(tmp_path: Path) -> AsyncIterator[Launch]:
    """Starts ``python -m services`` on given endpoints; whatever still runs afterwards is killed."""
    started: list[asyncio.subprocess.Process] = []

    async def start(endpoints: Endpoints, *names: str) -> asyncio.subprocess.Process:
        (tmp_path / ENDPOINTS_FILE).write_text(json.dumps(revealed(endpoints)))
        log = (tmp_path / "services.log").open("wb")
        command = (sys.executable, "-m", "services", *names, "--data-dir", str(tmp_path))
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL
        )
        log.close()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()
    print((tmp_path / "services.log").read_text())


async def _waits_for(folder: Path, what: str) -> bool:
    return f'"what": "{what}"' in await asyncio.to_thread((folder / "services.log").read_text)


async def _serves(endpoints: Endpoints) -> bool:
    await serving(endpoints)
    return True


async def _ends(process: asyncio.subprocess.Process) -> tuple[int, float]:
    """SIGTERM; the exit code and the seconds it took."""
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = await asyncio.wait_for(process.wait(), 15)
    return code, time.monotonic() - begun


async def test_stops_under_load_within_ten_seconds_and_loses_nothing(
    stack: Endpoints, database: str, launch: Launch
) -> None:
    """All services in a process of their own; calls, watches and events go on while SIGTERM comes."""
    endpoints = on_free_ports(stack, database)
    async with visiting(endpoints) as stage:
        process = await launch(endpoints)
        await until(lambda: _serves(endpoints), 40)
        assert "libtorch" not in _mapped(process.pid)
        await stage.register("loaded")
        request = tolaria_pb2.GetRunRequest(run_id="loaded")
        await until(lambda: stage.stub("tolaria").GetRun(request))
        decided: list[str] = []
        watches = (
            stage.stub("tolaria").WatchRun(tolaria_pb2.WatchRunRequest(run_id="loaded")),
            stage.stub("kasmina").WatchSeeds(kasmina_pb2.WatchSeedsRequest(run_id="loaded")),
            stage.stub("nissa").WatchEvents(nissa_pb2.WatchEventsRequest()),
        )
        telling = asyncio.create_task(_tell(stage))
        busy = [asyncio.create_task(_ask(stage, n * 1_000_000, decided)) for n in range(4)]
        busy += [asyncio.create_task(_watch(call)) for call in watches]
        await asyncio.sleep(1.5)
        code, seconds = await _ends(process)
        said = await asyncio.wait_for(asyncio.gather(*busy), 20)
        telling.cancel()
        print(f"exit after {seconds:.2f} s with {len(decided)} decisions acknowledged")
        assert (code, seconds < 10) == (0, True)
        assert said == [Unavailable] * len(busy)
        assert len(decided) > 20
        kept = {row["decision_id"] for row in await stage.database.fetch("SELECT decision_id FROM tamiyo.decisions")}
        assert set(decided) <= kept


def _mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def _ask(stage: Stage, first: int, decided: list[str]) -> type[EsperError]:
    """Step after step until it fails; what it failed of."""
    tamiyo = stage.stub("tamiyo", "tolaria")
    for epoch in itertools.count(first):
        told = to_proto(packet("loaded", epoch, health=0.9), telemetry_pb2.SystemStatePacket)
        try:
            answer = await tamiyo.Step(tamiyo_pb2.StepRequest(packet=told))
        except EsperError as error:
            return type(error)
        decided.append(answer.signal.decision_id)
    raise AssertionError


async def _watch(call: Any) -> type[EsperError] | None:
    try:
        async for _ in call:
            pass
    except EsperError as error:
        return type(error)
    return None


async def _tell(stage: Stage) -> None:
    for epoch in itertools.count():
        await stage.epoch("loaded", epoch)


async def test_waits_for_a_bus_that_is_away_and_outlives_its_death(
    stack: Endpoints, database: str, launch: Launch, tmp_path: Path
) -> None:
    nats = NatsServer(tmp_path)
    endpoints = on_free_ports(stack, database).model_copy(update={"nats_url": nats.url, "nats_keys_dir": None})
    process = await launch(endpoints, "oona", "tolaria")
    await until(lambda: _waits_for(tmp_path, "bus"), 40)
    assert process.returncode is None
    try:
        nats.start()
        await until(lambda: _serves(endpoints), 40)
        nats.kill()
        await asyncio.sleep(0.3)
        assert await _serves(endpoints)
        nats.start()
        async with visiting(endpoints) as stage:
            await stage.register("after")
            request = tolaria_pb2.GetRunRequest(run_id="after")
            await until(lambda: stage.stub("tolaria").GetRun(request), 20)
            code, seconds = await _ends(process)
            assert (code, seconds < 10) == (0, True)
    finally:
        nats.kill()


async def test_can_be_stopped_while_it_waits(stack: Endpoints, database: str, launch: Launch, tmp_path: Path) -> None:
    endpoints = on_free_ports(stack, database).model_copy(update={"s3_endpoint": "http://127.0.0.1:9"})
    process = await launch(endpoints, "oona")
    await until(lambda: _waits_for(tmp_path, "blobs"), 40)
    assert process.returncode is None
    code, seconds = await _ends(process)
    assert code == 0
    assert seconds < 10


def test_a_wrong_name_and_a_missing_platform_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["urzaa", "--data-dir", str(tmp_path)]) == 2
    assert "'urza'" in capsys.readouterr().err
    assert main(["--data-dir", str(tmp_path / "nothing")]) == 3
    assert "esperctl up" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "kasmina" in capsys.readouterr().out


def test_names_are_taken_once_and_none_means_all() -> None:
    assert composition.chosen([]) == composition.NAMES
    assert composition.chosen(["urza", "nissa", "urza"]) == ("urza", "nissa")
    with pytest.raises(InvalidInput):
        composition.chosen(["simicc"])


async def test_a_task_that_fails_or_returns_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "PAUSE_FIRST", 0.001)
    monkeypatch.setattr(composition, "PAUSE_MAX", 0.004)
    starts = 0
    enough = asyncio.Event()

    async def fragile() -> None:
        nonlocal starts
        starts += 1
        if starts == 2:
            return
        if starts >= 4:
            enough.set()
            await asyncio.sleep(60)
        raise ValueError("broken")

    watching = asyncio.create_task(composition.supervise("fragile", fragile, asyncio.Event()))
    await asyncio.wait_for(enough.wait(), 5)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert starts == 4


def test_every_service_keeps_to_its_own_schema() -> None:
    """No service's SQL names another service's tables."""
    names = [name for name in composition.NAMES if name != "oona"]
    root = Path(composition.__file__).parent
    for name in names:
        for path in (root / name).rglob("*.py"):
            text = path.read_text()
            for other in names:
                if other != name:
                    for verb in ("FROM", "INTO", "JOIN", "UPDATE"):
                        assert f"{verb} {other}." not in text, f"{path} reaches into {other}"
