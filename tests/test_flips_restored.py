"""A version that comes back while what ran when it left still runs: it is served at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.flips_case import digest_of, flips_case, on, until
from tests.http_case import Case

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return flips_case(tmp_path)


@pytest.fixture
async def client(case: Case) -> AsyncIterator[httpx.AsyncClient]:
    async with case.client() as client:
        yield client


async def test_a_restored_version_is_not_dropped_any_longer(client: httpx.AsyncClient, case: Case) -> None:
    await on(client, 2, "retire", reason="old")
    case.engine.going.add(digest_of(case, 2))
    assert (await on(client, 2, "restore", reason="not so old")).status_code == 200
    assert case.engine.undropped == [digest_of(case, 2)]


async def test_a_version_whose_bytes_are_still_revoked_elsewhere_goes_on_going(
    client: httpx.AsyncClient, case: Case
) -> None:
    case.publish("twin", 2)
    await on(client, 2, "retire", reason="old")
    case.registry.standings.revoke("twin", 1, who="t", reason="leaked")
    case.engine.going.add(digest_of(case, 2))
    assert (await on(client, 2, "restore", reason="not so old")).status_code == 200
    await case.warden.follow()
    assert case.engine.undropped == []


async def test_a_version_is_restored_also_where_no_engine_answers(client: httpx.AsyncClient, case: Case) -> None:
    await on(client, 2, "retire", reason="old")
    case.engine.going.add(digest_of(case, 2))
    case.engine.connected = False
    assert (await on(client, 2, "restore", reason="not so old")).json()["state"] == "live"
    case.engine.connected = True
    await case.warden.follow()
    await until(lambda: case.engine.undropped)


async def test_what_another_gateway_restored_is_not_dropped_any_longer(client: httpx.AsyncClient, case: Case) -> None:
    """This one's drop is under way, and whoever drops is else left alone until that is over."""
    case.registry.standings.retire("summarize", 2, who="another gateway")
    case.engine.going.add(digest_of(case, 2))
    case.warden._leave_alone(digest_of(case, 2), 30.0)
    await case.warden.follow()
    assert case.engine.undropped == []
    case.registry.standings.restore("summarize", 2, who="another gateway", reason="not so old")
    await case.warden.follow()
    await until(lambda: case.engine.undropped == [digest_of(case, 2)])


async def test_the_warden_knows_what_nobody_is_served_any_more(client: httpx.AsyncClient, case: Case) -> None:
    """The prefetch asks it, lest it bring back what has just gone."""
    case.registry.standings.retire("summarize", 2, who="another gateway")
    await case.warden.follow()
    assert case.warden.unwanted == {digest_of(case, 2)}
    assert (await on(client, 2, "restore", reason="not so old")).status_code == 200
    await case.warden.follow()
    assert case.warden.unwanted == frozenset()
