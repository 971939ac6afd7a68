"""The inside of a warm child: reads jobs as JSON lines, does them one at a time within limits, answers in JSON lines.

Limits: lowest CPU priority, an address space capped at what the idle child holds plus an allowance,
a CPU and a wall-clock allowance for each job (the kernel ends the process when either runs out, even when the parent
is gone), no core dumps, capped file sizes and open files. The child ends by itself when its parent goes away or when
it has had nothing to do for a while.

Its environment is an allow-list (``services.child``) and it has no network (``services.seclusion``, which says how far that holds).

What this does not protect against: the child runs as the same user and sees the same files, the platform's keys among
them; the limits are the process's own and code running in it could lift them up to the hard limits; a compiler that it
starts has limits of its own, each as large. That is acceptable only because no foreign code is ever run here: blueprints
are data over a fixed registry of operations, weights are safetensors, and what is compiled is generated from both here. On
systems without ``/proc`` the address-space cap is left to the operating system's own accounting.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from esper_core.errors import EsperError, Refused
from services.seclusion import seclude

Job = dict[str, Any]
Work = Callable[[Job], Job]

MAX_LINE = 4 << 20


@dataclass(frozen=True)
class Limits:
    """What a child may use.

    Attributes:
        wall_seconds: of one job.
        cpu_seconds: of one job.
        memory_bytes: address space above what the idle child holds.
        file_bytes: of one file it writes.
        open_files: at once.
        nice: how far below others it stands, 1 to 19. One that is paced (``services.pace``) needs some standing to get the small
            share that it is promised: at 19 a busy core leaves it about a seventieth.
        idle_seconds: after which a child with nothing to do ends itself.
        start_seconds: until a started child must have said that it is ready.
    """

    wall_seconds: float = 60.0
    cpu_seconds: float = 60.0
    memory_bytes: int = 4 << 30
    file_bytes: int = 1 << 30
    open_files: int = 64
    nice: int = 19
    idle_seconds: float = 60.0
    start_seconds: float = 120.0


def serve(works: Mapping[str, Work]) -> None:
    """Answer jobs from stdin until it closes or nothing came for a while.

    A job is ``{"do": NAME, …}``; its answer is ``{"ok": …}`` or ``{"error": {"kind", "message", "hint"}}``, where
    ``kind`` is a class of ``esper_core.errors``; a refusal also has its ``code``. What the work prints goes to stderr,
    never between the answers.
    Limits come as JSON in the first argument, the scratch directory in the second. Import what is large before, so
    that it does not count as memory used.
    """
    limits = Limits(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _go_on_without_parent()
    os.nice(limits.nice)
    _confine(limits)
    _say(answers, {"ready": os.getpid(), "secluded": seclude()})
    for line in _lines(limits.idle_seconds, Path(sys.argv[2])):
        with _allowance(limits):
            answer = _answer(works, line)
        _say(answers, answer)
        if answer.get("error", {}).get("kind") == "Exhausted":
            return  # after a failed allocation the process is not to be trusted with another job


def _answer(works: Mapping[str, Work], line: bytes) -> Job:
    try:
        job = json.loads(line)
        return {"ok": works[job["do"]](job)}
    except EsperError as error:
        code = error.code if isinstance(error, Refused) else ""
        return {"error": {"kind": type(error).__name__, "message": error.message, "hint": error.hint, "code": code}}
    except MemoryError:
        return {"error": {"kind": "Exhausted", "message": "the job needs more memory than it may use", "hint": ""}}
    except RuntimeError as error:  # torch reports shapes that do not fit and failed allocations this way
        kind = "Exhausted" if "alloc" in str(error) else "InvalidInput"
        return {"error": {"kind": kind, "message": str(error).splitlines()[0][:300], "hint": ""}}


def _confine(limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.open_files, limits.open_files))
    if held := _status("VmSize"):
        ceiling = held + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))


def _status(field: str) -> int:
    """Bytes that ``/proc/self/status`` gives for ``field``; 0 where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        return 0
    return 0


@contextlib.contextmanager
def _allowance(limits: Limits) -> Iterator[None]:
    """CPU and wall clock for one job; the operating system ends the process when either is used up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + limits.cpu_seconds), hard))
    signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds + 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def _go_on_without_parent() -> None:
    """Have the kernel send SIGCONT when the parent dies: a child that it had stopped goes on, and so finds its input closed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, int(signal.SIGCONT), 0, 0, 0)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Appends the highest resident bytes above those at the start to the list it yields.

    Exact on Linux, where the high-water mark can be set back; elsewhere only growth beyond the process's earlier peak
    is seen.
    """
    found: list[int] = []
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        start = _status("VmRSS")
        yield found
        found.append(max(0, _status("VmHWM") - start))
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield found
        found.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    return _status("VmRSS")


def target() -> str:
    """Fingerprint of the machine kind: operating system, architecture and processor."""
    processor = platform.processor()
    with contextlib.suppress(FileNotFoundError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        processor = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), processor)
    return f"{platform.system()}/{platform.machine()}/{processor}".lower()[:120]


def _lines(idle_seconds: float, scratch: Path) -> Iterator[bytes]:
    """Lines of stdin; when that closes the parent is gone for good, and with it whoever would remove ``scratch``."""
    buffer = b""
    while select.select([0], [], [], idle_seconds)[0]:
        piece = os.read(0, 1 << 16)
        if not piece:
            shutil.rmtree(scratch, ignore_errors=True)
            return
        if len(buffer) > MAX_LINE:
            return
        *whole, buffer = (buffer + piece).split(b"\n")
        yield from whole


def _say(answers: IO[str], message: Job) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
