"""What the edge costs: a real server against the same engine in this process, and what long prompts do to streams."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from adapters.prompts import Renderer
from adapters.screen import note
from loadtests import prefill_stall
from loadtests.bench_home import Furnished, furnish, pick_base
from loadtests.bench_shell import Table, Told, add_base_options, aside, parser, run
from loadtests.closed_loop import CLIENTS, HttpSide, LoopFigure, Prompter, Side, Workload, take_turns, workloads
from loadtests.goals import ratio, verdicts
from loadtests.in_process import EngineSide, engine_config
from loadtests.prefill_stall import Stall
from loadtests.processes import ServerProcess

SERVED = "served over HTTP"
CONTEXT = 2048
_ALONE = Workload("base, 1 client", (0,))
_DISTINCT = f"{CLIENTS} distinct"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. requests: of each client a round; window_s: of quiet, and of long prompts."""

    rounds: int
    requests: int
    alone: int
    windows: int
    window_s: float


SHORT = Size(rounds=1, requests=1, alone=3, windows=1, window_s=5.0)
LONG = Size(rounds=5, requests=3, alone=8, windows=3, window_s=9.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    return run(_measure, _options(argv))


def _measure(options: argparse.Namespace) -> Told:
    size = SHORT if options.short else LONG
    with tempfile.TemporaryDirectory(prefix="loraplane-bench-") as scratch:
        base = aside(partial(pick_base, options, Path(scratch)))
        home = aside(partial(furnish, base, Path(scratch), CLIENTS))
        prompter = Prompter(Renderer(home.folder), home.base.vocab_size)
        server = start_server(home, Path(scratch) / "serve.log", options.threads)
        engines: list[EngineSide] = []
        try:
            served = served_side(server, home)
            idle = server.child.cpu_share()
            engines += _engines(home, options.threads)
            served.pause()
            figures = _loops(served, engines, prompter, size)
            stalled, left_out = _stalls(served, prompter, home, size)
        finally:
            for engine in engines:
                engine.stop()
            server.stop()
    return told(base.name, figures, stalled, idle, left_out, like=engines[0].name)


def start_server(home: Furnished, log: Path, threads: int | None, *options: str) -> ServerProcess:
    """`loraplane serve` on a furnished home, ready. options: more of its own."""
    note("starting a server")
    more = [] if threads is None else ["--threads", str(threads)]
    server = ServerProcess(home.home, log, "--base", home.base.name, "--max-model-len", str(CONTEXT), *more, *options)
    try:
        server.ready()
    except BaseException:
        server.stop()
        raise
    return server


def served_side(server: ServerProcess, home: Furnished) -> HttpSide:
    """A server's side of a comparison."""
    models = ["base", *(v.id for v in home.versions)]
    return HttpSide(SERVED, server.ready(), models, pause=server.child.pause, resume=server.resume)


def _engines(home: Furnished, threads: int | None) -> list[EngineSide]:
    """The same engine with as many threads as the served one has, and with all cores where that is more."""
    counts = sorted({engine_config(home, threads=threads or 0).num_threads, len(os.sched_getaffinity(0))})
    digests = [v.digest for v in home.versions]
    found = []
    for count in counts:
        note(f"loading an engine into this process, {count} threads")
        side = EngineSide(f"in-process, {count} threads", engine_config(home, threads=count), digests)
        found.append(side)
        # Its thread takes torch's count of threads at its first product, before the next engine sets another.
        side.warm()
    return found


def _loops(served: HttpSide, engines: Sequence[EngineSide], prompter: Prompter, size: Size) -> list[LoopFigure]:
    sides: list[Side] = [served, *engines]
    loops = [(workload, sides) for workload in workloads()]
    found = take_turns(loops, prompter, rounds=size.rounds, requests=size.requests, say=note)
    return found + take_turns([(_ALONE, sides)], prompter, rounds=size.rounds, requests=size.alone, say=note)


def _stalls(
    served: HttpSide, prompter: Prompter, home: Furnished, size: Size
) -> tuple[dict[str, Stall], tuple[str, ...]]:
    context = min(CONTEXT, home.base.max_positions)
    if context < prefill_stall.LONG_PROMPT * 1.2:
        return {}, (f"G9: the base's {context} positions hold no prompt of {prefill_stall.LONG_PROMPT} tokens",)
    served.resume()
    kinds = {"base streams": [0] * prefill_stall.STREAMS, "distinct streams": [*range(1, prefill_stall.STREAMS + 1)]}
    found = {}
    for name, targets in kinds.items():
        note(f"{name} with long prompts now and then")
        found[name] = prefill_stall.measure(
            served, prompter, targets, context=context, window_s=size.window_s, windows=size.windows
        )
    served.pause()
    return found, ()


def told(
    base: str,
    figures: Sequence[LoopFigure],
    stalls: dict[str, Stall],
    idle: float,
    left_out: Sequence[str],
    *,
    like: str,
) -> Told:
    """What the bench says. idle: cores that the server takes when nobody asks; like: the engine with its threads."""
    costs = {name: edge_cost(figures, name) for name in (w.name for w in workloads())}
    alike = [f for f in figures if f.side in (SERVED, like)]
    same = {name: edge_cost(alike, name) for name in costs}
    ttft = added_ttft(figures, _ALONE.name)
    goals = verdicts(
        {
            "G7.cost": costs[_DISTINCT],
            "G7.ttft": ttft,
            "G9": max((s.ratio for s in stalls.values()), default=None),
        }
    )
    rows = [
        (name, str(s.quiet_gaps), str(s.busy_gaps), f"{s.quiet_p99_ms:.1f}", f"{s.busy_p99_ms:.1f}", f"{s.ratio:.2f}",
         f"{s.long_ttft_ms:.0f}")
        for name, s in stalls.items()
    ]  # fmt: skip
    return Told(
        bench="http",
        report={
            "base": base,
            "loops": [asdict(f) for f in figures],
            "edge_cost": {k: None if v is None else round(v, 4) for k, v in costs.items()},
            "edge_cost_same_threads": {k: None if v is None else round(v, 4) for k, v in same.items()},
            "added_ttft_ms": {name: added_ttft(figures, name) for name in dict.fromkeys(f.workload for f in figures)},
            "long_prompts": {name: s.to_json() for name, s in stalls.items()},
            "idle_cores": round(idle, 3),
        },
        tables=(
            Table(LoopFigure.COLUMNS, [f.row() for f in figures]),
            Table(
                ("EDGE COSTS", "OF THE FASTER ENGINE", f"OF THE ONE {like.upper()}"),
                [(name, _percent(costs[name]), _percent(same[name])) for name in costs],
            ),
            Table(("LONG PROMPTS AMONG", "QUIET GAPS", "BUSY", "QUIET P99 MS", "BUSY", "RATIO", "THEIR TTFT"), rows),
        ),
        goals=goals,
        left_out=left_out,
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f} %"


def edge_cost(figures: Sequence[LoopFigure], workload: str) -> float | None:
    """The share of throughput that is lost over HTTP, against the faster of the engines in this process."""
    rates = {f.side: f.tokens_per_s for f in figures if f.workload == workload}
    served = rates.pop(SERVED, None)
    kept = ratio(served, max(rates.values(), default=None))
    return None if kept is None else 1 - kept


def added_ttft(figures: Sequence[LoopFigure], workload: str) -> float | None:
    """How much later the first token comes over HTTP, median, in ms, against the sooner of the engines here."""
    times = {f.side: f.ttft_p50_ms for f in figures if f.workload == workload}
    served = times.pop(SERVED, None)
    return None if served is None or not times else round(served - min(times.values()), 2)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(
        "bench_http",
        "A closed loop of 16 streamed clients over HTTP and without it (G7), and long prompts among streams (G9).",
        "python -m loadtests.bench_http --short",
    )
    add_base_options(found)
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
