"""One request at work: its sequences run side by side, and end together, exactly once (contract C1)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import structlog

from adapters.errors import DeadlineExceeded, EngineFault, EngineLost, LoraplaneError
from serving.arms import Taken
from serving.engine.request import Event, Failed, Finished, FinishReason, PromptLogprobs, Timing, Tokens
from serving.failures import FAULT, PLAIN, engine_error
from serving.resolver import Weights
from serving.text import AnswerText, Emission, TokenInfo
from serving.timing import engine_s, server_timing, spans

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice. finish is set on each choice's last piece, and only there."""

    index: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole choice."""

    index: int
    text: str
    tokens: tuple[TokenInfo, ...]
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens so far: each prompt once, whatever n is. cached_tokens: those of the prompts that were computed before."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """What a request came to, for metrics. Times in seconds; outcome is `complete` or the code of an error."""

    weights: Weights
    outcome: str
    finish_reasons: tuple[str, ...]
    usage: Usage
    n: int
    max_tokens: int
    first_token_s: float | None
    total_s: float
    timing: Timing | None
    taken: Taken | None = None


class Observer(Protocol):
    """Who counts what requests come to."""

    def tokens_came(self, gap_s: float) -> None: ...
    def ended(self, record: Ended) -> None: ...


class NoObserver:
    """Counts nothing."""

    def tokens_came(self, gap_s: float) -> None:
        pass

    def ended(self, record: Ended) -> None:
        pass


@dataclass(slots=True)
class Track:
    """One sequence of a request, as the gateway follows it."""

    index: int
    events: AsyncIterator[Event]
    text: AnswerText
    task: asyncio.Task[None] | None = None
    last_at: float | None = None
    finish: FinishReason | None = None
    timing: Timing | None = None
    reused: int = 0
    begun: Timing | None = None
    begun_at: float = 0.0

    @property
    def spent(self) -> Timing | None:
        """Where its time went; of one that the gateway ended at a stop text, until its last token came."""
        if self.timing is not None or self.begun is None or self.last_at is None:
            return self.timing
        return msgspec.structs.replace(self.begun, decode_s=self.last_at - self.begun_at)


@dataclass(frozen=True, slots=True)
class _EndOfEvents:
    """The engine's iterator is exhausted."""


@dataclass(frozen=True, slots=True)
class _Deadline:
    """The request's time is up."""


