"""Which replica takes a sequence: by where its adapter lies, what else waits there, and what it has read before.

Pure: heartbeats and what was sent since go in, names come out. Residency and load are one figure, so that a full
replica with the adapter loses to an empty one that has to load it; among equals two are drawn and the emptier taken.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serving.engine.request import Heartbeat

# Where an adapter is, seen from one replica: the better, the sooner its first token.
DEVICE, HOST, FREE_SLOT, EVICTABLE, FULL = 1.0, 0.7, 0.6, 0.3, 0.0
# The same prompt is being computed there now (the choices of one request), or a part of it was.
TOGETHER, PREFIX = 0.75, 0.25
# A replica with all rows taken is worth half an adapter less; beyond that each round of waiting costs a whole one.
_BUSY, _WAITING = 0.5, 1.0
# Scores this near are equal: what tells them apart is noise.
EQUAL = 0.05
# An adapter is copied once it fills this share of the rows of those who have it.
HOT_SHARE = 0.5
_HOT_HALF_LIFE_S = 2.0
# A sequence that was sent is in the second heartbeat after it at the latest.
_BEATS_TO_SHOW = 2
_SHORTEST_PREFIX = 16
_REMEMBERED = 16384
# Why an adapter may be set aside on one replica and be well on the next; other reasons lie in the adapter.
_ITS_OWN_FAULT = "slot_contents"

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica, for one sequence. load: sequences there a row; 1 means that all rows are taken.

    residency: one of the figures above. overlap: 0 to 1, of the prompt. adapters: how many lie there.
    """

    name: str
    residency: float
    load: float
    overlap: float = 0.0
    together: bool = False
    adapters: int = 0

    @property
    def score(self) -> float:
        """The higher, the sooner this replica answers."""
        bonus = TOGETHER if self.together else PREFIX * self.overlap
        return self.residency + bonus - _BUSY * min(self.load, 1.0) - _WAITING * max(0.0, self.load - 1.0)


def choose(candidates: Sequence[Candidate], rng: random.Random) -> Candidate:
    """The replica to send to. Raises ValueError when there is none."""
    best = max(candidate.score for candidate in candidates)
    equals = [candidate for candidate in candidates if candidate.score >= best - EQUAL]
    drawn = rng.sample(equals, min(2, len(equals)))
    return min(drawn, key=lambda candidate: (candidate.load, candidate.adapters))


class Ledger:
    """What one replica holds and does: its last heartbeat, corrected by what we sent since and what ended since."""

    def __init__(self) -> None:
        self.beat: Heartbeat | None = None
        self._live: Counter[str | None] = Counter()
        self._prompts: Counter[int] = Counter()
        self._recent: dict[str, int] = {}
        self._peak = 0
        self._foreign = 0

    @property
    def ours(self) -> int:
        """Sequences of ours that have not ended."""
        return self._live.total()

    @property
    def rows(self) -> int:
        """Rows of its batch."""
        return max(1, self.beat.rows) if self.beat is not None else 1

    @property
    def load(self) -> float:
        """Sequences there, ours and others', a row."""
        return (self.ours + self._foreign) / self.rows

    @property
    def adapters(self) -> int:
        """Adapters in its slots, or on the way there."""
        return len(self._taken())

    def sent(self, adapter: str | None, prompts: Iterable[int]) -> None:
        """A sequence goes there. prompts: any numbers that equal prompts have in common."""
        self._live[adapter] += 1
        self._prompts.update(prompts)
        self._peak = max(self._peak, self.ours)
        if adapter is not None:
            self._recent[adapter] = _BEATS_TO_SHOW

    def ended(self, adapter: str | None, prompts: Iterable[int]) -> None:
        """A sequence that was sent is over, however it ended."""
        _take_one(self._live, adapter)
        for prompt in prompts:
            _take_one(self._prompts, prompt)

    def heard(self, beat: Heartbeat) -> None:
        """A new heartbeat came. What it counts beyond the most we had there since the last one is others'."""
        self.beat = beat
        self._foreign = max(0, beat.running + beat.waiting - self._peak)
        self._peak = self.ours
        self._recent = {
            digest: left if digest in self._live else left - 1
            for digest, left in self._recent.items()
            if digest in self._live or left > 1
        }

    def lost(self) -> None:
        """The connection is gone: nothing of others is known any more. Ours end one by one."""
        self._foreign = 0
        self._recent = {}

    def running(self, prompt: int) -> bool:
        """Whether a sequence with this prompt is being computed there."""
        return prompt in self._prompts

    def demand(self) -> Counter[str]:
        """Our sequences there by adapter; the base is not counted."""
        return Counter({digest: count for digest, count in self._live.items() if digest is not None})

    def residency(self, adapter: str | None) -> float:
        """Where an adapter is, seen from here; the base is everywhere."""
        if adapter is None:
            return DEVICE
        beat, taken = self.beat, self._taken()
        if beat is None:
            return DEVICE if adapter in taken else FREE_SLOT
        if any(s.digest == adapter and s.seconds > 0 and s.reason == _ITS_OWN_FAULT for s in beat.set_aside):
            return FULL
        if adapter in taken:
            return DEVICE
        if adapter in beat.host_digests:
            return HOST
        if len(taken) < beat.slots_total:
            return FREE_SLOT
        kept = {*beat.pinned, *self._live, *self._recent}
        evictable = any(not slot.leases and slot.digest not in kept for slot in beat.slots)
        return EVICTABLE if evictable else FULL

    def _taken(self) -> set[str]:
        """Adapters in slots, or sent there and not told of yet."""
        slots = {slot.digest for slot in self.beat.slots} if self.beat is not None else set()
        return slots | self._recent.keys() | {digest for digest in self._live if digest is not None}


