"""Scenarios played against the stub: an honest server passes, and every way to fail one is seen in its figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from adapters.errors import ServerUnreachable
from adapters.http_door import HttpDoor
from adapters.records import AdapterVersion
from loadtests import scenarios
from loadtests.arm_figures import (
    ArmRun,
    Figure,
    arm_found,
    figures,
    first_tokens_ms,
    odd_texts,
    requests_per_s,
    told_apart,
)
from loadtests.bench_shell import BenchFailed
from loadtests.flips import Flip, Flipper, flipped
from loadtests.goals import Word
from loadtests.profiles import Plan, Planned
from loadtests.shapes import SCENARIOS, Arm, Scenario
from loadtests.stage import Stage, engine_limit
from loadtests.stub_server import BASE_DIGEST, NAME, Lie, Stub, digest_of, serving
from tests.adapter_factory import base_record


def sample(at: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A whole answer of four tokens, 10 ms apart, by a version of its own digest."""
    fields: dict[str, Any] = {
        "model": "a@1", "path": "/v1/completions", "named": "a@1", "digest": "d1", "tokens": 4, "ttft_ms": 20.0,
        "tpot_ms": 10.0, "gaps_ms": (10.0, 10.0, 10.0), "ended_s": at + 0.05, "digest_checked": True, "violations": (),
        "unfinished": False, "asked_at": at, "late_ms": 0.0, "prompt": 0, "cache": "device", "text": "w0 w1 w2 w3",
    }  # fmt: skip
    return {**fields, **changes}


def run_of(arm: Arm, samples: Sequence[Mapping[str, Any]], **changes: Any) -> ArmRun:
    picks = tuple(i % max(1, arm.adapters) for i in range(len(samples)))
    models = tuple(f"a{n}@1" for n in range(arm.adapters))
    return replace(ArmRun(arm, picks, models, samples, 8, None), **changes)


def judged(id_: str, runs: Sequence[ArmRun]) -> dict[str, float | None]:
    return {f.what: f.ours for f in figures(SCENARIOS[id_], runs)}


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_first_tokens_count_from_when_they_were_due() -> None:
    """A caller that was kept busy asks late: its request waited all the same."""
    assert first_tokens_ms([sample(late_ms=500.0)]) == [520.0]


def test_tokens_of_failed_answers_make_no_throughput() -> None:
    arm = Arm("a", 1)
    whole = arm_found(run_of(arm, [sample(0.0), sample(1.0)]))
    half = arm_found(run_of(arm, [sample(0.0), sample(1.0, violations=("missing_done: 4",))]))
    assert half.tokens_per_s == pytest.approx(whole.tokens_per_s / 2, rel=0.01)
    assert (whole.failed, half.failed) == (0, 1)


def test_a_refusal_for_overload_is_no_failure_but_any_other_is() -> None:
    found = arm_found(
        run_of(
            Arm("a", 1),
            [sample(violations=("http_status: 429 overloaded",)), sample(violations=("http_status: 503 not_ready",))],
        )
    )
    assert (found.refused, found.failed, found.wrong) == (1, 1, 0)


def test_what_was_planned_and_never_asked_counts_as_unfinished() -> None:
    found = arm_found(run_of(Arm("a", 1), [sample(), sample(unfinished=True)], picks=(0, 0, 0, 0)))
    assert (found.requests, found.unfinished) == (1, 3)


def test_hits_are_what_the_server_says_beside_what_the_slots_could_hold() -> None:
    samples = [sample(cache=c) for c in ("device", "host", "disk", "device")]
    found = arm_found(run_of(Arm("a", 4), samples, picks=(0, 1, 2, 0), slots=1))
    assert (found.hit_ratio, found.lru_ratio) == (0.5, 0.0)
    assert arm_found(run_of(Arm("a", 1), [sample(cache=None)])).hit_ratio is None


def test_a_busy_server_is_judged_by_the_middle_of_the_run() -> None:
    steady = [sample(0.1 * n) for n in range(50)]
    lagging = [*steady, sample(60.0)]  # one caller that came much later
    assert requests_per_s(steady) == pytest.approx(10.0)
    assert requests_per_s(lagging) == pytest.approx(10.0, rel=0.1)
    assert requests_per_s([sample(violations=("http_status: 500",))] * 9) == 0.0


def test_the_same_weights_say_the_same_to_the_same_prompt() -> None:
    said = [sample(text="right") for _ in range(3)] + [sample(text="wrong")]
    assert odd_texts(said) == [3]
    others = [sample(digest="d2", text="else"), sample(prompt=1, text="else"), sample(tokens=5, text="else")]
    assert odd_texts([*said[:3], *others]) == []


