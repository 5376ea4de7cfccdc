"""From scores to intervals: seeded, paired, and honest when there is little to go by."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from adapters.errors import DataRefused, InvalidRequest
from adapters.reports import Role
from train.offline import score_file
from train.rouge import Rouge
from train.scoring import Case, SystemId, interval, paired_difference, score_cases

SYSTEMS = [SystemId(Role.BASE, "base", "b"), SystemId(Role.CANDIDATE, "a@1", "c")]


def case(reference: str, base: str, candidate: str) -> Case:
    return Case(reference, "prompt", (reference,), {Role.BASE: base, Role.CANDIDATE: candidate})


def test_the_interval_is_the_same_for_equal_seeds_and_holds_the_mean() -> None:
    values = [random.Random(7).gauss(0.1, 0.2) for _ in range(1)] + random.Random(8).choices(
        [0.0, 0.1, 0.4, -0.1], k=99
    )
    low, high = interval(values, seed=0)
    assert interval(values, seed=0) == (low, high)
    assert interval(values, seed=1) != (low, high)
    assert low < sum(values) / 100 < high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(3)
    hits = 0
    for trial in range(60):
        low, high = interval([rng.gauss(0.2, 1) for _ in range(40)], seed=trial)
        hits += low <= 0.2 <= high
    assert hits >= 50


def test_pairing_finds_a_small_gain_that_single_scores_drown() -> None:
    rng = random.Random(5)
    base = [rng.random() for _ in range(64)]
    gains = [0.03 + rng.uniform(-0.01, 0.01) for _ in base]
    assert paired_difference(gains, against=Role.BASE, metric="rouge1", seed=0).low > 0.02


def test_one_example_proves_nothing_and_equal_differences_need_no_resampling() -> None:
    lone = paired_difference([0.9], against=Role.BASE, metric="rouge1", seed=0)
    assert (lone.low, lone.high, lone.n) == (-1.0, 1.0, 1)
    assert interval([0.25] * 30, seed=0) == (0.25, 0.25)
    low, high = interval([0.0] * 29 + [1.0], seed=0)
    assert low <= 1 / 30 <= high


def test_systems_are_scored_with_length_and_emptiness() -> None:
    cases = [case("one two", "one two three four", "one two"), case("three four", "x y z w", "")]
    scored = score_cases(cases, SYSTEMS, Rouge("en"), seed=0)
    base, candidate = scored.systems
    assert candidate.scores["rouge1"] == pytest.approx(0.5)
    assert (candidate.empty_rate, base.empty_rate) == (0.5, 0.0)
    assert (candidate.length_ratio, base.length_ratio) == (0.5, 2.0)
    assert {(d.against, d.metric, d.n) for d in scored.differences} == {
        (Role.BASE, m, 2) for m in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    }


@pytest.mark.parametrize(
    ("language", "reference", "answer"),
    [
        ("zh", "今天天气很好我们去公园", "今天天气"),
        ("ja", "今日はとても良い天気です", "今日はと"),
        ("th", "วันนี้อากาศดีมาก", "วันน"),
    ],
)
def test_length_counts_where_no_blanks_stand_between_words(language: str, reference: str, answer: str) -> None:
    """Counted by blanks, every such text is one word long, and no answer is too short or too long."""
    scored = score_cases([case(reference, reference * 3, answer)], SYSTEMS, Rouge(language), seed=0)
    base, candidate = scored.systems
    assert base.length_ratio == pytest.approx(3)
    assert candidate.length_ratio < 0.5


@pytest.mark.parametrize("language", ["klingon", "EN", "e", "", "en\n"])
def test_a_language_that_is_no_code_is_refused(language: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Rouge(language)
    assert refusal.value.param == "language"
    with pytest.raises(InvalidRequest):
        score_file(Path("absent.jsonl"), language=language, seed=0)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(DataRefused):
        score_cases([], SYSTEMS, Rouge("en"), seed=0)


def rows(path: Path, *found: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return path


def test_a_file_of_predictions_is_scored_without_a_server(tmp_path: Path) -> None:
    scored = score_file(
        rows(
            tmp_path / "p.jsonl",
            {"prediction": "a cat\u2028sat", "reference": "a cat sat", "baseline": "dogs"},
            {"prediction": "b", "references": ["c", "b"], "baseline": "b"},
        ),
        language="en",
        seed=0,
    )
    own = next(s for s in scored.systems if s.role is Role.CANDIDATE)
    assert scored.n == 2
    assert own.scores["rouge1"] == pytest.approx(1.0)
    assert next(d for d in scored.differences if d.metric == "rouge1").mean == pytest.approx(0.5)
    assert json.dumps(scored.to_json())


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prediction": "a b", "reference": "a b"}\r\n')
    assert score_file(path, language="en", seed=0).n == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"prediction": "a"},
        {"reference": "a"},
        {"prediction": "a", "reference": ""},
        {"prediction": 3, "reference": "a"},
        [],
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, bad: object) -> None:
    path = rows(tmp_path / "p.jsonl", {"prediction": "a", "reference": "a"}, bad)
    with pytest.raises(DataRefused, match=r"p\.jsonl#2"):
        score_file(path, language="en", seed=0)
