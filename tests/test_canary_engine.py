"""Shadows in the engine: they run on what nobody else wants, and give it back before anybody waits for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from serving.engine.model import Decoder
from serving.engine.plan import Key
from serving.engine.request import Failed, Finished, Sampling, Submit
from tests.engine_case import Answer, EngineCase, load_tiny
from tests.scheduler_case import Asked, SchedulerCase
from tests.tiny_base import VOCAB

SEED = 20261122


def shadow(case: SchedulerCase, adapter: str | None = None, *, prompt: int = 4, tokens: int = 8) -> Key:
    """Submit a shadow as the engine would take it from a gateway."""
    key = Key((0, next(case._numbers)))
    settings = Sampling(max_tokens=tokens, ignore_eos=True)
    submit = Submit(key[1], (7,) * prompt, settings, adapter, reuse=False, shadow=True)
    case.asked[key] = Asked(submit, case.steps)
    case._tell([(key, event) for event in case.scheduler.submit(key, submit, case.now)])
    return key


def test_a_shadow_runs_to_its_end_in_the_batch_of_the_live_sequence() -> None:
    case = SchedulerCase(rows=2)
    live, beside = case.submit(tokens=6), shadow(case, tokens=6)
    plan = case.step()
    assert {row.key for row in plan.rows} == {live, beside}
    case.run()
    assert case.asked[live].ended == case.asked[beside].ended
    assert [case.asked[key].code for key in (live, beside)] == ["done", "done"]


def test_without_a_free_row_a_shadow_is_refused_at_once() -> None:
    case = SchedulerCase(rows=1)
    case.submit(tokens=6)
    late = shadow(case)
    case.step()
    assert case.asked[late].code == "shadow_dropped"
    assert case.asked[late].ended == 0
    case.run()


def test_a_shadow_gives_its_row_back_in_the_step_in_which_somebody_wants_it() -> None:
    case = SchedulerCase(rows=2)
    case.submit(tokens=40)
    beside = shadow(case, tokens=40)
    case.step()
    newcomer = case.submit(tokens=3)
    plan = case.step()
    assert newcomer in {row.key for row in plan.rows}
    assert case.asked[beside].code == "shadow_dropped"
    case.run()


def test_the_youngest_shadow_goes_first_and_no_more_than_needed() -> None:
    case = SchedulerCase(rows=4)
    case.submit(tokens=40)
    old, young = shadow(case, tokens=40), shadow(case, tokens=40)
    case.step()
    for _ in range(2):
        case.submit(tokens=40)
    case.step()
    assert case.asked[young].endings
    assert not case.asked[old].endings
    case.cancel(old)
    case.run()


def test_a_shadow_gives_up_its_slot_to_an_adapter_that_finds_none() -> None:
    case = SchedulerCase(rows=4, slots=1)
    warm = case.submit("a", tokens=2)
    case.run()
    beside = shadow(case, "a", tokens=40)
    case.step()
    assert not case.asked[beside].endings
    other = case.submit("b", tokens=2)
    case.run()
    assert [case.asked[key].code for key in (warm, beside, other)] == ["done", "shadow_dropped", "done"]


def test_nothing_is_loaded_placed_or_evicted_for_a_shadow() -> None:
    case = SchedulerCase(rows=4, slots=2)
    case.submit("a", tokens=2)
    case.run()
    cold = shadow(case, "b")
    case.step()
    assert case.asked[cold].code == "shadow_dropped"
    assert (case.host.loads, case.installs, case.slots.evictions) == (["a"], 1, 0)
    beside = shadow(case, "a", tokens=3)
    case.run()
    assert case.asked[beside].code == "done"


def test_a_shadows_use_keeps_no_adapter_in_its_slot() -> None:
    case = SchedulerCase(rows=4, slots=2)
    for adapter in "ab":
        case.submit(adapter, tokens=2)
        case.run()
    shadow(case, "a", tokens=2)
    case.run()
    case.submit("c", tokens=2)
    case.run()
    assert (case.slots.holds("a"), case.slots.holds("b")) == (False, True)


def test_rows_of_shadows_count_as_free_where_the_queue_is_full() -> None:
    """A live sequence is never refused for a shadow's sake."""
    case = SchedulerCase(rows=2, queue_limit=1)
    case.submit(tokens=40)
    shadow(case, tokens=40)
    case.step()
    taken = [case.submit(tokens=2) for _ in range(2)]
    case.step()
    case.run()
    assert [case.asked[key].code for key in taken] == ["done", "done"]


