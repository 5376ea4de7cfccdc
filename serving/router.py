"""Several engine replicas behind the one door that a gateway knows: each sequence goes to the replica that suits it.

`serving/routing.py` decides. Here are the connections: one link a replica, made when the directory names it and ended
when it is gone. A replica that dies takes its own sequences along, and nobody else's; a sequence that a replica refused
before it began (its queue is full, it stops) is offered to the others. What a dead replica may have begun is not sent
again by itself: what killed one could kill the next.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import structlog

from adapters.errors import AdapterCapacity, DeadlineExceeded, EngineLost, NotReady, QueueFull
from serving.engine.request import EngineFacts, Event, Failed, Heartbeat, Moved, Sampling
from serving.link import Address
from serving.replica import Member, Replica, ReplicaView, link_to
from serving.routing import Candidate, Heat, PrefixMemory, choose
from serving.summing import last_words, together

_LOOK_S = 0.5
_LOOK_SOON_S = 0.1  # while there is none at all
# Heartbeats come twice a second: a replica that misses so many is not asked while others answer.
_LOOK_S = 0.25  # between two looks at a replica that was asked and has not answered
_SILENT_S = 3.0
_LET_GO_S = 60.0  # for so long replicas that come back are told what was unpinned without them
_COPY_TTL_S = 60.0
_COPY_REST_S = 2.0
_ELSEWHERE = frozenset({QueueFull.code, AdapterCapacity.code, NotReady.code})
_ABSENT = frozenset({EngineLost.code, NotReady.code})
_NO_REPLICA = Failed(0, NotReady.code, "No engine is ready; it is starting or restarting.", retry_after_s=2.0)
_log = structlog.get_logger()

Directory = Callable[[], Awaitable[Sequence[Address]]]
_Asking = Callable[[Replica], Awaitable[Moved | Failed]]


class Router:
    """`EngineDoor` over the replicas that `directory` names.

    connect: makes a replica's link from its address; `run` gives it a task. now: seconds on a steady clock.
    """

    def __init__(
        self,
        directory: Directory,
        connect: Callable[[Address], Replica] = link_to,
        *,
        rng: random.Random | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._connect = directory, connect
        self._rng, self._now = rng or random.Random(), now
        self._members: dict[str, Member] = {}
        self._prefixes, self._heat = PrefixMemory(), Heat()
        self._departed: Heartbeat | None = None
        self._stopping = False
        # What was asked of all replicas holds for those that come later: until when (seconds), and by digest.
        self._warm: dict[str, float] = {}
        self._pinned: set[str] = set()
        self._let_go: dict[str, float] = {}
        self._copying: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._greeting: set[asyncio.Task[None]] = set()

    # -- as EngineDoor --------------------------------------------------------------------------------------------

    @property
    def facts(self) -> EngineFacts | None:
        """See EngineDoor: those of the replica that is connected longest; all are made of one configuration."""
        return next((m.link.facts for m in self._connected()), None)

    @property
    def heartbeat(self) -> Heartbeat | None:
        """See EngineDoor: all replicas together."""
        connected = self._connected()
        fresh = self._fresh(connected)
        gone = [m.ledger.beat for m in self._members.values() if m not in fresh and m.ledger.beat is not None]
        if self._departed is not None:
            gone.append(self._departed)
        beats = [m.ledger.beat for m in fresh if m.ledger.beat is not None]
        return beats[0] if len(beats) == 1 and not gone else together(beats, gone)

    @property
    def heartbeat_age_s(self) -> float:
        """See EngineDoor: the youngest counts, for one replica is enough to answer."""
        return min((m.link.heartbeat_age_s for m in self._connected()), default=float("inf"))

    async def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None,
        choice: int,
        deadline_s: float,
        tenant: str,
        *,
        shadow: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """See EngineDoor."""
        marks = self._prefixes.marks(tenant, adapter, prompt)
        prompts = marks[0][1], hash((tenant, tuple(prompt)))
        refused: set[str] = set()
        answer = _NO_REPLICA
        while (member := self._pick(adapter, marks, prompts[1], refused)) is not None:
            member.ledger.sent(adapter, prompts)
            member.sent += 1
            self._prefixes.remember(marks, member.address.replica)
            begun = False
            try:
                async with aclosing(
                    member.link.submit(prompt, sampling, adapter, choice, deadline_s, tenant, shadow=shadow)
                ) as events:
                    async for event in events:
                        if not begun and not self._stopping and isinstance(event, Failed) and _refused(event):
                            answer = event
                            break
                        begun = True
                        yield event
            finally:
                member.ledger.ended(adapter, prompts)
            if begun:
                return
            refused.add(member.address.replica)
        yield answer

    async def warm(self, digest: str, ttl_s: float, *, prove: bool = False) -> Moved | Failed:
        """See EngineDoor: on every replica, and on those that come within ttl_s seconds."""
        answer = await self._ask_all(lambda link: link.warm(digest, ttl_s, prove=prove))
        if isinstance(answer, Moved):
            until = self._cool() + ttl_s
            self._warm[digest] = max(until, self._warm.get(digest, until))
        return answer

    async def warm_one(self, digest: str, ttl_s: float) -> Moved | Failed:
        """Have an adapter on the one replica that would be asked for it next, and on no other."""
        member = self._pick(digest, self._prefixes.marks("", digest, ()), 0, set())
        return await member.link.warm(digest, ttl_s) if member is not None else _NO_REPLICA

    async def pin(self, digest: str, on: bool) -> Moved | Failed:
        """See EngineDoor: on every replica, and on those that come later."""
        held = digest in self._pinned
        if on:
            self._pinned.add(digest)
            self._let_go.pop(digest, None)
        else:
            self._pinned.discard(digest)
            self._let_go[digest] = self._now() + _LET_GO_S
        answer = await self._ask_all(lambda link: link.pin(digest, on))
        if on and not held and isinstance(answer, Failed):
            # One replica's slots are full, for instance: no half of a pin stays behind.
            self._pinned.discard(digest)
            await self._ask_all(lambda link: link.pin(digest, False))
        return answer

    async def drop(self, digest: str, deadline_s: float) -> Moved | Failed:
        """See EngineDoor: on every replica, side by side."""
        self._warm.pop(digest, None)
        self._pinned.discard(digest)
        return await self._ask_all(lambda link: link.drop(digest, deadline_s), also_leaving=True)

    async def undrop(self, digest: str) -> Moved | Failed:
        """See EngineDoor: on every replica."""
        return await self._ask_all(lambda link: link.undrop(digest), also_leaving=True)

    # -- its own --------------------------------------------------------------------------------------------------

    def fail_running(self, code: str, message: str) -> None:
        """End every running sequence of every replica with this failure; none is offered to another any more."""
        self._stopping = True
        for member in self._members.values():
            member.link.fail_running(code, message)

    def views(self) -> tuple[ReplicaView, ...]:
        """Every replica that is known, for metrics."""
        return tuple(
            ReplicaView(
                name=m.address.replica,
                connected=m.look(),
                leaving=m.leaving,
                heartbeat=m.link.heartbeat,
                heartbeat_age_s=m.link.heartbeat_age_s,
                load=m.ledger.load,
                sent=m.sent,
            )
            for m in self._members.values()
        )

    async def run(self) -> None:
        """Keep a link to every replica that the directory names, and hot adapters on enough of them.

        Ends when cancelled, and its links with it.
        """
        try:
            while True:
                try:
                    self._follow(await self._named())
                    self.tend()
                except Exception:  # a loop that ended would leave new replicas unseen for ever
                    _log.exception("replicas_not_followed")
                await asyncio.sleep(_LOOK_S if self._connected() else _LOOK_SOON_S)
        finally:
            tasks = [m.task for m in self._members.values() if m.task is not None]
            tasks += [*self._copying.values(), *self._greeting]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _named(self) -> Sequence[Address]:
        try:
            return await self._directory()
        except ConnectionError as error:  # nobody to ask: who was named stays so
            _log.debug("directory_not_reachable", error=str(error))
            return [member.address for member in self._members.values() if not member.leaving]

    def tend(self) -> None:
        """Greet newcomers, forget the gone, and copy what is too hot. `run` calls it twice a second."""
        fresh = self._fresh(self._connected())
        for name, member in list(self._members.items()):
            if member not in fresh:
                member.greeted = False  # it was not asked what the others were asked meanwhile
            elif not member.greeted:
                member.greeted = True
                self._aside(self._greet(member))
            if not member.look():
                member.ledger.lost()
                if member.leaving:
                    self._forget(name, member)
        self._let_go = {digest: until for digest, until in self._let_go.items() if until > self._now()}
        for member in fresh:
            pinned = member.ledger.beat.pinned if member.ledger.beat is not None else ()
            for digest in [digest for digest in pinned if digest in self._let_go]:
                self._aside(self._unpin(member, digest))
        members = {m.address.replica: m.ledger for m in fresh if not m.leaving}
        demand: dict[str, int] = {}
        for ledger in members.values():
            for digest, count in ledger.demand().items():
                demand[digest] = demand.get(digest, 0) + count
        self._heat.note(demand, self._now())
        for digest, name in self._heat.copies(members, self._copying):
            _log.info("hot_adapter_copied", digest=digest[:12], replica=name)
            copy = self._copy(digest, self._members[name])
            self._copying[digest, name] = asyncio.get_running_loop().create_task(copy)

    def _connected(self) -> list[Member]:
        return [m for m in self._members.values() if m.look()]

    def _fresh(self, members: Sequence[Member]) -> list[Member]:
        """Those that are heard of and compute, or all when none does: then whoever judges health decides."""
        return [m for m in members if m.link.heartbeat_age_s <= _SILENT_S and not m.hung] or list(members)

    def _pick(
        self, adapter: str | None, marks: Sequence[tuple[int, int]], beside: int, refused: set[str]
    ) -> Member | None:
        open_to = [m for m in self._connected() if m.address.replica not in refused]
        members = self._fresh([m for m in open_to if not m.leaving] or open_to)
        if not members:
            return None
        candidates = [
            Candidate(
                name=m.address.replica,
                residency=m.ledger.residency(adapter),
                load=m.ledger.load,
                # The same prompt under another adapter (a shadow, a comparison) is best read in one batch with it.
                overlap=1.0 if m.ledger.running(beside) else self._prefixes.overlap(marks, m.address.replica),
                together=m.ledger.running(marks[0][1]),
                adapters=m.ledger.adapters,
            )
            for m in members
        ]
        return self._members[choose(candidates, self._rng).name]

    def _follow(self, addresses: Sequence[Address]) -> None:
        """Link to newcomers; who is named no more gets no new sequences, and goes when its connection does."""
        named = {address.replica: address for address in addresses}
        for name, member in self._members.items():
            if name not in named and not member.leaving:
                _log.info("replica_leaves", replica=name, running=member.ledger.ours)
            member.leaving = name not in named
        for name, address in named.items():
            if name not in self._members:
                member = self._members[name] = Member(address, self._connect(address))
                member.task = asyncio.get_running_loop().create_task(member.link.run())

    def _forget(self, name: str, member: Member) -> None:
        del self._members[name]
        if member.task is not None:
            member.task.cancel()
        if member.ledger.beat is not None:
            self._departed = last_words(b for b in (self._departed, member.ledger.beat) if b is not None)

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _unpin(self, member: Member, digest: str) -> None:
        """Tell a replica that was not there when the others were told. Nobody sees it in the sum of the heartbeats."""
        await member.link.pin(digest, False)

    async def _greet(self, member: Member) -> None:
        """Ask of a newcomer what was asked of the others."""
        now = self._cool()
        asked = [member.link.warm(digest, until - now) for digest, until in self._warm.items()]
        asked += [member.link.pin(digest, True) for digest in self._pinned]
        for answer in await asyncio.gather(*asked):
            if isinstance(answer, Failed):
                _log.warning("replica_not_warmed", replica=member.address.replica, code=answer.code)

    async def _copy(self, digest: str, member: Member) -> None:
        name = member.address.replica
        answer = await member.link.warm(digest, _COPY_TTL_S)
        if isinstance(answer, Failed):
            _log.warning("hot_adapter_not_copied", digest=digest[:12], replica=name, code=answer.code)
        # The heartbeat tells of it by then; a copy that failed is tried again while the adapter is hot.
        await asyncio.sleep(_COPY_REST_S)
        del self._copying[digest, name]

    def _cool(self) -> float:
        """Forget what need not be warm any more; the time now."""
        now = self._now()
        self._warm = {digest: until for digest, until in self._warm.items() if until > now}
        return now

    async def _ask_all(self, ask: _Asking, *, also_leaving: bool = False) -> Moved | Failed:
        """One answer for all replicas that answer: a refusal if one refused. Those that died meanwhile hold nothing;
        one that hangs is not waited for, and greeted anew when it comes back."""
        members = [m for m in self._fresh(self._connected()) if also_leaving or not m.leaving]
        answers = await asyncio.gather(*(self._unless_it_hangs(m, ask) for m in members))
        failed = [a for a in answers if isinstance(a, Failed)]
        moved = [a for a in answers if isinstance(a, Moved)]
        refused = next((a for a in failed if a.code not in _ABSENT), None)
        if refused is not None:
            return refused
        if not moved:
            return failed[0] if failed else _NO_REPLICA
        slowest = max(moved, key=_seconds)
        return Moved(0, moved[0].digest, _farthest(moved), sum(a.bytes for a in moved), slowest.load)

    async def _unless_it_hangs(self, member: Member, ask: _Asking) -> Moved | Failed:
        """A replica's answer; that of an absent one where it falls silent after it was asked, and others do not."""
        asked = asyncio.ensure_future(ask(member.link))
        try:
            while not (await asyncio.wait({asked}, timeout=_LOOK_S))[0]:
                if member not in self._fresh(self._connected()):
                    return _NO_REPLICA
            return asked.result()
        finally:
            asked.cancel()


class OneCopy:
    """A router for whoever wants an adapter ready somewhere, as a prediction does, and not on every replica."""

    def __init__(self, router: Router) -> None:
        self._router = router

    @property
    def heartbeat(self) -> Heartbeat | None:
        """All replicas together."""
        return self._router.heartbeat

    async def warm(self, digest: str, ttl_s: float) -> Moved | Failed:
        """On one replica; see Router.warm_one."""
        return await self._router.warm_one(digest, ttl_s)


def _refused(failed: Failed) -> bool:
    """Whether the replica never began. A deadline that was passed has no time to retry, one that cannot be met has."""
    late = failed.code == DeadlineExceeded.code and failed.retry_after_s is not None
    return late or failed.code in _ELSEWHERE


def _farthest(moved: Sequence[Moved]) -> str:
    """Where the adapter is on the replica that has it farthest away."""
    order = ("device", "host", "disk", "store", "gone")
    return max((m.tier for m in moved), key=lambda tier: order.index(tier) if tier in order else len(order))


def _seconds(moved: Moved) -> float:
    load = moved.load
    return load.queue_s + load.fetch_s + load.host_s + load.device_s if load is not None else 0.0
