"""What swapping adapters costs over HTTP: very many (G3), cold ones (G5), more than there are slots (G6).

    python -m loadtests.bench_swap [--short] [--only G5]

Each part starts `loraplane serve` on a home of its own with random adapters, and asks it as a client would.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from adapters.prompts import Renderer
from adapters.screen import note
from loadtests.bench_home import Furnished, furnish, pick_base
from loadtests.bench_shell import Table, Told, add_base_options, aside, parser, run
from loadtests.closed_loop import Prompter
from loadtests.goals import verdicts
from loadtests.shapes import ALL16, QV8
from loadtests.swap_cold import Cold, cold_loads
from loadtests.swap_many import FEW, Many, many_against_few
from loadtests.swap_side import LONG, SHORT, Size
from loadtests.swap_thrash import SLOTS, Thrash, thrash

PARTS = ("G3", "G5", "G6")


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured. many: the first is judged, the others stand beside it."""

    many: Sequence[Many] = ()
    cold: Cold | None = None
    thrash: Thrash | None = None
    left_out: Sequence[str] = field(default=())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    return run(_measure, _options(argv))


def _measure(options: argparse.Namespace) -> Told:
    size = SHORT if options.short else LONG
    parts = options.only or list(PARTS)
    with tempfile.TemporaryDirectory(prefix="loraplane-bench-") as folder:
        base = aside(partial(pick_base, options, Path(folder)))
        found = measure(Path(folder), parts, size, options.threads, partial(furnish, base, Path(folder), 0))
    return told(base.name, found, size)


def measure(
    folder: Path, parts: Sequence[str], size: Size, threads: int | None, make: Callable[[], Furnished]
) -> Found:
    """Measure these parts in `folder`. make: furnishes the home."""
    home = aside(make)
    prompter = Prompter(Renderer(home.folder), home.base.vocab_size)
    many: list[Many] = []
    if "G3" in parts:
        for kind, count in ((QV8, size.many), (ALL16, size.large)):
            note(f"G3: {count} adapters against {FEW}")
            many.append(many_against_few(home, prompter, kind, count, size, folder / f"many{kind.rank}.log", threads))
    cold = cold_loads(home, prompter, size, folder / "cold.log", threads) if "G5" in parts else None
    thrashed = thrash(home, prompter, size, folder, threads) if "G6" in parts else None
    left_out = [f"{part}: --only {' '.join(parts)}" for part in PARTS if part not in parts]
    return Found(many, cold, thrashed, left_out)


def told(base: str, found: Found, size: Size) -> Told:
    """What the bench says."""
    tables: list[Table] = []
    left_out = list(found.left_out)
    judged = found.many[0] if found.many else None
    if found.many:
        tables.append(
            Table(
                ("ADAPTERS", "OF", "TOK/S", f"WITH {FEW}", "RATIO", "BYTES ALLOW", "OF THAT", "HITS", "HOST TIER"),
                [_many_row(m) for m in found.many],
            )
        )
        if judged is not None and judged.adapters < LONG.many:
            left_out.append(f"G3: {judged.adapters} adapters in place of {LONG.many} (--short)")
    if found.cold is not None:
        tables.append(_cold_table(found.cold))
    if found.thrash is not None:
        tables.append(_thrash_table(found.thrash))
    cold, thrashed = found.cold, found.thrash
    return Told(
        bench="swap",
        report={
            "base": base,
            "size": asdict(size),
            "many": [{**asdict(m), "ratio": round(m.ratio, 4), "of_allowed": round(m.of_allowed, 4)}
                     for m in found.many],
            "cold": None if cold is None else asdict(cold),
            "thrash": None if thrashed is None else asdict(thrashed),
        },
        tables=tables,
        goals=verdicts(
            {
                "G3": None if judged is None else judged.of_allowed,
                "G3.host": max((m.host_share for m in found.many), default=None),
                "G5.idle": None if cold is None else cold.added_idle,
                "G5.load": None if cold is None else cold.added_loaded,
                "G5.streams": None if cold is None else cold.streams,
                "G6.ttft": None if thrashed is None else thrashed.slower,
                "G6.throughput": None if thrashed is None else thrashed.kept,
                "G6.rows": None if thrashed is None else thrashed.full_kept,
                "G6.order": None if thrashed is None else thrashed.overtaken,
            }
        ),
        left_out=left_out,
    )  # fmt: skip


def _many_row(many: Many) -> tuple[str, ...]:
    hit = "-" if many.hit_ratio is None else f"{many.hit_ratio:.2f}"
    ratios = (many.ratio, many.allowed, many.of_allowed)
    return (
        str(many.adapters), many.kind, f"{many.many_tok_s:.0f}", f"{many.few_tok_s:.0f}",
        *(f"{r:.3f}" for r in ratios), hit, f"{many.host_share * 100:.0f} %",
    )  # fmt: skip


def _cold_table(cold: Cold) -> Table:
    rows = (
        ("warm, idle", cold.warm),
        (f"from {'/'.join(cold.sources)}, pages not in memory, idle", cold.on_disk),
        ("the same, pages in memory, idle", cold.in_pages),
        ("the disk alone, as many bytes", cold.raw_read),
        ("warm, beside streams", cold.loaded_warm),
        ("cold, beside streams", cold.loaded_cold),
        ("a step of the streams, median", cold.step),
        ("their p99 gap, warm requests every 5 s", cold.warm_p99),
        ("their p99 gap, cold requests every 5 s", cold.cold_p99),
    )
    return Table((f"FIRST TOKEN, {cold.megabytes:g} MB", "MS"), [(what, f"{ms:.1f}") for what, ms in rows])


def _thrash_table(found: Thrash) -> Table:
    hit = "-" if found.hit_ratio is None else f"{found.hit_ratio:.2f}"
    rows = (
        (f"first token, {SLOTS // 2} callers on {SLOTS // 2} adapters", f"{found.warm:.1f} ms"),
        (f"on {2 * SLOTS} in turn ({hit} of them hits)", f"{found.cycled:.1f} ms"),
        (f"on any of {2 * SLOTS}", f"{found.drawn:.1f} ms"),
        (f"{2 * SLOTS} adapters in flight, as many slots", f"{found.fits:.0f} tok/s"),
        (f"{2 * SLOTS} adapters in flight, {SLOTS} slots", f"{found.over:.0f} tok/s"),
        ("there, first token, median", f"{found.wait:.0f} ms"),
        ("there, first token, longest", f"{found.longest:.0f} ms"),
        ("there, overtaken for longer than the patience", str(found.overtaken)),
        ("two callers on each, as many slots", f"{found.full_fits:.0f} tok/s"),
        (f"two callers on each, {SLOTS} slots", f"{found.full_over:.0f} tok/s"),
    )
    return Table((f"{2 * SLOTS} ADAPTERS, {SLOTS} SLOTS", "FOUND"), rows)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(
        "bench_swap",
        "Two thousand registered adapters against five (G3), cold adapters alone and beside streams (G5), "
        "twice as many adapters as slots (G6).",
        "python -m loadtests.bench_swap --short --only G5",
    )
    add_base_options(found)
    found.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
