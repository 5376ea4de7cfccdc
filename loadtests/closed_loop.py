"""A closed loop: so many clients, each of which asks anew as soon as it is answered. What was asked, and how it went.

Sides that are compared get the same lists of requests. A side is whatever answers them: a server over HTTP
(`HttpSide`), or an engine in this process (`in_process.EngineSide`).
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from adapters.prompts import PromptRenderer
from loadtests.bench_shell import BenchFailed
from loadtests.figures import percentile

PROMPT_TOKENS = 50
NEW_TOKENS = 64
CLIENTS = 16
_BASE = 0
_TIMEOUT_S = 600.0
_TRIED = 4000  # of the vocabulary's tokens, to find short words
_SAMPLED = 400  # words, to know how many tokens one has


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. target: 0 the base, k the k-th adapter. ids: the prompt's tokens, for sides without a tokenizer."""

    target: int
    prompt: str
    ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """How one request went. Times in seconds of one clock; pieces: when each piece of the answer came.

    cache: the tier in which its adapter lay, where the side tells. target: see Ask.
    """

    begun: float
    pieces: tuple[float, ...]
    ended: float
    tokens: int
    prompt_tokens: int
    cache: str | None = None
    target: int = 0

    @property
    def ttft_s(self) -> float:
        """Until the first piece."""
        return self.pieces[0] - self.begun

    @property
    def gaps_s(self) -> list[float]:
        """Between pieces."""
        return [b - a for a, b in itertools.pairwise(self.pieces)]


