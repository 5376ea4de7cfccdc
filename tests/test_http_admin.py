"""The registry over HTTP, with the real registry, and with the command line's own door on the other side."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from adapters.errors import GateRefused, GenerationMismatch, ModelNotFound, RecordNotFound
from adapters.http_door import HttpDoor
from adapters.reports import GatePolicy
from tests.adapter_factory import adapter_files, policy, report, write_adapter
from tests.fakes import error_body
from tests.http_case import Case, make_case, served, wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


@pytest.fixture
async def client(case: Case) -> AsyncIterator[httpx.AsyncClient]:
    async with case.client() as client:
        yield client


@pytest.fixture
def door(case: Case) -> Iterator[HttpDoor]:
    with served(case) as url:
        door = HttpDoor(url)
        yield door
        door.close()


async def send_files(client: httpx.AsyncClient, seed: int = 0, **config: Any) -> dict[str, str]:
    """Send an adapter's files as blobs; their digests by name."""
    digests = {}
    for name, data in adapter_files(seed, **config).items():
        digest = hashlib.sha256(data).hexdigest()
        answer = await put(client, digest, data)
        assert answer.status_code == 200, answer.text
        digests[name] = digest
    return digests


async def put(client: httpx.AsyncClient, digest: str, data: bytes) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"}
    return await client.put(f"/v1/blobs/sha256:{digest}", content=data, headers=headers)


async def publish(client: httpx.AsyncClient, name: str = "summarize", seed: int = 0) -> httpx.Response:
    return await client.post(f"/v1/adapters/{name}/versions", json={"files": await send_files(client, seed)})


async def test_publish_promote_serve_and_roll_back(client: httpx.AsyncClient, case: Case) -> None:
    first = (await publish(client, seed=1)).json()
    again = (await publish(client, seed=1)).json()
    second = (await publish(client, seed=2)).json()
    assert (first["id"], again["id"], second["id"]) == ("summarize@1", "summarize@1", "summarize@2")
    for number in (1, 2):
        move = await client.post(
            "/v1/adapters/summarize/promote", json={"version": number, "force": True, "reason": "test"}
        )
        assert (move.status_code, move.json()["action"]) == (200, "forced")
    asked = {"model": "summarize", "prompt": "x"}
    assert (await client.post("/v1/completions", json=asked)).json()["adapter_digest"] == second["digest"]
    back = (await client.post("/v1/adapters/summarize/rollback", json={"reason": "worse"})).json()
    assert (back["from_number"], back["to_number"], back["who"]) == (2, 1, "local")
    assert (await client.post("/v1/completions", json=asked)).json()["adapter_digest"] == first["digest"]
    history = (await client.get("/v1/adapters/summarize/history")).json()["data"]
    assert [row["action"] for row in history] == ["rollback", "forced", "forced"]


async def test_an_alias_moves_only_from_where_it_is_believed_to_be(client: httpx.AsyncClient) -> None:
    await publish(client)
    path = "/v1/adapters/summarize/aliases/canary"
    assert (await client.put(path, json={"version": 1, "expected_version": None})).status_code == 200
    late = await client.put(path, json={"version": 1, "expected_version": None})
    assert (late.status_code, error_body(late)["code"]) == (409, "generation_mismatch")
    assert late.headers["x-should-retry"] == "false"
    assert (await client.get("/v1/models/summarize@canary")).status_code == 200


async def test_the_gate_refuses_a_promotion_without_a_report(client: httpx.AsyncClient, case: Case) -> None:
    await publish(client)
    case.registry.set_policy("summarize", policy(), "test")
    answer = await client.post("/v1/adapters/summarize/promote", json={"version": 1})
    assert (answer.status_code, error_body(answer)["code"]) == (409, "gate_refused")


async def test_an_adapter_that_is_none_is_refused_with_its_reason(client: httpx.AsyncClient) -> None:
    for changes, code in [({"lora_bias": True}, "unsupported_feature"), ({"r": 999}, "rank")]:
        digests = await send_files(client, **changes)
        answer = await client.post("/v1/adapters/odd/versions", json={"files": digests})
        assert (answer.status_code, error_body(answer)["code"]) == (400, code)
    assert (await client.get("/v1/adapters/odd")).status_code == 404


async def test_bytes_that_are_not_what_was_declared_are_refused(client: httpx.AsyncClient) -> None:
    answer = await put(client, "0" * 64, b"other bytes")
    assert (answer.status_code, error_body(answer)["code"]) == (409, "digest_mismatch")
    assert (await client.get(f"/v1/blobs/sha256:{'0' * 64}")).status_code == 404


async def test_a_blob_comes_back_as_it_went(client: httpx.AsyncClient) -> None:
    data = bytes(range(256)) * 9000
    digest = hashlib.sha256(data).hexdigest()
    assert (await put(client, digest, data)).json()["id"] == f"sha256:{digest}"
    assert (await client.get(f"/v1/blobs/sha256:{digest}")).content == data


