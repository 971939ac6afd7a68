"""A run and the platform: facts arrive once and in order, orders are obeyed, and its absence stops nothing."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.bus import subjects
from esper_core.bus.envelope import wrap
from esper_core.config import ENDPOINTS_FILE, Endpoints, load
from esper_core.control.packet import Command
from esper_core.errors import NotFound, Untrusted
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.pack import pack
from esper_core.lifecycle import State
from esper_core.local.credentials import revealed
from esper_core.nn.cache import KernelCache
from esper_core.pb.esper.core.v1 import kernel_pb2, lifecycle_pb2, run_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from esper_core.pb.esper.tamiyo.v1 import tamiyo_pb2
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2
from esper_core.rpc.convert import to_proto
from services.tolaria.config import TolariaConfig
from services.tolaria.experiment import Experiment
from services.tolaria.live import PlainView
from services.tolaria.plane import Online
from services.tolaria.remote import RemoteController, RemoteKernels
from services.tolaria.report import SeedRun
from services.tolaria.trainer import Stop
from tests.service.platform import INTERFACE, SLOT, Stage, free_port, until
from tests.service.tamiyo.test_decisions import packet

Settings = dict[str, Any]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return {
        "name": "quick",
        "model": {"widths": [16, 1, 16]},
        "dataset": {"name": "iris", "validation_fraction": 0.3},
        "optimization": {"epochs": 6, "batch_size": 16, "learning_rate": 0.01},
        "morphogenetic": {"growth": {"warmup_epochs": 2, "evaluate_every": 1}, "decision_wait_seconds": 5},
        "services": {"data_dir": str(tmp_path), "drain_seconds": 10},
    }


def platform_at(endpoints: Endpoints, folder: Path) -> None:
    (folder / ENDPOINTS_FILE).write_text(json.dumps(revealed(endpoints)))


def nowhere(endpoints: Endpoints) -> Endpoints:
    """The same platform as it is found when nothing of it runs."""
    return endpoints.model_copy(
        update={"grpc_address": f"127.0.0.1:{free_port()}", "nats_url": f"nats://127.0.0.1:{free_port()}"}
    )


class Heard(PlainView):
    """Keeps what was said."""

    def __init__(self, each: Callable[[Any], None] | None = None) -> None:
        self.out = io.StringIO()
        super().__init__(Console(file=self.out, width=200), 1)
        self._each = each

    def epoch(self, boundary: Any) -> None:
        super().epoch(boundary)
        if self._each:
            self._each(boundary)


def train(settings: Settings, run_id: str, view: Heard | None = None, *, resume: bool = False) -> SeedRun:
    config = load(TolariaConfig, settings)
    return Experiment(config, run_id, True, False, resume, view or Heard(), Stop()).run()


async def test_facts_arrive_once_and_in_order(stage: Stage, settings: Settings, tmp_path: Path, run_id: str) -> None:
    platform_at(stage.endpoints, tmp_path)
    done = await asyncio.to_thread(train, settings, run_id)
    tolaria = stage.stub("tolaria")

    async def ended() -> run_pb2.Run | None:
        run = (await tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id=run_id))).run
        return run if run.state == run_pb2.RUN_STATE_FINISHED else None

    run = await until(ended)
    assert (run.epochs, run.latest.epoch, len(run.slots)) == (6, 5, 3)
    assert run.latest.train_loss == done.grown[-1].figures.train_loss
    assert run.results["grown_accuracy"] == done.result.grown_accuracy
    rows = await stage.database.fetch("SELECT epoch FROM tolaria.epochs WHERE run_id = $1 ORDER BY sequence", run_id)
    assert [row["epoch"] for row in rows] == list(range(6))
    decisions = await stage.stub("tamiyo").ListDecisions(tamiyo_pb2.ListDecisionsRequest(run_id=run_id))
    asked = [boundary.figures.epoch for boundary in done.grown if boundary.signal is not None]
    assert sorted(decision.epoch for decision in decisions.decisions) == asked
    assert asked


async def test_an_absent_platform_stops_nothing_and_hears_everything_later(
    stage: Stage, settings: Settings, tmp_path: Path, run_id: str
) -> None:
    platform_at(nowhere(stage.endpoints), tmp_path)
    settings["services"]["drain_seconds"] = 0
    alone = Heard()
    done = await asyncio.to_thread(train, settings, run_id, alone)
    assert len(done.grown) == 6
    assert "8 facts" in alone.out.getvalue()  # registered, six epochs, ended
    waits = sum(boundary.figures.boundary_seconds for boundary in done.grown)
    assert waits < 5
    platform_at(stage.endpoints, tmp_path)
    settings["services"]["drain_seconds"] = 10
    again = await asyncio.to_thread(train, settings, run_id, Heard(), resume=True)
    assert again.result.grown_accuracy == done.result.grown_accuracy

    async def everything() -> bool:
        rows = await stage.database.fetch(
            "SELECT epoch FROM tolaria.epochs WHERE run_id = $1 ORDER BY sequence", run_id
        )
        return [row["epoch"] for row in rows] == list(range(6))

    assert await until(everything)


async def test_an_answer_that_comes_late_becomes_an_order(
    stage: Stage, settings: Settings, tmp_path: Path, run_id: str
) -> None:
    kernel_id = await real_kernel(stage)
    await stage.register(run_id, (SLOT,))
    plane = Online(load(TolariaConfig, settings), stage.endpoints, run_id, tmp_path)
    controller = RemoteController(plane.link, wait_seconds=0)
    wanted = packet(run_id, 5)
    wanted = wanted.model_copy(update={"slots": (wanted.slots[0].model_copy(update={"interface": INTERFACE}),)})

    async def ordered() -> list[Command]:
        assert await asyncio.to_thread(controller.decide, wanted) is None
        return plane.orders()

    try:
        orders = await until(ordered)
        assert [(order.target, order.kernel_id) for order in orders] == [(State.GERMINATED, kernel_id)]
    finally:
        await asyncio.to_thread(plane.close, Heard())


async def test_an_order_is_obeyed_once_at_the_next_boundary(
    stage: Stage, settings: Settings, tmp_path: Path, run_id: str
) -> None:
    platform_at(stage.endpoints, tmp_path)
    settings["optimization"]["epochs"] = 400
    settings["morphogenetic"]["growth"]["warmup_epochs"] = 399
    kernel_id = await real_kernel(stage)
    loop = asyncio.get_running_loop()
    order = Command(
        command_id=f"{run_id}-c1",
        run_id=run_id,
        slot="fc2:fc3",
        target=State.GERMINATED,
        kernel_id=kernel_id,
        issued_by="operator",
        reason="by hand",
    )
    stop, reports = Stop(), []

    async def send() -> None:
        message = to_proto(order, lifecycle_pb2.Command)
        for _ in range(2):  # one order, told twice
            await stage.bus.publish(
                subjects.KASMINA_COMMANDS.of(run_id), wrap(message, producer="kasmina", run_id=run_id)
            )

    def each(boundary: Any) -> None:
        if boundary.figures.epoch == 0:
            asyncio.run_coroutine_threadsafe(send(), loop).result(10)
        reports.append(boundary)
        if any(event.target in (State.CULLED, State.TRAINING) for event in boundary.events):
            stop.signal = 15

    config = load(TolariaConfig, settings)
    experiment = Experiment(config, run_id, True, False, False, Heard(each), stop)
    with pytest.raises(Exception, match="stopped"):
        await asyncio.to_thread(experiment.run)
    events = [event for boundary in reports for event in boundary.events]
    germinated = [event for event in events if event.target is State.GERMINATED]
    assert [event.command_id for event in germinated] == [order.command_id]
    # the kernel is real and verified, and made for another interface: it is refused at the slot's door
    assert events[-1].target is State.CULLED
    assert "maps (16,) to (12,)" in events[-1].reason

    async def culled() -> bool:
        request = kasmina_pb2.GetSeedRequest(run_id=run_id, slot="fc2:fc3", generation=0)
        seed = (await stage.stub("kasmina").GetSeed(request)).seed
        return bool(seed.state == State.CULLED)

    assert await until(culled)


async def real_kernel(stage: Stage, *, judge: bool = True) -> str:
    """A kernel with true weights in the library."""
    blueprint, symbols = catalogue()["bottleneck_mlp"], {"width": 4}
    torch.manual_seed(0)
    blob = pack(build(blueprint, INTERFACE, symbols, 1).state_dict())
    manifest = KernelManifest.describe(blueprint, INTERFACE, blob, Provenance(compiler="test"), symbols=symbols)
    header = urza_pb2.KernelHeader(
        manifest=to_proto(manifest, kernel_pb2.KernelManifest), attestation=stage._signed(manifest, "build")
    )

    async def parts() -> Any:
        yield urza_pb2.UploadKernelRequest(header=header)
        for first in range(0, len(blob), 1000):
            yield urza_pb2.UploadKernelRequest(chunk=blob[first : first + 1000])

    await stage.stub("urza", "tezzeret").UploadKernel(parts())
    if judge:
        await stage.judge(manifest)
    return manifest.kernel_id


async def test_kernels_come_verified_or_not_at_all(
    stage: Stage, settings: Settings, tmp_path: Path, run_id: str
) -> None:
    kernel_id = await real_kernel(stage)
    trust = stage.endpoints.keys_dir / "trust.json"
    plane = Online(load(TolariaConfig, settings), stage.endpoints, run_id, tmp_path)

    def fetch(trust_path: Path, wanted: str) -> Any:
        kernels = RemoteKernels(plane.link, trust_path, KernelCache(), 10)
        kernels.request(wanted, INTERFACE)
        return kernels.poll(wanted)

    try:
        await until(lambda: asyncio.sleep(0, plane.link.connected))
        found = await asyncio.to_thread(fetch, trust, kernel_id)
        torch.manual_seed(0)
        expected = build(catalogue()["bottleneck_mlp"], INTERFACE, {"width": 4}, 1).state_dict()
        assert found.interface == INTERFACE
        assert all(torch.equal(found.weights[name], expected[name]) for name in expected)
        with pytest.raises(NotFound):
            await asyncio.to_thread(fetch, trust, "kernel-" + "0" * 64)
        listed = json.loads(trust.read_text())
        distrust = tmp_path / "trust.json"
        distrust.write_text(json.dumps({"keys": [key for key in listed["keys"] if key["role"] != "validation"]}))
        with pytest.raises(Untrusted):
            await asyncio.to_thread(fetch, distrust, kernel_id)
    finally:
        await asyncio.to_thread(plane.close, Heard())
