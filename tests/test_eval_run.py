"""An evaluation whole: a version, a server, a report in the registry, the gate's word. The engine alone is a fake."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from adapters.cli import run
from adapters.errors import DataRefused, GateRefused, RecordNotFound
from adapters.gate import decide
from adapters.home import Home
from adapters.records import AdapterVersion
from adapters.reports import Role, Verdict
from adapters.runs import check_run
from serving.engine.request import Failed
from tests.adapter_factory import adapter_files, base_record
from tests.fakes import EOS, FakeEngine, Submission
from tests.http_case import Case, make_case, served
from tests.train_case import train_case
from train import child, data
from train.asked import Question
from train.evaluate import Evaluated, evaluate
from train.progress import Quiet
from train.show import markdown, show_report

GOOD, BAD = "It turns a list of words round.", "I do not know what this is."


class Told(Quiet):
    """Keeps what a job says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def __contains__(self, words: str) -> bool:
        return any(words in line for line in self.lines)


class Stage:
    """A served registry with a fake engine whose answers depend on the adapter that is asked."""

    def __init__(self, root: Path) -> None:
        self.says: dict[str | None, str] = {None: BAD}
        self.told = Told()
        self.case: Case = make_case(root / "server", FakeEngine(script=self._answer))
        self.home = Home.find(root / "home")
        self.rows = root / "rows.jsonl"
        self.write_rows(GOOD)
        run = {
            "name": "summarize",
            "data": {"source": str(self.rows), "holdout": 0.5, "eval_limit": 12},
            "prompt_format": {"prefix": "> "},
            "eval": {"max_tokens": 64},
            "gate": {"min_n": 12, "margin": 0.1},
        }
        self.run = check_run(run, "test")

    def _answer(self, submission: Submission) -> Sequence[int | Failed]:
        return [*self.says[submission.adapter].encode(), EOS]

    def write_rows(self, completion: str) -> None:
        lines = [json.dumps({"prompt": f"row {i}", "completion": completion}) for i in range(60)]
        self.rows.write_text("\n".join(lines))

    def publish(self, seed: int, says: str, base: str = "tiny", **facts: object) -> AdapterVersion:
        train, held_out = data.training_rows(self.run.data, self.home), data.evaluation_rows(self.run.data, self.home)
        digests = {"data_digest": train.digest, "eval_data_digest": held_out.digest}
        known = {"run": self.run.settings(), **digests, **facts}
        version = self.case.registry.publish(
            "summarize",
            adapter_files(seed, base=f"Tests/{base}-Instruct"),
            prompt_format=self.run.prompt_format.record(),
            facts=known,
            who="t",
            note="",
        )
        self.says[version.digest] = says
        return version

    def ask(self, number: int, url: str, **changed: object) -> Evaluated:
        return evaluate(Question("summarize", number, **changed), self.home, url, self.told)  # type: ignore[arg-type]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_good_version_gets_a_report_a_policy_and_a_pass(stage: Stage) -> None:
    version = stage.publish(1, GOOD)
    with served(stage.case) as url:
        done = stage.ask(1, url)
    registry = stage.case.registry
    assert done.decision.verdict is Verdict.PASS
    assert (done.report.n, done.report.adapter_digest) == (12, version.digest)
    assert registry.report(done.digest) == done.report
    policy = registry.policy("summarize")
    assert policy is not None
    assert (policy.data_digest, policy.min_n, policy.margin) == (done.report.data_digest, 12, 0.1)
    candidate, base = done.report.system(Role.CANDIDATE), done.report.system(Role.BASE)
    assert candidate is not None
    assert base is not None
    assert (candidate.scores["rouge1"], base.digest) == (1.0, version.base_digest)
    assert base.scores["rouge1"] < 0.3
    assert registry.promote("summarize", 1, who="t", reason="it passed").to_number == 1


