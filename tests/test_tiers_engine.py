"""Tiers under a stepping engine on the tiny base: slots that are pinned or leased, cancels amid loads, storms."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.plan import Key
from serving.engine.request import Drop, Failed, Finished, Moved, Pin, Tokens, Warm
from tests.engine_case import EngineCase, load_tiny, read_peft

SEED = 20261122
PROMPT = [5, 9, 33, 61, 17]


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


def gated(go: threading.Event, *slow: Path) -> tuple[list[str], Callable[[str], HostAdapter]]:
    """(what was read, a reader that waits for `go` before it reads one of `slow`)."""
    reads: list[str] = []

    def read(digest: str) -> HostAdapter:
        reads.append(digest)
        if Path(digest) in slow:
            go.wait(60)
        return read_peft(Path(digest))

    return reads, read


def test_L05_500_simultaneous_first_requests_are_one_load_and_500_answers(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    go = threading.Event()
    reads, read = gated(go, tiny_adapters[0])
    case = EngineCase(decoder, queue_limit=600, read=read)
    keys = [case.submit(PROMPT, tiny_adapters[0], max_tokens=2) for _ in range(500)]
    for _ in range(5):
        case.step()
    go.set()
    case.run(limit_s=120.0)
    assert reads == [str(tiny_adapters[0])]
    assert len({tuple(case.answers[key].ids) for key in keys}) == 1
    assert all(isinstance(case.answers[key].endings[0], Finished) for key in keys)


def test_L05_while_one_adapter_loads_every_step_gives_the_others_a_token(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    go = threading.Event()
    _, read = gated(go, tiny_adapters[0])
    case = EngineCase(decoder, read=read)
    streams = [case.submit(PROMPT, a, max_tokens=120, ignore_eos=True) for a in (None, tiny_adapters[1])]
    case.run(lambda: all(case.answers[key].ids for key in streams))
    waiting = case.submit(PROMPT, tiny_adapters[0])
    for _ in range(60):
        before = [len(case.answers[key].ids) for key in streams]
        case.step()
        assert [len(case.answers[key].ids) for key in streams] == [count + 1 for count in before]
    assert not case.answers[waiting].events
    go.set()
    case.answer(waiting)
    case.run()


def test_F13_200_cancels_during_a_load_leave_nothing_and_the_next_request_has_it(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    go = threading.Event()
    reads, read = gated(go, tiny_adapters[0])
    case = EngineCase(decoder, read=read)
    for number in range(200):
        key = case.submit(PROMPT, tiny_adapters[0])
        if number % 3:
            case.step()
        case.engine.cancel(key, key[1])
        if number % 7 == 0:
            case.step()
        if number == 150:
            go.set()
    case.step()
    case.run(lambda: case.host.loading == 0)
    assert (case.slots.leases, case.scheduler.waiting, case.scheduler.running) == (0, 0, 0)
    assert not any(answer.events for answer in case.answers.values() if not answer.ids)
    assert case.answer(case.submit(PROMPT, tiny_adapters[0]))
    assert reads == [str(tiny_adapters[0])]


def test_A02_one_slot_two_adapters_the_leased_one_is_never_evicted(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    """Long streams of two adapters take turns on one slot; each answers as it does alone."""
    long = {"max_tokens": 60, "ignore_eos": True}
    alone = EngineCase(decoder, slots=2)
    expected = {a: alone.answer(alone.submit(PROMPT, a, **long)) for a in tiny_adapters[:2]}
    case = EngineCase(decoder, slots=1)
    keys = {case.submit(PROMPT, a, **long): a for _ in range(3) for a in tiny_adapters[:2]}
    for _ in range(2000):
        leased = {digest for digest, _, leases in case.slots.resident() if leases}
        if all(case.answers[key].endings for key in keys):
            break
        if not case.step():
            case._woken.wait(0.02)
        running = {s.adapter for s in case.scheduler._running.values() if s.adapter}
        assert leased & running <= {digest for digest, _, _ in case.slots.resident()}
    assert {tuple(case.answers[key].ids) == tuple(expected[a]) for key, a in keys.items()} == {True}


def test_A02_all_slots_pinned_is_429_and_never_an_eviction(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder, slots=2)
    pins = [case.keep(partial(Pin, digest=str(a))) for a in tiny_adapters[:2]]
    case.run(lambda: all(isinstance(case.told[key], Moved) for key in pins))
    refused = [case.submit(PROMPT, a) for a in tiny_adapters[2:5]]
    served = [case.submit(PROMPT, a) for a in (*tiny_adapters[:2], None)]
    case.run()
    for key in refused:
        (ending,) = case.answers[key].endings
        assert isinstance(ending, Failed)
        assert ending.code == "adapter_capacity"
        assert ending.retry_after_s is not None
    assert all(isinstance(case.answers[key].endings[0], Finished) for key in served)
    assert case.slots.evictions == 0


def test_A06_a_storm_of_loads_and_unloads_costs_running_streams_no_token(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    """400 steps (a step is 10 ms of the test's clock), each of which warms, drops, asks or cancels: a hundred acts a
    second. The two streams go on with a token a step, and answer what they answer alone."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    long = {"max_tokens": 240, "ignore_eos": True}
    alone = EngineCase(decoder)
    expected = [alone.answer(alone.submit(PROMPT, a, **long)) for a in (None, tiny_adapters[0])]
    case = EngineCase(decoder, slots=3, budget_bytes=3 * read_peft(tiny_adapters[0]).size_bytes)
    streams = [case.submit(PROMPT, a, **long) for a in (None, tiny_adapters[0])]
    case.run(lambda: all(case.answers[key].ids for key in streams))
    asked: list[Key] = []
    acts: Counter[str] = Counter()
    while not all(case.answers[key].endings for key in streams):
        adapter = rng.choice(tiny_adapters[1:])
        act = rng.choice(("warm", "drop", "ask", "cancel"))
        acts[act] += 1
        if act == "warm":
            case.keep(partial(Warm, digest=str(adapter), ttl_s=0.1))
        elif act == "drop":
            case.keep(partial(Drop, digest=str(adapter), deadline_s=rng.choice((0.0, 0.05))))
        elif act == "ask":
            asked.append(case.submit(PROMPT, adapter, max_tokens=4))
        elif asked:
            key = asked.pop(rng.randrange(len(asked)))
            case.engine.cancel(key, key[1])
        before = [len(case.answers[key].ids) for key in streams]
        case.step()
        for key, count in zip(streams, before, strict=True):
            assert len(case.answers[key].ids) == count + 1 or case.answers[key].endings
    case.run(lambda: all(case.answers[key].endings for key in asked) and None not in case.told.values())
    assert min(acts.values()) > 20
    assert [case.answers[key].ids for key in streams] == expected
    for key in asked:
        (ending,) = case.answers[key].endings
        assert isinstance(ending, Finished) or ending.code in ("adapter_unloaded", "queue_full")  # type: ignore[union-attr]
    case.time += 60.0
    case.step()
    assert (case.slots.leases, case.host.loading, case.engine._keeper.warm) == (0, 0, ())


def test_a_dropped_adapter_leaves_nothing_in_its_slot(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    """An unload that only forgot the name would go on holding the bytes."""
    case = EngineCase(decoder, slots=2)
    adapter = read_peft(tiny_adapters[0])
    case.answer(case.submit(PROMPT, tiny_adapters[0]))
    ((_, slot, _),) = case.slots.resident()
    assert case.engine._prover.applies(slot, adapter)
    key = case.keep(partial(Drop, digest=adapter.digest, deadline_s=0.0))
    case.run(lambda: case.told[key] is not None)
    assert case.slots.resident() == []
    assert not case.engine._prover.applies(slot, adapter)


def test_waiting_sequences_have_their_adapters_loaded_before_their_turn(
    decoder: Decoder, tiny_adapters: list[Path]
) -> None:
    """One row: what waits for it is on the host by the time the row is free."""
    case = EngineCase(decoder, rows=1)
    first = case.submit(PROMPT, max_tokens=100, ignore_eos=True)
    later = [case.submit(PROMPT, a, max_tokens=2) for a in tiny_adapters[:3]]
    case.run(lambda: len(case.host.digests()) == 3)
    assert not case.answers[first].endings
    case.run()
    assert all(isinstance(case.answers[key].endings[0], Finished) for key in later)


def test_who_waited_for_a_load_is_told_what_it_took(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    case = EngineCase(decoder)
    cold, warm = (case.submit(PROMPT, tiny_adapters[0]) for _ in range(2))
    case.answer(cold)
    case.answer(warm)
    resident = case.submit(PROMPT, tiny_adapters[0])
    case.answer(resident)
    sources = []
    for key in (cold, resident):
        timing = next(e.timing for e in case.answers[key].events if isinstance(e, Tokens) and e.timing)
        sources.append((timing.source, timing.load is not None and timing.load.bytes > 0))
    assert sources == [("store", True), ("device", False)]
