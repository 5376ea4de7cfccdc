"""Rows from files: what is used is what is digested, and a bad row is named by its number."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from adapters.errors import DataRefused
from adapters.home import Home
from adapters.prompts import Message, Renderer
from adapters.records import PromptFormat
from adapters.runs import Columns, DataSpec
from train.data import Row, RowSet, evaluation_rows, marked, render, training_rows

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(60)]
FORMAT = PromptFormat(system="Be brief.", prefix="<<", suffix=">>")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.find(tmp_path / "home")


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    return Renderer(tiny_base)


def jsonl(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversation(*turns: str) -> Row:
    roles = ("user", "assistant")
    return Row("r", tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))


def test_jsonl_csv_and_parquet_hold_the_same_rows(tmp_path: Path, home: Home) -> None:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    jsonl(tmp_path / "rows.jsonl", ROWS)
    read = [
        training_rows(DataSpec(source=str(tmp_path / f"rows.{kind}")), home).rows
        for kind in ("jsonl", "csv", "parquet")
    ]
    texts = [[r.messages for r in rows] for rows in read]
    assert texts[0] == texts[1] == texts[2]
    assert 40 < len(texts[0]) < 60


def test_held_out_rows_are_the_others_and_equal_prompts_lie_together(tmp_path: Path, home: Home) -> None:
    doubled = [*ROWS, *({**row, "completion": "another"} for row in ROWS)]
    spec = DataSpec(source=jsonl(tmp_path / "rows.jsonl", doubled), holdout=0.3)
    train, test = training_rows(spec, home), evaluation_rows(spec, home)
    # Every held-out prompt was there twice, and is asked once.
    assert len(train.rows) + 2 * len(test.rows) == 120
    assert not {r.prompt for r in train.rows} & {r.prompt for r in test.rows}


def test_columns_name_prompt_completion_or_messages(tmp_path: Path, home: Home) -> None:
    named = jsonl(tmp_path / "a.jsonl", [{"q": r["prompt"], "a": r["completion"]} for r in ROWS])
    spec = DataSpec(source=named, columns=Columns(prompt="q", completion="a"), holdout=0)
    turns = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in ROWS
    ]
    talk = DataSpec(source=jsonl(tmp_path / "b.jsonl", turns), holdout=0)
    assert [r.messages for r in training_rows(spec, home).rows] == [r.messages for r in training_rows(talk, home).rows]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"prompt": "x"}, "completion"),
        ({"prompt": "x", "completion": ""}, "empty"),
        ({"prompt": "x", "completion": None}, "completion"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, home: Home, bad: object, told: str) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [*ROWS[:4], bad])
    with pytest.raises(DataRefused, match=rf"rows\.jsonl#5.*{told}"):
        training_rows(DataSpec(source=source), home)


def csv_of(path: Path, *answers: str, head: str = "prompt,completion") -> str:
    path.write_text("\n".join([head, *(f"q {i},{answer}" for i, answer in enumerate(answers))]) + "\n")
    return str(path)


@pytest.mark.parametrize("answers", [("007", "7.0"), ("0", "1"), ("00001", "1e3"), ("True", "False"), ("NA", "None")])
def test_csv_answers_are_what_stands_in_the_file(tmp_path: Path, home: Home, answers: tuple[str, ...]) -> None:
    """A reader that infers types made a 7 of 007, and refused a column of numbers as no text."""
    spec = DataSpec(source=csv_of(tmp_path / "rows.csv", *answers), holdout=0)
    assert sorted(r.reference for r in training_rows(spec, home).rows) == sorted(answers)


def test_json_answers_that_look_like_dates_stay_texts(tmp_path: Path, home: Home) -> None:
    dates = [{"prompt": f"q {i}", "completion": f"2024-01-0{i}"} for i in range(1, 4)]
    spec = DataSpec(source=jsonl(tmp_path / "rows.jsonl", dates), holdout=0)
    assert {r.reference for r in training_rows(spec, home).rows} == {d["completion"] for d in dates}


def test_a_file_of_other_content_and_the_same_time_is_read_anew(tmp_path: Path, home: Home) -> None:
    """A table cached under path and time went on being trained on after the file was replaced."""
    path = tmp_path / "rows.jsonl"
    spec = DataSpec(source=jsonl(path, ROWS), holdout=0)
    first = training_rows(spec, home)
    time = path.stat().st_mtime_ns
    jsonl(path, [{**row, "completion": row["completion"].replace("answer", "ANSWER")} for row in ROWS])
    os.utime(path, ns=(time, time))
    second = training_rows(spec, home)
    assert all(r.reference.startswith("ANSWER") for r in second.rows)
    assert second.digest != first.digest


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.jsonl", b"", "no rows to train on"),
        ("a.csv", b"", "no rows to train on"),
        ("a.json", b"[]", "no rows to train on"),
        ("a.parquet", b"", r"cannot read .*a\.parquet"),
        ("a.jsonl", b'{"prompt": "x", "completion": "y"}\n{"prompt": "caf\xe9"}\n', r"a\.jsonl#2: not UTF-8 .*0xE9"),
        ("a.csv", b"prompt,completion\ncaf\xe9,x\n", r"a\.csv#2: not UTF-8"),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", r"line 3 has 3 fields, but the header names 2"),
        ("a.csv", b'prompt,completion\na,"b\n', "is not CSV"),
        ("a.csv", b"prompt,prompt\na,b\n", "'prompt' is there twice"),
        ("a.json", b'[{"prompt": }]', r"a\.json: not JSON"),
        ("a.jsonl", b"[" * 100_000, "#1: nested too deeply"),
        ("a.jsonl", b'{"prompt": "x", "completion": "\\ud800"}', "half a character"),
        ("a.jsonl", b'{"prompt": "x", "completion": 7}', "'completion' must be a text, not int"),
        ("a.txt", b"x", r"a\.txt is a file of another kind; what is read are \.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, home: Home, name: str, data: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataRefused, match=told):
        training_rows(DataSpec(source=str(tmp_path / name), holdout=0), home)


def test_a_byte_order_mark_and_lists_in_json_are_read(tmp_path: Path, home: Home) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\na,b\r\n\r\n")
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}], indent=1))
    (tmp_path / "b.json").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n')
    for name, count in (("a.csv", 1), ("a.json", 1), ("b.json", 2)):
        rows = training_rows(DataSpec(source=str(tmp_path / name), holdout=0), home).rows
        assert [(r.prompt[0].content, r.reference) for r in rows] == [("a", "b")] * count


def test_a_line_that_is_no_json_is_refused_by_its_number(tmp_path: Path, home: Home) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(DataRefused, match=r"rows\.jsonl#2: not JSON"):
        training_rows(DataSpec(source=str(path)), home)


def test_a_conversation_must_end_with_an_answer(tmp_path: Path, home: Home) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(DataRefused, match="must end with an assistant's answer"):
        training_rows(DataSpec(source=source), home)


def test_an_absent_file_and_a_missing_column_are_told(tmp_path: Path, home: Home) -> None:
    with pytest.raises(DataRefused, match="there is no file"):
        training_rows(DataSpec(source=str(tmp_path / "absent.jsonl")), home)
    spec = DataSpec(source=jsonl(tmp_path / "rows.jsonl", ROWS), columns=Columns(prompt="q"))
    with pytest.raises(DataRefused, match="there are completion, prompt"):
        training_rows(spec, home)


def test_the_digest_is_of_the_rows_used_in_their_order(tmp_path: Path, home: Home) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    base = training_rows(DataSpec(source=source, limit=20), home)
    assert len(base.rows) == 20
    assert training_rows(DataSpec(source=source, limit=20), home).digest == base.digest
    assert training_rows(DataSpec(source=source, limit=19), home).digest != base.digest
    assert training_rows(DataSpec(source=source, limit=20, seed=1), home).digest != base.digest


def test_shuffled_targets_keep_every_prompt_and_give_none_its_own_answer(tmp_path: Path, home: Home) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    right, wrong = (training_rows(DataSpec(source=source, shuffle_targets=s), home).rows for s in (False, True))
    assert [r.prompt for r in right] == [r.prompt for r in wrong]
    assert sorted(r.reference for r in right) == sorted(r.reference for r in wrong)
    assert not [1 for a, b in zip(right, wrong, strict=True) if a.reference == b.reference]


def test_training_prompts_are_the_token_ids_that_serving_renders(renderer: Renderer) -> None:
    """The same code renders for both, so the ids are the same: prefix, suffix and system text included."""
    for fmt in (FORMAT, PromptFormat(style="text", prefix="Q: ", suffix="\nA:"), PromptFormat()):
        row = conversation("def f(x):\n    return x", "Give x back.")
        (example,) = render(RowSet("r", (row,)), renderer, fmt, 512).examples
        prompt = renderer.chat([Message("user", row.prompt[0].content)], fmt)
        assert list(example.ids[: len(prompt)]) == prompt
        assert example.loss == (False,) * len(prompt) + (True,) * (len(example.ids) - len(prompt))
        answer = [*renderer.encode("Give x back.", add_special_tokens=False), renderer.eos_token_id]
        assert list(example.ids[len(prompt) :]) == answer


def test_what_counts_in_the_loss_is_marked(renderer: Renderer) -> None:
    (example,) = render(RowSet("r", (conversation("ask", "yes"),)), renderer, FORMAT, 512).examples
    assert marked(example, renderer).endswith("[user]<<ask>>[assistant]⟦yes</s>⟧")


def test_a_cut_that_leaves_nothing_to_learn_is_refused_and_other_cuts_are_counted(renderer: Renderer) -> None:
    rows = RowSet("r", (conversation("ask", "yes, and much more"), conversation("ask", "y")))
    with pytest.raises(DataRefused, match="max_length 20"):
        render(rows, renderer, FORMAT, 20)
    whole = render(rows, renderer, FORMAT, 512)
    cut = render(rows, renderer, FORMAT, max(len(e.ids) for e in whole.examples) - 1)
    assert (whole.truncated, cut.truncated) == (0, 1)


def test_every_answer_of_a_conversation_counts(renderer: Renderer) -> None:
    rows = RowSet("r", (conversation("a", "first", "b", "second"),))
    examples = render(rows, renderer, PromptFormat(), 512).examples
    learnt = "".join(renderer.decode([i for i, c in zip(e.ids, e.loss, strict=True) if c]) for e in examples)
    assert "first" in learnt
    assert "second" in learnt
