"""Shadow sequences: they take a row that nobody else wants, at once or never, and give it back first.

A shadow is decided on in the step in which it came: it starts behind everybody who could, or is refused. Nothing is
loaded, placed or evicted for it: its adapter lies in a slot already, or it does not run. While it runs it is dropped as
soon as somebody who could run lacks its row or its slot. Its prompt is computed with what the others leave of a step,
and what it leaves in its row is not kept. So all others start and end in the very steps in which they would without it.
Knows no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from serving.engine.breaker import Breaker
from serving.engine.fair import FairQueue, Lane
from serving.engine.kv import RowTable
from serving.engine.plan import Key, Outgoing
from serving.engine.request import Failed
from serving.engine.sequence import Sequence
from serving.engine.slots import Placement, SlotTable

DROPPED = "shadow_dropped"


class Shadows:
    """Which shadows start and which go. queue: those who wait, all of whom come first."""

    def __init__(self, rows: RowTable, slots: SlotTable, breaker: Breaker, queue: FairQueue) -> None:
        self._rows, self._slots, self._breaker, self._queue = rows, slots, breaker, queue
        self._new: dict[Key, Sequence] = {}
        self._refused: list[Outgoing] = []

    def __len__(self) -> int:
        return len(self._new)

    def take(self, sequence: Sequence) -> None:
        """Let a shadow be decided on at the next admission."""
        self._new[sequence.key] = sequence

    def remove(self, key: Key) -> None:
        """Forget a shadow that has not been decided on."""
        self._new.pop(key, None)

    def values(self) -> Iterable[Sequence]:
        """Those that have not been decided on."""
        return self._new.values()

    def in_the_way(self, running: Iterable[Sequence]) -> Iterator[Sequence]:
        """The running shadows that must go, the youngest first. The caller drops each before it asks for the next."""
        shadows = [sequence for sequence in running if sequence.submit.shadow]
        if shadows and self._places():
            # A lease of a shadow's must not decide whose slot a newcomer gets.
            yield from (sequence for sequence in shadows if sequence.adapter is not None)
            shadows = [sequence for sequence in shadows if sequence.adapter is None]
        while shadows and self._short():
            yield shadows.pop()

    def starts(self, now: float) -> Iterator[tuple[Sequence, Placement | None]]:
        """Those that start now, once all others have, each with its lease; the rest are refused (see `refused`)."""
        new, self._new = self._new, {}
        for sequence in new.values():
            digest = sequence.adapter
            if self._rows.free and sequence.width == 1 and not self._short() and self._lies(digest, now):
                yield sequence, None if digest is None else self._slots.share(digest)
            else:
                self._refused.append((sequence.key, dropped(sequence)))

    def refused(self) -> list[Outgoing]:
        """The endings of those that did not start."""
        refused, self._refused = self._refused, []
        return refused

    def _lies(self, digest: str | None, now: float) -> bool:
        if digest is None:
            return True
        return self._slots.holds(digest) and not self._breaker.aside_s(digest, now) and not self._places()

    def _ready(self) -> list[Lane]:
        return [lane for lane in self._queue.lanes() if lane.ready]

    def _short(self) -> bool:
        """Whether those who could run need more rows than are free."""
        return sum(s.width for lane in self._ready() for s in lane.waiting.values()) > self._rows.free

    def _places(self) -> bool:
        """Whether somebody who could run needs a slot for an adapter that has none."""
        return any(
            lane.scope.adapter is not None and not self._slots.holds(lane.scope.adapter) for lane in self._ready()
        )


def dropped(sequence: Sequence) -> Failed:
    """The ending of a shadow that gives way."""
    return Failed(sequence.submit.id, DROPPED, "Its row or slot is wanted, or its adapter lies in none.")
