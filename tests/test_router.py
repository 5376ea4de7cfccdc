"""Routing over replicas: the deciding part alone, then the door over fake replicas. No socket, no engine."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import ConfigInvalid
from serving.engine.request import Event, Failed, Finished, Heartbeat, Moved, Sampling, SetAsideState, SlotState, Tokens
from serving.link import Address
from serving.router import OneCopy, Router
from serving.routing import DEVICE, EVICTABLE, FREE_SLOT, FULL, HOST, Candidate, Heat, Ledger, PrefixMemory, choose
from serving.scaling import Scaling, scaling
from serving.summing import together
from tests.fakes import FakeEngine, Submission, repeat_forever, say

SEED = 20261122
X, Y, Z = "x" * 64, "y" * 64, "z" * 64
GREEDY = Sampling(max_tokens=8, temperature=0.0)


def beat(**changes: object) -> Heartbeat:
    plain = Heartbeat(
        running=0,
        waiting=0,
        loading=0,
        rows=8,
        kv_tokens_used=0,
        kv_tokens_total=100,
        slots=(),
        slots_total=2,
        host_digests=(),
        host_bytes=0,
        host_bytes_limit=1000,
        idle_s=0.1,
        steps=0,
        tokens=0,
        loads={},
        load_seconds={},
        evictions=0,
        queue_limit=16,
    )
    return msgspec.structs.replace(plain, **changes)


def ledger(**changes: object) -> Ledger:
    made = Ledger()
    made.heard(beat(**changes))
    return made


# -- the deciding part ------------------------------------------------------------------------------------------------


def test_residency_is_told_from_the_heartbeat() -> None:
    slots = (SlotState(X, 1, 4), SlotState(Y, 0, 4))
    assert ledger().residency(None) == DEVICE
    assert ledger(slots=slots).residency(X) == DEVICE
    assert ledger(slots=slots, host_digests=(X, Y, Z)).residency(Z) == HOST
    assert ledger(slots=slots[:1]).residency(Z) == FREE_SLOT
    assert ledger(slots=slots).residency(Z) == EVICTABLE
    assert ledger(slots=slots, pinned=(Y,)).residency(Z) == FULL
    assert Ledger().residency(Z) == FREE_SLOT


def test_what_was_sent_since_counts_as_there_until_two_heartbeats_did_not_tell_of_it() -> None:
    known = ledger()
    known.sent(X, (1,))
    assert known.residency(X) == DEVICE
    assert known.load == 1 / 8
    known.ended(X, (1,))
    assert (known.residency(X), known.load) == (DEVICE, 0.0)
    known.heard(beat())
    assert known.residency(X) == DEVICE
    known.heard(beat())
    assert known.residency(X) == FREE_SLOT


def test_sequences_of_other_gateways_are_part_of_the_load_and_our_own_count_once() -> None:
    known = ledger(running=6, waiting=2)
    assert known.load == 1.0
    mine = ledger()
    for number in range(4):
        mine.sent(None, (number,))
    mine.heard(beat(running=4))
    assert mine.load == 0.5
    for number in range(4):
        mine.ended(None, (number,))
    assert mine.load == 0.0
    # The heartbeat is a little older than what we know: those that ended meanwhile are not somebody else's.
    mine.heard(beat(running=4))
    assert mine.load == 0.0


def test_the_better_place_wins_until_its_rows_are_taken() -> None:
    rng = random.Random(SEED)
    device, host = Candidate("a", DEVICE, 0.0), Candidate("b", HOST, 0.0)
    assert choose([device, host], rng).name == "a"
    assert choose([Candidate("a", DEVICE, 0.45), host], rng).name == "a"
    assert choose([Candidate("a", DEVICE, 0.9), host], rng).name == "b"
    assert choose([Candidate("a", DEVICE, 1.5), Candidate("b", FULL, 0.0)], rng).name == "b"


def test_among_equals_two_are_drawn_and_the_emptier_is_taken() -> None:
    rng = random.Random(SEED)
    equals = [Candidate(str(at), DEVICE, 0.01 * at) for at in range(4)]
    drawn = [choose(equals, rng).name for _ in range(400)]
    counts = [drawn.count(str(at)) for at in range(4)]
    # Of the six pairs the emptiest is in three, the next in two more, then one; the fullest is never the emptier.
    assert counts[3] == 0
    assert counts[0] > counts[1] > counts[2] > 0


def test_choices_of_one_request_stay_together_while_there_are_rows() -> None:
    rng = random.Random(SEED)
    for taken in range(8):
        pair = [Candidate("a", DEVICE, taken / 8, together=taken > 0), Candidate("b", DEVICE, 0.0)]
        assert taken == 0 or choose(pair, rng).name == "a"
    assert choose([Candidate("a", DEVICE, 2.0, together=True), Candidate("b", DEVICE, 0.0)], rng).name == "b"


figures = st.sampled_from([DEVICE, HOST, FREE_SLOT, EVICTABLE, FULL])
candidates = st.lists(
    st.builds(Candidate, st.uuids().map(str), figures, st.floats(0, 8), st.floats(0, 1), st.booleans(), st.just(0)),
    min_size=1,
    max_size=6,
    unique_by=lambda c: c.name,
)


@given(candidates, st.integers())
def test_nobody_is_chosen_who_is_worse_than_an_equal(found: list[Candidate], seed: int) -> None:
    chosen = choose(found, random.Random(seed))
    assert chosen in found
    assert chosen.score >= max(c.score for c in found) - 0.05 - 1e-9


@given(figures, st.floats(0, 8), st.floats(0, 8))
def test_more_load_never_makes_a_replica_more_welcome(residency: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert Candidate("a", residency, low).score >= Candidate("a", residency, high).score


moves = st.lists(
    st.tuples(st.sampled_from(["sent", "ended", "heard"]), st.sampled_from([None, X, Y]), st.integers(0, 3))
)


@given(moves)
def test_the_books_of_a_replica_balance(moved: list[tuple[str, str | None, int]]) -> None:
    """Whatever comes in which order: ours is what was sent and has not ended, and the load is never less."""
    known, live = ledger(), []
    for move, adapter, number in moved:
        if move == "sent":
            known.sent(adapter, (number,))
            live.append((adapter, number))
        elif move == "ended" and live:
            gone = live.pop(number % len(live))
            known.ended(gone[0], (gone[1],))
        elif move == "heard":
            known.heard(beat(running=min(8, len(live))))
        assert known.ours == len(live)
        assert known.load >= len(live) / 8
        assert all(known.residency(adapter) == DEVICE for adapter, _ in live)
        assert {n for n in range(4) if known.running(n)} == {n for _, n in live}
    for adapter, number in live:
        known.ended(adapter, (number,))
    assert (known.ours, known.demand()) == (0, {})


def test_prompts_that_begin_alike_are_remembered_and_the_memory_is_bounded() -> None:
    memory = PrefixMemory(limit=100)
    first, second = [7] * 64 + [1] * 36, [7] * 64 + [2] * 36
    memory.remember(memory.marks("t", X, first), "a")
    assert memory.overlap(memory.marks("t", X, first), "a") == 1.0
    assert memory.overlap(memory.marks("t", X, second), "a") == 0.64
    for tenant, adapter, replica in (("u", X, "a"), ("t", Y, "a"), ("t", X, "b")):
        assert memory.overlap(memory.marks(tenant, adapter, first), replica) == 0.0
    for number in range(100):
        memory.remember(memory.marks("t", X, [number]), "a")
    assert memory.overlap(memory.marks("t", X, first), "a") == 0.0
    assert memory.overlap(memory.marks("t", None, []), "a") == 0.0


def test_a_hot_adapter_is_copied_once_and_only_when_it_fills_its_rows() -> None:
    heat = Heat()
    holders = {"a": ledger(slots=(SlotState(X, 5, 4),)), "b": ledger(), "c": ledger(slots=(SlotState(Y, 0, 4),))}
    for second in range(20):
        heat.note({X: 1}, second)
    assert heat.copies(holders) == []
    heat.note({X: 8}, 20.0)
    assert heat.copies(holders) == []  # the burst of a moment
    for second in range(21, 30):
        heat.note({X: 7}, second)
    assert heat.copies(holders) == [(X, "b")]
    assert heat.copies(holders, [(X, "b")]) == []
    full = {"a": holders["a"], "b": ledger(slots=(SlotState(Y, 1, 4), SlotState(Z, 1, 4)))}
    assert heat.copies(full) == []
    for second in range(30, 90):
        heat.note({}, second)
    assert heat.copies(holders) == []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 5))
def test_counters_of_many_heartbeats_add_up_and_outlive_their_replicas(tokens: list[int], gone: int) -> None:
    beats = [beat(tokens=n, running=n, loads={"store": n}, idle_s=float(n)) for n in tokens]
    last = [beat(tokens=100, running=50, loads={"host": 1}, load_histograms={"host": (1, 2)})] * gone
    whole = together(beats, last)
    assert whole is not None
    assert (whole.tokens, whole.running) == (sum(tokens) + 100 * gone, sum(tokens))
    assert whole.loads == {"store": sum(tokens), **({"host": gone} if gone else {})}
    assert whole.load_histograms == ({"host": (gone, 2 * gone)} if gone else {})
    assert whole.idle_s == min(tokens)
    assert together([], last) is None


def test_an_adapter_in_two_places_is_told_once() -> None:
    one = beat(slots=(SlotState(X, 1, 4), SlotState(Y, 0, 4)), host_digests=(X, Y), quarantined=(Z,))
    two = beat(slots=(SlotState(X, 2, 4),), host_digests=(X, Z))
    whole = together([one, two])
    assert whole is not None
    assert {s.digest: s.leases for s in whole.slots} == {X: 3, Y: 0}
    assert (whole.host_digests, whole.quarantined, whole.slots_total) == ((X, Y, Z), (Z,), 4)


def test_what_is_pinned_on_one_replica_alone_is_not_told_as_pinned() -> None:
    """Whoever sees to it that pins hold would not see that a replica which came later lacks one."""
    whole = together([beat(pinned=(X, Y), warm=(X,)), beat(pinned=(Y,), dropping=(Z,))])
    assert whole is not None
    assert (whole.pinned, whole.warm, whole.dropping) == ((Y,), (), (Z,))


def test_an_adapter_set_aside_on_two_replicas_is_told_once_with_the_longer_time() -> None:
    short, long = (SetAsideState(X, "numerics", seconds, 1) for seconds in (5.0, 30.0))
    whole = together([beat(set_aside=(short,)), beat(set_aside=(long, SetAsideState(Y, "no_effect", 1.0, 1)))])
    assert whole is not None
    assert whole.set_aside == (long, SetAsideState(Y, "no_effect", 1.0, 1))


def test_a_replica_whose_slot_was_found_wrong_is_the_last_to_be_asked_for_that_adapter() -> None:
    wrong = ledger(slots=(SlotState(X, 0, 4),), set_aside=(SetAsideState(X, "slot_contents", 9.0, 1),))
    assert wrong.residency(X) == FULL
    assert ledger(slots=(SlotState(X, 0, 4),), set_aside=(SetAsideState(X, "numerics", 9.0, 1),)).residency(X) == DEVICE


def test_one_heartbeat_alone_is_told_as_it_is() -> None:
    only = beat(tokens=3, slots=(SlotState(X, 1, 4),), load_histograms={"store": (1, 1)}, load_seconds={"store": 0.5})
    assert together([only]) == only


def test_scaling_options_mean_what_they_say_and_rubbish_is_refused() -> None:
    assert scaling(None, None, None) == Scaling(1, 1, 1)
    assert scaling(2, None, None) == Scaling(2, 2, 2)
    assert scaling(None, 1, 4) == Scaling(1, 1, 4)
    assert scaling(2, 1, 4) == Scaling(2, 1, 4)
    assert scaling(None, 2, None).fixed
    for wrong in ((2, 3, None), (3, None, 2), (None, 4, 2), (65, None, None), (0, None, None)):
        with pytest.raises(ConfigInvalid, match="--min-replicas"):
            scaling(*wrong)


@given(st.lists(st.floats(0, 20), max_size=8), st.integers(1, 8))
def test_wanted_replicas_stay_in_bounds_and_bring_the_load_to_its_target(loads: list[float], now: int) -> None:
    between = Scaling(2, 1, 8)
    wanted = between.wanted(loads, now)
    assert 1 <= wanted <= 8
    if loads and wanted < 8:
        assert sum(loads) / wanted <= between.target_load + 1e-5
    if wanted > 1 and loads:
        assert sum(loads) > between.target_load * (wanted - 1) - 1e-5
    assert not loads or wanted <= max(1, math.ceil(sum(loads) / between.target_load + 1e-6))


# -- the door over fake replicas --------------------------------------------------------------------------------------


class FakeReplica(FakeEngine):
    """A FakeEngine with the life of a link: it can die, which ends what runs there by `engine_lost`."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.dead = asyncio.Event()
        self.failed: list[str] = []
        self.ended = False

    async def submit(self, *arguments: Any, **options: Any) -> AsyncGenerator[Event, None]:
        scripted: Any = super().submit(*arguments, **options)
        async with contextlib.aclosing(scripted) as stream:
            while not self.dead.is_set():
                following = asyncio.ensure_future(anext(stream, None))
                dying = asyncio.ensure_future(self.dead.wait())
                try:
                    await asyncio.wait((following, dying), return_when=asyncio.FIRST_COMPLETED)
                    if following.done() and (event := following.result()) is not None:
                        yield event
                    elif following.done():
                        return
                finally:
                    dying.cancel()
                    following.cancel()
                    await asyncio.wait((following, dying))
        yield Failed(0, "engine_lost", "gone")

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True

    def fail_running(self, code: str, message: str) -> None:
        self.failed.append(code)

    def die(self) -> None:
        self.connected = False
        self.dead.set()


