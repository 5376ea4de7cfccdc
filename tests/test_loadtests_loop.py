"""The closed loop: what is counted, who takes turns with whom, and what long prompts do to others, from fake times."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from adapters.prompts import Renderer
from loadtests import prefill_stall
from loadtests.bench_home import Base, Furnished, furnish, pick_base, random_base
from loadtests.bench_http import SERVED, added_ttft, edge_cost, told
from loadtests.bench_shell import BenchFailed
from loadtests.closed_loop import (
    Answered,
    Ask,
    Clients,
    HttpSide,
    LoopFigure,
    Prompter,
    Round,
    Workload,
    loop_figure,
    take_turns,
    workloads,
)
from loadtests.goals import Word
from loadtests.in_process import EngineSide, engine_config
from loadtests.prefill_stall import Stall, stall
from loadtests.processes import Child
from loadtests.stub_server import NAME, Lie, Stub, serving


def answered(begun: float, *pieces: float, tokens: int = 3) -> Answered:
    return Answered(begun, pieces, pieces[-1], tokens, 50)


def test_a_round_lasts_from_its_first_request_to_its_last_answer() -> None:
    made = Round((answered(1.0, 2.0, 3.0), answered(1.5, 4.0, 5.0, tokens=5)))
    assert made.seconds == 4.0
    assert made.tokens_per_s == 2.0


def test_a_side_is_told_by_the_median_of_its_rounds() -> None:
    rounds = [Round((answered(0.0, 0.5, 0.5 + s),)) for s in (1.0, 2.5, 0.5)]
    made = loop_figure("base", "ours", rounds)
    assert (made.tokens_per_s, made.lowest, made.highest) == (2.0, 1.0, 3.0)
    assert (made.ttft_p50_ms, made.itl_p50_ms, made.requests) == (500.0, 1000.0, 3)


@pytest.fixture(scope="module")
def furnished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Furnished:
    return furnish(Base("tiny", tiny_base), tmp_path_factory.mktemp("bench"), 2)


@pytest.fixture(scope="module")
def prompter(furnished: Furnished) -> Prompter:
    return Prompter(Renderer(furnished.folder), furnished.base.vocab_size)


def test_adapters_are_published_where_the_server_will_look(furnished: Furnished) -> None:
    assert [v.id for v in furnished.versions] == ["a01@1", "a02@1"]
    assert len({v.digest for v in furnished.versions}) == 2
    assert [p.name for p in furnished.peft] == ["a01", "a02"]


def test_no_two_prompts_are_alike_and_their_tokens_are_those_of_the_text(
    furnished: Furnished, prompter: Prompter
) -> None:
    asks = [prompter.ask(0, prompt_tokens=20) for _ in range(30)]
    assert len({a.prompt for a in asks}) == 30
    assert all(tuple(Renderer(furnished.folder).encode(a.prompt)) == a.ids for a in asks[:3])
    assert all(abs(len(a.ids) - 20) <= 3 for a in asks)


def test_the_random_base_has_one_token_a_word(tmp_path: Path) -> None:
    renderer = Renderer(random_base(tmp_path / "base"))
    made = Prompter(renderer, renderer.vocab_size).ask(0, prompt_tokens=50)
    assert len(made.ids) == 50


def test_workloads_are_the_base_one_adapter_and_one_for_each_client() -> None:
    assert [w.targets for w in workloads(3)] == [(0, 0, 0), (1, 1, 1), (1, 2, 3)]


class FakeSide:
    """Writes down what happens to it; must not be driven while it or another is in the wrong state."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log, self._running = name, log, False

    def resume(self) -> None:
        self._running = True

    def pause(self) -> None:
        self._running = False

    def drive(self, clients: Clients) -> Round:
        assert self._running
        self._log.append(f"{self.name}:{len(clients[0])}")
        return Round((answered(0.0, 1.0, 2.0),))


def test_sides_take_turns_paused_in_between_and_what_warms_them_up_does_not_count(prompter: Prompter) -> None:
    log: list[str] = []
    sides = [FakeSide("a", log), FakeSide("b", log)]
    made = take_turns(
        [(Workload("base", (0,)), sides)], prompter, rounds=2, requests=3, say=lambda _: None, settle_s=0.0
    )
    assert log == ["a:1", "a:3", "b:1", "b:3", "b:1", "b:3", "a:1", "a:3"]
    assert [(f.side, f.rounds) for f in made] == [("a", 2), ("b", 2)]


def ask(target: int = 0, max_tokens: int = 8) -> Ask:
    return Ask(target, "one two", (1, 2), max_tokens)


def test_every_client_asks_its_requests_over_http() -> None:
    with serving(Stub()) as url:
        made = HttpSide("stub", url, ["base", f"{NAME}@1"]).drive([[ask(0), ask(1)], [ask(1), ask(0)]])
    assert len(made.answers) == 4
    assert [a.tokens for a in made.answers] == [8] * 4
    assert all(len(a.pieces) == 8 and a.begun < a.pieces[0] <= a.pieces[-1] <= a.ended for a in made.answers)


@pytest.mark.parametrize(
    ("lie", "said"),
    [(Lie.HTTP_503, "HTTP 503"), (Lie.CUT_SHORT, "4 tokens of 8"), (Lie.ERROR_EVENT, "engine_lost")],
)
def test_an_answer_that_is_not_whole_is_no_figure(lie: Lie, said: str) -> None:
    with serving(Stub(lie)) as url, pytest.raises(BenchFailed, match=said):
        HttpSide("stub", url, ["base"]).drive([[ask()]])


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(BenchFailed, match="stub"):
        HttpSide("stub", "http://127.0.0.1:9", ["base"]).drive([[ask()]])


