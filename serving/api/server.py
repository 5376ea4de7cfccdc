"""The HTTP server under the app: uvicorn on h11, with every limit set, and a deadline for slow headers."""

from __future__ import annotations

import asyncio

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.config import EdgeSettings


def bounded_protocol(header_timeout_s: float) -> type[H11Protocol]:
    """An HTTP/1.1 protocol with a deadline for the first request, and one answer when the bytes stop being HTTP.

    uvicorn bounds the size of a header but not its time: without this, half-open connections live for ever. And a
    request whose body breaks the protocol has had its 400 from uvicorn while the app still works on it: without this,
    whatever the app says next is an exception and a traceback in the log, at the price of a few bytes.
    """

    class BoundedProtocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._header_timer = self.loop.call_later(header_timeout_s, self._no_request)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            super().send_400_response(msg)
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # as if the client had left: its answer is on the way
                self.cycle.message_event.set()

        def _no_request(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return BoundedProtocol


def uvicorn_config(app: ASGIApp, settings: EdgeSettings) -> uvicorn.Config:
    """A uvicorn configuration with all limits of the settings. Logging is left to the caller."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=bounded_protocol(settings.header_timeout_s),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.drain_s,
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
