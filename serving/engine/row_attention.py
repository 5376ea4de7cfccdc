"""Attention of one new token a row over what the row has written or read: by a kernel where there is one, or torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_KEY_BLOCK = 64  # torch attends to keys in multiples of this, so that a row rounds the same whatever shares its step
_LANES = 16

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def span_of(longest: int, most: int) -> int:
    """How many keys to look at where the longest row has so many."""
    return min(most, -(-longest // _KEY_BLOCK) * _KEY_BLOCK)


def over_rows(
    rows: Tensor, lengths: Tensor, span: int, bias: Tensor | None, scale: float, kernels: Any | None, like: Tensor
) -> Attend:
    """attend(q, keys, values) for the rows of a step.

    q: (n, heads, dim); keys, values: (all rows, heads, positions, dim); the result: (n, heads * dim).
    rows: (n,) indices, on the device; lengths: (n,) on the host, at most span; bias: (heads, n, span) or None, added to
    the scores. like: has the dtype and device of the computation.
    """
    if kernels is not None and like.shape[-1] % _LANES == 0:
        shift = None if bias is None else bias.float().contiguous()

        def by_kernel(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            found: Tensor = kernels.attend_rows(q.contiguous(), keys, values, rows, lengths, shift, scale)
            return found

        return by_kernel
    unseen = (torch.arange(span) >= lengths[:, None])[:, None, None]
    mask = torch.zeros(len(lengths), 1, 1, span, dtype=like.dtype).masked_fill_(unseen, float("-inf")).to(like.device)
    if bias is not None:
        mask = mask + bias.transpose(0, 1)[:, :, None]

    def by_torch(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        seen, shown = keys[rows, :, :span], values[rows, :, :span]
        return F.scaled_dot_product_attention(q[:, :, None], seen, shown, attn_mask=mask, scale=scale).flatten(1)

    return by_torch
