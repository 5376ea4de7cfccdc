"""From token ids to the text of an answer: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from serving.engine.request import TokenLogprob

UNLIKELY = -9999.0
"""What a logprob of minus infinity becomes on the wire: JSON has no infinity, and clients know this figure."""


class Decoder(Protocol):
    """Turns ids into text as they come (adapters.prompts.TextStream)."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token with its log-probability. offset: where its text begins in what is shown, in characters.

    top: the most likely tokens at its place, as (text, logprob), most likely first. logprob None: the first token of
    a repeated prompt, which nothing precedes.
    """

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is repeated before its answer. text: as the caller wrote it; None: as its tokens read."""

    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class Emission:
    """What may be shown now. stopped: a stop string was met, nothing more will come."""

    text: str
    tokens: tuple[TokenInfo, ...] = ()
    stopped: bool = False


class StopScanner:
    """Finds stop strings in text that comes in pieces, and holds back only what could still become one.

    The stop that is complete first wins, so that the answer does not depend on how the text was cut into tokens; of
    two complete at the same character, the longer.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """The text that may be shown now. Once `hit`, the rest is dropped."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        seen = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if ends:
            end, start = min(ends)
            self.hit, self._held = True, ""
            return seen[: end if self._include else start]
        keep = self._tail(seen)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _tail(self, seen: str) -> int:
        """Length of the longest end of `seen` with which some stop begins."""
        for size in range(min(len(seen), self._longest - 1), 0, -1):
            tail = seen[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


class AnswerText:
    """The text of one sequence: decodes, watches for stops, and keeps log-probabilities beside their text.

    stop_ids: tokens that end the answer and, unless include_stop, are not part of it. Stops count only after
    min_tokens tokens. describe: the text of one token id, for log-probabilities; None when none are wanted.
    echo: a prompt to show first. With log-probabilities the decoder must start with the prompt, else behind it; and
    then each token is told of, those of the prompt and those whose text a stop cut off too: who scores texts counts
    on one entry a token.
    """

    def __init__(
        self,
        decoder: Decoder,
        stops: Sequence[str],
        *,
        include_stop: bool,
        stop_ids: frozenset[int],
        min_tokens: int,
        describe: Callable[[int], str] | None,
        echo: Echo | None = None,
    ) -> None:
        self._decoder = decoder
        self._scanner = StopScanner(stops, include_stop)
        self._include_stop = include_stop
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._describe = describe
        self._decoded = 0  # characters decoded so far
        self._shown = 0  # characters handed out so far
        self._waiting: list[TokenInfo] = []
        self._echo = echo
        self._scores = echo is not None and describe is not None
        self._repeated = 0  # prompt tokens told of
        self._prompt = ""  # as they read
        self._begun = False
        self.num_tokens = 0
        if self._scores:
            self._repeat(None)

    def hear(self, logprobs: Sequence[TokenLogprob]) -> None:
        """Take log-probabilities of the prompt's next tokens; the first one has none."""
        for logprob in logprobs:
            self._repeat(logprob)

    def _repeat(self, logprob: TokenLogprob | None) -> None:
        if self._echo is None or self._describe is None or self._repeated >= len(self._echo.ids):
            return
        token = self._echo.ids[self._repeated]
        offset = len(self._prompt) if self._echo.text is None else min(len(self._prompt), len(self._echo.text))
        self._waiting.append(self._info(token, logprob, self._describe, offset))
        self._prompt += self._decoder.push(token)
        self._repeated += 1

    def _opening(self) -> str:
        """The repeated prompt, once."""
        if self._begun or self._echo is None:
            return ""
        self._begun = True
        opening = self._prompt if self._echo.text is None else self._echo.text
        self._decoded = len(opening)
        return opening

    def push(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> Emission:
        """What these tokens let us show."""
        shown = self._opening()
        for place, token in enumerate(ids):
            self.num_tokens += 1
            counts = self.num_tokens > self._min_tokens
            ends = counts and token in self._stop_ids and not self._include_stop
            text = "" if ends else self._decoder.push(token)
            if self._describe is not None and place < len(logprobs) and (self._scores or not ends):
                self._waiting.append(self._info(token, logprobs[place], self._describe, self._decoded))
            if ends:
                continue
            self._decoded += len(text)
            shown += self._scanner.feed(text) if counts else text
            if self._scanner.hit:
                break
        return self._emit(shown, self._scanner.hit)

    def finish(self) -> Emission:
        """The rest, when no more tokens come. A stop string may still be met in it."""
        shown = self._opening()
        tail = self._decoder.flush()
        self._decoded += len(tail)
        shown += self._scanner.feed(tail)
        if not self._scanner.hit:
            shown += self._scanner.flush()
        return self._emit(shown, ended=True)

    def _emit(self, shown: str, ended: bool) -> Emission:
        self._shown += len(shown)
        # A token is told of when the first of its text is; at the end, those without text (half characters) too.
        every = ended and (self._scores or not self._scanner.hit)
        ready = [t for t in self._waiting if t.offset < self._shown or every]
        if every:  # no offset lies behind the end of what is shown
            ready = [t if t.offset <= self._shown else replace(t, offset=self._shown) for t in ready]
        self._waiting = [] if ended else self._waiting[len(ready) :]
        return Emission(shown, tuple(ready), self._scanner.hit)

    def _info(self, token: int, logprob: TokenLogprob | None, describe: Callable[[int], str], offset: int) -> TokenInfo:
        if logprob is None:
            return TokenInfo(describe(token), None, (), offset)
        top = tuple((describe(other), max(value, UNLIKELY)) for other, value in logprob.top)
        return TokenInfo(describe(token), max(logprob.chosen, UNLIKELY), top, offset)
