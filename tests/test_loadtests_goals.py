"""Goals are judged as they were set, and every bench ends the same way: tables, goals, one JSON line, an exit code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import pytest

from adapters.errors import BaseMissing
from loadtests import bench_engine, bench_http, bench_peers, bench_swap, bench_train, scenarios
from loadtests.bench_shell import BenchFailed, Table, Told, aside, parser, run
from loadtests.goals import GOALS, Goal, Word, all_good, ratio, verdicts
from loadtests.machine import described, machine


@pytest.mark.parametrize(
    ("goal", "reached", "word"),
    [
        ("G1.http", 5.0, Word.REACHED),
        ("G1.http", 4.9, Word.SHORT),
        ("G1.http", 3.49, Word.NOT_DONE),
        ("G2.unused", 0.979, Word.NOT_DONE),  # it has no bound beside the target
        ("G7.cost", 0.08, Word.REACHED),
        ("G7.cost", 0.081, Word.NOT_DONE),
        ("G7.ttft", -3.0, Word.REACHED),
        ("G9", 2.0, Word.REACHED),
        ("G9", 2.1, Word.NOT_DONE),
        ("G8.t5", None, Word.UNKNOWN),
        ("G3", 0.96, Word.NOT_DONE),
        ("G5.idle", -1.0, Word.REACHED),
        ("G5.streams", 1.11, Word.NOT_DONE),
        ("W6.wrong", 0.0, Word.REACHED),
        ("W6.wrong", 1.0, Word.NOT_DONE),
    ],
)
def test_a_figure_gets_the_verdict_of_its_goal(goal: str, reached: float | None, word: Word) -> None:
    assert GOALS[goal].judge(reached).word is word


def test_the_targets_are_those_that_were_set() -> None:
    assert {g.id: (g.target, g.bound) for g in GOALS.values() if not g.id.startswith("G11")} == {
        "G1.http": (5.0, 3.5), "G1.mixed": (10.0, 7.0), "G1.serial": (25.0, 14.0),
        "G2.distinct": (0.70, None), "G2.one": (0.88, None), "G2.unused": (0.98, None),
        "G3": (0.97, None), "G3.host": (1.0, None),
        "G4.http": (2.0, 1.4), "G4.static": (1.5, None),
        "G5.idle": (60.0, None), "G5.load": (60.0, None), "G5.streams": (1.1, None),
        "G6.ttft": (3.0, None), "G6.throughput": (0.8, None), "G6.rows": (0.8, None), "G6.order": (0.0, None),
        "G7.cost": (0.08, None), "G7.ttft": (10.0, None),
        "G8.t5": (5.0, None), "G8.bart": (5.0, None), "G9": (2.0, None),
        "G10": (1.5, None), "G10.curve": (0.01, None),
        "W6.failed": (0.0, None), "W6.wrong": (0.0, None), "W7": (2.0, None),
    }  # fmt: skip


def test_an_unknown_goal_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        verdicts({"G99": 1.0})


def test_a_goal_that_was_not_measured_is_not_held_against_the_run() -> None:
    assert all_good(verdicts({"G1.http": None, "G9": 1.5}))
    assert not all_good(verdicts({"G1.http": 2.0, "G9": 1.5}))


def test_shares_are_shown_as_percents_and_times_with_their_unit() -> None:
    assert GOALS["G7.cost"].judge(0.0634).row()[2:] == ("6.3 %", "<= 8.0 %", "-", "reached")
    assert GOALS["G7.ttft"].judge(12.0).row()[2:] == ("12 ms", "<= 10 ms", "-", "not done")
    assert GOALS["G1.http"].judge(None).row()[2:] == ("-", ">= 5 x", ">= 3.5 x", "not measured")


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(6.0, 2.0, 3.0), (None, 2.0, None), (6.0, None, None)])
def test_a_ratio_needs_both_sides(ours: float | None, theirs: float | None, expected: float | None) -> None:
    assert ratio(ours, theirs) == expected


def test_a_ratio_to_nothing_is_none() -> None:
    assert ratio(3.0, 0.0) is None


def options(*words: str) -> argparse.Namespace:
    return parser("bench_x", "Measures x.", "python -m loadtests.bench_x --short").parse_args(words)


def told(reached: float) -> Told:
    goal = Goal("G", "x over y", 2.0)
    return Told("x", {"figure": 1}, [Table(("A",), [("cell",)])], [goal.judge(reached)], ["y: it is not here"])


def test_a_bench_tells_tables_then_goals_then_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(lambda _: told(3.0), options())
    *lines, last = capsys.readouterr().out.strip().splitlines()
    said = json.loads(last)
    assert code == 0
    assert [line.split()[0] for line in lines if line] == [lines[0].split()[0], "A", "cell", "GOAL", "G", "left"]
    assert (said["bench"], said["figure"], said["short"], said["left_out"]) == ("x", 1, False, ["y: it is not here"])
    assert said["goals"][0]["verdict"] == "reached"
    assert {"cores", "avx512_bf16", "amx_bf16", "memory_gib"} <= said["machine"].keys()


def test_json_alone_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run(lambda _: told(3.0), options("--json", "--short"))
    said = capsys.readouterr().out
    assert json.loads(said)["short"] is True
    assert said.count("\n") == 1


@pytest.mark.parametrize(("words", "reached", "code"), [((), 1.0, 0), (("--strict",), 1.0, 1), (("--strict",), 2.0, 0)])
def test_only_strict_turns_a_goal_into_an_exit_code(words: tuple[str, ...], reached: float, code: int) -> None:
    assert run(lambda _: told(reached), options("--json", *words)) == code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BenchFailed("no\n server"), 2, "error[bench]: no server"),
        (BaseMissing("fetch it"), 2, "error[bench]: fetch it"),
        (KeyboardInterrupt(), 130, "error[interrupted]: stopped"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: argparse.Namespace) -> Told:
        raise error

    assert run(work, options()) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", said)


@pytest.mark.parametrize("bench", [bench_engine, bench_http, bench_peers, bench_swap, bench_train, scenarios])
def test_help_has_an_example_and_what_all_benches_have(bench: object, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = bench.main  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Example: python -m loadtests." in said
    assert all(word in said for word in ("--short", "--json", "--strict", "--threads", "--base"))


@pytest.mark.parametrize("words", [["--threads", "0"], ["--threads", "many"], ["--nonsense"]])
def test_a_wrong_option_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_http.main(words)
    assert ended.value.code == 2


def test_a_machine_is_known_by_its_features() -> None:
    found = {**machine(), "avx512_bf16": True, "amx_bf16": False, "amx_tile": False}
    assert "with avx512-bf16" in described(found)
    assert "with amx-tile" in described({**found, "amx_tile": True})
    plain = dict.fromkeys(("avx2", "avx512f", "avx512_bf16"), False)
    assert "with no wide vectors" in described({**found, **plain})


def test_what_is_done_aside_returns_or_raises_as_if_it_were_done_here() -> None:
    assert aside(lambda: 3) == 3
    with pytest.raises(BenchFailed, match="aside"):
        aside(fails)


def fails() -> None:
    raise BenchFailed("aside")
