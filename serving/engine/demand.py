"""How much each adapter is asked for: a count that halves with time, so that what was popular is forgotten."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

HALF_LIFE_S = 120.0
KEPT = 8192  # adapters that are counted; the longest unasked goes first


class Demand:
    """Requests by adapter, by digest. now: seconds that only grow."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._counts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # digest -> (count, as of)

    def note(self, digest: str) -> None:
        """One more request."""
        self._counts[digest] = (self.of(digest) + 1.0, self._now())
        self._counts.move_to_end(digest)
        if len(self._counts) > KEPT:
            self._counts.popitem(last=False)

    def of(self, digest: str) -> float:
        """Requests, those of HALF_LIFE_S ago counting half."""
        count, at = self._counts.get(digest, (0.0, 0.0))
        return count * 0.5 ** ((self._now() - at) / HALF_LIFE_S) if count else 0.0
