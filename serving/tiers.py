"""How an adapter comes to the host: from the disk if it lies there, sound; else from the store, and then onto the disk.

A load is written as one function that names, before each of its parts, the pool of threads that is to run it.
"""

from __future__ import annotations

from collections.abc import Callable

from serving.below import Figures
from serving.disk_tier import DiskTier
from serving.engine.lora import HostAdapter
from serving.engine.request import LoadTimes
from serving.load_workers import BUILD, STORE
from serving.loader import Bringing
from serving.store_tier import StoreTier


class Tiers:
    """The tiers below the host's. prepare: how adapters are laid out for the slots, see Slots.prepare."""

    def __init__(
        self, disk: DiskTier, store: StoreTier, prepare: Callable[[HostAdapter], HostAdapter], max_rank: int
    ) -> None:
        self._disk, self._store, self._prepare, self._max_rank = disk, store, prepare, max_rank

    def bring(self, digest: str) -> Bringing:
        """Load an adapter; see the module. Raises LoraplaneError."""
        found = self._disk.get(digest)
        # One of a higher rank was packed when the limit was higher; the store's way says what is wrong with it.
        if found is not None and found.rank <= self._max_rank:
            return found
        yield STORE
        fetched = self._store.fetch(digest)
        yield BUILD
        return self._prepare(self._store.build(fetched))

    @property
    def figures(self) -> Figures:
        """See Below."""
        disk = self._disk
        return Figures(disk.count, disk.bytes, disk.budget_bytes, disk.healed, disk.evictions)

    def keep(self, adapter: HostAdapter, times: LoadTimes) -> None:
        """See Below."""
        self._disk.put(adapter, times.fetch_s + times.host_s)

    def drop(self, digest: str) -> None:
        """See Below."""
        self._disk.drop(digest)

    def bytes_of(self, digest: str) -> int:
        """See Below."""
        return self._disk.bytes_of(digest)
