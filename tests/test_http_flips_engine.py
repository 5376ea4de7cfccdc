"""A-01 on a real engine: flips under streams whose text says which weights computed it, through sockets and slots."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.prompts import Renderer
from adapters.records import InFlight
from serving.api.app import build_app, build_gateway
from serving.config import load_settings
from serving.engine.breaker import Doubt
from serving.engine.build import build_engine
from serving.engine.engine import Engine
from serving.gateway import Gateway
from serving.link import Address, EngineLink, LinkServer
from tests.oracle_storm import Shelf

pytestmark = pytest.mark.anyio
SEED = 20261122
TOKEN = "0123456789abcdef"
# Long enough for prefixes to be kept, and it ends in no letter of any code word.
PROMPT = "the same beginning for all of them, whoever answers: " * 2


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Live:
    """A registry with oracles, an engine of torch behind a socket, and the HTTP edge before it."""

    shelf: Shelf
    engine: Engine
    link: EngineLink
    client: httpx.AsyncClient
    gateway: Gateway

    async def begun(self, count: int) -> None:
        """Wait until so many answers have their first token, while the engine takes its time over each step."""
        runner: Any = self.engine._runner
        compute = runner.run

        def run(plan: Any) -> Any:
            time.sleep(0.02)
            return compute(plan)

        runner.run = run
        running = self.gateway._running
        await until(lambda: sum(a.first_token_s is not None for a in running.values()) == count)

    async def ask(self, model: str, tokens: int) -> dict[str, Any]:
        """A stream's text and the one digest that all of its chunks name."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = await self.client.post("/v1/completions", json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        told = [json.loads(line) for line in lines[:-1]]
        (digest,) = {event["adapter_digest"] for event in told}
        return {"digest": digest, "text": "".join(c["text"] for e in told for c in e["choices"]), "tokens": tokens}

    def resident(self) -> set[str]:
        """The digests on host and device, as the engine's last look at itself says."""
        beat = self.engine.heartbeat()
        return {*beat.host_digests, *(slot.digest for slot in beat.slots)}

    def check(self, answer: dict[str, Any]) -> None:
        """The text is what the named weights say, whatever else was computed beside."""
        assert answer["text"] == self.shelf.oracles[answer["digest"]].text(answer["tokens"])


@pytest.fixture
async def live() -> AsyncIterator[Live]:
    # A unix socket's path has at most 107 bytes: pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="lp-") as folder:
        shelf = Shelf.open(Path(folder), max_rows=16, slots=3, probe_after_s=30.0)
        server = LinkServer(Path(folder) / "s", TOKEN)
        engine = build_engine(shelf.config, server.sink)
        engine.start()
        server.start(engine)
        async with edge(shelf, engine, Address(str(Path(folder) / "s"), TOKEN, "one")) as made:
            yield made
        engine.stop()
        server.stop()
        shelf.registry.close()


