"""Events are read however the bytes are cut, and figures are counted from the moments at which they came."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtests.profiles import Asker, Target, zipf
from loadtests.sse import EventReader, Problem, StreamCheck

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "X-Adapter": "s",
    "X-Adapter-Version": "3",
    "X-Adapter-Digest": "d",
    "X-Base-Digest": "b",
}
NAMED = {"model": "s@3", "adapter": "s", "adapter_version": 3, "adapter_digest": "d", "base_digest": "b"}


def event(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    return b"data: " + json.dumps({**NAMED, "choices": choices, **more}, ensure_ascii=False).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": tokens})


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_wherever_the_bytes_are_cut(size: int) -> None:
    raw = ": a comment\r\n\r\ndata: één\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\n".encode()
    reader = EventReader()
    found = [e for i in range(0, len(raw), size) for e in reader.feed(raw[i : i + size])]
    assert found == ["één", "two\nlines", "[DONE]"]
    assert not reader.torn


def test_an_event_cut_at_the_end_is_torn() -> None:
    reader = EventReader()
    assert reader.feed(b'data: {"a": 1') == []
    assert reader.torn


def test_times_run_from_the_request_and_an_empty_first_delta_is_no_token() -> None:
    clock = Clock()
    check = StreamCheck(3, clock)
    check.opened(200, HEADERS, str)
    check.feed(event(""))
    for at, chunk in ((0.5, event("a")), (0.7, event("b")), (1.0, event("c", "length"))):
        clock.time = at
        check.feed(chunk)
    check.feed(usage(3) + b"data: [DONE]\n\n")
    clock.time = 1.5
    answer = check.end()
    assert answer.violations == ()
    assert answer.ttft_s == 0.5
    assert answer.tpot_s == pytest.approx(0.25)
    assert answer.gaps_s == pytest.approx((0.2, 0.3))
    assert answer.tokens_per_s == 2.0


def test_an_answer_of_one_token_has_no_time_per_output_token() -> None:
    check = StreamCheck(1, Clock())
    check.opened(200, HEADERS, str)
    check.feed(event("a", "length") + usage(1) + b"data: [DONE]\n\n")
    answer = check.end()
    assert (answer.violations, answer.tpot_s) == ((), None)


def test_a_body_that_just_stops_is_blamed_for_all_that_is_missing() -> None:
    check = StreamCheck(4, Clock())
    check.opened(200, HEADERS, str)
    check.feed(event("a") + b'data: {"torn')
    problems = {v.problem for v in check.end().violations}
    assert problems == {Problem.MISSING_DONE, Problem.NO_FINISH, Problem.NO_USAGE}


def test_a_refusal_is_told_by_status_and_code() -> None:
    check = StreamCheck(4, Clock())
    assert not check.opened(429, {}, lambda: '{"error": {"code": "queue_full"}}')
    assert [str(v) for v in check.end().violations] == ["http_status: 429 queue_full"]


def test_equal_seeds_ask_the_same_and_others_do_not() -> None:
    targets = [Target("base"), Target("a", "a", alias="champion")]

    def asked(seed: int) -> list[Any]:
        asker = Asker(targets, seed=seed, exponent=1.0, max_tokens=32)
        return [asker.next() for _ in range(20)]

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


def test_the_first_model_is_asked_most() -> None:
    targets = [Target(str(i)) for i in range(5)]
    asker = Asker(targets, seed=0, exponent=1.0, max_tokens=8)
    asked = [asker.next().target.id for _ in range(3000)]
    shares = [asked.count(t.id) / 3000 for t in targets]
    wanted = [w / sum(zipf(5, 1.0)) for w in zipf(5, 1.0)]
    assert shares == pytest.approx(wanted, abs=0.03)
