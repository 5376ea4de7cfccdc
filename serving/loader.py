"""The host tier: brings adapters into host memory and keeps them there, single flight per digest, within a budget.

All state belongs to the engine's thread: workers only read and check, and their results are taken in by `poll`. So
nothing here locks, a cancelled request cannot leave a load half done, and one slow read delays only its own adapter.

An adapter's life here: absent -> loading -> held, or failed until a time. Only `poll`, `drop` and `want` move it.
"""

from __future__ import annotations

import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import structlog

from adapters.errors import AdapterLoadFailed, AdapterRefused, LoraplaneError, Unavailable
from serving.below import Below, Nothing
from serving.engine.demand import Demand
from serving.engine.lora import HostAdapter
from serving.engine.plan import Load, LoadState
from serving.engine.request import LoadTimes
from serving.load_counts import LoadCounts
from serving.load_workers import BUILD, DISK, STORE, WRITE, ThreadWorkers, Workers

MAX_UNDER_WAY = 64
MAX_WRITES = 8  # adapters that wait to be written below; beyond them one stays unwritten
LONGEST_REFUSAL_S = 60.0
FAILURES_KEPT = 4096
COMPARED = 256  # adapters of which the one that is worth least goes
AWAITED_S = 5.0  # what nobody has wanted for so long, nobody waits for
_log = structlog.get_logger()

Bringing = Generator[str, None, HostAdapter]
"""A load: it yields the pool that its next part is to run in; the first runs in the disk's."""


@dataclass(slots=True)
class _Loading:
    """A load, begun or not. Once begun it belongs to whichever thread runs it, until that hands it back.

    since: when it was first wanted; wanted_at: when it was last.
    """

    digest: str
    since: float
    wanted_at: float
    queued_at: float
    begun: bool = False
    steps: Bringing | None = None
    pool: str = DISK
    queue_s: float = 0.0
    spent_s: dict[str, float] = field(default_factory=dict)
    adapter: HostAdapter | None = None
    error: Exception | None = None

    @property
    def source(self) -> str:
        """Where it comes from, as far as it is known."""
        # Asked while another thread writes: each of these looks at one key only.
        return STORE if self.pool != DISK or STORE in self.spent_s else DISK

    @property
    def times(self) -> LoadTimes:
        """What it took."""
        host_s = self.spent_s.get(BUILD, 0.0)
        size = 0 if self.adapter is None else self.adapter.size_bytes
        return LoadTimes(self.source, self.queue_s, sum(self.spent_s.values()) - host_s, host_s, bytes=size)


