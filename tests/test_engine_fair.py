"""Test ids L-02 and L-03 of the engine, and the shapes W7 and G6: turns, slots that are too few, queues that are full.

All on a clock of steps, without a model; the seed of every draw is printed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.engine import fair
from serving.engine.fair import Counters, FairQueue
from serving.engine.forecast import Forecast
from serving.engine.kv import Scope
from serving.engine.plan import Key
from serving.engine.request import BASE_LANE, OTHER_LANES, Failed, Sampling, Submit
from serving.engine.sequence import Sequence as Waiting
from serving.metrics import EngineView, Metrics
from tests.fakes import FakeEngine, error_body
from tests.http_case import make_case
from tests.scheduler_case import STEP_S, Asked, FakeHost, SchedulerCase

SEED = 20261122


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def percentile(figures: Sequence[int], share: float) -> int:
    return sorted(figures)[int(share * (len(figures) - 1))]


def retry_after(asked: Asked) -> float:
    (ending,) = asked.endings
    assert isinstance(ending, Failed)
    assert ending.retry_after_s is not None
    return ending.retry_after_s


# -- W7 and L-02: one that asks ten times as much ------------------------------------------------------------------


def quiet_ones(hot: bool, *, seed: int, by_tenant: bool = False, counted: bool = True) -> list[Asked]:
    """2,500 steps of seven that ask steadily, with or without an eighth that asks ten times as often as each of them;
    what became of the seven's. The engine is busy to three fifths without the eighth, and far too busy with it."""
    case = SchedulerCase(rows=16, slots=64 if by_tenant else 8, queue_limit=256)
    if not counted:
        case.scheduler._waiting.charge = lambda scope, tokens: None  # type: ignore[method-assign]
    quiet, loud = random.Random(seed), random.Random(seed + 1)

    def ask(rng: random.Random, who: str) -> Key:
        # A tenant that floods does so over forty adapters, which within it share its turns.
        adapter = f"{who}-{rng.randrange(40 if who == 'hot' else 1)}" if by_tenant else who
        sizes = {"prompt": rng.randrange(8, 40), "tokens": rng.randrange(16, 48)}
        return case.submit(adapter, tenant=who if by_tenant else "", **sizes)

    keys: list[Key] = []
    for _ in range(2500):
        for number in range(7):
            if quiet.random() < 0.04:
                keys.append(ask(quiet, f"quiet-{number}"))
        for _ in range(10 if hot else 0):
            if loud.random() < 0.04:
                ask(loud, "hot")
        case.step()
    case.run()
    assert not case.wrong
    return [case.asked[key] for key in keys]


def whole(asked: Sequence[Asked]) -> int:
    return percentile([a.ended - a.at for a in asked if a.ended is not None], 0.99)


def waits(asked: Sequence[Asked]) -> int:
    return percentile([a.first - a.at for a in asked if a.first is not None], 0.99)


@pytest.mark.parametrize("by_tenant", [False, True], ids=["W7 one adapter", "L02 one tenant"])
@pytest.mark.parametrize("seed", [SEED, SEED + 10, SEED + 20])
def test_one_that_asks_ten_times_as_much_at_most_doubles_what_the_quiet_ones_wait(seed: int, by_tenant: bool) -> None:
    """p99 from request to answer, in steps; none of the quiet ones is refused, though the queue is full. The wait for
    the first token alone is longer than beside free rows, yet below one mean answer: no row is taken from a stream."""
    print(f"seed {seed}")
    alone = quiet_ones(False, seed=seed, by_tenant=by_tenant)
    beside = quiet_ones(True, seed=seed, by_tenant=by_tenant)
    print(f"p99 {whole(alone)} -> {whole(beside)} steps, to the first token {waits(alone)} -> {waits(beside)}")
    assert {a.code for a in beside} == {"done"}
    assert whole(beside) <= 2 * whole(alone)
    assert waits(beside) <= 32


