"""How often adapters were loaded, from where, and how long it took."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from serving.engine.request import LOAD_BUCKETS_S


@dataclass(slots=True)
class LoadCounts:
    """How often, and for how long, adapters were brought from where; keys are tiers, `failed` among them.

    histograms: by key, loads that took at most each of LOAD_BUCKETS_S, and all of them last.
    """

    loads: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _buckets: dict[str, list[int]] = field(default_factory=dict)

    def count(self, source: str, seconds: float) -> None:
        """Book one load."""
        self.loads[source] = self.loads.get(source, 0) + 1
        self.seconds[source] = self.seconds.get(source, 0.0) + seconds
        buckets = self._buckets.setdefault(source, [0] * (len(LOAD_BUCKETS_S) + 1))
        buckets[bisect_left(LOAD_BUCKETS_S, seconds)] += 1

    @property
    def histograms(self) -> dict[str, tuple[int, ...]]:
        """See LoadCounts."""
        found: dict[str, tuple[int, ...]] = {}
        for source, buckets in self._buckets.items():
            total = 0
            found[source] = tuple(total := total + count for count in buckets)
        return found
