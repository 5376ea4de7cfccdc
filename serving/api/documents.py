"""The answers' shapes, for the OpenAPI document. Tests check that the real answers have them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_STATUS_TEXT = {
    400: "The request is malformed or out of range",
    401: "Missing or wrong API key",
    404: "Unknown model, adapter or record",
    408: "The body did not arrive in time",
    409: "The state is not what the caller expected; retrying does not help",
    413: "The body is too large",
    415: "The body is not application/json",
    421: "The Host header names another server",
    429: "A bounded queue is full",
    431: "Too many headers",
    500: "The server failed",
    503: "Not ready; see retry-after",
    504: "The deadline passed",
}
# What can happen to any request, whatever its route.
_ALWAYS = (401, 421, 431, 500, 503)


class Shape(BaseModel):
    """An object of ours; clients must bear fields that they do not know."""

    model_config = ConfigDict(extra="allow")


class ErrorInfo(Shape):
    """message is for people; code is stable and for programmes."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shape):
    """The one shape of every error."""

    error: ErrorInfo


def documented(*statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its errors, those of every route, and the stream if it has one."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": _STATUS_TEXT[status]} for status in sorted({*statuses, *_ALWAYS})
    }
    if stream:
        # As OpenAPI 3.2 reads a stream of events, and checkers do: one event, decoded.
        event = {
            "type": "object",
            "description": "An event: a chunk as JSON, an error as JSON, or [DONE] at the end",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
        }
        found[200] = {
            "description": "The answer; as a stream if `stream` is true",
            "content": {"text/event-stream": {"schema": event}},
        }
    return found


class PromptTokensShape(Shape):
    """What prompt tokens cost."""

    cached_tokens: int


class UsageShape(Shape):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensShape


class Named(Shape):
    """What every answer says of its weights. adapter_instead_of is there where an alias fell back to the version
    before: it names the one that was asked for and is set aside."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    adapter: str | None
    adapter_version: int | None
    adapter_digest: str | None
    base_digest: str
    adapter_instead_of: str | None = None
    usage: UsageShape


class TopLogprob(Shape):
    """A token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobShape(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Shape):
    """Log-probabilities of an answer."""

    content: list[TokenLogprobShape] | None
    refusal: None


class ChatAnswer(Shape):
    """An assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    """One of the n answers."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Named):
    """A whole chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogprobs(Shape):
    """Parallel arrays over the tokens of an answer, and of its prompt if that is repeated: its first token has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoiceShape(Shape):
    """One of the answers: choice k of prompt p has index p * n + k."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Named):
    """A whole completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoiceShape]


class Model(Shape):
    """A model that can be named in a request."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Any]
    adapter: str | None
    adapter_version: int | None
    adapter_digest: str | None
    base_digest: str


class ModelList(Shape):
    """The base first, then adapters with a champion, their aliases and live versions."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(Shape):
    """Token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Shape):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(Shape):
    """What a client needs to know of the base's tokenizer."""

    tokenizer_class: str
    vocab_size: int
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    eos_token_id: int | None
    model_max_length: int


class Version(Shape):
    """The version of this server."""

    version: str


class Status(Shape):
    """`ok`; anything else is an error."""

    status: Literal["ok"]


class Blob(Shape):
    """A stored blob."""

    object: Literal["blob"]
    id: str
    digest: str


class TierRoom(Shape):
    """What a tier holds of adapters, in bytes, and at most may."""

    adapters: int
    bytes: int
    bytes_limit: int


class SlotRoom(Shape):
    """Device slots."""

    total: int
    used: int


class SetAside(Shape):
    """Why an adapter is not asked for a while; retry_after_s 0: the next request tries it."""

    reason: Literal["numerics", "slot_contents", "no_effect", "golden_mismatch"]
    retry_after_s: float
    times: int


class ResidentAdapter(Shape):
    """An adapter on a replica. rank: of one that lies in a slot."""

    digest: str
    model: str
    tiers: list[Literal["device", "host"]]
    leases: int
    rank: int | None
    pinned: bool
    warm: bool
    dropping: bool
    set_aside: SetAside | None


class ReplicaResidency(Shape):
    """A replica's tiers, and the adapters that it holds, as its last heartbeat told, which came age_s seconds ago.

    left_out: how many more adapters there are than `limit`.
    """

    replica: str
    age_s: float
    slots: SlotRoom
    host: TierRoom
    disk: TierRoom
    loading: int
    evicted: dict[str, int]
    adapters: list[ResidentAdapter]
    left_out: int


class Residency(Shape):
    """Which adapters lie where."""

    object: Literal["residency"]
    replicas: list[ReplicaResidency]


class Record(Shape):
    """A record of the registry; `object` says which."""

    object: str = Field(pattern=r"^(base|adapter)(\.[a-z]+)?$")


class RecordList(Shape):
    """Records of the registry."""

    object: Literal["list"]
    data: list[Record]
