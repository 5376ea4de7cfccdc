"""What is prefetched: the most asked for that lies nowhere, into what is empty, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from serving.answers import Ended, Usage
from serving.engine.request import Failed, Heartbeat, Moved
from serving.prefetch import LEAST, Prefetch, Room, choose, room_of
from serving.resolver import Weights
from tests.fakes import FakeEngine

pytestmark = pytest.mark.anyio
SEED = 20261122
EMPTY = Room(frozenset(), frozenset(), 4, 1000)
SIZES = dict.fromkeys("abcdef", 100)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_the_most_asked_for_comes_first() -> None:
    assert choose({"a": 3, "b": 9, "c": 5}, SIZES, EMPTY) == ["b", "c"]


def test_one_request_alone_is_no_traffic() -> None:
    assert choose({"a": LEAST - 0.1}, SIZES, EMPTY) == []


def test_what_lies_in_a_slot_is_left_alone_and_what_lies_on_the_host_needs_an_empty_slot() -> None:
    room = replace(EMPTY, device=frozenset("a"), host=frozenset("b"))
    assert choose({"a": 9, "b": 8}, SIZES, room) == ["b"]
    assert choose({"a": 9, "b": 8}, SIZES, replace(room, empty_slots=0)) == []


def test_without_slots_the_host_is_filled_as_far_as_its_bytes_go() -> None:
    room = replace(EMPTY, empty_slots=0, free_bytes=250)
    assert choose(dict.fromkeys("abcd", 5.0), SIZES, room, most=9) == ["a", "b"]
    assert choose({"a": 9, "b": 5}, {"a": 300, "b": 100}, room) == ["b"]


def test_what_is_set_aside_or_of_unknown_size_is_not_brought() -> None:
    assert choose({"a": 9, "x": 9}, SIZES, replace(EMPTY, barred=frozenset("a"))) == []


def test_what_is_chosen_always_fits() -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    for _ in range(2000):
        names = [str(n) for n in range(rng.randrange(12))]
        sizes = {n: rng.randrange(1, 400) for n in names}
        demand = {n: rng.uniform(0, 10) for n in names}
        device = frozenset(n for n in names if rng.random() < 0.3)
        host = device | frozenset(n for n in names if rng.random() < 0.3)
        room = Room(device, host, rng.randrange(3), rng.randrange(1000))
        chosen = choose(demand, sizes, room, most=5)
        new = [n for n in chosen if n not in host]
        assert sum(sizes[n] for n in new) <= room.free_bytes
        assert sum(n in host for n in chosen) <= room.empty_slots
        assert not set(chosen) & device
        assert all(demand[n] >= LEAST for n in chosen)
        assert chosen == sorted(chosen, key=lambda n: -demand[n])


class Engine(FakeEngine):
    """An engine with room, that remembers what it was asked to warm."""

    tell: Callable[[str], Moved | Failed]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: list[str] = []
        self.tell = lambda digest: Failed(0, "adapter_load_failed", "planted")

    @property
    def heartbeat(self) -> Heartbeat | None:
        beat = super().heartbeat
        return None if beat is None else msgspec.structs.replace(beat, slots=(), host_digests=(), host_bytes=0)

    async def warm(self, digest: str, ttl_s: float) -> Moved | Failed:
        self.asked.append(digest)
        return self.tell(digest)


def ended(digest: str | None) -> Ended:
    return Ended(Weights("m", "b" * 64, "sum", 1, digest), "complete", (), Usage(1, 1), 1, 1, 0.1, 0.2, None)


async def test_what_was_asked_for_is_warmed_and_a_failure_is_left_alone_for_a_while() -> None:
    engine, time = Engine(), [0.0]
    prefetch = Prefetch(engine, lambda digest: 10, now=lambda: time[0])
    for digest in ("a", "a", "a", "b", None):
        prefetch.ended(ended(digest))
    await prefetch.tick()
    await prefetch.tick()
    assert engine.asked == ["a"]
    time[0] = 61.0
    await prefetch.tick()
    assert engine.asked == ["a", "a"]
    assert prefetch.warmed == 0


async def test_what_nobody_asks_for_any_more_is_forgotten() -> None:
    engine, time = Engine(), [0.0]
    prefetch = Prefetch(engine, lambda digest: 10, now=lambda: time[0])
    for _ in range(4):
        prefetch.ended(ended("a"))
    time[0] = 600.0
    await prefetch.tick()
    assert engine.asked == []


async def test_without_an_engine_nothing_is_tried() -> None:
    engine = Engine(connected=False)
    prefetch = Prefetch(engine, lambda digest: 10)
    for _ in range(4):
        prefetch.ended(ended("a"))
    await prefetch.tick()
    assert engine.asked == []


def test_a_heartbeat_tells_the_room() -> None:
    beat = FakeEngine().heartbeat
    assert beat is not None
    room = room_of(msgspec.structs.replace(beat, quarantined=("q",), host_bytes=100, host_bytes_limit=1000))
    assert (room.empty_slots, room.free_bytes, room.barred) == (4, 900, frozenset("q"))


async def test_what_left_service_is_not_brought_back_however_much_it_was_asked_for() -> None:
    """A version that was retired while it was popular was loaded again every other second, and dropped each time."""
    engine, gone = Engine(), {"a"}
    engine.tell = lambda digest: Moved(1, digest, "host", 10)
    prefetch = Prefetch(engine, lambda digest: 10, now=lambda: 0.0, unwanted=lambda: gone)
    for digest in ("a", "a", "a", "b", "b", "b"):
        prefetch.ended(ended(digest))
    await prefetch.tick()
    assert engine.asked == ["b"]
    gone.clear()
    await prefetch.tick()
    assert engine.asked[1:] == ["a", "b"], "restored, it is one of them again"


async def test_what_leaves_service_while_another_loads_is_not_brought_after_it() -> None:
    engine, gone = Engine(), set[str]()

    def tell(digest: str) -> Moved:
        gone.add("b")
        return Moved(1, digest, "host", 10)

    engine.tell = tell
    prefetch = Prefetch(engine, lambda digest: 10, unwanted=lambda: gone)
    for digest in ("a", "a", "a", "a", "b", "b", "b"):
        prefetch.ended(ended(digest))
    await prefetch.tick()
    assert engine.asked == ["a"]
