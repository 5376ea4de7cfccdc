"""Shadows: a second sequence beside a live one, under another version, compared token by token and never shown.

A shadow only listens. It is submitted after the live sequence, in the same turn, so that both ride in one batch; the
engine drops it as soon as its row or slot is wanted by anybody else. Whatever happens to it, the live answer goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from adapters.canaries import ShadowFigures
from serving.arms import Beside
from serving.door import EngineDoor
from serving.engine.request import Event, Failed, Finished, FinishReason, Sampling, Tokens

SHADOW_DROPPED = "shadow_dropped"
_LEAST_LOGPROB = -100.0  # in place of minus infinity, which has no mean

log = structlog.get_logger(__name__)


class Sums(Protocol):
    """Where figures go."""

    def shadowed(self, trial: str, came: ShadowFigures) -> None: ...


@dataclass(slots=True)
class Heard:
    """One side's tokens so far, and whether it ended by itself there (not by a bound, nor by being cut off)."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    def hear(self, event: Event) -> None:
        """Take in one event of the sequence."""
        if isinstance(event, Tokens):
            self.ids += event.ids
            self.logprobs += [max(told.chosen, _LEAST_LOGPROB) for told in event.logprobs]
        elif isinstance(event, Finished):
            self.stopped = event.reason is FinishReason.STOP


def agreement(live: Heard, shadow: Heard) -> ShadowFigures:
    """What two answers to one prompt have in common, token by token, up to and with the first that differs.

    Behind it their contexts differ, and a comparison would say nothing. An end is a token too, though it has no
    log-probability; where one side was only cut off, nothing is known.
    """
    compared = agreed = 0
    gap = 0.0
    for one, other, of_one, of_other in zip(live.ids, shadow.ids, live.logprobs, shadow.logprobs, strict=False):
        compared += 1
        gap += of_other - of_one
        if one != other:
            return ShadowFigures(1, 0, 0, compared, agreed, gap)
        agreed += 1
    both = live.stopped and shadow.stopped and len(live.ids) == len(shadow.ids)
    shorter, longer = (live, shadow) if len(live.ids) <= len(shadow.ids) else (shadow, live)
    if both or (shorter.stopped and len(shorter.ids) < len(longer.ids)):
        compared += 1
        agreed += both
    return ShadowFigures(1, 0, 0, compared, agreed, gap)


@dataclass(slots=True)
class _Pair:
    """A live sequence and its shadow."""

    beside: Beside
    live: Heard = field(default_factory=Heard)
    shadow: Heard = field(default_factory=Heard)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    failed: str = ""

    @property
    def enough(self) -> bool:
        """The shadow has said all that can be compared."""
        return self.over.is_set() and len(self.shadow.ids) > len(self.live.ids)


class Shadowing:
    """Runs shadows. most: how many at the same time; grace_s: seconds that one may go on after its live answer."""

    def __init__(self, door: EngineDoor, sums: Sums, *, most: int = 8, grace_s: float = 5.0) -> None:
        self._door, self._sums, self._most, self._grace_s = door, sums, most, grace_s
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """Shadows that have not ended."""
        return len(self._tasks)

    async def beside(
        self,
        live: AsyncIterator[Event],
        beside: Beside,
        prompt: Sequence[int],
        sampling: Sampling,
        choice: int,
        deadline_s: float,
        tenant: str,
    ) -> AsyncGenerator[Event, None]:
        """The live events, unchanged; meanwhile a shadow answers `prompt`. Both are to tell log-probabilities."""
        pair = _Pair(beside)
        if len(self._tasks) < self._most:
            # It begins once this generator waits for the first live event, and so after the live one was sent.
            events = self._door.submit(prompt, sampling, beside.digest, choice, deadline_s, tenant, shadow=True)
            task = asyncio.get_running_loop().create_task(self._run(pair, events))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._sums.shadowed(beside.trial, ShadowFigures(dropped=1))
        try:
            async for event in live:
                pair.live.hear(event)
                yield event
        finally:
            pair.over.set()
            if isinstance(live, AsyncGenerator):
                await live.aclose()

    async def _run(self, pair: _Pair, events: AsyncIterator[Event]) -> None:
        listening = asyncio.ensure_future(_listen(pair, events))
        over = asyncio.ensure_future(pair.over.wait())
        try:
            await asyncio.wait({listening, over}, return_when=asyncio.FIRST_COMPLETED)
            if not listening.done() and not pair.enough:
                await asyncio.wait({listening}, timeout=self._grace_s)
            await pair.over.wait()  # the engine bounds how long that takes
        finally:
            for task in (listening, over):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await listening
        self._sums.shadowed(pair.beside.trial, _came(pair))

    async def stop(self) -> None:
        """End all shadows now; what they said is not counted."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(pair: _Pair, events: AsyncIterator[Event]) -> None:
    try:
        async for event in events:
            if isinstance(event, Failed):
                pair.failed = event.code
            pair.shadow.hear(event)
            if pair.enough:
                return
    except Exception:
        # Nobody waits for a shadow, and none of its troubles may reach the live answer.
        log.exception("shadow_failed", trial=pair.beside.trial)
        pair.failed = "internal_error"
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


def _came(pair: _Pair) -> ShadowFigures:
    if pair.failed == SHADOW_DROPPED:
        return ShadowFigures(dropped=1)
    if pair.failed:
        return ShadowFigures(failed=1)
    return agreement(pair.live, pair.shadow)
