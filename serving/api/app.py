"""The FastAPI application, put together: routes, errors, the ring around them, and the document that describes them."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from importlib.metadata import version as installed_version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from adapters.errors import InvalidRequest, LoraplaneError
from adapters.records import BaseRecord
from adapters.registry import Registry
from serving.api import admin, blobs, compare, completions, decrees, models, ops, residency, trials
from serving.api.condition import Condition
from serving.api.edge import Edge
from serving.api.errors import http_response, response
from serving.api.route import OPEN_PATHS, StrictRoute
from serving.api.services import Services
from serving.auth import KeyRing
from serving.config import EdgeSettings
from serving.door import EngineDoor
from serving.flips import FlipLimits, Flips
from serving.gateway import BaseTokenizer, Gateway
from serving.metrics import EngineView, Metrics
from serving.resolver import Resolver
from serving.warden import Warden

TITLE = "Loraplane"


def build_gateway(
    door: EngineDoor,
    registry: Registry,
    base: BaseRecord,
    renderer: BaseTokenizer,
    settings: EdgeSettings,
    engine_limits: Mapping[str, float] | None = None,
) -> tuple[Gateway, Metrics]:
    """A gateway that serves `base` through an engine door, and the metrics that watch both.

    engine_limits: configured figures of the engine, shown beside the settings' own.
    """
    resolver = Resolver(registry, base)

    def look() -> EngineView:
        return EngineView(door.facts, door.heartbeat, door.heartbeat_age_s, gateway.admission.inflight)

    limits = {**settings.figures, **(engine_limits or {})}
    # A base without positions that could run out (T5) has none to say.
    longest = base.max_positions or int(limits.get("engine_context_tokens", 8192))
    metrics = Metrics(base.name, look=look, name_of=resolver.name_of, limits=limits, max_tokens=longest)
    gateway = Gateway(door, resolver, renderer, settings.gateway, metrics)
    return gateway, metrics


def build_app(gateway: Gateway, registry: Registry, settings: EdgeSettings, metrics: Metrics) -> FastAPI:
    """The whole HTTP edge as an ASGI app. It starts nothing: door, registry and metrics belong to the caller.

    Whoever serves it also runs `app.state.services.warden`, so that decrees of other gateways reach this one.
    """
    condition = Condition(
        gateway,
        registry.bases,
        heartbeat_stale_s=settings.heartbeat_stale_s,
        ready_idle_s=settings.ready_idle_s,
        health_grace_s=settings.health_grace_s,
    )
    warden = Warden(
        gateway,
        registry.standings.decrees,
        every_s=settings.decree_poll_s,
        drain_s=settings.retire_drain_s,
        longest_s=settings.request_deadline_s,
    )
    limits = FlipLimits(settings.warm_deadline_s, settings.warm_ttl_s, settings.request_deadline_s)
    flips = Flips(gateway, registry, warden, limits)
    services = Services(gateway, registry, settings, metrics, KeyRing(settings.keys), condition, flips, warden)
    # No documentation page: it would fetch scripts from elsewhere. Its source is at /openapi.json.
    app = FastAPI(
        title=TITLE,
        version=installed_version("loraplane"),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = StrictRoute
    app.state.services = services
    for room in (completions, compare, models, residency, admin, decrees, trials, blobs, ops):
        room.mount(app, services)
    _handle_errors(app, metrics)
    _describe(app, settings)
    app.add_middleware(Edge, settings=settings, metrics=metrics)
    return app


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error that a route raises, in the one shape."""

    @app.exception_handler(LoraplaneError)
    async def typed(request: Request, error: LoraplaneError) -> Response:
        metrics.refused(error.reason_code)
        return response(error)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        # Starlette's own have the phrase as their detail; a route of ours that says more is passed on.
        said = None if error.detail == HTTPStatus(error.status_code).phrase else error.detail
        return http_response(error.status_code, error.headers, said)

    @app.exception_handler(RequestValidationError)
    async def of_parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return response(InvalidRequest(f"{name}: {first['msg']}.", name))


def _describe(app: FastAPI, settings: EdgeSettings) -> None:
    """Make `app.openapi` tell the truth: our own statuses in place of FastAPI's 422, and the key where it is needed."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _truthful(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    routes=app.routes,
                    description="One frozen base, many LoRA adapters: OpenAI-compatible serving, and the registry.",
                ),
                keyed=bool(settings.keys),
            )
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _truthful(document: dict[str, Any], keyed: bool) -> dict[str, Any]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keyed and path not in OPEN_PATHS:
                operation["security"] = [{"key": []}]
    schemas = document.setdefault("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
