"""One kind of route for everything: who may call, whether we take requests, and a strictly read body, in this order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from adapters.errors import Cancelled, InvalidRequest, PayloadTooLarge
from adapters.strict_json import read_strict
from serving.api.errors import from_validation
from serving.api.schemas import Closed
from serving.api.services import services_of
from serving.auth import USER_HEADER, Caller

# Who answers without a key. Every other route needs one as soon as keys are configured: deny by default.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
# Who answers while the server drains: those above, and those that tell how it fares.
WHILE_DRAINING = OPEN_PATHS | {"/metrics", "/version"}
# Reports carry their examples.
LARGE_BODIES = frozenset({"/v1/adapters/{name}/reports"})

_BIG_JSON_BYTES = 64 << 10
T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictRequest(Request):
    """A request whose JSON body was read and checked before the endpoint sees it."""

    raw: bytes = b""
    parsed: object = None

    async def body(self) -> bytes:
        return self.raw

    async def json(self) -> Any:
        return self.parsed


class StrictRoute(APIRoute):
    """A route that authenticates first, then refuses while draining, then reads its body within limits.

    The policy hangs on the matched route, never on the path as the client spelled it.
    """

    def get_route_handler(self) -> Handler:
        endpoint = super().get_route_handler()

        async def handle(request: Request) -> Response:
            services = services_of(request)
            if self.path not in OPEN_PATHS:
                proven = services.keys.caller(request.headers.get("authorization"))
                request.state.caller = proven.named(request.headers.get(USER_HEADER))
            if self.path not in WHILE_DRAINING:
                services.gateway.admission.check_open()
            if self.body_field is None:
                return await endpoint(request)
            strict = StrictRequest(request.scope, request.receive)
            settings = services.settings
            limit = settings.max_report_bytes if self.path in LARGE_BODIES else settings.max_json_bytes
            strict.raw = await read_body(request, limit, settings.body_timeout_s)
            strict.parsed = await _parse(strict.raw)
            try:
                return await endpoint(strict)
            except RequestValidationError as error:
                raise self._refusal(error, strict.parsed) from None

        return handle

    def _refusal(self, error: RequestValidationError, raw: object) -> InvalidRequest:
        """The first thing wrong with a parameter or a body."""
        outside = next((e for e in error.errors() if e["loc"][0] != "body"), None)
        if outside is not None:
            name = str(outside["loc"][-1])
            return InvalidRequest(f"{name}: {outside['msg']}.", name)
        found = [{**e, "loc": e["loc"][1:]} for e in error.errors()]
        annotation: object = None if self.body_field is None else self.body_field.field_info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Closed):
            return from_validation(found, raw, tuple(annotation.model_fields), annotation.unsupported)
        return from_validation(found, raw, (), frozenset())


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """A JSON request's body. Raises HTTPException 408 and 415, PayloadTooLarge, Cancelled when the client leaves."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise HTTPException(415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415)
    check_length(request, max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise PayloadTooLarge(f"The body may have at most {max_bytes} bytes.")
                chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(408) from None
    except ClientDisconnect:
        raise Cancelled("The client left before the body was complete.") from None
    return b"".join(chunks)


def check_length(request: Request, max_bytes: int) -> None:
    """Refuse a declared length beyond the limit before a byte of it is read. Raises PayloadTooLarge."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise PayloadTooLarge(f"The body may have at most {max_bytes} bytes.")


async def _parse(raw: bytes) -> object:
    try:
        return read_strict(raw) if len(raw) < _BIG_JSON_BYTES else await asyncio.to_thread(read_strict, raw)
    except ValueError as error:
        raise InvalidRequest(f"The body is not acceptable JSON: {_first_line(error)}.") from None


def _first_line(error: ValueError) -> str:
    return (str(error).splitlines() or ["it cannot be read"])[0][:200]


def caller_of(request: Request) -> Caller:
    """Who calls, as the route found out."""
    caller = request.state.caller
    if not isinstance(caller, Caller):
        raise TypeError("the route did not ask who calls")
    return caller


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Do the work as long as the client is there. Raises Cancelled, with the work cancelled, when it leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("The client left.")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
