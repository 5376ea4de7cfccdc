"""A submitted sequence and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.engine.kv import Scope
from serving.engine.plan import Key
from serving.engine.request import State, Submit, Timing


@dataclass(slots=True)
class Sequence:
    """A submitted sequence and where it stands. Only the scheduler changes it."""

    key: Key
    submit: Submit
    arrived_at: float
    state: State = State.WAITING
    row: int = -1
    computed: int = 0
    reused: int = 0
    output: list[int] = field(default_factory=list)
    slot_wait_since: float | None = None
    loaded_at: float | None = None
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    source: str = "device"

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
        return Timing(
            queue_s=max(0.0, admitted - loaded),
            load_s=max(0.0, loaded - self.arrived_at),
            prefill_s=max(0.0, first - admitted),
            decode_s=max(0.0, now - first),
            source=self.source,
            reused=self.reused,
        )
