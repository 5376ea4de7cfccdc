"""Slots for CUDA: each adapter is one buffer on the device, and Triton kernels read it where it lies.

A buffer begins with (modules of all sites, 3) int64: of each its rank (0: untouched) and where its A (rank, in) and
its B (rank, out) begin, in bytes; then these, in the device's dtype and with the scale folded in. One buffer means one
copy, which brings an adapter's numbers and what is said of them together; and ranks are packed, so a short rank takes
neither memory nor time of a longer one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serving.engine.gpu_copies import Arrival, Copies, DirectCopies, SideStreamCopies
from serving.engine.lora import Form, HostAdapter, Site, kind_of

_LAYOUT = "cuda1"  # to be changed with the layout: what lies on disk in another one is made anew
_ALIGN = 16  # bytes that the device reads at once
_FIELDS = 3
BLOCK_TOKENS = 16  # of a block; tensor cores take no fewer


def triton_missing() -> str | None:
    """Why the kernels cannot be used here, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; a CUDA build of torch for Linux brings it"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not any(shutil.which(c) for c in (os.environ.get("CC"), "gcc", "clang") if c):
        return "triton needs a C compiler to start its kernels; install gcc"
    return None


@dataclass(frozen=True, slots=True)
class Segments:
    """A step's tokens by adapter. order: the tokens that have one, sorted by slot; blocks: (slot, first, tokens)."""

    order: tuple[int, ...]
    blocks: tuple[tuple[int, int, int], ...]


def cut(slots: Sequence[int]) -> Segments:
    """Sort a step's tokens by slot, in blocks of at most 16 of one slot. slots: of each flat token, 0 for none."""
    members: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        if slot > 0:
            members.setdefault(slot, []).append(token)
    order: list[int] = []
    blocks: list[tuple[int, int, int]] = []
    for slot, tokens in members.items():
        for at in range(0, len(tokens), BLOCK_TOKENS):
            some = tokens[at : at + BLOCK_TOKENS]
            blocks.append((slot, len(order), len(some)))
            order += some
    return Segments(tuple(order), tuple(blocks))


@dataclass(frozen=True, slots=True)
class Reach:
    """What a launch must cover: the sites that adapters change, and their largest rank."""

    sites: frozenset[int] = frozenset()
    rank: int = 0

    def joined(self, other: Reach) -> Reach:
        """Of both together."""
        return Reach(self.sites | other.sites, max(self.rank, other.rank))


@dataclass(frozen=True, slots=True)
class _Step:
    """order: (T,) int64; blocks: (programs, 3) int64, as lora_triton reads them."""

    order: Tensor
    blocks: Tensor
    reach: Reach


