"""How fast the engine steps, and what adapters cost: in this process, no HTTP, peers interleaved in the same run.

    python -m loadtests.bench_engine [--short] [--device cpu]

Decode steps at several batch sizes and mixtures, prefill chunks, the floor under a step, and peers: transformers'
`generate` on a static batch, PEFT's `adapter_names`, and PEFT one request at a time. Figures of one run compare with
each other only: the cases of a batch size, and a peer and our like of it, are measured in turns; medians count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from adapters.screen import note
from loadtests.bench_cases import MAX_LEN, PrefillCase, decode_cases, make_runner, random_adapter
from loadtests.bench_home import RANK, pick_base
from loadtests.bench_shell import Table, Told, add_base_options, parser, run
from loadtests.floors import Floors, MatmulCase, read_gb_s, weight_bytes
from loadtests.goals import ratio, verdicts
from loadtests.peer_models import GenerateCase, load_model, with_peft
from loadtests.steps import Case, Figure, against, figure, interleaved
from serving.engine.model import Decoder, pick_dtype
from serving.engine.plan import NO_SLOT
from serving.engine.reading import load_decoder
from serving.engine.runner import DecoderRunner

ROWS = 16
_CHUNKS = (64, 512)
STATIC, MIXED, SERIAL = "transformers generate, base", "PEFT adapter_names, distinct", "PEFT, one adapter alone"
_BASE, _UNUSED, _ONE, _EACH = range(4)  # where decode_cases has them


@dataclass(frozen=True, slots=True)
class Size:
    """How long the bench measures: rounds, and steps a round; peers make fewer steps, since they are slower."""

    batches: tuple[int, ...]
    rounds: int
    steps: int
    peer_steps: int
    mixed_steps: int


SHORT = Size((1, 16), rounds=3, steps=8, peer_steps=8, mixed_steps=3)
LONG = Size((1, 8, 16), rounds=10, steps=24, peer_steps=16, mixed_steps=6)


@dataclass(frozen=True, slots=True)
class Found:
    """All that was measured. peers: our figure and the peer's, by the peer's name."""

    decode: Sequence[Figure]
    prefill: Sequence[Figure]
    floors: Floors
    peers: Mapping[str, tuple[Figure, Figure]]
    left_out: Sequence[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    return run(_measure, _options(argv))


def _measure(options: argparse.Namespace) -> Told:
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    dtype = pick_dtype(options.dtype, device)
    size = SHORT if options.short else LONG
    with tempfile.TemporaryDirectory(prefix="loraplane-bench-") as scratch:
        base = pick_base(options, Path(scratch))
        kind = str(dtype).removeprefix("torch.")
        note(f"{base.name}, {kind} on {device}, {torch.get_num_threads()} threads")
        decoder = load_decoder(base.folder, dtype, device, MAX_LEN)
        # The two share the base's weights; only cache and slots are their own.
        on, off = make_runner(decoder, ROWS, ROWS), make_runner(decoder, ROWS, 0)
        decode, matmul_ms = _decode(decoder, on, off, size)
        prefill = _prefill(on, off, size)
        floors = Floors(weight_bytes(decoder), random_adapter(decoder, 1).size_bytes, read_gb_s(device), matmul_ms)
        left_out: list[str] = []
        peers = {} if options.no_peers else _peers(base.folder, dtype, device, size, on, off, left_out)
    found = Found(decode, prefill, floors, peers, left_out)
    return told(found, {"base": base.name, "dtype": kind, "device": str(device), "threads": torch.get_num_threads()})


def _decode(decoder: Decoder, on: DecoderRunner, off: DecoderRunner, size: Size) -> tuple[list[Figure], float]:
    """Figures of all mixtures, and the median of the linears alone at the largest batch, in ms."""
    figures: list[Figure] = []
    matmul_ms = 0.0
    for batch in size.batches:
        cases = decode_cases(on, off, batch)
        alone = MatmulCase(decoder, batch)
        note(f"decode, {batch} rows, {len(cases)} mixtures")
        times = interleaved([*cases, alone], size.rounds, size.steps)
        base_rate = batch / statistics.median(times[cases[_BASE].name])
        figures += [figure(case, times[case.name], base_rate) for case in cases]
        matmul_ms = statistics.median(times[alone.name]) * 1e3
    return figures, matmul_ms


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
    base: Path,
    dtype: torch.dtype,
    device: torch.device,
    size: Size,
    on: DecoderRunner,
    off: DecoderRunner,
    left_out: list[str],
) -> dict[str, tuple[Figure, Figure]]:
    """Our figure and a peer's on the same work, measured in turns with each other."""
    ours = decode_cases(on, off, ROWS)
    note(STATIC)
    model = load_model(base, dtype, device)
    found = {STATIC: against(ours[_BASE], GenerateCase(STATIC, model, ROWS), size.rounds, size.peer_steps)}
    try:
        wrapped = with_peft(model, ROWS, RANK)
    except ImportError:
        left_out.append("PEFT: it is not installed here (pip install 'loraplane[train]')")
        return found
    few = max(1, size.rounds - 1)
    note(MIXED)
    mixed = GenerateCase(MIXED, wrapped, ROWS, [f"a{i}" for i in range(1, ROWS + 1)])
    found[MIXED] = against(ours[_EACH], mixed, few, size.mixed_steps)
    note(SERIAL)
    found[SERIAL] = against(ours[_EACH], GenerateCase(SERIAL, wrapped, 1), few, size.mixed_steps)
    return found