def test_what_was_asked_again_in_quiet_outweighs_how_often_something_was_said() -> None:
    """A version that lived for seconds answered a few times only, and may have been wrong each time."""
    assert odd_texts([sample(text="wrong"), sample(text="wrong")], [sample(text="right")]) == [0, 1]


def test_what_is_asked_again_is_every_version_and_prompt_once_by_its_number() -> None:
    made = Plan("b", 320, "salt", {"a@1": "d1"}, [Planned(None, "a", 0, 50, 32), Planned(None, "a", 1, 50, 32)])
    samples = [
        sample(named="a@1"), sample(named="a@1"), sample(named="a@2", digest="d2", prompt=1),
        sample(named="a@3", violations=("cut_short",)),
    ]  # fmt: skip
    again = scenarios.asked_again(made, samples, [Flip("a", 2, "d2", 0, 1), Flip("a", 0, "", 0, 1, "error")])
    assert again.items == [Planned(None, "a@1", 0, 50, 32), Planned(None, "a@2", 1, 50, 32)]
    assert again.digests == {"a@1": "d1", "a@2": "d2"}
    assert again.salt == made.salt


def test_failed_answers_and_those_of_no_plan_are_not_compared() -> None:
    odd = [sample(text="x", violations=("cut_short",)), sample(text="y", prompt=-1), sample(text="z", unfinished=True)]
    assert odd_texts([sample(), sample(), *odd]) == []


def test_texts_that_are_all_alike_prove_nothing_and_it_is_told() -> None:
    alike = [sample(digest=d) for d in ("d1", "d2", "d3", "d4")]
    apart = [sample(digest=d, text=d) for d in ("d1", "d2", "d3", "d4")]
    assert (told_apart(alike), told_apart(apart), told_apart([sample()])) == (0.25, 1.0, None)


# -- each scenario's figure --------------------------------------------------------------------------------------------


def stretched(arm: Arm, every_s: float, count: int = 40, **changes: Any) -> ArmRun:
    return run_of(arm, [sample(n * every_s, **changes) for n in range(count)])


def test_w1_holds_every_size_against_the_smallest() -> None:
    few, *_, many = SCENARIOS["W1"].arms
    found = judged("W1", [stretched(few, 0.1), stretched(many, 0.2)])
    assert found[f"tok/s, {many.name} / {few.name}"] == pytest.approx(0.5, rel=0.02)
    assert found["tok/s, 100 adapters / 5 adapters"] is None  # it was not played


def test_w2_shows_hits_beside_throughput() -> None:
    runs = [stretched(arm, 0.1, cache="host") for arm in SCENARIOS["W2"].arms]
    assert judged("W2", runs)["hits, alpha 0.1"] == 0.0


def test_w3_counts_late_and_missing_first_tokens_against_the_share() -> None:
    arm = SCENARIOS["W3"].arms[0]
    samples = [sample(), sample(late_ms=6000.0), sample(violations=("http_status: 429",)), sample()]
    assert judged("W3", [run_of(arm, samples)])["first tokens within 6 s, cv 1"] == 0.5


def test_w5_is_not_judged_by_a_run_with_failures() -> None:
    fits, twice = SCENARIOS["W5"].arms
    what = "median first token, twice the slots / fits"
    good = [stretched(fits, 0.1), stretched(twice, 0.1, ttft_ms=60.0)]
    assert judged("W5", good)[what] == pytest.approx(3.0)
    bad = [good[0], run_of(twice, [sample(), sample(violations=("missing_done",))])]
    assert judged("W5", bad)[what] is None


FLIPS = flipped([Flip("a", 1, "d1", 0.0, 1.0), Flip("a", 2, "d2", 2.0, 3.0)], [sample(0.0), sample(4.0)])


def words(found: Sequence[Figure]) -> dict[str, Word]:
    return {v.goal.id: v.word for v in scenarios.judged(found)}


def w6(samples: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Word]:
    arm = SCENARIOS["W6"].arms[0]
    return words(figures(SCENARIOS["W6"], [run_of(arm, samples, **{"flipped": FLIPS, **changes})]))


def test_w6_without_a_fault_is_reached() -> None:
    assert w6([sample(), sample(4.0)]) == {"W6.failed": Word.REACHED, "W6.wrong": Word.REACHED}


def test_a_version_that_cannot_be_asked_again_fails_w6() -> None:
    assert w6([sample(), sample(4.0)], again=[sample(violations=("http_status: 404",))])["W6.failed"] is Word.NOT_DONE


