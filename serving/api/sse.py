"""Server-sent events: an answer as a stream that always ends with a finish or an error, and then [DONE]."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import msgspec
import structlog
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from adapters.errors import LoraplaneError
from serving.answers import Answer
from serving.api.errors import body
from serving.metrics import Metrics

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One event of one JSON value."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream(StreamingResponse):
    """Sends an answer's events, and frees its rows however the sending ends."""

    def __init__(
        self, answer: Answer, events: AsyncIterator[bytes], headers: Mapping[str, str], metrics: Metrics
    ) -> None:
        super().__init__(_whole(events, answer, metrics), headers={**headers, **_HEADERS})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Also when the client left while we waited to send: the iterator may never be resumed then.
            self._answer.close()


_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}


async def _whole(events: AsyncIterator[bytes], answer: Answer, metrics: Metrics) -> AsyncIterator[bytes]:
    """The events and their proper end. Once the first byte is out, an error can only travel in the stream."""
    try:
        async for chunk in events:
            yield chunk
    except LoraplaneError as error:
        metrics.refused(error.reason_code)
        yield event(body(error))
    except Exception:
        log.exception("stream_failed", answer=answer.head.id)
        metrics.refused(LoraplaneError.code)
        yield event(body(LoraplaneError()))
    yield DONE
