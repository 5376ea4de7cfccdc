"""Steps of our runners: decoders and encoder-decoders, whatever adapters their rows use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loadtests.bench_home import RANK
from loadtests.peer_models import PROMPT_TOKENS
from loadtests.steps import Case
from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner, Runner, make_slots
from serving.engine.seq2seq import EncoderDecoder, load_encoder_decoder
from serving.engine.seq2seq_runner import Seq2SeqRunner

MAX_LEN = 640
_GREEDY = Sampling(max_tokens=1 << 20, temperature=0.0)
# Rows decode within this many positions and then begin anew after the prompt, so that all cases see like contexts.
_WINDOW = 128


class EngineCase:
    """Decode steps of a runner. slots: one for each row; NO_SLOT is the base."""

    def __init__(self, name: str, runner: Runner, slots: Sequence[int]) -> None:
        self.name, self.rows = name, len(slots)
        self._runner, self._slots = runner, tuple(slots)
        self._position = PROMPT_TOKENS

    def steps(self, count: int) -> list[float]:
        # Cases share the cache: each fills it with its own adapters' keys first.
        prompt = tuple(range(5, 5 + PROMPT_TOKENS))
        self._run(StepPlan(tuple(self._row(i, 0, prompt) for i in range(self.rows))))
        self._position = PROMPT_TOKENS
        found = []
        for _ in range(count):
            plan = StepPlan(tuple(self._row(i, self._position, ()) for i in range(self.rows)))
            found.append(self._run(plan))
            self._position = PROMPT_TOKENS + (self._position + 1 - PROMPT_TOKENS) % _WINDOW
        return found

    def _row(self, index: int, start: int, tokens: tuple[int, ...]) -> RowPlan:
        return RowPlan(Key((0, index)), index, self._slots[index], start, tokens, True, _GREEDY, 0, start)

    def _run(self, plan: StepPlan) -> float:
        begun = time.perf_counter()
        self._runner.run(plan)
        return time.perf_counter() - begun


class PrefillCase:
    """One prompt chunk of our runner, alone in its step. rows counts its tokens."""

    def __init__(self, name: str, runner: DecoderRunner, tokens: int, slot: int) -> None:
        self.name, self.rows = name, tokens
        chunk = tuple(3 + i % 100 for i in range(tokens))
        self._plan = StepPlan((RowPlan(Key((0, 0)), 0, slot, 0, chunk, True, _GREEDY, 0, 0),))
        self._runner = runner

    def steps(self, count: int) -> list[float]:
        return same_step(self._runner, self._plan, count)


def same_step(runner: DecoderRunner, plan: StepPlan, count: int) -> list[float]:
    """Seconds of each of so many runs of one plan."""
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        runner.run(plan)
        found.append(time.perf_counter() - begun)
    return found


def make_runner(decoder: Decoder, rows: int, adapters: int) -> DecoderRunner:
    """A runner with so many random adapters of rank 16 on every linear; with none, as if LoRA were disabled."""
    runner = DecoderRunner(decoder, rows, make_slots(decoder, max(1, adapters), RANK))
    for slot in range(1, adapters + 1):
        runner.install(slot, random_adapter(decoder, slot))
    return runner


def make_seq2seq_runner(base: EncoderDecoder, rows: int, adapters: int) -> Seq2SeqRunner:
    """The same for an encoder-decoder."""
    runner = Seq2SeqRunner(base, rows, make_slots(base, adapters, RANK))
    for slot in range(1, adapters + 1):
        runner.install(slot, random_adapter(base, slot))
    return runner


def random_adapter(base: Decoder | EncoderDecoder, seed: int, rank: int = RANK) -> HostAdapter:
    """An adapter of one rank on every linear, small enough that logits stay finite."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(base.dtype)

    pairs = {
        module: (draw(rank, site.in_features), draw(rank, width))
        for site in base.sites
        for module, width in zip(site.modules, site.widths, strict=True)
    }
    return HostAdapter(f"random-{seed}", rank, pairs)


def decode_cases(on: DecoderRunner, off: DecoderRunner, rows: int) -> list[Case]:
    """The mixtures of one batch size: the base's is the first, that of an adapter for each row the fourth.

    on: a runner with at least `rows` adapters resident; off: one that never had any.
    """
    distinct = list(range(1, rows + 1))
    half = [slot if slot % 2 else NO_SLOT for slot in distinct]
    cases: list[Case] = [
        EngineCase("base", off, [NO_SLOT] * rows),
        EngineCase("base rows, adapters resident", on, [NO_SLOT] * rows),
        EngineCase("one adapter for all rows", on, [1] * rows),
        EngineCase("an adapter for each row", on, distinct),
    ]
    return [*cases, EngineCase("half base, half distinct", on, half)] if rows > 1 else cases


def load_seq2seq(folder: Path, dtype: torch.dtype) -> EncoderDecoder:
    """An encoder-decoder on the CPU, with room for the bench's prompts and answers."""
    return load_encoder_decoder(folder, dtype, torch.device("cpu"), MAX_LEN)


def random_t5(folder: Path) -> Path:
    """A random T5 of the small shape (60 M parameters) in bfloat16."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(decoder_start_token_id=0)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_bart(folder: Path) -> Path:
    """A random BART of the base shape (139 M parameters) in bfloat16."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
        encoder_ffn_dim=3072, decoder_ffn_dim=3072, forced_eos_token_id=None,
    )  # fmt: skip
    BartForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
