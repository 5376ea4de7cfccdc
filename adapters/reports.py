"""An evaluation as a record, and the policy a gate judges it by. Plain data: JSON in, JSON out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

ROUGE_METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Role(StrEnum):
    """What a system is in an evaluation."""

    BASE = "base"
    CHAMPION = "champion"
    CANDIDATE = "candidate"


@dataclass(frozen=True, slots=True)
class SystemScores:
    """One system's means over the set. scores: metric -> mean F in 0..1; digest: of the weights that answered.

    length_ratio: mean answer words / mean reference words; empty_rate: share of empty answers.
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
    example with `prompt`, `reference`, `answers` (role -> text) and `scores` (role -> metric -> F).
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