class Fleet:
    """Replicas by name, and the directory that names them."""

    def __init__(self, **replicas: FakeReplica) -> None:
        self.replicas = replicas
        self.named = list(replicas)

    async def directory(self) -> Sequence[Address]:
        return [Address("", "", name) for name in self.named]

    def router(self) -> Router:
        return Router(self.directory, lambda address: self.replicas[address.replica], rng=random.Random(SEED))


@asynccontextmanager
async def routed(fleet: Fleet) -> AsyncIterator[Router]:
    router = fleet.router()
    task = asyncio.create_task(router.run())
    try:
        await until(lambda: len(router.views()) == len(fleet.named))
        yield router
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: object, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def ask(router: Router, adapter: str | None = None, prompt: Sequence[int] = (1, 2, 3)) -> list[Event]:
    return [event async for event in router.submit(prompt, GREEDY, adapter, 0, 60.0, "t")]


def run(scenario: object) -> None:
    asyncio.run(scenario)  # type: ignore[arg-type]


def test_one_request_ends_once_and_its_replica_is_told_which() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            events = await ask(router)
            assert [isinstance(e, Finished | Failed) for e in events] == [False] * (len(events) - 1) + [True]
            assert sum(len(r.submissions) for r in fleet.replicas.values()) == 1
            assert sum(view.sent for view in router.views()) == 1
            assert all(view.load == 0 for view in router.views())

    run(scenario())


