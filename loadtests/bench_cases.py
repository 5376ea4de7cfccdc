"""What the engine bench measures: steps of our runner and of its peers, each behind the same small door."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from serving.engine.lora import HostAdapter
from serving.engine.model import Decoder
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner, make_slots

RANK = 16
PROMPT_TOKENS = 50
MAX_LEN = 640
_GREEDY = Sampling(max_tokens=1 << 20, temperature=0.0)
# Rows decode within this many positions and then begin anew after the prompt, so that all cases see like contexts.
_WINDOW = 128


class Case(Protocol):
    """Something to time. rows: how many tokens one step makes."""

    name: str
    rows: int

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps, prefill not counted."""


class EngineCase:
    """Decode steps of our runner. slots: one for each row; NO_SLOT is the base."""

    def __init__(self, name: str, runner: DecoderRunner, slots: Sequence[int]) -> None:
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
        found = []
        for _ in range(count):
            begun = time.perf_counter()
            self._runner.run(self._plan)
            found.append(time.perf_counter() - begun)
        return found


class GenerateCase:
    """Decode steps of transformers' `generate` on a static batch; with PEFT, of `adapter_names` mixed in one batch."""

    def __init__(self, name: str, model: Any, rows: int, adapters: Sequence[str] | None = None) -> None:
        self.name, self.rows = name, rows
        self._model, self._adapters = model, adapters
        self._prompt = torch.arange(5, 5 + PROMPT_TOKENS, device=model.device).repeat(rows, 1)

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        ticks = _Ticks()
        extra = {} if self._adapters is None else {"adapter_names": list(self._adapters)}
        self._model.generate(
            input_ids=self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            max_new_tokens=count + 1,
            min_new_tokens=count + 1,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[ticks],
            **extra,
        )
        # The first tick ends the prefill.
        return [b - a for a, b in itertools.pairwise(ticks.at)]


class _Ticks:
    """A stopping criterion that stops nothing and notes when it was asked: once a step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def make_runner(decoder: Decoder, rows: int, adapters: int) -> DecoderRunner:
    """A runner with so many random adapters of rank 16 on every linear; with none, as if LoRA were disabled."""
    runner = DecoderRunner(decoder, rows, make_slots(decoder, max(1, adapters), RANK))
    for slot in range(1, adapters + 1):
        runner.install(slot, random_adapter(decoder, slot))
    return runner


def random_adapter(decoder: Decoder, seed: int) -> HostAdapter:
    """An adapter of rank 16 on every linear, small enough that logits stay finite."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(decoder.dtype)

    pairs = {
        module: (draw(RANK, site.in_features), draw(RANK, width))
        for site in decoder.sites
        for module, width in zip(site.modules, site.widths, strict=True)
    }
    return HostAdapter(f"random-{seed}", RANK, pairs)


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


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The base as transformers runs it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    return model.to(device).eval()


def with_peft(model: Any, adapters: int) -> Any:
    """The same model with so many random PEFT adapters, named a1, a2, ... Raises ImportError without peft."""
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        return LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )

    wrapped = get_peft_model(model, config(), adapter_name="a1")
    for number in range(2, adapters + 1):
        wrapped.add_adapter(f"a{number}", config())
    return wrapped.to(model.dtype).eval()


def random_base(folder: Path) -> Path:
    """A random Llama as wide as SmolLM2-135M and four layers deep, for machines without a pulled base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=MAX_LEN, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
