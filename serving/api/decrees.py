"""What is served and what is kept ready, over HTTP: promote, rollback, warm, pin, retire, revoke, restore, fallback."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI, Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.records import Fallback, InFlight, MoveAction
from adapters.wire import alias_to_json, move_to_json, residency_to_json, standing_to_json, withdrawal_to_json
from serving.api.admin_schemas import (
    FallbackRequest,
    PromoteRequest,
    RestoreRequest,
    RetireRequest,
    RevokeRequest,
    RollbackRequest,
    WarmRequest,
    expected,
)
from serving.api.documents import Record, documented
from serving.api.route import caller_of
from serving.api.services import Services

Name = Annotated[str, Path(max_length=64, description="An adapter's name")]
Number = Annotated[int, Path(ge=1, le=999_999_999, description="A version's number")]
AliasName = Annotated[str, Path(max_length=64)]
_WRITE = documented(400, 404, 408, 409, 413, 415)
_ENGINE = documented(400, 404, 408, 409, 413, 415, 429)
_PIN = documented(400, 404, 429)
_VERSION = "/v1/adapters/{name}/versions/{number}"


def mount(app: FastAPI, services: Services) -> None:
    """Add the routes."""
    _mount_moves(app, services)
    _mount_withdrawals(app, services)
    _mount_keeping(app, services)


def _mount_moves(app: FastAPI, services: Services) -> None:
    registry, flips, metrics = services.registry, services.flips, services.metrics

    @app.post(
        "/v1/adapters/{name}/promote",
        response_model=Record,
        responses=_ENGINE,
        tags=["registry"],
        summary="Warm a version, then make it the champion, if the gate allows it",
    )
    async def promote(request: Request, name: Name, body: PromoteRequest) -> Response:
        move = await flips.promote(
            name,
            body.version,
            who=caller_of(request).name,
            reason=body.reason or "",
            force=bool(body.force),
            expected=expected(body),
            warm=body.warm is not False,
        )
        metrics.moved(move.action.value)
        return JSONResponse(move_to_json(move))

    @app.post(
        "/v1/adapters/{name}/rollback",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Go back to the champion before, or to a version named",
    )
    async def rollback(request: Request, name: Name, body: RollbackRequest) -> Response:
        move = await flips.rollback(name, who=caller_of(request).name, reason=body.reason, to=body.to)
        metrics.moved(move.action.value)
        return JSONResponse(move_to_json(move))

    @app.put(
        "/v1/adapters/{name}/aliases/{alias}/fallback",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Who answers for an alias while the engine has its version set aside",
    )
    async def set_fallback(request: Request, name: Name, alias: AliasName, body: FallbackRequest) -> Response:
        who, chosen = caller_of(request).name, Fallback(body.policy)
        record = await asyncio.to_thread(registry.set_fallback, name, alias, chosen, who=who, reason=body.reason or "")
        metrics.moved(MoveAction.FALLBACK.value)
        return JSONResponse(alias_to_json(record))


def _mount_withdrawals(app: FastAPI, services: Services) -> None:
    flips, metrics = services.flips, services.metrics
    drain_s = services.settings.retire_drain_s

    @app.post(
        f"{_VERSION}/retire",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Unload a version: hide it, let what runs finish, free its bytes",
    )
    async def retire(request: Request, name: Name, number: Number, body: RetireRequest) -> Response:
        found = await flips.retire(
            name,
            number,
            who=caller_of(request).name,
            reason=body.reason or "",
            deadline_s=drain_s if body.deadline_s is None else body.deadline_s,
        )
        metrics.moved(MoveAction.RETIRE.value)
        return JSONResponse(withdrawal_to_json(found))

    @app.post(
        f"{_VERSION}/revoke",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Refuse a version's bytes under every name, from now on",
    )
    async def revoke(request: Request, name: Name, number: Number, body: RevokeRequest) -> Response:
        in_flight = InFlight(body.in_flight)
        who = caller_of(request).name
        found = await flips.revoke(name, number, who=who, reason=body.reason, in_flight=in_flight)
        metrics.moved((MoveAction.REVOKE_NOW if in_flight is InFlight.END else MoveAction.REVOKE).value)
        return JSONResponse(withdrawal_to_json(found))

    @app.post(
        f"{_VERSION}/restore",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Bring a retired or revoked version back into service",
    )
    async def restore(request: Request, name: Name, number: Number, body: RestoreRequest) -> Response:
        who = caller_of(request).name
        found = await flips.restore(name, number, who=who, reason=body.reason)
        metrics.moved(MoveAction.RESTORE.value)
        return JSONResponse(standing_to_json(found))


def _mount_keeping(app: FastAPI, services: Services) -> None:
    flips, metrics = services.flips, services.metrics

    @app.post(
        f"{_VERSION}/warm",
        response_model=Record,
        responses=_ENGINE,
        tags=["registry"],
        summary="Have a version ready on every engine for a while",
    )
    async def warm(name: Name, number: Number, body: WarmRequest) -> Response:
        return JSONResponse(residency_to_json(await flips.warm(name, number, body.ttl_s)))

    @app.put(
        f"{_VERSION}/pin",
        response_model=Record,
        responses=_PIN,
        tags=["registry"],
        summary="Keep a version in a slot of every engine",
    )
    async def pin(request: Request, name: Name, number: Number) -> Response:
        found = await flips.pin(name, number, True, who=caller_of(request).name)
        metrics.moved(MoveAction.PIN.value)
        return JSONResponse(residency_to_json(found))

    @app.delete(
        f"{_VERSION}/pin",
        response_model=Record,
        responses=_PIN,
        tags=["registry"],
        summary="Let a pinned version's slot be given away again",
    )
    async def unpin(request: Request, name: Name, number: Number) -> Response:
        found = await flips.pin(name, number, False, who=caller_of(request).name)
        metrics.moved(MoveAction.UNPIN.value)
        return JSONResponse(residency_to_json(found))
