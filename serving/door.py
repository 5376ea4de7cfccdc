"""The gateway's view of an engine: submit, cancel, condition. `serving/link.py` implements it over a socket,
tests implement it with a fake."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from serving.engine.request import EngineFacts, Event, Failed, Heartbeat, Moved, Sampling


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
        *,
        shadow: bool = False,
    ) -> AsyncIterator[Event]:
        """Generate one sequence. The iterator yields Tokens and then exactly one Finished or Failed, and ends.

        shadow: see Submit.

        An engine that dies gives Failed(code='engine_lost'); no engine at all gives Failed(code='not_ready').
        Closing the iterator early (aclose, or cancelling the task that reads it) cancels the sequence.
        """

    async def warm(self, digest: str, ttl_s: float, *, prove: bool = False) -> Moved | Failed:
        """Have an adapter on the host, and keep it there for ttl_s seconds; returns once it is there, or why not.
        prove: let it prove itself too, if it never has; in a slot that nobody uses, where there is one.

        Failed is with the load's own code, `adapter_capacity`, `adapter_unloaded`, `engine_lost` or `not_ready`. Giving
        up the wait (a timeout, a cancellation) leaves the load as it is. An engine that restarts has forgotten what was
        warm and what was pinned; its heartbeat tells what is.
        """

    async def pin(self, digest: str, on: bool) -> Moved | Failed:
        """Have an adapter in a slot and leave it there (on), or let it go as others do (off). Failed as in `warm`."""

    async def drop(self, digest: str, deadline_s: float) -> Moved | Failed:
        """Refuse an adapter's new sequences, let the running ones end, after deadline_s seconds end them, and free its
        bytes on every tier; returns then. Once this is over the adapter may be asked for again: hide it first."""

    async def undrop(self, digest: str) -> Moved | Failed:
        """Call off a drop that still waits for running sequences: the adapter is served again at once, and who waits
        for the drop is told where it lies. Nothing happens to one that is not going."""
