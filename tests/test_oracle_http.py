"""The oracle storm over HTTP: a real server, an engine killed on the way, and every answer names its digest."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import httpx
import psutil
import pytest

from adapters.home import Home
from adapters.registry import Registry
from tests.live_server import LiveServer, live_server, wait_for
from tests.oracle_adapters import OracleAdapter, save_oracle_base

REQUESTS, ADAPTERS, NAMES, SLOTS, IN_FLIGHT = 500, 200, 40, 8, 24

pytestmark = pytest.mark.timeout(400)


@dataclass
class Published:
    """What was published, and which oracle every digest is."""

    registry: Registry
    base: str
    oracles: dict[str, OracleAdapter] = field(default_factory=dict)
    versions: Counter[str] = field(default_factory=Counter)

    def publish(self, name: str) -> None:
        oracle = OracleAdapter(len(self.oracles))
        version = self.registry.publish(name, oracle.files(self.base), base=self.base, who="storm")
        self.oracles[version.digest] = oracle
        self.versions[name] = version.number
        if version.number == 1:
            self.flip(name, 1)

    def flip(self, name: str, number: int) -> None:
        self.registry.promote(name, number, who="storm", force=True, reason="storm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    base = save_oracle_base(tmp_path_factory.mktemp("http") / "oracle-base")
    options = ("--slots", str(SLOTS), "--max-rows", "16", "--max-model-len", "256", "--replicas", "2")
    with live_server(base, *options, env={"LORAPLANE_DATABASE_URL": ""}) as running:
        yield running


async def _ask(client: httpx.AsyncClient, published: Published, rng: random.Random, outcomes: Counter[str]) -> None:
    """One request, whole, streamed, or streamed and left; what came of it is counted."""
    name = rng.choice(sorted(published.versions))
    model = name if rng.random() < 0.6 else f"{name}@{rng.randint(1, published.versions[name])}"
    count, stream = rng.randint(4, 16), rng.random() < 0.5
    leave_after = rng.randrange(count) if stream and rng.random() < 0.15 else None
    prompt = "tell me who you are. " * rng.randint(1, 4) + rng.choice("abcdef")
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "stream": stream,
    }
    text, ids, error = "", set(), ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            code = json.loads(await answer.aread())["error"]["code"]
            outcomes[code if code in ("engine_lost", "not_ready", "queue_full") else f"wrong: {code} of {model}"] += 1
            return
        digest = answer.headers["x-adapter-digest"]
        if stream:
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    error = event["error"]["code"]
                    continue
                ids.add((event["model"], event["adapter_digest"]))
                text += "".join(choice["text"] for choice in event["choices"])
                if leave_after is not None and len(text) > leave_after:
                    error = "left"
                    break
        else:
            event = json.loads(await answer.aread())
            ids, text = {(event["model"], event["adapter_digest"])}, event["choices"][0]["text"]
    right = published.oracles[digest].text(count)
    named = answer.headers["x-adapter"] == name and {said for _, said in ids} <= {digest} and len(ids) <= 1
    if "@" in model:
        named = named and {said for said, _ in ids} <= {model}
    if not named or (not right.startswith(text) if error else text != right):
        outcomes[f"wrong: {model}, {digest[:12]}, {ids}: {text!r}, not {right!r}, {error}"] += 1
    else:
        outcomes[error or "complete"] += 1


def _is_zero(server: LiveServer, gauge: str) -> bool:
    with server.client() as client:
        return f"\n{gauge}" in client.get("/metrics").text and server.gauge(gauge) == 0


def _kill_an_engine(server: LiveServer) -> None:
    engines = [p for p in server.family() if "ServeReplica" in " ".join(p.cmdline()) or "ServeRepli" in p.name()]
    if engines:
        engines[0].send_signal(9)


async def _storm(server: LiveServer, published: Published, rng: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one() -> None:
        async with room:
            await _ask(client, published, rng, outcomes)

    limits = httpx.Limits(max_connections=IN_FLIGHT)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        tasks: list[asyncio.Task[None]] = []
        for number in range(REQUESTS):
            tasks.append(asyncio.create_task(one()))
            if number % 5 == 0:
                await asyncio.gather(*tasks[: max(0, number - 2 * IN_FLIGHT)])  # flips and publishes fall between them
                name = rng.choice(sorted(published.versions))
                if len(published.oracles) < ADAPTERS:
                    await asyncio.to_thread(published.publish, name)
                await asyncio.to_thread(published.flip, name, rng.randint(1, published.versions[name]))
            if number == REQUESTS // 2:
                _kill_an_engine(server)
        await asyncio.gather(*tasks)
    return outcomes


def test_five_hundred_requests_over_http_get_only_their_own_digests_answers(server: LiveServer) -> None:
    seed = int(os.environ.get("LORAPLANE_TEST_SEED", "1"))
    registry = Registry.open(Home(server.home))
    published = Published(registry, registry.base().name)
    for at in range(ADAPTERS // 2):
        published.publish(f"oracle-{at % NAMES}")
    begun = time.monotonic()
    outcomes = asyncio.run(_storm(server, published, random.Random(seed)))
    print(f"seed {seed}, {time.monotonic() - begun:.0f} s: {dict(outcomes)}")
    registry.close()
    assert [what for what in outcomes if what.startswith("wrong")] == []
    assert outcomes.total() == REQUESTS
    assert outcomes["complete"] > 0.8 * REQUESTS
    assert outcomes["left"] > 10
    assert len(published.oracles) == ADAPTERS
    # Back to the baseline (C8), the engine that was killed among it.
    for gauge in ("gateway_requests_inflight", "vllm:num_requests_running", "vllm:num_requests_waiting"):
        wait_for(partial(_is_zero, server, gauge), 20, f"{gauge} is 0 again")
    assert server.process.poll() is None
    assert psutil.pid_exists(server.process.pid)
