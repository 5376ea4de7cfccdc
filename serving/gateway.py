"""The use cases of serving: answer a conversation, continue a prompt. No web framework, no Ray, no torch."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec

from adapters.canaries import ShadowFigures
from adapters.errors import (
    AdapterQuarantined,
    AdapterUnloaded,
    InvalidRequest,
    LoraplaneError,
    NotReady,
)
from adapters.prompts import PromptRenderer
from adapters.records import PromptFormat
from serving.answers import Answer, Head, NoObserver, Observer, Track
from serving.arms import Lot
from serving.auth import LOCAL
from serving.checks import check_continued, check_count, check_echo, check_prompts, check_wishes, most_tokens
from serving.commands import ChatCommand, CompletionCommand, Wishes
from serving.door import EngineDoor
from serving.engine.request import EngineFacts, Event, Sampling
from serving.limits import Admission, GatewayLimits
from serving.resolver import Resolver, Target
from serving.shadowing import Shadowing
from serving.tally import Audience, Tally
from serving.text import AnswerText, Echo


class BaseTokenizer(PromptRenderer, Protocol):
    """A base's renderer, and what clients may ask about its tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, str]: ...
    @property
    def eos_token_id(self) -> int | None: ...


# From the resolved target and the moment at which the request came to an answer that has not begun.
Make: TypeAlias = Callable[[Target, float], Awaitable[Answer]]