def test_shadows_cost_their_tenant_no_turns() -> None:
    case = SchedulerCase(rows=2)
    case.submit(tokens=3)
    before = shadow(case, tokens=300, prompt=200)
    for _ in range(50):
        case.step()
    scope = case.asked[before].submit.salt
    assert case.scheduler._waiting._tenants.of(scope) < 20
    case.cancel(before)
    case.run()


def storm(seed: int, *, shadows: bool) -> tuple[list[tuple[int | None, int | None, str]], int]:
    """Live sequences over more adapters than slots, perhaps with shadows thrown in: the steps in which each live one
    began and ended, and how many shadows ran to their end."""
    rng, extra = random.Random(seed), random.Random(seed + 1)
    case = SchedulerCase(rows=rng.choice([1, 2, 4, 8]), slots=rng.choice([1, 2, 3]), chunk=16)
    live, beside = [], []
    busy = rng.choice([[0, 0, 0, 1, 1, 2, 5], [0, 0, 0, 0, 0, 1]])
    for _ in range(120):
        for _ in range(rng.choice(busy)):
            adapter = rng.choice([None, "a", "b", "c", "d"])
            live.append(case.submit(adapter, prompt=rng.choice([1, 4, 30]), tokens=rng.choice([1, 4, 12])))
        if shadows and extra.random() < 0.6:
            adapter = extra.choice([None, "a", "b", "c", "d"])
            beside.append(shadow(case, adapter, prompt=extra.choice([1, 4, 30]), tokens=extra.choice([1, 4, 40])))
        case.step()
    case.run()
    told = [(case.asked[key].first, case.asked[key].ended, case.asked[key].code) for key in live]
    return told, sum(case.asked[key].code == "done" for key in beside)


def test_live_sequences_start_and_end_in_the_same_steps_with_shadows_and_without() -> None:
    print(f"seeds {SEED} to {SEED + 59}")
    ran = 0
    for seed in range(SEED, SEED + 60):
        told, done = storm(seed, shadows=True)
        assert told == storm(seed, shadows=False)[0], f"seed {seed}"
        ran += done
    assert ran > 200
    print(f"{ran} shadows ran to their end")


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


def test_a_shadow_changes_no_token_of_a_real_engines_live_answers(decoder: Decoder, tiny_adapters: list[Path]) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    asked = [
        ([rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 40))], rng.choice([None, *tiny_adapters[:2]]))
        for _ in range(24)
    ]

    def answers(shadows: bool) -> tuple[list[list[int]], list[object]]:
        case = EngineCase(decoder, rows=4, slots=2, chunk=9)
        live, beside = [], []
        for at, (prompt, adapter) in enumerate(asked):
            told = {"logprobs": 0} if shadows else {}
            live.append(case.submit(prompt, adapter, max_tokens=6, seed=at, temperature=1.0, ignore_eos=True, **told))
            if shadows:
                key = Key((0, next(case._numbers)))
                case.answers[key] = Answer()
                sampling = Sampling(max_tokens=6, seed=at, temperature=1.0, ignore_eos=True, logprobs=0)
                other = str(tiny_adapters[1])
                case.engine.submit(key, Submit(key[1], tuple(prompt), sampling, other, shadow=True))
                beside.append(key)
            for _ in range(rng.randrange(12)):
                case.step()
        case.run()
        return [case.answer(key) for key in live], [case.answers[key].endings[0] for key in beside]

    state = rng.getstate()
    plain, _ = answers(False)
    rng.setstate(state)
    found, endings = answers(True)
    assert found == plain
    ran = sum(isinstance(ending, Finished) for ending in endings)
    assert ran > 0
    assert all(isinstance(e, Finished) or (isinstance(e, Failed) and e.code == "shadow_dropped") for e in endings)
    print(f"{ran} of {len(endings)} shadows ran to their end")
