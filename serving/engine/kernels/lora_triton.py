"""The two products of low-rank updates on CUDA: into the ranks, and out again. Imports triton: only CUDA comes here.

Tokens come sorted by adapter and cut into blocks, so that a program works for one adapter and its weights are read once
for all tokens of the block (as SGMV of Punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023). A block is three
numbers: where the adapter's buffer lies, its first token, how many; a block of no tokens does nothing, so a launch may
have more programs than there is work, and the same launch serves any mixture: what a captured graph needs.

All sums are in float32. What lies beyond a block's tokens, an adapter's rank or a linear's width is never read; another
row's NaN therefore cannot get in, and a short rank costs nothing beyond its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving.engine.gpu_slots import BLOCK_TOKENS

BLOCK_RANKS = 16
_BLOCK_IN = 128
_BLOCK_OUT = 128
# The inputs of a wide linear are summed in several programs, since few rows alone would leave most of the card idle.
_IN_PER_SPLIT = 1024
_MOST_SPLITS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """One site on the device.

    first: modules that lie before its own in an adapter's head; columns: (modules, 2) int32, first output and outputs
    of each; widest: of them; aligned: all these numbers are multiples of 16, so that memory is read in whole words.
    """

    first: int
    modules: int
    in_features: int
    widest: int
    columns: Tensor
    aligned: bool

    @property
    def splits(self) -> int:
        """How many programs share the inputs: by the width alone, so that a row's sums never depend on its batch."""
        return max(1, min(_MOST_SPLITS, self.in_features // _IN_PER_SPLIT))


def add(shape: Shape, x: Tensor, y: Tensor, order: Tensor, blocks: Tensor, most_ranks: int) -> None:
    """y[t] += x[t] @ A.T @ B of each token's adapter, in place.

    x: (T, in), y: (T, outputs), rows contiguous; order: (tokens with an adapter,) int64, sorted by adapter; blocks:
    (programs, 3) int64: address of the adapter's buffer, first index into order, tokens, at most 16 and 0 for nothing
    to do. A buffer begins with (modules of all sites, 3) int64: of each its rank (0: untouched), and where A (rank, in)
    and B (rank, out) begin, in bytes from the buffer's start, multiples of 16. most_ranks: no adapter has more.
    """
    chunks, programs = triton.cdiv(most_ranks, BLOCK_RANKS), blocks.shape[0]
    ranks = chunks * BLOCK_RANKS
    hidden = torch.empty(shape.splits, order.shape[0], shape.modules, ranks, dtype=torch.float32, device=x.device)
    # Half formats are exact in tf32; float32 must not lose what it has.
    precision = "ieee" if x.dtype is torch.float32 else "tf32"
    per_split = triton.cdiv(triton.cdiv(shape.in_features, shape.splits), _BLOCK_IN) * _BLOCK_IN
    # Triton launches on the thread's own device, which need not be the tensors'.
    with torch.cuda.device_of(x):
        _shrink[(programs, shape.modules * chunks, shape.splits)](
            x, hidden, order, blocks, shape.first, shape.in_features, per_split, x.stride(0), chunks,
            hidden.stride(0), hidden.stride(1),
            TOKENS=BLOCK_TOKENS, RANKS=BLOCK_RANKS, INPUTS=_BLOCK_IN, PRECISION=precision,
        )  # fmt: skip
        _expand[(programs, triton.cdiv(shape.widest, _BLOCK_OUT), shape.modules)](
            y, hidden, order, blocks, shape.columns, shape.first, y.stride(0), ranks,
            hidden.stride(0), hidden.stride(1),
            SPLITS=shape.splits, TOKENS=BLOCK_TOKENS, RANKS=BLOCK_RANKS, OUTPUTS=_BLOCK_OUT,
            ALIGNED=shape.aligned, PRECISION=precision,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_module"])  # type: ignore[untyped-decorator]
def _shrink(
    x: tl.tensor, hidden: tl.tensor, order: tl.tensor, blocks: tl.tensor, first_module: tl.tensor,
    in_features: tl.tensor, per_split: tl.tensor, x_stride: tl.tensor, chunks: tl.tensor, split_stride: tl.tensor,
    token_stride: tl.tensor,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """hidden[split, i, module, r] = sum over the split's inputs of x[order[i]] * A[r]."""
    block = blocks + tl.program_id(0) * 3
    count = tl.load(block + 2)
    if count == 0:
        return
    module = tl.program_id(1) // chunks
    first_rank = (tl.program_id(1) % chunks) * RANKS
    buffer = tl.load(block)
    fields = buffer.to(tl.pointer_type(tl.int64)) + (first_module + module) * 3
    rank = tl.load(fields)
    if first_rank >= rank:
        return
    weights = tl.multiple_of((buffer + tl.load(fields + 1)).to(tl.pointer_type(x.dtype.element_ty)), 16)
    split = tl.program_id(2)
    at = tl.arange(0, TOKENS)
    index = tl.load(block + 1) + at
    token = tl.load(order + index, mask=at < count, other=0)
    ranks = first_rank + tl.arange(0, RANKS)
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    for begin in range(split * per_split, tl.minimum((split + 1) * per_split, in_features), INPUTS):
        inputs = begin + tl.arange(0, INPUTS)
        rows = tl.load(
            x + token[:, None] * x_stride + inputs[None, :],
            mask=(at < count)[:, None] & (inputs < in_features)[None, :],
            other=0.0,
        )
        columns = tl.load(
            weights + ranks[None, :] * in_features + inputs[:, None],
            mask=(ranks < rank)[None, :] & (inputs < in_features)[:, None],
            other=0.0,
        )
        total = tl.dot(rows.to(tl.float32), columns.to(tl.float32), total, input_precision=PRECISION)
    target = hidden + split * split_stride + index[:, None] * token_stride + module * chunks * RANKS + ranks[None, :]
    tl.store(target, total, mask=(at < count)[:, None])


@triton.jit(do_not_specialize=["first_module"])  # type: ignore[untyped-decorator]
def _expand(
    y: tl.tensor, hidden: tl.tensor, order: tl.tensor, blocks: tl.tensor, columns: tl.tensor, first_module: tl.tensor,
    y_stride: tl.tensor, most_ranks: tl.tensor, split_stride: tl.tensor, token_stride: tl.tensor,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, OUTPUTS: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """y[order[i], outputs of module] += the sum over splits of hidden[split, i, module] @ B."""
    block = blocks + tl.program_id(0) * 3
    count = tl.load(block + 2)
    if count == 0:
        return
    module = tl.program_id(2)
    buffer = tl.load(block)
    fields = buffer.to(tl.pointer_type(tl.int64)) + (first_module + module) * 3
    rank = tl.load(fields)
    if rank == 0:
        return
    begin, width = tl.load(columns + module * 2), tl.load(columns + module * 2 + 1)
    if ALIGNED:
        begin, width = tl.multiple_of(begin, 16), tl.multiple_of(width, 16)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    if tl.program_id(1) * OUTPUTS >= width:
        return
    weights = tl.multiple_of((buffer + tl.load(fields + 2)).to(tl.pointer_type(y.dtype.element_ty)), 16)
    at = tl.arange(0, TOKENS)
    index = tl.load(block + 1) + at
    token = tl.load(order + index, mask=at < count, other=0)
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        source = hidden + index[:, None] * token_stride + module * most_ranks + ranks[None, :]
        inner = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            inner += tl.load(source + split * split_stride, mask=(at < count)[:, None], other=0.0)
        rows = tl.load(
            weights + ranks[:, None] * width + outputs[None, :],
            mask=(ranks < rank)[:, None] & (outputs < width)[None, :],
            other=0.0,
        )
        total = tl.dot(inner, rows.to(tl.float32), total, input_precision=PRECISION)
    target = y + token[:, None] * y_stride + begin + outputs[None, :]
    mask = (at < count)[:, None] & (outputs < width)[None, :]
    tl.store(target, (tl.load(target, mask=mask, other=0.0).to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)