class Gateway:
    """Answers requests with one base and its adapters, through one engine door.

    now: wall clock in seconds; monotonic: steady clock in seconds; new_seed: 63 random bits for requests without one.
    """

    def __init__(
        self,
        door: EngineDoor,
        resolver: Resolver,
        renderer: BaseTokenizer,
        limits: GatewayLimits,
        observer: Observer | None = None,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.door = door
        self.resolver = resolver
        self.renderer = renderer
        self.limits = limits
        self.admission = Admission(limits.max_inflight)
        self.tally = Tally()
        self.shadowing = Shadowing(door, self.tally)
        self.audience = Audience(observer or NoObserver(), self.tally)
        self._now, self.monotonic, self._new_seed = now, monotonic, new_seed
        self._running: dict[int, Answer] = {}
        self._numbers = itertools.count()

    async def chat(self, command: ChatCommand) -> Answer:
        """Begin to answer a conversation; returns when the first token is there.

        Raises ModelNotFound, ContextLengthExceeded, InvalidRequest, Overloaded, Unavailable or DeadlineExceeded.
        """

        async def make(target: Target, started: float) -> Answer:
            check_continued(command, self.facts())
            prompt = await self.render(command, target.prompt_format)
            limit = self.limits.default_chat_tokens
            beside: Sequence[int] = prompt
            if target.beside is not None and target.beside.prompt_format != target.prompt_format:
                try:
                    beside = await self.render(command, target.beside.prompt_format)
                except InvalidRequest:  # the template refuses the shadow's format, not the caller's messages
                    self.tally.shadowed(target.beside.trial, ShadowFigures(failed=1))
                    beside = ()
            return self.prepare("chatcmpl", command.wishes, target, [prompt], "messages", limit, started, beside=beside)

        return await self._begun(command.wishes, make)

    async def completion(self, command: CompletionCommand) -> Answer:
        """Begin to continue raw prompts; choice k of prompt p has index p * n + k. Raises as `chat` does."""

        async def make(target: Target, started: float) -> Answer:
            check_echo(command, self.facts())
            prompts = [await self.encode(p) if isinstance(p, str) else list(p) for p in command.prompts]
            limit = self.limits.default_completion_tokens
            scored = command.echo and command.wishes.logprobs is not None
            beside = () if scored else prompts[0]
            return self.prepare("cmpl", command.wishes, target, prompts, "prompt", limit, started, command, beside)

        check_count(command, self.limits)
        return await self._begun(command.wishes, make)

    def end(self, digests: Mapping[str, LoraplaneError]) -> int:
        """End every running answer of these adapters, by digest, with this error; how many there were."""
        hit = [(a, e) for a in self._running.values() if (e := digests.get(a.head.weights.digest or "")) is not None]
        for answer, error in hit:
            answer.end(error)
        return len(hit)

    async def _begun(self, wishes: Wishes, make: Make) -> Answer:
        """An answer whose first token is there.

        Where the engine has set the version aside, the alias's own policy says who answers in its place. A version that
        left while the request waited for its first token is asked for anew: the id may mean another by now, or is
        refused by name.
        """
        started = self.monotonic()
        answer = await self._admitted(wishes, make, started)
        try:
            await answer.begin()
            return answer
        except AdapterQuarantined:
            instead = await self.resolver.instead_of(wishes.model, answer.head.weights)
            if instead is None:
                raise
        except AdapterUnloaded:
            instead = None
        answer = await self._admitted(wishes, make, started, instead)
        await answer.begin()
        return answer

    async def _admitted(self, wishes: Wishes, make: Make, started: float, target: Target | None = None) -> Answer:
        """An answer that counts as in flight until it is closed; without a target the id is resolved, once."""
        self.admission.enter()
        try:
            answer = await make(target or await self.resolver.resolve(wishes.model, _lot(wishes)), started)
        except BaseException:
            self.admission.leave()
            raise
        self.runs(answer, self.admission.leave)
        return answer

    def runs(self, answer: Answer, over: Callable[[], None] = lambda: None) -> None:
        """Let `end` reach an answer until it is closed; then `over` is called."""
        number = next(self._numbers)
        self._running[number] = answer

        def closed() -> None:
            del self._running[number]
            over()

        answer.on_close = closed

    async def render(self, command: ChatCommand, fmt: PromptFormat) -> list[int]:
        """Token ids of a conversation; long ones are rendered off the event loop."""

        def work() -> list[int]:
            return self.renderer.chat(command.messages, fmt, continue_final=command.continue_final)

        return await self._off_loop(work, sum(len(m.content) for m in command.messages))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw text; long ones are encoded off the event loop."""
        return await self._off_loop(
            lambda: self.renderer.encode(text, add_special_tokens=add_special_tokens), len(text)
        )

    async def _off_loop(self, work: Callable[[], list[int]], num_chars: int) -> list[int]:
        return work() if num_chars <= self.limits.thread_chars else await asyncio.to_thread(work)

    def facts(self) -> EngineFacts:
        """What the connected engine holds. Raises NotReady while none is connected."""
        facts = self.door.facts
        if facts is None:
            raise NotReady("The engine is not connected yet.")
        return facts

    def prepare(
        self,
        prefix: str,
        wishes: Wishes,
        target: Target,
        prompts: Sequence[Sequence[int]],
        param: str,
        default_tokens: int,
        started: float,
        raw: CompletionCommand | None = None,
        beside: Sequence[int] = (),
    ) -> Answer:
        """An answer that has not begun. beside: the first prompt as a shadow gets it; without one there is none."""
        facts = self.facts()
        fmt = target.prompt_format
        vocabulary = self.resolver.base.vocab_size
        check_wishes(wishes, self.limits, facts, vocabulary, self._writes_newlines)
        check_prompts(prompts, vocabulary, param)
        asked = wishes.max_tokens if wishes.max_tokens is not None else fmt.defaults.max_tokens
        max_tokens = most_tokens(wishes.max_tokens, default_tokens if asked is None else asked, prompts, facts, param)
        sampling = self._sampling(wishes, fmt, max_tokens, scored=raw is not None and raw.echo)
        deadline_s = min(self.limits.request_deadline_s, wishes.deadline_s or self.limits.request_deadline_s)
        ends = frozenset(wishes.stop_token_ids) | frozenset(() if wishes.ignore_eos else facts.stop_token_ids)
        head = Head(
            id=f"{prefix}-{wishes.request_id or uuid.uuid4().hex}",
            created=int(self._now()),
            weights=target.weights,
            prompt_tokens=sum(map(len, prompts)),
            n=wishes.n,
            max_tokens=max_tokens,
            deadline_s=deadline_s,
            taken=target.taken,
        )
        if max_tokens == 0 or wishes.num_beams > 1:
            beside = ()
        sequences = [
            Track(
                index=at * wishes.n + choice,
                events=self._events(
                    target, prompt, sampling, choice, deadline_s, wishes.tenant, () if at or choice else beside
                ),
                text=self._text(wishes, fmt, ends, prompt, raw, at),
            )
            for at, prompt in enumerate(prompts)
            for choice in range(wishes.n)
        ]
        return Answer(head, sequences, self.audience, self.monotonic, started=started)

    def _events(
        self,
        target: Target,
        prompt: Sequence[int],
        sampling: Sampling,
        choice: int,
        deadline_s: float,
        tenant: str,
        beside: Sequence[int],
    ) -> AsyncIterator[Event]:
        """The engine's events of one sequence; where a shadow computes beside it, both tell log-probabilities."""
        digest = target.weights.digest
        if target.beside is None or not beside:
            return self.door.submit(prompt, sampling, digest, choice, deadline_s, tenant)
        told = msgspec.structs.replace(sampling, logprobs=sampling.logprobs or 0)
        live = self.door.submit(prompt, told, digest, choice, deadline_s, tenant)
        return self.shadowing.beside(live, target.beside, beside, told, choice, deadline_s, tenant)

    def _text(
        self,
        wishes: Wishes,
        fmt: PromptFormat,
        ends: frozenset[int],
        prompt: Sequence[int],
        raw: CompletionCommand | None,
        at: int,
    ) -> AnswerText:
        """The text of an answer. raw, at: the command and which of its prompts is continued; None for a conversation,
        whose answer is a text of its own."""
        echo = self._echo(raw, at, prompt) if raw is not None and raw.echo else None
        scored = echo is not None and wishes.logprobs is not None
        goes_on = raw is not None and not scored and not self.facts().max_answer_len
        skip = wishes.skip_special_tokens
        return AnswerText(
            self.renderer.stream(skip_special_tokens=skip, after=prompt if goes_on else ()),
            (*wishes.stops, *fmt.stops),
            include_stop=wishes.include_stop,
            stop_ids=ends,
            min_tokens=wishes.min_tokens,
            describe=None if wishes.logprobs is None else self._describe,
            echo=echo,
        )

    def _echo(self, raw: CompletionCommand, at: int, prompt: Sequence[int]) -> Echo:
        given = raw.prompts[at]
        if isinstance(given, str):
            return Echo(tuple(prompt), given)
        if raw.wishes.logprobs is not None:  # told of token by token, and read on the way
            return Echo(tuple(prompt), None)
        return Echo((), self.renderer.decode(prompt, skip_special_tokens=raw.wishes.skip_special_tokens))

    def _describe(self, token: int) -> str:
        return self.renderer.decode([token], skip_special_tokens=False)

    def _sampling(self, wishes: Wishes, fmt: PromptFormat, max_tokens: int, *, scored: bool) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=_first(wishes.temperature, fmt.defaults.temperature, 1.0),
            top_p=_first(wishes.top_p, fmt.defaults.top_p, 1.0),
            top_k=max(wishes.top_k, 0),
            min_p=wishes.min_p,
            seed=self._new_seed() if wishes.seed is None else wishes.seed,
            min_tokens=min(wishes.min_tokens, max_tokens),
            ignore_eos=wishes.ignore_eos,
            stop_token_ids=wishes.stop_token_ids,
            presence_penalty=wishes.presence_penalty,
            frequency_penalty=wishes.frequency_penalty,
            repetition_penalty=wishes.repetition_penalty,
            logit_bias=tuple(sorted(wishes.logit_bias.items())),
            logprobs=wishes.logprobs,
            prompt_logprobs=wishes.logprobs if scored else None,
            no_repeat_ngram_size=wishes.no_repeat_ngram_size,
            num_beams=wishes.num_beams,
            length_penalty=wishes.length_penalty,
            early_stopping=wishes.early_stopping,
        )

    def _writes_newlines(self) -> bool:
        ids = self.renderer.encode("a\nb", add_special_tokens=False)
        return "\n" in self.renderer.decode(ids)


def _lot(wishes: Wishes) -> Lot:
    """What a request is drawn by. Callers who need no key are not told apart by one."""
    key = "" if wishes.tenant == LOCAL.tenant else wishes.tenant
    return Lot(wishes.user, key, wishes.request_id or uuid.uuid4().hex)


def _first(given: float | None, suggested: float | None, default: float) -> float:
    if given is not None:
        return given
    return default if suggested is None else suggested
