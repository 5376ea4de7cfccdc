"""Timed steps: cases that take turns, and what their steps came to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Case(Protocol):
    """Something to time. rows: how many tokens one step makes."""

    name: str
    rows: int

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps, prefill not counted."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One case: median and best step in ms, tokens/s at the median, and that over the base's of the same batch."""

    case: str
    batch: int
    ms: float
    best_ms: float
    tokens_per_s: float
    to_base: float | None

    COLUMNS = ("CASE", "ROWS", "MS A STEP", "BEST", "TOK/S", "OF BASE")

    def row(self) -> tuple[str, ...]:
        """A line of the table."""
        ratio = "-" if self.to_base is None else f"{self.to_base:.2f}"
        return (
            self.case,
            str(self.batch),
            f"{self.ms:.1f}",
            f"{self.best_ms:.1f}",
            f"{self.tokens_per_s:.0f}",
            ratio,
        )


def interleaved(cases: Sequence[Case], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every step of every case, the cases taking turns; a first round warms up and does not count."""
    found: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(rounds + 1):
        for case in cases:
            took = case.steps(steps if turn else 2)
            if turn:
                found[case.name] += took
    return found


def figure(case: Case, seconds: Sequence[float], base_tokens_per_s: float | None = None) -> Figure:
    """The figure of a case's steps."""
    median = statistics.median(seconds)
    rate = case.rows / median
    ratio = None if base_tokens_per_s is None else round(rate / base_tokens_per_s, 3)
    return Figure(case.name, case.rows, round(median * 1e3, 2), round(min(seconds) * 1e3, 2), round(rate, 1), ratio)


def against(ours: Case, peer: Case, rounds: int, steps: int) -> tuple[Figure, Figure]:
    """Our figure and a peer's, measured in turns with each other."""
    times = interleaved([ours, peer], rounds, steps)
    return figure(ours, times[ours.name]), figure(peer, times[peer.name])
