"""Decode steps of an 8B-shaped base on a CUDA device, against the time that its memory needs to be read.

The base has the shape of Llama 3 8B and random weights; keys and values are zeros, which cost the same to read.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from loadtests.bench_cases import random_adapter, same_step
from loadtests.bench_shell import BenchFailed, Table, Told, parser, positive, run
from loadtests.floors import weight_bytes
from loadtests.goals import verdicts
from loadtests.steps import Case, Figure, figure, interleaved
from serving.engine.attention import Heads
from serving.engine.linear import FrozenLinear
from serving.engine.lora import HostAdapter, Site
from serving.engine.model import Decoder, Layer
from serving.engine.ops import Activation, Norm, pick_ops
from serving.engine.plan import NO_SLOT, Key, RowPlan, StepPlan
from serving.engine.request import Sampling
from serving.engine.runner import DecoderRunner, make_slots

_GREEDY = Sampling(max_tokens=1 << 20, temperature=0.0)
_COPY_BYTES = 4 << 30
_COPIES = 10
_PATIENCE_STEPS = 20  # so many steps before the first round: kernels are compiled and graphs captured


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's shape."""

    layers: int = 32
    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv: int = 8
    dim: int = 128
    vocabulary: int = 128256
    positions: int = 1024


@dataclass(frozen=True, slots=True)
class Work:
    """What is measured: rows of so many tokens of context; rounds of so many steps."""

    rows: int = 32
    context: int = 512
    rounds: int = 5
    steps: int = 40


class StepCase:
    """Decode steps at one context length. slots: one for each row; NO_SLOT is the base."""

    def __init__(self, name: str, runner: DecoderRunner, slots: Sequence[int], context: int) -> None:
        self.name, self.rows = name, len(slots)
        self._runner = runner
        self._plan = StepPlan(
            tuple(
                RowPlan(Key((0, row)), row, slot, context, (), True, _GREEDY, 0, context)
                for row, slot in enumerate(slots)
            )
        )

    def steps(self, count: int) -> list[float]:
        """See Case. The host reads the tokens of each step, so a step has ended when the next begins."""
        return same_step(self._runner, self._plan, count)


_SHAPE, _WORK = Shape(), Work()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 2 without a CUDA device."""
    found = parser("bench_gpu", __doc__.partition("\n")[0], "python -m loadtests.bench_gpu --rows 32")
    found.add_argument("--rows", type=positive, default=_WORK.rows, help="rows of the batch (default %(default)s)")
    found.add_argument("--context", type=positive, default=_WORK.context, help="tokens each row has (%(default)s)")
    found.add_argument("--layers", type=positive, default=_SHAPE.layers, help="fewer fit a smaller card (%(default)s)")
    found.add_argument("--rank", type=positive, default=16, help="of the adapters (default %(default)s)")
    return run(_work, found.parse_args(argv))


def _work(options: Namespace) -> Told:
    if not torch.cuda.is_available():
        raise BenchFailed("no CUDA device: torch sees none here, or is a build without CUDA; nothing was measured")
    work = Work(options.rows, options.context, *((2, 10) if options.short else (_WORK.rounds, _WORK.steps)))
    shape = Shape(layers=options.layers, positions=max(_SHAPE.positions, options.context + 1))
    return measured(shape, work, options.rank, torch.device("cuda"), torch.bfloat16)


def measured(shape: Shape, work: Work, rank: int, device: torch.device, dtype: torch.dtype) -> Told:
    """Build the base and its adapters, let the cases take turns, and hold them against the floor."""
    decoder = random_decoder(shape, device, dtype)
    adapter = random_adapter(decoder, 1, rank)
    runner, off = (DecoderRunner(decoder, work.rows, make_slots(decoder, work.rows, rank)) for _ in range(2))
    for slot in range(1, work.rows + 1):
        runner.install(slot, adapter)  # the same numbers, each in memory of its own
    distinct = list(range(1, work.rows + 1))
    mixtures = (
        ("base", off, [NO_SLOT] * work.rows),
        ("base rows, adapters resident", runner, [NO_SLOT] * work.rows),
        ("one adapter for all rows", runner, [1] * work.rows),
        ("an adapter for each row", runner, distinct),
    )
    cases: list[Case] = [StepCase(name, on, slots, work.context) for name, on, slots in mixtures]
    for case in cases:
        case.steps(_PATIENCE_STEPS)
    times = interleaved(cases, work.rounds, work.steps)
    base_rate = work.rows / statistics.median(times["base"])
    figures = [figure(case, times[case.name], base_rate) for case in cases]
    copied = copy_gb_s(device, _COPY_BYTES if device.type == "cuda" else _COPY_BYTES >> 8)
    return told(shape, work, figures, Reads.of(decoder, shape, work, adapter), copied, device)


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes that a step must read at least: the base's linears, one adapter, keys and values of all rows."""

    weights: int
    adapter: int
    cache: int

    @classmethod
    def of(cls, decoder: Decoder, shape: Shape, work: Work, adapter: HostAdapter) -> Reads:
        """Of steps at the work's context."""
        token = 2 * shape.layers * shape.kv * shape.dim * decoder.dtype.itemsize
        return cls(weight_bytes(decoder), adapter.size_bytes, work.rows * (work.context + 1) * token)

    def floor_ms(self, adapters: int, gb_s: float) -> float:
        """The least time of a step with so many distinct adapters."""
        return (self.weights + adapters * self.adapter + self.cache) / gb_s / 1e6


