"""What passes between scheduler, loader and runner: a step as data, and what came of it. No tensors, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from serving.engine.beams import Candidate
from serving.engine.kv import Copy
from serving.engine.request import LoadTimes, Sampling, TokenLogprob, Told

NO_SLOT = 0
FED_ALREADY = -1  # the token that the runner sampled last for this row


class Key(tuple[int, int]):
    """(gateway connection, id): what names a sequence inside an engine."""

    __slots__ = ()


Outgoing = tuple[Key, Told]


class Load(Enum):
    """Where an adapter's tensors are, as far as admission cares."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class LoadState:
    """The loader's answer. failure: (code, message) when FAILED; retry_after_s: when trying again may help, None never.
    source: the tier it came from, for the timing; times: of a load that brought it, while nobody has taken it yet.
    """

    load: Load
    failure: tuple[str, str] = ("", "")
    source: str = "host"
    retry_after_s: float | None = None
    times: LoadTimes | None = None


class Loader(Protocol):
    """The host tier as admission sees it."""

    @property
    def budget_bytes(self) -> int:
        """How much it holds."""

    def want(self, digest: str) -> LoadState:
        """Start loading if need be; never blocks."""

    def bytes_of(self, digest: str) -> int:
        """Bytes of an adapter on the host; 0 when it is not there. Starts nothing."""

    def source_of(self, digest: str) -> str:
        """The tier that an adapter lies in now, as far as is known. Starts nothing."""

    def loading_s(self, digest: str) -> float:
        """For how long the adapter's load has been under way, whoever wanted it; 0 without one. Starts nothing."""

    def brought(self, digest: str) -> LoadTimes | None:
        """What the load took that brought an adapter to the host; None when it is not there. Starts nothing."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row's part of a step.

    tokens: prompt tokens to compute at positions start, start+1, ...; empty for a decode row, whose one input is the
    token the runner sampled last for this row (so that a device may run one step ahead of the host).
    sample: whether the row yields a token. position: index of that token in the answer, part of the random key.
    candidates: of a beam search, how many of the likeliest tokens are wanted; feed: the token that its decode row
    goes on from, since hypotheses change rows, or that of a golden row. targets: where the prompt's log-probabilities
    are wanted, the token that follows each of `tokens` but the first `skipped`; the prompt's last token has none. Of an
    encoder-decoder, the one token that follows what its decoder is fed. prompt and output are there only where
    penalties or bans look back.
    """

    key: Key
    row: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    sample: bool
    sampling: Sampling
    choice: int
    position: int
    ban: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    candidates: int = 0
    feed: int = FED_ALREADY
    skipped: int = 0

    @property
    def length(self) -> int:
        """How many tokens this row computes."""
        return len(self.tokens) or 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step, fully described. scrub: rows whose cache must be zeroed first, since a fault left rubbish there;
    then copies: prefixes to copy between rows, in this order.
    """

    rows: tuple[RowPlan, ...]
    scrub: tuple[int, ...] = ()
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row's new token, or the reason why it has none. numerics: the model's own numbers are the reason."""

    token: int = -1
    logprob: TokenLogprob | None = None
    candidates: tuple[Candidate, ...] = ()
    fault: str | None = None
    numerics: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner gives back: by cache row, one entry for each row that was to sample or that failed.

    scores: by cache row, log-probabilities of the row's targets.
    """

    sampled: Mapping[int, Sampled]
    scores: Mapping[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
