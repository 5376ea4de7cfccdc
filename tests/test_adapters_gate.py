"""The gate: a pure function of a report and a policy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.gate import decide
from adapters.reports import Decision, GatePolicy, PairedDifference, Report, Role, Verdict
from tests.adapter_factory import policy, report

VERSION = SimpleNamespace(name="sum", number=2, digest="a" * 64, base_digest="b" * 64)
CHAMPION = "c" * 64


def judged(found: Report | None, rules: GatePolicy | None = None, champion: str | None = None) -> Decision:
    return decide(found, rules or policy(), version_digest=VERSION.digest, champion_digest=champion)


def test_a_version_that_beats_the_base_passes() -> None:
    found = report(VERSION)
    assert judged(found) == Decision(Verdict.PASS, (), found.digest)


def test_without_a_policy_nothing_is_decided() -> None:
    decision = decide(report(VERSION), None, version_digest=VERSION.digest, champion_digest=None)
    assert decision.verdict is Verdict.UNDECIDED
    assert "set one" in decision.reasons[0]


def test_without_a_report_nothing_is_decided() -> None:
    assert judged(None).verdict is Verdict.UNDECIDED


def test_too_few_examples_decide_nothing_however_good() -> None:
    decision = judged(report(VERSION, n=49))
    assert decision.verdict is Verdict.UNDECIDED
    assert decision.reasons == ("n = 49 different prompts, the policy needs 50",)


def test_copies_of_one_prompt_count_once() -> None:
    """64 copies of one row, with the zero-width interval that they give, are one piece of evidence."""
    found = report(VERSION)
    copies = tuple({**example, "prompt": f"one  row{' ' * i}\n"} for i, example in enumerate(found.examples))
    decision = judged(replace(found, examples=copies))
    assert decision.verdict is Verdict.UNDECIDED
    assert decision.reasons == ("n = 1 different prompts, the policy needs 50",)


def test_a_comparison_on_fewer_pairs_than_the_report_says_counts_its_pairs() -> None:
    few = PairedDifference(Role.BASE, "rouge1", 0.2, 0.1, 0.3, 5)
    assert judged(report(VERSION, differences=(few,))).verdict is Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("low", "margin", "verdict"),
    [
        (0.01, 0.0, Verdict.PASS),
        (0.0, 0.0, Verdict.FAIL),
        (0.02, 0.02, Verdict.FAIL),
    ],
)
def test_the_interval_must_begin_above_the_margin(low: float, margin: float, verdict: Verdict) -> None:
    found = report(VERSION, differences=(PairedDifference(Role.BASE, "rouge1", 0.1, low, 0.2, 64),))
    rules = policy(margin=margin)
    assert judged(found, rules).verdict is verdict


@pytest.mark.parametrize(("low", "verdict"), [(-0.019, Verdict.PASS), (-0.02, Verdict.FAIL)])
def test_a_small_loss_to_the_champion_is_tolerated(low: float, verdict: Verdict) -> None:
    found = report(VERSION, CHAMPION)
    differences = (found.differences[0], replace(found.differences[1], low=low))
    assert judged(replace(found, differences=differences), champion=CHAMPION).verdict is verdict


def test_a_report_against_another_champion_fails() -> None:
    decision = judged(report(VERSION, "d" * 64), champion=CHAMPION)
    assert decision.verdict is Verdict.FAIL
    assert "champion" in decision.reasons[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_digest": "e" * 64}, "the policy names"),
        ({"adapter_digest": "e" * 64}, "the report is about"),
        ({"differences": ()}, "does not compare"),
        ({"systems": ()}, "no scores"),
    ],
)
def test_a_report_that_speaks_of_something_else_fails(change: dict[str, Any], words: str) -> None:
    decision = judged(report(VERSION, **change))
    assert decision.verdict is Verdict.FAIL
    assert any(words in reason for reason in decision.reasons)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"empty_rate": 0.11}, "empty"), ({"length_ratio": 0.1}, "as long"), ({"length_ratio": 6.0}, "as long")],
)
def test_empty_or_shapeless_answers_fail_however_high_the_score(change: dict[str, Any], words: str) -> None:
    found = report(VERSION)
    systems = tuple(replace(s, **change) if s.role is Role.CANDIDATE else s for s in found.systems)
    decision = judged(replace(found, systems=systems))
    assert decision.verdict is Verdict.FAIL
    assert words in decision.reasons[0]


def test_every_rule_that_fails_is_named() -> None:
    found = report(VERSION, data_digest="e" * 64, n=3, low=-0.5)
    decision = judged(found)
    assert decision.verdict is Verdict.FAIL
    assert len(decision.reasons) == 3
