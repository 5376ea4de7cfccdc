"""Computes the steps of an encoder-decoder: new rows are encoded whole, then all rows decode one token together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.extras import Extras
from serving.engine.lora import HostAdapter, Slots
from serving.engine.memory import lazy_zeros
from serving.engine.ops import Norm
from serving.engine.plan import FED_ALREADY, NO_SLOT, Key, RowPlan, Sampled, StepPlan, StepResult
from serving.engine.request import Sampling, TokenLogprob
from serving.engine.row_attention import over_rows, span_of
from serving.engine.sampling import NOT_FINITE, sample, score
from serving.engine.seq2seq import Block, EncoderDecoder, Linear, Stack, tokens_of

_PROBE = Key((-1, -1))


class Seq2SeqRunner:
    """T5 and BART on CPU or CUDA. A row has its encoder's keys and values for every decoder layer, and its own.
    spare: cache rows behind the idle probe's, for golden rows.

    Cross keys and values: (rows, heads, max_input, dim); the decoder's own: (rows, heads, max_output, dim).
    """

    def __init__(self, base: EncoderDecoder, rows: int, slots: Slots, spare: int = 0) -> None:
        self._b, self._slots, self._probe_row = base, slots, rows
        self._extras = Extras(base.sites, base.site_biases(), base.device)
        layers, count = len(base.decoder.blocks), rows + 1 + spare

        def cache(length: int) -> list[Tensor]:
            return [lazy_zeros((count, base.heads, length, base.dim), base.dtype, base.device) for _ in range(layers)]

        self._keys, self._values = cache(base.max_output), cache(base.max_output)
        self._cross_keys, self._cross_values = cache(base.max_input), cache(base.max_input)
        self._read = [0] * count  # input tokens of each row
        self._reading = [0] * count  # a number for each input that was encoded
        self._encoded = itertools.count(1)
        self._written = [0] * count  # positions of each row's own cache
        self._last = [0] * count

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """See Runner. Raises ValueError when the adapter's rank exceeds the slots' limit."""
        self._slots.install(slot, adapter)
        self._extras.install(slot, adapter)

    def tidy(self, plan: StepPlan) -> None:
        """See Runner."""
        for row in plan.scrub:
            for cache in (*self._keys, *self._values, *self._cross_keys, *self._cross_values):
                cache[row].zero_()
        for copy in plan.copies:
            self._copy(copy.source, copy.target)

    def _copy(self, source: int, target: int) -> None:
        """The whole of what the source wrote, and what it read unless the target read the very same."""
        written = self._written[source]
        for cache in (*self._keys, *self._values):
            cache[target, :, :written] = cache[source, :, :written]
        if self._reading[target] != self._reading[source]:
            read = self._read[source]
            for cache in (*self._cross_keys, *self._cross_values):
                cache[target, :, :read] = cache[source, :, :read]
        self._read[target], self._reading[target] = self._read[source], self._reading[source]
        self._written[target] = written
        self._last[target] = self._last[source]

    def probe(self) -> bool:
        """See Runner."""
        row = RowPlan(_PROBE, self._probe_row, NO_SLOT, 0, (0,), True, Sampling(max_tokens=1, temperature=0.0), 0, 0)
        return self.run(StepPlan((row,))).sampled[self._probe_row].fault is None

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """See Runner. A row with tokens must bring its whole input: the encoder reads both ways."""
        logits = self.logits(plan)
        wanted = [at for at, row in enumerate(plan.rows) if row.sample]
        found: dict[int, Sampled] = {}
        if wanted:
            rows = [plan.rows[at] for at in wanted]
            chosen = logits if len(rows) == len(plan.rows) else logits[wanted]
            for row, sampled in zip(rows, sample(chosen, rows, self._b.start_token_ids), strict=True):
                self._last[row.row], found[row.row] = sampled.token, sampled
        scores: dict[int, tuple[TokenLogprob, ...]] = {}
        for at, row in enumerate(plan.rows):
            if row.targets:
                scored = score(logits[at, None], row.targets, row.sampling.prompt_logprobs or 0)
                if scored is None:
                    found[row.row] = NOT_FINITE
                else:
                    scores[row.row] = tuple(scored)
        return StepResult(found, scores)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> Tensor:
        """(rows, vocabulary): encode the rows that bring tokens, then decode one token of every row."""
        fresh = [row for row in plan.rows if row.tokens]
        if fresh:
            self._encode(fresh)
        for row in fresh:
            self._read[row.row], self._written[row.row] = row.length, 0
            self._reading[row.row] = next(self._encoded)
        *forced, last = self._b.start_token_ids
        for token in forced if fresh else ():
            self._decode(fresh, [token] * len(fresh))
        return self._decode(plan.rows, [self._fed(row, last) for row in plan.rows])

    def _fed(self, row: RowPlan, first: int) -> int:
        if row.tokens:
            return first
        return self._last[row.row] if row.feed == FED_ALREADY else row.feed

    def _encode(self, rows: Sequence[RowPlan]) -> None:
        b = self._b
        lengths = [r.length for r in rows]
        lora = self._lora(tokens_of([r.slot for r in rows], lengths))
        positions = [p for n in lengths for p in range(n)]
        x = self._embed(b.encoder, [t for r in rows for t in r.tokens], positions)

        def attend(block: Block, h: Tensor) -> Tensor:
            q, k, v = self._heads(lora(block.qkv, h), 3)
            parts = []
            for (qs, ks, vs), n in zip(zip(*(t.split(lengths) for t in (q, k, v)), strict=True), lengths, strict=True):
                bias = _by_distance(b.encoder.distance_bias, torch.arange(n), n)
                parts.append(
                    self._attend(qs.transpose(0, 1), ks.transpose(0, 1), vs.transpose(0, 1), bias).transpose(0, 1)
                )
            return lora(block.out, torch.cat(parts).flatten(1))

        for block in b.encoder.blocks:
            x = self._part(x, block.attention_norm, partial(attend, block))
            x = self._part(x, block.mlp_norm, partial(self._mlp, block, lora))
        if b.encoder.last_norm is not None:
            x = b.ops.norm(x, b.encoder.last_norm)
        for index, block in enumerate(b.decoder.blocks):
            if block.cross_kv is None:
                continue
            k, v = self._heads(lora(block.cross_kv, x), 2)
            for row, ks, vs in zip(rows, k.split(lengths), v.split(lengths), strict=True):
                self._cross_keys[index][row.row, :, : row.length] = ks.transpose(0, 1)
                self._cross_values[index][row.row, :, : row.length] = vs.transpose(0, 1)

    def _decode(self, rows: Sequence[RowPlan], tokens: Sequence[int]) -> Tensor:
        b = self._b
        lora = self._lora([r.slot for r in rows])
        at = torch.tensor([r.row for r in rows], device=b.device)
        where = torch.tensor([self._written[r.row] for r in rows])
        read = torch.tensor([self._read[r.row] for r in rows])
        own = span_of(int(where.max()) + 1, b.max_output)
        bias = _by_distance(b.decoder.distance_bias, where, own)
        kernels, like = b.ops.kernels, self._keys[0]
        over_own = over_rows(at, where + 1, own, bias, b.scale, kernels, like)
        over_read = over_rows(at, read, span_of(int(read.max()), b.max_input), None, b.scale, kernels, like)
        x = self._embed(b.decoder, tokens, where.tolist())
        place = where.to(b.device)

        def attend(index: int, block: Block, h: Tensor) -> Tensor:
            q, k, v = self._heads(lora(block.qkv, h), 3)
            keys, values = self._keys[index], self._values[index]
            keys[at, :, place], values[at, :, place] = k, v
            return lora(block.out, over_own(q, keys, values))

        def cross_attend(index: int, block: Block, h: Tensor) -> Tensor:
            if block.cross_q is None or block.cross_out is None:
                return torch.zeros_like(h)
            (q,) = self._heads(lora(block.cross_q, h), 1)
            return lora(block.cross_out, over_read(q, self._cross_keys[index], self._cross_values[index]))

        for index, block in enumerate(b.decoder.blocks):
            x = self._part(x, block.attention_norm, partial(attend, index, block))
            if block.cross_norm is not None:
                x = self._part(x, block.cross_norm, partial(cross_attend, index, block))
            x = self._part(x, block.mlp_norm, partial(self._mlp, block, lora))
        if b.decoder.last_norm is not None:
            x = b.ops.norm(x, b.decoder.last_norm)
        for row in rows:
            self._written[row.row] += 1
        logits = b.head(x * b.head_scale if b.head_scale != 1.0 else x)
        return logits if b.head_bias is None else logits + b.head_bias

    def _embed(self, stack: Stack, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        b = self._b
        x = b.embedding[torch.tensor(tokens, device=b.device)]
        if b.embedding_scale != 1.0:
            x = x * b.embedding_scale
        if stack.positions is not None:
            x = x + stack.positions[torch.tensor(positions, device=b.device)]
        return x if stack.first_norm is None else b.ops.norm(x, stack.first_norm)

    def _part(self, x: Tensor, norm: Norm, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """x and what a part of a layer adds to it, normed before (T5) or after (BART)."""
        b = self._b
        if b.norm_after:
            return b.ops.norm(x + compute(x), norm)
        return x + compute(b.ops.norm(x, norm))

    def _mlp(self, block: Block, lora: Callable[[Linear, Tensor], Tensor], h: Tensor) -> Tensor:
        return lora(block.down, self._b.ops.activate(lora(block.up, h), self._b.activation))

    def _lora(self, slots: Sequence[int]) -> Callable[[Linear, Tensor], Tensor]:
        """A linear with the adapters of these flat tokens."""
        if not self._slots.begin(slots):
            return lambda linear, x: linear.product(x)
        self._extras.begin(slots)

        def apply(linear: Linear, x: Tensor) -> Tensor:
            y = linear.product(x)
            self._extras.gain(linear.site, y)
            self._slots.add(linear.site, x, y)
            return y

        return apply

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(T, parts * heads * dim) -> parts times (T, heads, dim)."""
        return tuple(x.unflatten(-1, (parts, self._b.heads, self._b.dim)).unbind(1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self._b.scale)


def _by_distance(table: Tensor | None, queries: Tensor, keys: int) -> Tensor | None:
    """(heads, queries, keys): the bias of each key for queries at these positions. table: (heads, 2 * length - 1)."""
    if table is None:
        return None
    middle = (table.shape[1] - 1) // 2
    return table[:, (torch.arange(keys)[None] - queries[:, None] + middle).to(table.device)]
