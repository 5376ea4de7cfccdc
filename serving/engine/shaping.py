"""What a request changes about the logits before its token is chosen: bias, penalties, bans.

The order is that of vLLM and transformers: bias, repetition, presence and frequency, bans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.plan import RowPlan

Ids = NDArray[np.int64]
Amounts = NDArray[np.floating[Any]]
Cells = tuple[Tensor, Tensor]  # (n,) rows and (n,) tokens


def reshapes(row: RowPlan) -> bool:
    """Whether this row's logits are to be changed at all."""
    s = row.sampling
    return bool(row.ban or s.logit_bias or s.looks_back)


def reshape(logits: Tensor, rows: Sequence[RowPlan], changed: Sequence[int], begun: tuple[int, ...] | None) -> None:
    """Change the logits of the rows `changed`, in place: one indexed operation a kind, whatever the number of rows.

    logits: (rows, vocabulary), float32. begun: see `sample`. Repetition divides positive and multiplies negative
    logits of the tokens of prompt and answer (Keskar et al. 2019, sec. 4.1); presence and frequency subtract, for
    tokens of the answer (OpenAI API reference). Banned tokens become -inf.
    """
    _bias(logits, rows, changed)
    outputs = {i: _ids(rows[i].output) for i in changed}
    whole = {
        i: np.concatenate([_ids(rows[i].prompt if begun is None else begun), outputs[i]])
        for i in changed
        if rows[i].sampling.repetition_penalty != 1.0 or rows[i].sampling.no_repeat_ngram_size
    }
    _repetition(logits, {i: (rows[i].sampling.repetition_penalty, ids) for i, ids in whole.items()})
    _presence_and_frequency(logits, rows, outputs)
    bans = {i: _ids(rows[i].ban) for i in changed if rows[i].ban}
    for i, ids in whole.items():
        size = rows[i].sampling.no_repeat_ngram_size
        if size and (found := repeats(ids, size)).size:
            bans[i] = np.concatenate([bans[i], found]) if i in bans else found
    if bans:
        logits[_cells(bans, logits)] = float("-inf")


def repeats(ids: Ids, size: int) -> Ids:
    """The tokens that would end a run of `size` tokens that is there already, as transformers' NoRepeatNGram has it.

    A token is among them as often as it followed the last size - 1 tokens before.
    """
    starts = len(ids) - size + 1
    if starts <= 0:
        return ids[:0]
    tail = ids[starts:]
    same = np.ones(starts, dtype=bool)
    for at, token in enumerate(tail):
        same &= ids[at : at + starts] == token
        if not same.any():
            break
    return ids[size - 1 :][same]


def _bias(logits: Tensor, rows: Sequence[RowPlan], changed: Sequence[int]) -> None:
    vocabulary = logits.shape[-1]
    triples = [(i, t, b) for i in changed for t, b in rows[i].sampling.logit_bias if t < vocabulary]
    if triples:
        at, tokens, amounts = zip(*triples, strict=True)
        index = (torch.tensor(at, device=logits.device), torch.tensor(tokens, device=logits.device))
        logits.index_put_(index, logits.new_tensor(amounts), accumulate=True)


def _repetition(logits: Tensor, seen: dict[int, tuple[float, Ids]]) -> None:
    seen = {i: (penalty, ids) for i, (penalty, ids) in seen.items() if penalty != 1.0 and ids.size}
    if seen:
        index = _cells({i: ids for i, (_, ids) in seen.items()}, logits)
        penalty = _each({i: np.full(ids.size, penalty) for i, (penalty, ids) in seen.items()}, logits)
        value = logits[index]
        # A token that came twice is written twice, the same value each time.
        logits[index] = torch.where(value > 0, value / penalty, value * penalty)


def _presence_and_frequency(logits: Tensor, rows: Sequence[RowPlan], outputs: dict[int, Ids]) -> None:
    amounts: dict[int, Amounts] = {}
    for i, ids in outputs.items():
        s = rows[i].sampling
        if ids.size and (s.presence_penalty or s.frequency_penalty):
            amounts[i] = s.presence_penalty + s.frequency_penalty * np.bincount(ids)[ids]
    if amounts:
        index = _cells({i: outputs[i] for i in amounts}, logits)
        logits[index] = logits[index] - _each(amounts, logits)


def _ids(tokens: Sequence[int]) -> Ids:
    return np.fromiter(tokens, dtype=np.int64, count=len(tokens))


def _cells(ids: dict[int, Ids], logits: Tensor) -> Cells:
    """Where in the logits these tokens of these rows are."""
    at = np.repeat(list(ids), [len(part) for part in ids.values()])
    tokens = np.concatenate(list(ids.values()))
    return torch.from_numpy(at).to(logits.device), torch.from_numpy(tokens).to(logits.device)


def _each(values: dict[int, Amounts], logits: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(list(values.values()))).to(logits.device, logits.dtype)
