"""New versions under load: publish one over HTTP, promote it, and again, as whoever trains adapters would."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from adapters.errors import LoraplaneError
from adapters.records import BaseRecord
from adapters.registry_door import RegistryDoor
from loadtests.bench_home import Kind, publish_random

_FIRST_NUMBER = 1_000_001  # of random adapters: other bytes than any that were published before the load
REASON = "load test: it flips"


@dataclass(frozen=True, slots=True)
class Flip:
    """One promotion. Times of the machine's monotonic clock: when publishing began, and when the move was answered.

    error: why there was none; empty for a good one.
    """

    name: str
    number: int
    digest: str
    begun_at: float
    moved_at: float
    error: str = ""


class Flipper:
    """While it is entered, publishes and promotes a new version every `every_s`, of one name after the other."""

    def __init__(
        self,
        door: RegistryDoor,
        base: BaseRecord,
        names: Sequence[str],
        kind: Kind,
        every_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._door, self._base, self._names, self._kind = door, base, tuple(names), kind
        self._every_s, self._now = every_s, now
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flips", daemon=True)
        self.flips: list[Flip] = []

    def flip(self) -> Flip:
        """Publish and promote the next version."""
        name = self._names[len(self.flips) % len(self._names)]
        begun = self._now()
        try:
            made = publish_random(self._door, self._base, [name], self._kind, first=_FIRST_NUMBER + len(self.flips))[0]
            self._door.promote(name, made.number, reason=REASON, force=True)
            found = Flip(name, made.number, made.digest, begun, self._now())
        except LoraplaneError as error:
            found = Flip(name, 0, "", begun, self._now(), f"{error.code}: {error}")
        self.flips.append(found)
        return found

    def __enter__(self) -> Flipper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        due = self._now()
        while not self._stop.is_set():
            self.flip()
            due = max(due + self._every_s, self._now())
            self._stop.wait(max(0.0, due - self._now()))


@dataclass(frozen=True, slots=True)
class Flipped:
    """What flips came to while requests ran. seconds: median of publishing and promoting one.

    first_answer_s: median time from a promotion to the first token of the first answer by that version; answered: how
    many versions answered something.
    """

    flips: int
    failed: int
    seconds: float | None
    answered: int
    first_answer_s: float | None
    errors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def flipped(flips: Sequence[Flip], samples: Sequence[Mapping[str, Any]]) -> Flipped:
    """Sum up the flips that were answered while samples were taken; the others prove nothing."""
    ended = [s for s in samples if not s["unfinished"]]
    begin = min((s["asked_at"] for s in ended), default=0.0)
    end = max((s["asked_at"] for s in ended), default=0.0)
    during = [f for f in flips if begin <= f.moved_at <= end]
    good = [f for f in during if not f.error]
    first: list[float] = []
    for flip in good:
        times = [
            s["asked_at"] + s["ttft_ms"] / 1000
            for s in ended
            if s["named"] == f"{flip.name}@{flip.number}" and s["ttft_ms"] is not None
        ]
        if times:
            first.append(min(times) - flip.moved_at)
    return Flipped(
        flips=len(good),
        failed=len(during) - len(good),
        seconds=_median([f.moved_at - f.begun_at for f in good]),
        answered=len(first),
        first_answer_s=_median(first),
        errors=tuple(sorted({f.error for f in flips if f.error})),
    )


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None