@dataclass(slots=True)
class _Held:
    """An adapter on the host. fresh: nobody has taken it yet."""

    adapter: HostAdapter
    bytes: int
    times: LoadTimes
    wanted_at: float
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an adapter is refused, and until when; refused_s: for how long. permanent: trying again will not help."""

    message: str
    until: float
    refused_s: float
    permanent: bool


class HostTier:
    """Adapters in host memory. read: an adapter, at once or as Bringing; it runs on worker threads, where `wake` is
    called too once a result is ready.

    budget_bytes bounds what is kept. A newcomer is verified before any goes; those go first that are asked for little,
    large, and quick to have again. demand: who is asked for; below: what keeps adapters nearer than the store.
    """

    def __init__(
        self,
        read: Callable[[str], HostAdapter | Bringing],
        *,
        budget_bytes: int,
        workers: int,
        negative_cache_s: float,
        wake: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
        begin: Callable[[], None] | None = None,
        pools: Workers | None = None,
        demand: Demand | None = None,
        below: Below | None = None,
    ) -> None:
        self._read, self._budget, self._wake, self._now = read, budget_bytes, wake, now
        self._negative_cache_s = negative_cache_s
        self._pools = pools or ThreadWorkers(workers, begin)
        self.below = below or Nothing()
        self._results: queue.SimpleQueue[_Loading] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # least recently wanted first
        self._loading: dict[str, _Loading] = {}
        self._begun = self._writes = 0
        self._failed: dict[str, _Failure] = {}
        self._kept: set[str] = set()
        self.held_bytes = 0
        self.evictions = 0
        self.demand = demand or Demand(now)
        self.counts = LoadCounts()

    @property
    def loading(self) -> int:
        """Loads under way or queued."""
        return len(self._loading)

    @property
    def budget_bytes(self) -> int:
        return self._budget

    def digests(self) -> tuple[str, ...]:
        """What is on the host, least recently wanted first."""
        return tuple(self._held)

    def want(self, digest: str) -> LoadState:
        """Where the adapter is; starts its load if it is nowhere. Never blocks."""
        now = self._now()
        held = self._held.get(digest)
        if held is not None:
            self._held.move_to_end(digest)
            held.wanted_at = now
            times = held.times if held.fresh else None
            return LoadState(Load.READY, source=held.times.source if held.fresh else "host", times=times)
        loading = self._loading.get(digest)
        if loading is None:
            failure = self._failed.get(digest)
            if failure is not None and now < failure.until:
                wait = None if failure.permanent else failure.until - now
                return LoadState(Load.FAILED, (AdapterLoadFailed.code, failure.message), retry_after_s=wait)
            loading = self._loading[digest] = _Loading(digest, now, now, now)
            self._begin_some()
        loading.wanted_at = now
        return LoadState(Load.LOADING, source=loading.source)

    def source_of(self, digest: str) -> str:
        """The tier that the adapter lies in now, as far as is known: host, disk or store. Starts nothing."""
        if digest in self._held:
            return "host"
        return DISK if self.below.bytes_of(digest) else STORE

    def loading_s(self, digest: str) -> float:
        """For how long the adapter's load has been under way, whoever wanted it; 0 without one. Starts nothing."""
        loading = self._loading.get(digest)
        return 0.0 if loading is None else self._now() - loading.since

    def brought(self, digest: str) -> LoadTimes | None:
        """What the load took that brought an adapter here; None when it is not on the host. Starts nothing."""
        held = self._held.get(digest)
        return None if held is None else held.times

    def take(self, digest: str) -> tuple[HostAdapter, LoadTimes]:
        """An adapter that `want` called READY, and what its load took, which is told once. Raises KeyError."""
        held = self._held[digest]
        times = held.times if held.fresh else LoadTimes("host", bytes=held.bytes)
        held.fresh = False
        return held.adapter, times

    def poll(self) -> None:
        """Take in what the workers finished, drop what the budget no longer holds, begin what may begin."""
        while not self._written.empty():
            self._written.get_nowait()
            self._writes -= 1
        while not self._results.empty():
            self._settle(self._results.get_nowait())
        if self.held_bytes > self._budget:
            self._evict()
        self._begin_some()

    def keep(self, digest: str) -> bool:
        """Hold on to an adapter whatever the budget wants; False when what is kept would then exceed the budget.

        Raises KeyError for an adapter that is not on the host.
        """
        kept = self._kept | {digest}
        if sum(self._held[d].bytes for d in kept) > self._budget:
            return False
        self._kept = kept
        return True

    def release(self, digest: str) -> None:
        """Hold on to it no longer than to any other."""
        self._kept.discard(digest)

    def bytes_of(self, digest: str) -> int:
        """Bytes of an adapter on the host; 0 when it is not there. Starts nothing."""
        held = self._held.get(digest)
        return 0 if held is None else held.bytes

    def laid_out(self, digest: str) -> bool:
        """Whether an adapter is on the host in its slots' own form."""
        held = self._held.get(digest)
        return held is not None and held.adapter.form is not None

    def drop(self, digest: str) -> int:
        """Forget an adapter here and on the tiers below; how many bytes that frees.

        A load of it that is under way ends in nothing.
        """
        self._kept.discard(digest)
        self._failed.pop(digest, None)
        loading = self._loading.pop(digest, None)
        self._begun -= loading is not None and loading.begun
        freed = self.below.bytes_of(digest)
        self._pools.submit(WRITE, partial(self.below.drop, digest))
        return freed + self._forget(digest)

    def close(self) -> None:
        """Begin nothing any more; loads not begun are dropped."""
        self._pools.close()

    def _forget(self, digest: str) -> int:
        held = self._held.pop(digest, None)
        if held is None:
            return 0
        self.held_bytes -= held.bytes
        return held.bytes

    def _begin_some(self) -> None:
        """Begin loads, in the order in which they were first wanted; those that nobody waits for any more never."""
        if self._begun >= min(MAX_UNDER_WAY, len(self._loading)):
            return
        now = self._now()
        for loading in [each for each in self._loading.values() if not each.begun]:
            if now - loading.wanted_at > AWAITED_S:
                del self._loading[loading.digest]
            elif self._begun < MAX_UNDER_WAY:
                loading.begun = True
                self._begun += 1
                self._pools.submit(DISK, partial(self._advance, loading))

    def _settle(self, done: _Loading) -> None:
        """A load is over: held, or failed."""
        digest, times = done.digest, done.times
        if self._loading.get(digest) is not done:  # dropped meanwhile
            return
        del self._loading[digest]
        self._begun -= 1
        seconds = times.queue_s + times.fetch_s + times.host_s
        if done.adapter is None:
            self._fail(digest, done.error, seconds)
            return
        self._failed.pop(digest, None)
        self._held[digest] = _Held(done.adapter, times.bytes, times, done.wanted_at)
        self.held_bytes += times.bytes
        self.counts.count(times.source, seconds)
        _log.debug("adapter_loaded", adapter=digest[:12], source=times.source, seconds=round(seconds, 4))
        if times.source == STORE and self._writes < MAX_WRITES:
            self._writes += 1
            self._pools.submit(WRITE, partial(self._write, done.adapter, times))

    def _fail(self, digest: str, error: Exception | None, seconds: float) -> None:
        """Refuse the adapter for a while, each time in a row for twice as long."""
        before = self._failed.pop(digest, None)
        told = str(error) if isinstance(error, LoraplaneError) else type(error).__name__
        permanent = isinstance(error, AdapterRefused) or (
            isinstance(error, Unavailable) and error.retry_after_s is None
        )
        now, refused_s = self._now(), self._negative_cache_s
        if before is not None and now - before.until < LONGEST_REFUSAL_S:
            refused_s = min(2 * before.refused_s, max(LONGEST_REFUSAL_S, refused_s))
        message = f"adapter {digest[:12]} cannot be loaded: {told}"
        self._failed[digest] = _Failure(message, now + refused_s, refused_s, permanent)
        if len(self._failed) > FAILURES_KEPT:
            del self._failed[next(iter(self._failed))]
        self.counts.count("failed", seconds)
        _log.warning("adapter_load_failed", adapter=digest[:12], error=told, refused_s=refused_s)

    def _evict(self) -> None:
        """Drop adapters until the budget holds: last those that somebody waits for, and of these never the last.

        Only the least recently wanted are compared: thousands would take the engine's thread longer than a step may.
        """
        now = self._now()

        def worth(digest: str) -> tuple[bool, float]:
            held = self._held[digest]
            if held.fresh and now - held.wanted_at <= AWAITED_S:
                return True, 0.0
            again_s = held.times.fetch_s + held.times.host_s
            return False, self.demand.of(digest) * again_s / max(held.bytes, 1)

        while (over := self.held_bytes - self._budget) > 0:
            compared = list(islice((d for d in self._held if d not in self._kept), COMPARED))
            going: list[str] = []
            for digest in sorted(compared, key=worth)[: -1 if len(compared) < COMPARED else COMPARED // 2]:
                if over <= 0:
                    break
                going.append(digest)
                over -= self._held[digest].bytes
            # The last to be chosen may be so large that others need not go: the most worthy of them stay.
            for digest in reversed(going):
                if over + self._held[digest].bytes <= 0:
                    over += self._held[digest].bytes
                else:
                    self._forget(digest)
                    self.evictions += 1
            if len(compared) < COMPARED:
                return

    # -- on the workers' threads ----------------------------------------------------------------------------------

    def _advance(self, loading: _Loading) -> None:
        """Run the next part of a load, then hand it to the next pool, or back."""
        begun = self._now()
        loading.queue_s += begun - loading.queued_at
        pool = loading.pool
        try:
            if loading.steps is None:
                loading.steps = self._steps(loading)
            loading.pool = next(loading.steps)
        except StopIteration as end:
            loading.adapter = end.value
        except Exception as error:  # a worker's failure must reach whoever waits for this adapter
            loading.error = error
        loading.queued_at = self._now()
        loading.spent_s[pool] = loading.spent_s.get(pool, 0.0) + loading.queued_at - begun
        if loading.adapter is None and loading.error is None:
            self._pools.submit(loading.pool, partial(self._advance, loading))
            return
        self._results.put(loading)
        self._wake()

    def _steps(self, loading: _Loading) -> Bringing:
        found = self._read(loading.digest)
        if isinstance(found, Generator):
            return (yield from found)
        loading.spent_s[STORE] = 0.0  # a reader in one part knows no tier but the store
        return found

    def _write(self, adapter: HostAdapter, times: LoadTimes) -> None:
        try:
            self.below.keep(adapter, times)
        except Exception:  # nobody waits for this, and the next adapter is to be written
            _log.exception("adapter_not_kept", adapter=adapter.digest[:12])
        finally:
            self._written.put(None)
