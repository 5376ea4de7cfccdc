"""The one table from typed errors to HTTP, and the one shape in which they travel."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from adapters.errors import (
    AdapterRefused,
    BaseMissing,
    BaseUnsupported,
    Cancelled,
    Conflict,
    DataRefused,
    DeadlineExceeded,
    EngineFault,
    HostNotAllowed,
    InvalidKey,
    InvalidRequest,
    LoraplaneError,
    MissingParameter,
    NotFound,
    OperatorError,
    Overloaded,
    PayloadTooLarge,
    Refused,
    RunInvalid,
    Unavailable,
    UnsupportedParameter,
)

MAX_RETRY_AFTER_S = 119.0
_MAX_MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class Wire:
    """How a family of errors looks to a client. hidden: its message stays in the log."""

    status: int
    type: str
    hidden: bool = False


# The nearest ancestor in the tree decides.
TABLE: Mapping[type[LoraplaneError], Wire] = {
    LoraplaneError: Wire(500, "server_error", hidden=True),
    Refused: Wire(400, "invalid_request_error"),
    InvalidRequest: Wire(400, "invalid_request_error"),
    AdapterRefused: Wire(400, "invalid_request_error"),
    NotFound: Wire(404, "invalid_request_error"),
    Conflict: Wire(409, "conflict_error"),
    InvalidKey: Wire(401, "invalid_request_error"),
    HostNotAllowed: Wire(421, "invalid_request_error"),
    PayloadTooLarge: Wire(413, "invalid_request_error"),
    Overloaded: Wire(429, "rate_limit_error"),
    Unavailable: Wire(503, "server_error"),
    EngineFault: Wire(500, "server_error"),
    DeadlineExceeded: Wire(504, "server_error"),
    Cancelled: Wire(499, "invalid_request_error"),
    # A wrong configuration is the operator's business, except where a request named what is wrong.
    OperatorError: Wire(500, "server_error", hidden=True),
    BaseMissing: Wire(400, "invalid_request_error"),
    BaseUnsupported: Wire(400, "invalid_request_error"),
    RunInvalid: Wire(400, "invalid_request_error"),
    DataRefused: Wire(400, "invalid_request_error"),
}

GENERIC = "The server failed on this request; its log has the details under the request id."


def wire(error: LoraplaneError) -> Wire:
    """How this error looks to a client."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def body(error: LoraplaneError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    row = wire(error)
    message = GENERIC if row.hidden else str(error)[:_MAX_MESSAGE]
    code = LoraplaneError.code if row.hidden else error.reason_code
    return {"error": {"message": message, "type": row.type, "param": error.param, "code": code}}


def headers(error: LoraplaneError) -> dict[str, str]:
    """The headers that tell a client whether, and when, to try again."""
    status = wire(error).status
    found: dict[str, str] = {}
    if isinstance(error, InvalidKey):
        found["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded | Unavailable) and error.retry_after_s is not None:
        seconds = min(max(error.retry_after_s, 0.0), MAX_RETRY_AFTER_S)
        found["retry-after"] = str(max(1, math.ceil(seconds)))
        found["retry-after-ms"] = str(max(1, round(seconds * 1000)))
    elif status == HTTPStatus.CONFLICT or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != 504):
        # The OpenAI SDK retries 409 and every 5xx unless told not to.
        found["x-should-retry"] = "false"
    return found


def response(error: LoraplaneError) -> Response:
    """The error as an answer of its own."""
    return Response(msgspec.json.encode(body(error)), wire(error).status, headers(error), "application/json")


def plain_response(status: int, message: str, code: str, extra: Mapping[str, str] | None = None) -> Response:
    """An error of HTTP itself (404, 405, 408, 415, 431 ...) in the same shape."""
    content = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return Response(msgspec.json.encode(content), status, dict(extra or {}), "application/json")


HTTP_CODES = {
    400: ("invalid_value", "The request is not valid."),
    404: ("not_found", "There is nothing at this path."),
    405: ("method_not_allowed", "This path does not know this method."),
    408: ("request_timeout", "The request's body did not arrive in time."),
    413: ("too_large", "The request's body is too large."),
    415: ("unsupported_media_type", "Send the body as application/json, not compressed."),
    431: ("headers_too_large", "The request has too many headers, or too large ones."),
}


def http_response(status: int, extra: Mapping[str, str] | None = None, message: str | None = None) -> Response:
    """The answer for a status that HTTP's own machinery raised. message: in place of the status' own."""
    code, usual = HTTP_CODES.get(status, ("http_error", HTTPStatus(status).phrase))
    return plain_response(status, message or usual, code, extra)


def from_validation(
    errors: Sequence[Mapping[str, Any]], raw: object, fields: Sequence[str], unsupported: frozenset[str]
) -> InvalidRequest:
    """The refusal for a body that does not fit its schema: the first thing wrong, named.

    raw: the body as parsed; fields: the schema's own; unsupported: those that are refused by name.
    """
    first = _deepest(errors, raw)
    if not first["loc"] and first["type"] not in _AGREEMENTS:
        return InvalidRequest("The body must be a JSON object.")
    name = str(first["loc"][-1]) if first["loc"] else first["type"]
    param = _param(first["loc"], raw, absent=first["type"] == "missing")
    top = param.split(".")[0].split("[")[0] if param else None
    refused = top in unsupported or name in _NESTED_UNSUPPORTED
    if first["type"] == "missing":
        return MissingParameter(f"The field {param!r} is required.", param)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return InvalidRequest(f"Unknown field {param!r}.{hint}", param)
    if refused:
        return UnsupportedParameter(f"This server does not support {param!r} with this value; leave it out.", param)
    if first["type"] in _AGREEMENTS:
        param = first["type"]
    message = first["msg"]
    return InvalidRequest(f"{param}: {message}." if param else f"{message}.", param)


# Rules over several fields carry the field's name as their type, for a rule has no place of its own.
_AGREEMENTS = frozenset(
    {
        "stream_options",
        "num_beams",
        "top_logprobs",
        "max_tokens",
        "continue_final_message",
        "add_generation_prompt",
        "prompt",
    }
)
_NESTED_UNSUPPORTED = frozenset({"tool_calls", "function_call", "audio", "refusal", "include_obfuscation"})


def _deepest(errors: Sequence[Mapping[str, Any]], raw: object) -> Mapping[str, Any]:
    """The first error, or of a field that may have several forms the one that got furthest."""

    def depth(error: Mapping[str, Any]) -> int:
        path = _param(error["loc"], raw, absent=error["type"] == "missing") or ""
        return path.count(".") + path.count("[")

    return max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=depth)


def _param(location: Sequence[int | str], raw: object, absent: bool) -> str | None:
    """The place in the caller's own body, `messages[0].content`, without the names of our union branches.

    absent: the last part of the location is not in the body.
    """
    path = ""
    value: Any = raw
    for at, part in enumerate(location):
        last = at == len(location) - 1
        if isinstance(part, int):
            if isinstance(value, list) and part < len(value):
                value, path = value[part], f"{path}[{part}]"
        elif isinstance(value, dict) and (part in value or (last and absent)):
            value, path = value.get(part), f"{path}.{part}" if path else part
    return path[:200] or None
