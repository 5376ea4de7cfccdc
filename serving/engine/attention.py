"""Keys and values of all rows, and attention over them: packed for the kernels, or plain for torch.

Rows, not pages: a row is one sequence's whole context, reserved at admission. Untouched memory of a row costs nothing
on the CPU, and a prefix moves between rows by one copy, which is cheap beside computing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.memory import lazy_zeros
from serving.engine.plan import RowPlan

_BLOCK = 16  # positions that the kernels keep together
# The CPU's attention in torch rounds differently for different numbers of keys and chunk lengths. With these paddings
# (all further keys masked) a row's bfloat16 result is bit for bit the same whatever shares its step: measured.
_KEY_BLOCK = 64
_DECODE_KEYS = 128
_PREFILL_KEYS = 512
_QUERIES = 32


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention of one layer. q: (T, heads * dim); k, v: (T, kv * dim).

    cos, sin: (positions, turned) tables, turned <= dim, 0 where nothing is rotated; window: how many positions are
    seen, 0 for all; softcap: 0, or scores become cap * tanh(score / cap); q_norm, k_norm: (dim), each head's RMSNorm
    before the rotation, with `norm_offset` added to the weight.
    """

    heads: int
    kv: int
    dim: int
    cos: Tensor
    sin: Tensor
    scale: float
    window: int = 0
    softcap: float = 0.0
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 0.0
    norm_offset: float = 0.0


class Cache(Protocol):
    """Keys and values of `rows` rows; one more than is given out belongs to the idle probe."""

    def scrub(self, row: int) -> None:
        """Forget a row whose numbers went wrong."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the first `length` positions of `source`."""

    def begin(self, rows: Sequence[RowPlan]) -> None:
        """Prepare what every layer of the coming step shares: rows, positions, masks."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Rotate, write, attend: (T, (heads + 2 kv) * dim) -> (T, heads * dim). May write to qkv."""


def make_cache(layers: Sequence[Heads], rows: int, positions: int, like: Tensor, kernels: Any | None) -> Cache:
    """The best cache for these layers. like: has the dtype and device of the computation."""
    if kernels is not None and all(_packable(heads) for heads in layers):
        return PackedCache(layers, rows, positions, kernels)
    return PlainCache(layers, rows, positions, like.dtype, like.device)


def _packable(heads: Heads) -> bool:
    return heads.dim % 16 == 0 and heads.cos.shape[1] % 32 == 0 and heads.heads % heads.kv == 0


def _flat(rows: Sequence[RowPlan]) -> tuple[Tensor, Tensor]:
    """(T,) cache rows and (T,) positions of the flat tokens."""
    row = [r.row for r in rows for _ in range(r.length)]
    where = [p for r in rows for p in range(r.start, r.start + r.length)]
    return torch.tensor(row, dtype=torch.long), torch.tensor(where, dtype=torch.long)