def test_without_counters_the_same_load_starves_the_quiet_ones() -> None:
    """What the test above would see of a queue that goes by arrival alone."""
    alone, beside = quiet_ones(False, seed=SEED), quiet_ones(True, seed=SEED, counted=False)
    assert whole(beside) > 5 * whole(alone)


def test_many_long_prompts_of_one_hold_up_anothers_by_one_of_them() -> None:
    """Ten prompts of 400 tokens have rows already, 64 tokens fit a step; in order of arrival it was 58 steps."""
    case = SchedulerCase(rows=16, slots=4, chunk=64)
    for adapter in ("long", "quiet"):
        case.submit(adapter)
    case.run()
    streams = [case.submit(prompt=1, tokens=500) for _ in range(2)]
    long = [case.submit("long", prompt=400, tokens=2) for _ in range(10)]
    case.step()
    quiet = case.submit("quiet", prompt=20)
    while case.asked[quiet].first is None:
        case.step()
    assert case.steps - case.asked[quiet].at <= 9
    case.run()
    assert {case.asked[key].code for key in (*streams, *long, quiet)} == {"done"}


# -- G6: more adapters than slots ----------------------------------------------------------------------------------


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


# -- L-03: a small cache under many names --------------------------------------------------------------------------


def test_L03_a_thousand_adapters_over_a_cache_of_eight_are_never_mixed_up() -> None:
    """10,000 requests, Zipf 1.1; every row of every step computes with what its sequence asked for."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    case = SchedulerCase(rows=16, slots=8, queue_limit=128, host=FakeHost(keeps=40))
    names = [f"a{number}" for number in range(1000)]
    weights = [1 / (rank + 1) ** 1.1 for rank in range(1000)]
    for adapter in rng.choices(names, weights, k=10_000):
        case.submit(adapter, tokens=rng.randrange(1, 6))
        while case.scheduler.waiting > 60:
            case.step()
    case.run()
    assert case.wrong == []
    assert Counter(a.code for a in case.asked.values()) == {"done": 10_000}
    print(f"{case.installs} installs, {len(case.host.loads)} loads in {case.steps} steps")


def test_L03_five_thousand_requests_for_absent_adapters_evict_nobody() -> None:
    case = SchedulerCase(rows=16, slots=8, host=FakeHost(broken={f"absent-{n}" for n in range(5000)}))
    good = [f"good-{n}" for n in range(8)]
    for adapter in good:
        case.submit(adapter)
    case.run()
    bad = [case.submit(f"absent-{n}") for n in range(500)]
    for n in range(500, 5000):
        bad.append(case.submit(f"absent-{n}"))
        if not n % 50:
            case.submit(good[n // 50 % 8])
            case.step()
    case.run()
    assert {case.asked[key].code for key in bad} == {"adapter_load_failed"}
    assert case.slots.evictions == 0
    assert sorted(digest for digest, _, _ in case.slots.resident()) == good
    assert case.host.loads == good


@pytest.mark.parametrize("keeps", [3, 10, 20])
def test_loads_of_what_comes_late_do_not_push_off_the_host_what_comes_soon(keeps: int) -> None:
    """Sixty adapters wait, one slot, a host for few: without a bound on what is loaded ahead there were 1,760 loads."""
    case = SchedulerCase(rows=4, slots=1, patience_s=0.1, host=FakeHost(keeps=keeps))
    for number in range(60):
        case.submit(f"a{number}")
    case.run()
    assert {a.code for a in case.asked.values()} == {"done"}
    assert len(case.host.loads) <= 120
    assert case.steps <= 8.5 * 60, "one after the other, eight tokens each: nobody waited for a load but the first"


def test_a_slow_load_keeps_nobody_from_a_turn_and_earns_none() -> None:
    """While it loads others go on; once it is there it stands in line with them, not before them."""
    case = SchedulerCase(rows=1, slots=4, host=FakeHost({"slow": 4.0}))
    slow = [case.submit("slow", tokens=10) for _ in range(5)]
    for _ in range(int(4.0 / STEP_S) + 3):
        while case.scheduler.waiting < 9:
            case.submit("busy", tokens=10)
        case.step()
    begun = case.steps
    while not case.asked[slow[4]].endings:
        while case.scheduler.waiting < 9:
            case.submit("busy", tokens=10)
        case.step()
    served = Counter(str(a.submit.adapter) for a in case.asked.values() if a.ended is not None and a.ended > begun)
    assert served["busy"] >= 4, served


# -- queues that are full, deadlines that cannot be met ------------------------------------------------------------


def test_a_full_queue_takes_places_from_who_has_most_and_says_when_to_try_again() -> None:
    case = SchedulerCase(rows=2, queue_limit=12)
    flood = [case.submit("hot", tenant="loud", tokens=50) for _ in range(14)]
    case.step()
    refused = case.submit("hot", tenant="loud")
    assert case.asked[refused].code == "queue_full"
    other = case.submit("cold", tenant="loud")
    neighbours = [case.submit("cold", tenant="quiet") for _ in range(5)]
    case.step()
    pushed = [key for key in flood if case.asked[key].endings]
    assert pushed == flood[-6:], "the youngest of the longest queue"
    assert {case.asked[key].code for key in pushed} == {"queue_full"}
    case.run()
    assert {case.asked[key].code for key in (other, *neighbours, *flood[:8])} == {"done"}
    assert case.scheduler.waiting == 0


def test_who_gave_up_a_place_is_told_even_if_the_engine_stops_before_its_next_step() -> None:
    case = SchedulerCase(rows=1, queue_limit=2)
    for adapter in ("a", "a", "a", "b"):
        case.submit(adapter)
    case._tell(case.scheduler.fail_all("not_ready", "stops"))
    assert sorted(asked.code for asked in case.asked.values()) == ["not_ready"] * 3 + ["queue_full"]


def test_nothing_is_told_of_who_gave_up_a_place_and_left() -> None:
    case = SchedulerCase(rows=1, queue_limit=2)
    keys = [case.submit(adapter) for adapter in ("a", "a", "a", "b")]
    case.cancel(keys[2])
    case.run()
    assert {asked.code for asked in case.asked.values()} == {"done"}


def test_places_are_not_taken_from_who_has_no_more_than_the_newcomer() -> None:
    case = SchedulerCase(rows=1, queue_limit=4)
    first = case.submit("a", tokens=50)
    case.step()
    keys = [case.submit(adapter) for adapter in ("a", "a", "b", "b")]
    late = case.submit("b")
    assert case.asked[late].code == "queue_full"
    case.run()
    assert {case.asked[key].code for key in (first, *keys)} == {"done"}


def test_retry_after_is_computed_from_how_long_rows_are_held() -> None:
    """A quarter of what waits has started then; the figures are seconds, below two minutes."""
    quick, slow = (SchedulerCase(rows=2, queue_limit=40) for _ in range(2))
    found = []
    for case, tokens in ((quick, 10), (slow, 400)):
        for _ in range(20):
            case.submit(tokens=tokens)
        case.run()
        for _ in range(42):
            case.submit(tokens=tokens)
        case.step()
        case.submit(tokens=tokens)
        refused = case.submit(tokens=tokens)
        found.append(retry_after(case.asked[refused]))
        case.run()
    print(found)
    assert 1.0 <= found[0] < 2.0
    assert found[1] == pytest.approx(10 * 400 * STEP_S / 2, rel=0.15)


def test_a_deadline_that_the_load_alone_would_miss_is_refused_at_once() -> None:
    case = SchedulerCase(host=FakeHost(usual_s=3.0))
    assert case.asked[case.submit("a", deadline_s=0.5)].endings == [], "nothing is known of loads yet"
    case.run()
    case.submit("b")
    case.run()
    refused, served = case.submit("c", deadline_s=1.0), case.submit("c", deadline_s=10.0)
    assert case.asked[refused].code == "deadline_exceeded"
    assert retry_after(case.asked[refused]) == pytest.approx(2.0, abs=0.2)
    assert case.asked[served].endings == []
    resident = case.submit("b", deadline_s=0.5)
    case.run()
    assert case.asked[resident].code == case.asked[served].code == "done"


def test_a_refusal_for_its_load_starts_the_load_so_that_trying_again_helps() -> None:
    case = SchedulerCase(host=FakeHost(usual_s=3.0))
    case.submit("a")
    case.run()
    refused = case.submit("b", deadline_s=1.0)
    again_at = case.now + retry_after(case.asked[refused]) + 1.0
    while case.now < again_at:
        case.step()
    again = case.submit("b", deadline_s=1.0)
    case.run()
    assert case.asked[again].code == "done"
    assert case.host.loads == ["a", "b"]


def test_a_deadline_behind_a_long_queue_is_refused_and_one_whose_turn_comes_first_is_not() -> None:
    """200 of one adapter wait, two rows: its next would start in half a minute; another adapter's starts at once."""
    case = SchedulerCase(rows=2)
    for adapter in ("hot", "cold"):
        for _ in range(5):
            case.submit(adapter, tokens=15)
    case.run()
    for _ in range(200):
        case.submit("hot", tokens=15)
    case.step()
    late, in_turn = case.submit("hot", deadline_s=10.0), case.submit("cold", deadline_s=10.0)
    assert case.asked[late].code == "deadline_exceeded"
    assert 5 <= retry_after(case.asked[late]) <= 60
    case.run()
    assert case.asked[in_turn].code == "done"
    assert {a.code for key, a in case.asked.items() if key != late} == {"done"}


