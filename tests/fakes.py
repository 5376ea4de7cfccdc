"""Stand-ins for the engine and the base's tokenizer: deterministic, scripted, no torch, no transformers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapters.prompts import Message, TextStream
from adapters.records import PromptFormat
from serving.engine.request import (
    EngineFacts,
    Event,
    Failed,
    Finished,
    FinishReason,
    Heartbeat,
    Moved,
    PromptLogprobs,
    Sampling,
    SlotState,
    Timing,
    TokenLogprob,
    Tokens,
)

EOS = 256
BOS = 257
VOCABULARY = 258


def _byte_letters() -> dict[str, int]:
    """The printable letter of each byte, as byte-level BPE writes it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + at) for at, byte in enumerate(rest)}
    return {letters[byte]: byte for byte in range(256)}


class ByteTokenizer:
    """One token a byte: id = byte. Implements what a gateway asks of a base's renderer."""

    special_tokens: Mapping[str, str] = {"eos_token": "<|end|>", "bos_token": "<|begin|>"}
    eos_token_id: int | None = EOS

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(models.BPE(vocab=_byte_letters(), merges=[]))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|begin|>", special=True)])

    def chat(self, messages: Sequence[Message], fmt: PromptFormat, *, continue_final: bool = False) -> list[int]:
        text = "".join(f"{m.role}: {fmt.prefix if m.role == 'user' else ''}{m.content}\n" for m in messages)
        return self.encode(text if continue_final else text + "assistant: ")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> TextStream:
        return TextStream(self._tokenizer, skip_special_tokens, after)


