"""Who owns which row of the KV cache, and what the free ones still hold.

Rows, not pages: a row is one sequence's whole context, reserved at admission. On the CPU untouched memory of a row
costs nothing, a row's keys lie in one piece (attention reads a view, no gather), and the books are small. A free row
keeps what was computed in it until somebody needs the row: a later prompt that begins alike starts behind it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Below this a prefix is not worth a copy, nor the loss of what a row holds besides: the first tokens of all
# conversations are alike.
MIN_SHARED = 16


class Scope(NamedTuple):
    """Whose keys and values may serve whom: one tenant's, under one adapter (its digest; None is the base).

    The base's digest belongs to the key too; an engine holds one base for its whole life.
    """

    salt: str
    adapter: str | None


class Copy(NamedTuple):
    """Give row `target` the first `length` positions of row `source`."""

    source: int
    target: int
    length: int


class Lease(NamedTuple):
    """A row that was acquired. reused: prompt tokens that need not be computed; source: the row they lie in."""

    row: int
    reused: int = 0
    source: int | None = None


class RowsExhausted(Exception):
    """No row is free; the scheduler waits for one."""


@dataclass(frozen=True, slots=True)
class _Kept:
    scope: Scope
    tokens: tuple[int, ...]


@dataclass(slots=True)
class RowTable:
    """Rows 0..rows-1. Blank rows go first, the lowest of them, so that those in use stay a short prefix; then the one
    whose content is the oldest."""

    rows: int
    _blank: list[int] = field(init=False)
    _kept: dict[int, _Kept] = field(init=False, default_factory=dict)
    _held: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._blank = list(range(self.rows))

    @property
    def held(self) -> int:
        """How many rows are in use."""
        return len(self._held)

    @property
    def free(self) -> int:
        """How many rows can be had."""
        return len(self._blank) + len(self._kept)

    def acquire(self, scope: Scope | None = None, prompt: Sequence[int] = ()) -> Lease:
        """A free row for a prompt; scope None: nothing is reused. Raises RowsExhausted when there is none.

        A row whose content goes on in the prompt is taken itself; from any other the prefix is to be copied. The last
        prompt token is never reused, since its logits are wanted.
        """
        if not self.free:
            raise RowsExhausted
        source, shared = self._best(scope, prompt)
        if source is not None and shared + MIN_SHARED > len(self._kept[source].tokens):
            row = source
        elif self._blank:
            row = heapq.heappop(self._blank)
        else:
            row = next(iter(self._kept))
        self._kept.pop(row, None)
        self._held.add(row)
        return Lease(row, shared, source)

    def _best(self, scope: Scope | None, prompt: Sequence[int]) -> tuple[int | None, int]:
        best, most = None, MIN_SHARED - 1
        for row, kept in self._kept.items():
            if kept.scope == scope:
                shared = min(shared_prefix(kept.tokens, prompt), len(prompt) - 1)
                if shared > most:
                    best, most = row, shared
        return (None, 0) if best is None else (best, most)

    def release(self, row: int, scope: Scope | None = None, tokens: tuple[int, ...] = ()) -> None:
        """Give a row back; scope and tokens: what was computed in it. Raises KeyError for a row that is not held."""
        self._held.remove(row)
        if scope is not None and len(tokens) >= MIN_SHARED:
            self._kept[row] = _Kept(scope, tokens)
        else:
            heapq.heappush(self._blank, row)

    def balanced(self) -> bool:
        """Each row is in exactly one of three places: true between any two calls."""
        places = [*self._blank, *self._kept, *self._held]
        return len(places) == self.rows and len(set(places)) == self.rows


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens are the same. Slices are compared, halving: a loop in Python would cost milliseconds."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
