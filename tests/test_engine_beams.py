"""Beam search answers as transformers' own does, beside rows that decode greedily, under any adapter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, T5Config

from serving.engine.beams import BeamRules, BeamSearch, Candidate, moves
from serving.engine.kv import RowTable
from serving.engine.limits import Limits
from serving.engine.plan import Key, Load, LoadState, StepPlan
from serving.engine.request import Failed, Finished, FinishReason, Sampling, Submit, Tokens
from serving.engine.runner import make_slots
from serving.engine.scheduler import Scheduler
from serving.engine.seq2seq import load_encoder_decoder
from serving.engine.seq2seq_runner import Seq2SeqRunner
from serving.engine.slots import SlotTable
from tests.engine_case import DEVICE, read_peft
from tests.test_engine_seq2seq import BART, T5, VOCAB, Oracle, save_adapter
from tests.tiny_base import save_random_seq2seq

SEED = 20261122
ROWS = 9


class Loaded:
    """A host tier that has everything."""

    budget_bytes = 1 << 30

    def want(self, digest: str) -> LoadState:
        return LoadState(Load.READY)

    def bytes_of(self, digest: str) -> int:
        return 1

    def source_of(self, digest: str) -> str:
        return "host"

    def loading_s(self, digest: str) -> float:
        return 0.0

    def brought(self, digest: str) -> None:
        return None


class Search:
    """Scheduler and runner of one encoder-decoder, stepped by hand. Adapters are named by their folders."""

    def __init__(self, folder: Path, adapters: list[Path]) -> None:
        base = load_encoder_decoder(folder, torch.float32, DEVICE, 96)
        self.rows, self.eos = RowTable(ROWS), frozenset(base.stop_token_ids)
        limits = Limits(96, 99, 64, 512, max_answer_len=base.max_output, forced_tokens=len(base.start_token_ids) - 1)
        self.scheduler = Scheduler(limits, self.rows, SlotTable(2), Loaded(), self.eos)
        self.runner = Seq2SeqRunner(base, ROWS, make_slots(base, 2, 64))
        self.adapters = {str(a): read_peft(a, torch.float32) for a in adapters}
        self.events: dict[Key, list[Any]] = {}
        self.widest = 0

    def submit(self, prompt: list[int], adapter: Path | None = None, **wishes: Any) -> Key:
        key = Key((0, len(self.events)))
        sampling = Sampling(**{"max_tokens": 12, "temperature": 0.0, **wishes})
        self.events[key] = []
        submit = Submit(key[1], tuple(prompt), sampling, None if adapter is None else str(adapter))
        self.events[key] += self.scheduler.submit(key, submit, 0.0)
        return key

    def step(self) -> StepPlan:
        installs, _ = self.scheduler.admit(0.0)
        for digest, placement in installs:
            self.runner.install(placement.slot, self.adapters[digest])
        plan = self.scheduler.plan()
        self.runner.tidy(plan)
        if plan.rows:
            self.widest = max(self.widest, len(plan.rows))
            for key, event in self.scheduler.settle(plan, self.runner.run(plan), 0.0):
                self.events[key].append(event)
        assert self.scheduler.balanced()
        return plan

    def run(self) -> None:
        while not self.scheduler.idle():
            self.step()
        assert self.rows.free == ROWS

    def answer(self, key: Key) -> tuple[list[int], FinishReason]:
        *tokens, end = self.events[key]
        assert isinstance(end, Finished), self.events[key]
        return [t for event in tokens if isinstance(event, Tokens) for t in event.ids], end.reason


@pytest.fixture(scope="module", params=["t5", "bart"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("beams")
    t5 = request.param == "t5"
    config = T5Config(**{**T5, "num_decoder_layers": 2}) if t5 else BartConfig(**BART)
    base = save_random_seq2seq(config, folder / "base", seed=3, forced=None if t5 else 5)
    return base, save_adapter(base, folder / "a", 1, ["q", "v"] if t5 else ["q_proj", "v_proj"])


def oracle(base: Path, adapter: Path | None, prompt: list[int], **wishes: Any) -> list[int]:
    """The answer of transformers alone, without what every answer begins with and the token that ends it."""
    model = Oracle(base, adapter).model
    config = model.generation_config
    found = model.generate(
        input_ids=torch.tensor([prompt]), do_sample=False, pad_token_id=0, max_new_tokens=wishes.pop("max_tokens", 12)
        + (config.forced_bos_token_id is not None), **wishes
    )[0].tolist()  # fmt: skip
    begun = 1 + (config.forced_bos_token_id is not None)
    eos = config.eos_token_id
    tokens = found[begun:]
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


@pytest.mark.parametrize(
    "wishes",
    [
        {"num_beams": 2},
        {"num_beams": 4},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 4, "length_penalty": -1.0, "max_tokens": 25},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "repetition_penalty": 1.7},
        {"num_beams": 4, "max_tokens": 1},
    ],
    ids=str,
)
def test_beam_search_answers_as_transformers_does(case: tuple[Path, Path], wishes: dict[str, Any]) -> None:
    base, adapter = case
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    search = Search(base, [adapter])
    asked = []
    for number in range(10):
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 30))]
        chosen = adapter if number % 2 else None
        beside = search.submit(prompt, chosen, max_tokens=7)
        asked.append((prompt, chosen, search.submit(prompt, chosen, **wishes), beside))
    search.run()
    for prompt, chosen, key, beside in asked:
        assert search.answer(key)[0] == oracle(base, chosen, prompt, **wishes)
        assert search.answer(beside)[0] == oracle(base, chosen, prompt, max_tokens=7, num_beams=1)
    assert search.widest > 2


def test_a_search_that_must_wait_for_rows_is_not_overtaken(case: tuple[Path, Path]) -> None:
    base, adapter = case
    search = Search(base, [adapter])
    for number in range(ROWS - 1):
        search.submit([5 + number], max_tokens=3, ignore_eos=True)
    search.step()
    wide = search.submit([7, 8], num_beams=4)
    late = search.submit([9], max_tokens=1, ignore_eos=True)
    search.step()
    assert not search.events[late]
    search.run()
    assert search.answer(wide)
    assert search.answer(late)


def test_a_cancelled_search_gives_every_row_back(case: tuple[Path, Path]) -> None:
    base, adapter = case
    search = Search(base, [adapter])
    key = search.submit([5, 6, 7], adapter, num_beams=5, ignore_eos=True, max_tokens=20)
    for _ in range(4):
        search.step()
    assert search.rows.held == 5
    search.scheduler.cancel(key)
    assert search.rows.held == 0
    assert search.scheduler.balanced()


@pytest.mark.parametrize("width", [ROWS + 1, 1000])
def test_a_search_wider_than_the_engine_is_refused(case: tuple[Path, Path], width: int) -> None:
    search = Search(case[0], [])
    (failure,) = search.events[search.submit([5], num_beams=width)]
    assert isinstance(failure, Failed)
    assert failure.code == "invalid_value"


def test_moves_bring_every_hypothesis_its_parents_row() -> None:
    """1,000 random genealogies: no source is overwritten, no row used twice."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for _ in range(1000):
        width = rng.randint(1, 6)
        held = rng.sample(range(20), width)
        before = rng.randint(1, width)
        content = {row: f"of {row}" for row in held}
        parents = [rng.randrange(before) for _ in range(rng.randint(1, width))]
        rows, copies = moves(parents, held[:before], held[before:])
        for source, target in copies:
            content[target] = content[source]
        assert [content[row] for row in rows] == [f"of {held[parent]}" for parent in parents]
        assert len(set(rows)) == len(rows)


def test_a_search_in_which_no_token_may_follow_has_no_answer() -> None:
    search = BeamSearch(BeamRules(2, 5, frozenset({1})))
    search.advance([[Candidate(4, float("-inf")), Candidate(5, float("-inf"))]])
    assert search.done
    assert search.answer is None
