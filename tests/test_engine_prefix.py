"""Prompts start behind what was computed before, for the same tenant and adapter only; the answers stay the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine.kv import MIN_SHARED, Copy, Lease, RowTable, Scope, shared_prefix
from serving.engine.model import Decoder
from serving.engine.plan import Key, StepPlan, StepResult
from serving.engine.request import Sampling, Submit, Tokens
from tests.engine_case import Answer, EngineCase, load_tiny
from tests.prefix_case import CacheRunner, interleave
from tests.tiny_base import VOCAB

SEED = 20261122
PLAIN = Scope("", None)


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def reused(case: EngineCase) -> int:
    return case.scheduler.reused_tokens


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 100])
def test_the_shared_prefix_is_as_long_as_a_loop_finds_it(length: int) -> None:
    rng = random.Random(length)
    for _ in range(200):
        left = [rng.randrange(2) for _ in range(length)]
        right = left[: rng.randrange(length + 1)] + [rng.randrange(2) for _ in range(rng.randrange(4))]
        slow = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(length, len(right)))
        assert shared_prefix(left, right) == slow


def test_a_conversation_that_goes_on_takes_its_own_row_again() -> None:
    rows = RowTable(3)
    said = tuple(range(40))
    first = rows.acquire(PLAIN, said)
    rows.release(first.row, PLAIN, said)
    assert rows.acquire(PLAIN, (*said, 7, 8, 9)) == Lease(first.row, 40, first.row)


def test_a_prompt_that_only_begins_alike_leaves_the_row_to_others_and_copies() -> None:
    rows = RowTable(3)
    said = tuple(range(100))
    first = rows.acquire(PLAIN, said)
    rows.release(first.row, PLAIN, said)
    other = rows.acquire(PLAIN, (*said[:50], 7, 7, 7))
    assert (other.reused, other.source) == (50, first.row)
    assert other.row != first.row
    assert rows.acquire(PLAIN, (*said, 5)).row == first.row


def test_the_last_prompt_token_is_always_computed() -> None:
    rows = RowTable(1)
    said = tuple(range(40))
    rows.release(rows.acquire(PLAIN, said).row, PLAIN, said)
    assert rows.acquire(PLAIN, said).reused == 39


@pytest.mark.parametrize("scope", [Scope("other tenant", None), Scope("", "other adapter"), None])
def test_nothing_passes_from_one_scope_to_another(scope: Scope | None) -> None:
    rows = RowTable(1)
    said = tuple(range(40))
    rows.release(rows.acquire(PLAIN, said).row, PLAIN, said)
    assert rows.acquire(scope, said) == Lease(0)


def test_the_oldest_content_makes_room_first_and_blank_rows_before_it() -> None:
    rows = RowTable(3)
    a, b, c = (rows.acquire(PLAIN, tuple(range(n, n + 40))).row for n in (0, 100, 200))
    rows.release(b, PLAIN, tuple(range(100, 140)))
    rows.release(a, PLAIN, tuple(range(40)))
    rows.release(c)
    found = [rows.acquire(PLAIN, tuple(range(300, 340))).row for _ in range(3)]
    assert found == [c, b, a]
    assert rows.balanced()


def test_answers_are_the_same_with_reuse_and_without(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    """Few openings, many continuations, three scopes in turn, five rows: copies, rows taken again, evictions."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    openings = [prompt(rng, n) for n in (20, 33, 60)]
    asked = [
        ([*rng.choice(openings), *prompt(rng, rng.randrange(1, 12))], rng.choice([None, *tiny_adapters[:2]]))
        for _ in range(60)
    ]

    def answers(reuse: bool) -> tuple[list[list[int]], EngineCase]:
        case = EngineCase(decoder, rows=5, slots=2, chunk=9, prefix_reuse=reuse)
        keys = [case.submit(ids, adapter, max_tokens=6, ignore_eos=True) for ids, adapter in asked]
        case.run()
        return [case.answer(key) for key in keys], case

    plain, none = answers(False)
    found, some = answers(True)
    assert found == plain
    assert reused(none) == 0
    assert reused(some) > 500
    print(f"{reused(some)} of {some.scheduler.prompt_tokens} prompt tokens reused")


