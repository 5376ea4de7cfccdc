"""Who gets a canary, and by which figures it ends: pure functions, so every gateway finds the same."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from adapters.canaries import (
    Arm,
    ArmFigures,
    Canary,
    CanaryLimits,
    Route,
    Shadow,
    ShadowFigures,
    Split,
    Sticky,
    bucket_of,
    edges,
    fault_of,
    judged,
    share_of,
    sum_arms,
    takes,
)
from adapters.records import AdapterVersion, BoundBy, PromptFormat
from serving.answers import Ended, Usage
from serving.arms import Lot, Taken, draw
from serving.resolver import Weights
from serving.tally import PATIENT_S, Tally

LIMITS = CanaryLimits(min_requests=40, max_error_excess=0.05, min_shadow_tokens=100, min_agreement=0.7)
AT = datetime(2026, 11, 22, tzinfo=UTC)
GOOD = ShadowFigures(20, 0, 0, 1000, 950, -20.0)


def version(number: int) -> AdapterVersion:
    return AdapterVersion(
        "sum", number, f"{number:064x}", "b" * 64, BoundBy.SHAPE, 4, (), 100, PromptFormat(), {}, {}, "t", AT
    )


def split(percent: float = 10, sticky: Sticky = Sticky.USER, shadow: Shadow | None = None) -> Split:
    return Split("sum", "champion", 1, 7, Canary("c0ffee", 2, percent, sticky, LIMITS), shadow, AT)


def route(percent: float = 10, sticky: Sticky = Sticky.USER, shadow: Shadow | None = None) -> Route:
    return Route(version(1), split(percent, sticky, shadow), version(2), None if shadow is None else version(2))


def arm(requests: int, errors: int = 0, seconds: float = 0.05) -> ArmFigures:
    counts = [0] * (len(edges()) + 1)
    counts[bucket_of(seconds)] = requests - errors
    return ArmFigures(requests, errors, requests, tuple(counts))


# -- who ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [1, 10, 33.3, 50])
def test_a_canary_gets_its_share_of_the_callers(percent: float) -> None:
    """20,000 callers; five standard deviations either way: wrong once in two million runs, and the hash is fixed."""
    n, p = 20_000, percent / 100
    got = sum(takes("sum@champion", f"user:{i}", "trial", percent) for i in range(n))
    assert abs(got - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_the_share_of_a_caller_is_frozen() -> None:
    """Gateways of different releases must agree: this number never changes."""
    assert share_of("sum@champion", "user:ann", "trial") == pytest.approx(0.9013979249, abs=1e-9)


def test_a_caller_keeps_its_arm_whatever_the_request() -> None:
    for how, lot in (
        (Sticky.USER, Lot("ann", "key-1")),
        (Sticky.USER, Lot("", "key-1")),
        (Sticky.KEY, Lot("x", "key-1")),
    ):
        arms = {draw(route(50, how), replace(lot, request=str(i)))[0].number for i in range(200)}
        assert len(arms) == 1


def test_sticky_by_key_looks_past_the_user_and_by_user_past_the_key() -> None:
    by_key = {draw(route(50, Sticky.KEY), Lot(f"u{i}", "key-1", "r"))[0].number for i in range(200)}
    by_user = {draw(route(50), Lot("ann", f"key-{i}", "r"))[0].number for i in range(200)}
    assert (len(by_key), len(by_user)) == (1, 1)


def test_callers_without_user_and_key_are_drawn_request_by_request() -> None:
    """A server without keys would else give all of its callers to one arm."""
    got = sum(draw(route(20), Lot(request=f"r{i}"))[0].number == 2 for i in range(5000))
    assert 5000 * 0.2 * 0.85 < got < 5000 * 0.2 * 1.15


def test_widening_keeps_those_who_have_the_canary() -> None:
    had = {i for i in range(3000) if takes("a@b", f"user:{i}", "t", 10)}
    have = {i for i in range(3000) if takes("a@b", f"user:{i}", "t", 30)}
    assert had < have


def test_two_canaries_and_two_aliases_draw_independently() -> None:
    def drawn(alias: str, trial: str) -> set[int]:
        return {i for i in range(10_000) if takes(alias, f"user:{i}", trial, 50)}

    first = drawn("a@champion", "t")
    for other in (drawn("a@champion", "u"), drawn("b@champion", "t")):
        assert 2200 < len(first & other) < 2800


def test_no_split_no_arm_and_a_withdrawn_canary_leaves_all_to_the_champion() -> None:
    assert draw(Route(version(1)), Lot("ann")) == (version(1), None, None)
    gone = replace(route(50), canary=None)
    numbers = {draw(gone, Lot(f"u{i}"))[0].number for i in range(100)}
    assert numbers == {1}


def test_a_shadow_runs_beside_the_champion_alone_and_request_by_request() -> None:
    both = route(50, shadow=Shadow("5hade", 2, 30))
    drawn = [draw(both, Lot("u", request=f"r{i}")) for i in range(2000)]
    champion = draw(both, Lot("u"))[1]
    assert champion is not None
    if champion.arm is Arm.CANARY:
        drawn = [draw(both, Lot("v", request=f"r{i}")) for i in range(2000)]
    beside = sum(found[2] is not None for found in drawn)
    for found, taken, shadow in (draw(both, Lot(f"u{i}", request=f"r{i}")) for i in range(500)):
        assert taken is not None
        assert (found.number == 2) == (taken.arm is Arm.CANARY)
        assert shadow is None or taken.arm is Arm.CHAMPION
    assert 2000 * 0.3 * 0.85 < beside < 2000 * 0.3 * 1.15 or beside == 0


# -- when it ends ------------------------------------------------------------------------------------------------


def test_a_canary_like_its_champion_is_left_alone() -> None:
    assert fault_of(LIMITS, arm(900, 9), arm(100, 1), GOOD) is None


def test_errors_beyond_the_champions_end_a_canary_and_the_reason_says_so() -> None:
    fault = fault_of(LIMITS, arm(900, 9), arm(100, 7), GOOD)
    assert fault == "errors: 7.0% of 100 requests, the champion 1.0% of 900, at most 6.0% allowed"


def test_errors_that_the_champion_has_too_are_no_fault_of_the_canary() -> None:
    assert fault_of(LIMITS, arm(900, 180), arm(100, 22), GOOD) is None


def test_slow_first_tokens_end_a_canary() -> None:
    fault = fault_of(LIMITS, arm(900), arm(100, seconds=0.5), GOOD)
    assert fault is not None
    assert fault.startswith("latency: 95 % of first tokens within ")


def test_a_ratio_of_tiny_latencies_is_noise() -> None:
    assert fault_of(LIMITS, arm(900, seconds=0.002), arm(100, seconds=0.02), GOOD) is None


def test_a_tenth_of_slow_requests_is_enough_and_a_hundredth_is_not() -> None:
    for share, ends in ((0.1, True), (0.01, False)):
        slow = int(200 * share)
        mixed = sum_arms([arm(200 - slow), arm(slow, seconds=5.0)])
        assert (fault_of(LIMITS, arm(900), mixed, GOOD) is not None) is ends


@pytest.mark.parametrize(
    ("shadow", "word"),
    [(ShadowFigures(9, 0, 0, 200, 120, 0.0), "agree"), (ShadowFigures(9, 0, 0, 200, 190, -300.0), "is -1.5")],
)
def test_a_shadow_that_disagrees_ends_the_canary_of_its_version_alone(shadow: ShadowFigures, word: str) -> None:
    beside = Shadow("5hade", 2, 5)
    fault = judged(split(shadow=beside), arm(0), arm(0), shadow)
    assert fault is not None
    assert fault.startswith("quality: ")
    assert word in fault
    assert judged(split(shadow=replace(beside, number=3)), arm(0), arm(0), shadow) is None
    assert judged(replace(split(shadow=beside), canary=None), arm(0), arm(0), shadow) is None


def test_nothing_ends_a_canary_below_the_minimum_counts() -> None:
    few = LIMITS.min_requests - 1
    assert fault_of(LIMITS, arm(900), arm(few, few), GOOD) is None
    assert fault_of(LIMITS, arm(900), arm(few, seconds=60), GOOD) is None
    assert fault_of(LIMITS, arm(few), arm(900, seconds=60), GOOD) is None
    assert fault_of(LIMITS, arm(900), arm(900), ShadowFigures(9, 0, 0, 99, 0, -999.0)) is None


def test_the_quantile_is_the_bucket_in_which_it_lies() -> None:
    rng = random.Random(20261122)
    times = [rng.lognormvariate(-3, 1) for _ in range(2000)]
    counts = [0] * (len(edges()) + 1)
    for seconds in times:
        counts[bucket_of(seconds)] += 1
    exact = sorted(times)[int(0.95 * len(times)) - 1]
    assert exact <= ArmFigures(2000, 0, 0, tuple(counts)).first_token_p95_s <= exact * 1.25
    assert ArmFigures().first_token_p95_s == 0


@pytest.mark.parametrize(
    ("outcome", "seconds", "errors"),
    [
        ("complete", 0.2, 0),
        ("cancelled", 0.2, 0),
        ("queue_full", 0.2, 0),
        ("context_length_exceeded", 0.2, 0),
        ("engine_lost", 0.2, 0),
        ("version_revoked", 0.2, 0),
        ("adapter_numerics", 0.2, 1),
        ("deadline_exceeded", PATIENT_S - 0.1, 0),  # who waits no longer could end any canary
        ("deadline_exceeded", PATIENT_S, 1),
        ("internal_error", 0.2, 1),
    ],
)
def test_only_what_the_version_may_be_to_blame_for_counts_against_it(outcome: str, seconds: float, errors: int) -> None:
    tally, weights = Tally(), Weights("sum@2", "b" * 64, "sum", 2, f"{2:064x}")
    tally.ended(Ended(weights, outcome, (), Usage(1, 1), 1, 1, 0.1, seconds, None, Taken("trial", Arm.CANARY)))
    (figures,) = tally.changed().values()
    assert isinstance(figures, ArmFigures)
    assert (figures.requests, figures.errors) == (1, errors)
