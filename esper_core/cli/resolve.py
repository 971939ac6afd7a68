"""From what people type to full names: ``latest``, unambiguous prefixes, slots of a run.

The servers check every name again; here a near miss becomes a hint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from esper_core.errors import InvalidInput, NotFound, nearest
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelRecord
from esper_core.pb.esper.core.v1.run_pb2 import Run
from esper_core.pb.esper.tolaria.v1 import tolaria_pb2
from esper_core.pb.esper.urza.v1 import urza_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform

LATEST = "latest"
_PREFIX_DIGITS = 5
"""Hex digits of a content id that the library asks for at least (``kernel-`` + 5 = 12 characters)."""
_DIGEST = re.compile(r"^[0-9a-f]{1,64}$")


def one(given: str, known: Iterable[str], what: str) -> str:
    """The one of ``known`` that ``given`` is or begins.

    Raises:
        NotFound: none does; the hint names the nearest.
        InvalidInput: several do.
    """
    names = list(dict.fromkeys(known))
    if given in names:
        return given
    close = [name for name in names if name.startswith(given)]
    if len(close) == 1:
        return close[0]
    if close:
        shown = ", ".join(sorted(close)[:6])
        raise InvalidInput(f"{what} {given!r} is ambiguous", hint=f"type more of it: {shown}")
    raise NotFound(f"no {what} {given!r}", hint=nearest(given, names[:50]))


def content_id(kind: str, given: str) -> str:
    """``kernel-3f0c1…`` for what may have been typed without its kind.

    Raises:
        InvalidInput: too short to be looked up.
    """
    digest = given.removeprefix(f"{kind}-")
    if not _DIGEST.match(digest):
        raise InvalidInput(
            f"{given!r} is no {kind} id", hint=f"see `esperctl {kind} list`; ids look like {kind}-3f0c1…"
        )
    if len(digest) < _PREFIX_DIGITS:
        raise InvalidInput(f"{given!r} is too short for an id", hint=f"type at least {_PREFIX_DIGITS} hex digits")
    return f"{kind}-{digest}"


async def run_of(platform: Platform, given: str) -> Run:
    """The run of that name or prefix, or the latest.

    Raises:
        NotFound, InvalidInput: as ``one``.
    """
    try:
        answer: tolaria_pb2.GetRunResponse = await platform.tolaria.GetRun(tolaria_pb2.GetRunRequest(run_id=given))
        return answer.run
    except NotFound:
        if given == LATEST:
            raise NotFound("no run is known yet", hint="start one: `esperctl train PRESET`") from None
    page: tolaria_pb2.ListRunsResponse = await platform.tolaria.ListRuns(tolaria_pb2.ListRunsRequest(page_size=1000))
    by_name = {run.run_id: run for run in page.runs}
    return by_name[one(given, by_name, "run")]


def slot_of(run: Run, given: str | None) -> str:
    """The slot of ``run`` that ``given`` is or begins; without ``given``, its only slot.

    Raises:
        NotFound, InvalidInput: as ``one``, or the run has several slots and none was named.
    """
    names = [slot.slot for slot in run.slots]
    if given is not None:
        return one(given, names, f"slot of run {run.run_id}")
    if len(names) == 1:
        return names[0]
    if not names:
        raise NotFound(f"run {run.run_id} has no slots", hint="it was started with --baseline, or nothing could grow")
    raise InvalidInput(f"run {run.run_id} has {len(names)} slots", hint=f"name one: {', '.join(names[:12])}")


def split_seed_id(given: str) -> tuple[str, str, int] | None:
    """Run, slot and generation of a seed id ``<run>/<slot>/<generation>``; nothing when it is a slot's name."""
    parts = given.split("/")
    if len(parts) != 3 or not parts[2].isdecimal():
        return None
    return parts[0], parts[1], int(parts[2])


async def kernel_of(platform: Platform, given: str) -> KernelRecord:
    """The kernel of that id or prefix.

    Raises:
        InvalidInput: no id, or ambiguous.
        NotFound: none has it.
    """
    request = urza_pb2.GetKernelRequest(kernel_id=content_id("kernel", given))
    answer: urza_pb2.GetKernelResponse = await platform.urza.GetKernel(request)
    return answer.kernel
