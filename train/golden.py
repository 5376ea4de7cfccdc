"""Golden rows of a freshly trained adapter: what it says to a few prompts, for serving to replay wherever it loads it.

Of the prompts that it was trained on, those rows are kept whose answers its base would least have given: only such rows
tell the adapter from the base, or from another adapter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adapters.golden import GOLDEN_FILE, MAX_ROWS, GoldenRow, golden_to_json
from adapters.prompts import Example
from train.models import begin_of

if TYPE_CHECKING:
    from peft import PeftModel

# Serving replays a row before it answers anybody, so rows are short: the end of a prompt, the beginning of an answer.
PROMPT_TOKENS = 24
ANSWER_TOKENS = 6
LOOKED_AT = 8
# bfloat16 moves a logit by up to 0.5 (docs/decisions.md), and of the two compared here each may be moved.
TOLERANCE = 1.0


@dataclass(frozen=True, slots=True)
class Golden:
    """Rows, the most telling first. gap: by how many nats the base falls short of the first row's answer."""

    rows: tuple[GoldenRow, ...]
    gap: float

    @property
    def telling(self) -> bool:
        """Whether the base itself would fail the rows."""
        return self.gap > TOLERANCE


@torch.inference_mode()
def golden_rows(
    model: PeftModel, examples: Sequence[Example], *, ends: frozenset[int], bf16: bool, most: int = MAX_ROWS
) -> Golden:
    """Up to `most` rows of what `model` answers now. ends: tokens that end a text.

    The model computes as it was trained, bf16 or not, and is left in evaluation mode.
    """
    model.eval()
    begin = begin_of(model)
    found: list[tuple[float, GoldenRow]] = []
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        for prompt in _prompts(examples) if most else ():
            answer = _greedy(model, begin, prompt, ends)
            with model.disable_adapter():
                gap = _gap(model, begin, prompt, answer)
            found.append((gap, GoldenRow(prompt, answer, TOLERANCE)))
    found.sort(key=lambda pair: -pair[0])
    return Golden(tuple(row for _, row in found[:most]), found[0][0] if found else 0.0)


def write_golden(golden: Golden, folder: Path) -> None:
    """Lay the rows beside the adapter's weights, where publishing finds them. No rows, no file."""
    if golden.rows:
        staged = folder / f".{GOLDEN_FILE}"
        staged.write_text(json.dumps(golden_to_json(golden.rows)), encoding="utf-8")
        staged.replace(folder / GOLDEN_FILE)


def _prompts(examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """Ends of the shortest distinct prompts, in a fixed order."""
    prompts = {example.ids[: example.loss.index(True)][-PROMPT_TOKENS:] for example in examples}
    return sorted((p for p in prompts if p), key=lambda p: (len(p), p))[:LOOKED_AT]


def _greedy(model: PeftModel, begin: tuple[int, ...], prompt: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """The likeliest next tokens, an end of text included. Computed anew for each: the rows are few and short."""
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS and not (answer and answer[-1] in ends):
        answer.append(int(_logits(model, begin, prompt, answer)[-1].argmax()))
    return tuple(answer)


def _gap(model: PeftModel, begin: tuple[int, ...], prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """The most, over the answer's tokens, that one is less likely than the likeliest in its place, in nats."""
    logits = _logits(model, begin, prompt, answer)[:-1].float()
    chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    return float((logits.amax(dim=1) - chosen).amax())


def _logits(model: PeftModel, begin: tuple[int, ...], prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """(1 + answer tokens, vocabulary): what follows the prompt, and what follows each token of the answer.

    begin: see `begin_of`.
    """
    inputs = (
        {"input_ids": prompt, "decoder_input_ids": [*begin, *answer]} if begin else {"input_ids": [*prompt, *answer]}
    )
    ids = {name: torch.tensor([list(row)], device=model.device) for name, row in inputs.items()}
    logits: torch.Tensor = model(**ids, use_cache=False).logits
    return logits[0, -1 - len(answer) :]
