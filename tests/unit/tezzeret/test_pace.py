"""Politeness: a core that is free is used, one that is not is shared in small slices, and work always goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import psutil
import pytest

from services.child import WarmChild
from services.pace import FREE_CORE, SAVED_SECONDS, SAVING, SHARE, SLICE_SECONDS, Budget, Look, look
from services.sandbox import Limits
from services.tezzeret.worker import PACED_NICE

WORK = 0.1
WORKS = "tests.unit.tezzeret.child_works"


def lived(seconds: float, *, cores: int, others: float, step: float = 0.02) -> tuple[float, float]:
    """(processor seconds used, processor seconds of others) when one core's worth is wanted, on a machine that obeys at once."""
    budget, at, idle, own = Budget(), 0.0, 0.0, 0.0
    running = budget.decide(Look(at, idle, own, cores))
    for _ in range(round(seconds / step)):
        mine = min(step, max(step * (cores - others), step / 2)) if running else 0.0
        theirs = min(others * step, cores * step - mine)
        at, own, idle = at + step, own + mine, idle + cores * step - mine - theirs
        running = budget.decide(Look(at, idle, own, cores))
    return own, at


@pytest.mark.parametrize(("cores", "others"), [(1, 0.0), (2, 1.0), (2, 0.3), (8, 7.2)])
def test_a_free_core_is_used_in_full(cores: int, others: float) -> None:
    own, passed = lived(20, cores=cores, others=others)
    assert own > 0.95 * passed * min(1.0, cores - others)


@pytest.mark.parametrize(("cores", "others"), [(1, 1.0), (2, 2.0), (8, 8.0)])
def test_a_core_that_others_want_is_shared_in_small_slices(cores: int, others: float) -> None:
    own, passed = lived(60, cores=cores, others=others)
    assert SHARE / 2 < (own - SAVED_SECONDS) / passed <= SHARE + 0.01


def test_a_long_pause_is_no_saving_and_proves_nothing() -> None:
    budget = Budget()
    budget.seconds = SLICE_SECONDS
    budget.decide(Look(0.0, 0.0, 0.0, 1))
    assert budget.decide(Look(1000.0, 900.0, 0.0, 1))  # somebody idled then; nobody knows about now
    budget.decide(Look(1000.02, 900.0, 0.02, 1))
    assert not budget.decide(Look(1000.04, 900.0, 0.04, 1))
    assert -2 * SLICE_SECONDS < budget.seconds < 0


def test_what_is_saved_while_a_core_is_free_is_there_when_none_is() -> None:
    budget = Budget()
    budget.seconds = 0.0
    for number in range(201):  # nobody else computes
        budget.decide(Look(number * 0.02, number * 0.02, 0.0, 1))
    assert budget.seconds == pytest.approx(SAVING * 4, rel=0.1)
    assert budget.seconds <= SAVED_SECONDS


def test_others_come_and_go() -> None:
    budget, at, idle = Budget(), 0.0, 0.0
    said = []
    for busy in (False, True, False):
        for _ in range(100):
            at, idle = at + 0.02, idle + (0.0 if busy else 0.02)
            own = at if budget.running and not busy else 0.0
            budget.decide(Look(at, idle, max(own, 0.0), 1))
        said.append(budget.free)
    assert said == [True, False, True]
    assert FREE_CORE < 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_seen_of_a_process_is_what_it_used() -> None:
    before = look(os.getpid())
    began = psutil.Process().cpu_times()
    while psutil.Process().cpu_times().user < began.user + 0.1:
        pass
    after = look(os.getpid())
    assert before is not None
    assert after is not None
    assert 0.05 < after.own - before.own < 1.0
    assert after.idle >= before.idle
    assert after.cores == len(os.sched_getaffinity(0))
    assert look(2**22 + 1) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_polite_child_on_a_busy_core_works_on_and_is_not_killed_for_the_time_it_stood_still() -> None:
    core = min(os.sched_getaffinity(0))
    hog = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass",
        start_new_session=True,
    )
    child = WarmChild(WORKS, Limits(wall_seconds=1.0, cpu_seconds=5.0, nice=PACED_NICE), polite=True)
    try:
        await child.warm()
        assert child.pid is not None
        assert child._pace is not None
        child._pace.budget.seconds = 0.0  # nothing saved
        os.sched_setaffinity(child.pid, {core})
        began = asyncio.get_running_loop().time()
        answer = await child.ask({"do": "compute", "seconds": WORK})
        passed = asyncio.get_running_loop().time() - began
        assert answer["used"] >= WORK
        assert child._pace.lost > 0
        assert passed > WORK / 0.2
    finally:
        hog.kill()
        await hog.wait()
        await child.close()


async def test_a_child_whose_parent_dies_while_it_is_stopped_leaves_nothing_behind() -> None:
    program = f"""if True:
        import asyncio, os, signal
        from services.child import WarmChild
        from services.sandbox import Limits

        async def main():
            child = WarmChild({WORKS!r}, Limits(), polite=True)
            await child.warm()
            os.killpg(child.pid, signal.SIGSTOP)
            print(child.pid, child.scratch, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    out, _ = await parent.communicate()
    pid, scratch = out.decode().split()
    assert parent.returncode == -signal.SIGKILL
    async with asyncio.timeout(20):
        while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not os.path.exists(scratch)  # noqa: ASYNC240
