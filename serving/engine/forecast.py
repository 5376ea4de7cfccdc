"""How long a sequence will wait, from how long others did: exponential means of loads and of rows' use.

Nothing is forecast before something was seen, and a forecast is only ever used to refuse what would fail anyway and to
say when to come back. Knows no clock: durations are given.
"""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest figure
_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 119.0


class Mean:
    """An exponential mean; 0 before the first figure."""

    def __init__(self) -> None:
        self.value, self.seen = 0.0, False

    def learn(self, figure: float) -> None:
        """Take a figure in."""
        self.value = self.value + _WEIGHT * (figure - self.value) if self.seen else figure
        self.seen = True


class Forecast:
    """Of one engine with so many rows. Sizes in bytes; a load's figures are kept by source and power of two of its
    size, and what has not been seen is forecast by the nearest figure that has."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._loads: dict[tuple[str | None, int | None], Mean] = {}
        self._held_s, self._cost = Mean(), Mean()

    @property
    def cost(self) -> float:
        """Virtual tokens of a sequence, from its prompt to its end."""
        return self._cost.value or 1.0

    def loaded(self, source: str, size: int, seconds: float) -> None:
        """A load from this tier took so long, as those saw it who waited for it."""
        for at in _likeness(source, size):
            self._loads.setdefault(at, Mean()).learn(seconds)

    def ended(self, held_s: float, cost: int) -> None:
        """A sequence is complete: for how many row-seconds it held rows, and what it cost in virtual tokens."""
        self._held_s.learn(held_s)
        self._cost.learn(cost)

    def load_s(self, source: str, size: int) -> float:
        """Seconds of a load. size 0: unknown."""
        found = next((mean for at in _likeness(source, size) if (mean := self._loads.get(at))), None)
        return 0.0 if found is None else found.value

    def wait_s(self, ahead: int, free: int) -> float:
        """Seconds until a row can be had, with so many ahead in turn and so many rows free now."""
        return max(0, ahead + 1 - free) * self._held_s.value / self._rows

    def retry_s(self, waiting: int) -> float:
        """When a full queue is worth another try: once a quarter of those who wait now have started. Not as soon as
        there is one place, for which all who were refused would come back together."""
        return self.clamp(self.wait_s(max(1, waiting // 4), 1))

    @staticmethod
    def clamp(seconds: float) -> float:
        """A wait as a client is told it."""
        return min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)


def _likeness(source: str, size: int) -> tuple[tuple[str | None, int | None], ...]:
    """Where a load's figures are kept, what is most like it first."""
    return (source, size.bit_length()), (source, None), (None, None)
