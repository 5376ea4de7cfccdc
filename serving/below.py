"""What lies below the host tier, as the host sees it: what keeps adapters nearer than the store, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from serving.engine.lora import HostAdapter
from serving.engine.request import LoadTimes


@dataclass(frozen=True, slots=True)
class Figures:
    """The disk tier in numbers: adapters and bytes there, its bound, damaged files made anew, evictions."""

    count: int = 0
    bytes: int = 0
    budget_bytes: int = 0
    healed: int = 0
    evictions: int = 0


class Below(Protocol):
    """The tiers below the host's, beside their reading. `keep` and `drop` run in the pool that writes."""

    @property
    def figures(self) -> Figures:
        """What lies there."""

    def keep(self, adapter: HostAdapter, times: LoadTimes) -> None:
        """Keep what came from the store nearer than there."""

    def drop(self, digest: str) -> None:
        """Forget an adapter."""

    def bytes_of(self, digest: str) -> int:
        """Bytes of an adapter there; 0 when it is not. Does not wait."""


class Nothing:
    """No tier below that keeps anything."""

    figures = Figures()

    def keep(self, adapter: HostAdapter, times: LoadTimes) -> None:
        """See Below."""

    def drop(self, digest: str) -> None:
        """See Below."""

    def bytes_of(self, digest: str) -> int:
        """See Below."""
        return 0