@dataclass
class Submission:
    """One submitted sequence, and what became of it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None
    choice: int
    deadline_s: float
    tenant: str = ""
    shadow: bool = False
    sent: int = 0
    ended: str = ""  # finished, failed, closed


Script = Callable[[Submission], Sequence[int | Failed]]


def say(text: str, *, eos: bool = True) -> Script:
    """A script that says this text to everyone, a byte a token."""
    return lambda submission: [*text.encode(), *([EOS] if eos else [])]


def repeat_forever(submission: Submission) -> Sequence[int]:
    """A script that goes on until max_tokens."""
    return [ord("a") + (at % 26) for at in range(submission.sampling.max_tokens)]


@dataclass
class FakeEngine:
    """An EngineDoor that follows a script: token ids, or a Failed in their place.

    gate: while cleared, no token comes. pause_s: time between tokens. refusals: by digest, what warm, pin and drop
    answer in place of Moved; warmed (digest -> ttl_s), pinned, dropped and undropped: what they were asked; going: what
    is still being dropped.
    """

    script: Script = field(default_factory=lambda: say("Hello, world"))
    max_model_len: int = 256
    host_bytes_limit: int = 1 << 30
    pause_s: float = 0.0
    connected: bool = True
    idle_s: float = 0.0
    heartbeat_age: float = 0.1
    submissions: list[Submission] = field(default_factory=list)
    refusals: dict[str, Failed] = field(default_factory=dict)
    warmed: dict[str, float] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    dropped: list[tuple[str, float]] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    going: set[str] = field(default_factory=set)
    undropped: list[str] = field(default_factory=list)
    aside: set[str] = field(default_factory=set)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def running(self) -> int:
        """Sequences that hold a row now."""
        return sum(not s.ended for s in self.submissions)

    @property
    def facts(self) -> EngineFacts | None:
        if not self.connected:
            return None
        return EngineFacts(
            base_name="tiny",
            base_digest="b" * 64,
            family="llama",
            max_model_len=self.max_model_len,
            max_rows=8,
            slots=4,
            max_rank=64,
            dtype="float32",
            device="cpu",
            stop_token_ids=(EOS,),
            replica="fake",
        )

    @property
    def heartbeat(self) -> Heartbeat | None:
        if not self.connected:
            return None
        seen = {s.adapter for s in self.submissions if s.adapter is not None} | set(self.warmed) | self.pinned
        seen -= self.gone
        return Heartbeat(
            running=self.running,
            waiting=0,
            loading=0,
            rows=8,
            kv_tokens_used=16,
            kv_tokens_total=2048,
            slots=tuple(SlotState(digest, 0, 4) for digest in sorted(seen)),
            slots_total=4,
            host_digests=tuple(sorted(seen)),
            host_bytes=100,
            host_bytes_limit=self.host_bytes_limit,
            idle_s=self.idle_s,
            steps=3,
            tokens=7,
            loads={"disk": len(seen)},
            load_seconds={"disk": 0.5 * len(seen)},
            evictions=0,
            queue_limit=256,
            pinned=tuple(sorted(self.pinned)),
            warm=tuple(sorted(self.warmed)),
            quarantined=tuple(sorted(self.aside)),
            dropping=tuple(sorted(self.going)),
        )

    @property
    def heartbeat_age_s(self) -> float:
        return self.heartbeat_age if self.connected else float("inf")

    async def submit(
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
        submission = Submission(tuple(prompt), sampling, adapter, choice, deadline_s, tenant, shadow)
        self.submissions.append(submission)
        self.gone.discard(adapter or "")
        number = len(self.submissions)
        try:
            async for event in self._events(number, submission):
                yield event
        finally:
            submission.ended = submission.ended or "closed"

    async def warm(self, digest: str, ttl_s: float, *, prove: bool = False) -> Moved | Failed:
        if (refusal := self._refusal(digest)) is not None:
            return refusal
        self.warmed[digest] = ttl_s
        self.gone.discard(digest)
        return Moved(0, digest, "device", 100)

    async def pin(self, digest: str, on: bool) -> Moved | Failed:
        if (refusal := self._refusal(digest)) is not None:
            return refusal
        (self.pinned.add if on else self.pinned.discard)(digest)
        self.gone.discard(digest)
        return Moved(0, digest, "device", 100)

    async def drop(self, digest: str, deadline_s: float) -> Moved | Failed:
        if (refusal := self._refusal(digest)) is not None:
            return refusal
        self.dropped.append((digest, deadline_s))
        self.gone.add(digest)
        self.pinned.discard(digest)
        self.warmed.pop(digest, None)
        return Moved(0, digest, "gone", 100)

    async def undrop(self, digest: str) -> Moved | Failed:
        if (refusal := self._refusal(digest)) is not None:
            return refusal
        self.undropped.append(digest)
        self.going.discard(digest)
        return Moved(0, digest, "device", 100)

    def _refusal(self, digest: str) -> Failed | None:
        return self.refusals.get(digest) if self.connected else Failed(0, "not_ready", "no engine")

    async def _events(self, number: int, submission: Submission) -> AsyncIterator[Event]:
        if not self.connected:
            submission.ended = "failed"
            yield Failed(number, "not_ready", "no engine")
            return
        timing = Timing(queue_s=0.001, load_s=0.002, prefill_s=0.003, decode_s=0.004, source="disk")
        sampling, reason = submission.sampling, FinishReason.LENGTH
        if sampling.prompt_logprobs is not None:
            for token in submission.prompt[1:]:
                yield PromptLogprobs(number, (_logprob(token, sampling.prompt_logprobs),))
        for step in self.script(submission) if sampling.max_tokens else ():
            await asyncio.sleep(self.pause_s)
            await self.gate.wait()
            if isinstance(step, Failed):
                submission.ended = "failed"
                yield step
                return
            told = () if sampling.logprobs is None else (_logprob(step, sampling.logprobs),)
            yield Tokens(number, (step,), told, timing if submission.sent == 0 else None)
            submission.sent += 1
            if step == EOS and not sampling.ignore_eos:
                reason = FinishReason.STOP
                break
            if submission.sent >= sampling.max_tokens:
                break
        submission.ended = "finished"
        yield Finished(number, reason, timing)


def _logprob(token: int, top: int) -> TokenLogprob:
    """The chosen token as the likeliest, its neighbours after it, the last one impossible."""
    best = [((token + at) % 256, -0.5 * (at + 1)) for at in range(top)]
    if len(best) > 1:
        best[-1] = (best[-1][0], float("-inf"))
    return TokenLogprob(-0.5, tuple(best))


def error_body(answer: Any) -> dict[str, Any]:
    """The error object of an answer, whose shape is checked on the way."""
    body: dict[str, Any] = answer.json()["error"]
    if set(body) != {"message", "type", "param", "code"}:
        raise ValueError(f"not the one shape of errors: {body}")
    return body
