"""The swap bench: what bytes allow, what is cold, who starves, from made-up times; and that each verdict can fail."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from adapters.registry import Registry
from loadtests import bench_swap
from loadtests.bench_home import Base, Furnished, Kind, add_adapters, furnish
from loadtests.bench_shell import BenchFailed
from loadtests.bench_swap import Found, told
from loadtests.closed_loop import Answered, Ask, HttpSide, Prompter, Workload
from loadtests.goals import Word
from loadtests.shapes import ALL16, QV8, lru_hits
from loadtests.stub_server import NAME, Stub, serving
from loadtests.swap_cold import Cold, Cycle, cold_ones, drop_pages
from loadtests.swap_many import Many, Traffic, base_bytes, distinct_in_step, host_used, traffic_between, uniform
from loadtests.swap_side import LONG, SHORT, hits
from loadtests.swap_thrash import Thrash, copied, in_turn, overtaken, rounds_in_turn
from tests.adapter_factory import base_record


def ask(target: int) -> Ask:
    return Ask(target, "x", (1,), 8)


def answered(begun: float, first: float, cache: str | None = None) -> Answered:
    return Answered(begun, (first,), first, 1, 1, cache)


class FakePrompter(Prompter):
    """Asks without a tokenizer."""

    def __init__(self) -> None:
        pass

    def ask(self, target: int, *, prompt_tokens: int = 50, max_tokens: int = 64) -> Ask:
        return Ask(target, "x", (1,), max_tokens)


# -- G3 ----------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_step_are_the_base_the_adapters_in_it_and_what_was_moved() -> None:
    assert Traffic(distinct=4).bytes_a_step(1000, 10) == 1040
    assert Traffic(distinct=4, loads=0.5, installs=1.5).bytes_a_step(1000, 10) == 1080


def test_a_base_is_read_with_its_head() -> None:
    base = base_record()
    linears = sum(outputs * inputs for outputs, inputs in base.modules.values())
    assert base_bytes(base) == 2 * (linears + base.vocab_size * 16)


def test_adapters_in_flight_at_once_are_counted_step_by_step() -> None:
    clients = [[ask(1), ask(2)], [ask(1), ask(3)], [ask(1), ask(2)]]
    assert distinct_in_step(clients) == 1.5


def test_uniform_draws_reach_every_adapter_and_none_beyond() -> None:
    asked = [a.target for asks in uniform(FakePrompter(), 5, 40, random.Random(0)) for a in asks]
    assert (min(asked), max(asked), len(set(asked))) == (1, 5, 5)


BEFORE = {("engine_steps_total",): 100.0, ("adapter_loads_total", "store"): 5.0, ("adapter_evictions_total",): 1.0}


def test_traffic_is_what_grew_and_failures_move_nothing() -> None:
    after = {
        ("engine_steps_total",): 200.0,
        ("adapter_loads_total", "store"): 15.0,
        ("adapter_loads_total", "disk"): 10.0,
        ("adapter_loads_total", "failed"): 90.0,
        ("adapter_evictions_total",): 31.0,
        ("adapter_evictions_total", "host"): 50.0,
    }
    assert traffic_between(BEFORE, after, 7.0) == Traffic(7.0, loads=0.2, installs=0.3)


def test_host_memory_is_a_share_of_its_budget_and_silence_is_no_zero() -> None:
    found = {("adapter_host_bytes",): 30.0, ("engine_limit", "host_bytes"): 40.0}
    assert host_used(found) == 0.75
    with pytest.raises(BenchFailed, match="have no adapter_host_bytes"):
        host_used({("engine_limit", "host_bytes"): 40.0})


MANY = Many("rank 8", 2000, few_tok_s=100.0, many_tok_s=90.0, allowed=0.9, hit_ratio=0.01, host_share=0.9)


def test_what_bytes_allow_is_taken_off_before_judging() -> None:
    assert (MANY.ratio, MANY.of_allowed) == (0.9, 1.0)


# -- G5 ----------------------------------------------------------------------------------------------------------------


def test_warm_answers_are_no_cold_figure() -> None:
    found = [answered(0, 1, tier) for tier in ("device", "disk", "host", "store", None)]
    assert [a.cache for a in cold_ones(found)] == ["disk", "store", None]
    with pytest.raises(BenchFailed, match="no adapter was cold"):
        cold_ones([answered(0, 1, "host"), answered(0, 1, "device")])


def test_a_cycle_never_asks_what_few_places_keep() -> None:
    cycle = Cycle(12, first=2)
    asked = [cycle.next() for _ in range(60)]
    assert (min(asked), max(asked)) == (2, 12)
    assert lru_hits(asked, 4) == 0.0
    assert cycle.last == asked[-1]


def test_a_cycle_that_was_not_asked_yet_has_a_last_one_all_the_same() -> None:
    assert Cycle(12, first=2).last == 2


def test_dropping_pages_tells_how_long_the_disk_takes(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(os.urandom(1 << 16))
    assert drop_pages(tmp_path, 1 << 16) > 0.0
    with pytest.raises(BenchFailed, match="no files"):
        drop_pages(tmp_path / "nothing", 1)


COLD = Cold(
    megabytes=20.0, warm=40.0, on_disk=95.0, in_pages=80.0, raw_read=12.0, sources=("disk",), loaded_warm=90.0,
    loaded_cold=160.0, step=25.0, warm_p99=50.0, cold_p99=54.0,
)  # fmt: skip


def test_a_cold_first_token_is_judged_from_the_disk_and_beside_streams_less_one_step() -> None:
    assert (COLD.added_idle, COLD.added_loaded, COLD.streams) == (55.0, 45.0, 1.08)


# -- G6 ----------------------------------------------------------------------------------------------------------------


def test_callers_together_ask_one_adapter_after_the_other() -> None:
    asked = in_turn(FakePrompter(), callers=4, adapters=16, requests=8)
    together = [asks[k].target for k in range(8) for asks in asked]
    assert together == [*range(1, 17), *range(1, 17)]
    assert lru_hits(together, 8) == 0.0


def test_drawn_adapters_stay_within_the_set() -> None:
    asked = in_turn(FakePrompter(), 4, 16, 50, random.Random(0))
    assert {a.target for asks in asked for a in asks} == set(range(1, 17))


def test_who_waits_while_much_younger_requests_are_served_was_overtaken() -> None:
    starved, young = answered(0.0, 9.0), answered(3.0, 4.0)
    assert overtaken([starved, young]) == 1
    assert overtaken([answered(0.0, 9.0), answered(3.0, 10.0)]) == 0
    assert overtaken([answered(0.0, 9.0), answered(1.0, 2.0)]) == 0  # within the patience


THRASH = Thrash(
    warm=40.0,
    cycled=80.0,
    drawn=60.0,
    hit_ratio=0.0,
    fits=300.0,
    over=270.0,
    wait=500.0,
    longest=900.0,
    overtaken=0,
    full_fits=300.0,
    full_over=270.0,
)


def test_half_the_slots_are_held_against_enough_of_them() -> None:
    assert (THRASH.slower, THRASH.kept) == (2.0, 0.9)


def test_sides_take_turns_and_the_warm_up_does_not_count() -> None:
    log: list[str] = []
    with serving(Stub()) as url:
        sides = [
            HttpSide(n, url, ["base", f"{NAME}@1"], pause=partial(log.append, f"-{n}"), resume=partial(log.append, n))
            for n in ("a", "b")
        ]
        found = rounds_in_turn(sides, Workload("both", (0, 1)), FakePrompter(), replace(SHORT, rounds=2))
    assert log == ["b", "-b", "a", "-a", "a", "-a", "b", "-b", "b", "-b", "a", "-a"]
    assert [len(r) for r in found.values()] == [2, 2]


# -- verdicts ----------------------------------------------------------------------------------------------------------


def words(found: Found) -> dict[str, Word]:
    return {v.goal.id: v.word for v in told("tiny", found, LONG).goals}


GOOD = Found([MANY], COLD, THRASH)


def test_all_goals_are_reached_by_figures_that_reach_them() -> None:
    assert set(words(GOOD).values()) == {Word.REACHED}
    assert list(words(GOOD)) == [
        "G3", "G3.host", "G5.idle", "G5.load", "G5.streams", "G6.ttft", "G6.throughput", "G6.rows", "G6.order",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "goal"),
    [
        (replace(GOOD, many=[replace(MANY, many_tok_s=86.0)]), "G3"),
        (replace(GOOD, many=[MANY, replace(MANY, kind="rank 16", host_share=1.01)]), "G3.host"),
        (replace(GOOD, cold=replace(COLD, on_disk=101.0)), "G5.idle"),
        (replace(GOOD, cold=replace(COLD, loaded_cold=176.0)), "G5.load"),
        (replace(GOOD, cold=replace(COLD, cold_p99=56.0)), "G5.streams"),
        (replace(GOOD, thrash=replace(THRASH, cycled=121.0)), "G6.ttft"),
        (replace(GOOD, thrash=replace(THRASH, over=239.0)), "G6.throughput"),
        (replace(GOOD, thrash=replace(THRASH, full_over=239.0)), "G6.rows"),
        (replace(GOOD, thrash=replace(THRASH, overtaken=1)), "G6.order"),
    ],
)
def test_each_verdict_fails_by_its_own_figure_alone(planted: Found, goal: str) -> None:
    assert [g for g, word in words(planted).items() if word is Word.NOT_DONE] == [goal]


def test_what_was_not_measured_has_no_verdict() -> None:
    assert set(words(Found()).values()) == {Word.UNKNOWN}


def test_fewer_adapters_than_the_goal_asks_are_told() -> None:
    said = told("tiny", Found([replace(MANY, adapters=200)]), SHORT)
    assert list(said.left_out) == ["G3: 200 adapters in place of 2000 (--short)"]


def test_tables_show_every_part() -> None:
    shown = [cell for table in told("tiny", GOOD, LONG).tables for row in table.rows for cell in row]
    assert {"2000", "rank 8", "95.0", "270 tok/s"} <= set(shown)


def test_an_unknown_part_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as ended:
        bench_swap.main(["--only", "G4"])
    assert ended.value.code == 2


# -- what is served ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def furnished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Furnished:
    return furnish(Base("tiny", tiny_base), tmp_path_factory.mktemp("swap"), 0)


def test_adapters_of_a_kind_have_its_rank_its_linears_and_their_own_bytes(furnished: Furnished) -> None:
    made = add_adapters(furnished, "q", 3, QV8)
    assert [v.id for v in made] == ["q-0001@1", "q-0002@1", "q-0003@1"]
    assert len({v.digest for v in made}) == 3
    modules = furnished.base.modules
    touched = QV8.adapted(modules)
    assert {m.rpartition(".")[2] for m in touched} == {"q_proj", "v_proj"}
    assert QV8.size_bytes(modules) == sum(2 * 8 * (o + i) for o, i in touched.values())


def test_a_base_without_those_linears_is_told() -> None:
    with pytest.raises(BenchFailed, match="has no q_proj, v_proj"):
        QV8.adapted({"h.0.attn.c_attn": (4, 4)})
    assert Kind().adapted({"h.0.attn.c_attn": (4, 4)}) == {"h.0.attn.c_attn": (4, 4)}


def test_a_copied_home_has_the_same_versions_and_a_registry_of_its_own(furnished: Furnished, tmp_path: Path) -> None:
    add_adapters(furnished, "t", 1, ALL16)
    twin = copied(furnished, tmp_path / "twin")
    add_adapters(furnished, "t", 2, ALL16)
    registry = Registry.open(twin.home)
    try:
        assert registry.resolve("t-0001@1").base_digest == furnished.base.digest
        assert "t-0002" not in {a.name for a in registry.adapters()}
    finally:
        registry.close()


def test_hits_are_the_answers_from_a_slot() -> None:
    assert hits([answered(0, 1, "device"), answered(0, 1, "disk")]) == 0.5
    assert hits([answered(0, 1)]) is None
