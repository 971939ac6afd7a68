"""Orders to seeds: what is refused and why, and that an order is given once."""

from __future__ import annotations

import pytest

from esper_core.bus.envelope import unwrap
from esper_core.errors import AlreadyExists, Conflict, Forbidden, IllegalTransition, NotFound
from esper_core.ids import new_id
from esper_core.lifecycle import State
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import lifecycle_pb2
from esper_core.pb.esper.kasmina.v1 import kasmina_pb2
from tests.service.platform import OTHER_INTERFACE, SLOT, Stage, until


@pytest.fixture
async def run(stage: Stage, run_id: str) -> str:
    """A registered run with one dormant seed."""
    await stage.register(run_id)
    await until(lambda: in_state(stage, run_id, State.DORMANT))
    return run_id


async def in_state(stage: Stage, run_id: str, state: State) -> bool:
    answer = await stage.stub("kasmina").GetSeed(kasmina_pb2.GetSeedRequest(run_id=run_id, slot=SLOT))
    return bool(answer.seed.state == state)


async def orders(stage: Stage, run_id: str) -> list[bus_pb2.EventEnvelope]:
    """What was recorded for the run's command subject, in order."""
    rows = await stage.database.fetch(
        "SELECT data FROM bus.outbox WHERE subject = $1 ORDER BY position", f"esper.control.kasmina.commands.{run_id}"
    )
    return [unwrap(row["data"]).envelope for row in rows]


async def germinate(
    stage: Stage, run_id: str, kernel_id: str, slot: str = SLOT, **fields: str
) -> lifecycle_pb2.Command:
    request = kasmina_pb2.GerminateRequest(run_id=run_id, slot=slot, kernel_id=kernel_id, **fields)
    answer = await stage.stub("kasmina").Germinate(request)
    return answer.command


async def test_an_order_is_recorded_and_published_once(stage: Stage, run: str) -> None:
    kernel_id = await stage.kernel(seed=1)
    command_id = new_id()
    command = await germinate(stage, run, kernel_id, command_id=command_id, reason="because")
    assert (command.command_id, command.run_id, command.slot) == (command_id, run, SLOT)
    assert command.target == lifecycle_pb2.SEED_STATE_GERMINATED
    assert (command.kernel_id, command.issued_by, command.reason) == (kernel_id, "operator", "because")
    assert await germinate(stage, run, kernel_id, command_id=command_id, reason="because") == command
    (envelope,) = await orders(stage, run)
    assert (envelope.priority, envelope.producer) == (bus_pb2.PRIORITY_CONTROL, "kasmina")
    assert lifecycle_pb2.Command.FromString(envelope.payload) == command
    await until(lambda: stage.database.fetchval("SELECT count(*) = 0 FROM bus.outbox WHERE sent IS NULL"))


async def test_the_same_order_is_given_again_after_it_took_effect(stage: Stage, run: str) -> None:
    """A client that lost the answer repeats; by then the seed has moved and a new order would be illegal."""
    kernel_id = await stage.kernel(seed=1)
    command = await germinate(stage, run, kernel_id, command_id=new_id())
    await stage.seed(run, State.DORMANT, State.GERMINATED, 0, command_id=command.command_id)
    await until(lambda: in_state(stage, run, State.GERMINATED))
    assert await germinate(stage, run, kernel_id, command_id=command.command_id) == command
    with pytest.raises(IllegalTransition, match="GERMINATED to GERMINATED"):
        await germinate(stage, run, kernel_id)
    assert len(await orders(stage, run)) == 1


async def test_a_command_id_names_one_order(stage: Stage, run: str) -> None:
    command_id = new_id()
    await germinate(stage, run, await stage.kernel(seed=1), command_id=command_id)
    with pytest.raises(AlreadyExists):
        await germinate(stage, run, await stage.kernel(seed=2), command_id=command_id)
    assert len(await orders(stage, run)) == 1


async def test_unknown_places_are_refused_with_the_nearest_name(stage: Stage, run: str) -> None:
    kernel_id = await stage.kernel(seed=1)
    with pytest.raises(NotFound) as slot:
        await germinate(stage, run, kernel_id, slot="fc1:fc3")
    assert SLOT in slot.value.hint
    with pytest.raises(NotFound) as elsewhere:
        await germinate(stage, run[:-1] + "z", kernel_id)
    assert run in elsewhere.value.hint
    with pytest.raises(NotFound):
        await germinate(stage, run, "kernel-" + "0" * 64)
    assert await orders(stage, run) == []


async def test_a_kernel_must_be_validated_and_fit(stage: Stage, run: str) -> None:
    with pytest.raises(Conflict, match="COMPILED"):
        await germinate(stage, run, await stage.kernel(seed=90, judge=False))
    with pytest.raises(Conflict, match="another interface"):
        await germinate(stage, run, await stage.kernel(OTHER_INTERFACE, seed=91))
    assert await orders(stage, run) == []


async def test_a_run_that_has_ended_takes_no_orders(stage: Stage, run: str) -> None:
    kernel_id = await stage.kernel(seed=1)
    await stage.end(run)
    await until(lambda: stage.database.fetchval("SELECT state <> 1 FROM kasmina.runs WHERE run_id = $1", run))
    with pytest.raises(Conflict, match="has ended"):
        await germinate(stage, run, kernel_id)


async def test_culling_follows_the_lifecycle(stage: Stage, run: str) -> None:
    kasmina = stage.stub("kasmina")
    unload = kasmina_pb2.UnloadKernelRequest(run_id=run, slot=SLOT)
    with pytest.raises(IllegalTransition) as dormant:
        await kasmina.UnloadKernel(unload)
    assert "GERMINATED" in dormant.value.hint
    await stage.seed(run, State.DORMANT, State.GERMINATED, 0)
    await until(lambda: in_state(stage, run, State.GERMINATED))
    command = (await kasmina.UnloadKernel(unload)).command
    assert command.target == lifecycle_pb2.SEED_STATE_CULLED
    roll = kasmina_pb2.TransitionRequest(run_id=run, slot=SLOT, target=lifecycle_pb2.SEED_STATE_ROLLED_BACK)
    with pytest.raises(IllegalTransition):  # nothing of it has reached the host yet
        await kasmina.Transition(roll)
    await stage.seed(run, State.TRAINING, State.GRAFTING, 3, alpha=0.2)
    await until(lambda: in_state(stage, run, State.GRAFTING))
    assert (await kasmina.Transition(roll)).command.target == lifecycle_pb2.SEED_STATE_ROLLED_BACK
    assert [lifecycle_pb2.Command.FromString(order.payload).target for order in await orders(stage, run)] == [10, 11]


async def test_load_kernel_is_germinate(stage: Stage, run: str) -> None:
    request = kasmina_pb2.LoadKernelRequest(run_id=run, slot=SLOT, kernel_id=await stage.kernel(seed=1))
    command = (await stage.stub("kasmina", "tamiyo").LoadKernel(request)).command
    assert (command.target, command.issued_by) == (lifecycle_pb2.SEED_STATE_GERMINATED, "tamiyo")
    assert command.command_id


async def test_a_training_process_gives_no_orders(stage: Stage, run: str) -> None:
    request = kasmina_pb2.UnloadKernelRequest(run_id=run, slot=SLOT)
    with pytest.raises(Forbidden):
        await stage.stub("kasmina", "tolaria").UnloadKernel(request)