@pytest.mark.parametrize(
    ("planted", "failed", "wrong"),
    [
        ([sample(violations=("wrong_digest: a@1",))], Word.NOT_DONE, Word.NOT_DONE),
        ([sample(violations=("stale_alias: a",))], Word.NOT_DONE, Word.NOT_DONE),
        ([sample(violations=("weights_changed",))], Word.NOT_DONE, Word.NOT_DONE),
        ([sample(text="other words")], Word.NOT_DONE, Word.NOT_DONE),
        ([sample(violations=("missing_done: x",))], Word.NOT_DONE, Word.REACHED),
        ([sample(unfinished=True)], Word.NOT_DONE, Word.REACHED),
    ],
)
def test_one_wrong_or_missing_answer_of_hundreds_fails_w6(
    planted: list[dict[str, Any]], failed: Word, wrong: Word
) -> None:
    assert w6([sample(n * 0.01) for n in range(300)] + planted) == {"W6.failed": failed, "W6.wrong": wrong}


def test_w6_proves_nothing_without_a_flip_that_answered() -> None:
    nothing = flipped([], [sample()])
    unseen = flipped([Flip("a", 9, "d9", 0.0, 0.0)], [sample()])
    unknown = {"W6.failed": Word.UNKNOWN, "W6.wrong": Word.UNKNOWN}
    assert w6([sample()], flipped=nothing) == w6([sample()], flipped=unseen) == unknown


def test_a_flip_that_failed_fails_w6() -> None:
    broken = flipped([*[Flip("a", 1, "d1", 0.0, 1.0)], Flip("a", 0, "", 1.0, 2.0, "store_failed: x")],
                     [sample(0.0), sample(4.0)])  # fmt: skip
    assert w6([sample(), sample(4.0)], flipped=broken)["W6.failed"] is Word.NOT_DONE


def test_only_flips_under_load_count_and_the_first_answer_is_dated_from_the_move() -> None:
    flips = [Flip("a", 1, "d1", -2.0, -1.0), Flip("a", 2, "d2", 0.5, 1.0), Flip("a", 3, "d3", 9.0, 9.5)]
    answers = [sample(0.0), sample(1.5, named="a@2"), sample(3.0, named="a@2")]
    found = flipped(flips, answers)
    assert (found.flips, found.answered, found.seconds) == (1, 1, 0.5)
    assert found.first_answer_s == pytest.approx(0.52)


def w7(quiet: Mapping[str, float], **first: Any) -> float | None:
    runs = []
    for arm in SCENARIOS["W7"].arms:
        times = [sample(model=f"a{n}@1", ttft_ms=quiet[arm.name]) for n in range(1, 9)]
        times[0] |= first
        runs.append(run_of(arm, [*times, sample(model="a0@1", ttft_ms=9999.0)]))
    return judged("W7", runs)["p99 first token of the quiet, one hot / all alike"]


def test_w7_looks_at_the_quiet_ones_alone() -> None:
    assert w7({"all alike": 100.0, "one hot": 150.0}) == pytest.approx(1.5)
    assert words([Figure("W7", "", w7({"all alike": 100.0, "one hot": 300.0}), "", goal="W7")]) == {"W7": Word.NOT_DONE}


def test_w7_is_not_judged_when_a_quiet_one_was_refused() -> None:
    assert w7({"all alike": 100.0, "one hot": 100.0}, violations=("http_status: 429",)) is None


def test_w7_is_not_judged_when_our_own_callers_were_the_queue() -> None:
    """With every caller stuck behind the hot one, the quiet wait here and not in the server."""
    assert w7({"all alike": 100.0, "one hot": 100.0}, late_ms=900.0) is None


def test_w8_holds_the_unmerged_against_merged_and_base() -> None:
    runs = [stretched(arm, 0.1 if arm.name != "unmerged" else 0.2) for arm in SCENARIOS["W8"].arms]
    found = judged("W8", runs)
    assert [round(v or 0, 1) for v in found.values()] == [0.5, 0.5]


# -- played, locust and all --------------------------------------------------------------------------------------------


class FakeDoor:
    """Publishes and promotes at the stub. broken: it refuses."""

    def __init__(self, stub: Stub, broken: bool = False) -> None:
        self._stub, self._broken = stub, broken

    def publish(self, name: str, folder: Path, **_: object) -> AdapterVersion:
        assert (folder / "adapter_model.safetensors").is_file()
        if self._broken:
            raise ServerUnreachable("nobody there")
        return version(self._stub.publish())

    def promote(self, name: str, number: int, **_: object) -> None:
        self._stub.move(number)


def version(number: int) -> AdapterVersion:
    return cast(AdapterVersion, FakeVersion(number))


class FakeVersion:
    """What a stage needs of a version."""

    def __init__(self, number: int) -> None:
        self.name, self.number, self.digest, self.id = NAME, number, digest_of(number), f"{NAME}@{number}"