class TritonSlots:
    """Slots whose content Triton kernels read in place: on CUDA, or on the CPU under Triton's interpreter.

    copies: how adapters get to the device; by default the one for it.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        max_rank: int,
        copies: Copies | None = None,
    ) -> None:
        # Only CUDA machines have triton, and importing it takes a while.
        from serving.engine.kernels import lora_triton

        self._sites, self._dtype, self._device, self._max_rank = tuple(sites), dtype, device, max_rank
        self._copies = copies or (SideStreamCopies(device) if device.type == "cuda" else DirectCopies())
        self._add = lora_triton.add
        self._shapes = [
            lora_triton.Shape(
                first=sum(len(s.modules) for s in self._sites[:number]),
                modules=len(site.modules),
                in_features=site.in_features,
                widest=max(site.widths),
                columns=torch.tensor(_columns(site), dtype=torch.int32, device=device),
                aligned=all(value % _ALIGN == 0 for columns in _columns(site) for value in columns),
            )
            for number, site in enumerate(self._sites)
        ]
        self._buffers: list[Tensor | None] = [None] * slots
        self._arrivals: list[Arrival | None] = [None] * slots
        self._reaches = [Reach()] * slots
        self._ever = Reach()
        self._step: _Step | None = None
        self._kind = kind_of(f"{_LAYOUT}-{str(dtype).removeprefix('torch.')}", sites)

    @property
    def kind(self) -> str:
        """See Slots."""
        return self._kind

    @property
    def size_bytes(self) -> int:
        """See Slots."""
        return sum(b.numel() for b in self._buffers if b is not None)

    @property
    def reach(self) -> Reach:
        """Of all that was ever installed; it only grows, so that what was captured for it seldom goes stale."""
        return self._ever

    def prepare(self, adapter: HostAdapter) -> HostAdapter:
        """See Slots. What was laid out lies in memory that the device copies from without a detour."""
        staged = pack(self._sites, adapter, self._dtype, self._copies)
        return replace(adapter, pairs={}, form=Form(self._kind, (staged,), frozenset(adapter.pairs)))

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """See Slots. Steps that are under way still read the slot's former content; the next one that uses it waits."""
        if adapter.rank > self._max_rank:
            raise ValueError(f"rank {adapter.rank} exceeds the slots' limit {self._max_rank}")
        index = slot - 1
        form = adapter.form or self.prepare(adapter).form
        if form is None or form.kind != self._kind:
            raise ValueError(f"the adapter was laid out for {form and form.kind}, not for {self._kind}")
        (staged,) = form.tensors
        size = staged.numel()
        buffer = self._buffers[index]
        if buffer is None or not size <= buffer.numel() <= 2 * size:
            # A buffer that a copy is still filling must not be given back to the allocator.
            self._await(index)
            buffer = self._buffers[index] = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._arrivals[index] = self._copies.send(staged, buffer[:size])
        sites = frozenset(n for n, s in enumerate(self._sites) if not form.modules.isdisjoint(s.modules))
        self._reaches[index] = Reach(sites, adapter.rank)
        self._ever = self._ever.joined(self._reaches[index])

    def laid(self, slot: int) -> Tensor | None:
        """See Slots. After `begin` with this slot, it has arrived."""
        return self._buffers[slot - 1]

    def begin(self, slots: Sequence[int]) -> bool:
        """See Slots."""
        self._step = None
        found = cut(slots)
        if not found.blocks:
            return False
        numbers = self.layout(found, len(found.order), len(found.blocks))
        moved = torch.tensor(numbers, dtype=torch.long).to(self._device)
        reach = Reach()
        for slot, _, _ in found.blocks:
            reach = reach.joined(self._reaches[slot - 1])
        self._step = _Step(moved[: len(found.order)], moved[len(found.order) :].view(-1, _FIELDS), reach)
        return True

    def layout(self, segments: Segments, tokens: int, blocks: int) -> list[int]:
        """A step's numbers as the kernels read them, padded to so many tokens and blocks: the order, then the blocks.

        Addresses are those of this moment, and what is still on its way to the slots in use is waited for by what is
        computed from now on: to be called anew for every step.
        """
        numbers = [*segments.order, *[0] * (tokens - len(segments.order))]
        for slot, first, count in segments.blocks:
            self._await(slot - 1)
            buffer = self._buffers[slot - 1]
            if buffer is None:
                raise ValueError(f"slot {slot} is empty")
            numbers += (buffer.data_ptr(), first, count)
        return [*numbers, *[0] * (_FIELDS * (blocks - len(segments.blocks)))]

    def begin_fixed(self, order: Tensor, blocks: Tensor) -> None:
        """Begin a step whose numbers (see layout) will lie in these tensors when it is computed, once or many times.

        order: (tokens,) int64; blocks: (blocks, 3) int64. Covers all that `reach` names.
        """
        self._step = _Step(order, blocks, self._ever)

    def add(self, site: int, x: Tensor, y: Tensor) -> None:
        """See Slots."""
        step = self._step
        if step is not None and site in step.reach.sites:
            self._add(self._shapes[site], x.contiguous(), y, step.order, step.blocks, step.reach.rank)

    def _await(self, index: int) -> None:
        arrival = self._arrivals[index]
        if arrival is not None:
            arrival.wait()
            self._arrivals[index] = None


def pack(sites: Sequence[Site], adapter: HostAdapter, dtype: torch.dtype, copies: Copies) -> Tensor:
    """An adapter's buffer (see the module), staged: (bytes,) uint8."""
    modules = [module for site in sites for module in site.modules]
    head = torch.zeros(len(modules), _FIELDS, dtype=torch.long)
    end = _aligned(head.numel() * head.element_size())
    placed: list[tuple[int, Tensor]] = []
    for fields, module in zip(head, modules, strict=True):
        if module in adapter.pairs:
            starts = []
            for part in adapter.pairs[module]:
                placed.append((end, part))
                starts.append(end)
                end = _aligned(end + part.numel() * dtype.itemsize)
            fields.copy_(torch.tensor([len(adapter.pairs[module][0]), *starts]))
    staged = copies.stage(end)
    staged[: head.numel() * head.element_size()].view(torch.long).copy_(head.flatten())
    for start, part in placed:
        staged[start : start + part.numel() * dtype.itemsize].view(dtype).view(part.shape).copy_(part)
    return staged


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _columns(site: Site) -> list[tuple[int, int]]:
    """First output and outputs of each module of a site, in its fused output."""
    return [(sum(site.widths[:m]), width) for m, width in enumerate(site.widths)]
