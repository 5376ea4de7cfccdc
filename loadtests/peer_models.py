"""What transformers and PEFT do with the same work: for this process, and for a peer's own environment.

Imports torch, transformers and PEFT alone, so that it runs where nothing of Loraplane is installed.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS = 50
_FIRST_TOKEN = 5
_TOKENS = 8000  # random prompts are of tokens below this, which every base has


class GenerateCase:
    """Decode steps of transformers' `generate` on a static batch; with PEFT, of `adapter_names` mixed in one batch."""

    def __init__(self, name: str, model: Any, rows: int, adapters: Sequence[str] | None = None) -> None:
        self.name, self.rows = name, rows
        self._model, self._adapters = model, adapters
        prompt = torch.arange(_FIRST_TOKEN, _FIRST_TOKEN + PROMPT_TOKENS, device=model.device)
        self._prompt = prompt.repeat(rows, 1)

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps, prefill (or encoder) not counted."""
        ticks = _Ticks()
        extra = {} if self._adapters is None else {"adapter_names": list(self._adapters)}
        self._model.generate(
            input_ids=self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            max_new_tokens=count + 1,
            min_new_tokens=count + 1,
            do_sample=False,
            num_beams=1,
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


class ContinuousCase:
    """transformers' continuous batching: whole answers to prompts of random tokens, prefill included."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self._model, self._random = model, random.Random(seed)

    def seconds(self, rows: int, new_tokens: int) -> float:
        """How long it takes to answer so many prompts. Raises RuntimeError when an answer is not whole."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        prompts = [[self._random.randrange(_FIRST_TOKEN, _TOKENS) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]
        # No end of text: every answer has the same length.
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Left to itself it takes most of the machine's memory, and fills it anew at each call.
        sized = ContinuousBatchingConfig(num_blocks=4 * rows, max_batch_tokens=1024)
        begun = time.perf_counter()
        answers = self._model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=sized, persistent_manager=True
        )
        took = time.perf_counter() - begun
        made = [len(a.generated_tokens) for a in answers.values()]
        if made != [new_tokens] * rows:
            raise RuntimeError(f"continuous batching answered {made} tokens, not {rows} times {new_tokens}")
        return took


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, *, seq2seq: bool = False) -> Any:
    """The base as transformers runs it."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    return model.to(device).eval()


def with_peft(model: Any, adapters: int, rank: int, *, targets: Sequence[str] | str = "all-linear") -> Any:
    """The same model with so many random PEFT adapters, named a1, a2, ... Raises ImportError without peft."""
    from peft import LoraConfig, get_peft_model

    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"

    def config() -> Any:
        wanted = targets if isinstance(targets, str) else list(targets)
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted, init_lora_weights=False, task_type=task)

    wrapped = get_peft_model(model, config(), adapter_name="a1")
    for number in range(2, adapters + 1):
        wrapped.add_adapter(f"a{number}", config())
    return wrapped.to(model.dtype).eval()
