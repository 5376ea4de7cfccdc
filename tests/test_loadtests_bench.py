"""The engine bench measures every case in turns and ends with one JSON line; its speed is nobody's claim here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests import bench_engine
from loadtests.bench_engine import MIXED, SERIAL, STATIC, Found, Size, told
from loadtests.floors import Floors
from loadtests.goals import Word
from loadtests.steps import Figure, against, figure, interleaved


class FakeCase:
    """Writes down when it was measured; the n-th step takes n seconds."""

    def __init__(self, name: str, log: list[str], rows: int = 4) -> None:
        self.name, self.rows, self._log = name, rows, log

    def steps(self, count: int) -> list[float]:
        self._log.append(self.name)
        return [float(i + 1) for i in range(count)]


def step(case: str, rows: int, tokens_per_s: float, to_base: float | None = None) -> Figure:
    return Figure(case, rows, rows / tokens_per_s * 1e3, 1.0, tokens_per_s, to_base)


def found(distinct: float, one: float, unused: float, peers: dict[str, float]) -> Found:
    """16 rows at 100 tok/s on the base, so that shares of it are percents."""
    decode = [
        step("base", 16, 100.0, 1.0),
        step("base rows, adapters resident", 16, unused, unused / 100),
        step("one adapter for all rows", 16, one, one / 100),
        step("an adapter for each row", 16, distinct, distinct / 100),
    ]
    pairs = {name: (step("ours", 16, distinct), step(name, 16, rate)) for name, rate in peers.items()}
    return Found(decode, [], Floors(200_000_000, 10_000_000, 20.0, 40.0), pairs, [])


def test_cases_take_turns_and_the_first_round_does_not_count() -> None:
    log: list[str] = []
    times = interleaved([FakeCase("a", log), FakeCase("b", log)], rounds=2, steps=3)
    assert log == ["a", "b"] * 3
    assert times == {"a": [1.0, 2.0, 3.0] * 2, "b": [1.0, 2.0, 3.0] * 2}


def test_the_median_step_makes_the_figure() -> None:
    made = figure(FakeCase("a", []), [0.1, 0.5, 0.2], base_tokens_per_s=40.0)
    assert (made.ms, made.best_ms, made.tokens_per_s, made.to_base) == (200.0, 100.0, 20.0, 0.5)


def test_a_peer_is_measured_in_turns_with_ours() -> None:
    log: list[str] = []
    ours, peer = against(FakeCase("ours", log, 16), FakeCase("peer", log, 1), rounds=1, steps=3)
    assert log == ["ours", "peer"] * 2
    assert ours.tokens_per_s == 16 * peer.tokens_per_s


def test_goals_are_judged_by_the_ratios_of_their_names() -> None:
    said = told(found(50.0, 90.0, 99.0, {MIXED: 6.0, SERIAL: 2.0, STATIC: 60.0}), {})
    words = {v.goal.id: v.word for v in said.goals}
    assert words == {
        "G1.mixed": Word.SHORT,  # 8.3: more than 7, less than 10
        "G1.serial": Word.REACHED,
        "G2.distinct": Word.NOT_DONE,
        "G2.one": Word.REACHED,
        "G2.unused": Word.REACHED,
        "G4.static": Word.NOT_DONE,
    }


def test_without_peers_their_goals_count_as_not_measured() -> None:
    said = told(found(80.0, 90.0, 97.0, {}), {})
    words = {v.goal.id: v.word for v in said.goals}
    assert words["G1.mixed"] is words["G4.static"] is Word.UNKNOWN
    assert words["G2.unused"] is Word.NOT_DONE


def test_the_share_of_the_floor_counts_the_weights_and_every_adapter_once() -> None:
    floors = Floors(weight_bytes=200_000_000, adapter_bytes=10_000_000, read_gb_s=20.0, matmul_ms=15.0)
    assert floors.memory_ms(0) == 10.0
    assert floors.memory_ms(16) == 18.0
    assert floors.matmul_floor_ms(16) == 23.0
    assert floors.shares(16, step_ms=46.0) == (18.0 / 46.0, 0.5)


def test_the_report_holds_the_share_of_the_floor_of_each_mixture() -> None:
    shares = told(found(50.0, 90.0, 99.0, {}), {}).report["share_of_floor"]
    assert shares["base"] == {"memory": 0.062, "products": 0.25}
    assert shares["an adapter for each row"] == {"memory": 0.056, "products": 0.15}


def test_the_bench_runs_on_a_tiny_base_with_its_peers_and_ends_with_json(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_engine, "SHORT", Size((1, 16), rounds=1, steps=2, peer_steps=2, mixed_steps=1))
    monkeypatch.setattr(bench_engine, "_CHUNKS", (8,))
    monkeypatch.setattr(bench_engine, "read_gb_s", lambda device: 20.0)
    code = bench_engine.main(["--short", "--base", str(tiny_base), "--dtype", "float32", "--threads", "1"])
    *table, last = capsys.readouterr().out.strip().splitlines()
    said = json.loads(last)
    assert code == 0
    assert {(f["case"], f["batch"]) for f in said["decode"]} >= {("base", 1), ("an adapter for each row", 16)}
    assert len(said["prefill"]) == 2
    assert [f["case"] for f in said["peers"]] == [STATIC, MIXED, SERIAL]
    assert all(value > 0 for value in said["ratios"].values())
    assert {g["goal"] for g in said["goals"]} == {v.split(" ")[0] for v in table if v.startswith("G")} - {"GOAL"}
