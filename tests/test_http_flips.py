"""Flips while requests run: warmed before they are seen, seen at once, and never felt by what runs already."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import StoreFailed
from adapters.home import Home
from adapters.records import AdapterVersion, Fallback
from adapters.registry import Registry
from adapters.standings import Decrees
from serving.engine.request import Failed, Moved
from tests.adapter_factory import adapter_files, base_record, policy
from tests.fakes import FakeEngine, Submission, error_body
from tests.gateway_child import say_digest
from tests.http_case import Case, make_case, open_case, wait_until

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[1]
SEED = 20261122
FORCE = {"force": True, "reason": "test"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class SlowToWarm(FakeEngine):
    """An engine whose loads take until `loaded` is set."""

    loaded: asyncio.Event

    async def warm(self, digest: str, ttl_s: float) -> Moved | Failed:
        await self.loaded.wait()
        return await super().warm(digest, ttl_s)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """summarize@1 is champion, summarize@2 waits. The engine says the digest of whatever it is asked for."""
    case = make_case(tmp_path, FakeEngine(script=say_digest, max_model_len=10_000))
    case.publish("summarize", 1)
    case.publish("summarize", 2, promote=False)
    return case


@pytest.fixture
async def client(case: Case) -> AsyncIterator[httpx.AsyncClient]:
    async with case.client() as client:
        yield client


async def promote(client: httpx.AsyncClient, number: int, **more: Any) -> httpx.Response:
    body = {"version": number, **FORCE, **more}
    return await client.post("/v1/adapters/summarize/promote", json=body)


async def ask(client: httpx.AsyncClient, model: str = "summarize", tokens: int = 4, **more: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": tokens, **more})


async def on(client: httpx.AsyncClient, number: int, verb: str, **body: Any) -> httpx.Response:
    return await client.post(f"/v1/adapters/summarize/versions/{number}/{verb}", json=body)


def digest_of(case: Case, number: int) -> str:
    return case.registry.version("summarize", number).digest


async def until(condition: Any, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def events(text: str) -> list[Any]:
    """The events of a stream, its [DONE] checked and left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -- a promotion warms first ------------------------------------------------------------------------------------


async def test_a_promotion_has_the_version_warm_and_keeps_the_one_before(client: httpx.AsyncClient, case: Case) -> None:
    assert (await promote(client, 2)).json()["to_number"] == 2
    await until(lambda: len(case.engine.warmed) == 2)
    assert case.engine.warmed == {digest_of(case, 1): 600.0, digest_of(case, 2): 600.0}


async def test_the_alias_moves_only_once_the_version_is_warm(tmp_path: Path) -> None:
    engine = SlowToWarm(script=say_digest)
    engine.loaded = asyncio.Event()
    case = make_case(tmp_path, engine)
    case.publish("summarize", 1)
    case.publish("summarize", 2, promote=False)
    async with case.client() as client:
        promoting = asyncio.create_task(promote(client, 2))
        for _ in range(3):
            assert (await ask(client)).json()["adapter_version"] == 1
        engine.loaded.set()
        assert (await promoting).status_code == 200
        assert (await ask(client)).json()["adapter_version"] == 2


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (Failed(0, "adapter_load_failed", "/home/x: no such file"), "could not be loaded"),
        (Failed(0, "adapter_capacity", "full", retry_after_s=5.0), "Every adapter slot is in use"),
        (Failed(0, "not_ready", "starting", retry_after_s=2.0), "starts anew"),
    ],
)
async def test_a_version_that_cannot_be_warmed_is_not_promoted(
    client: httpx.AsyncClient, case: Case, refusal: Failed, said: str
) -> None:
    case.engine.refusals[digest_of(case, 2)] = refusal
    answer = await promote(client, 2)
    assert (answer.status_code, error_body(answer)["code"]) == (503, "warm_failed")
    assert said in error_body(answer)["message"]
    assert "/home" not in error_body(answer)["message"]
    assert ("retry-after" in answer.headers) == (refusal.retry_after_s is not None)
    assert (await ask(client)).json()["adapter_version"] == 1
    assert [m.to_number for m in case.registry.history("summarize")] == [1]
    assert (await promote(client, 2, warm=False)).status_code == 200


async def test_a_load_that_takes_too_long_refuses_the_promotion(tmp_path: Path) -> None:
    engine = SlowToWarm()
    engine.loaded = asyncio.Event()
    case = make_case(tmp_path, engine, warm_deadline_s=0.05)
    case.publish("summarize", 1, promote=False)
    async with case.client() as client:
        answer = await promote(client, 1)
    assert (answer.status_code, error_body(answer)["code"]) == (503, "warm_failed")
    assert "within 0.05 s" in error_body(answer)["message"]
    assert case.registry.history("summarize") == []


