"""An adapter is set aside for what it did to the model, for a while, and never for what somebody asked."""

from __future__ import annotations

from serving.engine.breaker import FIRST_S, KEPT, LONGEST_S, STRIKES, WINDOW_S, Breaker


def struck(times: int, at: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(times):
        breaker.strike("a", at)
    return breaker


def test_two_strikes_are_forgiven_and_three_are_not() -> None:
    assert struck(STRIKES - 1).aside_s("a", 0.0) == 0.0
    breaker = struck(STRIKES)
    assert breaker.aside_s("a", 10.0) == FIRST_S - 10.0
    assert breaker.aside(10.0) == ("a",)
    assert breaker.aside_s("b", 10.0) == 0.0


def test_strikes_long_ago_do_not_count() -> None:
    breaker = struck(STRIKES - 1)
    breaker.strike("a", WINDOW_S)
    assert breaker.aside(WINDOW_S) == ()


def test_after_its_time_one_strike_sets_aside_for_twice_as_long_up_to_a_limit() -> None:
    breaker = struck(STRIKES)
    now, seen = 0.0, []
    for _ in range(8):
        seen.append(breaker.aside_s("a", now))
        now += seen[-1]
        assert breaker.aside_s("a", now) == 0.0
        breaker.strike("a", now)
    assert seen[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert seen[-1] == LONGEST_S


def test_one_good_answer_after_its_time_clears_an_adapter() -> None:
    breaker = struck(STRIKES)
    breaker.good("a", FIRST_S - 1)  # of a sequence that began before
    assert breaker.aside_s("a", FIRST_S - 1) == 1.0
    breaker.good("a", FIRST_S)
    breaker.strike("a", FIRST_S + 1)
    assert breaker.aside(FIRST_S + 1) == ()


def test_a_good_answer_between_strikes_does_not_hide_them() -> None:
    breaker = struck(STRIKES - 1)
    breaker.good("a", 1.0)
    breaker.strike("a", 2.0)
    assert breaker.aside(2.0) == ("a",)


def test_the_book_is_bounded() -> None:
    breaker = Breaker()
    for number in range(2 * KEPT):
        breaker.strike(str(number), 0.0)
    assert len(breaker._records) == KEPT
