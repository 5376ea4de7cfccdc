"""What the demo shows: times against budgets, claims, answers side by side; plain lines where nobody watches."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from examples.demo_screen import Card, ClaimFailed, Screen


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def screen(clock: Clock) -> Screen:
    return Screen(Console(file=io.StringIO(), width=120, highlight=False), clock)


def shown(screen: Screen) -> str:
    file = screen.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_stage_tells_its_budget_first_and_its_time_at_the_end(screen: Screen, clock: Clock) -> None:
    with screen.stage("Train", 60):
        assert "[1] Train  (budget 60 s)" in shown(screen)
        clock.time = 12.5
    assert "took 12.5 s of 60 s, in time" in shown(screen)


def test_a_stage_over_its_budget_says_so_in_line_and_in_the_table(screen: Screen, clock: Clock) -> None:
    with screen.stage("Train", 60):
        clock.time = 75.0
    screen.times()
    assert shown(screen).count("OVER by 15 s") == 3  # the stage, its row, and the row of all together


def test_a_stage_that_breaks_off_still_tells_its_time(screen: Screen, clock: Clock) -> None:
    def interrupted() -> None:
        with screen.stage("Train", 60):
            clock.time = 3.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "broke off after 3.0 s" in shown(screen)
    assert [s.took_s for s in screen.stages] == [3.0]


def test_a_claim_that_does_not_hold_ends_the_story(screen: Screen) -> None:
    screen.claim("water is wet", True)
    with pytest.raises(ClaimFailed, match="the moon is cheese: it is rock"):
        screen.claim("the moon is cheese", False, "it is rock")
    assert screen.claims == 1
    assert "✓ water is wet" in shown(screen)
    assert "✗ the moon is cheese: it is rock" in shown(screen)


def test_what_was_reused_stands_in_the_table_of_times(screen: Screen) -> None:
    with screen.stage("Train", 60):
        screen.reuse("s@1")
    with screen.stage("Evaluate", 60):
        pass
    screen.times()
    rows = [line for line in shown(screen).splitlines() if line.startswith(("1 ", "2 "))]
    assert rows[0].rstrip().endswith("s@1")
    assert rows[1].rstrip().endswith("-")


def test_into_a_pipe_progress_is_told_rarely_and_at_its_end(screen: Screen, clock: Clock) -> None:
    for step in range(1, 31):
        clock.time += 1.0
        screen.progress("training", step, 30, f"loss {step}")
    told = [line.strip() for line in shown(screen).splitlines()]
    assert told == [
        "training: 1/30  loss 1",
        "training: 11/30  loss 11",
        "training: 21/30  loss 21",
        "training: 30/30  loss 30",
    ]


def test_answers_stand_side_by_side_with_version_digest_and_figures(screen: Screen) -> None:
    cards = [
        Card(name, (f"{name}@1 0123456789ab", "TTFT 12 ms, 5.0 tokens/s"), f"says {name}") for name in ("a", "b", "c")
    ]
    screen.side_by_side(cards)
    lines = shown(screen).splitlines()
    for part in ("{}@1 0123456789ab", "says {}"):
        assert any(all(part.format(name) in line for name in ("a", "b", "c")) for line in lines), part
    assert max(map(len, lines)) <= 120


def test_an_answer_is_shown_as_it_is_markup_and_all(screen: Screen) -> None:
    screen.side_by_side([Card("[bold]x", (), "[red]a[0][/red]")])
    screen.say("[blue]b")
    assert "[red]a[0][/red]" in shown(screen)
    assert "[bold]x" in shown(screen)
    assert "[blue]b" in shown(screen)


def test_an_empty_answer_still_has_its_frame(screen: Screen) -> None:
    screen.side_by_side([Card("a", (), "  ")])
    assert "…" in shown(screen)
