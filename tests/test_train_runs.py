"""A run file is checked data: what it says is what is trained, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import RunInvalid
from adapters.runs import TrainRun, check_run, eval_data, load_run

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("docstring-*.yaml"))
MINIMAL = {"name": "a", "data": {"source": "rows.jsonl"}}


def refusal(raw: dict[str, object]) -> str:
    with pytest.raises(RunInvalid) as caught:
        check_run(raw, "run.yaml")
    return str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_is_a_valid_run_named_like_its_file(path: Path) -> None:
    assert load_run(path).name == path.stem


def test_there_is_an_example_for_each_task() -> None:
    assert {load_run(p).data.task for p in EXAMPLES} == {"summary", "name"}


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    assert "optim.lrr: no such key; did you mean lr?" in refusal({**MINIMAL, "optim": {"lrr": 1}})
    assert "data.colums: no such key; did you mean columns?" in refusal(
        {"name": "a", "data": {"source": "x.csv", "colums": {}}}
    )
    assert "gate.metrc: no such key; did you mean metric?" in refusal({**MINIMAL, "gate": {"metrc": "rouge1"}})


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"name": "Upper"}, "name"),
        ({"name": "base"}, "name"),
        ({"optim": {"lr": 0}}, "optim.lr"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"lora": {"targets": [".*"]}}, "lora.targets"),
        ({"lora": {"targets": []}}, "lora.targets"),
        ({"prompt_format": {"defaults": {"temperature": 9}}}, "prompt_format"),
        ({"gate": {"metric": "bleu"}}, "gate.metric"),
        ({"data": {"source": "docstrings"}}, "data.task"),
        ({"data": {"source": "x.csv", "task": "name"}}, "data.task"),
        ({"mode": "dpo"}, "mode"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(changed: dict[str, object], where: str) -> None:
    assert where in refusal({**MINIMAL, **changed})


def test_overrides_reach_into_mappings_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ndata: {source: rows.jsonl}\n")
    run = load_run(path, ["optim.lr=1e-4", "lora.targets=[q_proj]", "data.shuffle_targets=true"])
    assert (run.optim.lr, run.lora.targets, run.data.shuffle_targets) == (1e-4, ("q_proj",), True)
    with pytest.raises(RunInvalid, match="KEY=VALUE"):
        load_run(path, ["optim.lr"])


def test_a_file_that_is_no_run_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in ("[1, 2]", "a: [", "\x00"):
        path.write_text(text)
        with pytest.raises(RunInvalid):
            load_run(path)
    with pytest.raises(RunInvalid, match="cannot read"):
        load_run(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: " + "[" * 5000, "nested too deeply"),
        ("name: a\ndata: {source: x.csv}\nname: b\n", "the key 'name' is there twice.*line 3"),
        ("name: a\ndata: {source: x.csv}\noptim: {lr: 1, 'lr': 2}\n", "the key 'lr' is there twice"),
        ("name: 2024-13-01", "month must be in"),
    ],
)
def test_yaml_that_says_too_much_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RunInvalid, match=f"(?s)is not YAML: .*{told}"):
        load_run(path)
    path.write_text("name: a\ndata: {source: rows.jsonl}\n")
    with pytest.raises(RunInvalid, match="--set"):
        load_run(path, ["optim=" + "{a: " * 5000])


def test_merged_mappings_of_yaml_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ndata: {source: x.csv}\noptim: {<<: {lr: 0.5, epochs: 2}, lr: 0.1}\n")
    run = load_run(path)
    assert (run.optim.lr, run.optim.epochs) == (0.1, 2)


def test_a_run_survives_being_stored_as_json() -> None:
    run = load_run(EXAMPLES[0])
    assert check_run(run.settings(), "stored") == run


def digest(run: TrainRun, **changed: str) -> str:
    return run.digest(**{"base_digest": "b", "data_digest": "d", "code": "c", **changed})


def test_the_run_digest_moves_with_all_that_moves_the_weights_and_with_nothing_else() -> None:
    run = load_run(EXAMPLES[0])
    same = [load_run(EXAMPLES[0], [s]) for s in ("note=x", "eval.max_tokens=9", "gate.margin=0.5", "checkpoint.keep=9")]
    moved = [load_run(EXAMPLES[0], [s]) for s in ("optim.lr=0.1", "lora.r=4", "data.seed=1", "prompt_format.prefix=x")]
    assert {digest(r) for r in same} == {digest(run)}
    others = {digest(r) for r in moved} | {digest(run, base_digest="x"), digest(run, data_digest="x")}
    assert len(others) == 6
    assert digest(run) not in others


def test_data_named_for_evaluation_is_docstrings_or_a_whole_file() -> None:
    like = load_run(EXAMPLES[0]).data
    assert (eval_data("docstrings:name", like).task, eval_data("docstrings:name", like).max_chars) == ("name", 320)
    assert eval_data("held.jsonl", like).eval_source == "held.jsonl"
    with pytest.raises(RunInvalid, match="--data"):
        eval_data("docstrings:poem")
