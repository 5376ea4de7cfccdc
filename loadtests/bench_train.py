"""LoRA fine-tuning on dialogues: our loop against plain Trainer and PEFT on the same rows, in turns."""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.home import Home
from adapters.prompts import Example, Message, Renderer
from adapters.records import PromptFormat
from adapters.runs import Columns, DataSpec
from adapters.screen import note
from loadtests.bench_home import RANK, pick_base
from loadtests.bench_shell import BenchFailed, Table, Told, add_base_options, parser, positive, run
from loadtests.closed_loop import short_words
from loadtests.goals import ratio, verdicts
from loadtests.peers import PeerFailed, Worker
from loadtests.train_side import OURS, PLAIN, PLAIN_OURS
from train.batching import padded, plan
from train.data import Row, RowSet, render, training_rows
from train.models import wants_bf16

SIDES = (OURS, PLAIN, PLAIN_OURS)
MAX_LENGTH = 512
_RATE = 2e-4
# Lengths in tokens of DialogSum's dialogues and summaries under SmolLM2's tokenizer: both are log-normal, and long
# dialogues have long summaries. (mean, deviation) of the logarithms, and their correlation.
_PROMPT = (5.26, 0.465)
_ANSWER = (3.46, 0.41)
_TOGETHER = 0.77
_TEMPLATE_TOKENS = 40
_TURN_WORDS = 12


@dataclass(frozen=True, slots=True)
class Size:
    """batches: of so many rows; turn: steps of a side before the next one's turn. The first turn warms up."""

    batches: int
    rows: int
    turn: int


SHORT = Size(batches=6, rows=4, turn=2)
LONG = Size(batches=32, rows=8, turn=4)


