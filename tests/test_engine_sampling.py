"""Sampling with everything on: definitions as transformers and vLLM have them, rows that do not touch each other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from serving.engine.plan import Key, RowPlan
from serving.engine.request import Sampling
from serving.engine.sampling import likeliest, sample, score, uniform
from serving.engine.shaping import reshape

SEED = 20261122
VOCAB = 300


def row(
    number: int = 0,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    ban: Sequence[int] = (),
    **wishes: Any,
) -> RowPlan:
    settings = Sampling(**{"max_tokens": 8, "temperature": 0.0, **wishes})
    return RowPlan(
        Key((0, number)), number, 0, 0, (1,), True, settings, 0, number, tuple(ban), tuple(prompt), tuple(output)
    )


def reshaped(logits: Tensor, rows: list[RowPlan], begun: tuple[int, ...] | None = None) -> Tensor:
    changed = logits.clone()
    reshape(changed, rows, range(len(rows)), begun)
    return changed


def theirs(processor: LogitsProcessor, history: Sequence[int], logits: Tensor) -> Tensor:
    changed: Tensor = processor(torch.tensor([list(history)]), logits[None].clone())
    return changed[0]


@pytest.mark.parametrize("begun", [None, (0,), (2, 0)], ids=["decoder-only", "T5", "BART"])
def test_runs_that_would_come_twice_are_banned_as_transformers_bans_them(begun: tuple[int, ...] | None) -> None:
    """400 random histories over five tokens, runs of 1 to 6, eight rows at a time, each with its own settings."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    for _ in range(50):
        rows = [
            row(
                i,
                prompt=[rng.randrange(5) for _ in range(rng.randrange(12))],
                output=[rng.randrange(5) for _ in range(rng.randrange(12))],
                no_repeat_ngram_size=rng.randint(1, 6),
            )
            for i in range(8)
        ]
        logits = torch.randn(8, VOCAB)
        ours = reshaped(logits, rows, begun)
        for i, one in enumerate(rows):
            history = (*(one.prompt if begun is None else begun), *one.output)
            if history:  # theirs needs one token
                exact = theirs(NoRepeatNGramLogitsProcessor(one.sampling.no_repeat_ngram_size), history, logits[i])
                assert torch.equal(ours[i], exact), (i, one)


def test_the_repetition_penalty_is_transformers_own() -> None:
    """Over prompt and answer; of an encoder-decoder over the answer alone."""
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    rows = [
        row(
            i,
            prompt=[rng.randrange(VOCAB) for _ in range(40 * i + 1)],
            output=[rng.randrange(VOCAB) for _ in range(7 * i)],
            repetition_penalty=rng.choice([0.5, 1.1, 2.0]),
        )
        for i in range(8)
    ]
    logits = torch.randn(8, VOCAB)
    for begun in (None, (0,)):
        ours = reshaped(logits, rows, begun)
        for i, one in enumerate(rows):
            history = (*(one.prompt if begun is None else begun), *one.output)
            exact = theirs(RepetitionPenaltyLogitsProcessor(one.sampling.repetition_penalty), history, logits[i])
            torch.testing.assert_close(ours[i], exact, rtol=1e-6, atol=0)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """OpenAI's formula, token by token: logit - count * frequency - (count > 0) * presence."""
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    rows = [
        row(
            i,
            prompt=[rng.randrange(20) for _ in range(30)],
            output=[rng.randrange(20) for _ in range(25 * (i % 4))],
            presence_penalty=rng.uniform(-2, 2),
            frequency_penalty=rng.uniform(-2, 2),
        )
        for i in range(8)
    ]
    logits = torch.randn(8, VOCAB)
    expected = logits.clone()
    for i, one in enumerate(rows):
        for token, count in Counter(one.output).items():
            expected[i, token] -= count * one.sampling.frequency_penalty + one.sampling.presence_penalty
    torch.testing.assert_close(reshaped(logits, rows), expected, rtol=0, atol=1e-5)


def test_bias_comes_before_the_repetition_penalty_and_bans_come_last() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    one = row(prompt=(0,), repetition_penalty=2.0, logit_bias=((0, 3.0), (2, 100.0), (9, 1.0)), ban=(2,))
    assert reshaped(logits, [one])[0].tolist() == [2.0, 1.0, float("-inf"), 1.0]


def kept(logits: Tensor, s: Sampling) -> set[int]:
    """Slow and obvious: what min_p and top_k leave of the sorted tokens, then the nucleus of what they left."""
    scaled = (logits.double() - logits.double().max()) / s.temperature
    order = sorted(range(len(logits)), key=lambda t: (-float(logits[t]), t))
    weight = {t: float(torch.exp(scaled[t])) for t in order}
    left = [t for t in order if weight[t] >= s.min_p][: s.top_k or len(order)] or order[:1]
    total, before = sum(weight[t] for t in left), 0.0
    found: list[int] = []
    for token in left:
        if before < s.top_p * total or not found:
            found.append(token)
        before += weight[token]
    return set(found)


