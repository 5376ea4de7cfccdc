"""How many engine replicas there are to be: a fixed number, or between two bounds by the load that engines report."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from adapters.errors import ConfigInvalid

MOST = 64


@dataclass(frozen=True, slots=True)
class Scaling:
    """replicas: at the start; then between `lowest` and `highest`, which are equal when nothing is to change.

    target_load: sequences a row (running and waiting) that a replica is meant to have. up_after_s, down_after_s: for
    how long more or fewer must be wanted before they are started or ended.
    """

    replicas: int = 1
    lowest: int = 1
    highest: int = 1
    target_load: float = 0.7
    up_after_s: float = 5.0
    down_after_s: float = 300.0

    @property
    def fixed(self) -> bool:
        """Whether the number stays."""
        return self.lowest == self.highest

    def wanted(self, loads: Collection[float], now: int) -> int:
        """Replicas for these loads, one a replica that reported; `now` while none has."""
        if not loads:
            return now
        # Rounded first: 0.7 of a row thrice is no reason for a fourth replica.
        return max(self.lowest, min(self.highest, math.ceil(round(sum(loads) / self.target_load, 6))))


def scaling(replicas: int | None, lowest: int | None, highest: int | None) -> Scaling:
    """What `--replicas`, `--min-replicas` and `--max-replicas` mean together. Raises ConfigInvalid."""
    start = replicas if replicas is not None else lowest if lowest is not None else min(1, highest or 1)
    low = lowest if lowest is not None else start
    high = highest if highest is not None else max(start, low)
    if not 1 <= low <= start <= high <= MOST:
        raise ConfigInvalid(
            f"{start} replicas between {low} and {high}: --min-replicas must be at least 1, --replicas not below it, "
            f"--max-replicas not below --replicas and at most {MOST}"
        )
    return Scaling(start, low, high)


def remark(lowest: int | None, highest: int | None, wanted: Scaling) -> str:
    """What is said of `--min-replicas` without `--max-replicas`, for it may have been meant otherwise; else nothing."""
    if lowest is None or highest is not None or not wanted.fixed:
        return ""
    engines = "1 engine" if wanted.lowest == 1 else f"{wanted.lowest} engines"
    return (
        f"{engines}, whatever the load: --min-replicas alone sets a fixed number; give --max-replicas to have it follow"
    )
