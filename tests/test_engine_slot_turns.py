"""More adapters than slots (the shape G6), pinned slots, slots that drain: who gets one, by a clock of steps."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.kv import Scope
from serving.engine.plan import Key
from tests.scheduler_case import STEP_S, Asked, FakeHost, SchedulerCase, percentile, retry_after

SEED = 20261122


def closed_loop(clients: int, adapters: int, slots: int, *, rows: int = 16, own: bool, steps: int = 2000) -> (
    tuple[SchedulerCase, Counter[str], list[Asked]]
):  # fmt: skip
    """Clients that ask again at once: each its own adapter (own), or any. What was answered, by adapter."""
    print(f"seed {SEED}")
    case = SchedulerCase(rows=rows, slots=slots)
    rng = random.Random(SEED)

    def ask(client: int) -> Key:
        adapter = client % adapters if own else rng.randrange(adapters)
        return case.submit(f"a{adapter}", prompt=rng.randrange(8, 40), tokens=rng.randrange(16, 48))

    asks = {client: ask(client) for client in range(clients)}
    done: list[Asked] = []
    for _ in range(steps):
        case.step()
        for client, key in asks.items():
            if case.asked[key].endings:
                done.append(case.asked[key])
                asks[client] = ask(client)
    assert not case.wrong
    assert {a.code for a in done} == {"done"}
    return case, Counter(str(a.submit.adapter) for a in done), done


def test_G6_twice_as_many_adapters_as_slots_cost_nothing_while_few_are_in_flight() -> None:
    """Four at a time of sixteen, eight slots: a load each, an install for what was not there, no wait for it."""
    warm, _, among_eight = closed_loop(4, 8, 8, own=False)
    case, _, among_sixteen = closed_loop(4, 16, 8, own=False)
    first = [percentile([a.first - a.at for a in asked if a.first], 0.5) for asked in (among_eight, among_sixteen)]
    print(f"{case.installs} installs of {len(among_sixteen)} requests, first token after {first} steps")
    assert len(case.host.loads) == 16
    assert case.installs <= 0.6 * len(among_sixteen)
    assert first[1] <= 3 * first[0]
    assert case.busy_rows >= 0.97 * warm.busy_rows


@pytest.mark.parametrize("rows", [16, 8])
def test_G6_more_in_flight_than_slots_are_answered_in_turn_at_four_fifths_of_the_speed(rows: int) -> None:
    fits, _, _ = closed_loop(32, 16, 16, rows=rows, own=True)
    case, by_adapter, done = closed_loop(32, 16, 8, rows=rows, own=True)
    print(f"{case.busy_rows / fits.busy_rows:.2f} of the speed, {case.installs} installs of {len(done)}, {by_adapter}")
    assert case.busy_rows >= 0.8 * fits.busy_rows
    assert case.installs <= len(done) / 3
    assert min(by_adapter.values()) >= 0.7 * max(by_adapter.values())
    assert len(by_adapter) == 16
    # Turns of two seconds and an answer to drain, and four more such for those before it.
    assert max(a.first - a.at for a in done if a.first) <= 5 * (2.0 / STEP_S + 48)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_an_adapter_gets_a_slot_though_those_there_are_always_leased_and_asked_for(slots: int) -> None:
    """Within patience_s and the longest answer, whatever the others ask for."""
    case = SchedulerCase(rows=12, slots=slots, patience_s=1.0)
    rng = random.Random(SEED)

    def flood() -> None:
        while case.scheduler.waiting < 20:
            case.submit(f"a{rng.randrange(slots)}", tokens=rng.randrange(10, 30))

    for _ in range(100):
        flood()
        case.step()
    key = case.submit("late", tokens=5)
    while not case.asked[key].endings:
        flood()
        case.step()
        assert case.steps < 1000
    first = case.asked[key].first
    assert first is not None
    assert first - case.asked[key].at <= 1.0 / STEP_S + 30 + 10


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    slots=st.integers(1, 5),
    longest=st.integers(1, 12),
    patience=st.integers(0, 20),
    late=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_whoever_waits_for_a_slot_has_one_within_its_bound(
    rows: int, slots: int, longest: int, patience: int, late: int, seed: int
) -> None:
    """Every slot is asked for again and again. Of k newcomers each starts within a load, the first free row, and k
    times patience and the longest answer under way twice: to drain, and until a row is free again."""
    rng = random.Random(seed)
    case = SchedulerCase(rows=rows, slots=slots, patience_s=patience * STEP_S)

    def step() -> None:
        while case.scheduler.waiting < 8:
            case.submit(f"a{rng.randrange(slots)}", prompt=rng.randrange(1, 9), tokens=rng.randint(1, longest))
        case.step()

    for _ in range(40):
        step()
    keys = [case.submit(f"late-{number}", tokens=rng.randint(1, longest)) for number in range(late)]
    most = 4 + longest + late * (patience + 2 * longest + 4)
    while not all(case.asked[key].first for key in keys):
        step()
        assert case.steps - case.asked[keys[0]].at <= most
    case.run()


def test_what_drains_for_a_cancelled_request_is_used_again() -> None:
    case = SchedulerCase(rows=4, slots=1, patience_s=0.1)
    for number in range(40):
        case.submit("a", tokens=7 + number % 5)
    for _ in range(5):
        case.step()
    late = case.submit("b")
    while not case.scheduler._admission._drains:
        case.step()
    assert case.scheduler._admission._drains == {"a": "b"}
    case.cancel(late)
    case.step()
    assert case.scheduler._admission._drains == {}
    case.run(most=200)


def test_pinned_slots_are_not_drained_and_count_as_slots_that_cannot_be_had() -> None:
    """Also those that are pinned while they drain. Whoever may not have them waits for the other slot."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    case = SchedulerCase(rows=6, slots=2, patience_s=0.1)
    for adapter in ("pinned", "a"):
        case.submit(adapter)
    case.run()
    keys: list[Key] = []
    for step in range(600):
        while case.scheduler.waiting < 12:
            # The pinned one's answers are the shortest: its slot would be the soonest to be had.
            adapter = rng.choice(["pinned", "pinned", "a", "b", "c"])
            keys.append(case.submit(adapter, tokens=rng.randint(2, 4) if adapter == "pinned" else rng.randint(8, 30)))
        if case.slots.holds("pinned") and step >= 100:
            case.slots.pin("pinned")
        case.step()
        assert not set(case.slots.pinned) & set(case.scheduler._admission._drains)
    assert case.slots.pinned == ("pinned",)
    case.run()
    assert {case.asked[key].code for key in keys} == {"done"}
    assert not case.wrong