def test_distinct_adapters_are_kept_apart_and_each_stays_where_it_is() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            digests = [c * 64 for c in "01234567"]
            for _ in range(5):
                for digest in digests:
                    await ask(router, digest)
            homes = [{s.adapter for s in r.submissions} for r in fleet.replicas.values()]
            assert homes[0].isdisjoint(homes[1])
            assert len(homes[0]) == len(homes[1]) == 4

    run(scenario())


def test_choices_of_a_request_go_to_one_replica_and_two_requests_to_two() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever), b=FakeReplica(script=repeat_forever))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            running = [asyncio.create_task(ask(router, None, prompt)) for prompt in ((1, 2), (3, 4)) for _ in range(4)]
            await until(lambda: sum(len(r.submissions) for r in fleet.replicas.values()) == 8)
            seen = [{s.prompt for s in r.submissions} for r in fleet.replicas.values()]
            assert sorted(map(len, seen)) == [1, 1]
            for replica in fleet.replicas.values():
                replica.gate.set()
            await asyncio.gather(*running)

    run(scenario())


def test_a_replica_that_dies_takes_its_own_streams_and_no_other() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever), b=FakeReplica(script=repeat_forever))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            running = [asyncio.create_task(ask(router, None, (n,))) for n in range(8)]
            await until(lambda: sum(len(r.submissions) for r in fleet.replicas.values()) == 8)
            a, b = fleet.replicas["a"], fleet.replicas["b"]
            assert len(a.submissions) == len(b.submissions) == 4
            a.die()
            b.gate.set()
            ends = [events[-1] for events in await asyncio.gather(*running)]
            assert [e.code for e in ends if isinstance(e, Failed)] == ["engine_lost"] * 4
            assert sum(isinstance(e, Finished) for e in ends) == 4
            assert isinstance((await ask(router))[-1], Finished)  # at once, by the other
            assert len(a.submissions) == 4

    run(scenario())


