"""PUT and GET /v1/blobs: bytes in and out by their SHA-256, in pieces, never whole in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Path
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from adapters.errors import Cancelled, QueueFull
from adapters.store import CHUNK_BYTES
from serving.api.documents import Blob, documented
from serving.api.route import check_length
from serving.api.services import Services

DigestPath = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256, 64 hexadecimal digits")]
_BYTES: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

_OCTETS = "Send the bytes as application/octet-stream, not compressed."


def mount(app: FastAPI, services: Services) -> None:
    """Add the routes."""
    store, settings = services.registry.store, services.settings
    # Threads of their own: a few slow senders must not hold those that serve requests.
    uploads = CapacityLimiter(settings.max_uploads)

    @app.put(
        "/v1/blobs/sha256:{digest}",
        response_model=Blob,
        responses=documented(400, 408, 409, 413, 415, 429),
        tags=["registry"],
        summary="Store bytes under their digest",
        openapi_extra={"requestBody": {"required": True, "content": _BYTES}},
    )
    async def put_blob(request: Request, digest: DigestPath) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/octet-stream" or request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, _OCTETS)
        check_length(request, settings.max_blob_bytes)
        if uploads.available_tokens < 1:
            raise QueueFull(f"{settings.max_uploads} blobs are being sent already; try again in a moment.", 2.0)
        body = _Body(request.stream(), settings.blob_timeout_s)
        put = partial(store.put, body, declared=digest, max_bytes=settings.max_blob_bytes)
        await to_thread.run_sync(put, limiter=uploads)
        return JSONResponse({"object": "blob", "id": f"sha256:{digest}", "digest": digest})

    @app.get(
        "/v1/blobs/sha256:{digest}",
        response_class=StreamingResponse,
        responses={**documented(400, 404), 200: {"description": "The bytes", "content": _BYTES}},
        tags=["registry"],
        summary="The bytes of a digest",
    )
    async def get_blob(digest: DigestPath) -> Response:
        stream = await asyncio.to_thread(store.open, digest)

        async def chunks() -> AsyncIterator[bytes]:
            with stream:
                async for chunk in iterate_in_threadpool(iter(lambda: stream.read(CHUNK_BYTES), b"")):
                    yield chunk

        length = {"content-length": str(os.fstat(stream.fileno()).st_size)}
        return StreamingResponse(chunks(), headers=length, media_type="application/octet-stream")


class _Body:
    """A request's body as the store's thread reads it: each chunk is fetched from the event loop.

    Raises HTTPException 408 when the whole takes too long, Cancelled when the client leaves.
    """

    def __init__(self, chunks: AsyncIterator[bytes], timeout_s: float) -> None:
        self._chunks = chunks
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._next():
            yield chunk

    def _next(self) -> bytes:
        try:
            return asyncio.run_coroutine_threadsafe(self._fetch(), self._loop).result()
        except TimeoutError:
            raise HTTPException(408) from None
        except (ClientDisconnect, CancelledError):
            raise Cancelled("The client left before the bytes were complete.") from None

    async def _fetch(self) -> bytes:
        async with asyncio.timeout_at(self._deadline):
            # Empty chunks may come before the end; the end itself is an empty one for the store.
            async for chunk in self._chunks:
                if chunk:
                    return chunk
            return b""