def told(
    shape: Shape, work: Work, figures: Sequence[Figure], reads: Reads, copied: float, device: torch.device
) -> Told:
    """Figures, floors and goals. figures: base, unused, one adapter, distinct adapters; copied: GB/s."""
    rows = []
    shares = {}
    for f, adapters in zip(figures, (0, 0, 1, work.rows), strict=True):
        floor = reads.floor_ms(adapters, copied)
        shares[f.case] = floor / f.ms
        rows.append((*f.row(), f"{floor:.2f}", f"{shares[f.case]:.2f}"))
    base, distinct = figures[0], figures[-1]
    bytes_allow = reads.floor_ms(0, copied) / reads.floor_ms(work.rows, copied)
    report = {
        "device": str(device),
        "shape": asdict(shape),
        "work": asdict(work),
        "reads": asdict(reads),
        "copy_gb_s": round(copied, 1),
        "decode": [asdict(f) for f in figures],
        "shares_of_floor": {name: round(share, 3) for name, share in shares.items()},
        "bytes_allow_of_base": round(bytes_allow, 3),
    }
    goals = verdicts({"G11.floor": shares[distinct.case], "G11.cost": 1 - distinct.tokens_per_s / base.tokens_per_s})
    return Told("gpu", report, [Table((*Figure.COLUMNS, "FLOOR MS", "SHARE"), rows)], goals)


def random_decoder(shape: Shape, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A Llama of this shape with random weights, made on the device; logits stay finite."""
    generator = torch.Generator(device).manual_seed(0)

    def linear(out: int, width: int) -> FrozenLinear:
        weight = torch.empty(out, width, dtype=dtype, device=device)
        return FrozenLinear(weight.normal_(0.0, width**-0.5, generator=generator))

    ones = torch.ones(shape.width, dtype=dtype, device=device)
    norm = Norm(ones, 1e-5)
    angles = torch.outer(torch.arange(shape.positions), 500000.0 ** (-torch.arange(0, shape.dim, 2) / shape.dim))
    cos, sin = (t.repeat(1, 2).to(device, dtype) for t in (angles.cos(), angles.sin()))
    heads = Heads(shape.heads, shape.kv, shape.dim, cos, sin, shape.dim**-0.5)
    attended, keys = shape.heads * shape.dim, shape.kv * shape.dim
    layers, sites = [], []
    for index in range(shape.layers):
        layers.append(
            Layer(
                heads=heads,
                attention_norm=norm,
                qkv=linear(attended + 2 * keys, shape.width),
                out=linear(shape.width, attended),
                mlp_norm=norm,
                up=linear(2 * shape.inner, shape.width),
                down=linear(shape.width, shape.inner),
            )
        )
        sites += [
            Site((f"{index}.q", f"{index}.k", f"{index}.v"), shape.width, (attended, keys, keys)),
            Site((f"{index}.o",), attended, (shape.width,)),
            Site((f"{index}.gate", f"{index}.up"), shape.width, (shape.inner, shape.inner)),
            Site((f"{index}.down",), shape.inner, (shape.width,)),
        ]
    embedding = torch.empty(shape.vocabulary, shape.width, dtype=dtype, device=device)
    return Decoder(
        embedding=embedding.normal_(0.0, 1.0, generator=generator),
        layers=tuple(layers),
        norm=norm,
        head=linear(shape.vocabulary, shape.width),
        activation=Activation.GATED_SILU,
        ops=pick_ops(dtype, device),
        max_model_len=shape.positions,
        sites=tuple(sites),
        dtype=dtype,
        device=device,
        stop_token_ids=(),
    )


def copy_gb_s(device: torch.device, size: int) -> float:
    """How fast the device copies within its memory, bytes read and written, in GB/s: the best of some passes."""
    source, target = (torch.zeros(size // 8, dtype=torch.int64, device=device) for _ in range(2))
    best = 0.0
    for _ in range(_COPIES):
        int(source[0])  # the host waits for the device
        begun = time.perf_counter()
        target.copy_(source)
        int(target[-1])
        best = max(best, 2 * size / (time.perf_counter() - begun) / 1e9)
    return best


if __name__ == "__main__":
    sys.exit(main())