def test_a_prompt_in_flight_serves_those_that_come_after_it(decoder: Decoder) -> None:
    rng = random.Random(SEED)
    said = prompt(rng, 64)
    case = EngineCase(decoder, rows=4, slots=1, chunk=16)
    first = case.submit(said, max_tokens=40, ignore_eos=True)
    case.run(lambda: bool(case.answers[first].ids))
    second = case.submit([*said, 5, 6, 7], max_tokens=4, ignore_eos=True)
    case.run()
    timing = next(e.timing for e in case.answers[second].events if isinstance(e, Tokens))
    assert timing is not None
    assert timing.reused == 64


def test_a_row_whose_answer_failed_is_not_reused(decoder: Decoder) -> None:
    """Its numbers are not to be trusted; the same prompt is then computed anew and answers as ever."""
    rng = random.Random(SEED)
    said = prompt(rng, 40)
    alone = EngineCase(decoder, rows=1, slots=1)
    expected = alone.answer(alone.submit(said, max_tokens=5, ignore_eos=True))
    case = EngineCase(decoder, rows=1, slots=1, wrap=lambda runner: _Poison(runner, steps=2))
    failed = case.submit(said, max_tokens=5, ignore_eos=True)
    case.run()
    assert [type(e).__name__ for e in case.answers[failed].endings] == ["Failed"]
    again = case.submit(said, max_tokens=5, ignore_eos=True)
    assert case.answer(again) == expected
    assert reused(case) == 0


def test_a_prompt_cancelled_half_way_leaves_nothing_to_reuse(decoder: Decoder) -> None:
    rng = random.Random(SEED)
    said = prompt(rng, 200)
    case = EngineCase(decoder, rows=1, slots=1, chunk=16)
    first = case.submit(said)
    case.step()
    case.engine.cancel(first, first[1])
    case.answers.pop(first)
    again = case.submit(said, max_tokens=3, ignore_eos=True)
    case.answer(again)
    assert reused(case) == 0


def test_a_row_to_be_scrubbed_is_scrubbed_before_a_prefix_is_copied_into_it(decoder: Decoder) -> None:
    """A cancelled prompt taints its row; the next sequence gets that very row, and a copied prefix with it."""
    rng = random.Random(SEED)
    said, other = prompt(rng, 40), prompt(rng, 200)
    case = EngineCase(decoder, rows=2, slots=1, chunk=16)
    first = case.submit(said, max_tokens=60, ignore_eos=True)
    case.run(lambda: bool(case.answers[first].ids))
    doomed = case.submit(other)
    case.step()
    case.engine.cancel(doomed, doomed[1])
    case.answers.pop(doomed)
    again = case.submit([*said, 7], max_tokens=5, ignore_eos=True)
    case.run()
    alone = EngineCase(decoder, rows=1, slots=1)
    assert case.answer(again) == alone.answer(alone.submit([*said, 7], max_tokens=5, ignore_eos=True))
    assert reused(case) >= 40


def test_a_copy_takes_exactly_the_prefix(decoder: Decoder) -> None:
    from serving.engine.plan import NO_SLOT, RowPlan
    from serving.engine.runner import DecoderRunner, make_slots

    runner = DecoderRunner(decoder, 2, make_slots(decoder, 1, 8))
    greedy = Sampling(max_tokens=1, temperature=0.0)
    said = tuple(prompt(random.Random(SEED), 50))

    def row(number: int, start: int, tokens: tuple[int, ...]) -> RowPlan:
        return RowPlan(Key((0, number)), number, NO_SLOT, start, tokens, True, greedy, 0, 0)

    whole = runner.logits(StepPlan((row(0, 0, said),))).clone()
    assert MIN_SHARED < 37
    runner.tidy(StepPlan((), (), (Copy(0, 1, 37),)))
    torch.testing.assert_close(runner.logits(StepPlan((row(1, 37, said[37:]),))), whole, rtol=0, atol=1e-4)


class _Poison:
    """A runner whose n-th step fails every row."""

    def __init__(self, runner: object, steps: int) -> None:
        self._runner, self._left = runner, steps

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def run(self, plan: StepPlan) -> StepResult:
        from serving.engine.plan import Sampled

        self._left -= 1
        if self._left == 0:
            return StepResult({row.row: Sampled(fault="planted") for row in plan.rows})
        return self._runner.run(plan)  # type: ignore[attr-defined,no-any-return]


