"""A submitted sequence and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.engine.beams import BeamSearch
from serving.engine.kv import Scope
from serving.engine.plan import Key
from serving.engine.request import LoadTimes, State, Submit, Timing


@dataclass(slots=True)
class Sequence:
    """A submitted sequence and where it stands. Only the scheduler changes it.

    rows: all that it holds, in a beam search those of the live hypotheses first; row: the first of them.
    turn: its number among all that ever waited. cost: virtual tokens that it was charged.
    """

    key: Key
    submit: Submit
    arrived_at: float
    state: State = State.WAITING
    computed: int = 0
    reused: int = 0
    output: list[int] = field(default_factory=list)
    search: BeamSearch | None = None
    rows: list[int] = field(default_factory=list)
    turn: int = 0
    cost: int = 0
    loaded_at: float | None = None
    admitted_at: float = 0.0
    proven_at: float = 0.0
    first_token_at: float = 0.0
    source: str = "device"
    load: LoadTimes | None = None

    @property
    def row(self) -> int:
        return self.rows[0]

    @property
    def used_rows(self) -> list[int]:
        """The rows that take part in the next step: one, or those of the live hypotheses."""
        return self.rows[: 1 if self.search is None else len(self.search.live)]

    @property
    def width(self) -> int:
        """How many rows it needs."""
        return self.submit.sampling.num_beams

    @property
    def tokens_left(self) -> int:
        """How many tokens it may still answer with."""
        answered = self.output if self.search is None else self.search.live[0].tokens if self.search.live else ()
        return self.submit.sampling.max_tokens - len(answered)

    @property
    def adapter(self) -> str | None:
        return self.submit.adapter

    @property
    def scope(self) -> Scope:
        """Whose computed prefixes may serve this sequence, and whom its own may."""
        return Scope(self.submit.salt, self.submit.adapter)

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens whose keys and values lie in its row."""
        return (*self.submit.prompt, *self.output)[: self.computed]

    def timing(self, now: float) -> Timing:
        """Seconds spent so far, by phase."""
        admitted = self.admitted_at or now
        loaded = min(self.loaded_at or self.arrived_at, admitted)
        first = self.first_token_at or now
        begun = min(max(admitted, self.proven_at), first)
        return Timing(
            queue_s=max(0.0, admitted - loaded),
            load_s=max(0.0, loaded - self.arrived_at),
            prefill_s=max(0.0, first - begun),
            decode_s=max(0.0, now - first),
            source=self.source,
            reused=self.reused,
            load=self.load,
            device_s=begun - admitted,
        )