async def test_a_blob_beyond_the_limit_is_refused_and_not_kept(tmp_path: Path) -> None:
    case = make_case(tmp_path, max_blob_bytes=1024)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    digest = hashlib.sha256(b"x" * 10_000).hexdigest()
    async with case.client() as client:
        declared = await put(client, digest, b"x" * 10_000)
        headers = {"content-type": "application/octet-stream"}
        streamed = await client.put(f"/v1/blobs/sha256:{digest}", content=pieces(), headers=headers)
    assert [declared.status_code, streamed.status_code] == [413, 413]
    assert not case.registry.store.has(digest)


def test_slow_senders_are_bounded_and_do_not_hold_up_requests(tmp_path: Path) -> None:
    case = make_case(tmp_path, max_uploads=1)
    with served(case) as url:
        parts = urlsplit(url)
        path = f"/v1/blobs/sha256:{'0' * 64}"
        head = f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        with socket.create_connection((parts.hostname, parts.port)) as slow:
            slow.sendall(f"{head}Content-Length: 100\r\n\r\nx".encode())
            statuses: list[int] = []

            def refused() -> bool:
                headers = {"content-type": "application/octet-stream"}
                statuses.append(httpx.put(f"{url}{path}", content=b"", headers=headers).status_code)
                return statuses[-1] == 429

            wait_until(refused)
            assert httpx.get(f"{url}/v1/models/base").status_code == 200
        wait_until(lambda: not refused())
    assert statuses[-1] == 409  # the digest of nothing is another


@pytest.mark.parametrize("digest", ["0" * 63, "G" * 64, "..%2f..%2fetc%2fpasswd", "0" * 64 + "%0a"])
async def test_only_a_digest_names_a_blob(client: httpx.AsyncClient, digest: str) -> None:
    assert (await client.get(f"/v1/blobs/sha256:{digest}")).status_code in (400, 404)


async def test_a_version_of_blobs_that_are_not_there_is_refused(client: httpx.AsyncClient) -> None:
    files = {"adapter_config.json": "0" * 64, "adapter_model.safetensors": "0" * 64}
    answer = await client.post("/v1/adapters/x/versions", json={"files": files})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("promote", {}),
        ("promote", {"version": 0}),
        ("promote", {"version": "1"}),
        ("promote", {"version": 1, "reason": "a\x00b"}),
        ("rollback", {"to": 1}),
        ("versions", {"files": {}}),
        ("versions", {"files": {"adapter_config.json": "x", "adapter_model.safetensors": "y"}}),
        ("reports", {"adapter": "summarize"}),
        ("reports", {"systems": [{"role": "candidate", "scores": {"rouge1": 7.5}}]}),
    ],
)
async def test_a_wrong_order_is_a_400_with_its_field(client: httpx.AsyncClient, path: str, body: Any) -> None:
    answer = await client.post(f"/v1/adapters/summarize/{path}", json=body)
    assert answer.status_code == 400
    assert error_body(answer)["param"]


@pytest.mark.parametrize("name", ["UPPER", "base", "latest", "a@1", "x" * 64])
async def test_a_name_that_may_not_be_published_is_refused(client: httpx.AsyncClient, name: str) -> None:
    assert (await publish(client, name)).status_code == 400


async def test_moves_and_publications_are_counted(client: httpx.AsyncClient) -> None:
    await publish(client)
    await client.post("/v1/adapters/summarize/promote", json={"version": 1, "force": True, "reason": "t"})
    text = (await client.get("/metrics")).text
    assert "adapter_publishes_total 1.0" in text
    assert 'adapter_moves_total{action="forced"} 1.0' in text


def test_the_command_lines_door_does_all_of_it(case: Case, door: HttpDoor, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "peft", seed=3)
    version = door.publish("summarize", folder, facts={"run": "7"}, note="hello")
    assert (version.id, version.facts["run"], version.published_by) == ("summarize@1", "7", "local")
    assert door.set_policy("summarize", policy(min_n=10)) == policy(min_n=10)
    assert isinstance(door.policy("summarize"), GatePolicy)
    with pytest.raises(GateRefused):
        door.promote("summarize", 1)
    made = report(version, n=64)
    digest = door.add_report(made)
    assert door.report(digest) == made
    assert [r.n for r in door.reports("summarize", 1)] == [64]
    move = door.promote("summarize", 1, expected=None)
    assert (move.to_number, move.report) == (1, digest)
    with pytest.raises(GenerationMismatch):
        door.promote("summarize", 1, expected=None, force=True, reason="again")
    assert [b.name for b in door.bases()] == ["tiny"]
    assert [a.name for a in door.adapters()] == ["summarize"]
    original = door.pull("summarize", 1, tmp_path / "out", original=True)
    assert (original / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    assert door.history("summarize")[0].report == digest


def test_the_doors_errors_are_the_ones_that_were_raised(door: HttpDoor) -> None:
    with pytest.raises(ModelNotFound):
        door.adapter("nobody")
    with pytest.raises(RecordNotFound):
        door.report("0" * 64)
