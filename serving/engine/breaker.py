"""Adapters that are set aside for a while: those that make the model's numbers infinite three times, and at once those
whose slot did not prove to hold them.

Only what an adapter did to the model counts, never what a request's own settings did: nobody can have somebody else's
adapter set aside by asking oddly.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

from serving.engine.plan import Key
from serving.engine.request import SetAsideState

STRIKES = 3
WINDOW_S = 600.0
FIRST_S = 30.0
LONGEST_S = 600.0
TRIAL_S = 1.0  # after so long to ask again, while somebody else's request tries an adapter out
KEPT = 4096  # adapters that are remembered; the longest forgotten goes first


class Doubt(StrEnum):
    """Why an adapter is set aside. Values are stable and go on the wire."""

    NUMERICS = "numerics"  # its output was not finite, again and again
    SLOT_CONTENTS = "slot_contents"  # its slot does not hold what was put there
    NO_EFFECT = "no_effect"  # from its slot the output is the base's
    GOLDEN_MISMATCH = "golden_mismatch"  # its golden rows come out otherwise


@dataclass(slots=True)
class _Record:
    strikes: list[float]
    doubt: Doubt = Doubt.NUMERICS
    aside_until: float = 0.0
    aside_s: float = 0.0
    times: int = 0
    trial: Key | None = None


class Breaker:
    """Which adapters are set aside, by digest. After its time one request tries an adapter while all others are told to
    come again: a strike or a failed proof sets it aside for twice as long, one good answer clears it."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def strike(self, digest: str, now: float) -> None:
        """An answer of this adapter came to nothing for its numbers."""
        record = self._record(digest)
        record.strikes = [*(at for at in record.strikes if now - at < WINDOW_S), now]
        if record.aside_s or len(record.strikes) >= STRIKES:
            self._set_aside(record, Doubt.NUMERICS, now)

    def quarantine(self, digest: str, doubt: Doubt, now: float) -> float:
        """Set an adapter aside at once; for how many seconds."""
        record = self._record(digest)
        self._set_aside(record, doubt, now)
        return record.aside_s

    def good(self, digest: str, now: float) -> None:
        """An answer of this adapter was complete."""
        record = self._records.get(digest)
        if record is not None and record.aside_s and now >= record.aside_until:
            del self._records[digest]

    def started(self, digest: str, key: Key, now: float) -> None:
        """A sequence of this adapter begins: after the adapter's time it is the one that tries it."""
        record = self._records.get(digest)
        if record is not None and record.aside_s and record.trial is None and now >= record.aside_until:
            record.trial = key

    def ended(self, digest: str, key: Key) -> None:
        """A sequence is over, however it ended: if it was the trial, the next one is."""
        record = self._records.get(digest)
        if record is not None and record.trial == key:
            record.trial = None

    def aside_s(self, digest: str, now: float) -> float:
        """For how many seconds more this adapter is set aside; 0: it may be asked."""
        record = self._records.get(digest)
        if record is None:
            return 0.0
        return max(TRIAL_S if record.trial is not None else 0.0, record.aside_until - now)

    def doubt(self, digest: str) -> Doubt | None:
        """Why this adapter is, or was last, set aside; None when it never was."""
        record = self._records.get(digest)
        return None if record is None or not record.aside_s else record.doubt

    def aside(self, now: float) -> tuple[str, ...]:
        """All adapters that are set aside."""
        return tuple(digest for digest, record in self._records.items() if record.aside_until > now)

    def listed(self, now: float, most: int = 100) -> tuple[SetAsideState, ...]:
        """Adapters that are set aside or on trial, the latest first."""
        found = [
            SetAsideState(digest, record.doubt.value, max(0.0, record.aside_until - now), record.times)
            for digest, record in reversed(self._records.items())
            if record.aside_s
        ]
        return tuple(found[:most])

    def _record(self, digest: str) -> _Record:
        record = self._records.setdefault(digest, _Record([]))
        self._records.move_to_end(digest)
        if len(self._records) > KEPT:
            self._records.popitem(last=False)
        return record

    def _set_aside(self, record: _Record, doubt: Doubt, now: float) -> None:
        record.doubt, record.trial, record.strikes = doubt, None, []
        record.aside_s = min(max(FIRST_S, 2 * record.aside_s), LONGEST_S)
        record.aside_until = now + record.aside_s
        record.times += 1