async def test_a_version_that_the_engine_has_set_aside_is_not_promoted(client: httpx.AsyncClient, case: Case) -> None:
    case.engine.aside = {digest_of(case, 2)}
    answer = await promote(client, 2)
    assert (answer.status_code, error_body(answer)["code"]) == (503, "warm_failed")
    assert "set aside" in error_body(answer)["message"]
    assert (await ask(client)).json()["adapter_version"] == 1


async def test_what_the_gate_refuses_is_not_loaded(client: httpx.AsyncClient, case: Case) -> None:
    case.registry.set_policy("summarize", policy(), "t")
    answer = await client.post("/v1/adapters/summarize/promote", json={"version": 2})
    assert (answer.status_code, error_body(answer)["code"]) == (409, "gate_refused")
    unreasoned = await client.post("/v1/adapters/summarize/promote", json={"version": 2, "force": True})
    assert (unreasoned.status_code, error_body(unreasoned)["param"]) == (400, "reason")
    assert case.engine.warmed == {}


async def test_a_flip_that_came_while_another_was_loading_is_not_overwritten(tmp_path: Path) -> None:
    engine = SlowToWarm()
    engine.loaded = asyncio.Event()
    case = make_case(tmp_path, engine)
    for seed in (1, 2, 3):
        case.publish("summarize", seed, promote=seed == 1)
    async with case.client() as client:
        late = asyncio.create_task(promote(client, 2))
        await asyncio.to_thread(wait_until, lambda: not late.done())
        assert (await promote(client, 3, warm=False)).status_code == 200
        engine.loaded.set()
        answer = await late
    assert (answer.status_code, error_body(answer)["code"]) == (409, "generation_mismatch")
    assert case.registry.resolve("summarize").number == 3


async def test_a_rollback_waits_for_no_load(client: httpx.AsyncClient, case: Case) -> None:
    await promote(client, 2)
    await until(lambda: len(case.engine.warmed) == 2)
    case.engine.refusals[digest_of(case, 1)] = Failed(0, "adapter_load_failed", "gone")
    back = await client.post("/v1/adapters/summarize/rollback", json={"reason": "worse"})
    assert (back.status_code, back.json()["to_number"]) == (200, 1)
    assert (await ask(client)).json()["adapter_version"] == 1


async def test_both_versions_of_a_rollback_stay_warm(client: httpx.AsyncClient, case: Case) -> None:
    await promote(client, 2)
    await until(lambda: len(case.engine.warmed) == 2)
    case.engine.warmed.clear()
    await client.post("/v1/adapters/summarize/rollback", json={"reason": "worse"})
    await until(lambda: case.engine.warmed == dict.fromkeys((digest_of(case, 1), digest_of(case, 2)), 600.0))


async def test_flips_hold_no_more_than_their_share_of_the_host(client: httpx.AsyncClient, case: Case) -> None:
    """Else a flip every two seconds would fill the host with old champions, and the next one could not be loaded."""
    size = case.registry.version("summarize", 1).size_bytes
    case.engine.host_bytes_limit = 4 * 2 * size + 4  # a quarter of it holds two
    for seed in range(3, 9):
        assert (await promote(client, case.publish("summarize", seed, promote=False).number)).status_code == 200
    await until(lambda: len(case.engine.warmed) == 7)  # the first champion, and each that followed
    held = [digest for digest, ttl_s in case.engine.warmed.items() if ttl_s == 600.0]
    assert len(held) == 2
    assert set(case.engine.warmed.values()) == {600.0, 1.0}  # the others were loaded all the same


async def test_a_version_of_another_base_is_promoted_without_this_engine(client: httpx.AsyncClient, case: Case) -> None:
    case.registry.add_base(base_record("alien"))
    files: Any = adapter_files(9, base_model_name_or_path="alien")
    version = case.registry.publish("summarize", files, base="alien", who="t")
    assert (await promote(client, version.number)).status_code == 200
    assert version.digest not in case.engine.warmed


async def test_a_stream_finishes_on_what_it_began_with(client: httpx.AsyncClient, case: Case) -> None:
    case.engine.gate.clear()
    running = asyncio.create_task(ask(client, tokens=64, stream=True))
    await until(lambda: case.engine.running)
    await promote(client, 2)
    case.engine.gate.set()
    told = events((await running).text)
    assert {e["adapter_digest"] for e in told} == {digest_of(case, 1)}
    assert "".join(c["text"] for e in told for c in e["choices"]) == digest_of(case, 1)


