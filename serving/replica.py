"""One engine replica as the router knows it: where it listens, its link, and the book that is kept on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serving.door import EngineDoor
from serving.engine.request import Event, Heartbeat, Sampling
from serving.link import Address, EngineLink
from serving.routing import Ledger

# An engine that computes nothing for so long hangs: one without work proves itself every few seconds.
_HUNG_S = 15.0


class Replica(EngineDoor, Protocol):
    """One replica's link: EngineDoor, whose streams can be closed, and a life of its own."""

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None,
        choice: int,
        deadline_s: float,
        tenant: str,
        *,
        shadow: bool = False,
    ) -> AsyncGenerator[Event, None]: ...
    async def run(self) -> None: ...
    def fail_running(self, code: str, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as /metrics shows it. sent: sequences sent there so far."""

    name: str
    connected: bool
    leaving: bool
    heartbeat: Heartbeat | None
    heartbeat_age_s: float
    load: float
    sent: int


@dataclass(slots=True, eq=False)
class Member:
    """A replica that the directory named. leaving: it is named no more, and only finishes what it has."""

    address: Address
    link: Replica
    ledger: Ledger = field(default_factory=Ledger)
    task: asyncio.Task[None] | None = None
    leaving: bool = False
    greeted: bool = False
    sent: int = 0

    @property
    def hung(self) -> bool:
        """Whether its engine computes nothing, though it is heard of."""
        return self.ledger.beat is not None and self.ledger.beat.idle_s > _HUNG_S

    def look(self) -> bool:
        """Take in the last heartbeat; whether the replica is connected."""
        beat = self.link.heartbeat
        if beat is not None and beat is not self.ledger.beat:
            self.ledger.heard(beat)
        return self.link.facts is not None


def link_to(address: Address) -> EngineLink:
    """The link of the replica that listens there; `run` it."""

    async def locate() -> Address:
        return address

    return EngineLink(locate)
