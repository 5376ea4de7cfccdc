"""What the arms of a scenario came to, and the figure that stands beside the published one."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.figures import percentile
from loadtests.flips import Flipped
from loadtests.goals import ratio
from loadtests.shapes import FIRST_TOKEN_LIMIT_S, HOT, Arm, Scenario, lru_hits
from loadtests.sse import Problem

Samples = Sequence[Mapping[str, Any]]

# Answers that name, or came from, other weights than were asked for.
WRONG = frozenset(
    {
        Problem.WRONG_MODEL, Problem.WRONG_DIGEST, Problem.WRONG_BASE, Problem.STALE_ALIAS, Problem.WEIGHTS_CHANGED,
        Problem.UNNAMED_WEIGHTS, Problem.HEADERS_DISAGREE, Problem.WRONG_CONTENT,
    }
)  # fmt: skip
_LATE_MS = 250.0
_REFUSED = f"{Problem.HTTP_STATUS.value}: 429"


@dataclass(frozen=True, slots=True)
class ArmRun:
    """An arm that was replayed. picks: the adapter of each request, as planned; models: what they are called there.

    flipped: what moves of aliases came to meanwhile, where there were any; again: the same weights and prompts asked
    once more in quiet, by pinned versions.
    """

    arm: Arm
    picks: tuple[int, ...]
    models: tuple[str, ...]
    samples: Samples
    slots: int
    offered_per_s: float | None
    flipped: Flipped | None = None
    again: Samples = ()


@dataclass(frozen=True, slots=True)
class ArmFound:
    """A line of the table. Times in ms. refused: answered 429, the only error that an overloaded server may give.

    first tokens are dated from when the request was due. hit_ratio: of requests whose adapter lay in a slot, as the
    server says; lru_ratio: as it would be with slots that keep the most recent.
    """

    arm: str
    requests: int
    failed: int
    refused: int
    wrong: int
    unfinished: int
    offered_per_s: float | None
    tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p99_ms: float | None
    hit_ratio: float | None
    lru_ratio: float | None
    problems: tuple[str, ...]

    COLUMNS = ("ARM", "REQUESTS", "FAILED", "WRONG", "REFUSED", "OFFERED/S", "TOK/S", "TTFT P50", "P99",
               "BETWEEN TOKENS P99", "HITS", "LRU")  # fmt: skip

    def row(self) -> tuple[str, ...]:
        """Its cells; times in ms."""
        shares = (self.hit_ratio, self.lru_ratio)
        times = (self.ttft_p50_ms, self.ttft_p99_ms, self.itl_p99_ms)
        return (
            self.arm,
            *map(str, (self.requests, self.failed, self.wrong, self.refused)),
            "as answered" if self.offered_per_s is None else f"{self.offered_per_s:.1f}",
            f"{self.tokens_per_s:.0f}",
            *("-" if t is None else f"{t:.0f}" for t in times),
            *("-" if s is None else f"{s:.2f}" for s in shares),
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """Ours beside the published one. goal: by whose limit it is judged; empty: it is only shown."""

    scenario: str
    what: str
    ours: float | None
    anchor: str
    unit: str = "x"
    goal: str = ""

    COLUMNS = ("SCENARIO", "FIGURE", "OURS", "PUBLISHED")

    def row(self) -> tuple[str, ...]:
        """Its cells."""
        shown = "-" if self.ours is None else f"{self.ours:.3g} {self.unit}".strip()
        return (self.scenario, self.what, shown, self.anchor)


def arm_found(run: ArmRun) -> ArmFound:
    """Sum up an arm."""
    ended = [s for s in run.samples if not s["unfinished"]]
    odd = set(odd_texts(ended, run.again))
    blamed = [[*s["violations"], *([Problem.WRONG_CONTENT.value] if i in odd else [])] for i, s in enumerate(ended)]
    refused = [bool(b) and all(v.startswith(_REFUSED) for v in b) for b in blamed]
    wrong = [any(v.partition(":")[0] in WRONG for v in b) for b in blamed]
    good = [s for s, b in zip(ended, blamed, strict=True) if not b]
    caches = [s["cache"] for s in good if s["cache"] is not None]
    tokens = sum(s["tokens"] for s in good)
    counts = Counter(v for b, r in zip(blamed, refused, strict=True) if not r for v in b)
    return ArmFound(
        arm=run.arm.name,
        requests=len(ended),
        failed=sum(bool(b) for b in blamed) - sum(refused),
        refused=sum(refused),
        wrong=sum(wrong),
        # What the plan holds and nobody asked counts too: a run that was cut short is no whole one.
        unfinished=len(run.picks) - len(ended) + sum(s["unfinished"] for s in run.again),
        offered_per_s=None if run.offered_per_s is None else round(run.offered_per_s, 2),
        tokens_per_s=round(tokens / seconds(ended), 1) if tokens else 0.0,
        ttft_p50_ms=percentile(first_tokens_ms(good), 50),
        ttft_p99_ms=percentile(first_tokens_ms(good), 99),
        itl_p99_ms=percentile([gap for s in good for gap in s["gaps_ms"]], 99),
        hit_ratio=round(caches.count("device") / len(caches), 3) if caches else None,
        lru_ratio=round(lru_hits(run.picks, run.slots), 3) if run.arm.adapters else None,
        problems=tuple(f"{v} x {n}" for v, n in counts.most_common(5)),
    )


def first_tokens_ms(samples: Iterable[Mapping[str, Any]]) -> list[float]:
    """Time to the first token of each, from when it was due: a caller who was late hides nothing."""
    return [s["ttft_ms"] + s["late_ms"] for s in samples if s["ttft_ms"] is not None]


def seconds(samples: Samples) -> float:
    """From the first request to the last answer's end."""
    first: float = min((s["asked_at"] for s in samples), default=0.0)
    last = max(map(_end_s, samples), default=0.0)
    return max(last - first, 1e-9)