# -- retire and revoke -----------------------------------------------------------------------------------------


async def test_a_retired_version_is_refused_by_name_and_its_bytes_go(client: httpx.AsyncClient, case: Case) -> None:
    await promote(client, 2)
    await until(lambda: len(case.engine.warmed) == 2)
    answer = (await on(client, 1, "retire", reason="old", deadline_s=5)).json()
    assert (answer["standing"]["state"], answer["standing"]["why"]) == ("retired", "old")
    assert (answer["residency"]["tier"], answer["residency"]["size_bytes"]) == ("gone", 100)
    assert case.engine.dropped == [(digest_of(case, 1), 5.0)]
    beat = case.engine.heartbeat
    assert beat is not None
    assert digest_of(case, 1) not in beat.host_digests
    refused = await ask(client, "summarize@1")
    assert (refused.status_code, error_body(refused)["code"]) == (404, "version_retired")
    assert "retired by local: old" in error_body(refused)["message"]
    assert (await ask(client)).json()["adapter_version"] == 2
    assert "summarize@1" not in {m["id"] for m in (await client.get("/v1/models")).json()["data"]}


async def test_what_an_alias_points_at_is_not_retired(client: httpx.AsyncClient, case: Case) -> None:
    answer = await on(client, 1, "retire")
    assert (answer.status_code, error_body(answer)["code"]) == (409, "conflict")
    assert case.engine.dropped == []
    assert (await ask(client)).status_code == 200


async def test_bytes_that_another_name_is_served_with_stay(client: httpx.AsyncClient, case: Case) -> None:
    case.publish("twin", 2)
    answer = (await on(client, 2, "retire")).json()
    assert (answer["standing"]["state"], answer["residency"]) == ("retired", None)
    assert case.engine.dropped == []
    assert (await ask(client, "twin")).json()["adapter_digest"] == digest_of(case, 2)


async def test_a_version_is_retired_also_where_no_engine_answers(client: httpx.AsyncClient, case: Case) -> None:
    case.engine.connected = False
    assert (await on(client, 2, "retire")).json()["residency"] is None
    case.engine.connected = True
    await case.engine.warm(digest_of(case, 2), 60)  # as if it had lain there before
    case.warden._quiet_until.clear()
    await case.warden.follow()
    await until(lambda: case.engine.dropped)
    assert case.engine.dropped == [(digest_of(case, 2), 30.0)]


@pytest.mark.parametrize("stream", [True, False])
async def test_revoke_ends_what_runs_when_it_is_told_to(client: httpx.AsyncClient, case: Case, stream: bool) -> None:
    case.engine.pause_s = 0.01
    running = asyncio.create_task(ask(client, tokens=5000, stream=stream))
    await until(lambda: case.engine.submissions and case.engine.submissions[0].sent > 2)
    answer = (await on(client, 1, "revoke", reason="leaked data", in_flight="end")).json()
    assert (answer["standing"]["state"], answer["residency"]["tier"]) == ("revoked", "gone")
    ended = await running
    error = events(ended.text)[-1]["error"] if stream else error_body(ended)
    assert (error["code"], ended.status_code) == ("version_revoked", 200 if stream else 404)
    assert "leaked data" in error["message"]
    await until(lambda: case.engine.running == 0)
    assert case.gateway.admission.inflight == 0


async def test_revoke_lets_what_runs_finish_by_default(client: httpx.AsyncClient, case: Case) -> None:
    case.engine.gate.clear()
    running = asyncio.create_task(ask(client, tokens=64, stream=True))
    await until(lambda: case.engine.running)
    answer = (await on(client, 1, "revoke", reason="leaked data")).json()
    assert answer["residency"] is None
    refused = await ask(client)
    assert (refused.status_code, error_body(refused)["code"]) == (404, "version_revoked")
    await case.warden.follow()
    case.engine.gate.set()
    told = events((await running).text)
    assert "".join(c["text"] for e in told for c in e["choices"]) == digest_of(case, 1)
    await until(lambda: case.engine.dropped)
    assert case.engine.dropped == [(digest_of(case, 1), 600.0)]


async def test_a_revoked_version_is_not_promoted_and_a_restored_one_is(client: httpx.AsyncClient, case: Case) -> None:
    await on(client, 2, "revoke", reason="leaked data")
    refused = await promote(client, 2)
    assert (refused.status_code, error_body(refused)["code"]) == (404, "version_revoked")
    assert digest_of(case, 2) not in case.engine.warmed
    assert (await on(client, 2, "restore", reason="it was not")).json()["state"] == "live"
    assert (await promote(client, 2)).status_code == 200
    history = (await client.get("/v1/adapters/summarize/history")).json()["data"]
    assert [row["action"] for row in history] == ["forced", "restore", "revoke", "forced"]
    text = (await client.get("/metrics")).text
    assert 'adapter_moves_total{action="revoke"} 1.0' in text


