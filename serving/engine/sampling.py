"""From logits to tokens: every row with its own parameters, and random numbers that depend on nothing else.

A row's draw is a pure function of (seed, choice, position): the same tokens whatever shares its batch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from serving.engine.beams import Candidate
from serving.engine.plan import RowPlan, Sampled
from serving.engine.request import Sampling, TokenLogprob
from serving.engine.shaping import reshape, reshapes

# The likeliest tokens that top_k, top_p and min_p look at before the whole vocabulary is sorted.
_HEAD = 1024
# Tokens whose weights are summed as one before the draw looks among them.
_BLOCK = 256
_PASS = 128  # tokens that the search for the likeliest takes as one; most vocabularies are a multiple
# Below this a draw is the likeliest token anyway, and float32 no longer holds a distribution.
_COLD = 1e-5
NOT_FINITE = Sampled(fault="The model's output is not finite.", numerics=True)
NOTHING_LEFT = Sampled(fault="The request's own settings leave no token that may follow.")


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: BLAKE2b of the key, so nothing has to be remembered."""
    key = struct.pack("<QQQ", seed & (2**64 - 1), choice, position)
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 11) / float(1 << 53)


def sample(logits: Tensor, rows: Sequence[RowPlan], begun: tuple[int, ...] | None = None) -> list[Sampled]:
    """One token for each row. logits: (rows, vocabulary), any dtype, on any device; left as it is.

    begun: what every answer of an encoder-decoder starts with; penalties look at it in place of the prompt.
    A row whose logits are not finite gets a fault and no token; its neighbours are unharmed.
    """
    changed = [i for i, row in enumerate(rows) if reshapes(row)]
    searching = [i for i, row in enumerate(rows) if row.candidates]
    shaped = logits.to(torch.float32, copy=bool(changed or searching))
    # NaN and +inf both reach the maximum; -inf is a model's way to bar a token.
    finite = torch.isfinite(shaped.amax(dim=-1))
    sound = finite.tolist()
    if searching:  # penalties and bans of a search change log-probabilities, as transformers has it
        shaped[searching] = torch.log_softmax(shaped[searching], dim=-1)
    if changed:
        reshape(shaped, rows, changed, begun)
        finite = finite & torch.isfinite(shaped.amax(dim=-1))
    good = finite.tolist()
    drawn = [i for i, row in enumerate(rows) if good[i] and _draws(row.sampling)]
    tokens = [-1] * len(rows) if len(drawn) == len(rows) else likeliest(shaped).tolist()
    if drawn:
        for index, token in zip(drawn, _draw(_part(shaped, drawn), [rows[i] for i in drawn]), strict=True):
            tokens[index] = token
    wanted = [i for i, row in enumerate(rows) if good[i] and row.sampling.logprobs is not None]
    told: dict[int, TokenLogprob] = {}
    if wanted:
        # Under the model itself, before temperature, bias and penalties.
        most = [rows[i].sampling.logprobs or 0 for i in wanted]
        told = dict(zip(wanted, _logprobs(_part(logits, wanted), [tokens[i] for i in wanted], most), strict=True))
    offers = _candidates(shaped, searching, rows)
    return [
        Sampled(tokens[i], told.get(i), offers.get(i, ())) if good[i] else NOTHING_LEFT if sound[i] else NOT_FINITE
        for i in range(len(rows))
    ]


def likeliest(scores: Tensor) -> Tensor:
    """(rows, vocabulary) float32 -> (rows,): argmax, the first of equals. In two passes that a CPU does with wide
    registers: 0.05 ms for 16 rows of 49,152 on two cores, where torch's own takes 0.24."""
    rows, vocabulary = scores.shape
    if scores.device.type != "cpu" or vocabulary % _PASS:
        return scores.argmax(dim=-1)
    blocks = scores.reshape(rows, -1, _PASS)
    block = blocks.amax(dim=-1).argmax(dim=-1)
    return block * _PASS + blocks[torch.arange(rows), block].argmax(dim=-1)


def _candidates(scores: Tensor, searching: Sequence[int], rows: Sequence[RowPlan]) -> dict[int, tuple[Candidate, ...]]:
    found = {}
    for i in searching:
        values, tokens = scores[i].topk(min(rows[i].candidates, scores.shape[-1]))
        found[i] = tuple(map(Candidate, tokens.tolist(), values.tolist()))
    return found


def score(logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob] | None:
    """Log-probabilities of these tokens, and of the `top` likeliest, one a row; None if the logits are not finite.

    logits: (tokens, vocabulary), any dtype.
    """
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        return None
    return _logprobs(logits, targets, [top] * len(targets))