@pytest.mark.parametrize("ties", [False, True])
def test_each_row_draws_from_exactly_what_its_filters_keep(ties: bool) -> None:
    """Nine mixed settings over a vocabulary wider than the head; every kept token of a small set comes up."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    settings: list[dict[str, Any]] = [
        {"top_k": 5},
        {"top_p": 0.4},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.5},
        {"top_k": 30, "min_p": 0.2, "top_p": 0.8},
        {"top_k": 1500},
        {"top_p": 0.97, "temperature": 2.0},
        {"min_p": 0.001, "temperature": 1.7},
        {"min_p": 0.001, "top_p": 0.99, "top_k": 1400, "temperature": 1.5},
    ]
    for _ in range(4):
        logits = torch.randn(len(settings), 2000) * rng.choice([0.5, 2.0])
        if ties:
            logits = (logits * 4).round() / 4
        sets = [kept(logits[i], row(**{"temperature": 1.0, **s}).sampling) for i, s in enumerate(settings)]
        drawn: list[set[int]] = [set() for _ in settings]
        for turn in range(150):
            rows = [row(turn, **{"temperature": 1.0, "seed": i, **s}) for i, s in enumerate(settings)]
            for i, found in enumerate(sample(logits, rows)):
                drawn[i].add(found.token)
        for i, (seen, allowed) in enumerate(zip(drawn, sets, strict=True)):
            assert seen <= allowed, (settings[i], seen - allowed)
            if len(allowed) <= 5:
                assert seen == allowed or min(_shares(logits[i], allowed)) < 0.04, settings[i]


def _shares(logits: Tensor, tokens: set[int]) -> list[float]:
    shares: list[float] = torch.softmax(logits[sorted(tokens)], dim=-1).tolist()
    return shares


@pytest.mark.parametrize("vocabulary", [300, 512, 3000])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    """Token ids in order, 64 draws of seeds of their own: the first whose running sum exceeds the random number."""
    torch.manual_seed(SEED)
    logits = torch.randn(64, vocabulary) * 2
    rows = [row(i, temperature=0.7, seed=1000 + i) for i in range(64)]
    running = torch.softmax(logits.double() / 0.7, dim=-1).cumsum(dim=-1)
    for i, found in enumerate(sample(logits, rows)):
        draw = uniform(1000 + i, 0, i)
        assert float(running[i, found.token]) >= draw - 1e-6
        assert found.token == 0 or float(running[i, found.token - 1]) <= draw + 1e-6


def test_a_rows_token_and_logprobs_do_not_depend_on_its_neighbours_settings() -> None:
    """16 rows with every kind of setting at a vocabulary of 49,152: together as each alone, bit for bit."""
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    logits = (torch.randn(16, 49152) * 3).bfloat16()
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "logprobs": 5},
        {"temperature": 1.3, "min_p": 0.05},
        {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"repetition_penalty": 1.2, "logprobs": 0},
        {"no_repeat_ngram_size": 2, "logit_bias": ((7, 5.0),), "logprobs": 20},
    ]
    rows = [
        row(i, seed=i, prompt=[rng.randrange(49152) for _ in range(60)], output=[rng.randrange(99) for _ in range(30)],
            ban=(3,) if i % 3 == 0 else (), **kinds[i % 8])
        for i in range(16)
    ]  # fmt: skip
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [one])[0] for i, one in enumerate(rows)]


@pytest.mark.parametrize("temperature", [1e-4, 0.05, 2.0])
def test_a_barred_token_is_never_drawn(temperature: float) -> None:
    """Logits far apart and close together; the middle one is barred, by the model or by the request."""
    logits = torch.tensor([[0.0, float("-inf"), 90.0], [0.0, 5.0, 0.1]]).repeat(200, 1)
    rows = [row(i, temperature=temperature, seed=i, ban=() if i % 2 == 0 else (1,)) for i in range(400)]
    assert 1 not in {s.token for s in sample(logits, rows)}


def test_top_k_1_takes_the_likeliest_token_even_among_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]] * 20)
    assert {s.token for s in sample(logits, [row(i, temperature=1.0, top_k=1, seed=i) for i in range(20)])} == {1}


def test_scores_name_the_target_and_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]]))
    scored = score(logits, (2, 0), 2)
    assert scored is not None
    first, second = scored
    assert first.chosen == pytest.approx(-1.6094, abs=1e-4)
    assert [t for t, _ in first.top] == [1, 2]
    assert second.chosen == second.top[0][1]
    assert score(torch.tensor([[0.0, float("nan")]]), (0,), 0) is None


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 300, 1024])
def test_the_likeliest_is_the_first_of_equals_in_any_vocabulary_and_company(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(SEED)
    scores = torch.randint(0, 4, (9, vocabulary), generator=generator).float()
    scores[3, vocabulary // 2] = float("nan")
    scores[4] = float("-inf")
    scores[5, vocabulary - 1] = float("inf")
    assert torch.equal(likeliest(scores), scores.argmax(dim=-1))
