"""One seed, one world: a gateway, a registry, engines, clients and accidents; then all is healed and must rest.

Real are gateway, resolver, answers, flips, warden, router, both ends of the links, engine, keeper, scheduler,
admission, row and slot tables, breaker, host tier and the way through the tiers below. Simulated are time, sockets,
threads, the bytes of disk and store, the registry's rows, and the numbers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import structlog

from adapters.errors import LoraplaneError
from serving.commands import CompletionCommand, Wishes
from serving.flips import FlipLimits, Flips
from serving.gateway import Gateway
from serving.limits import GatewayLimits
from serving.link import Address, EngineLink
from serving.resolver import Resolver
from serving.router import Router
from serving.warden import Warden
from tests.fakes import ByteTokenizer
from tests.simulation.judge import Judge
from tests.simulation.loop import SimLoop, Stuck
from tests.simulation.operators import Operators
from tests.simulation.plan import GOOD, LONG_S, Happened, Plan, Request
from tests.simulation.registry import BASE, SimRegistry
from tests.simulation.replica import Parts, SimReplica
from tests.simulation.weights import Broken, Content, SimStore

_TOKENIZER = ByteTokenizer()


class World:
    """Runs one plan. `trace`: takes a line for whatever happens."""

    def __init__(
        self,
        plan: Plan,
        parts: Callable[[SimRegistry], Parts] = lambda registry: Parts(),
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.plan, self._trace = plan, trace
        self._rng, self._faults = random.Random(f"world {plan.seed}"), random.Random(f"faults {plan.seed}")
        self.loop = SimLoop(random.Random(f"loop {plan.seed}"))
        self.registry, self.store, self.happened = SimRegistry(self.loop.time), SimStore(), Happened()
        self._parts = parts(self.registry)
        self.stormy = True
        self._tasks: list[asyncio.Task[None]] = []
        self._broken: asyncio.Future[Exception] = self.loop.create_future()
        self.loop.set_exception_handler(self._unhandled)
        self.requests: list[Request] = []
        self._replicas_made = 0
        self.replicas = [self._new_replica() for _ in range(plan.replicas)]
        self.links: list[EngineLink] = []
        self.door = Router(self._directory, self._connect, rng=random.Random(plan.seed), now=self.loop.time)
        self.gateway = Gateway(
            self.door,
            Resolver(self.registry, BASE),
            _TOKENIZER,
            GatewayLimits(request_deadline_s=LONG_S, max_inflight=64),
            now=self.loop.time,
            monotonic=self.loop.time,
            new_seed=lambda: 7,
        )
        self.warden = Warden(
            self.gateway,
            self.registry.standings.decrees,
            every_s=0.3,
            drain_s=0.5,
            longest_s=LONG_S,
            monotonic=self.loop.time,
        )
        limits = FlipLimits(warm_deadline_s=3.0, warm_ttl_s=1.0, longest_s=LONG_S)
        self.flips = Flips(self.gateway, self.registry, self.warden, limits)  # type: ignore[arg-type]
        self._judge = Judge(plan, self.registry, self.store, self.happened)
        self._operators = Operators(self, random.Random(f"operators {plan.seed}"))

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
            about = f"{context.get('exception')!r} {context.get('task')!r}"
            self._broken.set_result(Broken(f"{context['message']}: {about}"))

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
        either: list[asyncio.Future[Any]] = [self._spawn(self._live()), self._broken]
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
        self.say(f"{plan}")
        for at in range(plan.names):
            for _ in range(rng.randint(1, 3)):
                self.publish(f"n{at}")
        for held in self.registry.names.values():
            held.falls_back = rng.random() < 0.3
        for replica in self.replicas:
            self._spawn(replica.run())
        self._spawn(self.door.run())
        self._spawn(self.warden.run())
        if plan.patient:
            self._hang_one()
        await self._until(lambda: self.door.facts is not None, 5.0, "the gateway connects")
        clients = [self._spawn(self._client(self._request(at))) for at in range(plan.requests)]
        operators = [self._spawn(self._operators.act(rng.uniform(0, plan.length_s))) for _ in range(plan.operations)]
        await asyncio.sleep(plan.length_s * 1.2)
        self._heal()
        everybody = [*clients, *operators]
        await self._until(lambda: all(task.done() for task in everybody), LONG_S + 10, "every request ends")
        self.registry.standings.heal()
        await self._rest()
        await self._probe()
        await self._rest()
        self.say("all is well")

    async def _until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        give_up = self.loop.time() + seconds
        while not holds():
            if self.loop.time() > give_up:
                waiting = [r for r in self.requests if not r.outcome]
                raise Broken(f"not within {seconds} s: {what}; {self._left()}; open are {waiting[:3]}")
            await asyncio.sleep(0.05)

    def say(self, what: str) -> None:
        """Tell the trace."""
        if self._trace is not None:
            self._trace(f"{self.loop.time():9.4f} {what}")

    # -- the machines -------------------------------------------------------------------------------------------

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
        replica.dropped, replica.runner.struck = self.happened.dropped, self.happened.struck
        return replica

    def replace(self, at: int) -> str:
        """Start a replica in the place of one that died; its name, or that of who is there by now."""
        if self.replicas[at].engine.dead:
            self.replicas[at] = self._new_replica()
            self._spawn(self.replicas[at].run())
        return self.replicas[at].name

    def _goes_wrong(self, kind: str) -> bool:
        wrong = self.stormy and self._faults.random() < self.plan.odds[kind]
        if wrong:
            self.say(f"fault: {kind}")
        return wrong

    def publish(self, name: str) -> str:
        """Publish the next version of a name; its id."""
        version = self.registry.publish(name)
        self.store.contents[version.digest] = Content(version.digest, fragile=self._rng.random() < 0.15)
        return f"{version.id} {version.digest[:8]}"

    def _hang_one(self) -> None:
        content = self._rng.choice(list(self.store.contents.values()))
        content.stuck = True
        self.happened.troubled.add(content.digest)
        self.say(f"reading {content.digest[:8]} hangs")

    def _heal(self) -> None:
        self.say("healing")
        self.stormy = False
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
        request = Request.draw(number, "absent" if dice > 0.96 else model, rng, self.plan.patient)
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
            request.outcome, request.ended = "cancelled", self.loop.time()
        self.say(f"request {request.number} {request.model} {(request.digest or '')[:8]}: {request.outcome}")
        self._judge.judge(request)

    async def _ask(self, request: Request) -> None:
        wishes = Wishes(
            model=request.model,
            max_tokens=request.count,
            temperature=0.0,
            n=request.n,
            deadline_s=request.deadline_s,
            tenant=request.tenant,
        )
        request.begun, request.texts = self.loop.time(), [""] * request.n
        self.say(f"request {request.number} asks {request.model}")
        try:
            answer = await self.gateway.completion(CompletionCommand(wishes, (request.prompt,)))
            request.digest, request.pinned_at = answer.head.weights.digest, self.loop.time()
            request.instead = answer.head.weights.instead_of is not None
            async for piece in answer.pieces():
                request.texts[piece.index] += piece.text
                if not self.plan.patient and self._rng.random() < 0.05:
                    await asyncio.sleep(self._rng.choice((0.01, 0.2)))  # a slow reader
            request.outcome = GOOD
        except LoraplaneError as error:
            request.outcome = error.reason_code
        finally:
            request.ended = self.loop.time()

    # -- afterwards ---------------------------------------------------------------------------------------------

    def _left(self) -> str:
        return "; ".join(filter(None, (replica.settled() for replica in self.replicas)))

    async def _rest(self) -> None:
        """C8: whatever happened, nothing of it is left."""
        await self._until(lambda: not self._left(), 5.0, "the engines come to rest")
        if self.gateway.admission.inflight:
            raise Broken(f"{self.gateway.admission.inflight} requests are still counted in flight")
        # The router's own wishes, such as a copy of what is hot, may come and go; they end too.
        await self._until(lambda: not any(link._queues for link in self.links), 5.0, "no answer is waited for")

    async def _probe(self) -> None:
        """Every adapter can be asked again, and answers as itself."""
        await self._until(lambda: self.door.facts is not None, 5.0, "the gateway connects again")
        await self._until(
            lambda: not any(replica.slots.pinned for replica in self.replicas), 15.0, "what is not pinned is let go"
        )
        await asyncio.sleep(self.plan.size.negative_cache_s + 0.1)
        for held in self.registry.names.values():
            for version in held.versions:
                await self._ask_again(version.id, version.digest)

    async def _ask_again(self, model: str, digest: str) -> None:
        request = Request.draw(-1, model, self._rng, patient=True)
        for wait_s in (0.0, 1.0, 4.0, 16.0, 61.0):  # a load that failed again and again is refused for a while
            await asyncio.sleep(wait_s)
            await self._ask(request)
            if request.outcome not in ("adapter_load_failed", "adapter_unloaded"):
                break
        self.say(f"probe of {model}: {request.outcome} {request.texts}")
        self._judge.judge(request)
        fine = request.outcome == GOOD or digest in self.happened.struck
        if not fine or request.ended - request.begun > 5.0:
            raise Broken(f"after healing, {model} still does not answer: {request}")
