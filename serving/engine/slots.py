"""Which adapter lies in which device slot, and who uses it. Identity is the digest, never a name.

Slot 0 is "no adapter" and belongs to nobody. A lease is a counted use; a leased slot is never given to another
adapter, nor is a pinned one. Of the others the one that is worth least goes first, of equals the least recently used,
and a free slot before any of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field


class NoSlotFree(Exception):
    """Every slot is leased or pinned; the scheduler waits for a release."""


@dataclass(slots=True)
class _Slot:
    index: int
    digest: str | None = None
    leases: int = 0
    last_use: int = 0
    pinned: bool = False

    def can_go_but(self, spare: Collection[str]) -> bool:
        return not self.leases and not self.pinned and self.digest not in spare


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter was placed. install: its tensors are not there yet. evicted: whose were there before."""

    slot: int
    install: bool
    evicted: str | None = None


@dataclass(slots=True)
class SlotTable:
    """Slots 1..slots of one device. worth: of an adapter, by its digest, where others would have its slot."""

    slots: int
    evictions: int = 0
    worth: Callable[[str], float] = lambda digest: 0.0
    _slots: list[_Slot] = field(init=False)
    _by_digest: dict[str, _Slot] = field(init=False, default_factory=dict)
    _clock: Iterator[int] = field(init=False, default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._slots = [_Slot(index) for index in range(1, self.slots + 1)]

    def holds(self, digest: str) -> bool:
        """Whether the adapter lies in a slot now."""
        return digest in self._by_digest

    def can_have(self, digest: str, spare: Collection[str] = ()) -> bool:
        """Whether `acquire` would succeed now."""
        return digest in self._by_digest or any(s.digest is None or s.can_go_but(spare) for s in self._slots)

    def barred(self, digest: str) -> bool:
        """Whether every slot is pinned to another adapter: no waiting changes that."""
        return digest not in self._by_digest and all(slot.pinned for slot in self._slots)

    @property
    def empty(self) -> int:
        """Slots that hold nothing."""
        return self.slots - len(self._by_digest)

    @property
    def pinned(self) -> tuple[str, ...]:
        """The adapters that are pinned."""
        return tuple(s.digest for s in self._slots if s.pinned and s.digest is not None)

    def acquire(self, digest: str, spare: Collection[str] = ()) -> Placement:
        """Lease the adapter's slot, placing it first if need be; see `place`."""
        placement = self.place(digest, spare)
        self._by_digest[digest].leases += 1
        return placement

    def share(self, digest: str) -> Placement:
        """Lease the slot that the adapter has, without its counting as used. Raises KeyError when it has none."""
        slot = self._by_digest[digest]
        slot.leases += 1
        return Placement(slot.index, install=False)

    def place(self, digest: str, spare: Collection[str] = ()) -> Placement:
        """Give the adapter a slot without leasing it; one that has a slot counts as used just now.

        The caller has the adapter's verified tensors at hand: an eviction happens here, so nothing is evicted for a
        newcomer that does not load. Raises NoSlotFree when every slot is leased, pinned, or holds one of `spare`.
        """
        slot = self._by_digest.get(digest)
        if slot is not None:
            slot.last_use = next(self._clock)
            return Placement(slot.index, install=False)
        slot = next((s for s in self._slots if s.digest is None), None)
        if slot is None:
            slot = min((s for s in self._slots if s.can_go_but(spare)), key=self._rank, default=None)
        if slot is None:
            raise NoSlotFree
        evicted = slot.digest
        if evicted is not None:
            del self._by_digest[evicted]
            self.evictions += 1
        slot.digest, slot.leases, slot.last_use = digest, 0, next(self._clock)
        self._by_digest[digest] = slot
        return Placement(slot.index, install=True, evicted=evicted)

    def _rank(self, slot: _Slot) -> tuple[float, int]:
        return self.worth(slot.digest or ""), slot.last_use

    def pin(self, digest: str) -> None:
        """Never give this adapter's slot away. Raises KeyError for an adapter that has none."""
        self._by_digest[digest].pinned = True

    def unpin(self, digest: str) -> None:
        """Let the slot be given away again, if the adapter has one."""
        if digest in self._by_digest:
            self._by_digest[digest].pinned = False

    def release(self, digest: str) -> None:
        """End one use. Raises KeyError for an adapter that has no lease."""
        slot = self._by_digest[digest]
        if slot.leases == 0:
            raise KeyError(digest)
        slot.leases -= 1

    def forget(self, digest: str) -> None:
        """Empty the slot of an adapter nobody uses, for instance one whose installation failed."""
        slot = self._by_digest[digest]
        if slot.leases:
            raise ValueError(f"{digest} has {slot.leases} leases")
        del self._by_digest[digest]
        slot.digest, slot.pinned = None, False

    def slot_of(self, digest: str) -> int:
        """The slot where the adapter lies now; asked anew in every step that uses it. Raises KeyError."""
        return self._by_digest[digest].index

    def resident(self) -> list[tuple[str, int, int]]:
        """(digest, slot, leases) of every occupied slot."""
        return [(s.digest, s.index, s.leases) for s in self._slots if s.digest is not None]

    @property
    def leases(self) -> int:
        """Leases over all slots; 0 when idle."""
        return sum(s.leases for s in self._slots)