def test_the_engine_in_this_process_answers_the_same_requests(furnished: Furnished, prompter: Prompter) -> None:
    digests = [v.digest for v in furnished.versions]
    side = EngineSide("ours", engine_config(furnished, threads=1, rows=4, max_model_len=128), digests)
    try:
        clients = [[prompter.ask(t, prompt_tokens=12, max_tokens=5) for _ in range(2)] for t in (0, 1, 2)]
        made = side.drive(clients)
        with pytest.raises(BenchFailed, match="context_length_exceeded"):
            side.drive([[prompter.ask(0, prompt_tokens=12, max_tokens=500)]])
        again = side.drive([[prompter.ask(0, prompt_tokens=12, max_tokens=3)]])
    finally:
        side.stop()
    assert [a.tokens for a in made.answers] == [5] * 6
    assert [len(a.pieces) for a in made.answers] == [5] * 6
    assert sorted(a.prompt_tokens for a in made.answers) == sorted(len(a.ids) for asks in clients for a in asks)
    assert again.answers[0].tokens == 3


def figure(workload: str, side: str, tokens_per_s: float, ttft: float) -> LoopFigure:
    return LoopFigure(workload, side, 1, 1, 50.0, tokens_per_s, 1.0, 1.0, ttft, 1.0, 1.0, 1.0)


FIGURES = [
    figure("16 distinct", SERVED, 90.0, 30.0),
    figure("16 distinct", "in-process, 1 threads", 100.0, 20.0),
    figure("16 distinct", "in-process, 2 threads", 120.0, 25.0),
    figure("base, 1 client", SERVED, 40.0, 30.0),
    figure("base, 1 client", "in-process, 1 threads", 50.0, 25.0),
]


def test_the_edge_is_measured_against_the_better_engine() -> None:
    assert edge_cost(FIGURES, "16 distinct") == pytest.approx(0.25)
    assert added_ttft(FIGURES, "16 distinct") == 10.0
    assert edge_cost(FIGURES, "base") is None


def quiet(p99: float, busy: float) -> Stall:
    return Stall(15, 100, 100, 1.0, p99, 1.0, busy, 3, 1500, 900.0)


def test_the_worse_of_two_mixtures_counts_for_long_prompts() -> None:
    said = told(
        "tiny",
        FIGURES,
        {"base": quiet(10.0, 15.0), "distinct": quiet(10.0, 25.0)},
        0.1,
        (),
        like="in-process, 1 threads",
    )
    reached = {v.goal.id: (v.reached, v.word) for v in said.goals}
    assert reached["G9"] == (2.5, Word.NOT_DONE)
    assert reached["G7.ttft"] == (5.0, Word.REACHED)
    assert reached["G7.cost"][1] is Word.NOT_DONE
    assert said.report["edge_cost_same_threads"]["16 distinct"] == 0.1


def test_without_long_prompts_their_goal_is_not_measured() -> None:
    said = told("tiny", FIGURES, {}, 0.1, ("G9: too few positions",), like="")
    assert {v.goal.id: v.word for v in said.goals}["G9"] is Word.UNKNOWN
    assert list(said.left_out) == ["G9: too few positions"]


def test_gaps_belong_to_the_window_in_which_they_lie() -> None:
    times = [[0.0, 0.1, 0.2, 1.0, 1.3, 1.6, 2.0], [0.05, 0.15, 1.1, 1.5]]
    made = stall(times, quiet=[(0.0, 0.5)], busy=[(1.0, 1.9)], longs=[(0.4, 1500), (0.6, 1500)])
    assert (made.quiet_gaps, made.busy_gaps) == (3, 3)
    assert made.quiet_p99_ms == pytest.approx(100.0)
    assert made.ratio == pytest.approx(4.0, rel=0.02)
    assert (made.long_prompts, made.long_ttft_ms) == (2, 500.0)


def test_too_few_tokens_tell_nothing() -> None:
    with pytest.raises(BenchFailed, match="measure for longer"):
        stall([[0.1]], [(0.0, 1.0)], [(1.0, 2.0)], [(0.1, 1500)])


def test_streams_run_through_quiet_and_busy_windows_and_are_left_in_the_end(prompter: Prompter) -> None:
    stub = Stub(gap_s=0.002)
    with serving(stub) as url:
        side = HttpSide("stub", url, ["base"])
        made = prefill_stall.measure(side, prompter, [0, 0], context=20_000, window_s=0.1, windows=2)
    assert made.streams == 2
    assert made.long_prompts == 2
    assert made.quiet_gaps > 0 < made.busy_gaps
    assert stub.asked == 4


def test_streams_that_do_not_begin_are_told(prompter: Prompter) -> None:
    with serving(Stub(Lie.HTTP_503)) as url, pytest.raises(BenchFailed, match="HTTP 503"):
        prefill_stall.measure(HttpSide("stub", url, ["base"]), prompter, [0], context=100, window_s=0.1, windows=1)


def test_a_paused_process_computes_nothing_until_it_is_resumed() -> None:
    with Child([sys.executable, "-c", "while True: pass"]) as child:
        child.pause()
        assert child.cpu_share(0.1) == 0.0
        assert child.running
        child.resume()
        while child.cpu_share(0.05) == 0.0:  # the test's own time limit ends this
            pass
        child.pause()
    assert not child.running


def test_a_base_that_is_not_there_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(BenchFailed, match=r"nosuch: no base lies there"):
        pick_base(argparse.Namespace(base=tmp_path / "nosuch", home=None), tmp_path)
