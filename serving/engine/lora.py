"""Low-rank updates of many adapters in one batch, applied to the rows that lease them.

A site is a group of linears that read the same input (q/k/v, o, gate/up, down). Two forms of slots: stacked tensors and
masked products, here, in torch alone; and each adapter packed for the kernels, in packed.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from adapters.golden import GoldenRow
from serving.engine.memory import lazy_zeros

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class End:
    """The low-rank update of the embedding or of the head, the scale folded into b.

    Of the embedding, a: (vocab, r), b: (r, width); of the head, a: (r, width), b: (r, vocab). gain: (out,) in float32,
    DoRA's factor of what the base gives, folded into b too; or None.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return _bytes(self.a, self.b) + (0 if self.gain is None else _bytes(self.gain))

    def to(self, device: torch.device) -> End:
        """The same on a device; on its own device the very tensors."""
        return End(self.a.to(device), self.b.to(device), None if self.gain is None else self.gain.to(device))


@dataclass(frozen=True, slots=True)
class Form:
    """An adapter's pairs as one kind of slots holds them; installing them then costs a copy, or not even that.

    kind: of the slots that laid them out, and of what they are for. modules: those that have a pair.
    """

    kind: str
    tensors: tuple[Tensor, ...]
    modules: frozenset[str]


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter's tensors on the host, verified and ready to install.

    pairs: module path -> (a, b); a: (r, in), b: (r, out) with alpha/r (or alpha/sqrt(r)) folded in. gains: module path
    -> (out,) in float32, what DoRA multiplies the base's product with (the bias not), folded into b too. pairs and
    gains are of the sites' modules; embedding and head have a form of their own. form: the pairs laid out, and then
    `pairs` is empty (see Slots.prepare).
    """

    digest: str
    rank: int
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: End | None = None
    head: End | None = None
    golden: tuple[GoldenRow, ...] = ()
    form: Form | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        ends = sum(end.size_bytes for end in (self.embedding, self.head) if end is not None)
        laid = 0 if self.form is None else _bytes(*self.form.tensors)
        return ends + laid + _bytes(*self.gains.values()) + sum(_bytes(*pair) for pair in self.pairs.values())


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, slots=True)
class Site:
    """Linears that read the same input. modules: their paths; widths: their output features, in the same order."""

    modules: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]


def kind_of(layout: str, sites: Sequence[Site]) -> str:
    """The name of a form: how it is laid out, and for which sites."""
    return f"{layout}-{hashlib.sha256(repr(tuple(sites)).encode()).hexdigest()[:16]}"


class Slots(Protocol):
    """Where adapters lie on the device. `Step` is what `active` prepares and `add` takes, of the form's own kind."""

    @property
    def size_bytes(self) -> int:
        """Bytes of what the slots hold."""

    @property
    def kind(self) -> str:
        """Names the form of these slots; empty when pairs are installed as they are."""

    def prepare(self, adapter: HostAdapter) -> HostAdapter:
        """The adapter with its pairs laid out for these slots: the slow half of `install`, for any thread."""

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into a slot (1-based), whatever was there before; one that was not prepared is, here.

        Raises ValueError when its rank exceeds what slots may hold or it was prepared for others; the slot is
        untouched then.
        """

    def laid(self, slot: int) -> Tensor | None:
        """What lies in a slot as it was laid out for it (1-D, perhaps longer); None where pairs are installed."""

    def begin(self, slots: Sequence[int]) -> bool:
        """Prepare a step whose flat tokens have these slots; False when none has an adapter."""

    def add(self, site: int, x: Tensor, y: Tensor) -> None:
        """Add each token's low-rank update to a site's fused output, in place.

        Meaning: ``y[t, outputs of m] += x[t] @ A[slot[t], m].T @ B[slot[t], m]`` (Hu et al. 2021, eq. 3).
        x: (T, in); y: (T, sum of the widths of the site's modules).
        """


@dataclass(frozen=True, slots=True)
class Active:
    """Which slots this step's tokens use: slots low..high-1 (zero-based), keep[t, s]: token t uses slot low + s."""

    low: int
    high: int
    keep: Tensor
    touched: frozenset[str]


class StackedSlots:
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
        self._step: Active | None = None
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
        """See Slots."""
        flat = [*self._a, *(b for row in self._b for b in row)]
        return sum(t.numel() * t.element_size() for t in flat)

    @property
    def kind(self) -> str:
        """See Slots."""
        return ""

    def prepare(self, adapter: HostAdapter) -> HostAdapter:
        """See Slots."""
        return adapter

    def install(self, slot: int, adapter: HostAdapter) -> None:
        """See Slots. Ranks and modules that the adapter lacks become zero."""
        if adapter.form is not None:
            raise ValueError(f"the adapter was laid out for {adapter.form.kind}, not for stacked slots")
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

    def laid(self, slot: int) -> Tensor | None:
        """See Slots."""
        return None

    def begin(self, slots: Sequence[int]) -> bool:
        """See Slots."""
        self._step = None
        used = sorted({s for s in slots if s > 0})
        if not used:
            return False
        low, high = used[0] - 1, used[-1]
        wanted = torch.arange(low + 1, high + 1, device=self._device)
        keep = torch.tensor(slots, device=self._device)[:, None] == wanted[None, :]
        touched = frozenset().union(*(self._touched[s] for s in used))
        self._step = Active(low, high, keep, touched)
        return True

    def add(self, site: int, x: Tensor, y: Tensor) -> None:
        """See Slots.

        One product with the A of all slots in use, then zero what is not the token's own: `where`, not a factor, so
        that one adapter's overflow never reaches another's rows.
        """
        active = self._step
        if active is None:
            return
        outputs = y.split(self._sites[site].widths, dim=-1)
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


def add_reference(
    sites: Sequence[Site], site: int, adapters: Sequence[HostAdapter | None], x: Tensor, y: Tensor
) -> None:
    """What `Slots.add` means, one token and one module at a time: slow and obvious. adapters: of each token."""
    for t, adapter in enumerate(adapters):
        if adapter is not None:
            outputs = y[t].split(sites[site].widths)
            for module, output in zip(sites[site].modules, outputs, strict=True):
                if module in adapter.pairs:
                    a, b = adapter.pairs[module]
                    output += x[t] @ a.T @ b
