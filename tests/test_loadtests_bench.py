"""The engine bench measures every case in turns and ends with one JSON line; its speed is nobody's claim here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests import bench_engine
from loadtests.bench_engine import Size, figure, interleaved, machine


class FakeCase:
    """Writes down when it was measured; the n-th step takes n seconds."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.rows, self._log = name, 4, log

    def steps(self, count: int) -> list[float]:
        self._log.append(self.name)
        return [float(i + 1) for i in range(count)]


def test_cases_take_turns_and_the_first_round_does_not_count() -> None:
    log: list[str] = []
    times = interleaved([FakeCase("a", log), FakeCase("b", log)], rounds=2, steps=3)
    assert log == ["a", "b"] * 3
    assert times == {"a": [1.0, 2.0, 3.0] * 2, "b": [1.0, 2.0, 3.0] * 2}


def test_the_median_step_makes_the_figure() -> None:
    found = figure(FakeCase("a", []), [0.1, 0.5, 0.2], base_tokens_per_s=40.0)
    assert (found.ms, found.best_ms, found.tokens_per_s, found.to_base) == (200.0, 100.0, 20.0, 0.5)


def test_the_machine_is_told_with_its_instruction_sets() -> None:
    told = machine()
    assert {"cpu", "cores", "avx512_bf16", "amx_bf16", "torch", "gpu"} <= told.keys()


def test_the_bench_runs_on_a_tiny_base_with_its_peers_and_ends_with_json(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_engine, "SHORT", Size((1, 16), rounds=1, steps=2, peer_steps=2, mixed_steps=1))
    monkeypatch.setattr(bench_engine, "_CHUNKS", (8,))
    code = bench_engine.main(["--short", "--base", str(tiny_base), "--dtype", "float32", "--threads", "1"])
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert code == 0
    assert {(f["case"], f["batch"]) for f in told["decode"]} >= {("base", 1), ("an adapter for each row", 16)}
    assert len(told["prefill"]) == 2
    assert [f["case"] for f in told["peers"]] == ["transformers generate, base", "PEFT adapter_names, distinct"]
    assert all(value > 0 for value in told["ratios"].values())
