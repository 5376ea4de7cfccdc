"""Routing over replicas, the deciding part alone: residency, load, heat, sums, and how many there should be."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import ConfigInvalid
from serving.engine.request import SetAsideState, SlotState
from serving.routing import DEVICE, EVICTABLE, FREE_SLOT, FULL, HOST, Candidate, Heat, Ledger, PrefixMemory, choose
from serving.scaling import Scaling, scaling
from serving.summing import together
from tests.heartbeats import beat

SEED = 20261122
X, Y, Z = "x" * 64, "y" * 64, "z" * 64


def ledger(**changes: object) -> Ledger:
    made = Ledger()
    made.heard(beat(**changes))
    return made


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
    leaving = {**holders, "a": ledger(slots=(SlotState(X, 5, 4),), dropping=(X,))}
    assert heat.copies(leaving) == [], "it goes, and would be loaded where it has just gone"
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
