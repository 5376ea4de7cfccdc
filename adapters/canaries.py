"""Canaries and shadows: a second version of an alias tried on some of its requests. Who gets it, and when it must end.

A canary answers a share of the alias's requests in its own name; a shadow computes a share of them beside the live
answer and is never shown. Both hang on the alias's generation: whatever moves the alias ends them, so that a promotion
in between always wins. All of this is a pure function of records and counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

from adapters.errors import InvalidRequest
from adapters.records import DEFAULT_TENANT, AdapterVersion, Move

# What answers more than half is no canary: promote it, through the gate.
MOST_CANARY_PERCENT = 50.0
MOST_SHADOW_PERCENT = 100.0
_FIRST_EDGE_S, _GROWTH, _EDGES = 0.001, 1.25, 62  # 1 ms to about 13 minutes


class Arm(StrEnum):
    """Which side of a split a request falls on; SHADOW only names figures."""

    CHAMPION = "champion"
    CANARY = "canary"
    SHADOW = "shadow"


class Sticky(StrEnum):
    """What decides on a request's arm: its `user` field (else its key), or its key alone."""

    USER = "user"
    KEY = "key"


@dataclass(frozen=True, slots=True)
class CanaryLimits:
    """When a canary is rolled back without anybody asking.

    Errors: its rate may exceed the champion's by max_error_excess. Latency: the 95th percentile of the first token may
    be max_latency_ratio times the champion's, and latency_slack_s seconds more. Quality, of a shadow of the same
    version: at least min_agreement of the compared tokens are the same, and the mean gap of their log-probabilities is
    at most max_logprob_gap either way. None of them counts before min_requests of the canary (for latency of the
    champion too), or min_shadow_tokens compared tokens.
    """

    min_requests: int = 50
    max_error_excess: float = 0.05
    max_latency_ratio: float = 2.0
    latency_slack_s: float = 0.1
    min_shadow_tokens: int = 500
    min_agreement: float = 0.5
    max_logprob_gap: float = 1.0


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that answers `percent` of an alias's requests. id: part of the hash that shares them out."""

    id: str
    number: int
    percent: float
    sticky: Sticky
    limits: CanaryLimits


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that computes `percent` of an alias's requests beside the live answer."""

    id: str
    number: int
    percent: float


@dataclass(frozen=True, slots=True)
class Split:
    """What is tried on an alias. It holds as long as the alias has this generation; number: where it points."""

    name: str
    alias: str
    number: int
    generation: int
    canary: Canary | None
    shadow: Shadow | None
    at: datetime
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Route:
    """Where a model id leads: to a version and, while a split holds, to those that are tried beside it.

    canary and shadow None: not tried now, or no longer to be served.
    """

    version: AdapterVersion
    split: Split | None = None
    canary: AdapterVersion | None = None
    shadow: AdapterVersion | None = None


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """What one arm's requests came to. errors: those that the server or the adapter is to blame for.

    first_token: counts of seconds to the first token, by the bounds of `edges()`, the last of all beyond them.
    """

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    first_token: tuple[int, ...] = (0,) * (_EDGES + 1)

    @property
    def error_rate(self) -> float:
        """Errors a request; 0 without requests."""
        return self.errors / self.requests if self.requests else 0.0

    @property
    def timed(self) -> int:
        """Requests whose first token came."""
        return sum(self.first_token)

    @property
    def first_token_p95_s(self) -> float:
        """Seconds within which 95 of 100 first tokens came: the upper bound of their bucket; 0 without any."""
        left = math.ceil(0.95 * self.timed)
        for edge, count in zip((*edges(), math.inf), self.first_token, strict=True):
            left -= count
            if left <= 0 < self.timed:
                return min(edge, edges()[-1])
        return 0.0


@dataclass(frozen=True, slots=True)
class ShadowFigures:
    """What shadows came to. dropped: rows were short; failed: the shadow's own fault.

    compared: tokens that both chose after the very same text, up to and with the first that differed; agreed: how many
    of them were the same; gap: sum over them of the shadow's log-probability of its token less the live one's of its.
    """

    shadows: int = 0
    dropped: int = 0
    failed: int = 0
    compared: int = 0
    agreed: int = 0
    gap: float = 0.0

    @property
    def agreement(self) -> float:
        """Share of compared tokens that are the same; 1 without any."""
        return self.agreed / self.compared if self.compared else 1.0

    @property
    def mean_gap(self) -> float:
        """Mean difference of log-probabilities, shadow less live; 0 without any."""
        return self.gap / self.compared if self.compared else 0.0


# By the trial's id and the arm.
Figures: TypeAlias = Mapping[tuple[str, Arm], ArmFigures | ShadowFigures]


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """A split and what came of it, over all gateways. ended: the move that ended it, None while it holds.

    fault: the limit that the canary breaks by these figures, None when it keeps all of them.
    """

    split: Split
    champion: ArmFigures = field(default_factory=ArmFigures)
    canary: ArmFigures = field(default_factory=ArmFigures)
    shadow: ShadowFigures = field(default_factory=ShadowFigures)
    fault: str | None = None
    ended: Move | None = None


def edges() -> tuple[float, ...]:
    """Upper bounds of the buckets for seconds to the first token, each a quarter above the one before."""
    return _ALL_EDGES


_ALL_EDGES = tuple(_FIRST_EDGE_S * _GROWTH**at for at in range(_EDGES))