@pytest.mark.parametrize("code", ["queue_full", "adapter_capacity", "deadline_exceeded", "not_ready"])
def test_what_a_replica_refused_before_it_began_is_offered_to_the_other(code: str) -> None:
    def full(submission: Submission) -> Sequence[int | Failed]:
        return [Failed(0, code, "no", 1.0)]

    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=full), b=FakeReplica(script=say("yes")))
        async with routed(fleet) as router:
            for number in range(6):
                assert isinstance((await ask(router, None, (number,)))[-1], Finished)
            fleet.replicas["b"].script = full
            events = await ask(router)
            assert [e.code for e in events if isinstance(e, Failed)] == [code]
            assert len(events) == 1

    run(scenario())


@pytest.mark.parametrize("code", ["engine_lost", "engine_fault", "adapter_load_failed", "deadline_exceeded"])
def test_what_may_have_begun_is_not_sent_again(code: str) -> None:
    """A request that kills its engine would otherwise kill them all, one after the other."""

    async def scenario() -> None:
        script = lambda submission: [Failed(0, code, "no")]  # noqa: E731
        fleet = Fleet(a=FakeReplica(script=script), b=FakeReplica(script=script))
        async with routed(fleet) as router:
            assert [e.code for e in await ask(router) if isinstance(e, Failed)] == [code]
            assert sum(len(r.submissions) for r in fleet.replicas.values()) == 1

    run(scenario())


