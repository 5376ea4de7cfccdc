"""Whether this gateway lives, and whether it can answer now (contract C6)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from adapters.errors import NotReady
from serving.gateway import Gateway

log = structlog.get_logger(__name__)

_REGISTRY_TIMEOUT_S = 2.0
_REGISTRY_MEMORY_S = 1.0


@dataclass(slots=True)
class Condition:
    """Judges health and readiness from the engine's heartbeat and a registry read.

    probe_registry: reads the registry, blocking; it is asked at most once a second. Times in seconds.
    """

    gateway: Gateway
    probe_registry: Callable[[], object]
    heartbeat_stale_s: float
    ready_idle_s: float
    health_grace_s: float
    monotonic: Callable[[], float] = time.monotonic
    _missing_since: float | None = None
    _registry_read_at: float | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def check_alive(self) -> None:
        """Raises NotReady when the engine has been silent for longer than it could take to come back."""
        now = self.monotonic()
        if self.gateway.door.heartbeat_age_s <= self.heartbeat_stale_s:
            self._missing_since = None
            return
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since > self.health_grace_s:
            raise NotReady("The engine has not answered for too long.", retry_after_s=30.0)

    async def check_ready(self) -> None:
        """Raises NotReady unless a request that came now could be answered."""
        self.gateway.admission.check_open()
        door = self.gateway.door
        beat = door.heartbeat
        if door.facts is None or beat is None or door.heartbeat_age_s > self.heartbeat_stale_s:
            raise NotReady("The engine is not there.")
        if beat.idle_s > self.ready_idle_s:
            raise NotReady("The engine has not produced a token lately.")
        await self._check_registry()

    async def _check_registry(self) -> None:
        async with self._lock:
            now = self.monotonic()
            if self._registry_read_at is not None and now - self._registry_read_at < _REGISTRY_MEMORY_S:
                return
            try:
                async with asyncio.timeout(_REGISTRY_TIMEOUT_S):
                    await asyncio.to_thread(self.probe_registry)
            except Exception as error:
                log.warning("registry_unreadable", error=type(error).__name__)
                raise NotReady("The registry cannot be read.") from error
            self._registry_read_at = now
