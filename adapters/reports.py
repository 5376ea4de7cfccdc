"""An evaluation as a record, and the policy a gate judges it by. Plain data, JSON in and out, and what it must hold."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from adapters.errors import InvalidRequest

ROUGE_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MOST_EXAMPLES = 10_000_000
LONGEST_RATIO = 1000.0  # that a policy can allow
_LONGEST_ANSWER = 1e9  # in words of its reference
_SHA256 = re.compile(r"[0-9a-f]{64}")
SHORTEST_DIGEST = 8  # that a report is found by
_BEGINNING = re.compile(rf"[0-9a-f]{{{SHORTEST_DIGEST},64}}")
_ROUNDING = 1e-3  # between a mean and the mean of figures that were rounded for display


class Role(StrEnum):
    """What a system is in an evaluation."""

    BASE = "base"
    CHAMPION = "champion"
    CANDIDATE = "candidate"


@dataclass(frozen=True, slots=True)
class SystemScores:
    """One system's means over the set. scores: metric -> mean F in 0..1; digest: of the weights that answered.

    length_ratio: mean answer words / mean reference words, in ROUGE's words; empty_rate: share of empty answers.
    """

    role: Role
    model: str
    digest: str
    scores: Mapping[str, float]
    length_ratio: float
    empty_rate: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Candidate minus `against`, example by example: mean and 95 % bootstrap interval of metric F, n pairs."""

    against: Role
    metric: str
    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation bound to digests; it speaks for these very weights, data, settings and code, and no others.

    settings: how answers were made (sampling, stops, seed, tokenizer of ROUGE ...). examples: one mapping per
    example with `prompt`, `reference`, `answers` (role -> text) and `scores` (role -> metric -> F), and `before`, the
    turns before the prompt, where there are any.
    """

    adapter: str
    number: int
    adapter_digest: str
    base_digest: str
    champion_digest: str | None
    data: str
    data_digest: str
    code: str
    settings: Mapping[str, object]
    n: int
    systems: tuple[SystemScores, ...]
    differences: tuple[PairedDifference, ...]
    examples: tuple[Mapping[str, Any], ...]
    created_at: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """SHA-256 hex over the report's canonical JSON: its name in the store."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """The bytes that are stored: sorted keys, no spaces, no NaN."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def system(self, role: Role) -> SystemScores | None:
        """The scores of the system in this role, or None."""
        return next((s for s in self.systems if s.role is role), None)

    def difference(self, against: Role, metric: str) -> PairedDifference | None:
        """The candidate's paired difference against a role on a metric, or None."""
        return next((d for d in self.differences if d.against is against and d.metric == metric), None)


def report_from_json(raw: Mapping[str, Any]) -> Report:
    """The report of its own JSON. Raises KeyError, TypeError or ValueError on anything else."""
    fields = dict(raw)
    fields["systems"] = tuple(SystemScores(**{**s, "role": Role(s["role"])}) for s in raw["systems"])
    fields["differences"] = tuple(PairedDifference(**{**d, "against": Role(d["against"])}) for d in raw["differences"])
    fields["examples"] = tuple(raw["examples"])
    return Report(**fields)


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """What a version of one adapter must show before it is promoted.

    data_digest: the evaluation set; min_n: fewer examples decide nothing. The candidate must beat the base on `metric`
    by more than `margin` (lower bound of the interval), may lose at most `tolerance` to the champion (lower bound), and
    must keep length_ratio and empty_rate in range.
    """

    data_digest: str
    min_n: int
    metric: str = "rouge1"
    margin: float = 0.0
    tolerance: float = 0.02
    max_empty_rate: float = 0.1
    length_ratio: tuple[float, float] = (0.2, 5.0)


class Verdict(StrEnum):
    """What the gate says; UNDECIDED is never a pass."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's verdict and every rule that did not hold, in words with figures."""

    verdict: Verdict
    reasons: tuple[str, ...]
    report: str | None = None


def prompt_of(example: Mapping[str, Any]) -> str:
    """What makes an example's prompt the same as another's: the words of all its turns, whatever blanks are between."""
    return " ".join(f"{example.get('before') or ''} {example.get('prompt')}".split())


def check_digest(text: str) -> str:
    """A report's digest or its beginning, 8 digits at least. Raises InvalidRequest for anything else."""
    if _BEGINNING.fullmatch(text) is None:
        raise InvalidRequest(
            f"{text[:80]!r} is no report; give a version as name@1, or 8 to 64 hex digits of a report's digest",
            "digest",
        )
    return text


