"""Computes a step: one forward pass over the tokens of all rows, whatever adapters they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.lora import Active, HostAdapter, SlotTensors
from serving.engine.memory import lazy_zeros
from serving.engine.model import SITES_PER_LAYER, Decoder
from serving.engine.request import Sampling
from serving.engine.sampling import sample
from serving.engine.scheduler import NO_SLOT, Key, RowPlan, StepPlan, StepResult

_PROBE = Key((-1, -1))
# The CPU's attention kernel rounds differently for different numbers of keys and chunk lengths. With these paddings
# (all further keys masked, all further queries dropped) a row's bfloat16 result is bit for bit the same whatever shares
# its step: measured.
_KEY_BLOCK = 64
_DECODE_KEYS = 128
_PREFILL_KEYS = 512
_QUERIES = 32


class Runner(Protocol):
    """What an engine needs of a base family; encoder-decoders get a runner of their own."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step. A row that cannot be computed gets a fault; an exception means that no row was."""

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into a slot, between two steps."""

    def probe(self) -> bool:
        """Compute one base token on a spare row; whether it came out finite."""


@dataclass(frozen=True, slots=True)
class _Decode:
    """The decode rows of a step: a prefix of the flat tokens. rows, where: cache rows and positions, (D,).

    mask: additive, (span, 1, 1, length) over cache rows 0..span-1; order None when rows are exactly 0..span-1.
    """

    count: int
    rows: Tensor
    where: Tensor
    span: int
    length: int
    mask: Tensor
    dense: bool


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One row's prompt chunk: flat tokens first..last-1, cache positions start..end-1.

    mask: (groups * C, keys) with C rounded up to a multiple of 32; the queries beyond the chunk are dropped again.
    """

    first: int
    last: int
    row: int
    start: int
    end: int
    mask: Tensor


