"""Who owns which row of the KV cache.

Rows, not pages: a row is one sequence's whole context, reserved at admission. On the CPU untouched memory of a row
costs nothing, a row's keys lie in one piece (attention reads a view, no gather), and the books are one set of ints.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


class RowsExhausted(Exception):
    """No row is free; the scheduler waits for one."""


@dataclass(slots=True)
class RowTable:
    """Rows 0..rows-1. The lowest free row goes first, so that the rows in use stay a short prefix."""

    rows: int
    _free: list[int] = field(init=False)
    _held: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._free = list(range(self.rows))

    @property
    def held(self) -> int:
        """How many rows are in use."""
        return len(self._held)

    @property
    def free(self) -> int:
        """How many rows can be had."""
        return len(self._free)

    def acquire(self) -> int:
        """A free row. Raises RowsExhausted when there is none."""
        if not self._free:
            raise RowsExhausted
        row = heapq.heappop(self._free)
        self._held.add(row)
        return row

    def release(self, row: int) -> None:
        """Give a row back. Raises KeyError for a row that is not held."""
        self._held.remove(row)
        heapq.heappush(self._free, row)

    def balanced(self) -> bool:
        """free + held = all, and no row is both: true between any two calls."""
        return len(self._free) + len(self._held) == self.rows and not self._held.intersection(self._free)
