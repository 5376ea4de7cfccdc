"""Which rows are asked: each prompt once, the same set however its file is named, none that was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.errors import DataRefused
from adapters.home import Home
from adapters.runs import DataSpec
from train.data import evaluation_rows, prompt_key, training_rows

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(60)]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.find(tmp_path / "home")


def jsonl(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_set_is_the_same_however_the_path_is_typed(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    typed = [DataSpec(source=s) for s in (absolute, "rows.jsonl", "./rows.jsonl")]
    assert len({evaluation_rows(spec, home).digest for spec in typed}) == 1
    assert len({training_rows(spec, home).digest for spec in typed}) == 1


def test_a_prompt_is_asked_once_however_often_and_however_spaced_it_is_there(tmp_path: Path, home: Home) -> None:
    spaced = [{**row, "prompt": f"  {row['prompt'].replace(' ', '  ')}\n"} for row in ROWS[:5]]
    source = jsonl(tmp_path / "rows.jsonl", [*ROWS[:5], *ROWS[:5], *spaced])
    rows = evaluation_rows(DataSpec(source=source, holdout=1.0), home).rows
    assert len(rows) == len({prompt_key(r.prompt) for r in rows}) == 5
    assert {r.prompt[-1].content for r in rows} == {row["prompt"] for row in ROWS[:5]}


def test_a_relative_path_that_is_not_there_is_told_with_where_it_was_looked_for(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataRefused, match=str(tmp_path / "rows.jsonl")):
        evaluation_rows(DataSpec(source="rows.jsonl"), home)
