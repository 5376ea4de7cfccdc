"""The cache rows that golden rows ride in: what is left there, and what does not fit, is no adapter's fault."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapters.golden import GoldenRow
from serving.engine.breaker import Doubt
from serving.engine.lora import HostAdapter
from tests.engine_case import MAX_LEN
from tests.test_proof_engine import PROMPT, Bench, Blind, bench, refusal

__all__ = ["bench"]  # a fixture


def test_what_an_overflow_left_in_a_spare_row_is_not_held_against_the_next_adapter(bench: Bench) -> None:
    """Masked keys weigh nothing, and nothing times NaN is NaN: the next golden row there was found wanting."""

    def read(digest: str) -> HostAdapter:
        adapter = bench.read(digest)
        if digest == "a":
            pairs = {m: (x, torch.full_like(y, 1e38)) for m, (x, y) in adapter.pairs.items()}
            return replace(adapter, pairs=pairs, golden=(GoldenRow(tuple(range(5, 65)), (7, 8, 9), 0.01),))
        return adapter

    case = bench.case(read=read, spare=1)
    case.engine._prover = Blind()
    assert refusal(case, case.submit(PROMPT, "a")).message == Doubt.GOLDEN_MISMATCH.value
    assert case.answer(case.submit(PROMPT, "b")) == bench.expected("b")


def test_rows_that_this_engine_has_no_room_for_are_passed_over(bench: Bench) -> None:
    """They were taken for a mismatch: an engine with a shorter context set good adapters aside."""
    long = GoldenRow((5,) * (MAX_LEN - 1), (1, 2), 0.0)
    case = bench.case(read=lambda digest: replace(bench.read(digest), golden=(long, *bench.golden["a"])))
    assert case.answer(case.submit(PROMPT, "a")) == bench.expected("a")
    assert case.engine.heartbeat().set_aside == ()
