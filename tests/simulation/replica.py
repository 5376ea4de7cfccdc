"""One engine replica: the product's own engine, scheduler, tables, host tier and link, on a simulated machine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.engine.demand import Demand
from serving.engine.engine import Engine
from serving.engine.kv import RowTable
from serving.engine.limits import Limits
from serving.engine.plan import Key
from serving.engine.request import EngineFacts, Heartbeat, Submit
from serving.engine.scheduler import Scheduler
from serving.engine.slots import SlotTable
from serving.link import Address, LinkServer
from serving.load_workers import STORE
from serving.loader import HostTier
from serving.tiers import Tiers
from tests.fakes import EOS
from tests.simulation.loop import FOREVER, SimLoop, SimWorkers
from tests.simulation.weights import Broken, SimDisk, SimRunner, SimStore, size_of

TOKEN = "secret"
MAX_LEN = 96


@dataclass(frozen=True, slots=True)
class Parts:
    """The deciding parts of an engine; a mutant replaces one of them. names: digest -> name, which no part may know."""

    slots: Callable[[int], SlotTable] = SlotTable
    rows: Callable[[int], RowTable] = RowTable
    host: type[HostTier] = HostTier
    scheduler: type[Scheduler] = Scheduler


@dataclass(frozen=True, slots=True)
class Size:
    """What a seed makes of an engine."""

    rows: int
    slots: int
    host_bytes: int
    disk_bytes: int
    workers: int
    queue_limit: int
    prefill_chunk: int
    patience_s: float
    negative_cache_s: float


class SimEngine(Engine):
    """An engine whose steps are made by hand. `awake` is told of whatever may have changed."""

    asked: dict[Key, Submit]
    awake: Callable[[], None]
    dead = False

    @property
    def alive(self) -> bool:
        return not self.dead

    def submit(self, key: Key, submit: Submit) -> None:
        self.asked[key] = submit
        super().submit(key, submit)
        self.awake()

    def wake(self) -> None:
        self.awake()

    def heartbeat(self) -> Heartbeat:
        self._beat = self._snapshot()
        return super().heartbeat()


class SimReplica:
    """An engine with its link, stepping until it is killed. fault: whether this kind of thing goes wrong now."""

    def __init__(
        self,
        loop: SimLoop,
        rng: random.Random,
        name: str,
        size: Size,
        parts: Parts,
        store: SimStore,
        fault: Callable[[str], bool],
    ) -> None:
        self.name, self.address = name, Address(f"/sim/{name}", TOKEN, name)
        self._loop, self._rng, self._store, self._size = loop, rng, store, size
        demand = Demand(loop.time)
        self.rows, self.slots = parts.rows(size.rows), parts.slots(size.slots)
        self.slots.worth = demand.of
        self.workers = SimWorkers(loop, size.workers, self._task_s)
        disk = SimDisk(size.disk_bytes, lambda: fault("rot"))
        tiers = Tiers(disk, store, lambda adapter: adapter, 64)  # type: ignore[arg-type]
        self.host = parts.host(
            tiers.bring,
            budget_bytes=size.host_bytes,
            workers=size.workers,
            negative_cache_s=size.negative_cache_s,
            wake=self._wake,
            now=loop.time,
            pools=self.workers,
            demand=demand,
            below=tiers,
        )
        limits = Limits(MAX_LEN, size.queue_limit, size.prefill_chunk, 2 * size.prefill_chunk, size.patience_s)
        self.scheduler = parts.scheduler(limits, self.rows, self.slots, self.host, frozenset({EOS}))
        asked: dict[Key, Submit] = {}
        self.runner = SimRunner(store, asked, fault)
        self._link = LinkServer(Path(self.address.path), TOKEN)
        self._link._loop.close()
        self._link._loop = loop
        facts = EngineFacts(
            "sim", "b" * 64, "llama", MAX_LEN, size.rows, size.slots, 64, "float32", "cpu", (EOS,), name
        )
        self.engine = SimEngine(
            facts,
            self.runner,
            self.scheduler,
            self.rows,
            self.slots,
            self.host,
            self._link.sink,
            queue_limit=size.queue_limit,
            probe_after_s=5.0,
            now=loop.time,
        )
        self.engine.asked, self.engine.awake = asked, self._wake
        self._link._engine = self.engine
        self._woken: asyncio.Future[None] | None = None
        self.dropped: set[str] = set()

    def _task_s(self, pool: str, digest: str) -> float:
        content = self._store.contents[digest]
        if pool != STORE:
            return self._rng.choice((0.001, 0.005))
        return FOREVER if content.stuck else content.slow_s + self._rng.choice((0.001, 0.01, 0.05))

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def run(self) -> None:
        """Listen and step, until killed. Raises Broken when an invariant does not hold."""
        self._loop.listen(self.address.path, self._link._serve)
        beat = self._loop.create_task(self._link._beat())
        try:
            while not self.engine.dead:
                self._woken = self._loop.create_future()
                computed = self._step()
                if computed:
                    await asyncio.sleep(self._rng.choice((0.001, 0.004, 0.01)))
                else:
                    late = self._loop.call_later(0.2, self._wake)
                    await self._woken
                    late.cancel()
        finally:
            self.kill()
            beat.cancel()

    def kill(self) -> None:
        """The process is gone, and with it all that it held."""
        self.engine.dead = True
        self._loop.unlisten(self.address.path)
        self.workers.close()
        for pipe in [p for p in self._loop.pipes if p.path == self.address.path]:
            pipe.abort()
        self._wake()

    # -- what must hold -----------------------------------------------------------------------------------------

    def _step(self) -> bool:
        before = {digest: leases for digest, _, leases in self.slots.resident()}
        pinned, host, installed = set(self.slots.pinned), set(self.host.digests()), dict(self.runner.slots)
        arrived, self.workers.done = self.workers.done, []
        try:
            computed = self.engine.step()
        except Exception as error:
            raise Broken(f"the engine's step raised {type(error).__name__}: {error}") from error
        if self.runner.broken is not None:
            raise self.runner.broken
        self._check_evictions(before, pinned, installed)
        if len(arrived) <= 1:  # of two that arrive at once the first may make room and then not stay itself
            self._check_host(host, host | set(arrived))
        self.check_books()
        return computed

    def _check_evictions(self, before: dict[str, int], pinned: set[str], installed: dict[int, str]) -> None:
        """Whatever left a slot left it to a newcomer that lies there now, and was neither leased nor pinned."""
        now = {digest: slot for digest, slot, _ in self.slots.resident()}
        for digest, slot in now.items():
            if self.runner.slots.get(slot) != digest:
                raise Broken(f"slot {slot} is said to hold {digest[:8]} and holds {self.runner.slots.get(slot)}")
        for digest in before.keys() - now.keys():
            slot = next(slot for slot, held in installed.items() if held == digest)
            if digest in self._excused():
                continue
            if digest in pinned and digest in self.slots.pinned:
                raise Broken(f"{digest[:8]} was evicted though it is pinned")
            if self.runner.slots.get(slot) == digest:
                raise Broken(f"{digest[:8]} was evicted for nobody")

    def _excused(self) -> set[str]:
        """What was to be freed: dropped, or its installation failed."""
        return self.dropped

    def _check_host(self, before: set[str], there: set[str]) -> None:
        """Nothing leaves the host that would have fit beside what was there, newcomers of this step among it."""
        gone = there - set(self.host.digests())
        pushed = (gone & before) - self._excused()
        # What was dropped in the same step may have lain there when the others had to go.
        held = self.host.held_bytes + sum(size_of(digest) for digest in gone & self._excused())
        if pushed and held + max(size_of(digest) for digest in pushed) <= self._size.host_bytes:
            raise Broken(f"{[(d[:8], size_of(d)) for d in sorted(pushed)]} left the host, {held} were held")

    def check_books(self) -> None:
        """Rows and leases are accounted for, and whatever is loading is being loaded."""
        if not self.scheduler.balanced():
            raise Broken("rows or leases do not balance")
        if self.host.loading > self.workers.loads + self.host._results.qsize():
            raise Broken(f"{self.host.loading} are said to be loading, {self.workers.loads} are")
        if len(self.slots.resident()) > self._size.slots:
            raise Broken("more adapters than slots")

    def settled(self) -> str:
        """What is left when nothing should be; empty when all is at its baseline."""
        left = {
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
            "leases": self.slots.leases,
            "rows": self.rows.held,
            "loading": self.host.loading,
            "cached": self.scheduler.cached_tokens,
            "live": sum(len(live) for live in self._link._live.values()),
        }
        return ", ".join(f"{name} {count}" for name, count in left.items() if count)
