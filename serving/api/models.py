"""GET /v1/models, and what clients ask of the base's tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterator
from typing import Annotated

from fastapi import FastAPI, Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.errors import InvalidRequest
from adapters.prompts import Message
from adapters.records import BASE_ID, AdapterSummary, AdapterVersion
from serving.api.documents import Detokenized, Model, ModelList, Tokenized, TokenizerInfo, documented
from serving.api.schemas import DetokenizeRequest, TokenizeRequest
from serving.api.services import Services
from serving.api.views import Json
from serving.commands import ChatCommand, Wishes
from serving.gateway import Gateway

OWNER = "loraplane"


def mount(app: FastAPI, services: Services) -> None:
    """Add the routes."""
    gateway, registry = services.gateway, services.registry

    @app.get("/v1/models", response_model=ModelList, responses=documented(), tags=["openai"], summary="List models")
    def list_models() -> Response:
        found = [_base_model(gateway, BASE_ID), _base_model(gateway, gateway.resolver.base.name)]
        barred = {standing.digest for standing in registry.standings.decrees().revoked}
        for summary in registry.adapters():
            found += [_version_model(gateway, name, version) for name, version in _live(summary, gateway, barred)]
        return JSONResponse({"object": "list", "data": found})

    @app.get(
        "/v1/models/{model:path}",
        response_model=Model,
        responses=documented(400, 404),
        tags=["openai"],
        summary="Look at one model",
    )
    def get_model(model: Annotated[str, Path(max_length=256)]) -> Response:
        if gateway.resolver.is_base(model):
            return JSONResponse(_base_model(gateway, model))
        return JSONResponse(_version_model(gateway, model, gateway.resolver.version(model)))

    @app.post(
        "/tokenize",
        response_model=Tokenized,
        responses=documented(400, 404, 408, 413, 415),
        tags=["tokenizer"],
        summary="Token ids of a prompt or of messages",
    )
    async def tokenize(body: TokenizeRequest) -> Response:
        target = await gateway.resolver.resolve(body.model or BASE_ID)
        if body.messages is not None:
            messages = tuple(Message(m.role, m.text) for m in body.messages)
            ids = await gateway.render(ChatCommand(Wishes(target.weights.model), messages), target.prompt_format)
        else:
            ids = await gateway.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        strings = None
        if body.return_token_strs:
            strings = await asyncio.to_thread(_strings, gateway, ids)
        return JSONResponse(
            {"count": len(ids), "max_model_len": _max_len(gateway), "tokens": ids, "token_strs": strings}
        )

    @app.post(
        "/detokenize",
        response_model=Detokenized,
        responses=documented(400, 404, 408, 413, 415),
        tags=["tokenizer"],
        summary="The text of token ids",
    )
    async def detokenize(body: DetokenizeRequest) -> Response:
        await gateway.resolver.resolve(body.model or BASE_ID)
        vocabulary = gateway.resolver.base.vocab_size
        if max(body.tokens, default=0) >= vocabulary:
            raise InvalidRequest(f"Token ids must lie between 0 and {vocabulary - 1}.", "tokens")
        text = await asyncio.to_thread(gateway.renderer.decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    @app.get(
        "/tokenizer_info",
        response_model=TokenizerInfo,
        responses=documented(),
        tags=["tokenizer"],
        summary="The base's tokenizer",
    )
    async def tokenizer_info(request: Request) -> Response:
        named = gateway.renderer.special_tokens
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": gateway.resolver.base.vocab_size,
                "eos_token": named.get("eos_token"),
                "bos_token": named.get("bos_token"),
                "pad_token": named.get("pad_token"),
                "eos_token_id": gateway.renderer.eos_token_id,
                "model_max_length": _max_len(gateway),
            }
        )


def _strings(gateway: Gateway, ids: list[int]) -> list[str]:
    return [gateway.renderer.decode([token], skip_special_tokens=False) for token in ids]


def _max_len(gateway: Gateway) -> int:
    facts = gateway.door.facts
    return facts.max_model_len if facts is not None else gateway.resolver.base.max_positions


def _live(summary: AdapterSummary, gateway: Gateway, barred: Container[str]) -> Iterator[tuple[str, AdapterVersion]]:
    """The ids that answer on this base: the name if it has a champion, its aliases, the versions these point at."""
    versions = {
        v.number: v
        for v in summary.versions
        if v.base_digest == gateway.resolver.base.digest
        and v.digest not in barred
        and v.number not in summary.withdrawn
    }
    champion = summary.champion
    if champion in versions:
        yield summary.name, versions[champion]
    aliases = [(a.alias, versions[a.number]) for a in summary.aliases if a.number in versions]
    for alias, version in aliases:
        yield f"{summary.name}@{alias}", version
    for number in sorted({version.number for _, version in aliases}):
        yield versions[number].id, versions[number]


def _base_model(gateway: Gateway, model: str) -> Json:
    base = gateway.resolver.base
    return {
        "id": model,
        "object": "model",
        "created": int(base.created_at.timestamp()),
        "owned_by": OWNER,
        "root": base.name,
        "parent": None,
        "max_model_len": _max_len(gateway),
        "permission": [],
        "adapter": None,
        "adapter_version": None,
        "adapter_digest": None,
        "base_digest": base.digest,
    }


def _version_model(gateway: Gateway, model: str, version: AdapterVersion) -> Json:
    return {
        "id": model,
        "object": "model",
        "created": int(version.published_at.timestamp()),
        "owned_by": OWNER,
        "root": version.id,
        "parent": gateway.resolver.base.name,
        "max_model_len": _max_len(gateway),
        "permission": [],
        "adapter": version.name,
        "adapter_version": version.number,
        "adapter_digest": version.digest,
        "base_digest": version.base_digest,
    }
