"""How fast the engine steps, and what adapters cost: in this process, no HTTP, peers interleaved in the same run.

    python -m loadtests.bench_engine [--short] [--device cpu]

Decode steps at several batch sizes and mixtures, prefill chunks, and two peers: transformers' `generate` on a static
batch, and PEFT's `adapter_names`. A table for people, and as the last line one JSON object. Figures of one run compare
with each other only: the cases of a batch size, and a peer and our like of it, are measured in turns; medians count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.bases import DEFAULT_BASE, open_base
from adapters.home import Home
from adapters.registry_door import open_door
from adapters.screen import note, say, show_table
from loadtests.bench_cases import (
    MAX_LEN,
    Case,
    GenerateCase,
    PrefillCase,
    decode_cases,
    load_model,
    make_runner,
    random_base,
    with_peft,
)
from serving.engine.model import pick_dtype
from serving.engine.plan import NO_SLOT
from serving.engine.reading import load_decoder
from serving.engine.runner import DecoderRunner

ROWS = 16
_CHUNKS = (64, 512)


@dataclass(frozen=True, slots=True)
class Size:
    """How long the bench measures: rounds, and steps a round; peers make fewer steps, since they are slower."""

    batches: tuple[int, ...]
    rounds: int
    steps: int
    peer_steps: int
    mixed_steps: int


SHORT = Size((1, 8, 16), rounds=3, steps=8, peer_steps=8, mixed_steps=3)
LONG = Size((1, 8, 16), rounds=10, steps=24, peer_steps=16, mixed_steps=6)


@dataclass(frozen=True, slots=True)
class Figure:
    """One case: median and best step in ms, tokens/s at the median, and that over the base's of the same batch."""

    case: str
    batch: int
    ms: float
    best_ms: float
    tokens_per_s: float
    to_base: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    options = _options(argv)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    dtype = pick_dtype(options.dtype, device)
    size = SHORT if options.short else LONG
    with tempfile.TemporaryDirectory(prefix="loraplane-bench-") as folder:
        name, base = _base(options, Path(folder))
        note(f"{name}, {str(dtype).removeprefix('torch.')} on {device}, {torch.get_num_threads()} threads")
        decoder = load_decoder(base, dtype, device, MAX_LEN)
        # The two share the base's weights; only cache and slots are their own.
        on, off = make_runner(decoder, ROWS, ROWS), make_runner(decoder, ROWS, 0)
        figures, prefill = _decode(on, off, size), _prefill(on, off, size)
        pairs = [] if options.no_peers else _peers(base, dtype, device, size, on, off)
    peers = [peer for _, peer in pairs]
    told = _report(name, dtype, device, size, figures, prefill, pairs)
    show_table(
        ("CASE", "ROWS", "MS A STEP", "BEST", "TOK/S", "OF BASE"), [_row(f) for f in (*figures, *prefill, *peers)]
    )
    say("")
    show_table(("RATIO", "VALUE"), [(k, f"{v:.2f}") for k, v in told["ratios"].items()])
    say(json.dumps(told))
    return 0


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


