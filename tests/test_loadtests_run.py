"""The whole load test, locust included, against the stub: exit codes, table, last line."""

from __future__ import annotations

import json

import pytest

from loadtests import run
from loadtests.figures import outcome, percentile
from loadtests.stub_server import NAME, Lie, Stub, serving


def test_an_honest_server_passes_and_every_digest_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Stub()) as url:
        code = run.main(["--url", url, "--users", "2", "--seconds", "2", "--max-tokens", "8"])
    *table, last = capsys.readouterr().out.strip().splitlines()
    told = json.loads(last)
    assert code == 0
    assert told["loadtest"] == "ok"
    assert told["total"]["digests_checked"] == told["total"]["requests"] > 0
    assert {line["model"] for line in told["lines"]} >= {"base", NAME, f"{NAME}@1", f"{NAME}@2"}
    assert table[0].startswith("MODEL")
    assert any(line.startswith("total") for line in table)


@pytest.mark.parametrize(
    ("lie", "name"),
    [(Lie.WRONG_DIGEST, "wrong_digest"), (Lie.TRUNCATED, "connection_lost"), (Lie.REGISTRY_DOWN, "registry_silent")],
)
def test_a_lying_server_fails_and_the_lie_is_named(lie: Lie, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Stub(lie)) as url:
        code = run.main(["--url", url, "--users", "2", "--seconds", "2", "--max-tokens", "8", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 1
    assert told["loadtest"] == "failed"
    assert told["total"]["failures"] > 0
    assert name in {problem for problem, _, _ in told["problems"]}


def test_a_server_that_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = run.main(["--url", "http://127.0.0.1:9", "--seconds", "2"])
    said = capsys.readouterr().err
    assert code == 2
    assert said.strip() == "error[loadtest]: no server is ready at http://127.0.0.1:9"


def test_a_test_without_answers_is_not_a_good_one() -> None:
    assert not outcome([], "http://stub", 1).good


@pytest.mark.parametrize(("values", "expected"), [([], None), ([3.0], 3.0), ([1.0, 2.0, 3.0], 2.0)])
def test_medians_of_few_values_are_what_one_expects(values: list[float], expected: float | None) -> None:
    assert percentile(values, 50) == expected