def test_loads_are_forecast_by_source_and_size_and_else_by_what_is_nearest() -> None:
    forecast = Forecast(rows=4)
    assert forecast.load_s("store", 1000) == 0.0
    forecast.loaded("store", 1000, 2.0)
    forecast.loaded("store", 20_000_000, 8.0)
    forecast.loaded("disk", 1000, 0.1)
    assert forecast.load_s("store", 900) == 2.0
    assert forecast.load_s("store", 17_000_000) == 8.0
    assert forecast.load_s("disk", 0) == 0.1
    assert 2.0 < forecast.load_s("store", 0) < 8.0, "size unknown: the source's mean"
    assert 0.1 < forecast.load_s("elsewhere", 1000) < 8.0, "source unknown: the mean of all"
    for _ in range(100):
        forecast.loaded("store", 1000, 0.5)
    assert forecast.load_s("store", 900) == pytest.approx(0.5, abs=0.01), "what is long past is forgotten"


def test_forecasts_refuse_nobody_before_anything_was_seen() -> None:
    case = SchedulerCase(rows=1)
    keys = [case.submit("a", deadline_s=1.0, tokens=2) for _ in range(300)]
    assert all(not case.asked[key].endings for key in keys)
    case.run()


@pytest.mark.anyio
async def test_a_deadline_refused_at_once_is_a_429_that_says_when_to_try_again(tmp_path: Path) -> None:
    """Told apart by its status from a deadline that passed (504); the code is the same."""
    case = make_case(tmp_path, FakeEngine(script=lambda s: [Failed(1, "deadline_exceeded", "in 9 s", 12.5)]))
    async with case.client() as client:
        answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "13")
        assert error_body(answer)["code"] == "deadline_exceeded"
        case.engine.script = lambda s: [Failed(1, "deadline_exceeded", "passed")]
        answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x"})
        assert (answer.status_code, error_body(answer)["code"]) == (504, "deadline_exceeded")


