"""From answers to a report: every example scored, every difference with its interval, the worst and the best shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import DataRefused
from adapters.prompts import Message
from adapters.reports import ROUGE_METRICS, PairedDifference, Report, Role, SystemScores
from train.rouge import Rouge, Score

RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Case:
    """One example: what was asked, what was wanted, what each system answered. before: the turns before the prompt."""

    id: str
    prompt: str
    references: tuple[str, ...]
    answers: Mapping[Role, str]
    before: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class SystemId:
    """Who answered in a role. digest: of the weights that answered."""

    role: Role
    model: str
    digest: str


@dataclass(frozen=True, slots=True)
class Scored:
    """The figures of a set of cases. scores[role][i] are those of case i."""

    systems: tuple[SystemScores, ...]
    differences: tuple[PairedDifference, ...]
    scores: Mapping[Role, tuple[Mapping[str, Score], ...]]


def score_cases(cases: Sequence[Case], systems: Sequence[SystemId], rouge: Rouge, *, seed: int) -> Scored:
    """Score every system on every case, and the candidate against the others, pair by pair.

    Raises DataRefused on an empty set or an empty reference.
    """
    if not cases:
        raise DataRefused("there is nothing to score")
    scores: dict[Role, tuple[Mapping[str, Score], ...]] = {}
    for system in systems:
        scores[system.role] = tuple(rouge.score(c.answers[system.role], c.references) for c in cases)
    found = tuple(_system(system, cases, scores[system.role], rouge) for system in systems)
    others = [s.role for s in systems if s.role is not Role.CANDIDATE]
    differences = tuple(
        paired_difference(
            [own[metric].f - other[metric].f for own, other in zip(scores[Role.CANDIDATE], scores[role], strict=True)],
            against=role,
            metric=metric,
            seed=seed,
        )
        for role in others
        if Role.CANDIDATE in scores
        for metric in ROUGE_METRICS
    )
    return Scored(found, differences, scores)


def paired_difference(differences: Sequence[float], *, against: Role, metric: str, seed: int) -> PairedDifference:
    """Mean and 95 % interval of differences, example by example: bias-corrected bootstrap, the same for equal seeds.

    A lone example proves nothing: its interval is all that a difference of two F scores can be.
    """
    n = len(differences)
    low, high = interval(differences, seed=seed) if n > 1 else (-1.0, 1.0)
    return PairedDifference(against, metric, math.fsum(differences) / n, low, high, n)


def interval(values: Sequence[float], *, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval (BCa) of the mean of at least two values."""
    mean = math.fsum(values) / len(values)
    if max(values) == min(values):
        return mean, mean  # nothing to resample; BCa would divide by zero
    # Imported here: it takes half a second.
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        batch=500,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    # BCa fails where nearly all values are equal; the whole range is then the honest answer.
    if not (math.isfinite(low) and math.isfinite(high)):
        return float(min(values)), float(max(values))
    # Of few and very skewed values it can miss the mean itself.
    return min(low, mean), max(high, mean)


def examples_of(cases: Sequence[Case], scored: Scored) -> tuple[Mapping[str, object], ...]:
    """The cases as a report keeps them: prompt and turns before it, reference, answers and scores by role."""
    return tuple(
        {
            "id": case.id,
            "prompt": case.prompt,
            **({"before": [{"role": m.role, "content": m.content} for m in case.before]} if case.before else {}),
            "reference": case.references[0],
            "answers": {role.value: answer for role, answer in case.answers.items()},
            "scores": {
                role.value: {metric: round(score.f, 6) for metric, score in scored.scores[role][i].items()}
                for role in scored.scores
            },
        }
        for i, case in enumerate(cases)
    )


def extremes(report: Report, metric: str, count: int) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The examples with the candidate's worst and best scores on a metric, each worst or best first; no overlap.

    Of a report that holds no such scores of the candidate, none.
    """
    if (own := report.system(Role.CANDIDATE)) is None or metric not in own.scores:
        return [], []
    order = sorted(report.examples, key=lambda e: float(e["scores"][Role.CANDIDATE.value][metric]))
    count = min(count, len(order) // 2)
    return [dict(e) for e in order[:count]], [dict(e) for e in reversed(order[len(order) - count :])]


def _system(
    system: SystemId, cases: Sequence[Case], scores: Sequence[Mapping[str, Score]], rouge: Rouge
) -> SystemScores:
    n = len(cases)
    return SystemScores(
        role=system.role,
        model=system.model,
        digest=system.digest,
        scores={metric: math.fsum(s[metric].f for s in scores) / n for metric in ROUGE_METRICS},
        length_ratio=_length_ratio(system.role, cases, rouge),
        empty_rate=sum(not c.answers[system.role].strip() for c in cases) / n,
    )


def _length_ratio(role: Role, cases: Sequence[Case], rouge: Rouge) -> float:
    """Mean words of an answer over mean words of a reference, in the scorer's own words."""
    words = sum(rouge.length(c.answers[role]) for c in cases)
    return words / max(1, sum(rouge.length(c.references[0]) for c in cases))