def test_a_version_no_better_than_the_base_is_refused_by_the_gate(stage: Stage) -> None:
    stage.publish(1, BAD)
    with served(stage.case) as url:
        done = stage.ask(1, url)
    assert done.decision.verdict is Verdict.FAIL
    assert any("over the base" in reason for reason in done.decision.reasons)
    with pytest.raises(GateRefused):
        stage.case.registry.promote("summarize", 1, who="t", reason="try")


def test_the_champion_is_asked_in_the_same_run_and_the_verdict_is_the_registrys_own(stage: Stage) -> None:
    champion, _ = stage.publish(1, GOOD), stage.publish(2, "It turns words.")
    stage.case.registry.promote("summarize", 1, who="t", reason="first", force=True)
    with served(stage.case) as url:
        done = stage.ask(2, url)
    report = done.report
    assert [s.role for s in report.systems] == [Role.BASE, Role.CHAMPION, Role.CANDIDATE]
    assert report.champion_digest == champion.digest
    assert {d.against for d in report.differences} == {Role.BASE, Role.CHAMPION}
    assert done.decision.verdict is Verdict.FAIL
    policy = stage.case.registry.policy("summarize")
    theirs = decide(report, policy, version_digest=report.adapter_digest, champion_digest=champion.digest)
    assert theirs == done.decision


def test_too_few_rows_decide_nothing(stage: Stage) -> None:
    stage.publish(1, GOOD)
    with served(stage.case) as url:
        stage.ask(1, url)
        done = stage.ask(1, url, n=6)
    assert done.decision.verdict is not Verdict.PASS
    assert done.report.n == 6


def test_a_policy_stays_until_it_is_set_anew(stage: Stage) -> None:
    stage.publish(1, GOOD)
    with served(stage.case) as url:
        first = stage.ask(1, url)
        stage.ask(1, url, n=6)
        kept = stage.case.registry.policy("summarize")
        second = stage.ask(1, url, n=6, set_policy=True)
    moved = stage.case.registry.policy("summarize")
    assert kept is not None
    assert moved is not None
    assert (kept.data_digest, moved.data_digest) == (first.report.data_digest, second.report.data_digest)
    assert kept != moved
    assert "it needs 12 prompts and this set has 6; nothing can pass it" in stage.told


def test_only_the_runs_own_held_out_rows_become_the_gate_by_themselves(stage: Stage, tmp_path: Path) -> None:
    """A first look at three rows, or at any file, pinned the gate to them for good."""
    stage.publish(1, GOOD)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"new {i}", "completion": GOOD}) + "\n" for i in range(20)))
    with served(stage.case) as url:
        for changed in ({"n": 3}, {"data": str(other)}, {"data": str(stage.rows)}):
            done = stage.ask(1, url, **changed)
            assert done.decision.verdict is Verdict.UNDECIDED
            assert stage.case.registry.policy("summarize") is None
        assert "these rows do not become it" in stage.told
        assert stage.ask(1, url).decision.verdict is Verdict.PASS
    policy = stage.case.registry.policy("summarize")
    assert policy is not None
    assert policy.data_digest == stage.case.registry.version("summarize", 1).facts["eval_data_digest"]


def test_held_out_rows_that_changed_are_refused_without_advice_to_test_on_what_was_trained(stage: Stage) -> None:
    """The advice was to name the same file with --data, which evaluated on the rows that were trained on."""
    stage.publish(1, GOOD)
    stage.write_rows("Something else.")
    with served(stage.case) as url:
        with pytest.raises(DataRefused, match="not those that summarize@1 was trained beside") as refusal:
            stage.ask(1, url)
        assert str(stage.rows) in str(refusal.value)
        assert f"--data {stage.rows}" not in str(refusal.value)
        done = stage.ask(1, url, data=str(stage.rows))
    trained = {r.prompt[-1].content for r in data.training_rows(stage.run.data, stage.home).rows}
    assert done.report.n == 12
    assert not trained & {e["prompt"] for e in done.report.examples}
    assert "is not known" in stage.told