# -- what is told of those who wait --------------------------------------------------------------------------------


def test_who_waits_is_told_by_adapter_up_to_a_bound_and_for_how_long() -> None:
    case = SchedulerCase(rows=1, queue_limit=2000, host=FakeHost(usual_s=100.0))
    for number in range(50):
        for _ in range(50 - number):
            case.submit(f"a{number}")
    case.submit()
    case.submit()
    case.step()
    told = case.scheduler.waiting_by()
    assert len(told) == fair.TOLD + 1
    assert (told["a0"], told["a19"], sum(told.values())) == (50, 31, case.scheduler.waiting)
    assert told[OTHER_LANES] == sum(50 - number for number in range(20, 50)) + 1
    assert case.scheduler.oldest_wait_s(case.now + 3.0) == pytest.approx(3.0 + STEP_S)


def test_metrics_name_who_waits() -> None:
    engine = FakeEngine()
    assert engine.heartbeat is not None
    beat = msgspec.structs.replace(
        engine.heartbeat, waiting=9, waiting_by={"d" * 64: 4, BASE_LANE: 3, OTHER_LANES: 2}, oldest_wait_s=1.5
    )
    text = Metrics("tiny", look=lambda: EngineView(engine.facts, beat, 0.1, 9)).render().decode()
    for line in (
        'adapter_waiting{adapter="dddddddddddd"} 4.0',
        'adapter_waiting{adapter="base"} 3.0',
        'adapter_waiting{adapter="other"} 2.0',
        "engine_oldest_wait_seconds 1.5",
        'waiting_lora_adapters="dddddddddddd"',
    ):
        assert line in text


