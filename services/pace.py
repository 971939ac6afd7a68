"""How a child works without getting into anybody's way: freely while a core is free, in small slices while none is.

Priorities alone do not do: the lowest one in another session takes a fair half of a core (Linux's autogroups), and in the
same session it takes nothing at all for as long as somebody else computes. So the parent looks several times a second at
the cores the child may use. As long as others leave most of one idle, the child runs, and saves up for worse times: enough to
answer at once somebody who asks for little. Otherwise it lives on what it has saved, and then on a budget, a small share of
one core that accrues with time: it is stopped (SIGSTOP, with whatever it has started) when that is used up and goes on when
there is enough for another slice. It always makes progress.

Reads ``/proc/stat`` and ``/proc/<pid>/task``: on systems without them nothing is paced. Looks at whole cores, so work that a
container's quota holds back is not seen. What others do between two looks, a tenth of a second, is not seen either.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

SHARE = 0.04
"""Of one core, while none is free: what a trainer on that core loses at most, but for what switching costs."""
SLICE_SECONDS = 0.02
"""Budget that a stopped child goes on with."""
SAVED_SECONDS = 2.0
"""Processor time that a child may have saved, and that a new one has to begin with."""
SAVING = 0.5
"""Seconds saved in a second in which a core is free."""
FREE_CORE = 0.6
"""Share of a core that others must leave idle for the child to run freely."""
LOOK_SECONDS = 0.02
STOPPED_LOOK_SECONDS = 0.1
WINDOW_SECONDS = 0.25
"""How far back one looks to tell whether a core is free; the kernel counts idle time in hundredths of a second."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Look:
    """What was seen at one moment; all in seconds.

    Attributes:
        at: monotonic time.
        idle: what the cores that the child may use have idled since the machine started, together.
        own: processor time of the child and everything below it.
        cores: how many of them.
    """

    at: float
    idle: float
    own: float
    cores: int


class Budget:
    """Decides whether the child may run; pure.

    Attributes:
        seconds: processor time it may still use while no core is free.
        free: whether one is, as far as is known.
    """

    def __init__(self) -> None:
        self.seconds = SAVED_SECONDS
        self.running = True
        self.free = False
        self._looks: deque[Look] = deque()

    def decide(self, look: Look) -> bool:
        """Whether it may run until the next look."""
        last = self._looks[-1] if self._looks else look
        if look.at - last.at > 4 * WINDOW_SECONDS:  # nothing was looked at meanwhile
            self._looks.clear()
            last = look
        self._looks.append(look)
        while len(self._looks) > 2 and look.at - self._looks[1].at >= WINDOW_SECONDS:
            self._looks.popleft()
        self.free = self._free()
        passed, used = look.at - last.at, max(0.0, look.own - last.own)
        if self.free:
            self.seconds, self.running = min(SAVED_SECONDS, self.seconds + SAVING * passed), True
            return True
        self.seconds = max(self.seconds, min(SLICE_SECONDS, self.seconds + SHARE * passed)) - used
        self.running = self.seconds > 0 if self.running else self.seconds >= SLICE_SECONDS
        return self.running

    def _free(self) -> bool:
        """Whether others have left most of a core idle lately; not as long as nobody has looked for long enough."""
        first, last = self._looks[0], self._looks[-1]
        passed = last.at - first.at
        if passed < WINDOW_SECONDS / 2:
            return False
        left = (last.idle - first.idle + max(0.0, last.own - first.own)) / passed
        return left >= min(FREE_CORE, last.cores)


class Pace:
    """One child's pace.

    Attributes:
        lost: seconds that no clock of the child's work should count: it was stopped, or others took its core. All but the
            share that it is promised, so that a child which hangs is found out on a busy machine too, only later.
    """

    def __init__(self) -> None:
        self.budget = Budget()
        self.lost = 0.0

    @contextlib.asynccontextmanager
    async def kept(self, pid: int) -> AsyncIterator[None]:
        """Keep the process group ``pid`` to its pace; it runs when this is left."""
        task = asyncio.create_task(self._keep(pid))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await task
            _tell(pid, signal.SIGCONT)

    async def _keep(self, pid: int) -> None:
        running = True
        while (seen := look(pid)) is not None:
            if self.budget.decide(seen) != running:
                running = not running
                _tell(pid, signal.SIGCONT if running else signal.SIGSTOP)
            began = time.monotonic()
            try:
                await asyncio.sleep(LOOK_SECONDS if running else STOPPED_LOOK_SECONDS)
            finally:
                self.lost += 0.0 if self.budget.free else (1 - SHARE) * (time.monotonic() - began)
        _tell(pid, signal.SIGCONT)  # what cannot be seen is not paced


def look(pid: int) -> Look | None:
    """What is to be seen of a process and its cores now; None where that cannot be told, or when it is gone."""
    try:
        cores = os.sched_getaffinity(pid)
        return Look(time.monotonic(), _idle(cores), _used(pid), len(cores))
    except (OSError, AttributeError):
        return None


def _idle(cores: Collection[int]) -> float:
    wanted = {f"cpu{core}" for core in cores}
    with open("/proc/stat", encoding="ascii") as file:
        rows = [line.split() for line in file if line.startswith("cpu")]
    return sum(int(row[4]) + int(row[5]) for row in rows if row[0] in wanted) / _TICKS  # idle, and waiting for a disk


def _used(pid: int) -> float:
    """Processor seconds of the living threads of a process and of what descends from it."""
    total = 0.0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            total += int((thread / "schedstat").read_text().split()[0]) / 1e9
            total += sum(_used(int(child)) for child in (thread / "children").read_text().split())
    return total


def _tell(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, number)