@contextmanager
def staged(lie: Lie = Lie.NONE, *, broken: bool = False) -> Iterator[Stage]:
    stub = Stub(lie, champion=1, versions=1, gap_s=0.005)
    with serving(stub) as url:
        door = cast(HttpDoor, FakeDoor(stub, broken))
        yield Stage(url, replace(base_record(), digest=BASE_DIGEST), door, (version(1),), 8, 64, servers={})


TINY = replace(
    SCENARIOS["W6"], arms=(Arm("flips", 1, users=4, requests=120),), flip_every_s=0.1, rows=2,
    prompt=(4, 4), answer=(4, 4),
)  # fmt: skip


def played(at: Stage, scenario: Scenario = TINY) -> ArmRun:
    return scenarios.play(scenario, scenario.arms[0], at, at.url, rate=100.0, seed=1)


def test_versions_that_flip_under_load_answer_and_nothing_is_wrong() -> None:
    with staged() as at:
        runs, missing = scenarios.replay(TINY, at, seed=1)
    (line,) = [arm_found(r) for r in runs]
    assert (line.requests, line.failed, line.wrong, line.unfinished, line.problems) == (120, 0, 0, 0, ())
    assert words(figures(TINY, runs)) == {"W6.failed": Word.REACHED, "W6.wrong": Word.REACHED}
    assert missing == []
    told = json.loads(json.dumps(scenarios.report(TINY, runs, [line], figures(TINY, runs)), allow_nan=False))
    assert told["published"] == SCENARIOS["W6"].anchor
    assert told["flips"][0]["answered"] > 0


@pytest.mark.parametrize("lie", [Lie.WRONG_CONTENT, Lie.STALE_ALIAS, Lie.WRONG_DIGEST])
def test_a_server_that_swaps_wrongly_is_found_out(lie: Lie) -> None:
    """The stub's other words come under the right name and digest: only the texts tell."""
    with staged(lie) as at:
        run = played(at)
    assert arm_found(run).wrong > 0
    assert words(figures(TINY, [run]))["W6.wrong"] is not Word.REACHED


def test_flips_that_fail_are_told_with_their_reason() -> None:
    with staged(broken=True) as at:
        run = played(at)
    assert run.flipped is not None
    assert run.flipped.failed > 0
    assert "nobody there" in run.flipped.errors[0]


def test_requests_of_an_open_arm_come_at_their_times() -> None:
    arm = Arm("a", 1, arrivals=SCENARIOS["W7"].arms[0].arrivals, users=8, requests=40)
    spread = replace(SCENARIOS["W7"], prompt=(4, 4), answer=(4, 4), arms=(arm,))
    with staged() as at:
        run = played(at, spread)
    asked = sorted(s["asked_at"] for s in run.samples)
    assert len(asked) == 40
    assert asked[-1] - asked[0] == pytest.approx(40 / (100.0 * 0.62), rel=0.5)
    assert statistics.median(s["late_ms"] for s in run.samples) < 50


def test_a_merged_arm_without_its_server_is_left_out_and_told() -> None:
    w8 = replace(SCENARIOS["W8"], arms=tuple(replace(a, requests=6, users=2) for a in SCENARIOS["W8"].arms), rows=1,
                 prompt=(4, 4), answer=(4, 4))  # fmt: skip
    with staged() as at:
        runs, missing = scenarios.replay(w8, at, seed=1)
    assert [r.arm.name for r in runs] == ["base", "unmerged"]
    assert missing == ["W8, merged: it needs a server of its own; leave --url out"]


def test_a_server_that_answers_nothing_is_no_measurement() -> None:
    with staged(Lie.HTTP_503) as at, pytest.raises(BenchFailed, match="http_status: 503"):
        scenarios.replay(TINY, at, seed=1)


def test_a_flip_is_published_before_it_is_promoted() -> None:
    stub = Stub(champion=1, versions=1)
    times = iter(range(10))
    flip = Flipper(
        cast(HttpDoor, FakeDoor(stub)), base_record(), [NAME], TINY.kind, 1.0, now=lambda: next(times)
    ).flip()
    assert (flip.number, stub.champion, flip.begun_at, flip.moved_at, flip.error) == (2, 2, 0, 1, "")


@pytest.mark.parametrize("words_", [["W9"], ["w6"], ["--rate", "0"], ["--rate", "inf"], ["--rate", "x"]])
def test_nonsense_is_a_usage_error(words_: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scenarios.main(words_)
    assert ended.value.code == 2


def test_a_url_where_nobody_is_ready_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert scenarios.main(["--url", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.strip() == "error[bench]: no server is ready at http://127.0.0.1:9"


def test_a_server_without_the_engine_s_limits_is_told() -> None:
    with serving(Stub()) as url, pytest.raises(BenchFailed, match="metrics"):
        engine_limit(url, "slots")
