"""Makes running answers and engines follow what the registry decrees, whoever decreed it and through which gateway.

Several times a second the decrees are read. Running answers of a version that was revoked at once are ended here; an
engine that still holds what nobody is served drops it, one that still drops what was restored keeps it, and one that
lost a pin (it restarted) pins it again. New requests do not depend on any of it: each is resolved in the registry
itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import structlog

from adapters.errors import LoraplaneError
from adapters.records import InFlight
from adapters.standings import Decrees, revoked
from serving.engine.request import Failed, Moved
from serving.gateway import Gateway

log = structlog.get_logger(__name__)

# Heartbeats are up to a second old: what was just asked of an engine is not asked again before they tell of it.
_PATIENCE_S = 2.0
_AGAIN_S = 10.0


class Warden:
    """One gateway's. decrees: reads the registry, blocking. every_s: seconds between two readings; drain_s: how long
    running answers of a retired version may take; longest_s: those of a revoked one that may finish. unwanted: what
    nobody is served any more, as it was read last."""

    def __init__(
        self,
        gateway: Gateway,
        decrees: Callable[[], Decrees],
        *,
        every_s: float,
        drain_s: float,
        longest_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway, self._decrees = gateway, decrees
        self._every_s, self._drain_s, self._longest_s = every_s, drain_s, longest_s
        self._monotonic = monotonic
        self.unwanted: frozenset[str] = frozenset()
        self._quiet_until: dict[str, float] = {}
        self._asked: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follow the decrees until cancelled; a registry that cannot be read is asked again."""
        try:
            while True:
                try:
                    await self.follow()
                except LoraplaneError as error:
                    log.warning("decrees_unreadable", error=str(error)[:200])
                except Exception:
                    log.exception("decrees_not_followed")
                await asyncio.sleep(self._every_s)
        finally:
            for task in self._asked:
                task.cancel()

    async def follow(self) -> None:
        """Read the decrees once and do what they ask for. Raises StoreFailed."""
        before = self._gateway.door.heartbeat
        found = await asyncio.to_thread(self._decrees)
        self.unwanted = found.unwanted
        now_gone = {s.digest: revoked(s, s.id) for s in found.revoked if s.in_flight is InFlight.END}
        self._gateway.end(now_gone)
        beat = self._gateway.door.heartbeat
        if beat is None:
            return
        resident = {slot.digest for slot in beat.slots}.union(beat.host_digests)
        finishing = {s.digest for s in found.revoked if s.in_flight is InFlight.FINISH}
        if before is not None:
            # Those that went before the decrees were read: of what is going since, they may not tell yet.
            for digest in [digest for digest in before.dropping if digest not in found.unwanted]:
                self._ask(digest, partial(self.undrop, digest), "undrop")
        for digest in (found.unwanted & resident).difference(beat.dropping):
            deadline_s = 0.0 if digest in now_gone else self._longest_s if digest in finishing else self._drain_s
            self._ask(digest, partial(self.drop, digest, deadline_s))
        pinned = {s.digest for s in found.pinned if s.base_digest == self._gateway.resolver.base.digest}
        for digest in pinned.difference(beat.pinned):
            self._ask(digest, partial(self.pin, digest, True))
        for digest in set(beat.pinned) - pinned:
            self._ask(digest, partial(self.pin, digest, False))

    async def drop(self, digest: str, deadline_s: float) -> Moved | Failed:
        """Have the engine drop an adapter, and leave it alone meanwhile."""
        self._leave_alone(digest, deadline_s + _PATIENCE_S)
        try:
            return await self._gateway.door.drop(digest, deadline_s)
        finally:
            self._leave_alone(digest, _PATIENCE_S)

    async def undrop(self, digest: str) -> Moved | Failed:
        """Have the engine serve again what it was told to drop. Decrees that are being read now may be older."""
        self._leave_alone(digest, _PATIENCE_S)
        return await self._gateway.door.undrop(digest)

    async def pin(self, digest: str, on: bool) -> Moved | Failed:
        """Have the engine pin an adapter or let it go, and leave it alone meanwhile."""
        self._leave_alone(digest, _AGAIN_S)
        told = await self._gateway.door.pin(digest, on)
        # A pin that found no slot is tried again, but not several times a second.
        self._leave_alone(digest, _AGAIN_S if isinstance(told, Failed) else _PATIENCE_S)
        return told

    def _leave_alone(self, digest: str, seconds: float) -> None:
        self._quiet_until[digest] = self._monotonic() + seconds

    def _ask(self, digest: str, work: Callable[[], Coroutine[Any, Any, Moved | Failed]], what: str = "") -> None:
        """what: a wish that the quiet which others keep does not hold up."""
        now, about = self._monotonic(), what + digest
        if now < self._quiet_until.get(about, 0.0):
            return
        self._quiet_until = {d: until for d, until in self._quiet_until.items() if now < until}
        self._quiet_until[about] = now + _PATIENCE_S  # until the task has begun

        async def ask() -> None:
            told = await work()
            if isinstance(told, Failed):
                log.warning("decree_refused", digest=digest, code=told.code)

        task = asyncio.get_running_loop().create_task(ask())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
