"""POST /v1/chat/completions and /v1/completions: from JSON to a command, from an answer to JSON."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from adapters.prompts import Message
from serving.answers import Answer, Choice
from serving.api.documents import ChatCompletion, Completion, documented
from serving.api.route import caller_of, unless_gone
from serving.api.schemas import ChatRequest, CompletionRequest, Generation
from serving.api.services import Services
from serving.api.sse import EventStream, event
from serving.api.views import (
    Json,
    chat_choice,
    chat_delta,
    chat_piece,
    completion_choice,
    head_fields,
    usage_object,
)
from serving.commands import ChatCommand, CompletionCommand, Wishes
from serving.resolver import Weights

_STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


def mount(app: FastAPI, services: Services) -> None:
    """Add the two routes."""
    gateway, metrics = services.gateway, services.metrics

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=documented(*_STATUSES, stream=True),
        tags=["openai"],
        summary="Answer a conversation",
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        wishes = _wishes(
            request,
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        messages = tuple(Message(m.role, m.text) for m in body.messages)
        command = ChatCommand(wishes, messages, continue_final=bool(body.continue_final_message))
        if body.stream:
            answer = await unless_gone(request, gateway.chat(command))
            return EventStream(answer, _chat_events(answer, body), answer_headers(answer, body), metrics)
        answer, choices = await unless_gone(request, _whole(gateway.chat(command)))
        top, wanted = body.top_logprobs or 0, bool(body.logprobs)
        return _json(
            answer,
            body,
            {
                **head_fields(answer.head, "chat.completion", _echo(body)),
                "choices": [chat_choice(c, wanted, top) for c in choices],
                "usage": usage_object(answer.usage),
            },
        )

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=documented(*_STATUSES, stream=True),
        tags=["openai"],
        summary="Continue raw prompts",
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        wishes = _wishes(request, body, max_tokens=body.max_tokens, logprobs=body.logprobs)
        command = CompletionCommand(wishes, body.prompts, echo=bool(body.echo))
        if body.stream:
            answer = await unless_gone(request, gateway.completion(command))
            return EventStream(answer, _completion_events(answer, body), answer_headers(answer, body), metrics)
        answer, choices = await unless_gone(request, _whole(gateway.completion(command)))
        return _json(
            answer,
            body,
            {
                **head_fields(answer.head, "text_completion", _echo(body)),
                "choices": [completion_choice(c.index, c.text, c.tokens, body.logprobs, c.finish) for c in choices],
                "usage": usage_object(answer.usage),
            },
        )


async def _whole(begun: Coroutine[Any, Any, Answer]) -> tuple[Answer, list[Choice]]:
    """A whole answer: begun and collected in one go, so that a hang-up cancels both."""
    answer = await begun
    return answer, await answer.collect()


async def _chat_events(answer: Answer, body: ChatRequest) -> AsyncIterator[bytes]:
    """Chat chunks: the role first, then text, the finish reason last, usage after that if asked for."""
    head = head_fields(answer.head, "chat.completion.chunk", _echo(body))
    usage = _UsageRule(answer, body)
    for index in range(answer.head.n):
        role = chat_delta(index, {"role": "assistant", "content": ""})
        yield event({**head, "choices": [role], "usage": usage.running()})
    top, wanted = body.top_logprobs or 0, bool(body.logprobs)
    async for piece in answer.pieces():
        yield event({**head, "choices": [chat_piece(piece, wanted, top)], "usage": usage.running()})
    if usage.at_end:
        yield event({**head, "choices": [], "usage": usage_object(answer.usage)})


async def _completion_events(answer: Answer, body: CompletionRequest) -> AsyncIterator[bytes]:
    """Completion chunks; they share the shape of the whole object."""
    head = head_fields(answer.head, "text_completion", _echo(body))
    usage = _UsageRule(answer, body)
    async for piece in answer.pieces():
        finish = None if piece.finish is None else piece.finish.value
        choice = completion_choice(piece.index, piece.text, piece.tokens, body.logprobs, finish)
        yield event({**head, "choices": [choice], "usage": usage.running()})
    if usage.at_end:
        yield event({**head, "choices": [], "usage": usage_object(answer.usage)})


class _UsageRule:
    """When a stream tells its usage: at the end, with every chunk, or not at all."""

    def __init__(self, answer: Answer, body: Generation) -> None:
        options = body.stream_options
        self._answer = answer
        self._always = options is not None and bool(options.continuous_usage_stats)
        self.at_end = options is not None and bool(options.include_usage)

    def running(self) -> Json | None:
        return usage_object(self._answer.usage) if self._always else None


def _wishes(request: Request, body: Generation, *, max_tokens: int | None, logprobs: int | None) -> Wishes:
    return Wishes(
        model=body.model,
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        n=body.n or 1,
        stops=body.stops,
        include_stop=bool(body.include_stop_str_in_output),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        seed=body.seed,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        logprobs=logprobs,
        no_repeat_ngram_size=body.no_repeat_ngram_size or 0,
        num_beams=body.num_beams or 1,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early_stopping=bool(body.early_stopping),
        skip_special_tokens=body.skip_special_tokens is not False,
        # Of a stream it bounds the silence between two chunks, not the whole answer.
        deadline_s=None if body.stream else read_timeout(request.headers.get("x-stainless-read-timeout")),
        request_id=body.request_id or str(request.scope["state"]["request_id"]),
        tenant=caller_of(request).tenant,
        user=body.user or "",
    )


def read_timeout(header: str | None) -> float | None:
    """The seconds that an OpenAI client waits for a whole answer, a free deadline; None when it does not say."""
    try:
        seconds = float(header or "nan")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _echo(body: Generation) -> Json:
    """Fields of a request that its answer repeats."""
    echoed: Json = {}
    if body.service_tier is not None:
        echoed["service_tier"] = "default"
    if body.metadata is not None:
        echoed["metadata"] = body.metadata
    return echoed


def _json(answer: Answer, body: Generation, content: Json) -> Response:
    return Response(msgspec.json.encode(content), headers=answer_headers(answer, body), media_type="application/json")


def answer_headers(answer: Answer, body: Generation) -> dict[str, str]:
    """The headers that name the weights, where they came from, how long it took, and what was ignored."""
    found = weights_headers(answer.head.weights)
    timing = answer.timing
    if timing is not None:
        if answer.head.weights.adapter is not None:
            found["x-adapter-cache"] = timing.source
        found["server-timing"] = answer.server_timing()
    if answer.head.taken is not None:
        found["x-adapter-arm"] = answer.head.taken.arm.value
    ignored = body.ignored_fields()
    if ignored:
        found["x-ignored-fields"] = ", ".join(ignored)
    return found


def weights_headers(weights: Weights) -> dict[str, str]:
    """Contract C2 in headers. The base answers as the adapter `base`, without version or digest of its own."""
    found = {"x-adapter": weights.adapter or "base", "x-base-digest": weights.base_digest}
    if weights.digest is not None:
        found |= {"x-adapter-version": str(weights.version), "x-adapter-digest": weights.digest}
    if weights.instead_of is not None:
        found["x-adapter-instead-of"] = weights.instead_of
    return found