def check_policy(policy: GatePolicy) -> None:
    """Raise InvalidRequest, with the field at fault, unless every figure of the policy can be met and missed."""
    low, high = policy.length_ratio
    if _SHA256.fullmatch(policy.data_digest) is None:
        raise InvalidRequest("data_digest must be the SHA-256 of the evaluation set, 64 hex digits", "data_digest")
    if policy.metric not in ROUGE_METRICS:
        raise InvalidRequest(f"metric must be one of {', '.join(ROUGE_METRICS)}", "metric")
    _within("min_n", policy.min_n, 1, MOST_EXAMPLES)
    _within("margin", policy.margin, -1, 1)
    _within("tolerance", policy.tolerance, 0, 1)
    _within("max_empty_rate", policy.max_empty_rate, 0, 1)
    for bound in (low, high):
        _within("length_ratio", bound, 0, LONGEST_RATIO)
    if low > high:
        raise InvalidRequest(f"length_ratio must be [lowest, highest], not [{low:g}, {high:g}]", "length_ratio")


def check_report(report: Report) -> None:
    """Raise InvalidRequest, with the field at fault, unless the figures can be those of one evaluation.

    Every example is there with its scores, the means are theirs, and each system is the one that the report names.
    """
    _within("n", report.n, 1, MOST_EXAMPLES)
    if len(report.examples) != report.n:
        raise InvalidRequest(f"the report says n = {report.n} and holds {len(report.examples)} examples", "examples")
    named = {
        Role.BASE: report.base_digest,
        Role.CHAMPION: report.champion_digest,
        Role.CANDIDATE: report.adapter_digest,
    }
    if len({s.role for s in report.systems}) != len(report.systems):
        raise InvalidRequest("a role is in the report twice", "systems")
    if len({(d.against, d.metric) for d in report.differences}) != len(report.differences):
        raise InvalidRequest("a difference is in the report twice", "differences")
    for system in report.systems:
        if system.digest != named[system.role]:
            raise InvalidRequest(
                f"the {system.role.value} that answered is not the one that the report names", "systems"
            )
        _check_system(system, report)
    for difference in report.differences:
        _check_difference(difference, report)


def _check_system(system: SystemScores, report: Report) -> None:
    role = system.role.value
    _within(f"systems.{role}.length_ratio", system.length_ratio, 0, _LONGEST_ANSWER)
    _within(f"systems.{role}.empty_rate", system.empty_rate, 0, 1)
    for metric, mean in system.scores.items():
        _within(f"systems.{role}.scores.{metric}", mean, 0, 1)
        found = [_score(example, role, metric) for example in report.examples]
        if abs(math.fsum(found) / len(found) - mean) > _ROUNDING:
            raise InvalidRequest(f"{metric} of the {role} is not the mean of its examples", f"systems.{role}.scores")


def _check_difference(difference: PairedDifference, report: Report) -> None:
    d, where = difference, f"differences.{difference.against.value}.{difference.metric}"
    for field, value in (("mean", d.mean), ("low", d.low), ("high", d.high)):
        _within(f"{where}.{field}", value, -1, 1)
    if not d.low <= d.mean <= d.high:
        raise InvalidRequest(f"{where}: the mean {d.mean:g} is not in its interval [{d.low:g}, {d.high:g}]", where)
    if d.n != report.n:
        raise InvalidRequest(f"{where} is of {d.n} pairs, the report of {report.n} examples", where)
    own, other = report.system(Role.CANDIDATE), report.system(d.against)
    if d.against is Role.CANDIDATE or own is None or other is None:
        raise InvalidRequest(f"{where} is against a system that the report does not hold", where)
    if d.metric not in own.scores or d.metric not in other.scores:
        raise InvalidRequest(f"{where}: the report holds no {d.metric} of both systems", where)
    if abs(own.scores[d.metric] - other.scores[d.metric] - d.mean) > _ROUNDING:
        raise InvalidRequest(f"{where}: the mean {d.mean:g} is not the difference of the two systems' means", where)


def _score(example: Mapping[str, Any], role: str, metric: str) -> float:
    """One example's score. Raises InvalidRequest when it holds none, or no prompt."""
    scores = example.get("scores")
    of_role = scores.get(role) if isinstance(scores, Mapping) else None
    value = of_role.get(metric) if isinstance(of_role, Mapping) else None
    if not isinstance(example.get("prompt"), str) or value is None:
        raise InvalidRequest(f"every example needs a prompt and scores.{role}.{metric}", "examples")
    _within(f"examples.scores.{role}.{metric}", value, 0, 1)
    return float(value)


def _within(field: str, value: object, low: float, high: float) -> None:
    """Raise InvalidRequest unless the value is a number in the range; NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{field} must be a number of {low:.12g} to {high:.12g}, not {str(value)[:80]}", field)
