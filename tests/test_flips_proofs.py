"""Test ids A-01 and A-03: flips under hundreds of streams, and revocation in every process."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.home import Home
from adapters.records import AdapterVersion
from adapters.registry import Registry
from tests.adapter_factory import adapter_files
from tests.fakes import FakeEngine, error_body
from tests.flips_case import FORCE, ask, digest_of, events, flips_case, promote, until
from tests.gateway_child import say_digest
from tests.http_case import Case, make_case, open_case

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[1]
SEED = 20261122


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


class Ticks:
    """The gate of a fake engine: each tick lets one token of every running sequence through."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def set(self) -> None:
        """Nothing is held back before the first tick either."""

    async def wait(self) -> None:
        await self._next.wait()

    def tick(self) -> None:
        now, self._next = self._next, asyncio.Event()
        now.set()


@dataclass
class Crowd:
    """So many streams at any time, of random lengths: whoever ends is followed by another."""

    client: httpx.AsyncClient
    rng: random.Random
    over: asyncio.Event = field(default_factory=asyncio.Event)
    answers: list[tuple[int, httpx.Response]] = field(default_factory=list)

    async def one(self) -> None:
        while not self.over.is_set():
            length = self.rng.randint(5, 60)
            self.answers.append((length, await ask(self.client, tokens=length, stream=True)))


def check_answers(crowd: Crowd) -> dict[str, int]:
    """Each stream whole, of one digest, and of the one that its head names; how many there were of each digest."""
    seen: dict[str, int] = {}
    for length, answer in crowd.answers:
        assert answer.status_code == 200, answer.text
        digest = answer.headers["x-adapter-digest"]
        told = events(answer.text)
        assert {e.get("adapter_digest") for e in told} == {digest}, "mixed"
        assert "".join(c["text"] for e in told for c in e["choices"]) == digest[:length], "wrong weights"
        seen[digest] = seen.get(digest, 0) + 1
    return seen


async def test_A01_fifty_flips_under_five_hundred_streams(tmp_path: Path) -> None:
    """Scale: the whole of A-01 on a fake engine: 500 streams at any time through two gateways on one home, 50
    re-publications under the same name, each promoted (warmed first) and asked for at both gateways at once.

    A stream lives for 5 to 60 tokens and a token comes with each flip, so that it spans as many flips.
    """
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    cases = [make_case(tmp_path, FakeEngine(script=say_digest), max_inflight=600)]
    cases.append(open_case(Home.find(tmp_path), FakeEngine(script=say_digest), max_inflight=600))
    cases[0].publish("summarize", 0)
    ticks = [Ticks() for _ in cases]
    for case, gate in zip(cases, ticks, strict=True):
        case.engine.gate = gate  # type: ignore[assignment]
    async with cases[0].client() as one, cases[1].client() as two:
        crowds = [Crowd(client, rng) for client in (one, two)]
        streams = [asyncio.create_task(crowd.one()) for crowd in crowds for _ in range(250)]
        await until(lambda: sum(c.engine.running for c in cases) == 500, 120)
        digests = []
        for flip in range(1, 51):
            for gate in ticks:
                gate.tick()
            version = await asyncio.to_thread(cases[flip % 2].publish, "summarize", flip, promote=False)
            digests.append(version.digest)
            client = (one, two)[flip % 2]
            assert (await promote(client, version.number)).status_code == 200
            for asked in (one, two):  # the very next question, of every gateway, is about the new version
                assert (await asked.get("/v1/models/summarize")).json()["adapter_digest"] == version.digest
            assert cases[flip % 2].engine.warmed[version.digest] == 600.0
        assert sum(c.engine.running for c in cases) > 480  # but for those that are between two streams
        for crowd in crowds:
            crowd.over.set()
        while not all(task.done() for task in streams):
            for gate in ticks:
                gate.tick()
            await asyncio.sleep(0)
        await asyncio.gather(*streams)
    seen = check_answers(crowds[0])
    for digest, count in check_answers(crowds[1]).items():
        seen[digest] = seen.get(digest, 0) + count
    print(f"{sum(seen.values())} streams over {len(seen)} digests, 0 failed, 0 mixed")
    assert sum(seen.values()) >= 500
    assert len(set(digests) & set(seen)) > 25
    assert all(c.gateway.admission.inflight == 0 and c.engine.running == 0 for c in cases)


