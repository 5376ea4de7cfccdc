"""What routing by residency is worth, on simulated replicas: loads saved, rows evened out, a hot adapter spread."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.engine.request import SlotState
from serving.routing import DEVICE, Candidate, Heat, Ledger, choose
from tests.heartbeats import beat

SEED = 20261122
ROWS, SLOTS, REPLICAS, ADAPTERS, TICKS_A_BEAT, TICKS_AN_ANSWER = 16, 8, 2, 14, 5, 20


@dataclass
class Simulated:
    """A replica with slots that go to the least recently used, and answers that take a while."""

    ledger: Ledger = field(default_factory=Ledger)
    slots: OrderedDict[str, None] = field(default_factory=OrderedDict)
    running: list[tuple[int, str]] = field(default_factory=list)
    loads: int = 0

    def take(self, adapter: str, now: int) -> None:
        self.ledger.sent(adapter, (now,))
        self.running.append((now, adapter))
        self.warm(adapter)

    def warm(self, adapter: str) -> None:
        if adapter not in self.slots:
            self.loads += 1
            while len(self.slots) >= SLOTS:
                self.slots.popitem(last=False)
        self.slots[adapter] = None
        self.slots.move_to_end(adapter)

    def tick(self, now: int) -> None:
        for begun, adapter in [r for r in self.running if now - r[0] >= TICKS_AN_ANSWER]:
            self.running.remove((begun, adapter))
            self.ledger.ended(adapter, (begun,))
        if now % TICKS_A_BEAT == 0:
            leases = Counter(adapter for _, adapter in self.running)
            slots = tuple(SlotState(adapter, leases[adapter], 4) for adapter in self.slots)
            self.ledger.heard(beat(running=len(self.running), rows=ROWS, slots=slots, slots_total=SLOTS))


Pick = Callable[[dict[str, Simulated], str, random.Random], str]


def by_residency(replicas: dict[str, Simulated], adapter: str, rng: random.Random) -> str:
    books = {name: r.ledger for name, r in replicas.items()}
    found = [Candidate(n, b.residency(adapter), b.load, adapters=b.adapters) for n, b in books.items()]
    return choose(found, rng).name


def by_load(replicas: dict[str, Simulated], adapter: str, rng: random.Random) -> str:
    return choose([Candidate(n, DEVICE, r.ledger.load) for n, r in replicas.items()], rng).name


def play(
    pick: Pick, ticks: int, popular: Callable[[random.Random], str], *, copies: bool = True
) -> dict[str, Simulated]:
    rng = random.Random(SEED)
    replicas = {str(at): Simulated() for at in range(REPLICAS)}
    heat = Heat()
    for now in range(ticks):
        for replica in replicas.values():
            replica.tick(now)
        adapter = popular(rng)
        replicas[pick(replicas, adapter, rng)].take(adapter, now)
        if copies and now % TICKS_A_BEAT == 0:
            demand: Counter[str] = Counter()
            for replica in replicas.values():
                demand += replica.ledger.demand()
            heat.note(demand, now / 10)
            for digest, name in heat.copies({n: r.ledger for n, r in replicas.items()}):
                replicas[name].warm(digest)
    return replicas


def loads(replicas: dict[str, Simulated]) -> int:
    return sum(replica.loads for replica in replicas.values())


def test_fourteen_adapters_over_two_times_eight_slots_are_loaded_about_once_each() -> None:
    """By load alone both replicas see all fourteen and evict for ever; by residency each keeps its share."""
    print(f"seed {SEED}")
    names = [f"{at:064d}" for at in range(ADAPTERS)]
    kept = loads(play(by_residency, 2000, lambda rng: rng.choice(names)))
    thrown = loads(play(by_load, 2000, lambda rng: rng.choice(names)))
    print(f"2000 requests: {kept} loads by residency, {thrown} by load alone")
    assert kept <= 2 * ADAPTERS
    assert thrown > 20 * kept


def test_a_skewed_load_is_evened_out_all_the_same() -> None:
    """One adapter in two takes half of everything: both replicas still get a fair share of the sequences."""
    names = [f"{at:064d}" for at in range(ADAPTERS)]
    replicas = play(by_residency, 2000, lambda rng: names[0] if rng.random() < 0.5 else rng.choice(names))
    held = Counter(adapter for r in replicas.values() for adapter in r.slots)
    assert held[names[0]] == REPLICAS
    loaded = [r.ledger.load for r in replicas.values()]
    print(loaded, loads(replicas))
    assert max(loaded) <= 1.0
    assert max(loaded) - min(loaded) <= 0.5
    assert loads(replicas) <= 4 * ADAPTERS


def test_a_single_hot_adapter_uses_every_replica() -> None:
    replicas = play(by_residency, 500, lambda rng: "0" * 64)
    assert [len(r.running) > 5 for r in replicas.values()] == [True] * REPLICAS
    assert loads(replicas) == REPLICAS
