"""Deadlines, back-pressure, sizes, drain: the server stays answerable whatever a client does."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esper_core import errors
from esper_core.pb.esper.urza.v1 import urza_pb2, urza_pb2_grpc

HOLD = urza_pb2.GetKernelRequest(kernel_id="hold")
KERNEL = "kernel-" + "0" * 64
SERVING, NOT_SERVING = 1, 2


async def _until_running(urza: Any, count: int) -> None:
    async with asyncio.timeout(5), urza.changed:
        await urza.changed.wait_for(lambda: urza.running >= count)


async def test_the_server_ends_what_takes_too_long(site: Any) -> None:
    here = await site(deadline=0.1)
    with pytest.raises(errors.DeadlineExceeded, match=r"server's 0\.1 s"):
        await (await here.stub()).GetKernel(HOLD)
    assert here.urza.cancelled.is_set()


async def test_the_client_waits_no_longer_than_it_said(site: Any) -> None:
    here = await site()
    started = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded, match="in time"):
        await (await here.stub()).GetKernel(HOLD, timeout=0.1)
    assert time.monotonic() - started < 2
    await asyncio.wait_for(here.urza.cancelled.wait(), 5)


async def test_a_timeout_inside_the_servicer_is_not_taken_for_the_deadline(site: Any) -> None:
    here = await site(deadline=5)

    async def late(_: str) -> Any:
        raise TimeoutError("a database was slow")

    here.urza._late = late
    with pytest.raises(errors.Internal):
        await (await here.stub()).GetKernel(urza_pb2.GetKernelRequest(kernel_id="late"))


async def test_streams_outlive_the_deadline(site: Any) -> None:
    here = await site(deadline=0.05)
    call = (await here.stub()).StreamKernel(urza_pb2.StreamKernelRequest(kernel_id=KERNEL, offset=4))
    started = time.monotonic()
    async for _ in call:
        if time.monotonic() - started > 0.2:
            break
    call.cancel()


async def test_a_client_stream_that_stands_still_is_ended(site: Any) -> None:
    here = await site(idle=0.1)

    async def dawdle() -> Any:
        yield urza_pb2.UploadKernelRequest(chunk=b"x")
        await asyncio.sleep(30)

    with pytest.raises(errors.DeadlineExceeded, match="no message came"):
        await (await here.stub("tezzeret")).UploadKernel(dawdle())


async def test_a_client_that_does_not_read_is_ended(site: Any) -> None:
    here = await site(idle=0.2)
    stub = await here.stub()
    responses = aiter(stub.StreamKernel(urza_pb2.StreamKernelRequest(kernel_id=KERNEL, offset=4)))
    await anext(responses)
    await asyncio.wait_for(here.urza.cancelled.wait(), 10)  # it filled the window and then waited for us
    with pytest.raises(errors.DeadlineExceeded, match="took no message"):
        await asyncio.wait_for(_drained(responses), 5)


async def test_more_calls_than_allowed_are_refused_and_the_others_finish(site: Any) -> None:
    here = await site(max_concurrent=2)
    stub = await here.stub()
    running = [asyncio.ensure_future(_await(stub.GetKernel(HOLD))) for _ in range(2)]
    await _until_running(here.urza, 2)
    with pytest.raises(errors.Exhausted) as caught:
        await stub.GetKernel(HOLD)
    assert caught.value.hint
    here.urza.release.set()
    await asyncio.gather(*running)
    await stub.GetKernel(HOLD)


async def test_a_message_that_is_too_large_is_refused_clearly(site: Any) -> None:
    stub = await (await site()).stub()
    with pytest.raises(errors.Exhausted, match="larger than max") as caught:
        await stub.GetKernel(urza_pb2.GetKernelRequest(kernel_id="x" * 5_000_000))
    assert "pieces" in caught.value.hint
    with pytest.raises(errors.Exhausted, match="larger than max"):
        await stub.GetKernel(urza_pb2.GetKernelRequest(kernel_id="big:5000000"))


async def test_stop_says_not_serving_first_and_lets_running_calls_finish(site: Any) -> None:
    here = await site()
    checks = health_pb2_grpc.HealthStub(await here.channel())
    watch = checks.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    stub = await here.stub()
    running = asyncio.ensure_future(_await(stub.GetKernel(HOLD)))
    await _until_running(here.urza, 1)
    stopping = asyncio.create_task(here.server.stop(10))
    assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
    watch.cancel()
    assert not running.done()
    here.urza.release.set()
    assert await asyncio.wait_for(running, 5) == urza_pb2.GetKernelResponse()
    await asyncio.wait_for(stopping, 5)
    with pytest.raises(errors.Unavailable) as caught:
        await stub.GetKernel(HOLD)
    assert "esperctl up" in caught.value.hint


async def test_stop_cancels_what_outlasts_the_grace(site: Any) -> None:
    here = await site()
    running = asyncio.ensure_future(_await((await here.stub()).GetKernel(HOLD)))
    await _until_running(here.urza, 1)
    await asyncio.wait_for(here.server.stop(0.1), 5)
    with pytest.raises(errors.Unavailable):
        await running
    assert here.urza.cancelled.is_set()


async def test_set_serving_shows_in_health_per_service(site: Any) -> None:
    here = await site()
    checks = health_pb2_grpc.HealthStub(await here.channel("tolaria"))
    for serving in (False, True):
        here.server.set_serving(serving)
        for name in ("", "esper.urza.v1.UrzaService"):
            found = await checks.Check(health_pb2.HealthCheckRequest(service=name))
            assert found.status == (SERVING if serving else NOT_SERVING)
    with pytest.raises(errors.NotFound):
        await checks.Check(health_pb2.HealthCheckRequest(service="esper.nothing"))


async def test_a_cancelled_call_is_cancelled_on_the_server(site: Any) -> None:
    here = await site()
    call = asyncio.ensure_future(_await((await here.stub()).GetKernel(HOLD)))
    await _until_running(here.urza, 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(here.urza.cancelled.wait(), 5)


async def test_an_error_after_the_client_has_gone_is_told_to_nobody(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    here = await site()
    ended = asyncio.Event()

    async def stubborn(_: str) -> Any:
        try:
            await here.urza._hold("")
        except asyncio.CancelledError:
            ended.set()
            raise errors.NotFound("too late") from None

    here.urza._stubborn = stubborn
    stub = await here.stub()
    call = asyncio.ensure_future(_await(stub.GetKernel(urza_pb2.GetKernelRequest(kernel_id="stubborn"))))
    await _until_running(here.urza, 1)
    call.cancel()
    await asyncio.wait_for(ended.wait(), 5)
    await here.server.stop(1)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_goes_away_is_no_incident(
    site: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    here = await site()
    channel = await here.channel()
    call = urza_pb2_grpc.UrzaServiceStub(channel).StreamKernel(urza_pb2.StreamKernelRequest(kernel_id=KERNEL, offset=4))
    await call.read()
    await asyncio.sleep(0.3)  # it has filled the window by now and waits for us
    await channel.close()
    await asyncio.wait_for(here.urza.cancelled.wait(), 5)
    await here.server.stop(1)
    gc.collect()  # asyncio complains of a forgotten task when it is collected
    assert "incident" not in capsys.readouterr().err
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_unavailable_is_tried_again_and_nothing_else_is(site: Any) -> None:
    here = await site()
    stub = await here.stub()
    await stub.GetKernel(urza_pb2.GetKernelRequest(kernel_id="flaky:2"))
    assert here.urza.attempts == 3
    with pytest.raises(errors.Unavailable, match="not yet"):
        await stub.GetKernel(urza_pb2.GetKernelRequest(kernel_id="flaky:1000"))
    assert here.urza.attempts == 3 + 4
    raised = 0

    async def count(_: str) -> Any:
        nonlocal raised
        raised += 1
        raise errors.Exhausted("no")

    here.urza._count = count
    with pytest.raises(errors.Exhausted):
        await stub.GetKernel(urza_pb2.GetKernelRequest(kernel_id="count"))
    assert raised == 1


async def _drained(responses: Any) -> None:
    async for _ in responses:
        continue


async def _await(call: Any) -> Any:
    return await call


async def test_nobody_there_is_unavailable_with_a_hint(site: Any) -> None:
    here = await site()
    stub = await here.stub()
    await here.server.stop(0)
    with pytest.raises(errors.Unavailable) as caught:
        await stub.GetKernel(HOLD)
    assert "esperctl up" in caught.value.hint
    assert isinstance(await here.channel(), grpc.aio.Channel)
