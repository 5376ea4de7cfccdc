"""Which rows share a batch: all of them once an epoch, of like length, the same for equal seeds."""

from __future__ import annotations

import random

import pytest

from train.batching import Plan, padded, plan

LENGTHS = random.Random(1).choices(range(5, 200), k=203)


def default(**changed: float | int | None) -> Plan:
    settings = {"epochs": 1.0, "seed": 0, "batch_size": 8, **changed}
    return plan(LENGTHS, **settings)  # type: ignore[arg-type]


def test_every_row_is_used_once_an_epoch() -> None:
    rows = [i for batch in default(epochs=2).batches for i in batch]
    assert sorted(rows) == sorted([*range(203), *range(203)])


def test_equal_seeds_plan_alike_and_other_seeds_and_epochs_do_not() -> None:
    twice = default(epochs=2)
    assert twice == default(epochs=2)
    assert twice != default(epochs=2, seed=1)
    steps = len(default().batches)
    assert twice.batches[:steps] == default().batches
    assert twice.batches[steps:] != twice.batches[:steps]


def test_batches_of_like_length_waste_less_than_batches_by_chance() -> None:
    chance = [tuple(range(i, min(i + 8, 203))) for i in range(0, 203, 8)]
    wasted = 1 - sum(LENGTHS) / sum(padded(max(LENGTHS[i] for i in b)) * len(b) for b in chance)
    assert default().padding < wasted / 2


def test_a_token_budget_is_kept_and_a_longer_row_stands_alone() -> None:
    lengths = [*LENGTHS, 900]
    for batch in plan(lengths, epochs=1, seed=0, batch_size=8, tokens_per_batch=512).batches:
        assert len(batch) == 1 or padded(max(lengths[i] for i in batch)) * len(batch) <= 512


@pytest.mark.parametrize(
    ("changed", "steps"),
    [({}, 26), ({"epochs": 0.5}, 13), ({"max_steps": 5}, 5), ({"fraction": 0.25}, 7), ({"fraction": 1e-6}, 1)],
)
def test_epochs_max_steps_and_fraction_say_how_many_steps(changed: dict[str, float], steps: int) -> None:
    assert len(default(**changed).batches) == steps
