"""What came of canaries and shadows in this gateway, counted by trial and arm. No sockets, no registry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from adapters.canaries import Arm, ArmFigures, Figures, ShadowFigures, bucket_of
from adapters.errors import (
    AdapterCapacity,
    AdapterUnloaded,
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineLost,
    InvalidRequest,
    NotReady,
    QueueFull,
    VersionRetired,
    VersionRevoked,
)
from serving.answers import Ended, Observer

COMPLETE = "complete"
# What the caller did, what hits both arms alike, and what somebody decided: no fault of a version.
_NOBODYS_FAULT = frozenset(
    {
        COMPLETE,
        Cancelled.code,
        QueueFull.code,
        AdapterCapacity.code,
        NotReady.code,
        EngineLost.code,
        InvalidRequest.code,
        ContextLengthExceeded.code,
        AdapterUnloaded.code,
        VersionRetired.code,
        VersionRevoked.code,
    }
)
# A deadline shorter than this is the caller's wish, and could be made to end any canary.
PATIENT_S = 10.0


def is_fault(outcome: str, total_s: float) -> bool:
    """Whether a request's outcome speaks against the version that it was sent to. total_s: how long it went on."""
    if outcome == DeadlineExceeded.code:
        return total_s >= PATIENT_S
    return outcome not in _NOBODYS_FAULT


class Tally:
    """What this gateway has counted since its start, by trial and arm. Implements serving.answers.Observer."""

    def __init__(self) -> None:
        self._arms: defaultdict[tuple[str, Arm], ArmFigures] = defaultdict(ArmFigures)
        self._shadows: defaultdict[str, ShadowFigures] = defaultdict(ShadowFigures)
        self._changed: set[tuple[str, Arm]] = set()

    def tokens_came(self, gap_s: float) -> None:
        """Nothing is counted by the token."""

    def ended(self, record: Ended) -> None:
        """A request is over; it counts where it took an arm of a canary."""
        taken = record.taken
        if taken is None:
            return
        key = (taken.trial, taken.arm)
        old = self._arms[key]
        counts = list(old.first_token)
        if record.first_token_s is not None:
            counts[bucket_of(record.first_token_s)] += 1
        self._arms[key] = ArmFigures(
            requests=old.requests + 1,
            errors=old.errors + is_fault(record.outcome, record.total_s),
            tokens=old.tokens + record.usage.completion_tokens,
            first_token=tuple(counts),
        )
        self._changed.add(key)

    def shadowed(self, trial: str, came: ShadowFigures) -> None:
        """A shadow is over: add what came of it."""
        old = self._shadows[trial]
        self._shadows[trial] = ShadowFigures(
            shadows=old.shadows + came.shadows,
            dropped=old.dropped + came.dropped,
            failed=old.failed + came.failed,
            compared=old.compared + came.compared,
            agreed=old.agreed + came.agreed,
            gap=old.gap + came.gap,
        )
        self._changed.add((trial, Arm.SHADOW))

    def changed(self) -> Figures:
        """The whole figures of every arm that something was added to since the last call."""
        keys, self._changed = self._changed, set()
        return {key: self._shadows[key[0]] if key[1] is Arm.SHADOW else self._arms[key] for key in keys}

    def again(self, figures: Figures) -> None:
        """What `changed` gave could not be kept: give it again the next time."""
        self._changed |= set(figures)

    def forget(self, running: Collection[str]) -> None:
        """Drop what was counted of trials that run no longer, once it has been kept."""
        for key in [k for k in self._arms if k[0] not in running and k not in self._changed]:
            del self._arms[key]
        for trial in [t for t in self._shadows if t not in running and (t, Arm.SHADOW) not in self._changed]:
            del self._shadows[trial]


class Audience:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        """Let one more observer hear of everything from now on."""
        self._observers.append(observer)

    def tokens_came(self, gap_s: float) -> None:
        """See serving.answers.Observer."""
        for observer in self._observers:
            observer.tokens_came(gap_s)

    def ended(self, record: Ended) -> None:
        """See serving.answers.Observer."""
        for observer in self._observers:
            observer.ended(record)
