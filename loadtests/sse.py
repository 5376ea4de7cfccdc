"""Reads one streamed answer as it comes, checks it against the contract, and measures it.

Knows no HTTP client: whoever holds the connection feeds bytes. Every way in which an answer can break its word has a
name of its own (`Problem`), so that a report says what went wrong and not only that something did.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

DONE = "[DONE]"
_WEIGHTS = ("adapter", "adapter_version", "adapter_digest", "base_digest")


class Problem(StrEnum):
    """How an answer broke the contract; the value is what a report shows."""

    HTTP_STATUS = "http_status"  # refused before the first byte
    CONNECTION_LOST = "connection_lost"  # the body was cut in the middle
    NOT_A_STREAM = "not_a_stream"  # no event stream, or no JSON in it
    ERROR_EVENT = "error_event"  # the server ended it with an error
    MISSING_DONE = "missing_done"
    AFTER_DONE = "after_done"  # something follows [DONE]; a second [DONE] too
    NO_FINISH = "no_finish_reason"  # ended as if all were well, without saying why
    AFTER_FINISH = "after_finish"  # text after the finish reason
    CUT_SHORT = "cut_short"  # finish_reason is length, but fewer tokens came than were asked for
    NO_USAGE = "no_usage"
    UNNAMED_WEIGHTS = "unnamed_weights"  # adapter, version or digest missing from a chunk
    WEIGHTS_CHANGED = "weights_changed"  # two chunks of one answer name different weights
    HEADERS_DISAGREE = "headers_disagree"
    WRONG_MODEL = "wrong_model"  # another adapter or version than was asked for
    WRONG_DIGEST = "wrong_digest"  # the right version's name, other weights
    WRONG_BASE = "wrong_base"
    REGISTRY_SILENT = "registry_silent"  # the registry did not say what the weights should be
    WRONG_CONTENT = "wrong_content"  # other words than the same weights have for the same prompt
    STALE_ALIAS = "stale_alias"  # a version that was not behind the alias at any moment of the request


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise. detail is for a person."""

    problem: Problem
    detail: str

    def __str__(self) -> str:
        return f"{self.problem.value}: {self.detail}" if self.detail else self.problem.value


