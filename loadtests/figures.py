"""What a load test came to: figures by model, as a table for people and as JSON for programmes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adapters.screen import show_table

TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Figures:
    """One line of the table. Times in ms; tokens_per_s over the whole test; problems: name -> how often."""

    model: str
    requests: int
    failures: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    itl_p99_ms: float | None
    tokens: int
    tokens_per_s: float
    digests_checked: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole test. seconds: until the last answer ended. problems: each name once, with its count and one example."""

    url: str
    users: int
    seconds: float
    lines: tuple[Figures, ...]
    total: Figures
    unfinished: int
    versions: tuple[str, ...]
    problems: tuple[tuple[str, int, str], ...]

    @property
    def good(self) -> bool:
        """Whether something was asked, all of it answered, and every answer checked and right."""
        return self.total.requests > 0 and self.total.failures == 0 and self.total.digests_checked > 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"loadtest": "ok" if self.good else "failed", **asdict(self)}


def outcome(samples: Sequence[dict[str, Any]], url: str, users: int) -> Outcome:
    """Sum up the samples that the locustfile wrote."""
    ended = [s for s in samples if not s["unfinished"]]
    seconds = max((s["ended_s"] for s in ended), default=0.0)
    models = sorted({s["model"] for s in ended})
    lines = tuple(_figures(m, [s for s in ended if s["model"] == m], seconds) for m in models)
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for sample in ended:
        for violation in sample["violations"]:
            name, _, detail = violation.partition(": ")
            counts[name] += 1
            examples.setdefault(name, f"{sample['model']}: {detail}")
    return Outcome(
        url=url,
        users=users,
        seconds=round(seconds, 2),
        lines=lines,
        total=_figures(TOTAL, ended, seconds),
        unfinished=len(samples) - len(ended),
        versions=tuple(sorted({s["named"] for s in ended if s["named"]})),
        problems=tuple((name, count, examples[name]) for name, count in counts.most_common()),
    )


def show(found: Outcome) -> None:
    """The table, and what went wrong."""
    show_table(
        ("MODEL", "REQUESTS", "FAILED", "TTFT P50", "P95", "TPOT P50", "P95", "ITL P99", "TOK/S", "DIGESTS CHECKED"),
        [_row(line) for line in (*found.lines, found.total)],
        empty="no request was made",
    )
    print(f"times in ms; {found.users} users, {found.seconds:g} s; answered by {', '.join(found.versions) or 'nobody'}")
    if found.unfinished:
        print(f"{found.unfinished} requests had not ended when the test did; they count nowhere")
    for name, count, example in found.problems:
        print(f"FAILED {name} x {count}, for example {example}")


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The value below which so many percent lie (inclusive method); None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return round(values[0], 2)
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 2)


def _figures(model: str, samples: Sequence[dict[str, Any]], seconds: float) -> Figures:
    good = [s for s in samples if not s["violations"]]
    ttft = [s["ttft_ms"] for s in good if s["ttft_ms"] is not None]
    tpot = [s["tpot_ms"] for s in good if s["tpot_ms"] is not None]
    tokens = sum(s["tokens"] for s in samples)
    return Figures(
        model=model,
        requests=len(samples),
        failures=len(samples) - len(good),
        ttft_p50_ms=percentile(ttft, 50),
        ttft_p95_ms=percentile(ttft, 95),
        tpot_p50_ms=percentile(tpot, 50),
        tpot_p95_ms=percentile(tpot, 95),
        itl_p99_ms=percentile([gap for s in good for gap in s["gaps_ms"]], 99),
        tokens=tokens,
        tokens_per_s=round(tokens / seconds, 1) if seconds else 0.0,
        digests_checked=sum(s["digest_checked"] for s in samples),
    )


def _row(line: Figures) -> tuple[str, ...]:
    times = (line.ttft_p50_ms, line.ttft_p95_ms, line.tpot_p50_ms, line.tpot_p95_ms, line.itl_p99_ms)
    return (
        line.model,
        str(line.requests),
        str(line.failures),
        *("-" if t is None else f"{t:.0f}" for t in times),
        f"{line.tokens_per_s:.1f}",
        str(line.digests_checked),
    )
