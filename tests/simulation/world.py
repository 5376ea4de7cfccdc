"""One seed, one world: a gateway, a registry, engines, clients and accidents; then all is healed and must come to rest.

Real are gateway, resolver, answers, router, both ends of the links, engine, scheduler, row and slot tables, breaker and
host tier. Simulated are time, sockets, threads, the store below the host tier, the registry's rows, and the numbers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from adapters.errors import LoraplaneError
from serving.commands import CompletionCommand, Wishes
from serving.gateway import Gateway
from serving.limits import GatewayLimits
from serving.link import Address, EngineLink
from serving.resolver import Resolver
from serving.router import Router
from tests.fakes import ByteTokenizer
from tests.simulation.loop import SimLoop, Stuck
from tests.simulation.registry import BASE, SimName, SimRegistry
from tests.simulation.replica import Parts, SimReplica, Size
from tests.simulation.weights import Broken, Content, SimStore, expected

_TOKENIZER = ByteTokenizer()
_LONG_S = 30.0
_GOOD = "complete"
Operation = Callable[[str, SimName], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed decides before anything happens. patient: nothing goes wrong but that one adapter's read hangs, and
    no other request may wait for it. odds: of each kind of accident, each time it could happen."""

    seed: int
    size: Size
    patient: bool
    replicas: int
    names: int
    requests: int
    operations: int
    length_s: float
    odds: dict[str, float]

    @classmethod
    def draw(cls, seed: int) -> Plan:
        """A plan for every seed."""
        rng = random.Random(f"plan {seed}")
        patient = rng.random() < 0.2
        size = Size(
            rows=rng.randint(1, 6),
            slots=rng.randint(1, 4),
            host_bytes=rng.randint(150, 700),
            disk_bytes=rng.choice((0, 300, 3000)),
            workers=rng.randint(1, 3),
            queue_limit=rng.choice((2, 8, 40)),
            prefill_chunk=rng.choice((8, 24, 64)),
            patience_s=rng.choice((0.05, 0.5)),
            negative_cache_s=0.5,
        )
        calm = {"install": 0.0, "run": 0.0, "nan": 0.0, "rot": 0.0}
        if patient:
            size = replace(size, rows=6, slots=8, host_bytes=2000, workers=2, queue_limit=40)
        rough = {
            kind: rng.choice((0.0, 0.0, worst))
            for kind, worst in (("install", 0.1), ("run", 0.02), ("nan", 0.03), ("rot", 0.3))
        }
        return cls(
            seed=seed,
            size=size,
            patient=patient,
            replicas=rng.choice((1, 1, 2)),
            names=rng.randint(2, 5),
            requests=rng.randint(8, 24),
            operations=rng.randint(2, 14),
            length_s=rng.choice((0.5, 2.0, 5.0)),
            odds=calm if patient else rough,
        )


@dataclass
class Request:
    """One client's request, and what came of it."""

    number: int
    model: str
    prompt: tuple[int, ...]
    count: int
    n: int
    deadline_s: float
    tenant: str
    cancel_after_s: float | None
    begun: float = 0.0
    pinned_at: float = float("inf")
    digest: str | None = None
    instead: bool = False
    texts: list[str] = field(default_factory=list)
    outcome: str = ""


