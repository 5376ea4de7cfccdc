"""Where adapters lie now, over HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query
from starlette.responses import JSONResponse, Response

from serving.api.documents import Residency, documented
from serving.api.services import Services
from serving.residency import residency

_MOST = 10_000


def mount(app: FastAPI, services: Services) -> None:
    """Add the route; before those of adapters by name, one of which this path would be."""
    gateway = services.gateway

    @app.get(
        "/v1/adapters/residency",
        response_model=Residency,
        responses=documented(400, 503),
        tags=["registry"],
        summary="Which adapters lie in which tier of each replica, and which are set aside",
    )
    async def get_residency(limit: Annotated[int, Query(ge=1, le=_MOST)] = 1000) -> Response:
        gateway.facts()  # without an engine nothing is known, and that is not nothing
        return JSONResponse(residency(gateway.door, gateway.resolver.name_of, limit))
