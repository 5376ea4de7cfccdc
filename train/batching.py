"""Which rows share a batch: of like length, decided before the run starts, the same for equal seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

PAD_TO = 16  # Few distinct shapes: the CPU's kernels are built anew for each shape, at about a second each.
_BUCKET_BATCHES = 16  # How many batches' worth of rows are sorted together; more pads less and mixes less.


@dataclass(frozen=True, slots=True)
class Plan:
    """Batches of row indices, one a step. padding: share of the padded tokens that are padding."""

    batches: tuple[tuple[int, ...], ...]
    padding: float


def padded(length: int) -> int:
    """The length that a batch with this longest row is padded to."""
    return -(-length // PAD_TO) * PAD_TO


def plan(
    lengths: Sequence[int],
    *,
    epochs: float,
    seed: int,
    batch_size: int,
    tokens_per_batch: int | None = None,
    max_steps: int | None = None,
    fraction: float = 1.0,
) -> Plan:
    """The steps of a run over rows of these token lengths. At least one step."""
    batches: list[tuple[int, ...]] = []
    for epoch in range(math.ceil(epochs)):
        whole = _epoch(lengths, random.Random(f"batches/{seed}/{epoch}"), batch_size, tokens_per_batch)
        batches += whole[: math.ceil(len(whole) * min(1.0, epochs - epoch))]
    steps = max(1, math.ceil(min(len(batches), max_steps or len(batches)) * fraction))
    used = batches[:steps]
    total = sum(_cost(lengths, batch) for batch in used)
    real = sum(lengths[i] for batch in used for i in batch)
    return Plan(tuple(used), 1 - real / total)


def _epoch(
    lengths: Sequence[int], rng: random.Random, batch_size: int, tokens_per_batch: int | None
) -> list[tuple[int, ...]]:
    """All rows once: shuffled, sorted by length within buckets, cut into batches, and those shuffled."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if tokens_per_batch is None:
        bucket = batch_size * _BUCKET_BATCHES
    else:
        mean = max(1.0, sum(map(padded, lengths)) / len(lengths))
        bucket = max(1, int(tokens_per_batch / mean)) * _BUCKET_BATCHES
    batches: list[tuple[int, ...]] = []
    for start in range(0, len(order), bucket):
        rows = sorted(order[start : start + bucket], key=lambda i: (lengths[i], i))
        batches += _cut(rows, lengths, batch_size, tokens_per_batch)
    rng.shuffle(batches)
    return batches


def _cut(
    rows: Sequence[int], lengths: Sequence[int], batch_size: int, tokens_per_batch: int | None
) -> list[tuple[int, ...]]:
    if tokens_per_batch is None:
        return [tuple(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    batches: list[tuple[int, ...]] = []
    batch: tuple[int, ...] = ()
    for row in rows:
        if batch and _cost(lengths, (*batch, row)) > tokens_per_batch:
            batches.append(batch)
            batch = ()
        batch = (*batch, row)
    batches.append(batch)
    return batches


def _cost(lengths: Sequence[int], batch: Sequence[int]) -> int:
    """Tokens of a padded batch."""
    return padded(max(lengths[i] for i in batch)) * len(batch)
