"""Slots for the CPU kernels: each adapter packed into one buffer when it is read, and a slot is where that lies.

Layout of the buffer (bfloat16), for each site: A of its modules, ranks one after the other, each module's padded to an
even number and all to 16, as (ranks/16, in/2, 16, 2); then B of each module as (out/16, rank/2, 16, 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engine.lora import Form, HostAdapter, Site, kind_of

_LAYOUT = "cpu1"  # to be changed with the layout: what lies on disk in another one is made anew
_LANES = 16
_SITE_FIELDS = 2
_MODULE_FIELDS = 5
_BLOCK_ROWS = 4


def packable(sites: Sequence[Site]) -> bool:
    """Whether the kernels can compute these sites."""
    return all(s.in_features % 2 == 0 and all(w % _LANES == 0 for w in s.widths) for s in sites)


def pack(sites: Sequence[Site], adapter: HostAdapter) -> tuple[Tensor, Tensor]:
    """(buffer, offsets): see the module. offsets: (sites, 2 + 5 * modules), what cpu.cpp's `lora_add` reads.

    Fields: start of A, its padded ranks; for each module start of B, first rank, ranks, first output, outputs.
    """
    width = _SITE_FIELDS + _MODULE_FIELDS * max(len(s.modules) for s in sites)
    offsets = torch.zeros(len(sites), width, dtype=torch.long)
    parts: list[Tensor] = []
    end = 0
    for fields, site in zip(offsets, sites, strict=True):
        found = [(m, adapter.pairs[module]) for m, module in enumerate(site.modules) if module in adapter.pairs]
        if not found:
            continue
        stacked = torch.cat([_even(a) for _, (a, _) in found])
        ranks = -(-len(stacked) // _LANES) * _LANES
        stacked = F.pad(stacked, (0, 0, 0, ranks - len(stacked)))
        parts.append(stacked.view(ranks // _LANES, _LANES, -1, 2).permute(0, 2, 1, 3).flatten())
        fields[0], fields[1] = end, ranks
        end += parts[-1].numel()
        first = 0
        for m, (_, b) in found:
            even = _even(b)
            rank, out = even.shape
            parts.append(even.view(rank // 2, 2, -1, _LANES).permute(2, 0, 3, 1).flatten())
            at = _SITE_FIELDS + m * _MODULE_FIELDS
            fields[at : at + _MODULE_FIELDS] = torch.tensor([end, first, rank, sum(site.widths[:m]), out])
            end += parts[-1].numel()
            first += rank
    flat = torch.cat(parts) if parts else torch.zeros(0)  # an adapter of the embedding or the head alone
    return flat.to(torch.bfloat16), offsets


def _even(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, x.shape[0] % 2))


class PackedSlots:
    """Slots whose content is read in place by the kernels: installing costs a packing and nothing of the others."""

    def __init__(self, sites: Sequence[Site], slots: int, max_rank: int, kernels: Any) -> None:
        self._sites, self._kernels, self._max_rank = tuple(sites), kernels, max_rank
        width = _SITE_FIELDS + _MODULE_FIELDS * max(len(s.modules) for s in sites)
        self._buffers: list[Tensor | None] = [None] * slots
        self._addresses = torch.zeros(slots, dtype=torch.long)
        self._offsets = torch.zeros(slots, len(sites), width, dtype=torch.long)
        self._blocks = torch.zeros(0, 2 + _BLOCK_ROWS, dtype=torch.long)
        self._touched: set[int] = set()
        self._kind = kind_of(_LAYOUT, sites)

    @property
    def kind(self) -> str:
        """See Slots."""
        return self._kind

    @property
    def size_bytes(self) -> int:
        """See Slots."""
        return sum(b.numel() * b.element_size() for b in self._buffers if b is not None)

    def prepare(self, adapter: HostAdapter) -> HostAdapter:
        """See Slots."""
        form = Form(self._kind, pack(self._sites, adapter), frozenset(adapter.pairs))
        return replace(adapter, pairs={}, form=form)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """See Slots. The slot shares the memory of what was prepared."""
        if adapter.rank > self._max_rank:
            raise ValueError(f"rank {adapter.rank} exceeds the slots' limit {self._max_rank}")
        form = adapter.form or self.prepare(adapter).form
        if form is None or form.kind != self._kind:
            raise ValueError(f"the adapter was laid out for {form and form.kind}, not for {self._kind}")
        buffer, offsets = form.tensors
        self._buffers[slot - 1] = buffer
        self._addresses[slot - 1] = buffer.data_ptr()
        self._offsets[slot - 1] = offsets

    def laid(self, slot: int) -> Tensor | None:
        """See Slots."""
        return self._buffers[slot - 1]

    def begin(self, slots: Sequence[int]) -> bool:
        """See Slots. Tokens of one adapter share the read of its weights, four at a time."""
        members: dict[int, list[int]] = {}
        for token, slot in enumerate(slots):
            if slot > 0:
                members.setdefault(slot, []).append(token)
        blocks = [
            [slot - 1, len(some), *some, *[0] * (_BLOCK_ROWS - len(some))]
            for slot, tokens in members.items()
            for some in (tokens[i : i + _BLOCK_ROWS] for i in range(0, len(tokens), _BLOCK_ROWS))
        ]
        self._blocks = torch.tensor(blocks, dtype=torch.long).view(-1, 2 + _BLOCK_ROWS)
        used = torch.tensor([slot - 1 for slot in members], dtype=torch.long)
        self._touched = set(self._offsets[used, :, 1].amax(0).nonzero().flatten().tolist()) if members else set()
        return bool(members)

    def add(self, site: int, x: Tensor, y: Tensor) -> None:
        """See Slots."""
        if site in self._touched:
            self._kernels.lora_add(y, x, self._blocks, self._addresses, self._offsets, site)
