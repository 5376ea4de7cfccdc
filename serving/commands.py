"""What a caller asks of the gateway: checked data, no trace of the protocol it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.prompts import Message


@dataclass(frozen=True, slots=True)
class Wishes:
    """How to answer, whatever the prompt. None means: what the version suggests, else the server's default.

    logprobs None: none wanted; otherwise that many alternatives beside the chosen token. logit_bias: token id ->
    -100..100. deadline_s: the caller's own bound in seconds, which can only shorten the server's.
    tenant: whose computed prefixes may serve this request. user: whom the caller says it asks for; with the tenant it
    decides on the arm of a canary.
    """

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    skip_special_tokens: bool = True
    deadline_s: float | None = None
    request_id: str = ""
    tenant: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True)
class ChatCommand:
    """Answer a conversation. continue_final: go on with the last message, an assistant's, instead of answering."""

    wishes: Wishes
    messages: tuple[Message, ...]
    continue_final: bool = False


@dataclass(frozen=True, slots=True)
class CompletionCommand:
    """Continue raw prompts, each a text or token ids. echo: show each prompt before its answer; the log-probabilities
    asked for are then of its tokens too, and max_tokens may be 0."""

    wishes: Wishes
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False
