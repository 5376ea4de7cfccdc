"""What changes which weights are served while they are served: promotions, rollbacks, withdrawals, what is kept ready.

A promotion has the new version warm on every engine before the alias moves, in one compare-and-set; requests that run
finish on what they began with, and the version before stays warm for a while, so that a rollback costs nobody a load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from adapters.alias_moves import ANY, Expected
from adapters.canaries import CanaryLimits, Split, Sticky
from adapters.errors import (
    AdapterLoadFailed,
    AdapterQuarantined,
    InvalidRequest,
    LoraplaneError,
    Overloaded,
    SlotsPinned,
    Unavailable,
    WarmFailed,
)
from adapters.records import CHAMPION, AdapterVersion, InFlight, ModelId, Move, Residency, Standing, Withdrawal
from adapters.registry import Registry
from adapters.standings import revoked
from serving.engine.request import Failed, Moved
from serving.failures import engine_error
from serving.gateway import Gateway
from serving.warden import Warden

log = structlog.get_logger(__name__)

_LAST_WORDS_S = 5.0  # what an engine may need beyond a drop's deadline
# What flips keep warm may take so much of the host's budget: beyond it a version is loaded, but not held. Else flips in
# quick succession would fill the host with versions that nobody asks for, and the next one could not be warmed at all.
_SHARE_OF_HOST = 0.25
_BARELY_S = 1.0
_OTHERWISE = 'Promote again, or move the alias without it: --no-warm, "warm": false.'
_SICK = "Ask again after a while, or publish a mended version: an alias that moved to it now would answer nobody."
_LATER = "Begin the canary again later."


@dataclass(frozen=True, slots=True)
class FlipLimits:
    """Times in seconds. warm_deadline_s: how long a promotion waits for the new version to be warm; warm_ttl_s: how
    long it, and the one before it, then stay so; longest_s: of any request."""

    warm_deadline_s: float = 60.0
    warm_ttl_s: float = 600.0
    longest_s: float = 600.0


class Flips:
    """The use cases on one gateway and its registry. Every method raises StoreFailed when the registry does."""

    def __init__(
        self,
        gateway: Gateway,
        registry: Registry,
        warden: Warden,
        limits: FlipLimits,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway, self._registry, self._warden, self._limits = gateway, registry, warden, limits
        self._monotonic = monotonic
        self._aside: set[asyncio.Task[None]] = set()
        self._held: dict[str, tuple[float, int]] = {}  # by digest: until when flips hold it, and its bytes

    async def promote(
        self,
        name: str,
        number: int,
        *,
        who: str,
        reason: str = "",
        force: bool = False,
        expected: Expected = ANY,
        warm: bool = True,
    ) -> Move:
        """Warm a version, then make it champion if nobody has moved the alias meanwhile, away and back either.

        Raises WarmFailed, with nothing moved, and what `Registry.promote` raises. A version made for another base than
        the one served here moves without being warmed, and so does every one with warm False.
        """
        if force and not reason.strip():
            raise InvalidRequest("overruling the gate needs a reason, which is recorded", "reason")
        found = await asyncio.to_thread(
            self._registry.may_promote, name, number, force=force, expected_version=expected
        )
        version, before = found.version, found.champion
        if warm and (before is None or before.number != number) and self._served(version):
            await self._make_ready(version, _OTHERWISE)
        move = await asyncio.to_thread(
            self._registry.promote,
            name,
            number,
            who=who,
            reason=reason,
            force=force,
            expected_version=None if before is None else before.number,
            expected_generation=found.generation,
        )
        if before is not None and before.number != number:
            self._keep_warm(before)
        return move

    async def set_canary(
        self,
        name: str,
        number: int,
        percent: float,
        *,
        who: str,
        alias: str = CHAMPION,
        sticky: Sticky = Sticky.USER,
        limits: CanaryLimits | None = None,
        reason: str = "",
        expected: Expected = ANY,
    ) -> Split:
        """Warm a version, then let it answer some of an alias's requests. What is the canary already is not waited for.

        Raises WarmFailed, with nothing begun, and what `Canaries.set_canary` raises.
        """
        canaries = self._registry.canaries
        version, now, begun = await asyncio.to_thread(
            canaries.may_set_canary, name, number, alias=alias, expected_version=expected
        )
        if not begun and self._served(version):
            await self._make_ready(version, _LATER)
        return await asyncio.to_thread(
            canaries.set_canary,
            name,
            number,
            percent,
            who=who,
            alias=alias,
            sticky=sticky,
            limits=limits,
            reason=reason,
            expected_version=expected,
            expected_generation=now.generation,
        )

    async def rollback(self, name: str, *, who: str, reason: str = "", to: int | None = None) -> Move:
        """Move the champion back at once; both versions are then warm for a while. Raises as `Registry.rollback`."""
        move = await asyncio.to_thread(self._registry.rollback, name, who=who, reason=reason, to=to)
        for number in {move.to_number, move.from_number or move.to_number}:
            self._keep_warm(await asyncio.to_thread(self._registry.version, name, number))
        return move

    async def retire(self, name: str, number: int, *, who: str, reason: str, deadline_s: float) -> Withdrawal:
        """Hide a version, let what runs finish within deadline_s, end the rest, and free its bytes.

        Raises Conflict while an alias points at it, ModelNotFound.
        """
        standing = await asyncio.to_thread(self._registry.standings.retire, name, number, who=who, reason=reason)
        return Withdrawal(standing, await self._freed(standing, deadline_s))

    async def revoke(self, name: str, number: int, *, who: str, reason: str, in_flight: InFlight) -> Withdrawal:
        """Refuse what a version consists of from now on; what runs is ended, or finishes without being waited for.

        Raises InvalidRequest without a reason, ModelNotFound.
        """
        standing = await asyncio.to_thread(
            self._registry.standings.revoke, name, number, who=who, reason=reason, in_flight=in_flight
        )
        if in_flight is InFlight.END:
            self._gateway.end({standing.digest: revoked(standing, standing.id)})
            return Withdrawal(standing, await self._freed(standing, 0.0))
        self._in_background(self._free_later(standing))
        return Withdrawal(standing, None)

    async def restore(self, name: str, number: int, *, who: str, reason: str) -> Standing:
        """Bring a version back into service, at once: a drop that still waits for running answers is called off.

        Raises InvalidRequest without a reason, ModelNotFound.
        """
        standings = self._registry.standings
        standing = await asyncio.to_thread(standings.restore, name, number, who=who, reason=reason)
        if standing.digest not in (await asyncio.to_thread(standings.decrees)).unwanted:
            try:
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._warden.undrop(standing.digest)
            except (TimeoutError, LoraplaneError) as error:  # the warden sees to it as soon as an engine answers
                log.warning("not_served_yet", version=standing.id, error=type(error).__name__)
        return standing

    async def warm(self, name: str, number: int, ttl_s: float) -> Residency:
        """Have a version ready for ttl_s seconds. Raises the load's refusal, ModelNotFound, VersionWithdrawn."""
        version = await asyncio.to_thread(self._in_service, name, number)
        return _residency(version.id, await self._warmed(version, ttl_s))

    async def pin(self, name: str, number: int, on: bool, *, who: str) -> Residency:
        """Keep a version in a slot of every engine, also of one that restarts; or no longer.

        Raises AdapterCapacity when no slot can be had, ModelNotFound, VersionWithdrawn.
        """
        standings = self._registry.standings
        if on:
            version = await asyncio.to_thread(self._in_service, name, number)
            self._gateway.resolver.remember(version)
            found = _residency(version.id, await self._warden.pin(version.digest, True))
            await asyncio.to_thread(standings.pin, name, number, True, who=who)
            return found
        standing = await asyncio.to_thread(standings.pin, name, number, False, who=who)
        return _residency(standing.id, await self._warden.pin(standing.digest, False))

    async def _make_ready(self, version: AdapterVersion, otherwise: str) -> None:
        """otherwise: what can be done where it fails. Raises WarmFailed unless it is warm within the deadline."""
        try:
            # An alias that moved to what its first request finds wanting would answer nobody.
            await self._warmed(version, self._hold(version) or _BARELY_S, prove=True)
        except SlotsPinned as error:
            # Neither time helps, nor leaving out the warming: all requests for it would be refused.
            raise WarmFailed(version.id, str(error)) from error
        except (Overloaded, Unavailable) as error:
            advice = _SICK if isinstance(error, AdapterQuarantined) else otherwise
            raise WarmFailed(version.id, f"{error} {advice}", error.retry_after_s) from error
        beat = self._gateway.door.heartbeat
        if beat is not None and version.digest in beat.quarantined:
            # It lies there, and would answer nobody.
            why = f"The engine has it set aside; see GET /v1/adapters/residency. {_SICK}"
            raise WarmFailed(version.id, why, 30.0)

    async def _warmed(self, version: AdapterVersion, ttl_s: float, *, prove: bool = False) -> Moved:
        limit = self._limits.warm_deadline_s
        self._gateway.resolver.remember(version)
        try:
            async with asyncio.timeout(limit):
                told = await self._gateway.door.warm(version.digest, ttl_s, prove=prove)
        except TimeoutError:
            raise AdapterLoadFailed(f"{version.id} was not loaded within {limit:g} s.", retry_after_s=10.0) from None
        return _moved(told, version.id)

    async def _freed(self, standing: Standing, deadline_s: float) -> Residency | None:
        """What dropping a version freed; None while no engine can say, or while another name serves the same."""
        decrees = await asyncio.to_thread(self._registry.standings.decrees)
        if standing.digest not in decrees.unwanted:
            return None
        self._held.pop(standing.digest, None)
        try:
            async with asyncio.timeout(deadline_s + _LAST_WORDS_S):
                return _residency(standing.id, await self._warden.drop(standing.digest, deadline_s))
        except (TimeoutError, LoraplaneError) as error:
            # What was decreed stands: the warden has the bytes go as soon as an engine answers.
            log.warning("not_freed_yet", version=standing.id, error=type(error).__name__)
            return None

    async def _free_later(self, standing: Standing) -> None:
        await self._freed(standing, self._limits.longest_s)

    async def _keep(self, version: AdapterVersion, ttl_s: float) -> None:
        try:
            await self._warmed(version, ttl_s)
        except LoraplaneError as error:
            log.warning("not_kept_warm", version=version.id, error=str(error)[:200])

    def _keep_warm(self, version: AdapterVersion) -> None:
        if self._served(version) and (ttl_s := self._hold(version)):
            self._in_background(self._keep(version, ttl_s))

    def _hold(self, version: AdapterVersion) -> float:
        """For how long a flip may hold a version on the host; 0 where flips hold their share of it already."""
        now, beat = self._monotonic(), self._gateway.door.heartbeat
        self._held = {d: held for d, held in self._held.items() if now < held[0] and d != version.digest}
        held = sum(size for _, size in self._held.values()) + version.size_bytes
        if beat is not None and held > beat.host_bytes_limit * _SHARE_OF_HOST:
            return 0.0
        self._held[version.digest] = (now + self._limits.warm_ttl_s, version.size_bytes)
        return self._limits.warm_ttl_s

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._aside.add(task)  # a task that nobody refers to is collected
        task.add_done_callback(self._aside.discard)

    def _in_service(self, name: str, number: int) -> AdapterVersion:
        return self._gateway.resolver.version(str(ModelId(name, number)))

    def _served(self, version: AdapterVersion) -> bool:
        return version.base_digest == self._gateway.resolver.base.digest


def _moved(told: Moved | Failed, model: str) -> Moved:
    """Where the adapter went. Raises the typed error of a refusal."""
    if isinstance(told, Failed):
        raise engine_error(told, model)
    return told


def _residency(model: str, told: Moved | Failed) -> Residency:
    moved = _moved(told, model)
    return Residency(model, moved.digest, moved.tier, moved.bytes)
