"""A run that trusts compiled code trains through it, says so in its seeds' records, and has it back after an interruption.

One kernel is compiled, really, for all tests here; that takes most of their time.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from esper_core.blueprint.build import build, example_input
from esper_core.blueprint.catalogue import catalogue
from esper_core.config import load
from esper_core.control.packet import SeedEvent
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest, NativeFigures, Provenance
from esper_core.kernel.native import NativeRecord, convention
from esper_core.kernel.pack import pack
from esper_core.lifecycle import State
from esper_core.nn.native import NOT_BACK
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from services.sandbox import target
from services.tezzeret.native import compiled
from services.tezzeret.upload import Upload
from services.tolaria import remote
from services.tolaria.config import TolariaConfig
from services.tolaria.experiment import Experiment, Stopped, build_host, load_data
from services.tolaria.order import batches
from services.tolaria.report import SeedRun
from services.tolaria.trainer import Stop
from tests.service.cli.conftest import run_esperctl
from tests.service.platform import Stage, until
from tests.service.tolaria_trainer.test_trainer_platform import Heard, Settings, nowhere, platform_at, train

pytestmark = [
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), reason="no C++ compiler here"
    ),
    pytest.mark.timeout(600),  # a busy machine's compiler takes minutes, an idle one's 15 s
]
SLOT = "fc2:fc3"
BATCH = 2
GROWTH = {
    "warmup_epochs": 2, "evaluate_every": 1, "training_steps": 20, "training_epochs": 2, "ramp_epochs": 3, "settle_epochs": 1,
    "fine_tune_epochs": 2, "settle_sigmas": 100.0,
}  # fmt: skip


def settings(folder: Path, native: str = "trusted") -> Settings:
    return {
        "name": "native",
        "model": {"widths": [16, 1, 16]},
        "dataset": {"name": "iris", "validation_fraction": 0.3},
        "optimization": {"epochs": 14, "batch_size": BATCH, "learning_rate": 0.003},
        "morphogenetic": {"growth": GROWTH, "decision_wait_seconds": 10, "native": native},
        "services": {"data_dir": str(folder), "drain_seconds": 10},
    }


@pytest.fixture(scope="module")
async def kernel_id(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The one kernel in the library that fits the slot, with its native part, as the forge brings them."""
    config = load(TolariaConfig, settings(tmp_path_factory.mktemp("nobody")))
    interface = build_host(config, load_data(config)).slots[SLOT].interface
    ir, symbols = catalogue()["bottleneck_mlp"], {"width": 8}
    module = build(ir, interface, symbols, 1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        code = await asyncio.to_thread(compiled, module, example_input(interface, 16, seed=0))
    weights = pack(module.state_dict())
    figures = NativeFigures(rows=16, step_ratio=0.5, shipped=True)
    provenance = Provenance(compiler="test", native=figures)
    manifest = KernelManifest.describe(ir, interface, weights, provenance, symbols=symbols, seed=1)
    upload = Upload(stage.stub("urza", "tezzeret"), stage.endpoints.keys_dir / "tezzeret.key")
    made = await upload.kernel(manifest, weights)
    papers = NativeRecord(
        kernel_id=made, target=target(), toolchain=convention(), blob_sha256=sha256(code), blob_bytes=len(code),
        rows=figures.rows, step_ratio=figures.step_ratio,
    )  # fmt: skip
    await upload.native(papers, code)
    await stage.judge(manifest)
    return made


def life(run: SeedRun) -> dict[State, SeedEvent]:
    """The first seed's state changes in the slot, by where they led."""
    events = [event for boundary in run.grown for event in boundary.events]
    return {event.target: event for event in events if (event.slot, event.generation) == (SLOT, 0)}


def between(first: SeedEvent, second: SeedEvent, name: str) -> float:
    return second.measurements[name] - first.measurements[name]


async def test_a_run_trains_through_compiled_code_and_its_record_says_so(
    stage: Stage, kernel_id: str, tmp_path: Path, run_id: str
) -> None:
    platform_at(stage.endpoints, tmp_path)
    native = await asyncio.to_thread(train, settings(tmp_path), run_id)
    told = life(native)
    trained, grafted, rested = told[State.TRAINING], told[State.GRAFTING], told[State.STABILIZATION]
    assert trained.kernel_id == kernel_id
    assert trained.execution == "native"
    assert not any(trained.measurements[name] for name in ("native_passes", "native_gradients", "eager_passes"))
    lessons = grafted.measurements["lessons"] * GROWTH["training_steps"]
    assert 0 < between(trained, grafted, "native_gradients") <= lessons
    config = load(TolariaConfig, settings(tmp_path))
    steps = len(batches(len(load_data(config).train), BATCH, config.seed, 0))
    assert between(grafted, rested, "native_gradients") == steps * (rested.epoch - grafted.epoch)
    assert (rested.measurements["eager_passes"], rested.execution) == (0, "native")

    eager = await asyncio.to_thread(train, settings(tmp_path, "off"), f"{run_id}-eager")
    assert [event.target for event in life(eager).values()] == [event.target for event in told.values()]
    for ours, theirs in zip(native.grown, eager.grown, strict=True):
        assert ours.figures.train_loss == pytest.approx(theirs.figures.train_loss, rel=1e-3)
    quiet = life(eager)[State.STABILIZATION]
    assert quiet.execution == ""
    assert not any("passes" in name for name in quiet.measurements)

    async def kept() -> Any:
        asked = kasmina_pb2.GetSeedRequest(run_id=run_id, slot=SLOT, generation=0)
        history = (await stage.stub("kasmina").GetSeed(asked)).seed.history
        return [event for event in history if event.target == State.STABILIZATION]

    (event,) = await until(kept)
    assert (event.execution, dict(event.measurements)) == (rested.execution, rested.measurements)
    shown = await asyncio.to_thread(
        run_esperctl, tmp_path, "seed", "show", SLOT, "--run", run_id, "--generation", "0", COLUMNS="200"
    )
    last = list(told.values())[-1]
    figures = [f"{last.measurements[name]:,.0f}" for name in ("native_passes", "native_gradients", "eager_passes")]
    runs = "{} passes forward, {} backward by compiled code, {} without it".format(*figures)
    assert f"{last.execution} ({runs})" in shown.stdout, shown.stderr


def interrupted(folder: Path, run_id: str, at: State) -> None:
    """Train until the slot's seed has come to ``at``, and stop."""
    stop = Stop()

    def each(boundary: Any) -> None:
        if any(event.target is at for event in boundary.events):
            stop.signal = 15

    with pytest.raises(Stopped):
        Experiment(load(TolariaConfig, settings(folder)), run_id, True, False, False, Heard(each), stop).run()


@pytest.mark.usefixtures("kernel_id")
async def test_an_interrupted_run_has_its_compiled_code_back_and_equals_one_that_never_was(
    stage: Stage, tmp_path: Path, run_id: str
) -> None:
    platform_at(stage.endpoints, tmp_path)
    whole = await asyncio.to_thread(train, settings(tmp_path), f"{run_id}-whole")
    await asyncio.to_thread(interrupted, tmp_path, run_id, State.GRAFTING)
    again = await asyncio.to_thread(train, settings(tmp_path), run_id, resume=True)
    assert [event.measurements for event in life(again).values()] == [
        event.measurements for event in life(whole).values()
    ]
    assert [b.figures.train_loss for b in again.grown] == [b.figures.train_loss for b in whole.grown]
    assert life(again)[State.STABILIZATION].measurements["native_gradients"] > 0


@pytest.mark.usefixtures("kernel_id")
async def test_a_run_that_is_resumed_without_the_platform_goes_on_eagerly_and_says_so(
    stage: Stage, tmp_path: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform_at(stage.endpoints, tmp_path)
    await asyncio.to_thread(interrupted, tmp_path, run_id, State.GRAFTING)
    platform_at(nowhere(stage.endpoints), tmp_path)
    monkeypatch.setattr(remote, "RETURN_SECONDS", 0.1)
    alone = settings(tmp_path)
    alone["services"]["drain_seconds"] = 0
    again = await asyncio.to_thread(train, alone, run_id, resume=True)
    grafted, rested = life(again)[State.GRAFTING], life(again)[State.STABILIZATION]
    assert between(grafted, rested, "native_passes") == 0
    assert between(grafted, rested, "eager_passes") > 0
    assert rested.execution == f"native, but for {NOT_BACK}"
