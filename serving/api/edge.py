"""The outermost ring: who is addressed, under which request id, what it came to. Pure ASGI, around everything."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import HostNotAllowed, LoraplaneError
from serving.api.errors import http_response, response
from serving.api.route import OPEN_PATHS
from serving.config import EdgeSettings, is_loopback
from serving.metrics import Metrics

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class HostList:
    """Which Host headers are ours. Guards a loopback server against pages that rebind their name to it."""

    def __init__(self, settings: EdgeSettings) -> None:
        names: Iterable[str] = settings.allowed_hosts
        if settings.loopback:
            names = (*names, *_LOOPBACK_NAMES, settings.host.strip("[]"))
        self._names = frozenset(name.lower() for name in names)
        self._any = not self._names

    def check(self, host: str | None) -> None:
        """Raises HostNotAllowed when a request is addressed to somebody else."""
        if self._any:
            return
        name = _without_port((host or "").lower())
        if name not in self._names and not (name.startswith("127.") and is_loopback(name) and self._has_loopback):
            raise HostNotAllowed("This server does not answer to that Host name; LORAPLANE_ALLOWED_HOSTS names more.")

    @property
    def _has_loopback(self) -> bool:
        return "127.0.0.1" in self._names


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


class Edge:
    """Checks the Host and the number of headers, names the request, catches what nobody caught, counts and logs."""

    def __init__(self, app: ASGIApp, settings: EdgeSettings, metrics: Metrics) -> None:
        self.app = app
        self._hosts = HostList(settings)
        self._max_headers, self._max_header_bytes = settings.max_headers, settings.max_header_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
                out["x-content-type-options"] = "nosniff"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                if not self._bounded(scope["headers"]):
                    await http_response(431)(scope, receive, send_named)
                    return
                self._hosts.check(headers.get("host"))
                await self.app(scope, receive, send_named)
            except LoraplaneError as error:
                self._metrics.refused(error.reason_code)
                if status == 0:
                    await response(error)(scope, receive, send_named)
            except Exception:
                log.exception("request_failed", method=scope["method"], route=_route(scope))
                self._metrics.refused(LoraplaneError.code)
                if status:
                    raise  # the response is on its way: the server can only cut it
                await response(LoraplaneError())(scope, receive, send_named)
            finally:
                seconds = time.monotonic() - started
                self._metrics.answered(_route(scope), scope["method"], status, seconds)
                # A probe that is told "not yet" is no event: /ready says so twice a second while an engine starts.
                probe = _route(scope) in OPEN_PATHS
                level = log.debug if status < 400 or status == 499 or probe else log.info
                level("request", method=scope["method"], route=_route(scope), status=status, seconds=round(seconds, 4))

    def _bounded(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """The server below bounds only what it waits for: a header that comes in one piece is counted here."""
        size = sum(len(name) + len(value) for name, value in headers)
        return len(headers) <= self._max_headers and size <= self._max_header_bytes


def _route(scope: Scope) -> str:
    """The matched route's template: a bounded set, unlike paths."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else "unmatched"