def test_an_engine_that_failed_after_its_first_token_is_not_asked_twice() -> None:
    async def scenario() -> None:
        script = lambda submission: [65, Failed(0, "not_ready", "stops")]  # noqa: E731
        fleet = Fleet(a=FakeReplica(script=script), b=FakeReplica(script=script))
        async with routed(fleet) as router:
            events = await ask(router)
            assert [type(e) for e in events] == [Tokens, Failed]

    run(scenario())


def test_without_a_replica_the_answer_is_not_ready() -> None:
    async def scenario() -> None:
        async with routed(Fleet()) as router:
            assert [e.code for e in await ask(router) if isinstance(e, Failed)] == ["not_ready"]
            assert (router.facts, router.heartbeat, router.heartbeat_age_s) == (None, None, float("inf"))
            assert isinstance(await router.warm(X, 60), Failed)

    run(scenario())


def test_closing_a_stream_frees_the_row_of_its_replica() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever, pause_s=0.001))
        async with routed(fleet) as router:
            stream = router.submit((1, 2), GREEDY, X, 0, 60.0, "t")
            assert isinstance(await anext(stream), Tokens)
            assert router.views()[0].load == 1 / 8
            await stream.aclose()
            assert fleet.replicas["a"].submissions[0].ended == "closed"
            assert router.views()[0].load == 0

    run(scenario())


