"""From logits to tokens: every row with its own parameters, and random numbers that depend on nothing else.

A row's draw is a pure function of (seed, choice, position): the same tokens whatever shares its batch.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.plan import RowPlan, Sampled
from serving.engine.request import Sampling, TokenLogprob

# The most likely tokens that top_p and min_p look at before the whole vocabulary is sorted.
_HEAD = 1024
# Below this a draw is the likeliest token anyway, and float32 no longer holds a distribution.
_COLD = 1e-5


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: BLAKE2b of the key, so nothing has to be remembered."""
    key = struct.pack("<QQQ", seed & (2**64 - 1), choice, position)
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 11) / float(1 << 53)


def sample(logits: Tensor, rows: Sequence[RowPlan]) -> list[Sampled]:
    """One token for each row. logits: (rows, vocabulary), any dtype, on any device; left as it is.

    A row whose logits are not finite gets a fault and no token; its neighbours are unharmed.
    """
    logits = logits.float()
    # NaN and +inf both reach the maximum; -inf is a model's way to bar a token.
    peak, greedy = logits.max(dim=-1)
    finite = torch.isfinite(peak).tolist()
    shaped = logits
    if any(_reshapes(row) for row in rows):
        shaped = logits.clone()
        for index, row in enumerate(rows):
            if _reshapes(row):
                _reshape(shaped[index], row)
        peak, greedy = shaped.max(dim=-1)
        finite = [f and p for f, p in zip(finite, torch.isfinite(peak).tolist(), strict=True)]
    tokens = greedy.tolist()
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature >= _COLD and finite[i]]
    if drawn:
        for index, token in zip(drawn, _draw(shaped[drawn], [rows[i] for i in drawn]), strict=True):
            tokens[index] = token
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None and finite[i]]
    logprobs = dict(zip(wanted, _logprobs(logits, wanted, tokens, rows), strict=True)) if wanted else {}
    return [
        Sampled(tokens[i], logprobs.get(i)) if finite[i] else Sampled(fault="The model's output is not finite.")
        for i in range(len(rows))
    ]


def _reshapes(row: RowPlan) -> bool:
    s = row.sampling
    return bool(row.ban or s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)


def _reshape(logits: Tensor, row: RowPlan) -> None:
    """Apply bans, bias and penalties to one row's logits, in place.

    Penalties: repetition divides positive and multiplies negative logits of prompt and answer tokens (Keskar et al.
    2019, sec. 4.1); presence and frequency subtract for answer tokens (OpenAI API reference).
    """
    s = row.sampling
    if s.repetition_penalty != 1.0 and (seen := sorted({*row.prompt, *row.output})):
        index = torch.tensor(seen, device=logits.device)
        value = logits[index]
        logits[index] = torch.where(value > 0, value / s.repetition_penalty, value * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and row.output:
        counts = Counter(row.output)
        index = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits[index] -= s.presence_penalty + s.frequency_penalty * times
    for token, bias in s.logit_bias:
        if token < logits.shape[-1]:
            logits[token] += bias
    if row.ban:
        logits[torch.tensor(row.ban, device=logits.device)] = float("-inf")


def _draw(logits: Tensor, rows: Sequence[RowPlan]) -> list[int]:
    """Inverse-transform sampling from each row's filtered distribution. logits: (rows, vocabulary), float32."""
    temperature = logits.new_tensor([r.sampling.temperature for r in rows])[:, None]
    # The largest logit is 0 after this, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    mass = torch.logsumexp(scaled, dim=-1, keepdim=True)
    draws = [uniform(r.sampling.seed, r.choice, r.position) for r in rows]
    tokens = [-1] * len(rows)
    plain = [i for i, r in enumerate(rows) if not _filters(r.sampling)]
    if plain:
        probabilities = torch.exp(scaled[plain] - mass[plain]).double()
        for i, token in zip(plain, _invert(probabilities, [draws[i] for i in plain]), strict=True):
            tokens[i] = token
    filtered = [i for i, r in enumerate(rows) if _filters(r.sampling)]
    width = min(_HEAD, logits.shape[-1])
    while filtered:
        values, order = scaled[filtered].topk(width, dim=-1)
        probabilities = torch.exp(values - mass[filtered]).double()
        kept, enough = _keep(probabilities, [rows[i].sampling for i in filtered], logits.shape[-1])
        picks = _invert(kept, [draws[i] for i in filtered])
        for at, i in enumerate(filtered):
            if enough[at]:
                tokens[i] = int(order[at, picks[at]])
        filtered = [i for at, i in enumerate(filtered) if not enough[at]]
        width = logits.shape[-1]
    return tokens


def _filters(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0


def _keep(probabilities: Tensor, samplings: Sequence[Sampling], vocabulary: int) -> tuple[Tensor, list[bool]]:
    """Zero what top_k, top_p (nucleus, Holtzman et al. 2020) and min_p exclude; the likeliest token always stays.

    probabilities: (rows, head), sorted downwards. Also says for each row whether the head held all it needed.
    """
    width = probabilities.shape[-1]

    def column(values: Sequence[float]) -> Tensor:
        return probabilities.new_tensor(values)[:, None]

    rank = torch.arange(width, device=probabilities.device)[None, :]
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = (
        (rank < column([s.top_k or vocabulary for s in samplings]))
        & (before < column([s.top_p for s in samplings]))
        & (probabilities >= column([s.min_p for s in samplings]) * probabilities[:, :1])
    )
    keep[:, 0] = True
    enough = (~keep[:, -1] | torch.tensor([0 < s.top_k <= width for s in samplings], device=keep.device)).tolist()
    return probabilities * keep, [bool(e) or width == vocabulary for e in enough]


def _invert(weights: Tensor, draws: Sequence[float]) -> list[int]:
    """For each row the first index whose cumulative weight exceeds draw * total. weights: (rows, n), float64."""
    cumulative = weights.cumsum(dim=-1)
    target = weights.new_tensor(draws)[:, None] * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # A draw next to 1 may round up to the total: take the last index that has weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).to(torch.uint8).argmax(dim=-1)
    return [int(i) for i in torch.minimum(picks, last).tolist()]


def _logprobs(
    logits: Tensor, wanted: Sequence[int], tokens: Sequence[int], rows: Sequence[RowPlan]
) -> list[TokenLogprob]:
    """Log-probabilities under the model itself, before temperature, bias and penalties."""
    table = torch.log_softmax(logits[list(wanted)], dim=-1)
    most = max(rows[i].sampling.logprobs or 0 for i in wanted)
    values, order = table.topk(most, dim=-1) if most else (table[:, :0], table[:, :0].long())
    found = []
    for at, i in enumerate(wanted):
        count = rows[i].sampling.logprobs or 0
        top = tuple(zip(order[at, :count].tolist(), values[at, :count].tolist(), strict=True))
        found.append(TokenLogprob(float(table[at, tokens[i]]), top))
    return found
