"""G6: twice as many adapters as slots, with few of them in flight and with all."""

from __future__ import annotations

import os
import random
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.home import Home
from adapters.screen import note
from loadtests.bench_home import Furnished, add_adapters
from loadtests.closed_loop import Answered, Ask, HttpSide, Prompter, Round, Workload
from loadtests.shapes import ALL16
from loadtests.swap_side import Size, hits, median, served

SLOTS = 8  # of the server that thrashes
PATIENCE_S = 2.0  # of the scheduler
_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class Thrash:
    """Eight slots and sixteen adapters. Times in ms, medians; tok/s.

    warm, cycled, drawn: first tokens of four callers on four adapters; on all sixteen in turn, the worst case of slots
    that keep the most recent; and on any. fits, over: sixteen callers on sixteen adapters, in as many slots and in
    half of them, where only half of the rows can run. longest: the longest wait for a first token there. overtaken: see
    `overtaken`. full_fits, full_over: two callers on each adapter, so that half of the slots have work for all rows.
    """

    warm: float
    cycled: float
    drawn: float
    hit_ratio: float | None
    fits: float
    over: float
    wait: float
    longest: float
    overtaken: int
    full_fits: float
    full_over: float

    @property
    def slower(self) -> float:
        """First tokens in the worst case to warm ones."""
        return self.cycled / self.warm

    @property
    def kept(self) -> float:
        """The share of throughput that is left with half the slots."""
        return self.over / self.fits

    @property
    def full_kept(self) -> float:
        """The same where slots, and not rows, are what is short."""
        return self.full_over / self.full_fits


def thrash(home: Furnished, prompter: Prompter, size: Size, folder: Path, threads: int | None) -> Thrash:
    """Measure on two servers, one with slots for all and one with half of them, which take turns."""
    versions = add_adapters(home, "thrash", 2 * SLOTS, ALL16)
    warm: list[Answered] = []
    cycled: list[Answered] = []
    drawn: list[Answered] = []
    rng = random.Random(0)
    # A home has one server: the other one serves a copy of it.
    twin = copied(home, folder / "twin")
    with (
        served(home, versions, folder / "half.log", threads, "--slots", str(SLOTS)) as half,
        served(twin, versions, folder / "all.log", threads, "--slots", str(2 * SLOTS)) as whole,
    ):
        whole.pause()
        callers, asked = SLOTS // 2, 3 * size.requests + 1
        for turn in range(size.rounds + 1):
            note(f"first tokens with {SLOTS} slots, {f'round {turn} of {size.rounds}' if turn else 'warm-up'}")
            for found, adapters, pick in (
                (warm, callers, None), (cycled, 2 * SLOTS, None), (drawn, 2 * SLOTS, rng),
            ):  # fmt: skip
                answers = half.drive(in_turn(prompter, callers, adapters, asked, pick)).answers
                found += answers if turn else ()
        half.pause()
        everybody = tuple(range(1, 2 * SLOTS + 1))
        over = Workload(f"{2 * SLOTS} in flight", everybody)
        rounds = rounds_in_turn([half, whole], over, prompter, size)
        full = rounds_in_turn([half, whole], Workload("two callers on each", 2 * everybody), prompter, size)
    served_over = [a for r in rounds[half.name] for a in r.answers]
    waits = [a.ttft_s * 1e3 for a in served_over]
    return Thrash(
        warm=median([a.ttft_s * 1e3 for a in warm]),
        cycled=median([a.ttft_s * 1e3 for a in cycled]),
        drawn=median([a.ttft_s * 1e3 for a in drawn]),
        hit_ratio=hits(cycled),
        fits=_tokens_per_s(rounds[whole.name]),
        over=_tokens_per_s(rounds[half.name]),
        wait=median(waits),
        longest=round(max(waits), 2),
        overtaken=sum(overtaken(r.answers) for r in rounds[half.name]),
        full_fits=_tokens_per_s(full[whole.name]),
        full_over=_tokens_per_s(full[half.name]),
    )


def _tokens_per_s(rounds: Sequence[Round]) -> float:
    return round(statistics.median(r.tokens_per_s for r in rounds), 1)


def in_turn(
    prompter: Prompter, callers: int, adapters: int, requests: int, rng: random.Random | None = None
) -> list[list[Ask]]:
    """Requests of each caller: together they ask one adapter after the other, or any of them with `rng`."""
    return [
        [
            prompter.ask(1 + (rng.randrange(adapters) if rng else (k * callers + c) % adapters), max_tokens=32)
            for k in range(requests)
        ]
        for c in range(callers)
    ]


def rounds_in_turn(
    sides: Sequence[HttpSide], workload: Workload, prompter: Prompter, size: Size
) -> dict[str, list[Round]]:
    """Rounds of each side, the sides taking turns; a first one warms up. They come paused and are left so."""
    found: dict[str, list[Round]] = {side.name: [] for side in sides}
    for turn in range(size.rounds + 1):
        for side in sides if turn % 2 else tuple(reversed(sides)):
            note(f"{workload.name}: {side.name}, {f'round {turn} of {size.rounds}' if turn else 'warm-up'}")
            side.resume()
            clients = prompter.clients(workload, size.requests) if turn else prompter.clients(workload, 1, 8)
            done = side.drive(clients)
            side.pause()
            if turn:
                found[side.name].append(done)
    return found


def overtaken(answers: Sequence[Answered], patience_s: float = PATIENCE_S + _GRACE_S) -> int:
    """Requests that got their first token after one that came more than the patience later: starved, if only a bit."""
    return sum(
        any(b.begun > a.begun + patience_s and b.pieces[0] < a.pieces[0] for b in answers) for a in answers if a.pieces
    )


def copied(home: Furnished, root: Path) -> Furnished:
    """The same home somewhere else, with a registry of its own; files that never change are shared."""

    def link(source: str, target: str) -> None:
        if Path(source).suffix.startswith(".sqlite") or Path(source).name.endswith(".lock"):
            shutil.copy2(source, target)
        else:
            os.link(source, target)

    shutil.copytree(home.home.root, root, copy_function=link)
    return replace(home, home=Home.find(root))
