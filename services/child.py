"""The outside of a warm child: starts it when there is work, hands it one job at a time, ends it when it misbehaves.

Starting Python with torch costs seconds, so one child does many jobs. It is killed when a job overruns its wall-clock
limit, when its caller is cancelled, or when it answers nonsense; the next job starts a fresh one. Its environment
holds nothing but what it needs to find its modules; credentials of the platform never reach it. See
``services.sandbox`` for the limits inside and for what they do not protect against.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from esper_core import errors
from esper_core.errors import DeadlineExceeded, Exhausted, Internal, Refused
from services.pace import SHARE, Pace
from services.sandbox import MAX_LINE, Job, Limits

_ROOT = str(Path(__file__).resolve().parents[1])
ALLOWED = (
    "PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "HOME", "TMPDIR", "LC_ALL", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""All that a child's environment holds; no value but PYTHONPATH's is the parent's."""
TOO_LATE = (-signal.SIGXCPU, -signal.SIGALRM)
TOO_MUCH = (-signal.SIGKILL, -signal.SIGABRT)  # the system's memory killer, and allocators that give up
_KINDS = {cls.__name__: cls for cls in errors.every()}


class WarmChild:
    """One child process running ``python -m module``; jobs wait their turn.

    Args:
        module: a module that calls ``services.sandbox.serve``.
        limits: what the child may use; what it stands still for politeness is not counted as wall-clock time.
        polite: whether it gives way to others (``services.pace``). Not for one that measures times.
    """

    def __init__(self, module: str, limits: Limits, *, polite: bool = False) -> None:
        self._module = module
        self._limits = limits
        self._pace = Pace() if polite else None
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._scratch: Path | None = None

    @property
    def pid(self) -> int | None:
        """The running child, or ``None``."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def scratch(self) -> Path:
        """A private directory for files exchanged with the child; gone after ``close``."""
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="esper-child-"))
        return self._scratch

    async def ask(self, job: Job) -> Job:
        """The child's answer to ``job``.

            Raises:
        XX
                EsperError: whatever the work raised.
        """
        async with self._turn:
            try:
                answer = await self._exchange(job)
            except BaseException:
                await self._kill()
                raise
        if "error" in answer:
            told = answer["error"]
            if told.get("code"):
                raise Refused(told["message"], hint=told["hint"], code=told["code"])
            raise _KINDS.get(told["kind"], Internal)(told["message"], hint=told["hint"])
        result: Job = answer["ok"]
        return result

    async def warm(self) -> None:
        """Start the child if it does not run, so that the next job need not wait for that.

        Raises:
            DeadlineExceeded, Internal: it does not start.
        """
        async with self._turn:
            try:
                await self._running()
            except BaseException:
                await self._kill()
                raise

    async def close(self) -> None:
        """End the child and remove its scratch directory."""
        await self._kill()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    async def _exchange(self, job: Job) -> Job:
        for _ in range(2):
            process = await self._running()
            answer = await self._converse(process, job)
            if answer is not None:
                return answer
            code = await process.wait()
            if code in TOO_LATE:
                raise DeadlineExceeded(self._obituary(code), hint="it used more time than it may")
            if code in TOO_MUCH:
                raise Exhausted(self._obituary(code), hint="it used more memory than it may, or was killed")
            if code != 0:
                raise Internal(self._obituary(code), hint="a defect in the work itself; see the service's log")
        raise Internal(f"{self._module} ended twice without an answer", hint="see the service's log")

    async def _converse(self, process: asyncio.subprocess.Process, job: Job) -> Job | None:
        """The answer, or ``None`` when the child ended first (it may just have been idle for too long)."""
        assert process.stdin is not None  # noqa: S101 - a pipe was asked for
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return None
        return await self._read(process, self._limits.wall_seconds, "answer")

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        stderr = (self.scratch / "stderr").open("wb")
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                json.dumps(dataclasses.asdict(self._inside())),
                str(self.scratch),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                cwd=self.scratch,
                env=self._environment(),
                limit=MAX_LINE,
                process_group=0,
            )
        finally:
            stderr.close()
        if await self._read(self._process, self._limits.start_seconds, "start") is None:
            code = await self._process.wait()
            raise Internal(self._obituary(code), hint="it could not even start; see the service's log")
        return self._process

    def _inside(self) -> Limits:
        """What the child holds itself to. It cannot tell how long it stood still, so its own clock allows for the slowest pace there is."""
        slowest = SHARE if self._pace is not None else 1.0
        return dataclasses.replace(self._limits, wall_seconds=self._limits.wall_seconds / slowest)

    async def _read(self, process: asyncio.subprocess.Process, seconds: float, what: str) -> Job | None:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            pace = self._pace if what == "answer" else None  # its start cannot be put off for ever
            line = await self._line(process.pid, process.stdout, seconds, pace)
        except TimeoutError:
            raise DeadlineExceeded(f"{self._module} did not {what} within {seconds:g} s and was killed") from None
        except ValueError:
            raise Internal(f"{self._module} answered with more than {MAX_LINE >> 20} MiB") from None
        if not line.endswith(b"\n"):
            return None
        said: Any = json.loads(line)
        if not isinstance(said, dict) or not said.keys() & {"ok", "error", "ready"}:
            raise Internal(f"{self._module} answered nonsense: {line[:80]!r}")
        return said

    async def _line(self, pid: int, source: asyncio.StreamReader, seconds: float, pace: Pace | None) -> bytes:
        """The next line, within ``seconds`` of having a core; raises TimeoutError."""
        if pace is None:
            return await asyncio.wait_for(source.readline(), seconds)
        async with pace.kept(pid):
            reading = asyncio.create_task(source.readline())
            deadline = asyncio.get_running_loop().time() + seconds - pace.lost
            try:
                while not reading.done():
                    left = deadline + pace.lost - asyncio.get_running_loop().time()
                    if left <= 0:
                        raise TimeoutError
                    await asyncio.wait({reading}, timeout=left)
                return reading.result()
            finally:
                reading.cancel()

    def _environment(self) -> dict[str, str]:
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        return {
            "PATH": os.defpath,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys((_ROOT, *map(os.path.abspath, given)))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.scratch),
            "TMPDIR": str(self.scratch),
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def _obituary(self, code: int) -> str:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        last = (self.scratch / "stderr").read_bytes()[-2000:].decode("utf-8", "replace").strip().splitlines()
        return f"{self._module} {how}" + (f": {last[-1][:200]}" if last else "")

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        assert process.stdin is not None  # noqa: S101 - a pipe was asked for
        process.stdin.close()
        await process.wait()
