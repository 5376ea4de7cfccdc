"""The gateway's view of an engine: submit, cancel, condition. `serving/link.py` implements it over a socket,
tests implement it with a fake."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from serving.engine.request import EngineFacts, Event, Heartbeat, Sampling


class EngineDoor(Protocol):
    """One engine as a gateway sees it."""

    @property
    def facts(self) -> EngineFacts | None:
        """What the connected engine holds; None while none is connected."""

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The engine's last heartbeat; None while none is connected."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the last heartbeat (infinite while none is connected)."""

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        adapter: str | None,
        choice: int,
        deadline_s: float,
        tenant: str,
    ) -> AsyncIterator[Event]:
        """Generate one sequence. The iterator yields Tokens and then exactly one Finished or Failed, and ends.

        An engine that dies gives Failed(code='engine_lost'); no engine at all gives Failed(code='not_ready').
        Closing the iterator early (aclose, or cancelling the task that reads it) cancels the sequence.
        """
