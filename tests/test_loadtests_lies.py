"""The load tester finds every lie of the stub server by its own name, and blames an honest server for nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from loadtests.profiles import Ask, Target, targets_of
from loadtests.sse import Answer, Problem, StreamCheck, Violation
from loadtests.stub_server import NAME, Lie, Stub, digest_of, serving
from loadtests.truth import Truth

PINNED = Target(f"{NAME}@2", NAME, number=2)
BARE = Target(NAME, NAME, alias="champion")
BASE = Target("base")

# What each lie must be called. A lie may break more than one promise; these are the ones that must be named.
CAUGHT = {
    Lie.HTTP_503: {Problem.HTTP_STATUS},
    Lie.NOT_A_STREAM: {Problem.NOT_A_STREAM},
    Lie.ERROR_EVENT: {Problem.ERROR_EVENT},
    Lie.TRUNCATED: {Problem.CONNECTION_LOST},
    Lie.MISSING_DONE: {Problem.MISSING_DONE},
    Lie.SECOND_DONE: {Problem.AFTER_DONE},
    Lie.SILENT_END: {Problem.NO_FINISH},
    Lie.CUT_SHORT: {Problem.CUT_SHORT},
    Lie.AFTER_FINISH: {Problem.AFTER_FINISH},
    Lie.NO_USAGE: {Problem.NO_USAGE},
    Lie.UNNAMED: {Problem.UNNAMED_WEIGHTS},
    Lie.DIGEST_CHANGES: {Problem.WEIGHTS_CHANGED},
    Lie.WRONG_DIGEST: {Problem.WRONG_DIGEST},
    Lie.WRONG_VERSION: {Problem.WRONG_MODEL},
    Lie.WRONG_BASE: {Problem.WRONG_BASE},
    Lie.BASE_ANSWERS: {Problem.WRONG_MODEL},
    Lie.HEADERS_DISAGREE: {Problem.HEADERS_DISAGREE},
    Lie.STALE_ALIAS: {Problem.STALE_ALIAS},
}


def nothing() -> None:
    """What happens in the middle of most streams."""


def ask(
    url: str, target: Target, *, chat: bool = True, midway: Callable[[], None] = nothing
) -> tuple[Answer, list[Violation]]:
    """One request and its judgement; `midway` is called once the first token is there."""
    with httpx.Client(base_url=url) as client:

        def fetch(path: str) -> Any:
            return client.get(path).raise_for_status().json()

        truth = Truth(fetch, fetch("/v1/models")["data"][0]["base_digest"])
        wanted = Ask(target, chat, "hello", max_tokens=6, seed=1, ignore_eos=True)
        before = truth.before(target)
        check = StreamCheck(wanted.max_tokens, time.monotonic)
        with client.stream("POST", wanted.path, json=wanted.body()) as response:
            if check.opened(response.status_code, response.headers, lambda: response.read().decode()):
                try:
                    for chunk in response.iter_raw():
                        check.feed(chunk)
                        if check.pieces == 1:
                            midway()
                except httpx.TransportError as error:
                    check.lost(type(error).__name__)
        answer = check.end()
        found = list(answer.violations)
        if answer.named is not None:
            found += truth.violations(target, before, answer.named)
        return answer, found


@pytest.mark.parametrize("target", [PINNED, BARE, BASE], ids=lambda t: t.id)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_an_honest_answer_is_blamed_for_nothing(target: Target, chat: bool) -> None:
    with serving(Stub()) as url:
        answer, violations = ask(url, target, chat=chat)
    assert violations == []
    assert answer.tokens == 6
    assert answer.text == "w0 w1 w2 w3 w4 w5 "
    assert answer.finish == "length"


@pytest.mark.parametrize("lie", list(CAUGHT))
def test_every_lie_is_found_by_name(lie: Lie) -> None:
    with serving(Stub(lie)) as url:
        _, violations = ask(url, BARE if lie is Lie.STALE_ALIAS else PINNED)
    assert CAUGHT[lie] <= {v.problem for v in violations}, violations


def test_no_lie_of_the_stub_is_left_untested() -> None:
    # Texts are compared over a whole run: test_loadtests_scenarios.py.
    assert set(CAUGHT) == set(Lie) - {Lie.NONE, Lie.REGISTRY_DOWN, Lie.WRONG_CONTENT}


def test_a_stream_that_began_before_a_flip_may_keep_its_version() -> None:
    stub = Stub(champion=1)
    with serving(stub) as url:
        answer, violations = ask(url, BARE, midway=lambda: stub.move(2))
        after, none = ask(url, BARE)
    assert (violations, none) == ([], [])
    assert answer.named is not None
    assert answer.named.digest == digest_of(1)
    assert after.named is not None
    assert after.named.digest == digest_of(2)


def test_a_version_that_became_champion_before_the_admission_is_right() -> None:
    """The alias moves between our look at it and the request: the answer's version is in the history since then."""
    stub = Stub(champion=1)
    with serving(stub) as url, httpx.Client(base_url=url) as client:

        def fetch(path: str) -> Any:
            return client.get(path).raise_for_status().json()

        truth = Truth(fetch, fetch("/v1/models")["data"][0]["base_digest"])
        before = truth.before(BARE)
        stub.move(2)
        answer, _ = ask(url, BARE)
        assert answer.named is not None
        assert truth.violations(BARE, before, answer.named) == []


def test_a_champion_of_before_the_request_is_stale() -> None:
    """The history knows version 1 as champion, but not since the request began."""
    stub = Stub(Lie.STALE_ALIAS, champion=2)
    with serving(stub) as url:
        _, violations = ask(url, BARE)
    assert [v.problem for v in violations] == [Problem.STALE_ALIAS]


def test_every_listed_model_becomes_a_target_that_knows_what_moves() -> None:
    def model(id_: str, adapter: str | None) -> dict[str, str | None]:
        return {"id": id_, "adapter": adapter}

    found = targets_of(
        {"data": [model("base", None), model("tiny", None), model("s", "s"), model("s@canary", "s"), model("s@3", "s")]}
    )
    assert found == [
        Target("base"),
        Target("s", "s", alias="champion"),
        Target("s@canary", "s", alias="canary"),
        Target("s@3", "s", number=3),
        Target("tiny"),
    ]
