"""Log-probabilities of prompts: the model's own, whatever the chunks, the batch and the adapter."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.plan import Key, RowPlan, Sampled, StepPlan, StepResult
from serving.engine.request import Failed, Finished, FinishReason, PromptLogprobs, TokenLogprob, Tokens
from serving.engine.runner import DecoderRunner, Runner
from tests.engine_case import EngineCase, load_tiny
from tests.tiny_base import VOCAB, Oracle

SEED = 20261122


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_tiny(tiny_base)


def scores(case: EngineCase, key: Key) -> list[TokenLogprob]:
    events = case.answers[key].events
    first_token = next((i for i, e in enumerate(events) if isinstance(e, Tokens | Finished)), len(events))
    told = [e for e in events if isinstance(e, PromptLogprobs)]
    assert all(events.index(e) < first_token for e in told)
    return [one for e in told for one in e.logprobs]


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_they_are_the_references_own_in_a_mixed_batch(
    decoder: Decoder, tiny_base: Path, tiny_adapters: list[Path], chunk: int
) -> None:
    """Eight prompts of 1 to 150 tokens on the base and two adapters, in chunks, beside rows that decode."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    case = EngineCase(decoder, rows=6, chunk=chunk)
    for i in range(3):
        case.submit([9, 8, 7 + i], tiny_adapters[i], max_tokens=40, ignore_eos=True, temperature=1.0, seed=i)
    asked = [
        ([rng.randrange(3, VOCAB) for _ in range(length)], [None, *tiny_adapters[:2]][i % 3])
        for i, length in enumerate((1, 2, 17, 64, 65, 66, 130, 150))
    ]
    keys = [case.submit(p, a, max_tokens=2, logprobs=3, prompt_logprobs=3, ignore_eos=True) for p, a in asked]
    case.run()
    for key, (prompt, adapter) in zip(keys, asked, strict=True):
        table = torch.log_softmax(Oracle(tiny_base, adapter).logits(prompt), dim=-1)
        found = scores(case, key)
        assert len(found) == len(prompt) - 1
        for at, one in enumerate(found):
            assert one.chosen == pytest.approx(float(table[at, prompt[at + 1]]), abs=1e-3)
            values = torch.tensor([value for _, value in one.top])
            torch.testing.assert_close(values, table[at].topk(3).values, rtol=0, atol=1e-3)


def test_their_logits_are_never_held_for_more_than_64_tokens(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    case = EngineCase(decoder, chunk=200)
    sizes: list[int] = []
    head = DecoderRunner._head

    def spy(self: DecoderRunner, h: Tensor, slots: list[int]) -> Tensor:
        sizes.append(h.shape[0])
        return head(self, h, slots)

    monkeypatch.setattr(DecoderRunner, "_head", spy)
    key = case.submit([5] * 200, max_tokens=1, prompt_logprobs=1)
    case.run()
    assert len(scores(case, key)) == 199
    assert max(sizes) == 64


def test_a_prompt_can_be_scored_without_an_answer(decoder: Decoder) -> None:
    case = EngineCase(decoder, chunk=4)
    keys = [case.submit([5, 6, 7, 8, 9, 10], max_tokens=0, prompt_logprobs=0) for _ in range(2)]
    other = case.submit([5, 6], max_tokens=5, ignore_eos=True)
    case.run()
    for key in keys:
        assert len(scores(case, key)) == 5
        (ending,) = case.answers[key].endings
        assert isinstance(ending, Finished)
        assert (ending.reason, case.answers[key].ids) == (FinishReason.LENGTH, [])
    assert len(case.answers[other].ids) == 5
    assert case.rows.held == 0


def test_a_scored_prompt_is_computed_whole_though_its_beginning_is_there(decoder: Decoder) -> None:
    prompt = list(range(5, 65))
    case = EngineCase(decoder)
    case.answer(case.submit(prompt, max_tokens=2, ignore_eos=True))
    key = case.submit(prompt, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    case.run()
    assert len(scores(case, key)) == len(prompt) - 1


def test_the_end_of_text_is_told_of_to_those_who_score(decoder: Decoder) -> None:
    """lm-eval sums all but the last entry: without one for the end of text it would drop the prompt's last token."""
    case = EngineCase(decoder)
    sure = ((decoder.stop_token_ids[0], 1000.0),)
    key = case.submit([5, 6, 7], max_tokens=1, logprobs=1, prompt_logprobs=1, logit_bias=sure)
    plain = case.submit([5, 6, 7], max_tokens=1, logprobs=1, logit_bias=sure)
    case.run()
    assert case.answers[key].ids == [decoder.stop_token_ids[0]]
    assert case.answers[plain].ids == []
    for ending in (case.answers[key].endings[0], case.answers[plain].endings[0]):
        assert isinstance(ending, Finished)
        assert ending.reason is FinishReason.STOP


class Hot:
    """A runner whose head gives NaN for the tokens of one row."""

    def __init__(self, runner: Runner, prompt: tuple[int, ...]) -> None:
        assert isinstance(runner, DecoderRunner)
        self._runner, self._prompt = runner, prompt
        self._score = runner._score
        runner._score = self._scored  # type: ignore[method-assign]

    def _scored(self, row: RowPlan, hidden: Tensor) -> list[TokenLogprob] | None:
        hit = row.tokens[:1] == self._prompt[:1]
        return self._score(row, hidden * float("nan") if hit else hidden)

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)


def test_a_prompt_whose_scores_are_not_finite_fails_alone(decoder: Decoder) -> None:
    quiet = EngineCase(decoder)
    expected = quiet.answer(quiet.submit([9, 8, 7], max_tokens=6, ignore_eos=True))
    case = EngineCase(decoder, chunk=4, wrap=lambda runner: Hot(runner, (42,)))  # type: ignore[arg-type,return-value]
    good = case.submit([9, 8, 7], max_tokens=6, prompt_logprobs=1, ignore_eos=True)
    bad = case.submit([42, *range(5, 25)], max_tokens=6, prompt_logprobs=1)
    case.run()
    assert [e.code for e in case.answers[bad].endings if isinstance(e, Failed)] == ["engine_fault"]
    assert case.answers[good].ids == expected


class Rubbish:
    """A runner that leaves NaN in the cache of a prompt that begins with 99, and fails it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.scrubbed: list[int] = []

    def tidy(self, plan: StepPlan) -> None:
        self.scrubbed += plan.scrub
        self._runner.tidy(plan)

    def run(self, plan: StepPlan) -> StepResult:
        result = self._runner.run(plan)
        hit = {r.row: Sampled(fault="planted") for r in plan.rows if r.tokens[:1] == (99,)}
        return StepResult({**result.sampled, **hit}, result.scores)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        self._runner.install(slot, adapter)

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)


def test_a_faulty_rows_cache_is_scrubbed_though_nothing_ran_in_between(decoder: Decoder) -> None:
    """The step after the fault had no rows, was not run, and forgot which row held NaN."""
    runners: list[Rubbish] = []

    def wrap(runner: Runner) -> Runner:
        runners.append(Rubbish(runner))
        return runners[0]  # type: ignore[return-value]

    case = EngineCase(decoder, rows=1, wrap=wrap)
    case.submit([99, 5])
    case.run()
    case.step()
    case.step()
    case.answer(case.submit([5, 6]))
    assert runners[0].scrubbed == [0]
