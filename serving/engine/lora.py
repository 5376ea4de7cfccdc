"""Low-rank updates of many adapters in one batch: stacked slot tensors, applied to the rows that lease them.

A site is a group of linears that read the same input (q/k/v, o, gate/up, down); its A parts share one product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.memory import lazy_zeros

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter's tensors on the host, verified and ready to install.

    pairs: module path -> (a, b); a: (r, in), b: (r, out) with alpha/r (or alpha/sqrt(r)) folded in.
    """

    digest: str
    rank: int
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in pair)


@dataclass(frozen=True, slots=True)
class Site:
    """Linears that read the same input. modules: their paths; widths: their output features, in the same order."""

    modules: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Active:
    """Which slots this step's tokens use: slots low..high-1 (zero-based), keep[t, s]: token t uses slot low + s."""

    low: int
    high: int
    keep: Tensor
    touched: frozenset[str]


class SlotTensors:
    """The stacked A and B of every site for all slots of one device.

    A of a site: (slots, modules of the site, rank, in). B of a module: (slots, rank, out). A slot's unused ranks and
    modules are zero. The rank grows with what is resident, in buckets, and every token pays for it.
    """

    def __init__(
        self, sites: Sequence[Site], slots: int, dtype: torch.dtype, device: torch.device, max_rank: int
    ) -> None:
        self._sites, self._slots, self._dtype, self._device = tuple(sites), slots, dtype, device
        self._max_rank = max_rank
        self._touched: dict[int, frozenset[str]] = {}
        self.rank = 0
        self._a: list[Tensor] = []
        self._b: list[list[Tensor]] = []
        self._grow(min(RANK_BUCKETS[0], max_rank))

    def _grow(self, rank: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return lazy_zeros(shape, self._dtype, self._device)

        old_a, old_b, old_rank = self._a, self._b, self.rank
        self._a = [zeros(self._slots, len(s.modules), rank, s.in_features) for s in self._sites]
        self._b = [[zeros(self._slots, rank, width) for width in s.widths] for s in self._sites]
        for new, old in zip(self._a, old_a, strict=False):
            new[:, :, :old_rank] = old
        for new_row, old_row in zip(self._b, old_b, strict=False):
            for new, old in zip(new_row, old_row, strict=True):
                new[:, :old_rank] = old
        self.rank = rank

    @property
    def size_bytes(self) -> int:
        """Bytes of all slots."""
        flat = [*self._a, *(b for row in self._b for b in row)]
        return sum(t.numel() * t.element_size() for t in flat)

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """Write an adapter into a slot (1-based), whatever was there before: rest ranks and modules become zero.

        Raises ValueError when its rank exceeds what slots may grow to; the slot is untouched then.
        """
        if adapter.rank > self._max_rank:
            raise ValueError(f"rank {adapter.rank} exceeds the slots' limit {self._max_rank}")
        if adapter.rank > self.rank:
            bucket = next((r for r in RANK_BUCKETS if r >= adapter.rank), adapter.rank)
            self._grow(min(max(bucket, adapter.rank), self._max_rank))
        index = slot - 1
        for site, a, b in zip(self._sites, self._a, self._b, strict=True):
            for m, module in enumerate(site.modules):
                a[index, m].zero_()
                b[m][index].zero_()
                pair = adapter.pairs.get(module)
                if pair is not None:
                    rank = pair[0].shape[0]
                    a[index, m, :rank].copy_(pair[0])
                    b[m][index, :rank].copy_(pair[1])
        self._touched[slot] = frozenset(adapter.pairs)

    def active(self, slots: Sequence[int]) -> Active | None:
        """What the tokens of one step need, given each token's slot; None when no token has an adapter."""
        used = sorted({s for s in slots if s > 0})
        if not used:
            return None
        low, high = used[0] - 1, used[-1]
        wanted = torch.arange(low + 1, high + 1, device=self._device)
        keep = torch.tensor(slots, device=self._device)[:, None] == wanted[None, :]
        touched = frozenset().union(*(self._touched[s] for s in used))
        return Active(low, high, keep, touched)

    def add(self, site: int, active: Active, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add each token's low-rank update to the site's outputs, in place.

        Meaning: ``outputs[m][t] += x[t] @ A[slot[t], m].T @ B[m][slot[t]]`` (Hu et al. 2021, eq. 3).
        x: (T, in); outputs: one (T, out) view for each module of the site.

        One product with the A of all slots in use, then zero what is not the token's own: `where`, not a factor, so
        that one adapter's overflow never reaches another's rows.
        """
        modules = self._sites[site].modules
        if active.touched.isdisjoint(modules):
            return
        a = self._a[site][active.low : active.high]
        slots, count, rank, width = a.shape
        hidden = (x @ a.reshape(-1, width).T).view(-1, slots, count, rank)
        hidden = torch.where(active.keep[:, :, None, None], hidden, hidden.new_zeros(()))
        for m, module in enumerate(modules):
            if module in active.touched:
                b = self._b[site][m][active.low : active.high].reshape(slots * rank, -1)
                outputs[m].add_(hidden[:, :, m].reshape(-1, slots * rank) @ b)

    def add_reference(self, site: int, slots: Sequence[int], x: Tensor, outputs: Sequence[Tensor]) -> None:
        """The same, one token at a time: slow and obvious, what `add` is tested against."""
        for t, slot in enumerate(slots):
            for m in range(len(self._sites[site].modules)):
                if slot > 0:
                    outputs[m][t] += x[t] @ self._a[site][slot - 1, m].T @ self._b[site][m][slot - 1]
