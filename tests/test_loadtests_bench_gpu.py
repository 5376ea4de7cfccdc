"""The bench of CUDA devices: it says when there is none, and its arithmetic holds on a small shape anywhere."""

from __future__ import annotations

import json

import pytest
import torch

from loadtests import bench_gpu
from loadtests.bench_cases import random_adapter
from loadtests.bench_gpu import Reads, Shape, Work, measured, random_decoder, told
from loadtests.goals import Word
from loadtests.steps import Figure
from tests.engine_case import DEVICE

SMALL = Shape(layers=2, width=64, inner=96, heads=4, kv=2, dim=16, vocabulary=128, positions=64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_it_says_so_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main([]) == 2
    shown = capsys.readouterr()
    assert "no CUDA device" in shown.err
    assert shown.out == ""


def test_every_case_is_measured_on_a_shape_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are this machine's and nobody's claim; a case per mixture, a floor for each, and one line of JSON."""
    monkeypatch.setattr(bench_gpu, "_COPY_BYTES", 1 << 24)
    monkeypatch.setattr(bench_gpu, "_PATIENCE_STEPS", 2)
    found = measured(SMALL, Work(rows=3, context=20, rounds=1, steps=2), 4, DEVICE, torch.float32)
    (table,) = found.tables
    assert [row[0] for row in table.rows] == [
        "base", "base rows, adapters resident", "one adapter for all rows", "an adapter for each row",
    ]  # fmt: skip
    assert {v.goal.id for v in found.goals} == {"G11.floor", "G11.cost"}
    assert json.loads(json.dumps(found.report))["decode"][3]["batch"] == 3


def test_a_step_reads_weights_distinct_adapters_and_the_cache_once() -> None:
    decoder = random_decoder(SMALL, DEVICE, torch.float32)
    adapter = random_adapter(decoder, 1, 4)
    reads = Reads.of(decoder, SMALL, Work(rows=3, context=20), adapter)
    assert reads.weights == 4 * (2 * (64 * 128 + 64 * 64 + 64 * 192 + 96 * 64) + 64 * 128)
    assert reads.cache == 3 * 21 * 2 * 2 * 2 * 16 * 4
    assert reads.adapter == 4 * 4 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 96) + (96 + 64))
    assert reads.floor_ms(3, 1.0) == (reads.weights + 3 * reads.adapter + reads.cache) / 1e6


def test_goals_are_held_against_the_floor_and_the_base() -> None:
    reads = Reads(weights=16_000_000_000, adapter=80_000_000, cache=2_000_000_000)
    rates = {"base": 5000.0, "unused": 4990.0, "one": 4600.0, "distinct": 4000.0}
    figures = [Figure(name, 32, 32 / rate * 1e3, 1.0, rate, rate / 5000) for name, rate in rates.items()]
    found = told(Shape(), Work(), figures, reads, 3000.0, torch.device("cuda"))
    floor, cost = found.goals
    # 20.56 GB at 3,000 GB/s are 6.853 ms of the 8 ms that a step took.
    assert floor.reached == pytest.approx(6.8533 / 8.0, rel=1e-3)
    assert floor.word is Word.REACHED
    assert cost.reached == pytest.approx(0.2)
    assert cost.word is Word.NOT_DONE
    assert found.report["bytes_allow_of_base"] == pytest.approx(18 / 20.56, rel=1e-3)
