"""The host tier: one load a digest, nobody behind another's, failures remembered, the budget kept, nothing left."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from adapters.errors import AdapterLoadFailed, AdapterRefused, Reason, RecordNotFound
from serving.below import Figures
from serving.engine.lora import HostAdapter
from serving.engine.plan import Load
from serving.engine.request import LOAD_BUCKETS_S, LoadTimes
from serving.load_workers import BUILD, DISK, STORE, STORE_WORKERS, WRITE
from serving.loader import MAX_UNDER_WAY, MAX_WRITES, Bringing, HostTier
from tests.tiers_case import TierCase, adapter_of, digest_of, disk_tier

SEED = 20261122
KIB = 1 << 10
ONE, TWO, THREE = (digest_of(n) for n in (1, 2, 3))


class Shelf:
    """A tier below that remembers what it was told. Implements serving.below.Below."""

    figures = Figures()

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.dropped: list[str] = []

    def keep(self, adapter: HostAdapter, times: LoadTimes) -> None:
        self.kept.append(adapter.digest)

    def drop(self, digest: str) -> None:
        self.dropped.append(digest)

    def bytes_of(self, digest: str) -> int:
        return 0


def test_L05_500_first_requests_for_one_adapter_are_one_load() -> None:
    case = TierCase()
    states = {case.tier.want(ONE).load for _ in range(500)}
    assert states == {Load.LOADING}
    assert case.tier.loading == 1
    case.settle()
    assert {case.tier.want(ONE).load for _ in range(500)} == {Load.READY}
    assert case.reads == [ONE]
    assert case.tier.counts.loads == {"store": 1}


def test_L05_a_slow_load_delays_others_by_nothing() -> None:
    """Eight reads of two seconds are stuck in the store; what comes from there after them is not behind them, nor is
    what lies on the disk: their times hold none of those two seconds."""
    case = TierCase()
    slow = [digest_of(100 + n) for n in range(8)]
    for digest in slow:
        case.tier.want(digest)
    case.workers.run(DISK)
    stuck = list(case.workers.waiting[STORE])
    case.workers.waiting[STORE].clear()
    assert len(stuck) == len(slow) < STORE_WORKERS
    case.time += 1.0
    for digest in (ONE, TWO):
        assert case.load(digest) == [Load.READY]
        times = case.tier.want(digest).times
        assert times == LoadTimes("store", bytes=4096)
    case.time += 1.0
    for task in stuck:
        task()
    case.settle()
    assert [case.tier.want(digest).load for digest in slow] == [Load.READY] * 8
    assert case.idle()


def test_a_store_that_hangs_holds_up_neither_the_disk_nor_those_it_answers() -> None:
    """On real threads: reads of eight adapters hang until the end."""
    go, woken = threading.Event(), threading.Event()
    hanging = {digest_of(100 + n) for n in range(8)}

    def bring(digest: str) -> Bringing:
        if digest != ONE:  # ONE lies on the disk
            yield STORE
            if digest in hanging:
                go.wait(60)
            yield BUILD
        return adapter_of(digest)

    tier = HostTier(bring, budget_bytes=1 << 20, workers=1, negative_cache_s=5.0, wake=woken.set)
    for digest in [*hanging, ONE, TWO]:
        tier.want(digest)
    while {tier.want(d).load for d in (ONE, TWO)} != {Load.READY}:
        assert woken.wait(30)
        woken.clear()
        tier.poll()
    assert tier.loading == len(hanging)
    go.set()
    while tier.loading:
        assert woken.wait(30)
        woken.clear()
        tier.poll()
    tier.close()


def test_F13_200_cancels_during_a_load_leave_no_id_loading() -> None:
    """Requests come and go while one load is under way; it ends all the same, and whoever comes next has it."""
    case = TierCase()
    for _ in range(200):
        case.tier.want(ONE)  # and then its request is cancelled: nobody asks again
    case.time += 60.0
    case.settle()
    assert case.idle()
    assert case.tier.want(ONE).load is Load.READY
    assert case.reads == [ONE]


def test_F13_loads_that_nobody_waits_for_any_more_are_never_begun() -> None:
    case = TierCase(budget_bytes=1 << 22)
    digests = [digest_of(n) for n in range(MAX_UNDER_WAY + 200)]
    for digest in digests:
        case.tier.want(digest)
    assert case.tier.loading == len(digests)
    case.time += 60.0  # all 264 were cancelled
    case.settle()
    assert case.idle()
    assert len(case.reads) == MAX_UNDER_WAY
    assert case.load(digests[-1]) == [Load.READY]


def test_more_loads_than_may_be_under_way_come_in_order() -> None:
    case = TierCase(budget_bytes=1 << 22)
    digests = [digest_of(n) for n in range(MAX_UNDER_WAY + 50)]
    for digest in digests:
        case.tier.want(digest)
    case.settle()
    case.settle()
    assert case.reads == digests
    assert case.idle()


def test_a_failed_load_is_refused_with_its_reason_each_time_for_twice_as_long() -> None:
    def read(digest: str) -> HostAdapter:
        raise AdapterLoadFailed("the store is on fire")

    case = TierCase(read)
    waits = []
    for _ in range(6):
        case.load(ONE)
        state = case.tier.want(ONE)
        assert state.load is Load.FAILED
        assert "on fire" in state.failure[1]
        waits.append(state.retry_after_s)
        assert case.load(ONE) == [Load.FAILED]  # not read again before its time
        case.time += state.retry_after_s or 0.0
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert len(case.reads) == 6
    assert case.tier.counts.loads == {"failed": 6}


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (RecordNotFound("no such blob"), False),
        (AdapterLoadFailed("of another base", retry_after_s=None), True),
        (AdapterRefused(Reason.RANK, "rank 99"), True),
        (RuntimeError("a bug"), False),
        (MemoryError(), False),
    ],
)
def test_only_what_will_never_work_says_not_to_come_again(error: Exception, permanent: bool) -> None:
    def read(digest: str) -> HostAdapter:
        raise error

    case = TierCase(read)
    case.load(ONE)
    assert (case.tier.want(ONE).retry_after_s is None) == permanent


def test_after_its_time_a_failed_adapter_that_was_mended_loads() -> None:
    broken = {ONE}

    def read(digest: str) -> HostAdapter:
        if digest in broken:
            raise AdapterLoadFailed("not yet")
        return adapter_of(digest)

    case = TierCase(read)
    assert case.load(ONE, TWO) == [Load.FAILED, Load.READY]
    broken.clear()
    case.time += 5.0
    assert case.load(ONE) == [Load.READY]


def test_5000_absent_names_evict_nothing_and_are_forgotten_in_bounds() -> None:
    def read(digest: str) -> HostAdapter:
        if int(digest, 16) >= 1000:
            raise RecordNotFound("no such blob")
        return adapter_of(digest)

    case = TierCase(read, budget_bytes=3 * 4096)
    case.load(ONE, TWO, THREE)
    held = case.tier.digests()
    for n in range(1000, 6000):
        case.tier.want(digest_of(n))
        case.settle()
    assert case.tier.digests() == held
    assert case.tier.evictions == 0
    assert len(case.tier._failed) <= 4096
    assert case.idle()


def test_what_came_from_the_store_is_written_below_and_what_came_from_the_disk_is_not(tmp_path: Path) -> None:
    disk, shelf = disk_tier(tmp_path), Shelf()
    disk.put(adapter_of(ONE), 0.1)
    case = TierCase(disk=disk, below=shelf)
    assert case.load(ONE, TWO) == [Load.READY, Load.READY]
    assert [case.tier.want(d).source for d in (ONE, TWO)] == ["disk", "store"]
    assert case.reads == [TWO]
    assert shelf.kept == [TWO]
    assert case.tier.take(ONE)[1].source == "disk"
    assert case.tier.want(ONE).source == "host"


def test_adapters_that_wait_to_be_written_are_few() -> None:
    shelf = Shelf()
    case = TierCase(below=shelf)
    for n in range(50):
        case.tier.want(digest_of(n))
    case.settle(DISK, STORE)
    assert len(case.workers.waiting[WRITE]) == MAX_WRITES
    case.settle()
    assert len(shelf.kept) == MAX_WRITES
    case.load(digest_of(99))
    assert len(shelf.kept) == MAX_WRITES + 1


def test_a_load_that_was_dropped_under_way_comes_to_nothing_and_a_new_one_counts() -> None:
    case = TierCase(below=(shelf := Shelf()))
    case.tier.want(ONE)
    case.workers.run(DISK)
    case.tier.drop(ONE)
    assert case.tier.loading == 0
    case.tier.want(ONE)
    case.settle()
    assert case.reads == [ONE, ONE]
    assert case.tier.counts.loads == {"store": 1}
    assert case.tier.held_bytes == 4096
    assert shelf.dropped == [ONE]


def test_what_a_dropped_load_has_brought_is_given_to_nobody() -> None:
    """Nor does another load that is under way get it, nor the next one of the same adapter: a drop may be for doubt."""
    case = TierCase()
    case.tier.want(ONE)
    case.workers.run()  # its result is there, and not yet taken in
    case.tier.drop(ONE)
    case.tier.want(TWO)
    case.tier.want(ONE)
    case.tier.poll()
    assert [case.tier.want(digest).load for digest in (ONE, TWO)] == [Load.LOADING] * 2
    assert case.tier.digests() == ()
    case.settle()
    assert [case.tier.take(digest)[0].digest for digest in (ONE, TWO)] == [ONE, TWO]
    assert sorted(case.reads) == [ONE, ONE, TWO]
    assert case.idle()


def test_a_load_tells_for_how_long_it_has_been_under_way_whoever_asks_again() -> None:
    case = TierCase()
    assert case.tier.loading_s(ONE) == 0.0
    case.tier.want(ONE)
    case.time += 1.5
    case.workers.run(DISK)  # it goes on to the next pool, and is wanted again: it is one load all the same
    case.tier.want(ONE)
    case.time += 1.0
    assert (case.tier.loading_s(ONE), case.tier.loading_s(TWO)) == (2.5, 0.0)
    case.settle()
    assert case.tier.loading_s(ONE) == 0.0


def test_each_part_of_a_load_is_timed_and_counted_by_source() -> None:
    case = TierCase()

    def bring(digest: str) -> Bringing:
        case.time += 0.25
        yield STORE
        case.time += 0.5
        yield BUILD
        case.time += 0.125
        return adapter_of(digest)

    case.tier._read = bring
    case.tier.want(ONE)
    case.time += 2.0
    case.settle()
    times = case.tier.want(ONE).times
    assert times == LoadTimes("store", queue_s=2.0, fetch_s=0.75, host_s=0.125, bytes=4096)
    histogram = case.tier.counts.histograms["store"]
    assert len(histogram) == len(LOAD_BUCKETS_S) + 1
    assert histogram[-1] == 1
    assert histogram[LOAD_BUCKETS_S.index(2.5)] == 0
    assert histogram[LOAD_BUCKETS_S.index(5.0)] == 1


def test_A06_a_storm_of_wants_drops_failures_and_evictions_ends_with_balanced_books() -> None:
    """20,000 random acts on 40 adapters, workers running a little at a time; then all of it comes to rest."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    sick = [0.2]

    def read(digest: str) -> HostAdapter:
        if rng.random() < sick[0]:
            raise AdapterLoadFailed("bad luck")
        return adapter_of(digest, 4 * KIB * (1 + int(digest, 16) % 4))

    case = TierCase(read, budget_bytes=64 * KIB)
    digests = [digest_of(n) for n in range(40)]
    for _ in range(20_000):
        digest = rng.choice(digests)
        act = rng.random()
        if act < 0.5 and case.tier.want(digest).load is Load.READY and rng.random() < 0.5:
            assert case.tier.take(digest)[0].digest == digest
        elif act < 0.55:
            case.tier.drop(digest)
        elif act < 0.6 and case.tier.bytes_of(digest):
            (case.tier.keep if rng.random() < 0.5 else case.tier.release)(digest)
        elif act < 0.8:
            busy = [pool for pool, tasks in case.workers.waiting.items() if tasks]
            if busy:
                case.workers.waiting[rng.choice(busy)].popleft()()
        else:
            case.tier.poll()
            assert case.tier.held_bytes == sum(case.tier.bytes_of(d) for d in case.tier.digests())
            assert case.tier.held_bytes <= 64 * KIB + 16 * KIB
            case.time += rng.random()
    sick[0] = 0.0
    case.time += 300.0
    case.settle()
    assert case.idle()
    assert case.tier._begun == case.tier._writes == 0
    for digest in digests:
        assert case.load(digest) == [Load.READY]
