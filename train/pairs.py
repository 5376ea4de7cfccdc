"""Batches and loss of an encoder-decoder: the prompt is what it reads, the answer what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adapters.prompts import Example
from train.batching import padded

IGNORED = -100  # the label of a token that does not count, as torch and transformers have it


def split(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prompt and the answer of an example that has one of each."""
    at = example.loss.index(True)
    return example.ids[:at], example.ids[at:]


def collate(examples: Sequence[Example], pad_id: int, begin: Sequence[int], most: int) -> dict[str, torch.Tensor]:
    """One batch. input_ids, attention_mask: (B, T); decoder_input_ids, labels: (B, D); all int64.

    begin: what the decoder is fed before an answer, none of which counts in the loss. most: no row is padded beyond it,
    for BART has so many positions and no more. Padded on the right, since it counts them from the left.
    """
    prompts, answers = zip(*(split(e) for e in examples), strict=True)
    unseen = [IGNORED] * (len(begin) - 1)
    mask = [[1] * len(p) for p in prompts]
    return {
        "input_ids": _padded(prompts, pad_id, most),
        "attention_mask": _padded(mask, 0, most),
        "decoder_input_ids": _padded([[*begin, *a[:-1]] for a in answers], pad_id, most),
        "labels": _padded([[*unseen, *a] for a in answers], IGNORED, most),
    }


def answer_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens of one batch, a float32 scalar."""
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["decoder_input_ids"],
        use_cache=False,
    ).logits
    wanted = batch["labels"]
    counts = wanted != IGNORED
    return torch.nn.functional.cross_entropy(logits[counts].float(), wanted[counts])


def _padded(rows: Sequence[Sequence[int]], fill: int, most: int) -> torch.Tensor:
    longest = max(map(len, rows))
    width = max(longest, min(padded(longest), most))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
