"""The registry over HTTP: publish, aliases, history, policies, reports, bases.

Endpoints are plain functions: FastAPI runs them in threads, since the registry blocks.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Path, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.errors import RecordNotFound
from adapters.prompts import prompt_format_from_json
from adapters.wire import (
    alias_to_json,
    base_to_json,
    move_to_json,
    page,
    policy_to_json,
    report_summary_to_json,
    report_to_json,
    summary_to_json,
    version_to_json,
)
from serving.api.admin_schemas import (
    AliasRequest,
    PolicyRequest,
    PublishRequest,
    ReportRequest,
    expected,
)
from serving.api.documents import Record, RecordList, documented
from serving.api.route import caller_of
from serving.api.services import Services

Name = Annotated[str, Path(max_length=64, description="An adapter's name")]
AliasName = Annotated[str, Path(max_length=64)]
_READ = documented(400, 404)
_WRITE = documented(400, 404, 408, 409, 413, 415)


def mount(app: FastAPI, services: Services) -> None:
    """Add the routes."""
    _mount_reads(app, services)
    _mount_writes(app, services)
    _mount_evaluation(app, services)


def _mount_reads(app: FastAPI, services: Services) -> None:
    registry = services.registry

    @app.get("/v1/bases", response_model=RecordList, responses=documented(), tags=["registry"], summary="List bases")
    def list_bases() -> Response:
        return JSONResponse(page(base_to_json(b) for b in registry.bases()))

    @app.get(
        "/v1/adapters", response_model=RecordList, responses=documented(), tags=["registry"], summary="List adapters"
    )
    def list_adapters() -> Response:
        return JSONResponse(page(summary_to_json(a) for a in registry.adapters()))

    @app.get(
        "/v1/adapters/{name}", response_model=Record, responses=_READ, tags=["registry"], summary="Look at one adapter"
    )
    def get_adapter(name: Name) -> Response:
        return JSONResponse(summary_to_json(registry.adapter(name)))

    @app.get(
        "/v1/adapters/{name}/versions",
        response_model=RecordList,
        responses=_READ,
        tags=["registry"],
        summary="List an adapter's versions",
    )
    def list_versions(name: Name) -> Response:
        return JSONResponse(page(version_to_json(v) for v in registry.adapter(name).versions))

    @app.get(
        "/v1/adapters/{name}/history",
        response_model=RecordList,
        responses=_READ,
        tags=["registry"],
        summary="Every move of an adapter's aliases",
    )
    def get_history(name: Name) -> Response:
        return JSONResponse(page(move_to_json(m) for m in registry.history(name)))


def _mount_writes(app: FastAPI, services: Services) -> None:
    registry, metrics = services.registry, services.metrics

    @app.post(
        "/v1/adapters/{name}/versions",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Publish a version from blobs",
    )
    def publish(request: Request, name: Name, body: PublishRequest) -> Response:
        # The registry digests every byte again: a blob that rotted since it came is refused there.
        files = {file: registry.store.verify(digest) for file, digest in body.files.digests.items()}
        version = registry.publish(
            name,
            files,
            base=body.base,
            prompt_format=None if body.prompt_format is None else prompt_format_from_json(body.prompt_format),
            facts=body.facts or {},
            who=caller_of(request).name,
            note=body.note or "",
        )
        metrics.published()
        return JSONResponse(version_to_json(version))

    @app.put(
        "/v1/adapters/{name}/aliases/{alias}",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Point an alias at a version",
    )
    def set_alias(request: Request, name: Name, alias: AliasName, body: AliasRequest) -> Response:
        record = registry.set_alias(
            name,
            alias,
            body.version,
            who=caller_of(request).name,
            reason=body.reason or "",
            expected_version=expected(body),
        )
        metrics.moved("set")
        return JSONResponse(alias_to_json(record))


def _mount_evaluation(app: FastAPI, services: Services) -> None:
    registry = services.registry

    @app.get(
        "/v1/adapters/{name}/policy",
        response_model=Record,
        responses=_READ,
        tags=["registry"],
        summary="What a version must show before it is promoted",
    )
    def get_policy(name: Name) -> Response:
        policy = registry.policy(name)
        if policy is None:
            raise RecordNotFound(f"The adapter {name!r} has no gate policy.")
        return JSONResponse(policy_to_json(policy))

    @app.put(
        "/v1/adapters/{name}/policy",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Set the gate policy",
    )
    def set_policy(request: Request, name: Name, body: PolicyRequest) -> Response:
        policy = body.to_record()
        registry.set_policy(name, policy, caller_of(request).name)
        return JSONResponse(policy_to_json(policy))

    @app.get(
        "/v1/adapters/{name}/reports",
        response_model=RecordList,
        responses=_READ,
        tags=["registry"],
        summary="List an adapter's evaluation reports, without their examples",
    )
    def list_reports(name: Name, version: Annotated[int | None, Query(ge=1, le=999_999_999)] = None) -> Response:
        return JSONResponse(page(report_summary_to_json(r) for r in registry.reports(name, version)))

    @app.post(
        "/v1/adapters/{name}/reports",
        response_model=Record,
        responses=_WRITE,
        tags=["registry"],
        summary="Store an evaluation report",
    )
    def add_report(name: Name, body: ReportRequest) -> Response:
        report = body.to_record(name)
        registry.add_report(report)
        return JSONResponse(report_to_json(report))

    @app.get(
        "/v1/reports/{digest}", response_model=Record, responses=_READ, tags=["registry"], summary="One whole report"
    )
    def get_report(digest: Annotated[str, Path(max_length=128)]) -> Response:
        return JSONResponse(report_to_json(registry.report(digest)))