# -- wide searches -------------------------------------------------------------------------------------------------


def test_a_search_that_needs_every_row_gets_them_though_others_never_stop_asking() -> None:
    case = SchedulerCase(rows=6, beams=True)
    rng = random.Random(SEED)

    def flood() -> None:
        while case.scheduler.waiting < 10:
            case.submit(tokens=rng.randint(10, 30))

    for _ in range(50):
        flood()
        case.step()
    wide = case.submit("a", beams=6, tokens=5)
    begun = case.steps
    while not case.asked[wide].endings:
        flood()
        case.step()
        assert case.steps < begun + 80, "starved"
    assert case.asked[wide].code == "done"


def test_one_that_keeps_asking_for_every_row_leaves_turns_to_the_others() -> None:
    case = SchedulerCase(rows=4, beams=True)
    narrow: list[Key] = []
    for step in range(1500):
        while case.scheduler.waiting_by().get("wide", 0) < 3:
            case.submit("wide", beams=4, tokens=10)
        if not step % 30:
            narrow.append(case.submit("narrow", tokens=10))
        case.step()
    done = [case.asked[key] for key in narrow[:-4]]
    assert {a.code for a in done} == {"done"}
    assert max(a.first - a.at for a in done if a.first) <= 60


# -- properties ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["join", "leave", 1, 5, 60])), max_size=80))
def test_a_newcomer_never_begins_below_the_least_of_the_active(moves: list[tuple[str, str | int]]) -> None:
    """And nobody's counter ever falls, so what is owed is owed after any time of idleness."""
    counters: Counters[str] = Counters()
    active: set[str] = set()
    before: dict[str, int] = {}
    for who, move in moves:
        if move == "join":
            least = min((counters.of(other) for other in active), default=0)
            counters.join(who)
            active.add(who)
            assert counters.of(who) >= least
        elif move == "leave":
            counters.leave(who)
            active.discard(who)
        elif isinstance(move, int) and who in active:
            counters.charge(who, move)
        for name in active:
            assert counters.of(name) >= before.get(name, 0)
            before[name] = counters.of(name)
        assert counters.active == len(active)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=200, max_size=600), st.integers(2, 6))
def test_of_those_who_always_ask_none_is_ever_further_ahead_than_one_request(costs: list[int], lanes: int) -> None:
    """Theorem 4.4 of the paper in the small: at most the largest cost lies between the counters of the backlogged."""
    counters: Counters[int] = Counters()
    for lane in range(lanes):
        counters.join(lane)
    for cost in costs:
        counters.charge(min(range(lanes), key=counters.of), cost)
        given_now = [counters.of(lane) for lane in range(lanes)]
        assert max(given_now) - min(given_now) <= max(costs)


