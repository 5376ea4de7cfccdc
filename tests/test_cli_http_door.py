"""The door over HTTP: typed errors come back as they were, and bytes are trusted only by their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapters import errors
from adapters.errors import (
    AdapterRefused,
    Conflict,
    DigestMismatch,
    GateRefused,
    InvalidKey,
    InvalidRequest,
    LoraplaneError,
    NotReady,
    PayloadTooLarge,
    Reason,
    RecordNotFound,
    ServerUnreachable,
    Unavailable,
)
from adapters.http_door import HttpDoor
from adapters.http_errors import error_from_response


def _tree(kind: type[LoraplaneError] = LoraplaneError) -> Iterator[type[LoraplaneError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _tree(below)


CODED = [kind for kind in _tree() if "code" in vars(kind) and kind not in (AdapterRefused, errors.NotFound)]


def _answer(status: int, code: str | None, message: str = "said", **headers: str) -> httpx.Response:
    body = {"error": {"message": message, "type": "t", "param": None, "code": code}}
    return httpx.Response(status, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


@pytest.mark.parametrize("kind", CODED, ids=lambda kind: kind.__name__)
def test_code_on_the_wire_becomes_the_error_it_was(kind: type[LoraplaneError]) -> None:
    error = error_from_response(_answer(413 if kind is PayloadTooLarge else 400, kind.code))
    assert type(error) is kind
    assert str(error) == "said"
    assert error.reason_code == kind.code


@pytest.mark.parametrize("reason", list(Reason))
def test_refused_adapter_keeps_its_reason(reason: Reason) -> None:
    error = error_from_response(_answer(400, reason.value))
    assert isinstance(error, AdapterRefused)
    assert error.reason is reason


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, InvalidKey),
        (404, RecordNotFound),
        (409, Conflict),
        (413, PayloadTooLarge),
        (500, Unavailable),
    ],
)
def test_answer_without_a_body_of_ours_is_judged_by_its_status(status: int, kind: type[LoraplaneError]) -> None:
    error = error_from_response(httpx.Response(status, text="<html>"))
    assert type(error) is kind
    assert str(status) in str(error)


def test_error_of_the_wire_has_its_attributes_though_empty() -> None:
    error = error_from_response(_answer(409, "gate_refused"))
    assert isinstance(error, GateRefused)
    assert (error.model, error.reasons) == ("", ())


def test_retry_hint_comes_along() -> None:
    error = error_from_response(_answer(503, "not_ready", retry_after="7"))
    assert isinstance(error, NotReady)
    assert error.retry_after_s == 7.0


def _door(answer: Callable[[httpx.Request], httpx.Response], key: str | None = None) -> HttpDoor:
    return HttpDoor("http://127.0.0.1:1/v1/", key, httpx.MockTransport(answer))


def test_key_travels_as_a_bearer_token_and_v1_may_be_in_the_url() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"object": "list", "data": []})

    assert _door(answer, "lp_secret").bases() == []
    assert (seen[0].url.path, seen[0].headers["authorization"]) == ("/v1/bases", "Bearer lp_secret")


def test_something_else_at_the_url_is_said() -> None:
    with pytest.raises(ServerUnreachable, match="not answer as a Loraplane server"):
        _door(lambda _: httpx.Response(200, text="<html>")).adapters()


def _summary(originals: dict[str, str]) -> dict[str, object]:
    version = {
        "name": "a",
        "number": 1,
        "digest": "d" * 64,
        "base_digest": "b" * 64,
        "bound_by": "name",
        "rank": 1,
        "modules": [],
        "size_bytes": 1,
        "prompt_format": {},
        "originals": originals,
        "facts": {},
        "published_by": "x",
        "published_at": "2026-01-01T00:00:00Z",
    }
    return {"name": "a", "versions": [version], "aliases": []}


@pytest.mark.parametrize("original", [True, False])
def test_bytes_that_are_not_their_digest_are_not_kept(tmp_path: Path, original: bool) -> None:
    wanted = hashlib.sha256(b"right").hexdigest()

    def answer(request: httpx.Request) -> httpx.Response:
        if "/blobs/" in request.url.path:
            return httpx.Response(200, content=b"wrong")
        return httpx.Response(200, json=_summary({"adapter_config.json": wanted}))

    with pytest.raises(DigestMismatch):
        _door(answer).pull("a", 1, tmp_path / "out", original=original)
    assert list((tmp_path / "out").iterdir()) == []


def test_file_name_of_a_server_cannot_leave_the_folder(tmp_path: Path) -> None:
    answer = httpx.Response(200, json=_summary({"../evil": "e" * 64}))
    with pytest.raises(ServerUnreachable, match="outside"):
        _door(lambda _: answer).pull("a", 1, tmp_path / "out", original=True)


def test_version_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    answer = httpx.Response(200, json=_summary({}))
    with pytest.raises(RecordNotFound, match="no version 2"):
        _door(lambda _: answer).pull("a", 2, tmp_path / "out")


def test_adapter_without_a_policy_has_none() -> None:
    assert _door(lambda _: _answer(404, "not_found")).policy("a") is None