def told(found: Found, what: Mapping[str, object]) -> Told:
    """What the bench says: tables, ratios by name, goals."""
    rates = {(f.case, f.batch): f for f in found.decode}
    of_base = {case: f.to_base for (case, batch), f in rates.items() if batch == ROWS}
    to_peer = {name: ratio(ours.tokens_per_s, peer.tokens_per_s) for name, (ours, peer) in found.peers.items()}
    each, unused, one = "an adapter for each row", "base rows, adapters resident", "one adapter for all rows"
    goals = verdicts(
        {
            "G1.mixed": to_peer.get(MIXED),
            "G1.serial": to_peer.get(SERIAL),
            "G2.distinct": of_base.get(each),
            "G2.one": of_base.get(one),
            "G2.unused": of_base.get(unused),
            "G4.static": to_peer.get(STATIC),
        }
    )
    used = {"base": 0, one: 1, each: ROWS}
    shares = {c: found.floors.shares(n, rates[c, ROWS].ms) for c, n in used.items() if (c, ROWS) in rates}
    floors = found.floors
    ratios = {f"{case} / base": value for case, value in of_base.items() if case != "base" and value is not None}
    ratios |= {f"ours / {name}": value for name, value in to_peer.items() if value is not None}
    return Told(
        bench="engine",
        report={
            **what,
            "decode": [asdict(f) for f in found.decode],
            "prefill": [asdict(f) for f in found.prefill],
            "floors": floors.to_json(),
            "share_of_floor": {c: {"memory": round(m, 3), "products": round(p, 3)} for c, (m, p) in shares.items()},
            "peers": [{**asdict(peer), "ours_tokens_per_s": ours.tokens_per_s} for ours, peer in found.peers.values()],
            "ratios": {k: round(v, 3) for k, v in ratios.items()},
        },
        tables=(
            Table(
                Figure.COLUMNS,
                [f.row() for f in (*found.decode, *found.prefill, *(peer for _, peer in found.peers.values()))],
            ),
            Table(("RATIO", "VALUE"), [(k, f"{v:.2f}") for k, v in ratios.items()]),
            Table(
                ("FLOOR OF A STEP", "READ MS", "PRODUCTS MS", "SHARE REACHED OF READING", "OF PRODUCTS"),
                [
                    (
                        c,
                        f"{floors.memory_ms(used[c]):.1f}",
                        f"{floors.matmul_floor_ms(used[c]):.1f}",
                        f"{m:.2f}",
                        f"{p:.2f}",
                    )
                    for c, (m, p) in shares.items()
                ],
            ),
        ),
        goals=goals,
        left_out=found.left_out,
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(
        "bench_engine",
        "Decode steps and prefill in this process: what adapters cost (G2), against transformers and PEFT (G1, G4).",
        "python -m loadtests.bench_engine --short",
    )
    add_base_options(found)
    found.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    found.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    found.add_argument("--no-peers", action="store_true", help="our own cases only")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
