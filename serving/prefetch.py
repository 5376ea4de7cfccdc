"""Prefetch: the versions most asked for in the last minutes that lie nowhere are warmed while there is room for them.

It only fills what is empty, slots and host bytes, and evicts nothing; what it brought makes room like all else.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

from serving.answers import Ended
from serving.engine.demand import Demand
from serving.engine.request import Failed, Heartbeat, Moved

LEAST = 2.0  # requests, those of two minutes ago counting half: one alone says nothing of the next
MOST_AT_ONCE = 2
_PERIOD_S = 2.0
_TTL_S = 30.0
_PATIENCE_S = 30.0
_AGAIN_S = 60.0  # after a failure
_KEPT = 4096

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine holds by digest, and what is empty there."""

    device: frozenset[str]
    host: frozenset[str]
    empty_slots: int
    free_bytes: int
    barred: frozenset[str] = frozenset()


def room_of(beat: Heartbeat) -> Room:
    """The room that a heartbeat tells of. What is set aside or being dropped is not brought back."""
    return Room(
        device=frozenset(slot.digest for slot in beat.slots),
        host=frozenset(beat.host_digests),
        empty_slots=max(0, beat.slots_total - len(beat.slots)),
        free_bytes=max(0, beat.host_bytes_limit - beat.host_bytes),
        barred=frozenset(beat.quarantined) | frozenset(beat.dropping),
    )


def choose(demand: Mapping[str, float], sizes: Mapping[str, int], room: Room, most: int = MOST_AT_ONCE) -> list[str]:
    """The digests to warm now, the most asked for first.

    demand: requests by digest, old ones counting less; sizes: bytes by digest. One that lies on the host needs an empty
    slot, one that lies nowhere needs the bytes, and takes a slot if one is left. Nothing of unknown size is chosen.
    """
    chosen: list[str] = []
    slots, free = room.empty_slots, room.free_bytes
    for digest in sorted(demand, key=lambda d: (-demand[d], d)):
        if demand[digest] < LEAST or len(chosen) == most:
            break
        if digest in room.device or digest in room.barred:
            continue
        need = 0 if digest in room.host else sizes.get(digest)
        if need is None or need > free or (digest in room.host and not slots):
            continue
        free -= need
        slots = max(0, slots - 1)
        chosen.append(digest)
    return chosen


class Warmer(Protocol):
    """What is asked of engines: their condition, and to have an adapter ready."""

    @property
    def heartbeat(self) -> Heartbeat | None: ...
    async def warm(self, digest: str, ttl_s: float) -> Moved | Failed: ...


class Prefetch:
    """Watches what is asked for (serving.answers.Observer) and warms through one door. size_of: bytes by digest;
    unwanted: what no version in service consists of any more, however much it was asked for."""

    def __init__(
        self,
        door: Warmer,
        size_of: Callable[[str], int | None],
        now: Callable[[], float] = time.monotonic,
        unwanted: Callable[[], Container[str]] = tuple,
    ) -> None:
        self._door, self._size_of, self._now, self._unwanted = door, size_of, now, unwanted
        self._demand = Demand(now)
        self._seen: OrderedDict[str, float] = OrderedDict()  # digest -> not before
        self.warmed = 0

    def tokens_came(self, gap_s: float) -> None:
        """Nothing is counted by the token."""

    def ended(self, record: Ended) -> None:
        """A request is over: its version is asked for."""
        digest = record.weights.digest
        if digest is not None:
            self._demand.note(digest)
            self._seen.setdefault(digest, 0.0)
            self._seen.move_to_end(digest)
            if len(self._seen) > _KEPT:
                self._seen.popitem(last=False)

    def wanted(self, room: Room) -> list[str]:
        """What to warm now."""
        now = self._now()
        unwanted = self._unwanted()
        seen = [d for d, not_before in self._seen.items() if not_before <= now and d not in unwanted]
        demand = {digest: self._demand.of(digest) for digest in seen}
        sizes = {digest: size for digest in demand if (size := self._size_of(digest)) is not None}
        return choose(demand, sizes, room)

    async def tick(self) -> None:
        """Warm what should be, one after the other. What fails is left alone for a minute."""
        beat = self._door.heartbeat
        for digest in self.wanted(room_of(beat)) if beat is not None else ():
            if digest in self._unwanted():  # since: the one before may have taken a while
                continue
            try:
                told = await asyncio.wait_for(self._door.warm(digest, _TTL_S), _PATIENCE_S)
            except TimeoutError:
                told = Failed(0, "deadline_exceeded", "It was not loaded in time.")
            if isinstance(told, Failed):
                self._seen[digest] = self._now() + _AGAIN_S
                log.debug("prefetch_failed", digest=digest, code=told.code)
            else:
                self.warmed += 1

    async def run(self) -> None:
        """Tick every other second until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            await self.tick()