async def test_a_request_whose_version_left_before_its_first_token_is_resolved_anew(
    client: httpx.AsyncClient, case: Case
) -> None:
    """It was resolved before the flip, and came to the engine after the old version had been dropped."""
    left = digest_of(case, 1)

    def script(submission: Submission) -> Sequence[int | Failed]:
        if submission.adapter == left:
            case.registry.promote("summarize", 2, who="t", force=True, reason="meanwhile")
            return [Failed(0, "adapter_unloaded", "going", retry_after_s=2.0)]
        return say_digest(submission)

    case.engine.script = script
    answer = await ask(client)
    assert (answer.status_code, answer.json()["adapter_version"]) == (200, 2)
    pinned = await ask(client, "summarize@1")
    assert (pinned.status_code, error_body(pinned)["code"]) == (503, "adapter_unloaded")
    assert case.gateway.admission.inflight == 0


# -- warm and pin ----------------------------------------------------------------------------------------------


async def test_a_version_is_warmed_and_pinned_by_name(client: httpx.AsyncClient, case: Case) -> None:
    warm = (await on(client, 2, "warm", ttl_s=90)).json()
    assert (warm["object"], warm["id"], warm["tier"]) == ("adapter.residency", "summarize@2", "device")
    assert case.engine.warmed == {digest_of(case, 2): 90.0}
    path = "/v1/adapters/summarize/versions/2/pin"
    assert (await client.put(path)).status_code == 200
    assert case.engine.pinned == {digest_of(case, 2)}
    assert (await client.delete(path)).status_code == 200
    assert case.engine.pinned == set()
    assert [m.action.value for m in case.registry.history("summarize")][:2] == ["unpin", "pin"]


async def test_a_pin_that_no_slot_is_left_for_is_refused_and_not_remembered(
    client: httpx.AsyncClient, case: Case
) -> None:
    case.engine.refusals[digest_of(case, 2)] = Failed(0, "adapter_capacity", "full", retry_after_s=1.0)
    answer = await client.put("/v1/adapters/summarize/versions/2/pin")
    assert (answer.status_code, error_body(answer)["code"]) == (429, "adapter_capacity")
    assert case.registry.standings.decrees() == Decrees()


async def test_an_engine_that_restarted_gets_its_pins_back(client: httpx.AsyncClient, case: Case) -> None:
    await client.put("/v1/adapters/summarize/versions/2/pin")
    case.engine.pinned.clear()
    case.warden._quiet_until.clear()
    await case.warden.follow()
    await until(lambda: case.engine.pinned == {digest_of(case, 2)})
    case.registry.standings.pin("summarize", 2, False, who="another gateway")
    case.warden._quiet_until.clear()
    await case.warden.follow()
    await until(lambda: case.engine.pinned == set())