# -- prefix caches on = off, whatever shares the engine ----------------------------------------------------------


def test_a04_ten_thousand_interleavings_answer_as_each_sequence_does_alone() -> None:
    """Tenants, adapters, versions of one adapter and shared openings in every order, with cancels and faults.

    Every answer equals what a pure function says of that sequence alone; every tenth interleaving runs without reuse
    too, and says the same.
    """
    print(f"seeds {SEED} to {SEED + 9_999}")
    answered = reuses = 0
    for seed in range(SEED, SEED + 10_000):
        outcome = interleave(seed, reuse=True)
        assert outcome.wrong == [], f"seed {seed}"
        answered += outcome.answered
        reuses += outcome.reused
        if seed % 10 == 0:
            without = interleave(seed, reuse=False)
            assert (without.wrong, without.reused) == ([], 0), f"seed {seed}"
    print(f"{answered} answers, {reuses} prompt tokens reused")
    assert answered > 30_000
    assert reuses > 30_000


@pytest.mark.parametrize("bug", ["tenant", "adapter", "version", "text", "scrub"])
def test_a04_finds_a_prefix_that_is_not_ones_own(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Five ways to reuse what one must not, each planted: every one is found within 1,000 interleavings."""
    if bug == "scrub":
        monkeypatch.setattr(CacheRunner, "tidy", _without_copies)
    elif bug == "text":
        monkeypatch.setattr("serving.engine.kv.shared_prefix", _one_too_many)
        monkeypatch.setattr("serving.engine.scheduler.shared_prefix", _one_too_many)
    else:
        _mangle(monkeypatch, bug)
    found = sum(bool(interleave(seed, reuse=True).wrong) for seed in range(SEED, SEED + 1000))
    print(f"seeds {SEED} to {SEED + 999}: {found} interleavings show it")
    assert found


def _mangle(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Let the rows forget a part of whose their content is."""
    acquire, release = RowTable.acquire, RowTable.release

    def forget(scope: Scope | None) -> Scope | None:
        if scope is None:
            return None
        if bug == "tenant":
            return Scope("", scope.adapter)
        return Scope(scope.salt, None if bug == "adapter" else (scope.adapter or "").partition("@")[0])

    monkeypatch.setattr(RowTable, "acquire", lambda self, scope=None, prompt=(): acquire(self, forget(scope), prompt))
    monkeypatch.setattr(
        RowTable, "release", lambda self, row, scope=None, tokens=(): release(self, row, forget(scope), tokens)
    )


def _without_copies(runner: CacheRunner, plan: StepPlan) -> None:
    for row in plan.scrub:
        runner._cache[row] = []


def _one_too_many(left: Sequence[int], right: Sequence[int]) -> int:
    shared = shared_prefix(left, right)
    return shared if shared >= min(len(left), len(right)) else shared + 1


def test_a04_holds_for_a_real_model(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    """The same on the tiny torch model: 15 interleavings, each with reuse and without."""
    print(f"seeds {SEED} to {SEED + 14}")
    saved = 0
    for seed in range(SEED, SEED + 15):
        rng = random.Random(seed)
        openings = [prompt(rng, n) for n in (17, 40)]
        asked = [
            (
                [*rng.choice(openings), *prompt(rng, rng.randrange(1, 6))],
                rng.choice([None, *tiny_adapters[:2]]),
                rng.choice(["", "other"]),
                rng.randrange(3),
            )
            for _ in range(8)
        ]

        def answers(reuse: bool, asked: list[Any] = asked) -> tuple[list[list[int]], int]:
            case = EngineCase(decoder, rows=3, slots=2, chunk=11, prefix_reuse=reuse)
            keys: list[Key] = []
            for ids, adapter, tenant, steps in asked:
                key = Key((0, len(keys) + 1))
                case.answers[key] = Answer()
                settings = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
                name = None if adapter is None else str(adapter)
                case.engine.submit(key, Submit(key[1], tuple(ids), settings, name, salt=tenant))
                keys.append(key)
                for _ in range(steps):
                    case.step()
            case.run()
            return [case.answer(key) for key in keys], reused(case)

        plain, none = answers(False)
        found, some = answers(True)
        assert found == plain, f"seed {seed}"
        assert none == 0
        saved += some
    assert saved > 300
    print(f"{saved} prompt tokens reused")
