"""How much a gateway takes on at once, and whether it takes on anything at all."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from adapters.errors import NotReady, QueueFull

LONGEST_DRAIN_S = 86_400  # a day: no request is let run on for longer, and a stop that never comes is a mistyped one


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """The gateway's figures. Times in seconds; max_sequences bounds prompts x n of one request.

    A request that leaves max_tokens out gets what its version suggests, else default_chat_tokens or
    default_completion_tokens, never more than the context has left. Prompts longer than thread_chars characters are
    tokenised off the event loop.
    """

    request_deadline_s: float = 600.0
    default_chat_tokens: int = 256
    default_completion_tokens: int = 16
    max_inflight: int = 256
    max_choices: int = 128
    max_sequences: int = 128
    max_stops: int = 4
    max_stop_chars: int = 64
    max_logit_bias: int = 300
    thread_chars: int = 4096


class Admission:
    """Counts the requests in flight, refuses beyond the limit, and lets the last ones finish before a stop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._inflight = 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inflight(self) -> int:
        return self._inflight

    @property
    def draining(self) -> bool:
        return self._draining

    def check_open(self) -> None:
        """Raises NotReady while draining."""
        if self._draining:
            raise NotReady("The server is about to stop and takes no new requests.", retry_after_s=5.0)

    def enter(self) -> None:
        """Count one request in; `leave` rhymes. Raises NotReady while draining, QueueFull at the limit."""
        self.check_open()
        if self._inflight >= self.limit:
            raise QueueFull(f"The gateway works on {self.limit} requests already; try again in a moment.")
        self._inflight += 1
        self._empty.clear()

    def leave(self) -> None:
        """Count one request out."""
        self._inflight -= 1
        if self._inflight == 0:
            self._empty.set()

    def drain(self) -> None:
        """Take no new requests from now on; those in flight go on."""
        self._draining = True

    async def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight, at most timeout_s. Whether it is so."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