def _end_s(sample: Mapping[str, Any]) -> float:
    """When its last piece came, of the machine's clock."""
    lasted_ms: float = (sample["ttft_ms"] or 0.0) + sum(sample["gaps_ms"])
    return float(sample["asked_at"]) + lasted_ms / 1000


def requests_per_s(samples: Samples) -> float:
    """How many answers a busy server completes in a second: of the middle of the run, where no caller is missing."""
    ends = sorted(_end_s(s) for s in samples if not s["violations"] and not s["unfinished"])
    cut = len(ends) // 5
    middle = ends[cut : len(ends) - cut]
    if len(middle) < 2 or middle[-1] <= middle[0]:
        return 0.0
    return (len(middle) - 1) / (middle[-1] - middle[0])


def odd_texts(samples: Samples, again: Samples = ()) -> list[int]:
    """Where a text is not what the same weights said to the same prompt otherwise: greedy answers do not vary.

    The weights' own text is what they said when asked again, else the one that came most often.
    """
    said: defaultdict[tuple[object, ...], Counter[str]] = defaultdict(Counter)
    keys = [text_key(s) for s in samples]
    for sample, key in zip(samples, keys, strict=True):
        if key is not None:
            said[key][sample["text"]] += 1
    own = {key: texts.most_common(1)[0][0] for key, texts in said.items()}
    own |= {key: s["text"] for s in again if (key := text_key(s)) is not None}
    return [i for i, (s, k) in enumerate(zip(samples, keys, strict=True)) if k is not None and s["text"] != own[k]]


def told_apart(samples: Samples) -> float | None:
    """The share of weights whose text to a prompt is theirs alone: how much the check of texts is worth."""
    by_prompt: defaultdict[tuple[object, ...], dict[object, str]] = defaultdict(dict)
    for sample in samples:
        key = text_key(sample)
        if key is not None:
            by_prompt[key[1:]][key[0]] = sample["text"]
    shares = [len(set(t.values())) / len(t) for t in by_prompt.values() if len(t) > 1]
    return round(statistics.fmean(shares), 3) if shares else None


def compared(run: ArmRun) -> float | None:
    """The share of whole answers whose weights were asked the same again."""
    keys = [key for s in run.samples if (key := text_key(s)) is not None]
    known = {text_key(s) for s in run.again}
    return round(sum(key in known for key in keys) / len(keys), 3) if keys else None


def text_key(sample: Mapping[str, Any]) -> tuple[object, ...] | None:
    """(weights, prompt, length) of a whole answer of a plan; None of any other."""
    if sample["unfinished"] or sample["violations"] or sample["prompt"] < 0:
        return None
    return (sample["digest"], sample["prompt"], sample["tokens"])


def figures(scenario: Scenario, runs: Sequence[ArmRun]) -> list[Figure]:
    """The scenario's figures; None where an arm is missing or answered nothing."""
    return _JUDGES[scenario.id](scenario, runs, {run.arm.name: arm_found(run) for run in runs})


_Judge = Callable[[Scenario, Sequence[ArmRun], Mapping[str, ArmFound]], list[Figure]]


def _rate(found: Mapping[str, ArmFound], arm: str) -> float | None:
    return found[arm].tokens_per_s or None if arm in found else None


def _throughputs(to: int) -> _Judge:
    """tok/s of every arm to that of one of them."""

    def judge(scenario: Scenario, runs: Sequence[ArmRun], found: Mapping[str, ArmFound]) -> list[Figure]:
        of = scenario.arms[to].name
        return [
            Figure(
                scenario.id, f"tok/s, {a.name} / {of}", ratio(_rate(found, a.name), _rate(found, of)), scenario.anchor
            )
            for a in scenario.arms
            if a.name != of
        ]

    return judge


