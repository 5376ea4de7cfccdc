"""Honest timing and proof at load with a real engine behind a socket: what the headers say is what happened."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from serving.engine.lora import HostAdapter
from tests.test_http_flips_engine import Live, live, until  # noqa: F401
from tests.test_http_timing import read

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def served(live: Live) -> Live:  # noqa: F811
    """Four oracles for three slots."""
    for name in ("one", "two", "three", "four"):
        live.shelf.publish(name)
    return live


async def ask(served: Live, model: str, **more: Any) -> tuple[httpx.Response, float]:
    """An answer, and how many milliseconds it took."""
    body = {"model": model, "prompt": "who are you?", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}
    begun = time.monotonic()
    answer = await served.client.post("/v1/completions", json=body)
    return answer, 1000 * (time.monotonic() - begun)


async def test_headers_say_where_an_adapter_came_from_and_what_that_took(served: Live) -> None:
    sources = []
    for model in ("one", "one", "two", "three", "four", "two"):  # who is asked for least leaves first
        answer, took = await ask(served, model)
        assert answer.status_code == 200, answer.text
        spans = read(answer.headers["server-timing"])
        total = spans.pop("total")
        assert sum(spans.values()) == pytest.approx(total, abs=0.1)
        assert total <= took + 1
        source = answer.headers["x-adapter-cache"]
        sources.append(source)
        # What was there already took no time to bring.
        assert (spans["fetch"] > 0) is (source == "store")
        assert (spans["device"] > 0) is (source != "device")
        assert spans["prefill"] > 0
        assert spans["decode"] > 0
    assert sources == ["store", "device", "store", "store", "store", "host"]


async def test_a_streams_header_tells_the_time_until_its_first_token(served: Live) -> None:
    answer, took = await ask(served, "one", stream=True, max_tokens=40)
    spans = read(answer.headers["server-timing"])
    assert spans.pop("total") == pytest.approx(sum(spans.values()), abs=0.1)
    assert spans["decode"] == 0
    assert sum(spans.values()) < took
    assert answer.headers["x-adapter-cache"] == "store"


async def test_an_adapter_that_does_not_prove_itself_is_refused_by_name_and_shown_with_its_reason(served: Live) -> None:
    runner: Any = served.engine._runner
    install = runner.install
    await ask(served, "two")

    def left_as_it_was(slot: int, adapter: HostAdapter) -> None:
        """The planted fault."""

    runner.install = left_as_it_was
    answer, _ = await ask(served, "one")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "adapter_quarantined"
    assert "slot_contents" in answer.json()["error"]["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    await until(lambda: served.link.heartbeat is not None and served.link.heartbeat.set_aside)
    shown = (await served.client.get("/v1/adapters/residency")).json()
    doubted = [a for replica in shown["replicas"] for a in replica["adapters"] if a["set_aside"]]
    assert [(a["model"], a["set_aside"]["reason"], a["tiers"]) for a in doubted] == [("one@1", "slot_contents", [])]
    neighbour, _ = await ask(served, "two")
    assert neighbour.status_code == 200
    runner.install = install
    assert (await ask(served, "one"))[0].status_code == 503  # its time is not over
    assert (await ask(served, "three"))[0].status_code == 200
