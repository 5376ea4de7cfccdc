"""A server's refusal as the typed error that it was: from the body of an answer back into the tree."""

from __future__ import annotations

from functools import cache

import httpx

from adapters.errors import (
    AdapterRefused,
    Conflict,
    InvalidKey,
    InvalidRequest,
    LoraplaneError,
    Overloaded,
    PayloadTooLarge,
    Reason,
    RecordNotFound,
    Unavailable,
)


def error_from_response(answer: httpx.Response) -> LoraplaneError:
    """The typed error that an answer's body stands for; a body that is none of ours is judged by its status."""
    try:
        body = answer.json()["error"]
        code, message, param = str(body.get("code")), str(body["message"]), body.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message, param = "", f"HTTP {answer.status_code} {answer.reason_phrase}", None
    kind = _kind(code, answer.status_code)
    # Made without __init__: the message was written where the error arose, by the values known there.
    error = kind.__new__(kind, message)
    for name, value in _unknown_attributes(kind).items():
        setattr(error, name, value)
    if isinstance(param, str):
        error.param = param
    if isinstance(error, AdapterRefused):
        error.reason = Reason(code)
    if isinstance(error, Overloaded | Unavailable):
        error.retry_after_s = _seconds(answer.headers.get("retry-after"))
    return error


def _kind(code: str, status: int) -> type[LoraplaneError]:
    if status == 413:
        return PayloadTooLarge  # its code is also an adapter's reason
    if code in set(Reason):
        return AdapterRefused
    if (kind := _by_code().get(code)) is not None:
        return kind
    by_status: dict[int, type[LoraplaneError]] = {
        401: InvalidKey,
        403: InvalidKey,
        404: RecordNotFound,
        409: Conflict,
        429: Overloaded,
    }
    return by_status.get(status, Unavailable if status >= 500 else InvalidRequest)


@cache
def _by_code() -> dict[str, type[LoraplaneError]]:
    """Code -> class, for every class of the tree that has a code of its own."""
    found: dict[str, type[LoraplaneError]] = {RecordNotFound.code: RecordNotFound}
    waiting: list[type[LoraplaneError]] = [LoraplaneError]
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        if "code" in vars(kind) and kind.__module__ == LoraplaneError.__module__:
            found.setdefault(kind.code, kind)
    return found


def _unknown_attributes(kind: type[LoraplaneError]) -> dict[str, object]:
    """What the wire does not carry, as null values, so that reading an attribute never fails."""
    known: dict[str, dict[str, object]] = {
        "ContextLengthExceeded": {"prompt_tokens": 0, "max_tokens": 0, "limit": 0},
        "ModelNotFound": {"model": "", "nearest": ()},
        "NoChampion": {"model": "", "nearest": ()},
        "VersionRetired": {"model": "", "who": "", "why": ""},
        "VersionRevoked": {"model": "", "who": "", "why": ""},
        "WarmFailed": {"model": ""},
        "GenerationMismatch": {"name": "", "alias": "", "expected": None, "actual": None},
        "GateRefused": {"model": "", "reasons": ()},
        "DigestMismatch": {"declared": "", "actual": ""},
        "ExtraMissing": {"extra": ""},
    }
    return known.get(kind.__name__, {})


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