def bucket_of(seconds: float) -> int:
    """The bucket in which so many seconds are counted."""
    return next((at for at, edge in enumerate(_ALL_EDGES) if seconds <= edge), _EDGES)


def share_of(alias: str, sticky: str, trial: str) -> float:
    """A number in [0, 1) that every gateway finds alike, now and after a restart, for this caller and trial.

    alias: `name@alias`; sticky: what identifies the caller; trial: the canary's id. A caller below `percent` / 100
    gets the canary, so widening a canary keeps those who have it.
    """
    digest = hashlib.sha256("\0".join((alias, trial, sticky)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def takes(alias: str, sticky: str, trial: str, percent: float) -> bool:
    """Whether this caller is among the `percent` that the trial gets."""
    return share_of(alias, sticky, trial) * 100 < percent


def trial_id(tenant: str, name: str, alias: str, generation: int, kind: Arm) -> str:
    """The id of a trial that begins with this generation of an alias."""
    return hashlib.sha256(f"{tenant}\0{name}\0{alias}\0{generation}\0{kind}".encode()).hexdigest()[:16]


def check_percent(percent: float, most: float) -> float:
    """The share if it may be given. Raises InvalidRequest."""
    if not 0 < percent <= most:
        beyond = "; what should answer more than half is to be promoted" if most == MOST_CANARY_PERCENT else ""
        raise InvalidRequest(f"percent must be above 0 and at most {most:g}, not {percent:g}{beyond}", "percent")
    return percent


def check_limits(limits: CanaryLimits) -> CanaryLimits:
    """The limits if a canary can be judged by them. Raises InvalidRequest that names the field."""
    rules = {
        "min_requests": 1 <= limits.min_requests <= 1_000_000_000,
        "max_error_excess": 0 <= limits.max_error_excess <= 1,
        "max_latency_ratio": 1 <= limits.max_latency_ratio <= 1000,
        "latency_slack_s": 0 <= limits.latency_slack_s <= 600,
        "min_shadow_tokens": 1 <= limits.min_shadow_tokens <= 1_000_000_000,
        "min_agreement": 0 <= limits.min_agreement <= 1,
        "max_logprob_gap": 0 < limits.max_logprob_gap <= 1000,
    }
    for name, holds in rules.items():
        if not holds:
            raise InvalidRequest(f"{name} is out of range: {getattr(limits, name)!r}", name)
    return limits


def fault_of(limits: CanaryLimits, champion: ArmFigures, canary: ArmFigures, shadow: ShadowFigures) -> str | None:
    """The first limit that a canary breaks, in words for the history; None while it keeps them or too little is known.

    shadow: the figures of a shadow of the canary's own version; empty when there is none.
    """
    if canary.requests >= limits.min_requests:
        most = champion.error_rate + limits.max_error_excess
        if canary.error_rate > most:
            return (
                f"errors: {canary.error_rate:.1%} of {canary.requests} requests, the champion "
                f"{champion.error_rate:.1%} of {champion.requests}, at most {most:.1%} allowed"
            )
    if min(canary.timed, champion.timed) >= limits.min_requests:
        slow, usual = canary.first_token_p95_s, champion.first_token_p95_s
        if slow > usual * limits.max_latency_ratio and slow - usual > limits.latency_slack_s:
            return (
                f"latency: 95 % of first tokens within {slow:.3g} s over {canary.timed} requests, the champion's "
                f"within {usual:.3g} s over {champion.timed}, at most {limits.max_latency_ratio:g} times that allowed"
            )
    if shadow.compared >= limits.min_shadow_tokens:
        if shadow.agreement < limits.min_agreement:
            return (
                f"quality: {shadow.agreement:.1%} of {shadow.compared} shadow tokens agree with the champion's, "
                f"at least {limits.min_agreement:.1%} wanted"
            )
        if abs(shadow.mean_gap) > limits.max_logprob_gap:
            return (
                f"quality: the mean log-probability gap over {shadow.compared} shadow tokens is "
                f"{shadow.mean_gap:+.3g}, at most {limits.max_logprob_gap:g} either way allowed"
            )
    return None


def sum_arms(parts: Iterable[ArmFigures]) -> ArmFigures:
    """The figures of several gateways as one."""
    found = list(parts)
    columns = zip(*(f.first_token for f in found), strict=True) if found else ()
    return ArmFigures(
        requests=sum(f.requests for f in found),
        errors=sum(f.errors for f in found),
        tokens=sum(f.tokens for f in found),
        first_token=tuple(map(sum, columns)) or ArmFigures().first_token,
    )


def sum_shadows(parts: Iterable[ShadowFigures]) -> ShadowFigures:
    """The figures of several gateways as one."""
    found = list(parts)
    return ShadowFigures(
        shadows=sum(f.shadows for f in found),
        dropped=sum(f.dropped for f in found),
        failed=sum(f.failed for f in found),
        compared=sum(f.compared for f in found),
        agreed=sum(f.agreed for f in found),
        gap=math.fsum(f.gap for f in found),
    )


def judged(split: Split, champion: ArmFigures, canary: ArmFigures, shadow: ShadowFigures) -> str | None:
    """`fault_of` for a split: shadow figures count only where they are of the canary's own version."""
    if split.canary is None:
        return None
    same = split.shadow is not None and split.shadow.number == split.canary.number
    return fault_of(split.canary.limits, champion, canary, shadow if same else ShadowFigures())


def alias_id(split: Split) -> str:
    """`name@alias`, as the hash of a request's share has it."""
    return f"{split.name}@{split.alias}"