async def test_the_warden_outlives_a_registry_that_cannot_be_read(case: Case) -> None:
    read: list[str] = []

    def decrees() -> Decrees:
        read.append("x")
        if len(read) == 1:
            raise StoreFailed("busy")
        if len(read) == 2:
            raise RuntimeError("a fault of ours")
        return Decrees()

    case.warden._decrees, case.warden._every_s = decrees, 0.001
    task = asyncio.create_task(case.warden.run())
    await until(lambda: len(read) > 3)
    task.cancel()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "versions/1/warm", {"ttl_s": 0}, 400, "ttl_s"),
        ("POST", "versions/1/warm", {"ttl_s": 1e9}, 400, "ttl_s"),
        ("POST", "versions/1/warm", {"ttl": 5}, 400, "ttl"),
        ("POST", "versions/0/warm", {}, 400, "number"),
        ("POST", "versions/x/warm", {}, 400, "number"),
        ("POST", "versions/9/warm", {}, 404, "model"),
        ("PUT", "versions/9/pin", None, 404, "model"),
        ("POST", "versions/1/revoke", {}, 400, "reason"),
        ("POST", "versions/1/revoke", {"reason": " "}, 400, "reason"),
        ("POST", "versions/1/revoke", {"reason": "a\x00b"}, 400, "reason"),
        ("POST", "versions/1/revoke", {"reason": "r", "in_flight": "kill"}, 400, "in_flight"),
        ("POST", "versions/1/restore", {"reason": ""}, 400, "reason"),
        ("POST", "versions/2/retire", {"deadline_s": -1}, 400, "deadline_s"),
        ("POST", "versions/2/retire", {"deadline_s": 1e9}, 400, "deadline_s"),
        ("POST", "promote", {"version": 1, "warm": "yes"}, 400, "warm"),
        ("PUT", "aliases/champion/fallback", {"policy": "base"}, 400, "policy"),
        ("PUT", "aliases/nowhere/fallback", {"policy": "previous"}, 404, None),
        ("PUT", "aliases/NO!/fallback", {"policy": "previous"}, 400, "alias"),
    ],
)
async def test_rubbish_is_refused_by_its_field(
    client: httpx.AsyncClient, case: Case, method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = await client.request(method, f"/v1/adapters/summarize/{path}", json=body)
    assert (answer.status_code, error_body(answer)["param"]) == (status, param)
    assert len(case.registry.history("summarize")) == 1


# -- a version that is set aside -------------------------------------------------------------------------------


@pytest.fixture
def aside(case: Case) -> Case:
    """summarize@2 is champion, and the engine has set it aside."""
    case.registry.promote("summarize", 2, who="t", force=True, reason="t")
    sick = {digest_of(case, 2)}

    def script(submission: Submission) -> Sequence[int | Failed]:
        if submission.adapter in sick:
            return [Failed(0, "adapter_quarantined", "aside", retry_after_s=30.0)]
        return say_digest(submission)

    case.engine.script = script
    return case


async def fall_back(client: httpx.AsyncClient, wanted: str) -> httpx.Response:
    return await client.put("/v1/adapters/summarize/aliases/champion/fallback", json={"policy": wanted})


async def test_a_version_that_is_set_aside_is_a_503_by_default(aside: Case, client: httpx.AsyncClient) -> None:
    answer = await ask(client)
    assert (answer.status_code, error_body(answer)["code"]) == (503, "adapter_quarantined")
    assert answer.headers["retry-after"] == "30"


@pytest.mark.parametrize("stream", [True, False])
async def test_the_version_before_answers_by_policy_and_says_so(
    aside: Case, client: httpx.AsyncClient, stream: bool
) -> None:
    told = await fall_back(client, "previous")
    assert (told.json()["fallback"], told.json()["number"]) == ("previous", 2)
    answer = await ask(client, tokens=64, stream=stream)
    bodies = events(answer.text) if stream else [answer.json()]
    assert {(b["model"], b["adapter_version"], b["adapter_instead_of"]) for b in bodies} == {
        ("summarize@1", 1, "summarize@2")
    }
    assert answer.headers["x-adapter-instead-of"] == "summarize@2"
    assert answer.headers["x-adapter-version"] == "1"
    assert "".join(c["text"] for b in bodies for c in b["choices"]) == digest_of(aside, 1)
    assert aside.gateway.admission.inflight == 0
    assert (await fall_back(client, "503")).json()["fallback"] == "503"
    assert (await ask(client)).status_code == 503


async def test_who_names_a_version_that_is_set_aside_gets_no_other(aside: Case, client: httpx.AsyncClient) -> None:
    await fall_back(client, "previous")
    answer = await ask(client, "summarize@2")
    assert (answer.status_code, error_body(answer)["code"]) == (503, "adapter_quarantined")


async def test_a_fallback_that_is_set_aside_too_or_withdrawn_is_a_503(aside: Case, client: httpx.AsyncClient) -> None:
    await fall_back(client, "previous")
    await on(client, 1, "retire")
    assert (await ask(client)).status_code == 503
    await on(client, 1, "restore", reason="back")
    aside.engine.script = lambda submission: [Failed(0, "adapter_quarantined", "aside", retry_after_s=30.0)]
    assert (await ask(client)).status_code == 503
    assert aside.gateway.admission.inflight == 0


async def test_a_prompt_is_rendered_for_whoever_answers_it(aside: Case, client: httpx.AsyncClient) -> None:
    """The version before may have another prompt format."""
    await fall_back(client, "previous")
    body = {"model": "summarize", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert (await client.post("/v1/chat/completions", json=body)).json()["adapter_version"] == 1
    first, second = aside.engine.submissions
    assert (first.adapter, second.adapter) == (digest_of(aside, 2), digest_of(aside, 1))


def test_a_fallback_is_kept_by_the_registry(aside: Case) -> None:
    aside.registry.set_fallback("summarize", "champion", Fallback.PREVIOUS, who="t")
    aside.registry.promote("summarize", 1, who="t", force=True, reason="t")
    champion = next(a for a in aside.registry.adapter("summarize").aliases if a.alias == "champion")
    assert champion.fallback is Fallback.PREVIOUS


# -- A-01 and A-03 ---------------------------------------------------------------------------------------------


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