def _logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    table = torch.log_softmax(logits.float(), dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    most = max(counts)
    values, order = table.topk(min(most, table.shape[-1]), dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(order.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(own, top[:count]) for own, top, count in zip(chosen, tops, counts, strict=True)]


def _part(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows; without a copy if they are all."""
    return logits if len(rows) == logits.shape[0] else logits[list(rows)]


def _draws(s: Sampling) -> bool:
    return s.temperature >= _COLD and s.top_k != 1


def _filters(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0


def _draw(logits: Tensor, rows: Sequence[RowPlan]) -> list[int]:
    """Inverse-transform sampling from each row's filtered distribution. logits: (rows, vocabulary), float32."""
    count, vocabulary = logits.shape
    temperature = logits.new_tensor([r.sampling.temperature for r in rows])[:, None]
    padded = logits.new_empty((count, -(-vocabulary // _BLOCK) * _BLOCK))
    padded[:, vocabulary:] = 0.0
    weights = padded[:, :vocabulary]
    # The largest weight is 1, so that a tiny temperature cannot overflow.
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=weights).div_(temperature)
    # What is e^-80 of the likeliest is nothing: next to zero, float32 takes twenty times as long.
    torch.nn.functional.threshold(weights, -80.0, float("-inf"), inplace=True).exp_()
    blocks = padded.view(count, -1, _BLOCK)
    mass = blocks.sum(dim=-1).double()
    filtered = [i for i, r in enumerate(rows) if _filters(r.sampling)]
    if filtered:
        some = [rows[i].sampling for i in filtered]
        # A factor and not masked_fill_, which took up to seven times as long; the weights are finite.
        kept = _kept(_part(logits, filtered), mass[filtered].sum(dim=-1), some)
        if len(filtered) == count:
            weights.mul_(kept)
        else:
            weights[filtered] *= kept
        mass = blocks.sum(dim=-1).double()
    draws = mass.new_tensor([uniform(r.sampling.seed, r.choice, r.position) for r in rows])[:, None]
    # First the block in which the draw's share of all weight falls, then the token: sums of blocks cost a tenth of
    # running sums over the vocabulary.
    block, rest = _invert(mass, draws * mass.sum(dim=-1, keepdim=True))
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double()
    token, _ = _invert(inside, rest)
    return [int(t) for t in (block * _BLOCK + token)[:, 0].tolist()]


def _invert(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the first index whose cumulative weight exceeds its share, and what is left of the share there.

    weights: (rows, n), float64; share, and both results: (rows, 1).
    """
    cumulative = weights.cumsum(dim=-1)
    # Rounding may bring a share up to the total, which nothing exceeds; just below it lies the last that has weight.
    total = cumulative[:, -1:]
    share = torch.minimum(share, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, share, right=True)
    before = cumulative.gather(1, found) - weights.gather(1, found)
    return found, (share - before).clamp_(min=0.0)


def _kept(logits: Tensor, mass: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """(rows, vocabulary), bool: what min_p, top_k and top_p leave; the likeliest token always stays.

    As vLLM orders them: min_p and top_k each look at the whole distribution, top_p (the nucleus, Holtzman et al. 2020)
    at what these two left, scaled to 1. All three keep a number of the likeliest tokens; of equal logits the lower id.
    mass: (rows,), each row's whole weight, its likeliest token's being 1, float64.
    """
    vocabulary = logits.shape[-1]
    least = logits.new_empty(len(samplings))
    spare = torch.empty(len(samplings), dtype=torch.long, device=logits.device)  # kept of the tokens that equal `least`
    undecided = list(range(len(samplings)))
    for width in (min(_HEAD, vocabulary), vocabulary):
        if undecided:
            head = _largest(_part(logits, undecided), width)
            counts = _how_many(head, [samplings[i] for i in undecided], mass[undecided], vocabulary)
            number = torch.tensor(counts, device=head.device)[:, None]
            # Rows that are not decided yet are written too, and written again.
            least[undecided] = last = head.gather(1, (number - 1).clamp_(min=0))[:, 0]
            spare[undecided] = number[:, 0] - (head > last[:, None]).sum(dim=-1)
            undecided = [i for i, count in zip(undecided, counts, strict=True) if not count]
    kept = logits >= least[:, None]
    row, token = (logits == least[:, None]).nonzero(as_tuple=True)
    first = torch.searchsorted(row, torch.arange(len(samplings), device=row.device))
    rank = torch.arange(len(row), device=row.device) - first[row]
    surplus = rank >= spare[row]
    kept[row[surplus], token[surplus]] = False
    return kept


def _how_many(head: Tensor, samplings: Sequence[Sampling], mass: Tensor, vocabulary: int) -> list[int]:
    """How many of its likeliest tokens each row keeps; 0 where the head is too short to know.

    head: (rows, width), the largest logits, falling.
    """
    width = head.shape[-1]

    def column(values: Sequence[float]) -> Tensor:
        return head.new_tensor(values, dtype=torch.float64)[:, None]

    weights = (head - head[:, :1]).double().div_(column([s.temperature for s in samplings])).exp_()
    likely = (weights >= column([s.min_p for s in samplings])).sum(dim=-1).tolist()
    # What min_p and top_k leave; a whole head that min_p leaves may go on behind it.
    most = [min(s.top_k or vocabulary, n if n < width else vocabulary) for s, n in zip(samplings, likely, strict=True)]
    cumulative = weights.cumsum(dim=-1)
    ends = torch.tensor([min(n, width) for n in most], device=head.device)[:, None]
    everything = torch.tensor([n == vocabulary for n in most], device=head.device)
    left = torch.where(everything, mass, cumulative.gather(1, ends - 1)[:, 0])[:, None]
    top_p = column([s.top_p for s in samplings])
    inside = ((cumulative - weights < top_p * left) | (top_p == 1.0)).sum(dim=-1).tolist()
    found = []
    for s, n, nucleus in zip(samplings, most, inside, strict=True):
        sure = n <= width or (n == vocabulary and not s.min_p and nucleus < width)
        found.append(max(1, min(n, nucleus)) if sure else 0)
    return found


def _largest(logits: Tensor, count: int) -> Tensor:
    """(rows, count): each row's largest values, falling."""
    if logits.device.type != "cpu":
        return logits.topk(count, dim=-1).values
    # numpy selects and sorts numbers alone with vector instructions: 0.5 ms for 16 rows of 49,152 where topk, which
    # carries the ids along, takes 8 ms, and 2 ms where torch.sort takes 70 ms.
    values = logits.numpy()
    if count < values.shape[-1]:
        values = np.partition(values, values.shape[-1] - count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())