def test_counters_of_the_idle_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "KEPT", 50)
    counters: Counters[int] = Counters()
    for who in range(1000):
        counters.join(who)
        counters.charge(who, 10)
        counters.leave(who)
    assert len(counters._given) <= 52
    assert counters.of(5000) == counters.of(999), "the newest floor is remembered"


def test_leaving_and_coming_back_earns_nothing() -> None:
    counters: Counters[str] = Counters()
    counters.join("steady")
    counters.join("greedy")
    counters.charge("greedy", 500)
    counters.leave("greedy")
    counters.charge("steady", 100)
    counters.join("greedy")
    assert counters.of("greedy") == 500
    counters.charge("steady", 1000)
    counters.join("new")
    assert counters.of("new") == 500


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), min_size=1, max_size=60))
def test_the_queues_books_balance_whatever_comes_and_goes(moves: list[tuple[int, int, bool]]) -> None:
    queue = FairQueue()
    keys: list[Key] = []
    for number, (tenant, adapter, leaves) in enumerate(moves):
        if leaves and keys:
            assert queue.remove(keys.pop(adapter % len(keys))) is not None
        else:
            submit = Submit(number, (1,), Sampling(max_tokens=4), f"a{adapter}", salt=f"t{tenant}")
            keys.append(Key((0, number)))
            queue.push(Waiting(keys[-1], submit, 0.0))
        for lane in queue.lanes()[::2]:
            queue.step_up(lane) if adapter else queue.stand_back(lane)
        assert queue.balanced()
        assert len(queue) == len(keys)
    for key in keys:
        queue.remove(key)
    assert queue.balanced()
    assert queue.lanes() == []


class AnythingGoes(RuleBasedStateMachine):
    """Requests, cancels, failing loads, pins and steps in any order: after every step the books balance and no free row
    lies beside somebody who could run (both checked by the case), nothing is computed with another's tensors, and in
    the end everything ends, in a bounded number of steps."""

    @initialize(rows=st.integers(1, 6), slots=st.integers(1, 3), limit=st.integers(1, 30))
    def begin(self, rows: int, slots: int, limit: int) -> None:
        host = FakeHost({"slow": 1.5}, broken={"broken"}, keeps=3)
        self.case = SchedulerCase(rows=rows, slots=slots, queue_limit=limit, patience_s=0.2, beams=True, host=host)

    @rule(
        adapter=st.sampled_from([None, "a", "b", "c", "d", "slow", "broken"]),
        tenant=st.sampled_from(["", "t"]),
        beams=st.sampled_from([1, 1, 1, 2, 6]),
        tokens=st.integers(1, 12),
        deadline_s=st.sampled_from([600.0, 600.0, 0.4]),
    )
    def ask(self, adapter: str | None, tenant: str, beams: int, tokens: int, deadline_s: float) -> None:
        beams = min(beams, self.case.rows.rows)
        self.case.submit(adapter, tenant=tenant, beams=beams, tokens=tokens, deadline_s=deadline_s)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.case.step()

    @precondition(lambda self: self.case.asked)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        live = [key for key, asked in self.case.asked.items() if not asked.endings]
        if live:
            self.case.cancel(data.draw(st.sampled_from(live)))

    @rule()
    def pin_or_unpin(self) -> None:
        resident = self.case.slots.resident()
        for digest, _, _ in resident[1:2]:
            if digest in self.case.slots.pinned:
                self.case.slots.unpin(digest)
            else:
                self.case.slots.pin(digest)

    @invariant()
    def nothing_is_mixed_up(self) -> None:
        if hasattr(self, "case"):
            assert self.case.wrong == []
            assert self.case.scheduler.balanced()

    def teardown(self) -> None:
        if not hasattr(self, "case"):
            return
        for digest in self.case.slots.pinned:
            self.case.slots.unpin(digest)
        self.case.run(most=30 * (len(self.case.asked) + 10))
        assert all(len(asked.endings) == 1 for asked in self.case.asked.values())


TestAnythingGoes = AnythingGoes.TestCase
TestAnythingGoes.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
