"""G5: the first token of an adapter that is on disk only, and what bringing it costs streams that are under way."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.screen import note
from loadtests.bench_home import Furnished, Kind, add_adapters
from loadtests.bench_shell import BenchFailed
from loadtests.closed_loop import Answered, HttpSide, Prompter, connect, stream
from loadtests.figures import percentile
from loadtests.prefill_stall import Streams, gaps_ms
from loadtests.stage import engine_limit
from loadtests.swap_side import Size, median, served

LARGE = Kind(rank=32)  # 20 MB on SmolLM2-135M
COLD_EVERY_S = 5.0
STREAMS = 15
_ADAPTERS = 12
_ON_HOST = 4
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cold:
    """First tokens of a cold adapter. Times in ms, medians. on_disk: its pages not in memory; in_pages: they are.

    raw_read: how long the disk takes for the same bytes; sources: what the server says the cold ones came from.
    """

    megabytes: float
    warm: float
    on_disk: float
    in_pages: float
    raw_read: float
    sources: tuple[str, ...]
    loaded_warm: float
    loaded_cold: float
    step: float
    warm_p99: float
    cold_p99: float

    @property
    def added_idle(self) -> float:
        """What a load adds when nobody else asks."""
        return self.on_disk - self.warm

    @property
    def added_loaded(self) -> float:
        """What it adds beside streams, less the step that it may have to wait for."""
        return self.loaded_cold - self.loaded_warm - self.step

    @property
    def streams(self) -> float:
        """How much longer the p99 gap of streams is while adapters are loaded."""
        return self.cold_p99 / self.warm_p99


def cold_loads(home: Furnished, prompter: Prompter, size: Size, log: Path, threads: int | None) -> Cold:
    """Measure cold first tokens, alone and beside streams, on a server whose host tier holds four adapters."""
    bytes_each = LARGE.size_bytes(home.base.modules)
    versions = add_adapters(home, "cold", _ADAPTERS, LARGE)
    memory = ["--slots", str(_ON_HOST), "--host-mib", str(max(1, _ON_HOST * bytes_each // _MIB))]
    with served(home, versions, log, threads, *memory) as side, contextlib.closing(connect(side.url)) as line:

        def first(target: int) -> Answered:
            return stream(line, side.models[target], prompter.ask(target, prompt_tokens=8, max_tokens=1))

        note(f"asking each of {len(versions)} adapters of {bytes_each / 1e6:.0f} MB once")
        for target in range(1, len(versions) + 1):
            first(target)
        cycle = Cycle(len(versions), first=2)  # the streams keep the first
        pages: dict[bool, list[Answered]] = {True: [], False: []}
        warm: list[float] = []
        reads: list[float] = []
        for turn in range(2 * size.pairs):
            dropped = turn % 2 == 0
            if dropped:
                reads.append(drop_pages(home.home.root, bytes_each))
            target = cycle.next()
            pages[dropped].append(first(target))
            warm.append(first(target).ttft_s * 1e3)
        note("cold and warm adapters in turns beside streams")
        beside = _beside_streams(side, prompter, size, cycle)
    return Cold(
        megabytes=round(bytes_each / 1e6, 1),
        warm=median(warm),
        on_disk=median([a.ttft_s * 1e3 for a in cold_ones(pages[True])]),
        in_pages=median([a.ttft_s * 1e3 for a in cold_ones(pages[False])]),
        raw_read=median(reads),
        sources=tuple(sorted({a.cache or "untold" for found in pages.values() for a in cold_ones(found)})),
        **beside,
    )


def cold_ones(answers: Sequence[Answered]) -> list[Answered]:
    """Those whose adapter lay neither on the device nor on the host, as far as the server says.

    Raises BenchFailed when there is none: a warm figure is no cold one.
    """
    found = [a for a in answers if a.cache not in ("device", "host")]
    if not found:
        raise BenchFailed("no adapter was cold, by the server's x-adapter-cache; its host tier holds them all")
    return found


class Cycle:
    """Adapters `first` to `count` in turn: whatever keeps the most recent ones never has the next."""

    def __init__(self, count: int, first: int = 1) -> None:
        self._first, self._span, self._at = first, count - first + 1, -1

    def next(self) -> int:
        """The one that was asked longest ago."""
        self._at += 1
        return self._first + self._at % self._span

    @property
    def last(self) -> int:
        """The one that was asked last."""
        return self._first + max(0, self._at) % self._span


def _beside_streams(side: HttpSide, prompter: Prompter, size: Size, cycle: Cycle) -> dict[str, float]:
    """The fields of Cold that need streams: windows of warm and of cold requests alternate within them."""
    targets = [k % 2 for k in range(STREAMS)]  # half of them base, half on the first adapter
    streams = Streams(side, prompter, targets, engine_limit(side.url, "model_len"))
    windows: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    asked: dict[bool, list[Answered]] = {True: [], False: []}
    try:
        streams.start()
        # Opened now: a server hangs up on who says nothing for long.
        with contextlib.closing(connect(side.url)) as line:
            for turn in range(2 * size.windows):
                cold = turn % 2 == 1
                begun = time.perf_counter()
                pick = cycle.next if cold else lambda: cycle.last
                asked[cold] += _intrude(line, side, prompter, pick, begun + size.window_s)
                windows[cold].append((begun, time.perf_counter()))
    finally:
        streams.stop()
    calm, rough = gaps_ms(streams.times, windows[False]), gaps_ms(streams.times, windows[True])
    if not calm or not rough:
        raise BenchFailed("too few tokens came beside the loads; measure for longer")
    return {
        "loaded_warm": median([a.ttft_s * 1e3 for a in asked[False]]),
        "loaded_cold": median([a.ttft_s * 1e3 for a in cold_ones(asked[True])]),
        "step": median(calm),
        "warm_p99": percentile(calm, 99) or 0.0,
        "cold_p99": percentile(rough, 99) or 0.0,
    }


def _intrude(
    line: http.client.HTTPConnection, side: HttpSide, prompter: Prompter, pick: Callable[[], int], until: float
) -> list[Answered]:
    """Ask for one token of an adapter every five seconds until then; the answers."""
    found = []
    while (now := time.perf_counter()) < until:
        target = pick()
        answer = stream(line, side.models[target], prompter.ask(target, prompt_tokens=8, max_tokens=1))
        found.append(answer)
        time.sleep(max(0.0, min(now + COLD_EVERY_S, until) - time.perf_counter()))
    return found


def drop_pages(root: Path, size_bytes: int) -> float:
    """Let the system forget the files under `root`; returns how long so many bytes take to read then, in ms."""
    files: list[tuple[int, Path]] = []
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                files.append((path.stat().st_size, path))
    if not files:
        raise BenchFailed(f"there are no files under {root}")
    # One as large as an adapter: a server may still hold pages of the base's files, and those are not forgotten.
    _, chosen = min(files, key=lambda sized: abs(sized[0] - size_bytes))
    begun = time.perf_counter()
    with chosen.open("rb", buffering=0) as file:
        got = len(file.read(size_bytes))
        took = time.perf_counter() - begun
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return took * 1e3 * size_bytes / max(1, got)
