"""What the cases of the swap bench have in common: how much is measured, a server on the home, sums."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.records import AdapterVersion
from loadtests.bench_home import Furnished
from loadtests.bench_http import start_server
from loadtests.closed_loop import Answered, HttpSide


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. many, large: adapters of G3, by kind; requests: of each client a round; pairs: cold and
    warm first tokens; window_s: of warm loads, and of cold ones."""

    many: int
    large: int
    rounds: int
    requests: int
    pairs: int
    windows: int
    window_s: float


SHORT = Size(many=200, large=24, rounds=1, requests=1, pairs=4, windows=1, window_s=10.0)
LONG = Size(many=2000, large=128, rounds=5, requests=3, pairs=24, windows=3, window_s=20.0)


@contextlib.contextmanager
def served(
    home: Furnished, versions: Sequence[AdapterVersion], log: Path, threads: int | None, *options: str
) -> Iterator[HttpSide]:
    """A server on the home, as a side whose target k is the k-th version."""
    server = start_server(home, log, threads, *options)
    try:
        models = ["base", *(v.id for v in versions)]
        name = f"served with {' '.join(options)}"
        yield HttpSide(name, server.ready(), models, pause=server.child.pause, resume=server.resume)
    finally:
        server.stop()


def hits(answers: Sequence[Answered]) -> float | None:
    """The share whose adapter lay in a slot, as the server says; None when it does not say."""
    told = [a.cache for a in answers if a.cache is not None]
    return round(told.count("device") / len(told), 3) if told else None


def median(values: Sequence[float]) -> float:
    """The median, in hundredths."""
    return round(statistics.median(values), 2)