def test_rows_that_were_trained_on_are_left_out_aloud(stage: Stage, tmp_path: Path) -> None:
    stage.publish(1, GOOD)
    trained = [r.prompt[-1].content for r in data.training_rows(stage.run.data, stage.home).rows]
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(json.dumps({"prompt": f" {p}\n", "completion": GOOD}) + "\n" for p in trained))
    with served(stage.case) as url:
        with pytest.raises(DataRefused, match="was trained on every prompt"):
            stage.ask(1, url, data=str(copy))
        with copy.open("a") as more:
            more.write(json.dumps({"prompt": "new", "completion": GOOD}) + "\n")
        done = stage.ask(1, url, data=str(copy))
    assert [e["prompt"] for e in done.report.examples] == ["new"]
    assert f"was trained on {len(trained)} of the {len(trained) + 1} prompts" in stage.told
    assert "is not known" not in stage.told


def test_what_an_adapter_of_unknown_origin_was_trained_on_is_said_to_be_unknown(stage: Stage) -> None:
    stage.publish(1, GOOD, run=None)
    with served(stage.case) as url:
        stage.ask(1, url, data=str(stage.rows))
    assert "is not known" in stage.told


def test_prompts_that_are_there_twice_are_asked_once_and_counted(stage: Stage) -> None:
    stage.publish(1, GOOD, run=None)
    line = json.dumps({"prompt": "the same", "completion": GOOD})
    stage.rows.write_text("\n".join([line] * 64))
    with served(stage.case) as url:
        done = stage.ask(1, url, data=str(stage.rows), set_policy=True)
    assert done.report.n == 1
    assert done.decision.verdict is Verdict.FAIL  # one row proves nothing
    assert "63 rows of rows.jsonl/test ask what another one asks" in stage.told


def test_a_champion_on_another_base_is_left_out_and_the_gate_compares_with_the_base(stage: Stage) -> None:
    """It cannot be asked beside the candidate: after half a minute the run ended in model_not_found."""
    registry = stage.case.registry
    registry.add_base(base_record("other"))
    stage.publish(1, GOOD, base="other")
    registry.promote("summarize", 1, who="t", reason="first", force=True)
    stage.publish(2, GOOD)
    with served(stage.case) as url:
        done = stage.ask(2, url)
    assert [s.role for s in done.report.systems] == [Role.BASE, Role.CANDIDATE]
    assert done.report.settings["champion_left_out"] == "summarize@1, on another base"
    assert "the champion summarize@1 stands on another base" in stage.told
    assert done.decision.verdict is Verdict.PASS
    assert registry.promote("summarize", 2, who="t", reason="it passed").report == done.digest


def test_a_champion_is_not_asked_beside_itself(stage: Stage) -> None:
    version = stage.publish(1, GOOD)
    stage.case.registry.promote("summarize", 1, who="t", reason="first", force=True)
    with served(stage.case) as url:
        done = stage.ask(1, url)
    assert [(s.role, s.digest) for s in done.report.systems][1:] == [(Role.CANDIDATE, version.digest)]
    assert done.decision.verdict is Verdict.PASS
    assert "another base" not in stage.told


