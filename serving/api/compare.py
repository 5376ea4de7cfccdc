"""POST /v1/compare: one prompt, up to 8 models, one batch; answers, timings and digests side by side."""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

import msgspec
from fastapi import FastAPI
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from adapters.prompts import Message
from serving.api.documents import Shape, UsageShape, documented
from serving.api.errors import body as error_body
from serving.api.route import caller_of, unless_gone
from serving.api.schemas import WHOLE, ChatMessage, Closed, Seed, Text, TokenId, TokenIds
from serving.api.services import Services
from serving.api.views import Json, usage_object, weights_fields
from serving.commands import Wishes
from serving.comparing import CompareCommand, Side, compare

MOST_MODELS = 8
_STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


class CompareRequest(Closed):
    """POST /v1/compare. Either messages or prompt; seed: the same for all, drawn once if it is left out."""

    models: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=2, max_length=MOST_MODELS)
    ]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)] | None = None
    prompt: Annotated[str | TokenIds, WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    stop: str | list[Text] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128), WHOLE] | None = None
    ignore_eos: bool | None = None
    seed: Seed | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> CompareRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts; an empty one stops nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class SideTiming(Shape):
    """Milliseconds; queue to decode are the engine's own, the last two are counted from the request."""

    queue_ms: float
    load_ms: float
    prefill_ms: float
    decode_ms: float
    first_token_ms: float
    total_ms: float


class SideShape(Shape):
    """One model's answer; text, finish_reason, usage and timing are null where error is not."""

    index: int
    model: str
    adapter: str | None
    adapter_version: int | None
    adapter_digest: str | None
    base_digest: str
    text: str | None
    finish_reason: Literal["stop", "length"] | None
    usage: UsageShape | None
    timing: SideTiming | None
    cache: str | None
    error: Json | None


class Comparison(Shape):
    """The answers in the order in which the models were named."""

    object: Literal["comparison"]
    id: str
    seed: int
    data: list[SideShape]


def mount(app: FastAPI, services: Services) -> None:
    """Add the route."""
    gateway = services.gateway

    @app.post(
        "/v1/compare",
        response_model=Comparison,
        responses=documented(*_STATUSES),
        tags=["trials"],
        summary="One prompt to several models in one batch",
    )
    async def compare_models(request: Request, body: CompareRequest) -> Response:
        seed = secrets.randbits(63) if body.seed is None else body.seed
        command = _command(request, body, seed)
        sides = await unless_gone(request, compare(gateway, command, seed))
        content = {
            "object": "comparison",
            "id": f"cmp-{command.wishes.request_id}",
            "seed": seed,
            "data": [_side(index, side) for index, side in enumerate(sides)],
        }
        return Response(msgspec.json.encode(content), media_type="application/json")


def _command(request: Request, body: CompareRequest, seed: int) -> CompareCommand:
    wishes = Wishes(
        model="",
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or 0,
        stops=body.stops,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        seed=seed,
        request_id=str(request.scope["state"]["request_id"]),
        tenant=caller_of(request).tenant,
    )
    messages = tuple(Message(m.role, m.text) for m in body.messages or ())
    prompt = body.prompt if isinstance(body.prompt, str) else tuple(body.prompt or ())
    return CompareCommand(tuple(body.models), wishes, messages, prompt)


def _side(index: int, side: Side) -> Json:
    answer, choice = side.answer, side.choice
    weights = answer.head.weights
    timing = next((s.timing for s in answer.sequences if s.timing is not None), answer.timing)
    told = None
    if choice is not None and timing is not None:
        told = {
            "queue_ms": timing.queue_s * 1000,
            "load_ms": timing.load_s * 1000,
            "prefill_ms": timing.prefill_s * 1000,
            "decode_ms": timing.decode_s * 1000,
            "first_token_ms": (answer.first_token_s or side.total_s) * 1000,
            "total_ms": side.total_s * 1000,
        }
    return {
        "index": index,
        "model": weights.model,
        **weights_fields(weights),
        "text": None if choice is None else choice.text,
        "finish_reason": None if choice is None else choice.finish.value,
        "usage": None if choice is None else usage_object(answer.usage),
        "timing": told,
        "cache": None if timing is None or weights.digest is None else timing.source,
        "error": None if side.error is None else error_body(side.error)["error"],
    }
