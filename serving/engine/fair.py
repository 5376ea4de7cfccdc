"""Whose turn it is: waiting sequences in queues by tenant and adapter, and counts of what each was given.

Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models"), on two levels: the tenant with
the least counter goes first, and of its adapters the one with the least. Who has something to run again after a while
is lifted to the least of those who have: being idle earns nothing. Ties go to who came first. Knows nothing of rows,
slots or time.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serving.engine.kv import Scope
from serving.engine.plan import Key
from serving.engine.request import BASE_LANE, OTHER_LANES
from serving.engine.sequence import Sequence

INPUT, OUTPUT = 1, 2  # what a token of a prompt and a token of an answer count
KEPT = 4096  # counters that are remembered; of the idle, those that owe the least are forgotten first
TOLD = 20  # lanes whose length heartbeats tell one by one
Rank = tuple[int, int, int]
_Who = TypeVar("_Who", bound=Hashable)


class Counters(Generic[_Who]):
    """Virtual tokens that each was given. Active are those who have something that could run."""

    def __init__(self) -> None:
        self._given: dict[_Who, int] = {}
        self._active: set[_Who] = set()
        self._last_left: _Who | None = None
        self._least: int | None = None  # of the active, until one of them is charged

    @property
    def active(self) -> int:
        """How many have something that could run."""
        return len(self._active)

    def of(self, who: _Who) -> int:
        """The counter as it is, or as it would be if `who` joined now."""
        given = self._given.get(who, 0)
        return given if who in self._active else max(given, self._floor())

    def join(self, who: _Who) -> None:
        """`who` has something to run: lift its counter to the least of the active, if it is below."""
        if who not in self._active:
            self._given[who] = self.of(who)
            self._active.add(who)
            self._least = None

    def leave(self, who: _Who) -> None:
        """`who` has nothing more to run; its counter stays."""
        if who in self._active:
            self._active.remove(who)
            self._last_left, self._least = who, None
            self._forget()

    def charge(self, who: _Who, tokens: int) -> None:
        """Count what `who` was given, be it active or not."""
        self._given[who] = self._given.get(who, 0) + tokens
        if who in self._active:
            self._least = None

    def _floor(self) -> int:
        if self._active:
            if self._least is None:
                self._least = min(self._given[who] for who in self._active)
            return self._least
        return 0 if self._last_left is None else self._given[self._last_left]

    def _forget(self) -> None:
        if len(self._given) > KEPT + len(self._active):
            idle = sorted((given, at) for at, (who, given) in enumerate(self._given.items()) if self._idle(who))
            gone = {at for _, at in idle[: len(idle) // 2]}
            self._given = {who: given for at, (who, given) in enumerate(self._given.items()) if at not in gone}

    def _idle(self, who: _Who) -> bool:
        return who not in self._active and who != self._last_left


@dataclass(slots=True)
class Lane:
    """The waiting sequences of one tenant for one adapter, in the order they came.

    ready: its adapter is on the device or the host, so that rows and slots are all it waits for; a lane whose adapter
    still loads has no turn, and gains none by it. blocked_since: since when no slot can be had for it.
    """

    scope: Scope
    ready: bool = False
    loading_since: float | None = None
    blocked_since: float | None = None
    waiting: OrderedDict[Key, Sequence] = field(default_factory=OrderedDict)

    @property
    def head(self) -> Sequence:
        return next(iter(self.waiting.values()))


class FairQueue:
    """All sequences that wait, by lane. A lane exists while something waits in it."""

    def __init__(self) -> None:
        self._lanes: dict[Scope, Lane] = {}
        self._by_key: dict[Key, Sequence] = {}
        self._by_tenant: Counter[str] = Counter()
        self._tenants: Counters[str] = Counters()
        self._adapters: dict[str, Counters[str | None]] = {}
        self._turns: Iterator[int] = itertools.count()

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def values(self) -> Iterable[Sequence]:
        """Every sequence, in the order they came."""
        return self._by_key.values()

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait at the end of its lane."""
        scope = sequence.scope
        sequence.turn = next(self._turns)
        self._lanes.setdefault(scope, Lane(scope)).waiting[sequence.key] = sequence
        self._by_key[sequence.key] = sequence
        self._by_tenant[scope.salt] += 1

    def remove(self, key: Key) -> Sequence | None:
        """Take a sequence out, wherever it stands; None if it does not wait."""
        sequence = self._by_key.pop(key, None)
        if sequence is not None:
            scope = sequence.scope
            lane = self._lanes[scope]
            del lane.waiting[key]
            self._by_tenant[scope.salt] -= 1
            if not lane.waiting:
                self.stand_back(lane)
                del self._lanes[scope]
                if not self._by_tenant[scope.salt]:
                    del self._by_tenant[scope.salt]
        return sequence

    def step_up(self, lane: Lane) -> None:
        """The lane could run: it takes part in the turns."""
        if not lane.ready:
            lane.ready, lane.loading_since = True, None
            self._adapters_of(lane.scope.salt).join(lane.scope.adapter)
            self._tenants.join(lane.scope.salt)

    def stand_back(self, lane: Lane) -> None:
        """The lane cannot run: no turn is kept for it."""
        if lane.ready:
            lane.ready = False
            adapters = self._adapters_of(lane.scope.salt)
            adapters.leave(lane.scope.adapter)
            if not adapters.active:
                self._tenants.leave(lane.scope.salt)

    def charge(self, scope: Scope, tokens: int) -> None:
        """Count virtual tokens that a sequence of this scope was given, waiting or running."""
        self._tenants.charge(scope.salt, tokens)
        self._adapters_of(scope.salt).charge(scope.adapter, tokens)

    def counters(self, scope: Scope) -> tuple[int, int]:
        """What the tenant, and the adapter within the tenant, were given so far."""
        return self._tenants.of(scope.salt), self._adapters_of(scope.salt).of(scope.adapter)

    def rank(self, lane: Lane) -> Rank:
        """Whose turn comes first: the least of these."""
        return (*self.counters(lane.scope), lane.head.turn)

    def lanes(self) -> list[Lane]:
        """Every lane, in no order that matters."""
        return list(self._lanes.values())

    def in_turn(self) -> list[Lane]:
        """Every lane that could run, whose turn it is first."""
        return sorted((lane for lane in self._lanes.values() if lane.ready), key=self.rank)

    def lane(self, scope: Scope) -> Lane | None:
        """The lane of this scope, if something waits there."""
        return self._lanes.get(scope)

    def longest(self, scope: Scope) -> Sequence | None:
        """Who gives up a place, when all are taken, for a newcomer of this scope: the youngest sequence of the longest
        lane of the tenant with the most; None when the newcomer's own have as many as any."""
        tenant = max(self._by_tenant, key=lambda t: self._by_tenant[t], default=scope.salt)
        if self._by_tenant[tenant] <= self._by_tenant[scope.salt] + 1:
            tenant = scope.salt
        lanes = [lane for lane in self._lanes.values() if lane.scope.salt == tenant]
        lane = max(lanes, key=lambda lane: len(lane.waiting), default=None)
        own = self._lanes.get(scope)
        if lane is None or (tenant == scope.salt and len(lane.waiting) <= (len(own.waiting) if own else 0) + 1):
            return None
        return next(reversed(lane.waiting.values()))

    def ahead(self, scope: Scope, cost: float) -> int:
        """How many of those who wait start before a newcomer of this scope, if each costs so many virtual tokens."""
        tenant, adapter = self.counters(scope)
        own = self._lanes.get(scope)
        count = len(own.waiting) if own else 0
        others = [lane for lane in self._lanes.values() if lane.ready and lane is not own]
        mine = [(self.counters(o.scope)[1], len(o.waiting)) for o in others if o.scope.salt == scope.salt]
        count += _before(adapter, count, mine, cost)
        theirs: Counter[str] = Counter()
        for other in others:
            theirs[other.scope.salt] += len(other.waiting)
        del theirs[scope.salt]
        return count + _before(tenant, count, [(self._tenants.of(t), waits) for t, waits in theirs.items()], cost)

    def waiting_by(self) -> dict[str, int]:
        """How many wait for each adapter, of those with the most, for the base, and for all others together."""
        found: Counter[str] = Counter()
        for lane in self._lanes.values():
            found[lane.scope.adapter or BASE_LANE] += len(lane.waiting)
        told = dict(found.most_common(TOLD))
        rest = found.total() - sum(told.values())
        return {**told, OTHER_LANES: rest} if rest else told

    def oldest(self) -> Sequence | None:
        """Who waits longest."""
        return next(iter(self._by_key.values()), None)

    def balanced(self) -> bool:
        """The books agree: true between any two calls."""
        lanes = self._lanes.values()
        return (
            sum(len(lane.waiting) for lane in lanes) == len(self._by_key) == self._by_tenant.total()
            and all(lane.waiting for lane in lanes)
            and sum(adapters.active for adapters in self._adapters.values()) == sum(lane.ready for lane in lanes)
            and self._tenants.active == len({lane.scope.salt for lane in lanes if lane.ready})
        )

    def _adapters_of(self, tenant: str) -> Counters[str | None]:
        found = self._adapters.get(tenant)
        if found is None:
            found = self._adapters[tenant] = Counters()
        return found


def _before(mine: int, ahead: int, others: Iterable[tuple[int, int]], cost: float) -> int:
    """Of others, as (counter, waiting): how many start before mine, which start once `ahead` others of mine have."""
    reach = mine + ahead * cost
    return sum(min(waits, int((reach - given) // cost) + 1) for given, waits in others if given <= reach)