def test_who_is_pinned_while_it_drains_is_drained_no_longer() -> None:
    case = SchedulerCase(rows=4, slots=1, patience_s=0.1)
    for number in range(40):
        case.submit("a", tokens=7 + number % 5)
    for _ in range(5):
        case.step()
    late = case.submit("b")
    while not case.scheduler._admission._drains:
        case.step()
    case.slots.pin("a")
    for _ in range(150):
        case.step()
    assert case.scheduler._admission._drains == {}
    assert Counter(asked.code for asked in case.asked.values() if asked.endings) == {"done": 40}
    case.slots.unpin("a")
    case.run()
    assert case.asked[late].code == "done"


def test_a_slot_is_not_drained_for_one_whose_turn_comes_later() -> None:
    """The only slot is asked for all the time by one that was given little; the other had a thousand tokens before."""
    case = SchedulerCase(rows=4, slots=1, patience_s=0.1)
    for adapter in ("heavy", "light"):
        case.submit(adapter)
        case.run()
    queue = case.scheduler._admission.queue
    queue.charge(Scope("", "heavy"), 1000)
    rng = random.Random(SEED)

    def step() -> None:
        while case.scheduler.waiting_by().get("light", 0) < 8:
            case.submit("light", tokens=rng.randint(10, 30))
        case.step()

    for _ in range(40):
        step()
    heavy, begun = case.submit("heavy"), case.steps
    while case.asked[heavy].first is None:
        step()
        if case.scheduler._admission._drains:
            assert queue.counters(Scope("", "light")) >= queue.counters(Scope("", "heavy"))
        assert case.steps < begun + 1000, "starved"
    assert case.steps > begun + 60


def test_who_loses_its_slot_and_its_place_on_the_host_in_one_step_is_loaded_again() -> None:
    """A waits for three rows; the host has let go of it, for it lies in a slot. The moment the rows come free X takes
    that slot, having waited long enough, and B's can be had too: A was put there without its tensors at hand."""
    case = SchedulerCase(rows=4, slots=2, patience_s=1000.0, beams=True, host=FakeHost(keeps=2))
    for adapter in ("a", "b"):
        case.submit(adapter)
        case.run()
    running = [case.submit(adapter, tokens=30) for adapter in ("b", None)]
    case.step()
    waiting = [case.submit("x"), case.submit("a", beams=3)]
    while not all(case.asked[key].endings for key in running):
        case.step()
    lane = case.scheduler._admission.queue.lane(Scope("", "x"))
    assert lane is not None
    assert not case.host.bytes_of("a")
    lane.blocked_since = -1000.0
    case.run()
    assert {case.asked[key].code for key in waiting} == {"done"}
    assert case.host.loads == ["a", "b", "x", "a"]


def test_a_slot_that_drained_is_had_though_turns_have_changed_meanwhile() -> None:
    """B's slot drained for D; then B's turn came before D's again, each waited for the other, and nobody ran."""
    case = SchedulerCase(rows=6, slots=1, queue_limit=1, patience_s=0.2, beams=True, host=FakeHost(keeps=3))
    gone = case.submit(tokens=1)
    case.submit("b", tenant="t", beams=6, tokens=3)
    for adapter, tokens in (("c", 7), (None, 7), ("b", 9), ("d", 1)):
        case.submit(adapter, tokens=tokens)
    case.cancel(gone)
    case.submit("a", tokens=1)
    case.submit("b", tenant="t", tokens=1)
    case.run(most=200)


def test_answers_count_double_and_prompts_once() -> None:
    """One row, two that always ask: what they are given is alike, whoever writes and whoever reads."""
    case = SchedulerCase(rows=1, slots=2)
    for _ in range(3000):
        for adapter, prompt, tokens in (("writes", 4, 40), ("reads", 48, 3)):
            if case.scheduler.waiting_by().get(adapter, 0) < 3:
                case.submit(adapter, prompt=prompt, tokens=tokens)
        case.step()
    done = Counter(str(a.submit.adapter) for a in case.asked.values() if a.endings)
    assert done["writes"] * (4 + 2 * 40) == pytest.approx(done["reads"] * (48 + 2 * 3), rel=0.05)


def test_all_slots_pinned_refuses_who_has_none_at_once_and_evicts_nobody() -> None:
    case = SchedulerCase(slots=2)
    for adapter in ("a", "b"):
        case.submit(adapter)
    case.run()
    case.slots.pin("a")
    case.slots.pin("b")
    refused, served = case.submit("c"), case.submit("a")
    assert case.asked[refused].code == "adapter_capacity"
    assert retry_after(case.asked[refused]) >= 1.0
    case.run()
    assert case.asked[served].code == "done"
    assert case.slots.evictions == 0
