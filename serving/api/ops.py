"""Routes for those who run the server: health, readiness, version, metrics, and the API's own description."""

from __future__ import annotations

import asyncio
from importlib.metadata import version as installed_version

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from serving.api.documents import Status, Version, documented
from serving.api.services import Services
from serving.metrics import CONTENT_TYPE

_OK = {"status": "ok"}


def mount(app: FastAPI, services: Services) -> None:
    """Add the routes."""
    condition, metrics = services.condition, services.metrics
    running = installed_version("loraplane")

    @app.get("/health", response_model=Status, responses=documented(), tags=["operations"], summary="Liveness")
    async def health() -> Response:
        condition.check_alive()
        return JSONResponse(_OK)

    @app.get("/ping", response_model=Status, responses=documented(), tags=["operations"], summary="Liveness")
    async def ping() -> Response:
        condition.check_alive()
        return JSONResponse(_OK)

    @app.get("/ready", response_model=Status, responses=documented(), tags=["operations"], summary="Readiness")
    async def ready() -> Response:
        await condition.check_ready()
        return JSONResponse(_OK)

    @app.get("/version", response_model=Version, responses=documented(), tags=["operations"], summary="Version")
    async def version() -> Response:
        return JSONResponse({"version": running})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**documented(), 200: {"description": "Prometheus text", "content": {"text/plain": {}}}},
        tags=["operations"],
        summary="Metrics",
    )
    async def prometheus() -> Response:
        return Response(await asyncio.to_thread(metrics.render), headers={"content-type": CONTENT_TYPE})

    @app.get(
        "/openapi.json",
        response_class=JSONResponse,
        responses={**documented(), 200: {"description": "OpenAPI 3.1", "content": {"application/json": {}}}},
        tags=["operations"],
        summary="This description",
    )
    async def openapi() -> Response:
        return JSONResponse(app.openapi())