async def test_A01_notices_a_stream_that_changes_its_weights(case: Case, client: httpx.AsyncClient) -> None:
    """The check itself: an engine that follows the alias in the middle of an answer, as others have done."""
    two = digest_of(case, 2).encode()
    case.engine.script = lambda submission: [*say_digest(submission)[:20], *two[20 : submission.sampling.max_tokens]]
    crowd = Crowd(client, random.Random(SEED), answers=[(40, await ask(client, tokens=40, stream=True))])
    with pytest.raises(AssertionError, match="wrong weights"):
        check_answers(crowd)


@dataclass
class Child:
    """A gateway in a process of its own."""

    url: str

    def ask(self, model: str = "summarize") -> httpx.Response:
        return self.post("completions", {"model": model, "prompt": "x", "max_tokens": 2})

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=60)


@contextmanager
def child(home: Home) -> Iterator[Child]:
    command = [sys.executable, "-m", "tests.gateway_child", str(home.root)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = next(line for line in process.stdout if line.startswith("http")).strip()
        threading.Thread(target=process.stdout.read, daemon=True).start()  # its log must not fill the pipe
        yield Child(url)
    finally:
        process.stdin.close()
        process.wait(30)


class LongStream(threading.Thread):
    """A stream that would go on for many minutes; when it ends, `last` is its last event and `at` the moment."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.began = threading.Event()
        self.last: Any = None
        self.at = 0.0
        self.start()

    def run(self) -> None:
        body = {"model": "summarize", "prompt": "x", "max_tokens": 90_000, "stream": True}
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.last = json.loads(line.removeprefix("data: "))
                    self.began.set()
        self.at = time.monotonic()


def test_A03_a_revoked_version_is_refused_in_every_process(home: Home) -> None:
    """Scale: two gateway processes on one home, on SQLite and on Postgres. The first request after the revocation was
    acknowledged is refused in both, which is less than the second that is promised; what ran ends in both, when told.
    """
    with ExitStack() as stack:
        first, second = (stack.enter_context(child(home)) for _ in range(2))
        registry = Registry.open(home)
        stack.callback(registry.close)
        for seed in (1, 2):
            files: Any = adapter_files(seed)
            version: AdapterVersion = registry.publish("summarize", files, who="t")
            registry.promote("summarize", version.number, who="t", force=True, reason="t")
            answers = [gateway.ask().json()["adapter_digest"] for gateway in (first, second)]
            assert answers == [version.digest] * 2  # a flip by a third process is seen at once, too
        streams = [LongStream(gateway.url) for gateway in (first, second)]
        assert all(stream.began.wait(60) for stream in streams)
        body = {"reason": "leaked data", "in_flight": "end"}
        told = first.post("adapters/summarize/versions/2/revoke", body)
        acknowledged = time.monotonic()
        assert told.status_code == 200
        refused = [gateway.ask() for gateway in (first, second)]
        seconds = time.monotonic() - acknowledged
        assert [error_body(answer)["code"] for answer in refused] == ["version_revoked"] * 2
        assert first.ask("summarize@1").status_code == 200
        for stream in streams:
            stream.join(60)
            assert stream.last["error"]["code"] == "version_revoked"
        took = [f"{stream.at - acknowledged:.2f}" for stream in streams]
        print(f"refused in both {seconds:.3f} s after the acknowledgement; running streams ended after {took} s")
        again = second.post("adapters/summarize/promote", {"version": 2, **FORCE})
        assert error_body(again)["code"] == "version_revoked"
        back = second.post("adapters/summarize/rollback", {"reason": "revoked"})
        assert back.json()["to_number"] == 1
        assert [gateway.ask().json()["adapter_version"] for gateway in (first, second)] == [1, 1]
