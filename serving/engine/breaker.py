"""Adapters that make the model's numbers infinite: struck each time, and after three strikes set aside for a while.

Only what an adapter did to the model counts, never what a request's own settings did: nobody can have somebody else's
adapter set aside by asking oddly.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

STRIKES = 3
WINDOW_S = 600.0
FIRST_S = 30.0
LONGEST_S = 600.0
KEPT = 4096  # adapters that are remembered; the longest forgotten goes first


@dataclass(slots=True)
class _Record:
    strikes: list[float]
    aside_until: float = 0.0
    aside_s: float = 0.0


class Breaker:
    """Which adapters are set aside, by digest. After its time an adapter is tried again: one strike sets it aside for
    twice as long, one good answer clears it."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def strike(self, digest: str, now: float) -> None:
        """An answer of this adapter came to nothing for its numbers."""
        record = self._records.setdefault(digest, _Record([]))
        self._records.move_to_end(digest)
        record.strikes = [*(at for at in record.strikes if now - at < WINDOW_S), now]
        if record.aside_s or len(record.strikes) >= STRIKES:
            record.aside_s = min(max(FIRST_S, 2 * record.aside_s), LONGEST_S)
            record.aside_until = now + record.aside_s
            record.strikes = []
        if len(self._records) > KEPT:
            self._records.popitem(last=False)

    def good(self, digest: str, now: float) -> None:
        """An answer of this adapter was complete."""
        record = self._records.get(digest)
        if record is not None and record.aside_s and now >= record.aside_until:
            del self._records[digest]

    def aside_s(self, digest: str, now: float) -> float:
        """For how many seconds more this adapter is set aside; 0: it may be asked."""
        record = self._records.get(digest)
        return 0.0 if record is None else max(0.0, record.aside_until - now)

    def aside(self, now: float) -> tuple[str, ...]:
        """All adapters that are set aside."""
        return tuple(digest for digest, record in self._records.items() if record.aside_until > now)
