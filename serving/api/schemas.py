"""What the OpenAI routes accept: closed schemas. A field is honoured, accepted without effect and named in a header,
or refused by name; none is dropped in silence."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError


def _whole(value: object) -> object:
    """JSON does not tell 1 from 1.0, and some clients write the latter; lists of numbers likewise."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and any(isinstance(item, float | list) for item in value):
        return [_whole(item) for item in value]
    return value


WHOLE = BeforeValidator(_whole)
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Nothing = Annotated[list[JsonValue], Field(max_length=0)]
Empty = Annotated[dict[str, JsonValue], Field(max_length=0)]


class Closed(BaseModel):
    """A JSON object whose unknown fields are errors and whose values are not converted from other types.

    unsupported: fields of the protocol that are understood only with an inert value; anything else is refused by
    name. ignored: fields that are accepted and change nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    unsupported: ClassVar[frozenset[str]] = frozenset()
    ignored: ClassVar[frozenset[str]] = frozenset()

    def ignored_fields(self) -> tuple[str, ...]:
        """The fields given that have no effect, for the header that says so."""
        return tuple(sorted(f for f in self.model_fields_set & self.ignored if getattr(self, f) is not None))


class TextPart(Closed):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class FormatText(Closed):
    """The only response format: plain text."""

    type: Literal["text"]


class StreamOptions(Closed):
    """What a stream carries beside text."""

    unsupported = frozenset({"include_obfuscation"})

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatMessage(Closed):
    """One turn of a conversation. `name` is accepted and not shown to the model."""

    unsupported = frozenset({"tool_calls", "function_call", "audio", "refusal"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    audio: None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one text; parts are joined by line breaks."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


LogitBias = dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class Generation(Closed):
    """The fields that chat and completions share."""

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "prompt_logprobs",
            "truncate_prompt_tokens",
            "use_beam_search",
            "priority",
            "chat_template",
            "chat_template_kwargs",
            "allowed_token_ids",
            "bad_words",
        }
    )
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "prediction",
            "verbosity",
            "moderation",
            "parallel_tool_calls",
            "reasoning_effort",
            "session_id",
        }
    )

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    stop: str | list[Text] | None = None
    seed: Seed | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=100), WHOLE] | None = None
    num_beams: Annotated[int, Field(ge=1, le=64), WHOLE] | None = None
    length_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    early_stopping: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128), WHOLE] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None

    user: Annotated[str, Field(max_length=512)] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_options: dict[str, JsonValue] | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    prediction: dict[str, JsonValue] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    moderation: dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    session_id: Annotated[str, Field(max_length=512)] | None = None

    response_format: FormatText | None = None
    structured_outputs: Empty | None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    use_beam_search: Literal[False] | None = None
    priority: Literal[0] | None = None
    chat_template: None = None
    chat_template_kwargs: Empty | None = None
    allowed_token_ids: None = None
    bad_words: Nothing | None = None

    @model_validator(mode="after")
    def _beams_are_what_is_ranked(self) -> Generation:
        if (self.num_beams or 1) == 1 and (self.early_stopping or self.length_penalty not in (None, 1)):
            raise PydanticCustomError("num_beams", "length_penalty and early_stopping need num_beams above 1")
        return self

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts; an empty one stops nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    unsupported = Generation.unsupported | {
        "tools",
        "tool_choice",
        "functions",
        "function_call",
        "modalities",
        "audio",
        "web_search_options",
        "documents",
        "echo",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    web_search_options: None = None
    documents: Nothing | None = None
    echo: Literal[False] | None = None

    def ignored_fields(self) -> tuple[str, ...]:
        named = ("messages.name",) if any(m.name is not None for m in self.messages) else ()
        return (*super().ignored_fields(), *named)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ; give one")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise PydanticCustomError(
                    "continue_final_message", "continue_final_message excludes add_generation_prompt: true"
                )
            if self.messages[-1].role != "assistant":
                raise PydanticCustomError(
                    "continue_final_message", "continue_final_message needs an assistant's message at the end"
                )
        elif self.add_generation_prompt is False:
            raise PydanticCustomError(
                "add_generation_prompt", "add_generation_prompt: false needs continue_final_message: true"
            )
        return self


Prompt = str | Annotated[list[Text], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]


class CompletionRequest(Generation):
    """POST /v1/completions. The prompt is a text, texts, token ids, or lists of token ids."""

    unsupported = Generation.unsupported | {"best_of", "suffix"}

    prompt: Annotated[Prompt, WHOLE]
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = None

    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _nothing_new_needs_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens: 0 needs echo: true; else ask for 1 or more")
        return self

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts, one a text or token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        found: list[str | tuple[int, ...]] = []
        ids: list[int] = []
        for item in self.prompt:
            if isinstance(item, int):
                ids.append(item)
            else:
                found.append(item if isinstance(item, str) else tuple(item))
        return tuple(found) if found else (tuple(ids),)


class TokenizeRequest(Closed):
    """POST /tokenize: a prompt, or messages as chat would render them."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Closed):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[list[TokenId], WHOLE]
