"""A warm child does many jobs and survives none of its own misdeeds."""

import asyncio
import dataclasses
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import psutil
import pytest

from esper_core.errors import DeadlineExceeded, Exhausted, Internal, InvalidInput
from services.child import ALLOWED, WarmChild
from services.sandbox import Limits

WORKS = "tests.unit.tezzeret.child_works"
LIMITS = Limits(wall_seconds=10.0, cpu_seconds=5.0, memory_bytes=512 << 20, idle_seconds=20.0)


@pytest.fixture
async def child() -> AsyncIterator[WarmChild]:
    child = WarmChild(WORKS, LIMITS)
    yield child
    await child.close()
    assert child.pid is None


async def test_one_child_does_many_jobs_in_a_scrubbed_environment(
    child: WarmChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_NATS__PASSWORD", "canary")
    first, second = await asyncio.gather(child.ask({"do": "echo", "say": 1}), child.ask({"do": "echo", "say": 2}))
    assert (first["said"], second["said"]) == (1, 2)
    assert first["pid"] == second["pid"] == child.pid
    assert first["nice"] == 19
    assert "ESPER_NATS__PASSWORD" not in first["environment"]
    with pytest.raises(InvalidInput, match="no") as caught:
        await child.ask({"do": "refuse"})
    assert caught.value.hint == "ask for less"
    assert (await child.ask({"do": "echo", "say": 3}))["pid"] == first["pid"]


async def test_a_child_reaches_nobody_not_even_on_loopback(child: WarmChild) -> None:
    heard: list[str] = []

    async def hear(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append("somebody")
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        _, writer = await asyncio.open_connection("127.0.0.1", port)  # the line itself is fine
        writer.close()
        await writer.wait_closed()
        found = await child.ask({"do": "dial", "port": port})
    assert heard == ["somebody"]
    assert found["python"] == "EPERM"
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        assert (found["libc"], found["unix"]) == ("EPERM", "EPERM")
        assert "PermissionError" in found["grandchild"]


async def test_no_secret_of_the_parents_environment_is_seen(child: WarmChild, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESPER_NATS__PASSWORD", "AWS_SECRET_ACCESS_KEY", "LD_PRELOAD_NOT", "A_NEW_ONE"):
        monkeypatch.setenv(name, "canary-7f3a")
    seen = (await child.ask({"do": "look"}))["environment"]
    assert "canary-7f3a" not in str(seen)
    assert set(seen) <= {*ALLOWED, "LC_CTYPE"}


async def test_a_warmed_child_takes_the_next_job(child: WarmChild) -> None:
    await asyncio.gather(child.warm(), child.warm())
    pid = child.pid
    assert pid is not None
    assert (await child.ask({"do": "echo", "say": 1}))["pid"] == pid


async def test_memory_is_bounded_and_measured(child: WarmChild) -> None:
    assert (await child.ask({"do": "hoard", "bytes": 64 << 20}))["peak"] == pytest.approx(64 << 20, rel=0.1)
    with pytest.raises(Exhausted, match="memory"):
        await child.ask({"do": "hoard", "bytes": 1 << 30})
    assert (await child.ask({"do": "echo", "say": "still there"}))["said"] == "still there"


async def test_a_killed_child_is_told_of_and_replaced(child: WarmChild) -> None:
    with pytest.raises(Exhausted, match="SIGKILL"):
        await child.ask({"do": "die"})
    with pytest.raises(Internal, match="last words"):
        await child.ask({"do": "babble"})
    with pytest.raises(Internal, match="KeyError"):
        await child.ask({"do": "break_down"})


async def test_time_is_bounded() -> None:
    child = WarmChild(WORKS, dataclasses.replace(LIMITS, wall_seconds=0.5))
    try:
        await child.ask({"do": "echo", "say": "warm"})
        pid = child.pid
        with pytest.raises(DeadlineExceeded, match=r"0\.5 s"):
            await child.ask({"do": "hang"})
        assert pid is not None
        assert not psutil.pid_exists(pid)
    finally:
        await child.close()
    child = WarmChild(WORKS, dataclasses.replace(LIMITS, cpu_seconds=0.5))
    try:
        with pytest.raises(DeadlineExceeded, match="SIGXCPU"):
            await child.ask({"do": "spin"})
    finally:
        await child.close()


async def test_an_idle_child_leaves_and_the_next_job_starts_another() -> None:
    child = WarmChild(WORKS, dataclasses.replace(LIMITS, idle_seconds=0.3))
    try:
        first = (await child.ask({"do": "echo", "say": 1}))["pid"]
        deadline = asyncio.get_running_loop().time() + 10
        while psutil.pid_exists(first) and psutil.Process(first).status() != psutil.STATUS_ZOMBIE:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)
        assert (await child.ask({"do": "echo", "say": 2}))["pid"] != first
    finally:
        await child.close()


def test_an_orphaned_child_leaves_nothing_behind() -> None:
    parent = f"""if True:
        import asyncio, os, signal
        from services.child import ALLOWED, WarmChild
        from services.sandbox import Limits

        async def main():
            child = WarmChild({WORKS!r}, Limits())
            await child.warm()
            print(child.pid, child.scratch, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """
    ended = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=False)
    pid, scratch = ended.stdout.split()
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not os.path.exists(scratch)


async def test_a_cancelled_job_takes_its_child_along_and_close_removes_the_scratch(child: WarmChild) -> None:
    await child.ask({"do": "echo", "say": "warm"})
    pid, scratch = child.pid, child.scratch
    job = asyncio.create_task(child.ask({"do": "hang"}))
    await asyncio.sleep(0.1)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert os.stat(scratch).st_mode & 0o777 == 0o700
    await child.close()
    assert not os.path.exists(scratch)  # noqa: ASYNC240
