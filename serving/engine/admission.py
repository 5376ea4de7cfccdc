"""Who may wait, and who starts: the door of the engine, in turns that `fair` counts. Knows no tensors, no clock.

Whose turn it is starts, if it can: a free row, and a slot for its adapter. Who cannot is passed by, within bounds:
- An adapter that loads holds up nobody. Loads start for those whose turn comes first.
- A search that needs more rows than are free lets nobody start whose turn comes after it, so rows gather.
- A slot is kept for an adapter that is used, or waited for, until somebody else has waited `patience_s` for one. Then
  an adapter whose turn comes later gets no new leases, until its last one ends. At most a quarter of the slots drains
  at a time; what uses the others goes on.
So nobody starves: of those whose turn comes before, each start makes its counter larger, and newcomers begin no lower
than the least of those who could run (see `Counters`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from serving.engine.breaker import Breaker, Doubt
from serving.engine.fair import FairQueue, Lane
from serving.engine.forecast import Forecast
from serving.engine.kv import RowTable
from serving.engine.plan import Key, Load, Loader, Outgoing
from serving.engine.request import Failed, State
from serving.engine.sequence import Sequence
from serving.engine.slots import Placement, SlotTable

ALL_PINNED = "Every slot is pinned."
LEAST_LOOKAHEAD = 16
KNOWN_SIZES = 4096  # adapters whose size is remembered once they have left the host


class Admission:
    """The sequences of one engine that wait. breaker: whose adapters are refused for a while."""

    def __init__(
        self,
        rows: RowTable,
        slots: SlotTable,
        loader: Loader,
        breaker: Breaker,
        *,
        queue_limit: int,
        patience_s: float,
    ) -> None:
        self._rows, self._slots, self._loader, self._breaker = rows, slots, loader, breaker
        self._queue_limit, self._patience_s = queue_limit, patience_s
        self.queue = FairQueue()
        self.forecast = Forecast(rows.rows)
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._drains: dict[str, str] = {}  # whose slot drains -> for whom
        self._refused: list[Outgoing] = []
        self.lent = 0  # rows of shadows, which are to be had as soon as somebody else wants them
        # So many adapters may be loading or lie ready on the host for those who wait, and no more than it holds; others
        # wait with their loads, lest what is needed soon is pushed off the host by what is needed late.
        self._wanted: set[str] = set()
        self._room, self._usual_size = loader.budget_bytes, 0
        self._lookahead = max(LEAST_LOOKAHEAD, 2 * slots.slots)

    # -- who may wait ---------------------------------------------------------------------------------------------

    def take(self, sequence: Sequence, now: float) -> Failed | None:
        """Let a sequence wait, or refuse it at once."""
        number, digest = sequence.submit.id, sequence.adapter
        if digest is not None and (aside := self._breaker.aside_s(digest, now)):
            return self._set_aside(sequence, aside)
        if digest is not None and self._slots.barred(digest):
            retry = self.forecast.clamp(0.0)
            return Failed(number, "adapter_capacity", ALL_PINNED, retry_after_s=retry)
        if refusal := self._too_late(sequence):
            return refusal
        # A burst between two steps waits beside rows that are still free: those places count too.
        if len(self.queue) >= self._queue_limit + self._free:
            youngest = self.queue.longest(sequence.scope)
            if youngest is None:
                return self._full(sequence)
            self._end(youngest, self._full(youngest))
        self.queue.push(sequence)
        return None

    @property
    def _free(self) -> int:
        return self._rows.free + self.lent

    def _set_aside(self, sequence: Sequence, wait_s: float) -> Failed:
        doubt = self._breaker.doubt(sequence.adapter or "") or Doubt.NUMERICS
        return Failed(sequence.submit.id, "adapter_quarantined", doubt.value, retry_after_s=wait_s)

    def _full(self, sequence: Sequence) -> Failed:
        retry = self.forecast.retry_s(len(self.queue))
        digest = sequence.adapter
        if digest is not None and not self._slots.can_have(digest):
            why = "Every slot is in use, and so is every place to wait for one."
            return Failed(sequence.submit.id, "adapter_capacity", why, retry_after_s=retry)
        why = f"{self._queue_limit} requests wait already."
        return Failed(sequence.submit.id, "queue_full", why, retry_after_s=retry)

    def _too_late(self, sequence: Sequence) -> Failed | None:
        """The refusal of a sequence that could not even start before its deadline. Its load starts all the same."""
        deadline_s, free = sequence.submit.deadline_s, self._free
        load_s = 0.0 if sequence.adapter is None else self._load_s(sequence.adapter)
        wait_s = self.forecast.wait_s(len(self.queue), free)
        if wait_s >= deadline_s:  # behind all the others; now see how many of them are ahead in turn
            wait_s = self.forecast.wait_s(self.queue.ahead(sequence.scope, self.forecast.cost), free)
        expected_s = max(load_s, wait_s)
        if expected_s < deadline_s:
            return None
        if sequence.adapter is not None and load_s and self._may_want(sequence.adapter):
            state = self._loader.want(sequence.adapter)
            if state.load is Load.FAILED:  # no deadline would be long enough
                self._give_up(sequence.adapter)
                return Failed(sequence.submit.id, *state.failure, retry_after_s=state.retry_after_s)
        why = f"It would start in {expected_s:.1f} s; its deadline is in {deadline_s:.1f} s."
        retry = self.forecast.clamp(expected_s - deadline_s)
        return Failed(sequence.submit.id, "deadline_exceeded", why, retry_after_s=retry)

    def _load_s(self, digest: str) -> float:
        """What is left of the adapter's load. Somebody else may have begun it: a warm-up, a tenant, one refused."""
        if self._slots.holds(digest) or self._loader.bytes_of(digest):
            return 0.0
        whole_s = self.forecast.load_s(self._loader.source_of(digest), self._sizes.get(digest, 0))
        return max(0.0, whole_s - self._loader.loading_s(digest))

    # -- who starts -----------------------------------------------------------------------------------------------

    def look_ahead(self, now: float) -> list[Outgoing]:
        """Start the loads of those whose turn comes first, see which lanes could run, and end those that never can.

        Returns the endings, those of sequences that gave up their places among them.
        """
        missing: list[tuple[Lane, str]] = []
        for lane in self.queue.lanes():
            digest = lane.scope.adapter
            if digest is not None and (aside := self._breaker.aside_s(digest, now)):
                for sequence in list(lane.waiting.values()):
                    self._end(sequence, self._set_aside(sequence, aside))
            elif digest is None or self._slots.holds(digest):
                self._loaded(lane, digest, now)
            else:
                missing.append((lane, digest))
        missing.sort(key=lambda at: self.queue.rank(at[0]))
        self._wanted, self._room = set(), self._loader.budget_bytes
        for lane, digest in missing:
            if self._loader.bytes_of(digest):
                self._may_want(digest)
                self._take_up(lane, digest, now)
            else:
                self._load(lane, digest, now)
        return self.endings()

    def _may_want(self, digest: str) -> bool:
        """Whether there is room on the host for this adapter beside those whose turn comes before."""
        if digest not in self._wanted and len(self._wanted) < self._lookahead:
            size = self._size_of(digest)
            if size <= self._room or not self._wanted:
                self._wanted.add(digest)
                self._room -= size
        return digest in self._wanted

    def _give_up(self, digest: str) -> None:
        """It does not load: leave its room to others."""
        self._wanted.discard(digest)
        self._room += self._size_of(digest)

    def _size_of(self, digest: str) -> int:
        """As it is on the host, or was, or like the last one there."""
        return self._loader.bytes_of(digest) or self._sizes.get(digest, self._usual_size)

    def forget(self, key: Key) -> None:
        """Nobody listens for this sequence any more, be it waiting or refused just now."""
        self.queue.remove(key)
        self._refused = [outgoing for outgoing in self._refused if outgoing[0] != key]

    def endings(self) -> list[Outgoing]:
        """The endings since the last call of sequences that waited."""
        refused, self._refused = self._refused, []
        return refused

    def _load(self, lane: Lane, digest: str, now: float) -> None:
        self.queue.stand_back(lane)
        if not self._may_want(digest):
            return
        state = self._loader.want(digest)
        if state.load is Load.FAILED:
            self._give_up(digest)
            for sequence in list(lane.waiting.values()):
                self._end(sequence, Failed(sequence.submit.id, *state.failure, retry_after_s=state.retry_after_s))
            return
        if lane.loading_since is None:
            lane.loading_since = now
            for sequence in lane.waiting.values():  # also of those who could have run, before it was let go
                sequence.loaded_at = None

    def _take_up(self, lane: Lane, digest: str, now: float) -> None:
        """The lane's adapter is on the host: what waits for it could run."""
        state = self._loader.want(digest)
        size = self._sizes[digest] = self._usual_size = self._loader.bytes_of(digest)
        self._sizes.move_to_end(digest)
        if len(self._sizes) > KNOWN_SIZES:
            self._sizes.popitem(last=False)
        if lane.loading_since is not None:
            self.forecast.loaded(state.source, size, now - lane.loading_since)
        for sequence in lane.waiting.values():
            if sequence.source == "device":  # it has come since, or its adapter has left the slot
                sequence.source = "host"
        self._loaded(lane, digest, now)

    def _loaded(self, lane: Lane, digest: str | None, now: float) -> None:
        self.queue.step_up(lane)
        for sequence in reversed(lane.waiting.values()):
            if sequence.loaded_at is not None:
                break
            sequence.loaded_at = now
            # Who came before this step waited for the load, whoever else asked for it; who comes now finds it done.
            times = self._loader.brought(digest) if digest is not None and sequence.arrived_at < now else None
            if times is not None:
                sequence.source, sequence.load = times.source, times

    def starts(self, running: Collection[Sequence], now: float) -> Iterator[tuple[Sequence, Placement | None]]:
        """Those who start now, in their turns, each with its lease. The caller takes rows for one, and charges it,
        before it asks for the next."""
        self._drains = {victim: heir for victim, heir in self._drains.items() if self._drains_on(victim, heir)}
        lanes = self.queue.in_turn() if self._rows.free else []
        awaited = {lane.scope.adapter or "" for lane in lanes} - set(self._drains)
        while lanes and self._rows.free:
            lane = lanes.pop(0)
            sequence, digest, spare = lane.head, lane.scope.adapter, awaited
            if digest is not None:
                if self._breaker.aside_s(digest, now):  # another of this very moment tries it out
                    continue
                if not self._slots.holds(digest) and not self._loader.bytes_of(digest):
                    # Its slot went to one who started just now, and the host has let go of it.
                    self.queue.stand_back(lane)
                    continue
                if self._patient(lane, now):
                    spare = self._before(lane) - set(self._drains)
                if digest in self._drains or not self._slots.can_have(digest, spare):
                    self._block(lane, digest, running, now)
                    continue
            if sequence.width > self._rows.free:
                return
            self.queue.remove(sequence.key)
            lane.blocked_since = None
            yield sequence, None if digest is None else self._slots.acquire(digest, spare)
            # Counters moved, and another tenant's adapter may lie in a slot now: all from the first again.
            lanes = self.queue.in_turn()

    def _patient(self, lane: Lane, now: float) -> bool:
        return lane.blocked_since is not None and now - lane.blocked_since >= self._patience_s

    def _before(self, lane: Lane) -> set[str]:
        """The adapters of those whose turn comes before."""
        mine = self.queue.rank(lane)
        return {o.scope.adapter or "" for o in self.queue.lanes() if o.ready and self.queue.rank(o) < mine}

    def _block(self, lane: Lane, digest: str, running: Collection[Sequence], now: float) -> None:
        """No slot can be had: count the time, and once it is enough choose a slot to drain."""
        if lane.blocked_since is None:
            lane.blocked_since = now
        heirs = self._drains.values()
        if self._patient(lane, now) and not self._slots.holds(digest) and digest not in heirs:
            self._drain_for(lane, digest, running)

    def _drain_for(self, lane: Lane, digest: str, running: Collection[Sequence]) -> None:
        """Choose the slot that this lane will have: of those whose turn comes later, or for whom nobody waits, the one
        that can be had the soonest."""
        if len(self._drains) >= max(1, self._slots.slots // 4):
            return
        spared = {*self._before(lane), *self._slots.pinned, *self._drains}
        left: dict[str, int] = {}
        for sequence in running:
            if sequence.adapter is not None and sequence.adapter not in spared:
                left[sequence.adapter] = max(left.get(sequence.adapter, 0), sequence.tokens_left)
        if left:
            self._drains[min(left, key=lambda victim: left[victim])] = digest

    def _drains_on(self, victim: str, heir: str) -> bool:
        waits = any(lane.ready and lane.scope.adapter == heir for lane in self.queue.lanes())
        pinned = victim in self._slots.pinned  # since it was chosen
        return waits and not pinned and self._slots.holds(victim) and not self._slots.holds(heir)

    # -- endings and books ----------------------------------------------------------------------------------------

    def balanced(self) -> bool:
        """The books agree: true between any two calls."""
        return self.queue.balanced() and len(self._drains) <= max(1, self._slots.slots // 4)

    def _end(self, sequence: Sequence, refusal: Failed) -> None:
        self.queue.remove(sequence.key)
        sequence.state = State.FINISHED
        self._refused.append((sequence.key, refusal))
