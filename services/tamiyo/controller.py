"""The strategic controller: a packet in, a decision out, recorded with its orders before anyone hears of it."""

from __future__ import annotations

from esper_core.clock import SYSTEM, Clock
from esper_core.control.packet import AdaptationSignal, SystemStatePacket
from services.tamiyo.candidates import Candidates
from services.tamiyo.decisions import Decisions, digest
from services.tamiyo.policies import Policies


class Controller:
    """Decides with the policy in force on what the library offers."""

    def __init__(self, policies: Policies, candidates: Candidates, decisions: Decisions, clock: Clock = SYSTEM) -> None:
        self._policies = policies
        self._candidates = candidates
        self._decisions = decisions
        self._clock = clock

    async def step(self, packet: SystemStatePacket) -> AdaptationSignal:
        """Decide on a run's epoch, once: the same packet gets the stored decision again.

        Raises:
            Unavailable: the library or the database is away; nothing was decided.
        """
        told = digest(packet)
        stored = await self._decisions.find(packet.run_id, packet.epoch, told)
        return stored or await self._decisions.keep(await self.analyze(packet), told)

    async def analyze(self, packet: SystemStatePacket) -> AdaptationSignal:
        """What would be decided; ``seconds`` covers asking the library and deciding, not the recording.

        Raises:
            Unavailable: the library is away.
        """
        begun = self._clock.monotonic()
        signal = self._policies.force.decide(await self._candidates.fill(packet))
        return signal.model_copy(update={"seconds": self._clock.monotonic() - begun})
