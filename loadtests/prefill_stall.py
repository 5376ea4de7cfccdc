"""What long prompts do to streams that are under way: the time between their tokens, with such prompts and without."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.bench_shell import BenchFailed
from loadtests.closed_loop import HttpSide, Prompter, connect, stream
from loadtests.figures import percentile

STREAMS = 15
LONG_PROMPT = 1500
EVERY_S = 3.0
_FIRST_TOKENS_S = 120.0
_SETTLE_S = 0.3
_POLL_S = 0.01
# Shorter than the context, so that prompt and answer fit whatever a prompt's words come to.
_ANSWER_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Stall:
    """Gaps between tokens in ms over all streams, in quiet times and while long prompts were computed.

    long_ttft_ms: median time to the first token of a long prompt; long_tokens: how long they were; long_prompts: how
    many came.
    """

    streams: int
    quiet_gaps: int
    busy_gaps: int
    quiet_p50_ms: float
    quiet_p99_ms: float
    busy_p50_ms: float
    busy_p99_ms: float
    long_prompts: int
    long_tokens: int
    long_ttft_ms: float

    @property
    def ratio(self) -> float:
        """How much longer the p99 gap is while long prompts come."""
        return self.busy_p99_ms / self.quiet_p99_ms

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "ratio": round(self.ratio, 3)}


def measure(
    side: HttpSide, prompter: Prompter, targets: Sequence[int], *, context: int, window_s: float, windows: int
) -> Stall:
    """Decode a stream for each target; in every other window of `window_s` a long prompt comes every 3 s.

    Quiet and busy windows alternate within the same streams, so that both see like contexts. Raises BenchFailed.
    """
    streams = Streams(side, prompter, targets, context)
    quiet: list[tuple[float, float]] = []
    busy: list[tuple[float, float]] = []
    longs: list[tuple[float, int]] = []
    try:
        streams.start()
        for _ in range(windows):
            quiet.append(_window(window_s))
            began = time.perf_counter()
            longs += _long_prompts(side, prompter, began + window_s)
            busy.append((began, time.perf_counter()))
            time.sleep(_SETTLE_S)
    finally:
        streams.stop()
    return stall(streams.times, quiet, busy, longs)


def stall(
    times: Sequence[Sequence[float]],
    quiet: Sequence[tuple[float, float]],
    busy: Sequence[tuple[float, float]],
    longs: Sequence[tuple[float, int]],
) -> Stall:
    """The figures of streams whose tokens came at these times. quiet, busy: (begin, end) of the windows.

    A gap belongs to the window in which it lies as a whole. longs: (time to first token in s, prompt tokens).
    """
    calm, rough = gaps_ms(times, quiet), gaps_ms(times, busy)
    if not calm or not rough or not longs:
        raise BenchFailed("too few tokens came to tell what long prompts do; measure for longer")
    return Stall(
        streams=len(times),
        quiet_gaps=len(calm),
        busy_gaps=len(rough),
        quiet_p50_ms=percentile(calm, 50) or 0.0,
        quiet_p99_ms=percentile(calm, 99) or 0.0,
        busy_p50_ms=percentile(rough, 50) or 0.0,
        busy_p99_ms=percentile(rough, 99) or 0.0,
        long_prompts=len(longs),
        long_tokens=round(sum(n for _, n in longs) / len(longs)),
        long_ttft_ms=percentile([s * 1e3 for s, _ in longs], 50) or 0.0,
    )


def gaps_ms(times: Sequence[Sequence[float]], windows: Sequence[tuple[float, float]]) -> list[float]:
    """Every gap between tokens, in ms, that lies within one of the windows as a whole."""
    found = []
    for one in times:
        for begin, end in windows:
            inside = one[bisect_left(one, begin) : bisect_left(one, end)]
            found += [(b - a) * 1e3 for a, b in itertools.pairwise(inside)]
    return found


def _window(seconds: float) -> tuple[float, float]:
    begin = time.perf_counter()
    time.sleep(seconds)
    return begin, time.perf_counter()


def _long_prompts(side: HttpSide, prompter: Prompter, until: float) -> list[tuple[float, int]]:
    """Ask a long prompt for the base every three seconds until then, each once the one before is answered."""
    found = []
    connection = connect(side.url)
    try:
        while (now := time.perf_counter()) < until:
            answer = stream(connection, side.models[0], prompter.ask(0, prompt_tokens=LONG_PROMPT, max_tokens=1))
            found.append((answer.ttft_s, answer.prompt_tokens))
            pause = min(now + EVERY_S, until) - time.perf_counter()
            time.sleep(max(0.0, pause))
    except (OSError, http.client.HTTPException) as error:
        raise BenchFailed(f"{side.name}: a long prompt was not answered: {error}") from error
    finally:
        connection.close()
    return found


class Streams:
    """Clients that read answers for as long as they are let, each on a thread. times: when their tokens came."""

    def __init__(self, side: HttpSide, prompter: Prompter, targets: Sequence[int], context: int) -> None:
        self.times: list[list[float]] = [[] for _ in targets]
        self._side, self._stop = side, threading.Event()
        self._errors: list[str] = []
        long = int(context * _ANSWER_SHARE)
        # Several answers each: whoever reaches the end of the context before the time is up goes on with another.
        self._asks = [[prompter.ask(target, max_tokens=long) for _ in range(4)] for target in targets]
        self._threads = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(len(targets))]

    def start(self) -> None:
        """Return once all streams have begun. Raises BenchFailed."""
        for thread in self._threads:
            thread.start()
        deadline = time.perf_counter() + _FIRST_TOKENS_S
        while not all(self.times):
            if self._errors or time.perf_counter() > deadline:
                raise BenchFailed(f"{self._side.name}: {(self._errors or ['streams did not begin'])[0]}")
            time.sleep(_POLL_S)
        time.sleep(_SETTLE_S)

    def stop(self) -> None:
        """Leave the answers where they are, and wait for the threads."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _read(self, number: int) -> None:
        times = self.times[number]

        def watch(at: float) -> bool:
            times.append(at)
            return not self._stop.is_set()

        for ask in self._asks[number]:
            connection = connect(self._side.url)
            with contextlib.closing(connection):
                try:
                    stream(connection, self._side.models[ask.target], ask, watch=watch)
                except (OSError, http.client.HTTPException, BenchFailed) as error:
                    if not self._stop.is_set():
                        self._errors.append(str(error))
                    return
            if self._stop.is_set():
                return