def _take_one(counter: Counter[_Key], key: _Key) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]


class PrefixMemory:
    """Which replica has read which beginnings of prompts: a hint, bounded, and wrong at times without harm."""

    def __init__(self, limit: int = _REMEMBERED) -> None:
        self._limit = limit
        self._known: OrderedDict[tuple[int, str], None] = OrderedDict()

    def marks(self, tenant: str, adapter: str | None, prompt: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(length, key) of a prompt's beginnings, the longest first: all of it, and powers of two below."""
        lengths = {len(prompt)}
        length = _SHORTEST_PREFIX
        while length < len(prompt):
            lengths.add(length)
            length *= 2
        return tuple((n, hash((tenant, adapter, tuple(prompt[:n])))) for n in sorted(lengths, reverse=True))

    def overlap(self, marks: Sequence[tuple[int, int]], replica: str) -> float:
        """The share of a prompt that the replica has read, by its marks."""
        longest = marks[0][0]
        return next((length / max(1, longest) for length, key in marks if (key, replica) in self._known), 0.0)

    def remember(self, marks: Sequence[tuple[int, int]], replica: str) -> None:
        """The replica reads this prompt now."""
        for _, key in marks:
            self._known[key, replica] = None
            self._known.move_to_end((key, replica))
        while len(self._known) > self._limit:
            self._known.popitem(last=False)


class Heat:
    """How many rows each adapter fills, smoothed: a burst of a moment is worth no copy. now: seconds."""

    def __init__(self) -> None:
        self._rows: dict[str, float] = {}
        self._at: float | None = None

    def note(self, demand: Mapping[str, int], now: float) -> None:
        """The rows that are filled now."""
        passed = now - self._at if self._at is not None else 0.0
        keep = 0.5 ** (passed / _HOT_HALF_LIFE_S)
        self._at = now
        both = {d: self._rows.get(d, 0.0) * keep + demand.get(d, 0) * (1 - keep) for d in {*self._rows, *demand}}
        self._rows = {digest: rows for digest, rows in both.items() if rows > 0.01}

    def copies(self, replicas: Mapping[str, Ledger], arriving: Iterable[tuple[str, str]] = ()) -> list[tuple[str, str]]:
        """(digest, replica) to warm next: adapters too hot for those who have them, each at one more replica;
        none that is being dropped anywhere.

        arriving: copies under way; they count as there.
        """
        found: list[tuple[str, str]] = []
        coming = set(arriving)
        least = HOT_SHARE * min((ledger.rows for ledger in replicas.values()), default=0)
        going = {digest for ledger in replicas.values() if ledger.beat is not None for digest in ledger.beat.dropping}
        hot = [item for item in self._rows.items() if item[1] > least and item[0] not in going]
        hottest = sorted(hot, key=lambda item: (-item[1], item[0]))
        for digest, rows in hottest:
            near = {n: ledger.residency(digest) for n, ledger in replicas.items()}
            having = [n for n, where in near.items() if where >= HOST or (digest, n) in coming]
            if not having or rows <= HOT_SHARE * sum(replicas[n].rows for n in having):
                continue
            others = [n for n, where in near.items() if n not in having and where > FULL]
            if others:
                found.append((digest, min(others, key=lambda n: (-near[n], replicas[n].load, n))))
        return found