@dataclass(frozen=True, slots=True)
class Round:
    """One closed loop from its first request to its last answer."""

    answers: tuple[Answered, ...]

    @property
    def seconds(self) -> float:
        """Wall time of the whole round."""
        return max(a.ended for a in self.answers) - min(a.begun for a in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Completed tokens over wall time, prefill included."""
        return sum(a.tokens for a in self.answers) / self.seconds


Clients = Sequence[Sequence[Ask]]


class Side(Protocol):
    """Something that answers. pause: it must not compute until `resume`, so that others are measured alone."""

    name: str

    def drive(self, clients: Clients) -> Round:
        """Answer the requests of all clients, each one's in turn. Raises BenchFailed when one is not answered."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Workload:
    """What clients ask for. targets: of each client; see Ask."""

    name: str
    targets: tuple[int, ...]


def workloads(clients: int = CLIENTS) -> tuple[Workload, ...]:
    """The base only, one adapter for all, and an adapter for each client."""
    return (
        Workload("base", (_BASE,) * clients),
        Workload("1 adapter", (1,) * clients),
        Workload(f"{clients} distinct", tuple(range(1, clients + 1))),
    )


class Prompter:
    """Makes prompts of about so many tokens, no two of which begin alike: no side may profit from a kept prefix."""

    def __init__(self, renderer: PromptRenderer, vocabulary: int, seed: int = 0) -> None:
        self._renderer, self._random = renderer, random.Random(seed)
        self._words = short_words(renderer, vocabulary, self._random)
        text = " ".join(self._random.choices(self._words, k=_SAMPLED))
        self._tokens_a_word = len(renderer.encode(text, add_special_tokens=False)) / _SAMPLED

    def ask(self, target: int, *, prompt_tokens: int = PROMPT_TOKENS, max_tokens: int = NEW_TOKENS) -> Ask:
        """A request with a new prompt."""
        count = max(1, round(prompt_tokens / self._tokens_a_word))
        prompt = " ".join(self._random.choices(self._words, k=count))
        return Ask(target, prompt, tuple(self._renderer.encode(prompt)), max_tokens)

    def clients(self, workload: Workload, requests: int, max_tokens: int = NEW_TOKENS) -> list[list[Ask]]:
        """So many requests for each client of a workload."""
        return [[self.ask(t, max_tokens=max_tokens) for _ in range(requests)] for t in workload.targets]


def short_words(renderer: PromptRenderer, vocabulary: int, rng: random.Random) -> list[str]:
    """Words of one token, or of two with the blank before them, out of the vocabulary. Raises BenchFailed if none."""
    found = []
    for id_ in rng.sample(range(vocabulary), min(vocabulary, _TRIED)):
        word = renderer.decode([id_]).strip()
        if word.isascii() and word.isalnum() and len(renderer.encode(f" {word}", add_special_tokens=False)) <= 2:
            found.append(word)
    if len(found) < 2:
        raise BenchFailed("the base's tokenizer has no words of one token; name another base with --base")
    return found


class HttpSide:
    """A server that speaks OpenAI's completions, streamed. models: its ids of the base and of each adapter.

    A thread a client over http.client: 35 us of CPU a token, a third of what httpx takes, and the client shares the
    cores with what it measures.
    """

    def __init__(
        self,
        name: str,
        url: str,
        models: Sequence[str],
        *,
        pause: Callable[[], None] = lambda: None,
        resume: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.url, self.models = name, url, tuple(models)
        self.pause, self.resume = pause, resume

    def drive(self, clients: Clients) -> Round:
        """See Side."""
        found: list[Answered] = []
        errors: list[BaseException] = []
        start = threading.Barrier(len(clients))

        def client(asks: Sequence[Ask]) -> None:
            connection = connect(self.url)
            try:
                start.wait()
                for ask in asks:
                    found.append(stream(connection, self.models[ask.target], ask))
            except (OSError, http.client.HTTPException, BenchFailed) as error:
                errors.append(error)
            finally:
                connection.close()

        threads = [threading.Thread(target=client, args=(asks,), daemon=True) for asks in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise BenchFailed(f"{self.name}: {errors[0]}") from errors[0]
        return Round(tuple(found))


def connect(url: str) -> http.client.HTTPConnection:
    """A connection to a server's URL."""
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=_TIMEOUT_S)


def stream(
    connection: http.client.HTTPConnection,
    model: str,
    ask: Ask,
    *,
    watch: Callable[[float], bool] = lambda at: True,
) -> Answered:
    """Ask and read the answer to its end. watch: gets the time of each piece, and says whether to read on.

    Lines are only dated while they come and read when all is there, so that the client takes little of the machine.
    Raises BenchFailed for anything but a whole answer of the length asked for; one that `watch` ended may be shorter.
    """
    body = json.dumps(
        {
            "model": model, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }
    )  # fmt: skip
    begun = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise BenchFailed(f"HTTP {response.status} for {model}: {response.read()[:300].decode(errors='replace')}")
    lines: list[tuple[float, bytes]] = []
    whole = True
    for line in response:
        if line.startswith(b"data: "):
            at = time.perf_counter()
            lines.append((at, line))
            whole = watch(at)
            if not whole:
                break
    ended = time.perf_counter()
    pieces, usage = _read(lines)
    tokens = int(usage.get("completion_tokens", 0))
    if whole and (tokens != ask.max_tokens or not pieces):
        raise BenchFailed(f"{model} answered {tokens} tokens of {ask.max_tokens}: {lines[-1:]!r:.300}")
    cache = response.headers.get("x-adapter-cache")
    prompt_tokens = int(usage.get("prompt_tokens", 0))
    return Answered(begun, tuple(pieces), ended, tokens, prompt_tokens, cache, ask.target)


def _read(lines: Sequence[tuple[float, bytes]]) -> tuple[list[float], Mapping[str, int]]:
    """When pieces of text came, and the usage."""
    pieces: list[float] = []
    usage: Mapping[str, int] = {}
    for at, line in lines:
        data = line[len(b"data: ") :].strip()
        if data == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise BenchFailed(f"the stream ended with {chunk['error']}")
        usage = chunk.get("usage") or usage
        if any(choice.get("text") or choice.get("finish_reason") for choice in chunk.get("choices") or ()):
            pieces.append(at)
    return pieces, usage


@dataclass(frozen=True, slots=True)
class LoopFigure:
    """A side on a workload over all rounds: medians, the range of throughput, and percentiles in ms."""

    workload: str
    side: str
    rounds: int
    requests: int
    prompt_tokens: float
    tokens_per_s: float
    lowest: float
    highest: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float

    COLUMNS = ("WORKLOAD", "SIDE", "ROUNDS", "TOK/S", "RANGE", "TTFT P50", "P99", "BETWEEN TOKENS P50", "P99")

    def row(self) -> tuple[str, ...]:
        """A line of the table; times in ms."""
        times = (self.ttft_p50_ms, self.ttft_p99_ms, self.itl_p50_ms, self.itl_p99_ms)
        spread = f"{self.lowest:.0f}-{self.highest:.0f}"
        return (
            self.workload, self.side, str(self.rounds), f"{self.tokens_per_s:.0f}", spread,
            *(f"{t:.1f}" for t in times),
        )  # fmt: skip


def loop_figure(workload: str, side: str, rounds: Sequence[Round]) -> LoopFigure:
    """Sum up the rounds of a side on a workload."""
    answers = [a for r in rounds for a in r.answers]
    rates = [r.tokens_per_s for r in rounds]
    ttft = [a.ttft_s * 1e3 for a in answers]
    gaps = [g * 1e3 for a in answers for g in a.gaps_s]
    return LoopFigure(
        workload=workload,
        side=side,
        rounds=len(rounds),
        requests=len(answers),
        prompt_tokens=round(statistics.fmean(a.prompt_tokens for a in answers), 1),
        tokens_per_s=round(statistics.median(rates), 1),
        lowest=round(min(rates), 1),
        highest=round(max(rates), 1),
        ttft_p50_ms=percentile(ttft, 50) or 0.0,
        ttft_p99_ms=percentile(ttft, 99) or 0.0,
        itl_p50_ms=percentile(gaps, 50) or 0.0,
        itl_p99_ms=percentile(gaps, 99) or 0.0,
    )


def take_turns(
    pairs: Sequence[tuple[Workload, Sequence[Side]]],
    prompter: Prompter,
    *,
    rounds: int,
    requests: int,
    say: Callable[[str], None],
    settle_s: float = 0.5,
) -> list[LoopFigure]:
    """Measure every side on its workloads, the sides of a workload taking turns, all others paused.

    pairs: a workload and the sides that it is for. A request of each client goes before every round and does not count:
    what was paused lies no longer in the caches, and an idle machine may have taken its memory back. Every side comes
    paused and is left paused. settle_s: for what ran before to come to rest.
    """
    found: dict[tuple[str, str], list[Round]] = {}
    for turn in range(rounds):
        for workload, sides in pairs:
            # The order changes from round to round, so that no side always follows the same other.
            for side in tuple(reversed(sides)) if turn % 2 else sides:
                say(f"{workload.name}: {side.name}, round {turn + 1} of {rounds}")
                side.resume()
                time.sleep(settle_s)
                side.drive(prompter.clients(workload, 1))
                measured = side.drive(prompter.clients(workload, requests))
                found.setdefault((workload.name, side.name), []).append(measured)
                side.pause()
    return [loop_figure(workload, side, some) for (workload, side), some in found.items()]