class LlamaRunner:
    """The Llama family on CPU or CUDA, in torch operations only."""

    def __init__(self, decoder: Decoder, rows: int, max_model_len: int, slots: SlotTensors) -> None:
        self._d = decoder
        self._slots = slots
        self._probe_row = rows
        self._max_model_len = max_model_len
        # One row more than is given out: the idle probe's own.
        shape = (rows + 1, decoder.kv_heads, max_model_len, decoder.head_dim)
        self._keys = [lazy_zeros(shape, decoder.dtype, decoder.device) for _ in decoder.layers]
        self._values = [lazy_zeros(shape, decoder.dtype, decoder.device) for _ in decoder.layers]
        self._last = torch.zeros(rows + 1, dtype=torch.long, device=decoder.device)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """See Runner. Raises ValueError when the adapter's rank exceeds the slots' limit."""
        self._slots.install(slot, adapter)

    def probe(self) -> bool:
        """See Runner."""
        row = RowPlan(_PROBE, self._probe_row, NO_SLOT, 0, (0,), True, Sampling(max_tokens=1, temperature=0.0), 0, 0)
        return self.run(StepPlan((row,))).sampled[_PROBE].fault is None

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """See Runner. Decode rows come first in the plan."""
        for row in plan.scrub:
            for cache in (*self._keys, *self._values):
                cache[row].zero_()
        wanted = [row for row in plan.rows if row.sample]
        logits = self.logits(plan)
        sampled = sample(logits, wanted) if wanted else []
        if wanted:
            at = torch.tensor([r.row for r in wanted], device=self._d.device)
            self._last[at] = torch.tensor([s.token for s in sampled], device=self._d.device)
        return StepResult({row.key: s for row, s in zip(wanted, sampled, strict=True)})

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> Tensor:
        """(sampling rows, vocabulary): the forward pass of a step, keys and values written to the cache."""
        d = self._d
        rows = plan.rows
        decode, chunks = self._decode(rows), self._chunks(rows)
        positions = torch.tensor(
            [p for r in rows for p in range(r.start, r.start + r.length)], dtype=torch.long, device=d.device
        )
        cos, sin = d.cos[positions][:, None], d.sin[positions][:, None]
        active = self._slots.active([r.slot for r in rows for _ in range(r.length)])
        x = d.embedding[self._tokens(rows)]
        for index, layer in enumerate(d.layers):
            site = index * SITES_PER_LAYER
            h = F.rms_norm(x, x.shape[-1:], layer.input_norm, d.eps)
            q, k, v = self._project(layer.qkv(h), h, site, active)
            attended = self._attend(index, _rotate(q, cos, sin), _rotate(k, cos, sin), v, decode, chunks)
            x = x + self._with_lora(layer.out(attended), attended, site + 1, active)
            h = F.rms_norm(x, x.shape[-1:], layer.post_norm, d.eps)
            gate_up = self._with_lora(layer.gate_up(h), h, site + 2, active)
            gate, up = gate_up.chunk(2, dim=-1)
            h = F.silu(gate) * up
            x = x + self._with_lora(layer.down(h), h, site + 3, active)
        x = x[self._sampling_tokens(rows)]
        return d.head(F.rms_norm(x, x.shape[-1:], d.norm, d.eps))

    def _padded(self, length: int, least: int) -> int:
        """How many keys to attend to, masked ones included, for `length` that count."""
        return min(self._max_model_len, max(least, -(-length // _KEY_BLOCK) * _KEY_BLOCK))

    def _tokens(self, rows: Sequence[RowPlan]) -> Tensor:
        """Flat input ids: prompt tokens from the plan, a decode row's from what was sampled last on the device."""
        fed = torch.tensor([t for r in rows for t in (r.tokens or (0,))], dtype=torch.long, device=self._d.device)
        count = sum(1 for r in rows if not r.tokens)
        if count:
            fed[:count] = self._last[torch.tensor([r.row for r in rows[:count]], device=self._d.device)]
        return fed

    def _sampling_tokens(self, rows: Sequence[RowPlan]) -> Tensor:
        """Index of the last flat token of each row that samples."""
        found, end = [], 0
        for row in rows:
            end += row.length
            if row.sample:
                found.append(end - 1)
        return torch.tensor(found, dtype=torch.long, device=self._d.device)

    def _with_lora(self, y: Tensor, x: Tensor, site: int, active: Active | None) -> Tensor:
        if active is not None:
            widths = self._d.sites[site].widths
            self._slots.add(site, active, x, y.split(widths, dim=-1))
        return y

    def _project(self, qkv: Tensor, x: Tensor, site: int, active: Active | None) -> tuple[Tensor, Tensor, Tensor]:
        d = self._d
        q, k, v = self._with_lora(qkv, x, site, active).split(d.sites[site].widths, dim=-1)
        return (
            q.unflatten(-1, (d.heads, d.head_dim)),
            k.unflatten(-1, (d.kv_heads, d.head_dim)),
            v.unflatten(-1, (d.kv_heads, d.head_dim)),
        )

    def _decode(self, rows: Sequence[RowPlan]) -> _Decode | None:
        decoding = [r for r in rows if not r.tokens]
        if not decoding:
            return None
        d = self._d
        span = max(r.row for r in decoding) + 1
        length = self._padded(max(r.start for r in decoding) + 1, _DECODE_KEYS)
        at = torch.zeros(span, dtype=torch.long)  # an absent row of the prefix attends to its own position 0
        at[[r.row for r in decoding]] = torch.tensor([r.start for r in decoding])
        mask = torch.zeros(span, 1, 1, length, dtype=d.dtype)
        mask.masked_fill_(torch.arange(length) > at[:, None, None, None], float("-inf"))
        return _Decode(
            count=len(decoding),
            rows=torch.tensor([r.row for r in decoding], device=d.device),
            where=torch.tensor([r.start for r in decoding], device=d.device),
            span=span,
            length=length,
            mask=mask.to(d.device),
            dense=span == len(decoding),
        )

    def _chunks(self, rows: Sequence[RowPlan]) -> list[_Chunk]:
        d = self._d
        found, first = [], 0
        for row in rows:
            if row.tokens:
                end = row.start + row.length
                keys = self._padded(end, _PREFILL_KEYS)
                queries = -(-row.length // _QUERIES) * _QUERIES
                mask = torch.zeros(queries, keys, dtype=d.dtype)
                mask.masked_fill_(
                    torch.arange(keys) > torch.arange(row.start, row.start + queries)[:, None], float("-inf")
                )
                mask = mask.repeat(d.heads // d.kv_heads, 1).to(d.device)
                found.append(_Chunk(first, first + row.length, row.row, row.start, end, mask))
            first += row.length
        return found

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, decode: _Decode | None, chunks: Sequence[_Chunk]
    ) -> Tensor:
        """Write keys and values to the cache and attend. q: (T, heads, d); k, v: (T, kv, d) -> (T, heads * d).

        Query heads that share a key head become queries of that head: (kv, group) of them, so no key is repeated.
        """
        keys, values = self._keys[layer], self._values[layer]
        grouped = q.unflatten(1, (self._d.kv_heads, -1))  # (T, kv, group, d)
        out = torch.empty_like(grouped)
        if decode is not None:
            n = decode.count
            keys[decode.rows, :, decode.where] = k[:n]
            values[decode.rows, :, decode.where] = v[:n]
            queries = grouped[:n]
            if not decode.dense:
                queries = queries.new_zeros(decode.span, *queries.shape[1:])
                queries[decode.rows] = grouped[:n]
            result = F.scaled_dot_product_attention(
                queries,
                keys[: decode.span, :, : decode.length],
                values[: decode.span, :, : decode.length],
                attn_mask=decode.mask,
            )
            out[:n] = result if decode.dense else result[decode.rows]
        for chunk in chunks:
            keys[chunk.row, :, chunk.start : chunk.end] = k[chunk.first : chunk.last].transpose(0, 1)
            values[chunk.row, :, chunk.start : chunk.end] = v[chunk.first : chunk.last].transpose(0, 1)
            count = chunk.last - chunk.first
            padding = (0, 0, 0, -count % _QUERIES)
            queries = F.pad(grouped[chunk.first : chunk.last].permute(1, 2, 0, 3), padding)  # (kv, group, C, d)
            result = F.scaled_dot_product_attention(
                queries.flatten(1, 2)[None],
                keys[None, chunk.row, :, : chunk.mask.shape[1]],
                values[None, chunk.row, :, : chunk.mask.shape[1]],
                attn_mask=chunk.mask[None, None],
            )
            out[chunk.first : chunk.last] = result[0].unflatten(1, queries.shape[1:3])[:, :, :count].permute(2, 0, 1, 3)
        return out.flatten(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves layout. x: (T, heads, d); cos, sin: (T, 1, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
