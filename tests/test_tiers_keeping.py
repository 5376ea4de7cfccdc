"""Adapters that are warmed, pinned or dropped: what stays, what may go, and what is answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from adapters.errors import AdapterLoadFailed
from serving.engine.admission import ALL_PINNED
from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.plan import Key
from serving.engine.request import Drop, Failed, Finished, Keep, Moved, Pin, Timing, Tokens, Undrop, Unpin, Warm
from tests.engine_case import EngineCase, load_tiny, read_peft
from tests.test_engine_link import Replica, connected, replica

__all__ = ["replica"]  # the fixture of the link's tests

PROMPT = [5, 9, 33, 61, 17]
TTL_S = 60.0


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


def answered(case: EngineCase, key: Key) -> Moved | Failed:
    """What a Warm, Pin, Unpin or Drop came to."""
    case.run(lambda: case.told[key] is not None)
    told = case.told[key]
    assert isinstance(told, Moved | Failed)
    return told


def warm(case: EngineCase, adapter: Path, ttl_s: float = TTL_S) -> Moved | Failed:
    return answered(case, case.keep(partial(Warm, digest=str(adapter), ttl_s=ttl_s)))


def pin(case: EngineCase, adapter: Path, deadline_s: float = 30.0) -> Moved | Failed:
    return answered(case, case.keep(partial(Pin, digest=str(adapter), deadline_s=deadline_s)))


def drop(case: EngineCase, adapter: Path, deadline_s: float = 0.0) -> Moved | Failed:
    return answered(case, case.keep(partial(Drop, digest=str(adapter), deadline_s=deadline_s)))


def test_a_warmed_adapter_takes_an_empty_slot_but_nobodys(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=1)
    first, second = warm(case, tiny_adapters[0]), warm(case, tiny_adapters[1])
    assert isinstance(first, Moved)
    assert isinstance(second, Moved)
    assert (first.tier, second.tier) == ("device", "host")
    assert first.bytes > 0
    assert case.slots.evictions == 0


def test_what_is_warm_stays_on_the_host_until_its_time_is_over(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    budget = read_peft(tiny_adapters[0]).size_bytes + 1
    case = EngineCase(decoder, slots=1, budget_bytes=budget)
    warm(case, tiny_adapters[0])
    case.answer(case.submit(PROMPT, tiny_adapters[1]))
    assert str(tiny_adapters[0]) in case.host.digests()
    case.time += TTL_S
    case.answer(case.submit(PROMPT, tiny_adapters[2]))
    case.step()
    assert str(tiny_adapters[0]) not in case.host.digests()


def test_no_more_is_warm_than_the_host_holds(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=1, budget_bytes=read_peft(tiny_adapters[0]).size_bytes)
    assert isinstance(warm(case, tiny_adapters[0]), Moved)
    refused = warm(case, tiny_adapters[1])
    assert isinstance(refused, Failed)
    assert refused.code == "adapter_capacity"


def test_warming_what_cannot_be_loaded_says_why_and_when_to_try_again(decoder: Decoder) -> None:
    def read(digest: str) -> HostAdapter:
        raise AdapterLoadFailed("the blob has rotted")

    refused = warm(EngineCase(decoder, read=read), Path("rotten"))
    assert isinstance(refused, Failed)
    assert refused.code == "adapter_load_failed"
    assert "rotted" in refused.message
    assert refused.retry_after_s is not None


def test_a_pinned_adapter_is_never_evicted_and_an_unpinned_one_is(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=2)
    assert isinstance(pin(case, tiny_adapters[0]), Moved)
    for adapter in tiny_adapters[1:4]:
        case.answer(case.submit(PROMPT, adapter))
        assert case.slots.holds(str(tiny_adapters[0]))
    answered(case, case.keep(partial(Unpin, digest=str(tiny_adapters[0]))))
    for adapter in tiny_adapters[4:6]:
        case.answer(case.submit(PROMPT, adapter))
    assert not case.slots.holds(str(tiny_adapters[0]))


def test_an_unpin_overtakes_the_pin_that_still_waits_for_its_load(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    """The simulator found it: a replica that was greeted with a pin, and told to unpin while the adapter was loading,
    kept it pinned for ever; its one slot was taken, and every other adapter's requests waited until their deadline."""
    case = EngineCase(decoder, slots=1)
    waits = case.keep(partial(Pin, digest=str(tiny_adapters[0]), deadline_s=30.0))
    case.step()
    assert isinstance(answered(case, case.keep(partial(Unpin, digest=str(tiny_adapters[0])))), Moved)
    overtaken = answered(case, waits)
    assert isinstance(overtaken, Failed)
    assert overtaken.code == "cancelled"
    case.answer(case.submit(PROMPT, tiny_adapters[0]))
    assert case.slots.pinned == ()
    case.answer(case.submit(PROMPT, tiny_adapters[1]))


