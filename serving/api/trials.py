"""What is tried beside an alias, over HTTP: canaries and shadows, begun, shown and ended.

Endpoints are plain functions, which FastAPI runs in threads, since the registry blocks; but a canary is warmed first.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Path, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.alias_moves import ANY, Expected
from adapters.canaries import Arm, CanaryLimits, Sticky
from adapters.records import CHAMPION, MoveAction
from adapters.wire import canary_report_to_json, move_to_json, split_to_json
from serving.api.admin_schemas import Line, Number
from serving.api.documents import Record, documented
from serving.api.route import caller_of
from serving.api.schemas import WHOLE, Closed
from serving.api.services import Services

Name = Annotated[str, Path(max_length=64, description="An adapter's name")]
Alias = Annotated[str, Field(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000), WHOLE]
_READ = documented(400, 404)
_WRITE = documented(400, 404, 408, 409, 413, 415)


class LimitsRequest(Closed):
    """When a canary is rolled back by itself; what is left out has its default."""

    min_requests: Count = CanaryLimits().min_requests
    max_error_excess: Annotated[float, Field(ge=0, le=1)] = CanaryLimits().max_error_excess
    max_latency_ratio: Annotated[float, Field(ge=1, le=1000)] = CanaryLimits().max_latency_ratio
    latency_slack_s: Annotated[float, Field(ge=0, le=600)] = CanaryLimits().latency_slack_s
    min_shadow_tokens: Count = CanaryLimits().min_shadow_tokens
    min_agreement: Annotated[float, Field(ge=0, le=1)] = CanaryLimits().min_agreement
    max_logprob_gap: Annotated[float, Field(gt=0, le=1000)] = CanaryLimits().max_logprob_gap


class ShadowRequest(Closed):
    """PUT .../shadow. expected_version: the version that the alias must point at now."""

    version: Number
    percent: Annotated[float, Field(gt=0, le=100)]
    alias: Alias | None = None
    reason: Line | None = None
    expected_version: Number | None = None


class CanaryRequest(ShadowRequest):
    """PUT .../canary. sticky: what keeps its arm, the request's user or its key."""

    percent: Annotated[float, Field(gt=0, le=50)]
    sticky: Literal["user", "key"] = "user"
    limits: LimitsRequest = LimitsRequest()


class StopRequest(Closed):
    """POST .../canary/stop, .../shadow/stop."""

    alias: Alias | None = None
    reason: Line | None = None


def mount(app: FastAPI, services: Services) -> None:
    """Add the routes."""
    canaries, flips, metrics = services.registry.canaries, services.flips, services.metrics

    @app.get(
        "/v1/adapters/{name}/canary",
        response_model=Record,
        responses=_READ,
        tags=["trials"],
        summary="What is tried beside an alias, or was last, and what came of it",
    )
    def get_canary(name: Name, alias: Annotated[str, Query(max_length=64)] = CHAMPION) -> Response:
        return JSONResponse(canary_report_to_json(canaries.report(name, alias)))

    @app.put(
        "/v1/adapters/{name}/canary",
        response_model=Record,
        responses=_WRITE,
        tags=["trials"],
        summary="Warm a version, then let it answer some of an alias's requests",
    )
    async def set_canary(request: Request, name: Name, body: CanaryRequest) -> Response:
        split = await flips.set_canary(
            name,
            body.version,
            body.percent,
            who=caller_of(request).name,
            alias=body.alias or CHAMPION,
            sticky=Sticky(body.sticky),
            limits=CanaryLimits(**body.limits.model_dump()),
            reason=body.reason or "",
            expected=_expected(body),
        )
        metrics.moved(MoveAction.CANARY.value)
        return JSONResponse(split_to_json(split))

    @app.put(
        "/v1/adapters/{name}/shadow",
        response_model=Record,
        responses=_WRITE,
        tags=["trials"],
        summary="Let a version compute some of an alias's requests unseen",
    )
    def set_shadow(request: Request, name: Name, body: ShadowRequest) -> Response:
        split = canaries.set_shadow(
            name,
            body.version,
            body.percent,
            who=caller_of(request).name,
            alias=body.alias or CHAMPION,
            reason=body.reason or "",
            expected_version=_expected(body),
        )
        metrics.moved(MoveAction.SHADOW.value)
        return JSONResponse(split_to_json(split))

    @app.post(
        "/v1/adapters/{name}/canary/stop",
        response_model=Record,
        responses=_WRITE,
        tags=["trials"],
        summary="End a canary",
    )
    def stop_canary(request: Request, name: Name, body: StopRequest) -> Response:
        return _stop(request, name, body, Arm.CANARY)

    @app.post(
        "/v1/adapters/{name}/shadow/stop",
        response_model=Record,
        responses=_WRITE,
        tags=["trials"],
        summary="End a shadow",
    )
    def stop_shadow(request: Request, name: Name, body: StopRequest) -> Response:
        return _stop(request, name, body, Arm.SHADOW)

    def _stop(request: Request, name: str, body: StopRequest, kind: Arm) -> Response:
        who = caller_of(request).name
        move = canaries.stop(name, kind, who=who, alias=body.alias or CHAMPION, reason=body.reason or "")
        metrics.moved(move.action.value)
        return JSONResponse(move_to_json(move))


def _expected(body: ShadowRequest) -> Expected:
    return body.expected_version if "expected_version" in body.model_fields_set else ANY