class PackedCache:
    """bfloat16 on the CPU, in the kernels' layout.

    Keys of a layer: (rows, kv, blocks, dim/2, 16, 2); values: (rows, kv, blocks, 8, dim, 2).
    """

    def __init__(self, layers: Sequence[Heads], rows: int, positions: int, kernels: Any) -> None:
        self._layers, self._kernels = tuple(layers), kernels
        blocks = -(-positions // _BLOCK)
        cpu = torch.device("cpu")
        self._keys = [lazy_zeros((rows, h.kv, blocks, h.dim // 2, _BLOCK, 2), torch.bfloat16, cpu) for h in layers]
        self._values = [lazy_zeros((rows, h.kv, blocks, _BLOCK // 2, h.dim, 2), torch.bfloat16, cpu) for h in layers]
        self._rows = self._where = torch.zeros(0, dtype=torch.long)

    def scrub(self, row: int) -> None:
        """See Cache."""
        for cache in (*self._keys, *self._values):
            cache[row].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """See Cache."""
        blocks = -(-length // _BLOCK)  # what lies behind `length` in the last block is overwritten before it is seen
        for cache in (*self._keys, *self._values):
            cache[target, :, :blocks] = cache[source, :, :blocks]

    def begin(self, rows: Sequence[RowPlan]) -> None:
        """See Cache."""
        self._rows, self._where = _flat(rows)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """See Cache."""
        h = self._layers[layer]
        out: Tensor = self._kernels.attend(
            qkv, h.cos, h.sin, self._rows, self._where, self._keys[layer], self._values[layer], h.heads, h.scale,
            h.softcap, h.window, h.q_norm, h.k_norm, h.norm_eps, h.norm_offset,
        )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True)
class _Decode:
    """The decode rows of a step: a prefix of the flat tokens. rows, where: cache rows and positions, (D,).

    at: (span,) positions of cache rows 0..span-1; an absent row attends to its own position 0.
    """

    count: int
    rows: Tensor
    where: Tensor
    span: int
    length: int
    at: Tensor
    dense: bool


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One row's prompt chunk: flat tokens first..last-1, cache positions start..end-1, `keys` attended to."""

    first: int
    last: int
    row: int
    start: int
    end: int
    keys: int


class PlainCache:
    """Any dtype and device, in torch operations. Keys and values of a layer: (rows, kv, positions, dim)."""

    def __init__(
        self, layers: Sequence[Heads], rows: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers, self._positions, self._dtype, self._device = tuple(layers), positions, dtype, device
        self._keys = [lazy_zeros((rows, h.kv, positions, h.dim), dtype, device) for h in layers]
        self._values = [lazy_zeros((rows, h.kv, positions, h.dim), dtype, device) for h in layers]
        self._decode: _Decode | None = None
        self._chunks: list[_Chunk] = []
        self._masks: dict[tuple[int, int], list[Tensor]] = {}
        self._where = torch.zeros(0, dtype=torch.long, device=device)

    def scrub(self, row: int) -> None:
        """See Cache."""
        for cache in (*self._keys, *self._values):
            cache[row].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """See Cache."""
        for cache in (*self._keys, *self._values):
            cache[target, :, :length] = cache[source, :, :length]

    def begin(self, rows: Sequence[RowPlan]) -> None:
        """See Cache."""
        self._where = _flat(rows)[1].to(self._device)
        self._decode = self._decoding([r for r in rows if not r.tokens])
        self._chunks = []
        first = 0
        for row in rows:
            if row.tokens:
                end = row.start + row.length
                keys = self._padded(end, _PREFILL_KEYS)
                self._chunks.append(_Chunk(first, first + row.length, row.row, row.start, end, keys))
            first += row.length
        self._masks = {}

    def begin_fixed(self, target: Tensor, where: Tensor, keys: int) -> None:
        """Prepare a decode step of cache rows 0..n-1 that will lie in these tensors when it is computed.

        target: (n,) the row that each writes to; where: (n,) its position, below `keys`. On the device; nothing of the
        step's layout depends on their values, so that it can be captured once and replayed.
        """
        self._where, self._chunks, self._masks = where, [], {}
        count = len(where)
        self._decode = _Decode(count, target, where, span=count, length=keys, at=where, dense=True)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """See Cache. Query heads that share a key head become queries of that head, so no key is repeated."""
        h, keys, values = self._layers[layer], self._keys[layer], self._values[layer]
        q, k, v = (
            part.unflatten(-1, (-1, h.dim)) for part in qkv.split((h.heads * h.dim, h.kv * h.dim, h.kv * h.dim), dim=-1)
        )
        q, k = self._turned(q, h, h.q_norm), self._turned(k, h, h.k_norm)
        grouped = q.unflatten(1, (h.kv, -1))  # (T, kv, group, dim)
        out = torch.empty_like(grouped)
        decode_mask, *chunk_masks = self._masks_of(h)
        if self._decode is not None:
            step = self._decode
            n = step.count
            keys[step.rows, :, step.where] = k[:n]
            values[step.rows, :, step.where] = v[:n]
            queries = grouped[:n]
            if not step.dense:
                queries = queries.new_zeros(step.span, *queries.shape[1:])
                queries[step.rows] = grouped[:n]
            result = _scored(
                queries, keys[: step.span, :, : step.length], values[: step.span, :, : step.length], decode_mask, h
            )
            out[:n] = result if step.dense else result[step.rows]
        for chunk, mask in zip(self._chunks, chunk_masks, strict=True):
            keys[chunk.row, :, chunk.start : chunk.end] = k[chunk.first : chunk.last].transpose(0, 1)
            values[chunk.row, :, chunk.start : chunk.end] = v[chunk.first : chunk.last].transpose(0, 1)
            count = chunk.last - chunk.first
            padding = (0, 0, 0, -count % _QUERIES)
            queries = F.pad(grouped[chunk.first : chunk.last].permute(1, 2, 0, 3), padding)  # (kv, group, C, dim)
            seen, shown = keys[None, chunk.row, :, : chunk.keys], values[None, chunk.row, :, : chunk.keys]
            result = _scored(queries.flatten(1, 2)[None], seen, shown, mask, h)
            out[chunk.first : chunk.last] = result[0].unflatten(1, queries.shape[1:3])[:, :, :count].permute(2, 0, 1, 3)
        return out.flatten(1)

    def _turned(self, x: Tensor, h: Heads, gain: Tensor | None) -> Tensor:
        """Normed and rotated heads: (T, heads, dim). Rotary embedding (Su et al. 2021), halves layout."""
        if gain is not None:
            x = F.rms_norm(x.float(), (h.dim,), gain.float() + h.norm_offset, h.norm_eps).to(x.dtype)
        if h.cos.shape[1] == 0:
            return x
        cos, sin = h.cos[self._where][:, None], h.sin[self._where][:, None]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def _padded(self, length: int, least: int) -> int:
        """How many keys to attend to, masked ones included, for `length` that count."""
        return min(self._positions, max(least, -(-length // _KEY_BLOCK) * _KEY_BLOCK))

    def _decoding(self, rows: Sequence[RowPlan]) -> _Decode | None:
        if not rows:
            return None
        span = max(r.row for r in rows) + 1
        at = torch.zeros(span, dtype=torch.long)
        at[[r.row for r in rows]] = torch.tensor([r.start for r in rows])
        return _Decode(
            count=len(rows),
            rows=torch.tensor([r.row for r in rows], device=self._device),
            where=torch.tensor([r.start for r in rows], device=self._device),
            span=span,
            length=self._padded(max(r.start for r in rows) + 1, _DECODE_KEYS),
            at=at,
            dense=[r.row for r in rows] == list(range(span)),
        )

    def _masks_of(self, h: Heads) -> list[Tensor | None]:
        """Additive masks of the decode rows, (span, 1, 1, keys), and of each chunk, (1, 1, group * C, keys).

        C is rounded up to a multiple of 32; the queries beyond the chunk are dropped again.
        """
        group = h.heads // h.kv
        found = self._masks.get((group, h.window))
        if found is None:
            found = []
            if self._decode is not None:
                found.append(self._mask(self._decode.at, self._decode.length, h.window)[:, None, None])
            for chunk in self._chunks:
                count = chunk.end - chunk.start
                at = torch.arange(chunk.start, chunk.end + -count % _QUERIES).repeat(group)
                found.append(self._mask(at, chunk.keys, h.window)[None, None])
            self._masks[group, h.window] = found
        return [*([None] if self._decode is None else []), *found]

    def _mask(self, at: Tensor, keys: int, window: int) -> Tensor:
        """(queries, keys): 0 where a query at position `at` sees a key, else -inf."""
        key = torch.arange(keys, device=at.device)
        unseen = key > at[:, None]
        if window:
            unseen |= key <= at[:, None] - window
        mask = torch.zeros(len(at), keys, dtype=self._dtype, device=at.device)
        return mask.masked_fill_(unseen, float("-inf")).to(self._device)


def _scored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, h: Heads) -> Tensor:
    if not h.softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=h.scale)
    scores = h.softcap * torch.tanh(q @ k.transpose(-1, -2) * h.scale / h.softcap)
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(-1).to(v.dtype) @ v