def test_a_pin_is_refused_at_once_where_every_slot_is_pinned(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=1)
    assert isinstance(pin(case, tiny_adapters[0]), Moved)
    refused = pin(case, tiny_adapters[1])  # the clock stands still: it did not wait for its deadline
    assert isinstance(refused, Failed)
    assert (refused.code, refused.message) == ("adapter_capacity", ALL_PINNED)


def test_warming_is_refused_at_once_where_every_slot_is_pinned_to_others(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    """Promotions warm first: the alias moved to a version that was on the host, and all its requests were refused."""
    case = EngineCase(decoder, slots=2)
    pin(case, tiny_adapters[0])
    assert isinstance(warm(case, tiny_adapters[2]), Moved)
    pin(case, tiny_adapters[1])
    loads = case.host.counts.loads["store"]
    for adapter in tiny_adapters[2:4]:
        refused = warm(case, adapter)
        assert isinstance(refused, Failed)
        assert (refused.code, refused.message) == ("adapter_capacity", ALL_PINNED)
    assert case.host.counts.loads["store"] == loads, "what would serve nobody was loaded"
    assert isinstance(warm(case, tiny_adapters[0]), Moved)
    answered(case, case.keep(partial(Unpin, digest=str(tiny_adapters[0]))))
    assert isinstance(warm(case, tiny_adapters[3]), Moved)


def timing_of(case: EngineCase, key: Key) -> Timing:
    """What an answer says of where its time went."""
    return next(e.timing for e in case.answers[key].events if isinstance(e, Tokens) and e.timing)


@pytest.mark.parametrize("kind", [partial(Warm, ttl_s=TTL_S), partial(Pin, deadline_s=30.0)], ids=["warm", "pin"])
def test_who_waited_for_a_load_says_so_though_a_wish_took_it_into_the_slot(
    decoder: Decoder, tiny_adapters: list[Path], kind: Callable[..., Keep]
) -> None:
    """Five hundred first requests for one cold adapter, which the prefetch warmed on the way, called themselves
    `device` after six seconds of waiting for the store."""
    go = threading.Event()

    def read(digest: str) -> HostAdapter:
        go.wait(30)
        return read_peft(Path(digest))

    case = EngineCase(decoder, read=read)
    waits = case.submit(PROMPT, tiny_adapters[0])
    case.step()
    wish = case.keep(partial(kind, digest=str(tiny_adapters[0])))
    case.step()
    go.set()
    case.answer(waits)
    timing = timing_of(case, waits)
    assert isinstance(case.told[wish], Moved)
    assert timing.source == "store"
    assert timing.load is not None
    assert timing.load.bytes > 0


def test_who_finds_a_warmed_adapter_on_the_host_waited_for_no_load(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=1)
    case.answer(case.submit(PROMPT, tiny_adapters[0]))
    told = warm(case, tiny_adapters[1])
    assert isinstance(told, Moved)
    assert told.tier == "host"
    late = case.submit(PROMPT, tiny_adapters[1])
    case.answer(late)
    timing = timing_of(case, late)
    assert (timing.source, timing.load) == ("host", None)


def test_a_pin_that_gets_no_slot_in_its_time_is_refused(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=1)
    pin(case, tiny_adapters[0])
    refused = pin(case, tiny_adapters[1], deadline_s=0.05)
    assert isinstance(refused, Failed)
    assert refused.code == "adapter_capacity"


def test_a_dropped_adapter_ends_its_sequences_and_frees_every_byte(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=2)
    long = case.submit(PROMPT, tiny_adapters[0], max_tokens=200, ignore_eos=True)
    other = case.submit(PROMPT, tiny_adapters[1], max_tokens=200, ignore_eos=True)
    case.run(lambda: bool(case.answers[long].ids) and bool(case.answers[other].ids))
    gone = case.keep(partial(Drop, digest=str(tiny_adapters[0]), deadline_s=0.5))
    case.step()
    late = case.submit(PROMPT, tiny_adapters[0])
    moved = answered(case, gone)
    assert isinstance(moved, Moved)
    assert moved.tier == "gone"
    assert moved.bytes >= 2 * read_peft(tiny_adapters[0]).size_bytes  # in the slot and on the host
    for key in (long, late):
        (failed,) = case.answers[key].endings
        assert isinstance(failed, Failed)
        assert failed.code == "adapter_unloaded"
    assert not case.slots.holds(str(tiny_adapters[0]))
    assert str(tiny_adapters[0]) not in case.host.digests()
    case.run()
    assert isinstance(case.answers[other].endings[0], Finished)


def test_a_sequence_that_ends_in_time_is_not_cut_by_a_drop(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder)
    key = case.submit(PROMPT, tiny_adapters[0], max_tokens=10, ignore_eos=True)
    case.run(lambda: bool(case.answers[key].ids))
    moved = drop(case, tiny_adapters[0], deadline_s=60.0)
    assert isinstance(moved, Moved)
    assert isinstance(case.answers[key].endings[0], Finished)
    assert len(case.answers[key].ids) == 10


def test_a_drop_that_is_called_off_ends_nobody_and_the_adapter_is_served_at_once(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    """A version that was retired and brought back was refused until the last answer of before had ended."""
    case = EngineCase(decoder, slots=2)
    long = case.submit(PROMPT, tiny_adapters[0], max_tokens=200, ignore_eos=True)
    case.run(lambda: bool(case.answers[long].ids))
    going = [case.keep(partial(Drop, digest=str(tiny_adapters[0]), deadline_s=5.0)) for _ in range(2)]
    case.step()
    refused = case.submit(PROMPT, tiny_adapters[0])
    case.step()
    assert isinstance(case.answers[refused].endings[0], Failed)
    back = answered(case, case.keep(partial(Undrop, digest=str(tiny_adapters[0]))))
    assert isinstance(back, Moved)
    assert (back.tier, back.bytes > 0) == ("device", True)
    assert [told.tier for key in going if isinstance(told := case.told[key], Moved)] == ["device"] * 2
    late = case.submit(PROMPT, tiny_adapters[0])
    case.run(lambda: bool(case.answers[late].endings))
    assert isinstance(case.answers[late].endings[0], Finished)
    case.time += 10.0  # long past the time that the drop would have waited
    case.run()
    assert isinstance(case.answers[long].endings[0], Finished)
    assert len(case.answers[long].ids) == 200
    assert case.host.counts.loads["store"] == 1


def test_calling_off_a_drop_that_nobody_asked_for_changes_nothing(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder)
    for tier in ("gone", "device"):
        told = answered(case, case.keep(partial(Undrop, digest=str(tiny_adapters[0]))))
        assert isinstance(told, Moved)
        assert told.tier == tier
        case.answer(case.submit(PROMPT, tiny_adapters[0]))
    drop(case, tiny_adapters[0])
    told = answered(case, case.keep(partial(Undrop, digest=str(tiny_adapters[0]))))
    assert isinstance(told, Moved)
    assert (told.tier, told.bytes) == ("gone", 0)


def test_after_a_drop_the_same_digest_is_loaded_anew(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder)
    expected = case.answer(case.submit(PROMPT, tiny_adapters[0]))
    drop(case, tiny_adapters[0])
    loads = case.host.counts.loads["store"]
    assert case.answer(case.submit(PROMPT, tiny_adapters[0])) == expected
    assert case.host.counts.loads["store"] == loads + 1


def test_a_load_that_was_dropped_under_way_leaves_nothing(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    go = threading.Event()

    def read(digest: str) -> HostAdapter:
        go.wait(30)
        return read_peft(Path(digest))

    case = EngineCase(decoder, read=read)
    waiting = case.keep(partial(Warm, digest=str(tiny_adapters[0]), ttl_s=TTL_S))
    case.step()
    assert isinstance(drop(case, tiny_adapters[0]), Moved)
    told = case.told[waiting]
    assert isinstance(told, Failed)
    assert told.code == "adapter_unloaded"
    go.set()
    case.answer(case.submit(PROMPT, tiny_adapters[1]))
    assert case.host.digests() == (str(tiny_adapters[1]),)
    assert case.host.loading == 0


def test_wishes_and_their_answers_cross_the_socket(replica: Replica) -> None:
    async def scenario() -> None:
        async with connected(replica) as link:
            failed = await asyncio.wait_for(link.warm("0" * 64, 5.0), 20)
            assert isinstance(failed, Failed)
            assert failed.code == "adapter_load_failed"
            assert isinstance(await asyncio.wait_for(link.pin("0" * 64, False), 20), Moved)
            gone = await asyncio.wait_for(link.drop("0" * 64, 1.0), 20)
            assert gone == Moved(gone.id, "0" * 64, "gone", 0)

    asyncio.run(scenario())


def test_a_dead_engine_answers_wishes_by_name(replica: Replica) -> None:
    async def scenario() -> None:
        async with connected(replica) as link:
            replica.link.stop()
            failed = await asyncio.wait_for(link.warm("0" * 64, 5.0), 20)
            assert isinstance(failed, Failed)
            assert failed.code in ("engine_lost", "not_ready")

    asyncio.run(scenario())
