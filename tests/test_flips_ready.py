"""What must hold before an alias moves or a canary begins: the version can be served, and nobody came in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from adapters.errors import GenerationMismatch
from adapters.http_door import HttpDoor
from serving.engine.admission import ALL_PINNED
from serving.engine.request import Failed, Moved
from tests.fakes import FakeEngine, error_body
from tests.flips_case import digest_of, flips_case, promote, until
from tests.http_case import Case, make_case, served

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


class SlowToWarm(FakeEngine):
    """An engine whose loads take until `loaded` is set. asked: how many were begun."""

    loaded: threading.Event
    asked = 0

    async def warm(self, digest: str, ttl_s: float, *, prove: bool = False) -> Moved | Failed:
        self.asked += 1
        await asyncio.to_thread(self.loaded.wait, 30)
        return await super().warm(digest, ttl_s, prove=prove)


async def test_what_no_slot_is_left_for_is_neither_promoted_nor_tried(client: httpx.AsyncClient, case: Case) -> None:
    """Every slot was pinned to others: it was promoted all the same, and each of its requests got a 429."""
    case.engine.refusals[digest_of(case, 2)] = Failed(0, "adapter_capacity", ALL_PINNED, retry_after_s=1.0)
    canary = await client.put("/v1/adapters/summarize/canary", json={"version": 2, "percent": 10})
    for answer in (await promote(client, 2), canary):
        assert (answer.status_code, error_body(answer)["code"]) == (503, "warm_failed")
        assert "loraplane unpin NAME@N" in error_body(answer)["message"]
        assert "--slots" in error_body(answer)["message"]
        assert "no-warm" not in error_body(answer)["message"]
        assert (answer.headers["x-should-retry"], "retry-after" in answer.headers) == ("false", False)
    assert [m.to_number for m in case.registry.history("summarize")] == [1]
    del case.engine.refusals[digest_of(case, 2)]
    assert (await promote(client, 2)).status_code == 200


async def test_a_canary_is_warm_before_it_begins_and_its_share_is_changed_without_an_engine(
    client: httpx.AsyncClient, case: Case
) -> None:
    path = "/v1/adapters/summarize/canary"
    case.engine.refusals[digest_of(case, 2)] = Failed(0, "adapter_load_failed", "rotten")
    refused = await client.put(path, json={"version": 2, "percent": 10})
    assert (refused.status_code, error_body(refused)["code"]) == (503, "warm_failed")
    assert len(case.registry.history("summarize")) == 1
    for wrong in ({"version": 1, "percent": 10}, {"version": 2, "percent": 10, "expected_version": 2}):
        assert (await client.put(path, json=wrong)).status_code == 409, "it was loaded before it was refused"
    case.engine.refusals.clear()
    assert (await client.put(path, json={"version": 2, "percent": 10})).status_code == 200
    assert set(case.engine.warmed) == {digest_of(case, 2)}
    case.engine.connected = False
    less = await client.put(path, json={"version": 2, "percent": 1})
    assert (less.status_code, less.json()["canary"]["percent"]) == (200, 1)


def slow_case(tmp_path: Path) -> Case:
    """summarize@1 is champion, @2 and @3 wait; the engine's loads take until `loaded` is set."""
    engine = SlowToWarm()
    engine.loaded = threading.Event()
    case = make_case(tmp_path, engine)
    for seed in (1, 2, 3):
        case.publish("summarize", seed, promote=seed == 1)
    return case


async def test_a_flip_away_and_back_while_a_version_was_loading_is_not_overwritten(tmp_path: Path) -> None:
    """Only the champion's number was compared: a promotion and its rollback in between went unseen."""
    case = slow_case(tmp_path)
    engine = case.engine
    assert isinstance(engine, SlowToWarm)
    async with case.client() as client:
        late = asyncio.create_task(promote(client, 2))
        trial = client.put("/v1/adapters/summarize/canary", json={"version": 2, "percent": 10})
        trying = asyncio.create_task(trial)
        await until(lambda: engine.asked == 2)
        assert (await promote(client, 3, warm=False)).status_code == 200
        assert (await client.post("/v1/adapters/summarize/rollback", json={"reason": "worse"})).status_code == 200
        engine.loaded.set()
        for answer in (await late, await trying):
            assert (answer.status_code, error_body(answer)["code"]) == (409, "generation_mismatch")
            assert "it moved or was tried beside in between" in error_body(answer)["message"]
    assert [m.to_number for m in case.registry.history("summarize")] == [1, 3, 1]


async def test_the_command_lines_door_is_told_of_it_too(tmp_path: Path) -> None:
    case = slow_case(tmp_path)
    engine = case.engine
    assert isinstance(engine, SlowToWarm)
    with served(case) as url:
        door = HttpDoor(url)
        late = asyncio.create_task(asyncio.to_thread(door.promote, "summarize", 2, reason="t", force=True))
        await until(lambda: engine.asked == 1)
        for number in (3, 1):
            case.registry.promote("summarize", number, who="t", force=True, reason="t")
        engine.loaded.set()
        with pytest.raises(GenerationMismatch, match="moved"):
            await late
        door.close()
    assert case.registry.resolve("summarize").number == 1