_Note = Event | _EndOfEvents | _Deadline | LoraplaneError


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an answer before its first token."""

    id: str
    created: int
    weights: Weights
    prompt_tokens: int
    n: int
    max_tokens: int
    deadline_s: float
    taken: Taken | None = None


def _nothing() -> None:
    """Nobody waits for the end."""


@dataclass(slots=True)
class Answer:
    """A request's answer as it comes. Read `pieces()` or `collect()` once; `close()` frees the engine's rows, and
    `end()` does so while it is being read.

    monotonic: seconds on a steady clock; on_close is called once, when the request is over however it ended.
    """

    head: Head
    sequences: Sequence[Track]
    observer: Observer
    monotonic: Callable[[], float]
    on_close: Callable[[], None] = _nothing
    started: float = 0.0
    first_token_s: float | None = None
    timing: Timing | None = None
    _notes: asyncio.Queue[tuple[int, _Note]] = field(default_factory=asyncio.Queue)
    _stash: deque[tuple[int, _Note]] = field(default_factory=deque)
    _timer: asyncio.TimerHandle | None = None
    _outcome: str = "cancelled"
    _closed: bool = False
    _told_to_end: bool = False
    _total_s: float = 0.0

    @property
    def usage(self) -> Usage:
        """Tokens computed so far."""
        cached = sum(s.reused for s in self.sequences if s.index % self.head.n == 0)
        return Usage(self.head.prompt_tokens, sum(s.text.num_tokens for s in self.sequences), cached)

    def server_timing(self) -> str:
        """Where the time went as the header `server-timing` tells it: until the first token, or, once the answer is
        over, of the choice that took longest."""
        if not self._closed:
            return "" if self.timing is None else server_timing(spans(self.timing), self.monotonic() - self.started)
        timings = [t for s in self.sequences if (t := s.spent) is not None]
        return server_timing(spans(max(timings, key=engine_s)), self._total_s) if timings else ""

    async def begin(self) -> None:
        """Start the sequences and wait for the first token.

        Raises the engine's refusal, so that it can still become a status of its own.
        """
        loop = asyncio.get_running_loop()
        try:
            for sequence in self.sequences:
                sequence.task = loop.create_task(self._pump(sequence))
            self._timer = loop.call_later(self.head.deadline_s, self._notes.put_nowait, (-1, _Deadline()))
            while True:
                index, note = await self._notes.get()
                if not isinstance(note, PromptLogprobs | Tokens | Finished):
                    raise self._refusal(note)
                self._stash.append((index, note))
                if not isinstance(note, PromptLogprobs):
                    break
            self.timing = note.timing
        except BaseException as error:
            self._fail(error)
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer's pieces; every choice ends with a finish reason.

        Raises a LoraplaneError when the engine fails or the deadline passes. Closing the iterator frees the rows.
        """
        left = len(self.sequences)
        try:
            while left:
                index, note = self._stash.popleft() if self._stash else await self._notes.get()
                if isinstance(note, PromptLogprobs):
                    self.sequences[index].text.hear(note.logprobs)
                    continue
                if not isinstance(note, Tokens | Finished):
                    if index >= 0 and self.sequences[index].finish is not None:
                        continue
                    raise self._refusal(note)
                piece = self._settle(self.sequences[index], note)
                if piece is None:
                    continue
                left -= piece.finish is not None
                yield piece
            self._outcome = "complete"
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.close()

    async def collect(self) -> list[Choice]:
        """All choices, whole. Raises as `pieces` does."""
        texts: list[list[str]] = [[] for _ in self.sequences]
        tokens: list[list[TokenInfo]] = [[] for _ in self.sequences]
        async for piece in self.pieces():
            texts[piece.index].append(piece.text)
            tokens[piece.index].extend(piece.tokens)
        return [
            Choice(s.index, "".join(texts[s.index]), tuple(tokens[s.index]), s.finish or FinishReason.STOP)
            for s in self.sequences
        ]

    def end(self, error: LoraplaneError) -> None:
        """Stop computing now; whoever reads gets this error after what came before it. Safe to call again."""
        if self._told_to_end:
            return
        self._told_to_end = True
        for sequence in self.sequences:
            _stop(sequence)
        self._notes.put_nowait((-1, error))

    def close(self) -> None:
        """Stop whatever still runs. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for sequence in self.sequences:
            _stop(sequence)
        self.on_close()
        reasons = tuple(s.finish.value for s in self.sequences if s.finish is not None)
        head = self.head
        self._total_s = total = self.monotonic() - self.started
        self.observer.ended(
            Ended(
                head.weights,
                self._outcome,
                reasons,
                self.usage,
                head.n,
                head.max_tokens,
                self.first_token_s,
                total,
                next((s.timing for s in self.sequences if s.timing is not None), self.timing),
                head.taken,
            )
        )

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, LoraplaneError):
            self._outcome = error.reason_code
        elif isinstance(error, Exception):
            self._outcome = LoraplaneError.code
        self.close()

    async def _pump(self, sequence: Track) -> None:
        """Carry one sequence's events to the queue. Its size is bounded by max_tokens."""
        note: _Note = _EndOfEvents()
        try:
            async for event in sequence.events:
                self._notes.put_nowait((sequence.index, event))
        except LoraplaneError as error:
            note = error
        except Exception:
            log.exception("engine_door_failed", request_id=self.head.id)
            note = EngineFault(FAULT, retry_after_s=None)
        self._notes.put_nowait((sequence.index, note))

    def _settle(self, sequence: Track, note: Tokens | Finished) -> Piece | None:
        """What one event adds to the answer; None when there is nothing to show yet."""
        if sequence.finish is not None:
            return None
        if isinstance(note, Tokens):
            self._clock(sequence)
            if note.timing is not None:
                sequence.reused = note.timing.reused
                sequence.begun, sequence.begun_at = note.timing, sequence.last_at or 0.0
            emission = sequence.text.push(note.ids, note.logprobs)
            if emission.stopped:
                _stop(sequence)
                return self._finish(sequence, emission, FinishReason.STOP)
            if not emission.text and not emission.tokens:
                return None
            return Piece(sequence.index, emission.text, emission.tokens)
        sequence.timing, sequence.reused = note.timing, note.timing.reused
        emission = sequence.text.finish()
        return self._finish(sequence, emission, FinishReason.STOP if emission.stopped else note.reason)

    def _finish(self, sequence: Track, emission: Emission, reason: FinishReason) -> Piece:
        sequence.finish = reason
        return Piece(sequence.index, emission.text, emission.tokens, reason)

    def _clock(self, sequence: Track) -> None:
        now = self.monotonic()
        if self.first_token_s is None:
            self.first_token_s = now - self.started
        if sequence.last_at is not None:
            self.observer.tokens_came(now - sequence.last_at)
        sequence.last_at = now

    def _refusal(self, note: _Note) -> LoraplaneError:
        if isinstance(note, LoraplaneError):
            return note
        if isinstance(note, Failed):
            if note.code not in PLAIN:
                log.warning("engine_failed", request_id=self.head.id, code=note.code, message=note.message)
            return engine_error(note, self.head.weights.model)
        if isinstance(note, _Deadline):
            return DeadlineExceeded(f"The request was not complete within {self.head.deadline_s:g} seconds.")
        return EngineLost("The engine ended this request without an answer.")


def _stop(sequence: Track) -> None:
    """Give the sequence's row back: cancelling its reader cancels it in the engine."""
    if sequence.task is not None:
        sequence.task.cancel()