@pytest.mark.parametrize("trouble", ["silent", "hung", "leaving"])
def test_a_replica_in_trouble_gets_nothing_while_another_answers(trouble: str) -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            match trouble:
                case "silent":
                    fleet.replicas["a"].heartbeat_age = 4.0
                case "hung":
                    fleet.replicas["a"].idle_s = 20.0
                case "leaving":
                    fleet.named.remove("a")
                    await until(lambda: any(view.leaving for view in router.views()))
            for number in range(6):
                await ask(router, None, (number,))
            assert len(fleet.replicas["a"].submissions) == 0
            # ... and the server as a whole is well: one replica is enough.
            assert router.heartbeat is not None
            assert router.heartbeat_age_s < 1
            assert router.heartbeat.idle_s < 1
            fleet.replicas["b"].die()
            assert isinstance((await ask(router))[-1], Finished)  # better than nobody

    run(scenario())


def test_a_replica_that_left_is_forgotten_once_it_is_gone_and_its_counters_stay() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            before = router.heartbeat
            assert before is not None
            fleet.named.remove("a")
            await until(lambda: any(view.leaving for view in router.views()))
            fleet.replicas["a"].die()
            await until(lambda: [view.name for view in router.views()] == ["b"])
            after = router.heartbeat
            assert after is not None
            assert (before.tokens, after.tokens) == (14, 14)
            assert (before.rows, after.rows) == (16, 8)
            await until(lambda: fleet.replicas["a"].ended)

    run(scenario())


def test_a_directory_that_cannot_be_read_changes_nothing() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica())
        async with routed(fleet) as router:
            asked = asyncio.Event()

            async def broken() -> Sequence[Address]:
                asked.set()
                raise ConnectionError("no answer")

            router._directory = broken
            await asyncio.wait_for(asked.wait(), 5)
            assert isinstance((await ask(router))[-1], Finished)
            assert not router.views()[0].leaving

    run(scenario())


def test_a_hot_adapter_lands_on_the_second_replica_too() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(script=repeat_forever), b=FakeReplica(script=repeat_forever))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            running = [asyncio.create_task(ask(router, X, (1,))) for _ in range(7)]
            await until(lambda: sum(bool(r.warmed) for r in fleet.replicas.values()) == 1)
            home = next(r for r in fleet.replicas.values() if r.submissions)
            copy = next(r for r in fleet.replicas.values() if r is not home)
            assert (list(copy.warmed), len(home.submissions)) == ([X], 7)
            for replica in fleet.replicas.values():
                replica.gate.set()
            await asyncio.gather(*running)

    run(scenario())


def test_warm_pin_and_drop_reach_every_replica() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            assert isinstance(await router.warm(X, 60.0), Moved)
            assert isinstance(await router.pin(Y, True), Moved)
            assert isinstance(await router.drop(Z, 5.0), Moved)
            for replica in fleet.replicas.values():
                assert (replica.warmed, replica.pinned, replica.dropped) == ({X: 60.0}, {Y}, [(Z, 5.0)])

    run(scenario())


def test_what_is_warmed_ahead_of_demand_is_warmed_on_one_replica_alone() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            assert isinstance(await OneCopy(router).warm(X, 30.0), Moved)
            assert sorted(list(r.warmed) for r in fleet.replicas.values()) == [[], [X]]
        async with routed(Fleet()) as router:
            assert isinstance(await OneCopy(router).warm(X, 30.0), Failed)

    run(scenario())


def test_a_replica_that_comes_later_is_told_what_is_warm_and_pinned() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica())
        async with routed(fleet) as router:
            await router.warm(X, 60.0)
            await router.warm(Z, 60.0)
            await router.pin(Y, True)
            await router.drop(Z, 1.0)
            late = fleet.replicas["b"] = FakeReplica()
            fleet.named.append("b")
            await until(lambda: late.pinned == {Y})
            assert list(late.warmed) == [X]
            assert 0 < late.warmed[X] <= 60.0

    run(scenario())


def test_a_pin_that_one_replica_refuses_is_held_by_none() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        fleet.replicas["b"].refusals[X] = Failed(0, "adapter_capacity", "all slots are pinned", 1.0)
        async with routed(fleet) as router:
            answer = await router.pin(X, True)
            assert isinstance(answer, Failed)
            assert answer.code == "adapter_capacity"
            assert fleet.replicas["a"].pinned == set()

    run(scenario())