def machine() -> dict[str, object]:
    """What the figures were had on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        **{flag: flag in flags for flag in ("avx512_bf16", "amx_bf16", "amx_tile")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _decode(on: DecoderRunner, off: DecoderRunner, size: Size) -> list[Figure]:
    figures = []
    for batch in size.batches:
        cases = decode_cases(on, off, batch)
        note(f"decode, {batch} rows, {len(cases)} mixtures")
        times = interleaved(cases, size.rounds, size.steps)
        base_rate = batch / statistics.median(times[cases[0].name])
        figures += [figure(case, times[case.name], base_rate) for case in cases]
    return figures


def _prefill(on: DecoderRunner, off: DecoderRunner, size: Size) -> list[Figure]:
    chunks: list[Case] = [
        PrefillCase(f"prefill of {tokens}, {'adapter' if slot else 'base'}", runner, tokens, slot)
        for tokens in _CHUNKS
        for runner, slot in ((off, NO_SLOT), (on, 1))
    ]
    note("prefill")
    times = interleaved(chunks, size.rounds, 2)
    figures = []
    for without, with_adapter in zip(chunks[::2], chunks[1::2], strict=True):
        base_rate = without.rows / statistics.median(times[without.name])
        figures += [figure(case, times[case.name], base_rate) for case in (without, with_adapter)]
    return figures


def _peers(
    base: Path, dtype: torch.dtype, device: torch.device, size: Size, on: DecoderRunner, off: DecoderRunner
) -> list[tuple[Figure, Figure]]:
    """Pairs of our figure and a peer's on the same work, measured in turns with each other."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ours = decode_cases(on, off, ROWS)
    note("transformers generate, static batch")
    model = load_model(base, dtype, device)
    found = [_pair(ours[0], GenerateCase("transformers generate, base", model, ROWS), size.rounds, size.peer_steps)]
    try:
        wrapped = with_peft(model, ROWS)
    except ImportError:
        note("peft is not installed; its mixed batch is left out")
        return found
    note("PEFT adapter_names, mixed batch")
    mixed = GenerateCase("PEFT adapter_names, distinct", wrapped, ROWS, [f"a{i}" for i in range(1, ROWS + 1)])
    return [*found, _pair(ours[3], mixed, max(1, size.rounds - 1), size.mixed_steps)]


def _pair(ours: Case, peer: Case, rounds: int, steps: int) -> tuple[Figure, Figure]:
    times = interleaved([ours, peer], rounds, steps)
    return figure(ours, times[ours.name]), figure(peer, times[peer.name])


def _report(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    size: Size,
    figures: Sequence[Figure],
    prefill: Sequence[Figure],
    pairs: Sequence[tuple[Figure, Figure]],
) -> dict[str, Any]:
    rates = {(f.case, f.batch): f.tokens_per_s for f in figures}
    base, distinct = rates["base", ROWS], rates["an adapter for each row", ROWS]
    ratios = {
        "16 distinct adapters / base": distinct / base,
        "one adapter / base": rates["one adapter for all rows", ROWS] / base,
        "base rows with adapters resident / base": rates["base rows, adapters resident", ROWS] / base,
        "half base, half distinct / base": rates["half base, half distinct", ROWS] / base,
    }
    for ours, peer in pairs:
        ratios[f"ours / {peer.case}"] = ours.tokens_per_s / peer.tokens_per_s
    return {
        "bench": "engine",
        "base": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "size": asdict(size),
        "decode": [asdict(f) for f in figures],
        "prefill": [asdict(f) for f in prefill],
        "peers": [{**asdict(peer), "ours_tokens_per_s": ours.tokens_per_s} for ours, peer in pairs],
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
    }


def _base(options: argparse.Namespace, scratch: Path) -> tuple[str, Path]:
    """The pulled base's name and folder, or a random one's."""
    if options.base is not None:
        return options.base.name, options.base
    home = Home.find(options.home)
    door = open_door(home)
    try:
        bases = {b.name: b for b in door.bases()}
    finally:
        door.close()
    record = bases.get(DEFAULT_BASE) or next(iter(bases.values()), None)
    if record is None:
        note(f"no base is pulled (loraplane models pull {DEFAULT_BASE}); measuring a small random one")
        return "random", random_base(scratch / "base")
    return record.name, open_base(home, record)


def _row(f: Figure) -> tuple[str, ...]:
    ratio = "-" if f.to_base is None else f"{f.to_base:.2f}"
    return (f.case, str(f.batch), f"{f.ms:.1f}", f"{f.best_ms:.1f}", f"{f.tokens_per_s:.0f}", ratio)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench_engine", description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="under a minute on two idle cores")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--threads", type=int, default=0, help="threads for tensor work; 0: one a core")
    parser.add_argument("--base", type=Path, help="a folder with a transformers model; default: the home's base")
    parser.add_argument("--home", type=Path, help="default $LORAPLANE_HOME or ~/.loraplane")
    parser.add_argument("--no-peers", action="store_true", help="our own cases only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
