"""What is tested is not trained on: not under other blanks, not within a conversation, not beyond the drawn rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.errors import DataRefused
from adapters.home import Home
from adapters.runs import DataSpec
from train.data import RowSet, evaluation_rows, training_rows

ROLES = ("user", "assistant")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.find(tmp_path / "home")


def conversation(*turns: str, system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(turns)]


def write(path: Path, rows: Sequence[list[dict[str, str]]]) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def trained_on(folder: Path, home: Home, rows: Sequence[list[dict[str, str]]], held: list[dict[str, str]]) -> RowSet:
    source, tested = write(folder / "rows.jsonl", rows), write(folder / "held.jsonl", [held])
    return training_rows(DataSpec(source=source, eval_source=tested), home)


HARMLESS = conversation("another question", "another answer")


@pytest.mark.parametrize(
    "row",
    [
        conversation("held out?", "another answer"),
        conversation("held\n  out? ", "yes"),
        conversation("held out?", "yes", "and then?", "then this"),
        conversation("a question", "an answer", "held out?", "yes"),
        conversation("a question", "an answer", "held  out?", "yes ", "and then?", "then this"),
        conversation("held out?", "yes", system="Be brief."),
    ],
)
def test_a_row_that_shows_a_held_out_answer_is_left_out(tmp_path: Path, home: Home, row: list[dict[str, str]]) -> None:
    rows = trained_on(tmp_path, home, [row, HARMLESS], conversation("held out?", "yes"))
    assert (len(rows.rows), rows.leaked) == (1, 1)
    assert rows.rows[0].reference == "another answer"


@pytest.mark.parametrize(
    "row",
    [
        conversation("a question", "an answer", "held out?", "no"),  # asked in another conversation, answered otherwise
        conversation("is it held out?", "yes"),
        conversation("yes", "held out?"),
    ],
)
def test_a_row_that_merely_resembles_one_is_trained_on(tmp_path: Path, home: Home, row: list[dict[str, str]]) -> None:
    assert trained_on(tmp_path, home, [row], conversation("held out?", "yes")).leaked == 0


def test_held_out_conversations_are_found_within_longer_ones(tmp_path: Path, home: Home) -> None:
    held = conversation("a", "b", "c", "d")
    rows = trained_on(tmp_path, home, [conversation("a", "b", "c", "x", "e", "f"), HARMLESS], held)
    assert rows.leaked == 1
    assert trained_on(tmp_path, home, [conversation("a", "b")], held).leaked == 0


def test_held_out_rows_beyond_the_drawn_ones_are_not_trained_on_either(tmp_path: Path, home: Home) -> None:
    """Only the eval_limit rows were compared, and the others of the file were trained on."""
    shared = [conversation(f"question {i}", "yes") for i in range(40)]
    source = write(tmp_path / "rows.jsonl", [*shared, *(conversation(f"other {i}", "no") for i in range(5))])
    spec = DataSpec(source=source, eval_source=write(tmp_path / "held.jsonl", shared), eval_limit=4, max_chars=100)
    rows = training_rows(spec, home)
    assert (len(rows.rows), rows.leaked) == (5, 40)
    assert len(evaluation_rows(spec, home).rows) == 4
    with pytest.raises(DataRefused, match="every row is in the evaluation set too"):
        training_rows(DataSpec(source=source, eval_source=source), home)


def test_a_limit_counts_the_rows_that_are_left(tmp_path: Path, home: Home) -> None:
    source = write(tmp_path / "rows.jsonl", [conversation(f"question {i}", "yes") for i in range(40)])
    tested = write(tmp_path / "held.jsonl", [conversation(f"question {i}", "yes") for i in range(30)])
    assert len(training_rows(DataSpec(source=source, eval_source=tested, limit=8), home).rows) == 8


def test_rows_said_twice_are_counted(tmp_path: Path, home: Home) -> None:
    rows = [conversation("a", "b"), conversation(" a ", "b"), conversation("a", "c")]
    assert training_rows(DataSpec(source=write(tmp_path / "rows.jsonl", rows), holdout=0), home).repeated == 1