@dataclass(frozen=True, slots=True)
class Named:
    """The weights that an answer names. The base names no adapter, version or digest."""

    model: str
    adapter: str | None
    version: int | None
    digest: str | None
    base_digest: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer, read to its end. Times in seconds from the request's start.

    ttft_s: until the first token; gaps_s: between pieces of text; tokens: as the server's usage counts them.
    """

    named: Named | None
    violations: tuple[Violation, ...]
    text: str
    finish: str | None
    tokens: int
    prompt_tokens: int
    ttft_s: float | None
    total_s: float
    last_s: float | None
    gaps_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None for an answer of one token."""
        if self.ttft_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.tokens - 1)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole time."""
        return self.tokens / self.total_s if self.total_s > 0 else 0.0


class EventReader:
    """The `data` of server-sent events, from bytes cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The events that this chunk completes."""
        found = []
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and self._data:
                found.append("\n".join(self._data))
                self._data = []
        return found

    @property
    def torn(self) -> bool:
        """Whether an event was begun and not completed."""
        return bool(self._rest.strip() or self._data)


class StreamCheck:
    """One answer under way: feed it, then `end` it.

    max_tokens: what was asked for. now: a monotonic clock; the request starts when this is made.
    """

    def __init__(self, max_tokens: int, now: Callable[[], float]) -> None:
        self._max_tokens, self._now = max_tokens, now
        self._start = now()
        self._events = EventReader()
        self._violations: list[Violation] = []
        self._named: Named | None = None
        self._headers: dict[str, str] | None = None
        self._text: list[str] = []
        self._times: list[float] = []
        self._finish: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self._done = False
        self._failed = False

    @property
    def named(self) -> Named | None:
        """The weights named so far."""
        return self._named

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    @property
    def pieces(self) -> int:
        """How many pieces of text came so far."""
        return len(self._times)

    def opened(self, status: int, headers: Mapping[str, str], body: Callable[[], str]) -> bool:
        """The response's head has come; whether a stream follows. body: reads the body of a refusal."""
        self._headers = {k.lower(): v for k, v in headers.items()}
        if status != 200:
            self._blame(Problem.HTTP_STATUS, f"{status} {_error_code(body())}".strip())
            self._failed = True
            return False
        if "text/event-stream" not in self._headers.get("content-type", ""):
            self._blame(Problem.NOT_A_STREAM, f"content-type {self._headers.get('content-type')!r}")
            self._failed = True
            return False
        return True

    def feed(self, chunk: bytes) -> None:
        """Take in what came."""
        for data in self._events.feed(chunk):
            self._event(data)

    def lost(self, why: str) -> None:
        """The connection broke before the body's end."""
        self._blame(Problem.CONNECTION_LOST, why)
        self._failed = True

    def end(self) -> Answer:
        """No more comes: check the ending and sum up."""
        total = self._now() - self._start
        if not self._failed:
            self._check_ending()
        self._check_headers()
        usage = self._usage or {}
        times = self._times
        return Answer(
            named=self._named,
            violations=tuple(self._violations),
            text="".join(self._text),
            finish=self._finish,
            tokens=int(usage.get("completion_tokens", 0)),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            ttft_s=times[0] if times else None,
            total_s=total,
            last_s=times[-1] if times else None,
            gaps_s=tuple(b - a for a, b in itertools.pairwise(times)),
        )

    def _event(self, data: str) -> None:
        if self._done:
            self._blame(Problem.AFTER_DONE, data[:60])
            return
        if data == DONE:
            self._done = True
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            self._blame(Problem.NOT_A_STREAM, f"an event that is no JSON object: {data[:60]}")
            return
        if "error" in chunk:
            error = chunk["error"] if isinstance(chunk["error"], dict) else {}
            self._blame(Problem.ERROR_EVENT, f"{error.get('code')}: {str(error.get('message'))[:120]}")
            self._failed = True
            return
        self._weights(chunk)
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            self._choice(choice)

    def _choice(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta")
        text = (delta.get("content") if isinstance(delta, dict) else choice.get("text")) or ""
        finish = choice.get("finish_reason")
        if self._finish is not None and (text or finish):
            self._blame(Problem.AFTER_FINISH, repr(text or finish)[:60])
        if text or finish:  # an empty first delta is not a token
            self._times.append(self._now() - self._start)
            self._text.append(text)
        if finish:
            self._finish = str(finish)

    def _weights(self, chunk: Mapping[str, Any]) -> None:
        missing = [k for k in ("model", *_WEIGHTS) if k not in chunk]
        named = Named(
            model=str(chunk.get("model")),
            adapter=chunk.get("adapter"),
            version=chunk.get("adapter_version"),
            digest=chunk.get("adapter_digest"),
            base_digest=str(chunk.get("base_digest")),
        )
        partly = (named.adapter is None, named.version is None, named.digest is None)
        if missing or not chunk.get("base_digest") or len(set(partly)) > 1:
            self._blame(Problem.UNNAMED_WEIGHTS, f"missing: {', '.join(missing) or 'adapter, version or digest'}")
            return
        if self._named is None:
            self._named = named
        elif named != self._named:
            self._blame(Problem.WEIGHTS_CHANGED, f"{_short(self._named)} became {_short(named)}")

    def _check_ending(self) -> None:
        if not self._done:
            torn = ", the last event is torn" if self._events.torn else ""
            self._blame(Problem.MISSING_DONE, f"after {len(self._times)} pieces{torn}")
        if self._finish is None:
            self._blame(Problem.NO_FINISH, f"after {len(self._times)} pieces")
        if self._usage is None:
            self._blame(Problem.NO_USAGE, "")
            return
        tokens = int(self._usage.get("completion_tokens", 0))
        if self._finish == "length" and tokens != self._max_tokens:
            self._blame(Problem.CUT_SHORT, f"{tokens} of {self._max_tokens} tokens, yet finish_reason is length")

    def _check_headers(self) -> None:
        named, headers = self._named, self._headers
        if named is None or headers is None:
            return
        version = None if named.version is None else str(named.version)
        wanted = {
            "x-adapter": named.adapter or "base",
            "x-adapter-version": version,
            "x-adapter-digest": named.digest,
            "x-base-digest": named.base_digest,
        }
        wrong = [f"{k} {headers.get(k)!r}" for k, value in wanted.items() if headers.get(k) != value]
        if wrong:
            self._blame(Problem.HEADERS_DISAGREE, f"{', '.join(wrong)} beside chunks of {_short(named)}")

    def _blame(self, problem: Problem, detail: str) -> None:
        if all(v.problem is not problem for v in self._violations):
            self._violations.append(Violation(problem, detail))


def _short(named: Named) -> str:
    return f"{named.model} {(named.digest or named.base_digest)[:12]}"


def _error_code(body: str) -> str:
    """The error's code, for a report; a body that is no error of ours gives its beginning."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return body[:80]
