"""Flips while requests run: warmed before they are seen, seen at once, and never felt by what runs already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import StoreFailed
from adapters.standings import Decrees
from serving.engine.request import Failed, Moved
from tests.adapter_factory import adapter_files, base_record, policy
from tests.fakes import FakeEngine, Submission, error_body
from tests.flips_case import ask, digest_of, events, flips_case, on, promote, until
from tests.gateway_child import say_digest
from tests.http_case import Case, make_case, wait_until

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
    """An engine whose loads take until `loaded` is set."""

    loaded: asyncio.Event

    async def warm(self, digest: str, ttl_s: float, *, prove: bool = False) -> Moved | Failed:
        await self.loaded.wait()
        return await super().warm(digest, ttl_s, prove=prove)


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