@dataclass(slots=True)
class Sided:
    """What a side did. tokens: of each batch, without padding; padded: with it."""

    name: str
    tokens: Sequence[int]
    padded: Sequence[int]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def rate(self, turn: int) -> float:
        """Tokens per second over its turns but the first, padding not counted."""
        return sum(self.tokens[turn : len(self.losses)]) / sum(self.seconds[1:])

    def rates(self, turn: int) -> list[float]:
        """The same for each turn but the first."""
        starts = range(turn, len(self.losses), turn)
        return [sum(self.tokens[s : s + turn]) / t for s, t in zip(starts, self.seconds[1:], strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tell; returns the exit code."""
    return run(_measure, _options(argv))


def _measure(options: argparse.Namespace) -> Told:
    size = SHORT if options.short else LONG
    threads = options.threads or len(os.sched_getaffinity(0))
    bf16 = wants_bf16("auto")
    with tempfile.TemporaryDirectory(prefix="loraplane-train-") as scratch, ExitStack() as stack:
        base = pick_base(options, Path(scratch))
        renderer = Renderer(base.folder)
        count = size.batches * (options.rows or size.rows)
        rows = _file_rows(options, count) if options.data else synthetic(renderer, renderer.vocab_size, count)
        examples = render(rows, renderer, PromptFormat(), options.max_length).examples
        sides = make_sides(examples, options.rows or size.rows)
        note(
            f"{base.name}, {len(examples)} rows of {rows.name}, {'bfloat16' if bf16 else 'float32'}, {threads} threads"
        )
        asked: dict[str, Any] = {
            "folder": str(base.folder), "threads": threads, "bf16": bf16, "rank": RANK, "lr": _RATE, "seed": 0,
            "max_length": options.max_length, "pad_id": renderer.pad_token_id,
            "examples": [(e.ids, [int(c) for c in e.loss]) for e in examples],
        }  # fmt: skip
        workers: dict[str, Worker] = {}
        for name, batches in sides.items():
            note(f"loading: {name}")
            worker = Worker(Path(sys.executable), Path(scratch) / f"{len(workers)}.log", "loadtests.train_side")
            stack.callback(worker.stop)
            _ask(name, worker, side=name, batches=batches, **asked)
            workers[name] = worker
        found = [_sided(name, batches, examples) for name, batches in sides.items()]
        take_turns(found, workers, size.turn)
    return told(base.name, rows.name, bf16, threads, found, size.turn)


def make_sides(examples: Sequence[Example], rows: int) -> dict[str, list[list[int]]]:
    """The batches of each side: ours by length as the product plans them, the plain ones as they come, shuffled."""
    lengths = [len(e.ids) for e in examples]
    planned = [list(b) for b in plan(lengths, epochs=1, seed=0, batch_size=rows).batches]
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    plain = [order[i : i + rows] for i in range(0, len(order), rows)]
    return {OURS: planned, PLAIN: plain, PLAIN_OURS: planned}


def take_turns(sides: Sequence[Sided], workers: dict[str, Worker], turn: int) -> None:
    """Let every side train so many steps, then the next, until all are through."""
    total = len(sides[0].tokens)
    for begin in range(0, total, turn):
        steps = min(turn, total - begin)
        for side in sides:
            note(f"{side.name}: steps {begin + 1} to {begin + steps} of {total}")
            answer = _ask(side.name, workers[side.name], steps=steps)
            side.seconds.append(float(answer["seconds"]))
            side.losses += [float(loss) for loss in answer["losses"]]


def synthetic(renderer: Renderer, vocabulary: int, count: int, seed: int = 0) -> RowSet:
    """Dialogues of short words, with lengths like DialogSum's; an answer repeats words of its dialogue."""
    rng = random.Random(seed)
    words = short_words(renderer, vocabulary, rng)[:500]
    rows = []
    for number in range(count):
        prompt_tokens, answer_tokens = lengths(rng)
        said = rng.choices(words, k=prompt_tokens)
        # Speakers and line ends are tokens too, how many depends on the base: cut until it is no longer than asked.
        while (size := len(renderer.encode(_turns(said), add_special_tokens=False))) > prompt_tokens:
            said = said[: len(said) * prompt_tokens // size]
        text = _turns(said)
        answer = " ".join(said[:: max(1, len(said) // answer_tokens)][:answer_tokens])
        rows.append(Row(str(number), (Message("user", text), Message("assistant", answer))))
    return RowSet("synthetic dialogues", tuple(rows))


def _turns(said: Sequence[str]) -> str:
    turns = [said[i : i + _TURN_WORDS] for i in range(0, len(said), _TURN_WORDS)]
    return "\n".join(f"{'AB'[i % 2]}: {' '.join(turn)}" for i, turn in enumerate(turns))


def lengths(rng: random.Random) -> tuple[int, int]:
    """Tokens of a dialogue and of its summary, as DialogSum has them, cut so that both fit."""
    first, second = rng.gauss(0, 1), rng.gauss(0, 1)
    prompt = math.exp(_PROMPT[0] + _PROMPT[1] * first)
    answer = math.exp(_ANSWER[0] + _ANSWER[1] * (_TOGETHER * first + math.sqrt(1 - _TOGETHER**2) * second))
    short = min(120, max(4, round(answer)))
    return max(20, min(round(prompt), MAX_LENGTH - short - _TEMPLATE_TOKENS)), short


def _file_rows(options: argparse.Namespace, count: int) -> RowSet:
    spec = DataSpec(
        source=str(options.data),
        columns=Columns(prompt=options.prompt_column, completion=options.completion_column),
        limit=count,
        max_chars=options.max_length * 3,  # about as many characters as fit
    )
    return training_rows(spec, Home.find(options.home))


def _sided(name: str, batches: Sequence[Sequence[int]], examples: Sequence[Example]) -> Sided:
    lengths_ = [[len(examples[i].ids) for i in batch] for batch in batches]
    width = padded if name == OURS else int
    return Sided(name, [sum(b) for b in lengths_], [width(max(b)) * len(b) for b in lengths_])


def _ask(name: str, worker: Worker, **asked: object) -> dict[str, Any]:
    try:
        return worker.ask(**asked)
    except PeerFailed as error:
        raise BenchFailed(f"training, {name}: {error}") from error


def told(base: str, data: str, bf16: bool, threads: int, sides: Sequence[Sided], turn: int) -> Told:
    """What the bench says."""
    by_name = {side.name: side for side in sides}
    ours, same = by_name[OURS], by_name[PLAIN_OURS]
    rates = {side.name: side.rate(turn) for side in sides}
    apart = max(abs(a - b) for a, b in zip(ours.losses, same.losses, strict=True))
    curve = curve_difference(ours.losses, same.losses)
    last = max(1, len(ours.losses) // 4)
    rows = [
        (
            side.name, f"{rates[side.name]:.0f}", f"{min(side.rates(turn)):.0f}-{max(side.rates(turn)):.0f}",
            f"{1 - sum(side.tokens) / sum(side.padded):.0%}", f"{side.losses[0]:.3f}",
            f"{statistics.fmean(side.losses[-last:]):.3f}",
        )
        for side in sides
    ]  # fmt: skip
    return Told(
        bench="train",
        report={
            "base": base,
            "data": data,
            "bf16": bf16,
            "threads": threads,
            "sides": [
                {
                    "side": side.name,
                    "tokens_per_s": round(rates[side.name], 1),
                    "tokens": sum(side.tokens),
                    "padded_tokens": sum(side.padded),
                    "losses": [round(loss, 4) for loss in side.losses],
                }
                for side in sides
            ],
            "ratios": {
                "ours / plain": _rounded(ratio(rates[OURS], rates[PLAIN])),
                "ours / plain on our batches": _rounded(ratio(rates[OURS], rates[PLAIN_OURS])),
            },
            "curve_difference": {"nats": round(apart, 5), "share": round(curve, 5)},
        },
        tables=(Table(("SIDE", "TOK/S", "RANGE", "PADDING", "FIRST LOSS", f"MEAN OF LAST {last}"), rows),),
        goals=verdicts({"G10": ratio(rates[OURS], rates[PLAIN]), "G10.curve": curve}),
    )


def curve_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of two loss curves on the same batches, step by step, as a share of the loss."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    found = parser(
        "bench_train",
        "LoRA fine-tuning: tokens/s and loss curve of our loop against plain Trainer and PEFT with padding (G10).",
        "python -m loadtests.bench_train --short",
    )
    add_base_options(found)
    found.add_argument("--data", type=Path, help="a .jsonl, .csv or .parquet file; default: synthetic dialogues")
    found.add_argument("--prompt-column", default="dialogue", help="of --data (default dialogue)")
    found.add_argument("--completion-column", default="summary", help="of --data (default summary)")
    found.add_argument("--rows", type=positive, help="rows a batch (default 8, short 4)")
    found.add_argument("--max-length", type=positive, default=MAX_LENGTH, help=f"tokens (default {MAX_LENGTH})")
    return found.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
