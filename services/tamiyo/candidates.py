"""Which kernels could go into a slot: asked of the library per interface, and remembered until a verdict changes it.

A remembered answer may be ``TTL`` seconds old when the news of a verdict was lost; the run verifies every kernel
anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from esper_core.clock import SYSTEM, Clock
from esper_core.control.packet import KernelCandidate, SystemStatePacket
from esper_core.lifecycle import State

TTL = 15.0
"""Seconds an answer is remembered."""
KEPT = 4096
"""Interfaces remembered at most."""

Ask = Callable[[str], Awaitable[tuple[KernelCandidate, ...]]]
"""All validated kernels for an interface id; raises ``Unavailable``."""


class Candidates:
    """A cache in front of the library."""

    def __init__(self, ask: Ask, clock: Clock = SYSTEM) -> None:
        self._ask = ask
        self._clock = clock
        self._known: dict[str, tuple[float, tuple[KernelCandidate, ...]]] = {}
        self._verdicts = 0

    def forget(self, interface_id: str) -> None:
        """Ask again next time; an empty id forgets everything."""
        self._verdicts += 1
        if interface_id:
            self._known.pop(interface_id, None)
        else:
            self._known.clear()

    async def fill(self, packet: SystemStatePacket) -> SystemStatePacket:
        """The packet with kernels offered to every dormant slot that brought none of its own.

        Raises:
            Unavailable: the library is away.
        """
        wanting = {
            slot.slot: slot.interface.id for slot in packet.slots if slot.state is State.DORMANT and not slot.candidates
        }
        offers = await self._of(set(wanting.values()))
        slots = tuple(
            slot.model_copy(update={"candidates": offers[wanting[slot.slot]]}) if slot.slot in wanting else slot
            for slot in packet.slots
        )
        return packet.model_copy(update={"slots": slots})

    async def _of(self, interface_ids: Iterable[str]) -> dict[str, tuple[KernelCandidate, ...]]:
        ids = sorted(interface_ids)
        return dict(zip(ids, await asyncio.gather(*map(self._one, ids)), strict=True))

    async def _one(self, interface_id: str) -> tuple[KernelCandidate, ...]:
        asked, found = self._known.get(interface_id, (float("-inf"), ()))
        if self._clock.monotonic() - asked < TTL:
            return found
        now, verdicts = self._clock.monotonic(), self._verdicts
        found = await self._ask(interface_id)
        if verdicts == self._verdicts:  # else a verdict fell while we asked, and the answer may be older than it
            while len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[interface_id] = (now, found)
        return found
