"""Who may call: keys, the census of routes, Host names, binds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from adapters.errors import ConfigInvalid, InvalidKey
from serving.api.route import OPEN_PATHS, StrictRoute
from serving.auth import KeyRing, new_key
from serving.config import EdgeSettings, load_settings
from tests.fakes import error_body
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio
KEY, OTHER = "lp_" + "a" * 40, "lp_" + "b" * 40


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def locked(tmp_path: Path) -> Case:
    return make_case(tmp_path, api_keys=(KEY, OTHER))


def operations(case: Case) -> list[tuple[str, str]]:
    """Every (method, path) of the app."""
    return [(m, r.path) for r in case.app.routes if isinstance(r, APIRoute) for m in sorted(r.methods)]


def test_every_route_is_one_that_asks_who_calls(locked: Case) -> None:
    assert [r for r in locked.app.routes if not isinstance(r, StrictRoute)] == []
    assert len(operations(locked)) > 20
    assert {"/health", "/ready", "/ping"} == OPEN_PATHS


async def test_S01_without_a_key_only_the_open_routes_answer(locked: Case) -> None:
    async with locked.client() as client:
        for method, path in operations(locked):
            real = path.replace("{digest}", "0" * 64).replace("{", "").replace("}", "")
            for authorization in ("", "Bearer lp_wrong", f"Basic {KEY}", f"bearer {KEY}x", "Bearer"):
                headers = {"authorization": authorization} if authorization else {}
                answer = await client.request(method, real, headers=headers)
                if path in OPEN_PATHS:
                    assert answer.status_code == 200
                else:
                    assert (answer.status_code, error_body(answer)["code"]) == (401, "invalid_api_key"), path
                    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {OTHER}"])
async def test_any_configured_key_opens(locked: Case, authorization: str) -> None:
    async with locked.client(headers={"authorization": authorization}) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_a_key_is_asked_for_before_the_body_is_read(locked: Case) -> None:
    async with locked.client() as client:
        answer = await client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 401


def test_a_caller_is_named_by_a_digest_never_by_the_key() -> None:
    caller = KeyRing([KEY]).caller(f"Bearer {KEY}")
    assert caller.name.startswith("key-")
    assert KEY[3:] not in caller.name
    assert KeyRing([]).caller(None).name == "local"


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer ", f"Bearer {KEY[:-1]}", "Bearer \udcff", "Bearer " + "x" * 9999]
)
def test_what_is_not_a_key_is_refused(authorization: str | None) -> None:
    with pytest.raises(InvalidKey):
        KeyRing([KEY]).caller(authorization)


def test_new_keys_are_accepted_as_settings() -> None:
    key = new_key()
    assert load_settings(api_keys=key).keys == (key,)


@pytest.mark.parametrize("keys", ["secret", "lp_short", f"{KEY},nope"])
def test_a_weak_key_is_refused_at_start(keys: str) -> None:
    with pytest.raises(ConfigInvalid, match="lp_"):
        load_settings(api_keys=keys)


def test_keys_never_show_in_the_settings() -> None:
    assert KEY not in repr(EdgeSettings(api_keys=(KEY,)))  # type: ignore[arg-type]


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLANE_API_KEYS", f"{KEY}, {OTHER}")
    monkeypatch.setenv("LORAPLANE_MAX_INFLIGHT", "7")
    settings = load_settings(port=None)
    assert (settings.keys, settings.max_inflight, settings.port) == ((KEY, OTHER), 7, 8000)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("127.0.0.53", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_settings_know_which_binds_others_can_reach(host: str, loopback: bool) -> None:
    assert EdgeSettings(host=host).loopback is loopback


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("box.local", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ],
)
async def test_a_loopback_server_answers_to_its_own_names_only(tmp_path: Path, host: str, status: int) -> None:
    case = make_case(tmp_path, allowed_hosts=("box.local",))
    async with case.client() as client:
        answer = await client.get("/version", headers={"host": host})
    assert answer.status_code == status
    if status == 421:
        assert error_body(answer)["code"] == "host_not_allowed"


async def test_a_public_server_answers_to_any_name_unless_told(tmp_path: Path) -> None:
    async def status(folder: Path, **settings: Any) -> int:
        case = make_case(folder, host="0.0.0.0", api_keys=(KEY,), **settings)
        async with case.client() as client:
            return (await client.get("/health", headers={"host": "api.example"})).status_code

    assert await status(tmp_path / "a") == 200
    assert await status(tmp_path / "b", allowed_hosts=("other.example",)) == 421


def test_a_client_may_name_itself_beside_what_proved_it() -> None:
    local = KeyRing([]).caller(None)
    assert local.named("alice").name == "alice@local"
    for claim in (None, "", "a\nb", "x" * 65, "<b>", "a b", "a@b"):
        assert local.named(claim).name == "local"