class World:
    """Runs one plan. `trace`: takes a line for whatever happens."""

    def __init__(
        self,
        plan: Plan,
        parts: Callable[[SimRegistry], Parts] = lambda registry: Parts(),
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.plan, self._trace = plan, trace
        self._rng = random.Random(f"world {plan.seed}")
        self.loop = SimLoop(random.Random(f"loop {plan.seed}"))
        self.registry = SimRegistry(self.loop.time)
        self._parts = parts(self.registry)
        self.store = SimStore()
        self._faults = random.Random(f"faults {plan.seed}")
        self._stormy = True
        self._replicas_made = 0
        self._lost = self._cut = False
        self._troubled: set[str] = set()  # digests whose loads may have failed
        self._struck: set[str] = set()
        self._dropped: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._broken: asyncio.Future[Exception] = self.loop.create_future()
        self.loop.set_exception_handler(self._unhandled)
        self.requests: list[Request] = []
        self.replicas = [self._new_replica() for _ in range(plan.replicas)]
        self.links: list[EngineLink] = []
        self.door = Router(self._directory, self._connect, rng=random.Random(plan.seed), now=self.loop.time)
        self.gateway = Gateway(
            self.door,
            Resolver(self.registry, BASE),
            _TOKENIZER,
            GatewayLimits(request_deadline_s=_LONG_S, max_inflight=64),
            now=self.loop.time,
            monotonic=self.loop.time,
            new_seed=lambda: 7,
        )

    # -- running ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Live the plan. Raises Broken with what does not hold."""
        before = structlog.get_config()
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        try:
            self.loop.run_until_complete(self._whole())
        except Stuck:
            raise Broken("somebody waits, and nothing will ever happen again") from None
        finally:
            with suppress(Stuck):
                self._end()
            structlog.configure(**before)

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio would only log: a task that nobody waited for, a callback that raised."""
        if not self._broken.done():
            self._broken.set_result(
                Broken(f"{context['message']}: {context.get('exception')!r} {context.get('task')!r}")
            )

    def _end(self) -> None:
        self.loop.set_exception_handler(lambda loop, context: None)
        for replica in self.replicas:
            replica.kill()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    async def _whole(self) -> None:
        live = self._spawn(self._live())
        either: list[asyncio.Future[Any]] = [live, self._broken]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._broken.done():
            raise self._broken.result()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(self._guard(coroutine))
        self._tasks.append(task)  # a loop alone keeps no task alive
        return task

    async def _guard(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """The first task that fails ends the world, with its error."""
        try:
            await coroutine
        except Exception as error:
            if not self._broken.done():
                self._broken.set_result(error)

    async def _live(self) -> None:
        plan, rng = self.plan, self._rng
        self._say(f"{plan}")
        for at in range(plan.names):
            for _ in range(rng.randint(1, 3)):
                self._publish(f"n{at}")
        for held in self.registry.names.values():
            held.falls_back = rng.random() < 0.3
        for replica in self.replicas:
            self._spawn(replica.run())
        self._spawn(self.door.run())
        if plan.patient:
            self._hang_one()
        await self._until(lambda: self.door.facts is not None, 5.0, "the gateway connects")
        begun = self.loop.time()
        clients = [self._spawn(self._client(self._request(at))) for at in range(plan.requests)]
        operations = [self._spawn(self._operation(rng.uniform(0, plan.length_s))) for _ in range(plan.operations)]
        await asyncio.sleep(plan.length_s * 1.2)
        self._heal()
        await self._until(
            lambda: all(task.done() for task in [*clients, *operations]), _LONG_S + 10, "every request ends"
        )
        await self._rest()
        await self._probe()
        await self._rest()
        self._say(f"all is well after {self.loop.time() - begun:.3f} s")

    async def _until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        give_up = self.loop.time() + seconds
        while not holds():
            if self.loop.time() > give_up:
                open_requests = [r for r in self.requests if not r.outcome]
                raise Broken(f"not within {seconds} s: {what}; {self._left()}; open are {open_requests[:3]}")
            await asyncio.sleep(0.05)

    def _say(self, what: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.loop.time():9.4f} {what}")

    # -- the machine --------------------------------------------------------------------------------------------

    async def _directory(self) -> list[Address]:
        await asyncio.sleep(self.loop.delay_s())
        return [replica.address for replica in self.replicas if not replica.engine.dead]

    def _connect(self, address: Address) -> EngineLink:
        async def locate() -> Address:
            return address

        self.links.append(EngineLink(locate, now=self.loop.time))
        return self.links[-1]

    def _new_replica(self) -> SimReplica:
        self._replicas_made += 1
        name = f"r{self._replicas_made}"
        rng = random.Random(f"{name} {self.plan.seed}")
        replica = SimReplica(self.loop, rng, name, self.plan.size, self._parts, self.store, self._goes_wrong)
        replica.dropped = self._dropped
        replica.runner.struck = self._struck
        return replica

    def _goes_wrong(self, kind: str) -> bool:
        wrong = self._stormy and self._faults.random() < self.plan.odds[kind]
        if wrong:
            self._say(f"fault: {kind}")
        return wrong

    def _publish(self, name: str) -> None:
        version = self.registry.publish(name)
        self.store.contents[version.digest] = Content(version.digest, fragile=self._rng.random() < 0.15)
        self._say(f"published {version.id}, {version.digest[:8]}")

    def _hang_one(self) -> None:
        content = self._rng.choice(list(self.store.contents.values()))
        content.stuck = True
        self._troubled.add(content.digest)
        self._say(f"reading {content.digest[:8]} hangs")

    def _heal(self) -> None:
        self._say("healing")
        self._stormy = False
        for content in self.store.contents.values():
            content.rotten = content.stuck = False
            content.slow_s, content.fails = 0.0, 0
        for replica in self.replicas:
            replica.workers.release()

    # -- clients ------------------------------------------------------------------------------------------------

    def _request(self, number: int) -> Request:
        rng = self._rng
        name = rng.choice(sorted(self.registry.names))
        versions = len(self.registry.names[name].versions)
        dice = rng.random()
        model = name if dice < 0.55 else f"{name}@{rng.randint(1, versions)}" if dice < 0.9 else "base"
        if dice > 0.96:
            model = "absent"
        stem = [rng.choice((97, 98))] * rng.choice((0, 17, 30))
        calm = self.plan.patient
        request = Request(
            number,
            model,
            (*stem, *(rng.randrange(97, 123) for _ in range(rng.randint(1, 8)))),
            rng.randint(1, 7),
            2 if rng.random() < 0.15 else 1,
            _LONG_S if calm or rng.random() < 0.85 else rng.choice((0.01, 0.1, 1.0)),
            rng.choice(("a", "b")),
            rng.choice((0.0, 0.003, 0.02, 0.3)) if rng.random() < 0.25 else None,
        )
        self.requests.append(request)
        return request

    async def _client(self, request: Request) -> None:
        await asyncio.sleep(self._rng.choice((0.0, 0.0, self._rng.uniform(0, self.plan.length_s))))
        task = self.loop.create_task(self._ask(request))
        if request.cancel_after_s is not None:
            self.loop.call_later(request.cancel_after_s, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            request.outcome = "cancelled"
        self._say(f"request {request.number} {request.model} {(request.digest or '')[:8]}: {request.outcome}")
        self._judge(request)

    async def _ask(self, request: Request) -> None:
        wishes = Wishes(
            model=request.model,
            max_tokens=request.count,
            temperature=0.0,
            n=request.n,
            deadline_s=request.deadline_s,
            tenant=request.tenant,
        )
        request.begun = self.loop.time()
        request.texts = [""] * request.n
        self._say(f"request {request.number} asks {request.model}")
        try:
            answer = await self.gateway.completion(CompletionCommand(wishes, (request.prompt,)))
            request.digest = answer.head.weights.digest
            request.instead = answer.head.weights.instead_of is not None
            request.pinned_at = self.loop.time()
            async for piece in answer.pieces():
                request.texts[piece.index] += piece.text
                if not self.plan.patient and self._rng.random() < 0.05:
                    await asyncio.sleep(self._rng.choice((0.01, 0.2)))  # a slow reader
            request.outcome = _GOOD
        except LoraplaneError as error:
            request.outcome = error.reason_code

    def _judge(self, request: Request) -> None:
        """C1, C2 and C3 for one request that is over."""
        if request.outcome == _GOOD or any(request.texts):
            digest, fragile = request.digest, False
            if digest is not None:
                fragile = self.store.contents[digest].fragile
                meant = self.registry.meant(request.model, request.begun, request.pinned_at)
                if digest not in meant and not request.instead:
                    raise Broken(f"{request} was pinned to what its id did not mean: {meant}")
            elif request.model != "base":
                raise Broken(f"{request} fell back to the base")
            right = expected(digest, fragile, request.prompt, request.count)
            for text in request.texts:
                whole = request.outcome == _GOOD
                if text != right.text if whole else not right.text.startswith(text):
                    raise Broken(f"{request} should be {right}")
            if request.outcome == _GOOD and right.fails:
                raise Broken(f"{request} should have failed: {right}")
        reason = self._reason(request)
        if request.outcome not in (_GOOD, "cancelled") and not reason:
            raise Broken(f"{request} ended so without a reason")
        late = self.loop.time() - request.begun
        if self.plan.patient and late > 0.6 and not self._asks_for_trouble(request):
            raise Broken(f"{request} took {late:.3f} s, though nothing of its own is slow")

    def _asks_for_trouble(self, request: Request) -> bool:
        if request.model in ("base", "absent"):
            return False
        return bool(self.registry.meant(request.model, request.begun, self.loop.time()) & self._troubled)

    def _reason(self, request: Request) -> bool:
        """Whether something happened for which a request may end with its code."""
        if request.model == "absent":
            return request.outcome == "model_not_found"
        meant: set[str] = set()
        if request.model != "base":
            name = request.model.partition("@")[0]
            meant = {v.digest for v in self.registry.names[name].versions}
        reasons = {
            "adapter_numerics": bool(meant & self._struck),
            "adapter_quarantined": bool(meant & self._struck),
            "adapter_load_failed": bool(meant & self._troubled) or bool(self.plan.odds["install"]),
            "adapter_unloaded": bool(meant & self._dropped),
            "adapter_capacity": bool(meant) and not self.plan.patient,
            "queue_full": not self.plan.patient,
            "engine_fault": bool(self.plan.odds["run"]),
            "engine_lost": self._lost,
            "not_ready": self._lost,
            "deadline_exceeded": request.deadline_s < _LONG_S,
        }
        return reasons.get(request.outcome, False)

    # -- accidents and operators --------------------------------------------------------------------------------

    async def _operation(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if not self._stormy:
            return
        rng = self._rng
        gentle: list[Operation] = [self._do_publish, self._do_flip, self._do_flip]
        rough: list[Operation] = [
            self._do_store,
            self._do_store,
            self._do_kill,
            self._do_cut,
            self._do_warm,
            self._do_pin,
            self._do_drop,
        ]
        operation = rng.choice(gentle if self.plan.patient else gentle + rough)
        name = rng.choice(sorted(self.registry.names))
        await operation(name, self.registry.names[name])

    async def _do_publish(self, name: str, held: SimName) -> None:
        self._publish(name)

    async def _do_flip(self, name: str, held: SimName) -> None:
        version = self._rng.choice(held.versions)
        if self._rng.random() < 0.5:
            self._say(f"warming {version.id}: {await self.door.warm(version.digest, self._rng.choice((0.1, 2.0)))}")
        self.registry.flip(name, version.number)
        self._say(f"{name} is {version.id} now")

    async def _do_store(self, name: str, held: SimName) -> None:
        rng = self._rng
        content = self.store.contents[rng.choice(held.versions).digest]
        self._troubled.add(content.digest)
        match rng.randrange(4):
            case 0:
                content.fails = 2
            case 1:
                content.rotten = not content.rotten
            case 2:
                content.slow_s = rng.choice((0.2, 1.0))
            case _:
                content.stuck = True
        self._say(f"the store has {content}")

    async def _do_kill(self, name: str, held: SimName) -> None:
        self._lost = True
        at = self._rng.randrange(len(self.replicas))
        self._say(f"{self.replicas[at].name} dies")
        self.replicas[at].kill()
        await asyncio.sleep(self._rng.choice((0.01, 0.3)))
        if self.replicas[at].engine.dead:
            self.replicas[at] = self._new_replica()
            self._spawn(self.replicas[at].run())
            self._say(f"{self.replicas[at].name} starts")

    async def _do_cut(self, name: str, held: SimName) -> None:
        self._lost = True
        if self.loop.pipes:
            pipe = self._rng.choice(self.loop.pipes)
            self._say(f"the connection to {pipe.path} breaks")
            pipe.abort()

    async def _do_warm(self, name: str, held: SimName) -> None:
        version = self._rng.choice(held.versions)
        self._say(f"warm {version.id}: {await self.door.warm(version.digest, self._rng.choice((0.05, 3.0)))}")

    async def _do_pin(self, name: str, held: SimName) -> None:
        version = self._rng.choice(held.versions)
        self._say(f"pin {version.id}: {await self.door.pin(version.digest, True)}")
        await asyncio.sleep(self._rng.choice((0.05, 1.0)))
        self._say(f"unpin {version.id}: {await self.door.pin(version.digest, False)}")

    async def _do_drop(self, name: str, held: SimName) -> None:
        version = self._rng.choice(held.versions)
        self._dropped.add(version.digest)
        self._say(f"dropping {version.id}: {await self.door.drop(version.digest, self._rng.choice((0.0, 0.1, 1.0)))}")

    # -- afterwards ---------------------------------------------------------------------------------------------

    async def _rest(self) -> None:
        """C8: whatever happened, nothing of it is left."""
        await self._until(lambda: not self._left(), 5.0, "the engines come to rest")
        if self.gateway.admission.inflight:
            raise Broken(f"{self.gateway.admission.inflight} requests are still counted in flight")
        # The router's own wishes, such as a copy of what is hot, may come and go; they end too.
        await self._until(lambda: not sum(len(link._queues) for link in self.links), 5.0, "no answer is waited for")

    def _left(self) -> str:
        return "; ".join(filter(None, (replica.settled() for replica in self.replicas)))

    async def _probe(self) -> None:
        """Every adapter can be asked again, and answers as itself."""
        await self._until(lambda: self.door.facts is not None, 5.0, "the gateway connects again")
        await asyncio.sleep(self.plan.size.negative_cache_s + 0.1)
        for digest in self.store.contents:
            await self.door.pin(digest, False)
        for name, held in self.registry.names.items():
            for version in held.versions:
                request = self._request(-1)
                request.model, request.deadline_s, request.cancel_after_s = version.id, _LONG_S, None
                request.n = 1
                for wait_s in (0.0, 1.0, 4.0, 16.0, 61.0):  # a load that failed again and again is refused for a while
                    await asyncio.sleep(wait_s)
                    begun = self.loop.time()
                    await self._ask(request)
                    if request.outcome != "adapter_load_failed":
                        break
                self._say(f"probe of {version.id}: {request.outcome} {request.texts}")
                self._judge(request)
                fine = request.outcome == _GOOD or version.digest in self._struck
                if not fine or self.loop.time() - begun > 5.0:
                    raise Broken(f"after healing, {name} still does not answer: {request}")
