"""The loads W1 to W8 are what their table says: who is asked when, how popular, how long; seeds repeat them."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from loadtests.profiles import Plan, Planned
from loadtests.shapes import SCENARIOS, Arm, Arrivals, Law, Popularity, Scenario, lru_hits, schedule

SEED = 7
MANY = 20_000


def picks(law: Law, parameter: float, n: int, count: int = MANY) -> list[int]:
    return Popularity(law, parameter).picks(n, count, random.Random(SEED))


def gaps(cv: float, rate: float = 5.0) -> list[float]:
    times = Arrivals(1.0, cv).times(rate, MANY, random.Random(SEED))
    return [b - a for a, b in itertools.pairwise([0.0, *times])]


def share(found: list[int], below: int) -> float:
    return sum(p < below for p in found) / len(found)


def test_the_table_has_every_load_with_its_published_figure() -> None:
    assert list(SCENARIOS) == [f"W{n}" for n in range(1, 9)]
    assert all(s.anchor and s.what for s in SCENARIOS.values())


@pytest.mark.parametrize(
    ("id_", "arms"),
    [
        ("W1", ["5 adapters", "100 adapters", "1000 adapters", "2000 adapters"]),
        ("W2", ["alpha 0.1", "alpha 0.3", "alpha 0.6", "alpha 1"]),
        ("W3", ["cv 1", "cv 2", "cv 4", "cv 6", "cv 8"]),
        ("W4", ["distinct", "uniform over sqrt(n)", "zipf 1.5", "identical"]),
        ("W8", ["base", "merged", "unmerged"]),
    ],
)
def test_arms_are_those_that_were_published(id_: str, arms: list[str]) -> None:
    assert [arm.name for arm in SCENARIOS[id_].arms] == arms


@pytest.mark.parametrize("cv", [1, 2, 4, 6, 8])
def test_gaps_have_the_rate_and_the_variation_that_they_are_said_to_have(cv: int) -> None:
    found = gaps(cv)
    assert statistics.fmean(found) == pytest.approx(1 / 5.0, rel=0.25)
    assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(cv, rel=0.2)


def test_a_power_law_of_one_is_uniform_and_a_small_one_asks_the_first_few() -> None:
    assert share(picks(Law.POWER, 1.0, 200), 20) == pytest.approx(0.1, abs=0.02)
    # floor(n * u ** (1 / a)) is below n / 10 for u below 0.1 ** a.
    assert share(picks(Law.POWER, 0.1, 200), 20) == pytest.approx(0.1**0.1, abs=0.02)
    assert share(picks(Law.POWER, 0.3, 200), 20) == pytest.approx(0.1**0.3, abs=0.02)


def test_zipf_falls_with_the_rank_to_its_power() -> None:
    found = Counter(picks(Law.ZIPF, 1.5, 32))
    assert found[0] / found[3] == pytest.approx(4**1.5, rel=0.15)


def test_the_hot_one_is_asked_ten_times_as_often_as_any_other() -> None:
    found = Counter(picks(Law.HOT, 10.0, 9))
    assert all(found[0] / found[n] == pytest.approx(10, rel=0.2) for n in range(1, 9))


def test_uniform_and_cycled_adapters_are_asked_alike() -> None:
    assert Counter(picks(Law.CYCLE, 1.0, 4, 8)) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert set(Counter(picks(Law.UNIFORM, 1.0, 5)).keys()) == set(range(5))


@pytest.mark.parametrize(
    ("law", "n", "expected"),
    [(Law.CYCLE, 16, 0.0), (Law.CYCLE, 8, 1.0), (Law.UNIFORM, 16, 0.5), (Law.UNIFORM, 2000, 0.004)],
)
def test_the_hit_ratio_of_a_working_set_is_known(law: Law, n: int, expected: float) -> None:
    """Eight slots: cycling over twice as many never hits, drawing alike hits as often as the slots hold of all."""
    assert lru_hits(picks(law, 1.0, n), 8) == pytest.approx(expected, abs=0.02)


def test_nothing_asked_hits_nothing() -> None:
    assert lru_hits([], 8) == 0.0


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda s: s.id)
def test_equal_seeds_ask_the_same_and_others_do_not(scenario: Scenario) -> None:
    arm = scenario.arms[-1]
    once = schedule(scenario, arm, rate=5.0, seed=SEED)
    assert schedule(scenario, arm, rate=5.0, seed=SEED) == once
    drawn = arm.arrivals is not None or arm.popularity.law is not Law.CYCLE
    alike = scenario.prompt[0] == scenario.prompt[1] and arm.adapters < 2
    if drawn and not alike:
        assert schedule(scenario, arm, rate=5.0, seed=SEED + 1) != once


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda s: s.id)
def test_every_item_lies_within_what_its_row_says(scenario: Scenario) -> None:
    for arm in scenario.arms:
        items = schedule(scenario, arm, rate=5.0, seed=SEED)
        assert len(items) == arm.requests
        assert all(scenario.prompt[0] <= i.prompt_tokens <= scenario.prompt[1] for i in items)
        assert all(scenario.answer[0] <= i.max_tokens <= scenario.answer[1] for i in items)
        assert all(-1 <= i.adapter < arm.adapters for i in items)
        assert all((i.at_s is None) == (arm.arrivals is None) for i in items)


def test_arms_of_a_scenario_ask_for_the_same_lengths() -> None:
    few, *_, many = SCENARIOS["W1"].arms
    sizes = [
        [(i.prompt_tokens, i.max_tokens) for i in schedule(SCENARIOS["W1"], arm, rate=1.0, seed=SEED)]
        for arm in (few, many)
    ]
    assert sizes[0] == sizes[1]


def test_an_open_arm_offers_its_share_of_what_the_server_completes() -> None:
    arm = Arm("a", 5, arrivals=Arrivals(1.1), requests=MANY)
    last = schedule(SCENARIOS["W1"], arm, rate=4.0, seed=SEED)[-1].at_s
    assert last is not None
    assert MANY / last == pytest.approx(4.4, rel=0.05)


def test_the_quiet_ones_come_as_often_beside_the_hot_one_as_without_it() -> None:
    """W7 compares their waits: if the rush also made them rarer, it would flatter itself."""
    rates = []
    for arm in SCENARIOS["W7"].arms:
        assert arm.arrivals is not None
        weights = arm.popularity.weights(arm.adapters)
        rates.append(arm.arrivals.share * weights[1] / sum(weights))
    assert rates[1] == pytest.approx(rates[0])
    hot = SCENARIOS["W7"].arms[1]
    assert hot.arrivals is not None
    assert hot.arrivals.share > 1  # more than can be served: somebody must wait, and it should be the hot one


def test_w5_has_twice_the_slots_and_half_as_many_callers_whatever_the_server_has() -> None:
    for slots in (8, 16, 3):
        fitted = SCENARIOS["W5"].fitted(slots, 2048)
        fits, twice = fitted.arms
        assert (fits.adapters, twice.adapters) == (max(1, round(slots / 2)), 2 * slots)
        assert twice.users == fits.users <= max(1, slots // 2 + 1)
        assert lru_hits([i.adapter for i in schedule(fitted, twice, rate=1.0, seed=SEED)], slots) == 0.0


def test_lengths_are_capped_to_the_model() -> None:
    fitted = SCENARIOS["W1"].fitted(16, 256)
    assert fitted.prompt[1] + fitted.answer[1] <= 256
    assert SCENARIOS["W1"].fitted(16, 2048).prompt == (8, 512)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda s: s.id)
def test_a_quick_look_keeps_the_shape(scenario: Scenario) -> None:
    short = scenario.shortened()
    assert len(short.arms) >= min(2, len(scenario.arms))
    assert {a.name for a in short.arms} <= {a.name for a in scenario.arms}
    assert max(a.adapters for a in short.arms) <= 100
    assert all(0 < s.requests <= max(a.requests for a in scenario.arms) for s in short.arms)


def test_only_w6_repeats_prompts() -> None:
    repeated = [s.id for s in SCENARIOS.values() if len({i.seed for i in schedule(s, s.arms[0], rate=1, seed=0)}) < 20]
    assert repeated == ["W6"]
    fixed = SCENARIOS["W6"]  # its texts are compared: equal prompts must be answered at equal length
    assert fixed.prompt[0] == fixed.prompt[1]
    assert fixed.answer[0] == fixed.answer[1]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = Plan(
        "b" * 64, 320, "salt", {"a@1": "d" * 64}, [Planned(0.5, "a@1", 3, 12, 4), Planned(None, "base", 4, 5, 6)]
    )
    made.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == made


def test_equal_prompts_of_a_plan_are_equal_and_others_are_not() -> None:
    plan = Plan("b", 320, "salt", {}, [])
    first, again, other = (plan.ask(Planned(None, "a", n, 30, 4)) for n in (1, 1, 2))
    assert first.prompt == again.prompt != other.prompt
    assert len(first.prompt) == 30
    assert all(64 <= int(id_) < 320 for id_ in first.prompt)
    assert first.body()["temperature"] == 0.0
    assert plan.ask(Planned(None, "base", 1, 3, 4)).target.name is None


def test_another_salt_gives_other_prompts() -> None:
    item = Planned(None, "a", 1, 30, 4)
    assert Plan("b", 320, "x", {}, []).ask(item).prompt != Plan("b", 320, "y", {}, []).ask(item).prompt