def test_a_replica_that_dies_while_it_warms_does_not_spoil_the_answer_of_the_other() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        fleet.replicas["b"].refusals[X] = Failed(0, "engine_lost", "gone", 1.0)
        async with routed(fleet) as router:
            assert isinstance(await router.warm(X, 60.0), Moved)

    run(scenario())


def test_a_replica_that_was_away_when_an_adapter_was_unpinned_lets_it_go_when_it_is_back() -> None:
    """The simulator found it: a connection was broken for a moment when the unpin went round, the engine behind it kept
    its pin, and the sum of the heartbeats, which tells what all have pinned, hid it: a slot was lost for good."""

    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            await router.pin(X, True)
            fleet.replicas["b"].heartbeat_age = 4.0
            await until(lambda: not router._members["b"].greeted)
            await router.pin(X, False)
            assert (fleet.replicas["a"].pinned, fleet.replicas["b"].pinned) == (set(), {X})
            fleet.replicas["b"].heartbeat_age = 0.1
            await until(lambda: fleet.replicas["b"].pinned == set())

    run(scenario())


def test_a_replica_that_hangs_is_not_waited_for_and_is_told_when_it_comes_back() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            fleet.replicas["a"].heartbeat_age = 4.0
            await until(lambda: not router._members["a"].greeted)
            await router.warm(X, 60.0)
            await router.pin(Y, True)
            assert (fleet.replicas["a"].pinned, fleet.replicas["b"].pinned) == (set(), {Y})
            fleet.replicas["a"].heartbeat_age = 0.1
            await until(lambda: fleet.replicas["a"].pinned == {Y})
            assert list(fleet.replicas["a"].warmed) == [X]

    run(scenario())


def test_a_replica_that_falls_silent_after_it_was_asked_is_not_waited_for() -> None:
    async def scenario() -> None:
        asked = asyncio.Event()

        class Hangs(FakeReplica):
            async def warm(self, digest: str, ttl_s: float) -> Moved | Failed:
                asked.set()
                await asyncio.Event().wait()
                raise AssertionError

        fleet = Fleet(a=Hangs(), b=FakeReplica())
        async with routed(fleet) as router, asyncio.timeout(10):
            warming = asyncio.create_task(router.warm(X, 60.0))
            await asked.wait()
            fleet.replicas["a"].heartbeat_age = 4.0
            assert isinstance(await warming, Moved)
            assert list(fleet.replicas["b"].warmed) == [X]

    run(scenario())


def test_a_drop_reaches_a_replica_that_leaves_too() -> None:
    """It still computes for whoever began there."""

    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            fleet.named.remove("a")
            await until(lambda: any(view.leaving for view in router.views()))
            await router.drop(X, 1.0)
            assert [r.dropped for r in fleet.replicas.values()] == [[(X, 1.0)]] * 2

    run(scenario())


def test_a_sequence_that_a_stopping_server_ended_does_not_begin_elsewhere() -> None:
    """Those that waited for their first token were offered to the next replica, and nobody ended them there."""

    async def scenario() -> None:
        script = lambda submission: [Failed(0, "not_ready", "The server stops.", 2.0)]  # noqa: E731
        fleet = Fleet(a=FakeReplica(script=script), b=FakeReplica(script=script))
        async with routed(fleet) as router:
            for replica in fleet.replicas.values():
                replica.gate.clear()
            waiting = asyncio.create_task(ask(router))
            await until(lambda: sum(len(r.submissions) for r in fleet.replicas.values()) == 1)
            router.fail_running("not_ready", "The server stops.")
            for replica in fleet.replicas.values():
                replica.gate.set()
            assert [e.code for e in await waiting if isinstance(e, Failed)] == ["not_ready"]
            assert sum(len(r.submissions) for r in fleet.replicas.values()) == 1

    run(scenario())


def test_a_server_that_stops_ends_the_streams_of_every_replica() -> None:
    async def scenario() -> None:
        fleet = Fleet(a=FakeReplica(), b=FakeReplica())
        async with routed(fleet) as router:
            router.fail_running("not_ready", "The server stops.")
            assert [r.failed for r in fleet.replicas.values()] == [["not_ready"]] * 2

    run(scenario())