@asynccontextmanager
async def edge(shelf: Shelf, engine: Engine, address: Address) -> AsyncIterator[Live]:
    async def locate() -> Address:
        return address

    link = EngineLink(locate)
    settings = load_settings(max_inflight=64)
    renderer = Renderer(Path(shelf.config.base_folder))
    gateway, metrics = build_gateway(link, shelf.registry, shelf.registry.base(), renderer, settings)
    app = build_app(gateway, shelf.registry, settings, metrics)
    tasks = [asyncio.create_task(link.run()), asyncio.create_task(app.state.services.warden.run())]
    try:
        await until(lambda: link.heartbeat is not None)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
            yield Live(shelf, engine, link, client, gateway)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def until(condition: Any, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_A01_flips_on_a_real_engine_mix_nothing(live: Live) -> None:
    """Scale: 20 flips over as many re-publications of one name, through 3 slots, under 12 streams at any time.

    Every prompt begins alike, so a prefix cache keyed by the name would show, as would a stale slot.
    """
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    live.shelf.publish("spell")
    answers: list[dict[str, Any]] = []
    over = asyncio.Event()

    async def stream() -> None:
        while not over.is_set():
            answers.append(await live.ask("spell", rng.randint(8, 48)))

    streams = [asyncio.create_task(stream()) for _ in range(12)]
    for _ in range(20):
        version = await asyncio.to_thread(live.shelf.publish, "spell")
        body = {"version": version.number, "force": True, "reason": "test"}
        told = await live.client.post("/v1/adapters/spell/promote", json=body)
        assert told.status_code == 200, told.text
        first = await live.ask("spell", 6)
        assert first["digest"] == version.digest, "the next request does not see the flip"
        answers.append(first)
    over.set()
    await asyncio.gather(*streams)
    for answer in answers:
        live.check(answer)
    beat = live.engine.heartbeat()
    digests = {answer["digest"] for answer in answers}
    print(
        f"{len(answers)} streams over {len(digests)} digests, {beat.evictions} evictions, {beat.reused_tokens} reused"
    )
    assert len(digests) == 21
    assert beat.evictions
    assert beat.reused_tokens, "no prefix was reused, so nothing was shown about them"


async def test_a_promotion_leaves_no_load_to_the_first_request(live: Live) -> None:
    live.shelf.publish("spell")
    version = live.shelf.publish("spell")
    body = {"version": 2, "force": True, "reason": "test"}
    assert (await live.client.post("/v1/adapters/spell/promote", json=body)).status_code == 200
    await until(lambda: version.digest in live.resident())
    await until(lambda: len(live.engine.heartbeat().warm) == 2)  # and the champion before stays for a rollback
    loads = sum(live.engine.heartbeat().loads.values())
    live.check(await live.ask("spell", 6))
    back = await live.client.post("/v1/adapters/spell/rollback", json={"reason": "test"})
    assert back.json()["to_number"] == 1
    live.check(await live.ask("spell", 6))
    assert sum(n for source, n in live.engine.heartbeat().loads.items() if source in ("store", "disk")) == loads


async def test_a_retired_versions_bytes_are_seen_to_go(live: Live) -> None:
    live.shelf.publish("spell")
    old = live.shelf.registry.version("spell", 1)
    live.shelf.publish("spell")
    live.check(await live.ask("spell", 6))
    running = asyncio.create_task(live.ask("spell", 120))
    await live.begun(1)
    live.shelf.flip("spell", 2)
    told = await live.client.post("/v1/adapters/spell/versions/1/retire", json={"reason": "old", "deadline_s": 60})
    assert told.json()["residency"]["tier"] == "gone"
    assert told.json()["residency"]["size_bytes"] > 0
    live.check(await running)  # it finished on what it began with, and was waited for
    await until(lambda: old.digest not in live.resident())
    refused = await live.client.post("/v1/completions", json={"model": "spell@1", "prompt": "x"})
    assert refused.json()["error"]["code"] == "version_retired"
    live.check(await live.ask("spell", 6))


async def test_a_retirement_waits_no_longer_than_its_deadline(live: Live) -> None:
    live.shelf.publish("spell")
    live.shelf.publish("spell")
    body = {"model": "spell", "prompt": PROMPT, "max_tokens": 140, "temperature": 0, "ignore_eos": True, "stream": True}
    running = asyncio.create_task(live.client.post("/v1/completions", json=body))
    await live.begun(1)
    live.shelf.flip("spell", 2)
    told = await live.client.post("/v1/adapters/spell/versions/1/retire", json={"reason": "old", "deadline_s": 0.1})
    assert told.json()["residency"]["tier"] == "gone"
    ended = await running
    assert '"adapter_unloaded"' in ended.text
    assert ended.text.endswith("data: [DONE]\n\n")
    live.check(await live.ask("spell", 6))


async def test_a_revoked_version_leaves_the_engine_and_its_neighbours_run_on(live: Live) -> None:
    live.shelf.publish("spell")
    live.shelf.publish("other")
    neighbour = asyncio.create_task(live.ask("other", 140))
    body = {"model": "spell", "prompt": PROMPT, "max_tokens": 140, "temperature": 0, "ignore_eos": True, "stream": True}
    running = asyncio.create_task(live.client.post("/v1/completions", json=body))
    await live.begun(2)
    live.shelf.registry.standings.revoke("spell", 1, who="another process", reason="bad", in_flight=InFlight.END)
    ended = await running
    assert '"version_revoked"' in ended.text
    assert ended.text.endswith("data: [DONE]\n\n")
    digest = live.shelf.registry.version("spell", 1).digest
    await until(lambda: digest not in live.resident())
    live.check(await neighbour)


async def test_the_version_before_answers_while_the_engine_has_the_champion_set_aside(live: Live) -> None:
    first, second = live.shelf.publish("spell"), live.shelf.publish("spell")
    live.shelf.flip("spell", 2)
    live.check(await live.ask("spell", 6))
    live.engine._scheduler.breaker.quarantine(second.digest, Doubt.NUMERICS, time.monotonic())
    body = {"model": "spell", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    refused = await live.client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_quarantined")
    path = "/v1/adapters/spell/aliases/champion/fallback"
    assert (await live.client.put(path, json={"policy": "previous"})).status_code == 200
    answer = await live.ask("spell", 20)
    assert answer["digest"] == first.digest
    live.check(answer)
    told = await live.client.post("/v1/completions", json=body)
    assert (told.json()["model"], told.headers["x-adapter-instead-of"]) == ("spell@1", "spell@2")


async def test_a_pin_outlives_the_engine_that_held_it(live: Live) -> None:
    version = live.shelf.publish("spell")
    told = await live.client.put("/v1/adapters/spell/versions/1/pin")
    assert told.json()["tier"] == "device"
    for name in ("a", "b", "c", "d"):
        live.shelf.publish(name)
        live.check(await live.ask(name, 6))
    await until(lambda: live.engine.heartbeat().pinned == (version.digest,))
    beat = live.engine.heartbeat()
    assert version.digest in {slot.digest for slot in beat.slots}, "four others through three slots drove it out"
    await live.link.pin(version.digest, False)  # as an engine that restarted: it knows of no pin
    await until(lambda: live.engine.heartbeat().pinned == (version.digest,))
    assert (await live.client.delete("/v1/adapters/spell/versions/1/pin")).status_code == 200
    await until(lambda: live.engine.heartbeat().pinned == ())


async def test_no_alias_moves_to_what_no_slot_can_be_had_for(live: Live) -> None:
    """All three slots are pinned to others: a promotion warmed the version on the host, moved, and served nobody."""
    live.shelf.publish("spell")
    live.shelf.publish("spell")
    live.check(await live.ask("spell", 6))
    for name in ("a", "b", "c"):
        live.shelf.publish(name)
        assert (await live.client.put(f"/v1/adapters/{name}/versions/1/pin")).status_code == 200
    body = {"version": 2, "force": True, "reason": "test"}
    refused = await live.client.post("/v1/adapters/spell/promote", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "warm_failed")
    assert "no-warm" not in refused.json()["error"]["message"]
    assert "loraplane unpin" in refused.json()["error"]["message"]
    assert live.shelf.registry.resolve("spell").number == 1
    assert (await live.client.delete("/v1/adapters/a/versions/1/pin")).status_code == 200
    assert (await live.client.post("/v1/adapters/spell/promote", json=body)).status_code == 200
    live.check(await live.ask("spell", 6))


async def test_a_restored_version_is_served_at_once_though_its_drain_goes_on(live: Live) -> None:
    live.shelf.publish("spell")
    live.shelf.publish("spell")
    running = asyncio.create_task(live.ask("spell@1", 140))
    await live.begun(1)
    live.shelf.flip("spell", 2)
    path = "/v1/adapters/spell/versions/1"
    retiring = asyncio.create_task(live.client.post(f"{path}/retire", json={"reason": "old", "deadline_s": 60}))
    await until(lambda: bool(live.engine.heartbeat().dropping))
    assert (await live.client.post(f"{path}/restore", json={"reason": "not so old"})).status_code == 200
    live.check(await live.ask("spell@1", 6))
    assert not running.done(), "nothing was to be shown: the drain was over"
    assert (await retiring).json()["residency"]["tier"] == "device"
    live.check(await running)