def _hits(scenario: Scenario, runs: Sequence[ArmRun], found: Mapping[str, ArmFound]) -> list[Figure]:
    lines = _throughputs(-1)(scenario, runs, found)
    return [*lines, *(Figure(scenario.id, f"hits, {f.arm}", f.hit_ratio, scenario.anchor, "") for f in found.values())]


def _within_limit(scenario: Scenario, runs: Sequence[ArmRun], found: Mapping[str, ArmFound]) -> list[Figure]:
    lines = []
    for run in runs:
        times = first_tokens_ms(s for s in run.samples if not s["violations"] and not s["unfinished"])
        # What was not answered at all was not answered in time.
        share = sum(t <= FIRST_TOKEN_LIMIT_S * 1000 for t in times) / len(run.picks) if run.picks else None
        what = f"first tokens within {FIRST_TOKEN_LIMIT_S:g} s, {run.arm.name}"
        lines.append(Figure(scenario.id, what, share, scenario.anchor, "of all"))
    return lines


def _thrash(scenario: Scenario, runs: Sequence[ArmRun], found: Mapping[str, ArmFound]) -> list[Figure]:
    fits, more = (found.get(arm.name) for arm in scenario.arms)
    slower = ratio(more.ttft_p50_ms, fits.ttft_p50_ms) if fits and more and not more.failed else None
    return [Figure(scenario.id, "median first token, twice the slots / fits", slower, scenario.anchor, goal="G6.ttft")]


def _flips(scenario: Scenario, runs: Sequence[ArmRun], found: Mapping[str, ArmFound]) -> list[Figure]:
    def line(what: str, value: float | None, unit: str = "", goal: str = "") -> Figure:
        return Figure(scenario.id, what, value, scenario.anchor, unit, goal)

    moved = [run.flipped for run in runs if run.flipped is not None]
    flips = sum(f.flips for f in moved)
    # Without a flip that was seen to answer, "no error" would be true of a server that was never asked to swap.
    proven = bool(sum(f.answered for f in moved)) and all(f.requests for f in found.values())
    broken = sum(bool(s["violations"]) for run in runs for s in run.again)
    failed = sum(f.failed + f.unfinished for f in found.values()) + sum(f.failed for f in moved) + broken
    first = [f.first_answer_s for f in moved if f.first_answer_s is not None]
    apart = [share for run in runs if (share := told_apart(run.samples)) is not None]
    checked = [share for run in runs if (share := compared(run)) is not None]
    return [
        line("failed, unanswered or unpublished", failed if proven else None, goal="W6.failed"),
        line(
            "answers of wrong weights, by name or by text",
            sum(f.wrong for f in found.values()) if proven else None,
            goal="W6.wrong",
        ),
        line("flips under load", flips),
        line("promotion to the first token by it, median", max(first, default=None), "s"),
        line("answers whose text was compared with the same asked in quiet", min(checked, default=None), "of all"),
        line("versions whose text is theirs alone", min(apart, default=None), "of all"),
    ]


def _quiet(scenario: Scenario, runs: Sequence[ArmRun], found: Mapping[str, ArmFound]) -> list[Figure]:
    p99: list[float | None] = []
    for run in runs:
        others = set(run.models) - {run.models[HOT]}
        asked = [s for s in run.samples if s["model"] in others]
        # Late ones waited for our callers, whom the hot one's requests kept: that says nothing of the server.
        late = any(s["late_ms"] > _LATE_MS for s in asked)
        whole = bool(asked) and not late and not any(s["violations"] or s["unfinished"] for s in asked)
        p99.append(percentile(first_tokens_ms(asked), 99) if whole else None)
    slower = ratio(p99[1], p99[0]) if len(p99) == 2 else None
    return [
        Figure(scenario.id, "p99 first token of the quiet, one hot / all alike", slower, scenario.anchor, goal="W7")
    ]


def _merged(scenario: Scenario, runs: Sequence[ArmRun], found: Mapping[str, ArmFound]) -> list[Figure]:
    pairs = (("unmerged", "merged"), ("unmerged", "base"))
    return [
        Figure(scenario.id, f"tok/s, {a} / {b}", ratio(_rate(found, a), _rate(found, b)), scenario.anchor)
        for a, b in pairs
    ]


_JUDGES: Mapping[str, _Judge] = {
    "W1": _throughputs(0),
    "W2": _hits,
    "W3": _within_limit,
    "W4": _throughputs(-1),
    "W5": _thrash,
    "W6": _flips,
    "W7": _quiet,
    "W8": _merged,
}
