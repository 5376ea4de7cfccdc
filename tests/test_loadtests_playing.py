"""Scenarios against the product's own edge and registry over HTTP, a script in the engine's place: `--url` as used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests import scenarios
from loadtests.shapes import SCENARIOS, Arm
from tests.fakes import FakeEngine, Submission
from tests.http_case import make_case, served

# A few seconds of each: two adapters, two callers.
SMALL = {
    "W5": replace(
        SCENARIOS["W5"], slots=4, rows=2, prompt=(4, 6), answer=(4, 4),
        arms=tuple(replace(arm, adapters=n, users=2, requests=16)
                   for arm, n in zip(SCENARIOS["W5"].arms, (2, 8), strict=True)),
    ),
    "W6": replace(
        SCENARIOS["W6"], rows=2, prompt=(4, 4), answer=(6, 6), flip_every_s=0.2,
        arms=(Arm("flips", 2, users=3, requests=60),),
    ),
}  # fmt: skip


def spell(digest: str | None, prompt: tuple[int, ...]) -> list[int]:
    """What weights say to a prompt: their own letters, like no others'."""
    return list(hashlib.sha256(f"{digest}:{prompt}".encode()).hexdigest().encode())


def honest(submission: Submission) -> list[int]:
    return spell(submission.adapter, submission.prompt)


class StaleSlot:
    """Now and then decodes with the adapter of the request before: the field's worst bug."""

    def __init__(self) -> None:
        self._count, self._last = 0, ""

    def __call__(self, submission: Submission) -> list[int]:
        self._count += 1
        stale, self._last = self._last, submission.adapter or ""
        return spell(stale if self._count % 7 == 0 else submission.adapter, submission.prompt)


def play(
    id_: str, engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of one scenario, played strictly at a served edge."""
    monkeypatch.setattr(scenarios, "SCENARIOS", {**SCENARIOS, id_: SMALL[id_]})
    with served(make_case(folder, engine)) as url:
        code = scenarios.main([id_, "--url", url, "--json", "--strict", "--rate", "50"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])  # the served edge logs before it


def test_w6_publishes_and_flips_over_the_product_s_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = play("W6", FakeEngine(honest, pause_s=0.01), tmp_path, monkeypatch, capsys)
    (scenario,) = told["scenarios"]
    assert code == 0
    assert {g["goal"]: g["verdict"] for g in told["goals"]} == {"W6.failed": "reached", "W6.wrong": "reached"}
    assert scenario["arms"][0]["requests"] == 60
    assert scenario["flips"][0]["flips"] > 1
    assert scenario["flips"][0]["errors"] == []
    assert next(f["ours"] for f in scenario["figures"] if "text is theirs" in f["figure"]) == 1.0


def test_w6_finds_an_engine_that_decodes_with_a_stale_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, versions and digests are all right: the words are another adapter's."""
    code, told = play("W6", FakeEngine(StaleSlot(), pause_s=0.01), tmp_path, monkeypatch, capsys)
    assert code == 1
    assert {g["goal"]: g["verdict"] for g in told["goals"]}["W6.wrong"] == "not done"
    assert any("wrong_content" in line for line in told["left_out"])


def test_w5_takes_the_slots_that_the_server_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, told = play("W5", FakeEngine(honest), tmp_path, monkeypatch, capsys)
    (scenario,) = told["scenarios"]
    assert scenario["slots"] == 4
    assert "158 x" in scenario["published"]
    assert [arm["failed"] for arm in scenario["arms"]] == [0, 0]
    assert [g["goal"] for g in told["goals"]] == ["G6.ttft"]
    assert scenario["figures"][0]["ours"] > 0