def test_a_row_that_is_too_long_is_told_before_a_server_starts(
    tmp_path: Path, tiny_base: Path, tiny_adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended a whole evaluation, after the server's start, and no row was named."""
    case = train_case(tmp_path, tiny_base)
    with closing(case.door()) as door:
        door.publish("long", tiny_adapters[0])
    rows = tmp_path / "long.jsonl"
    prompts = ["short", "x" * 600, "y" * 500]
    rows.write_text("".join(json.dumps({"prompt": p, "completion": "a"}) + "\n" for p in prompts))
    monkeypatch.setattr(child, "private_server", lambda *_: pytest.fail("a server was started"))
    question = Question("long", 1, data=str(rows), max_tokens=32)
    with pytest.raises(DataRefused, match=r"2 of 3 rows are too long; the longest, .*long\.jsonl#2, has 6\d\d tokens"):
        evaluate(question, case.home, None, Quiet())


def test_turns_before_a_prompt_are_kept_and_make_it_another_prompt(stage: Stage) -> None:
    talks = [
        [{"role": "user", "content": f"topic {i}"}, {"role": "assistant", "content": "ok"},
         {"role": "user", "content": "and now?"}, {"role": "assistant", "content": GOOD}]
        for i in range(14)
    ]  # fmt: skip
    stage.rows.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    stage.publish(1, GOOD, run=None)
    with served(stage.case) as url:
        done = stage.ask(1, url, data=str(stage.rows), n=12, set_policy=True)
    assert (done.report.n, done.decision.verdict) == (12, Verdict.PASS)
    assert done.report.examples[0]["before"][1] == {"role": "assistant", "content": "ok"}


def test_a_version_of_unknown_origin_needs_rows_named(stage: Stage) -> None:
    stage.publish(1, GOOD, run=None)
    with served(stage.case) as url:
        with pytest.raises(DataRefused, match="--data"):
            stage.ask(1, url)
        done = stage.ask(1, url, data=str(stage.rows), n=10, set_policy=True)
    assert (done.report.n, done.decision.verdict) == (10, Verdict.PASS)


def test_a_run_of_another_release_counts_as_unknown(stage: Stage) -> None:
    stage.publish(1, GOOD, run={"name": "summarize", "from": "the future"})
    with served(stage.case) as url, pytest.raises(DataRefused, match="--data"):
        stage.ask(1, url)


def test_an_absent_version_is_told_with_those_that_are_there(stage: Stage) -> None:
    stage.publish(1, GOOD)
    with served(stage.case) as url, pytest.raises(RecordNotFound, match="there are summarize@1"):
        stage.ask(7, url)


def test_the_report_is_shown_with_figures_and_examples(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.publish(1, GOOD)
    with served(stage.case) as url:
        done = stage.ask(1, url)
    show_report(done.report, done.decision, "rouge1")
    page = markdown(done.report, done.decision, "rouge1")
    shown = capsys.readouterr().out
    for text in ("ROUGE-Lsum", "summarize@1", "gate: pass", GOOD, BAD):
        assert text in shown
    for text in ("| ROUGE-1 |", "# summarize@1: pass", GOOD):
        assert text in page


def test_reports_of_the_same_answers_are_equal_but_for_their_time(stage: Stage) -> None:
    stage.publish(1, GOOD)
    with served(stage.case) as url:
        first, second = (stage.ask(1, url).report.to_json() for _ in range(2))
    assert {k: v for k, v in first.items() if k != "created_at"} == {
        k: v for k, v in second.items() if k != "created_at"
    }


@pytest.mark.parametrize("page", ["nowhere/page.md", "."])
def test_a_page_that_cannot_be_written_is_told_before_anything_is_asked(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], page: str
) -> None:
    """It was an internal error at the end of a whole evaluation, and no figure was shown."""
    stage.publish(1, GOOD)
    with served(stage.case) as url:
        line = ["eval", "run", "summarize@1", "--url", url, "--home", str(stage.home.root)]
        assert run([*line, "--markdown", str(tmp_path / page)]) == 2
    assert f"--markdown {tmp_path / page} cannot be written" in capsys.readouterr().err
    assert stage.case.registry.reports("summarize") == []


def test_figures_are_shown_even_where_the_page_fails_after_all(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.publish(1, GOOD)
    with served(stage.case) as url:
        line = ["eval", "run", "summarize@1", "--url", url, "--home", str(stage.home.root)]
        assert run([*line, "--markdown", "/dev/full"]) == 2
    shown = capsys.readouterr()
    assert "gate: pass" in shown.out
    assert "No space left" in shown.err


def test_what_would_move_the_cursor_is_shown_escaped(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.publish(1, GOOD + " \x1b[2Jgate: pass")
    with served(stage.case) as url:
        done = stage.ask(1, url)
    show_report(done.report, done.decision, "rouge1")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown
