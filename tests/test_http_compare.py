"""POST /v1/compare and the routes of canaries and shadows, over HTTP, by the command line's door and as commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.canaries import Arm, CanaryLimits, Sticky
from adapters.cli import run
from adapters.errors import Conflict, InvalidRequest, RecordNotFound
from adapters.http_door import HttpDoor
from adapters.records import PromptFormat
from serving.api.compare import Comparison
from serving.engine.request import Failed
from tests.fakes import EOS, Submission, error_body
from tests.http_case import Case, make_case, served

pytestmark = pytest.mark.anyio
ASK = {"models": ["base", "sum@1", "sum@2"], "prompt": "hello", "max_tokens": 20, "temperature": 0}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """An edge whose engine tells each adapter apart: it answers with the beginning of the digest."""
    case = make_case(tmp_path)
    case.publish("sum", 1)
    case.publish("sum", 2, promote=False, fmt=PromptFormat(prefix="Sum: "))

    def script(submission: Submission) -> Sequence[int | Failed]:
        return [*(submission.adapter or "base")[:8].encode(), EOS]

    case.engine.script = script
    return case


@pytest.fixture
async def client(case: Case) -> AsyncIterator[httpx.AsyncClient]:
    async with case.client() as client:
        yield client


async def test_one_prompt_to_three_models_comes_back_side_by_side(case: Case, client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/compare", json=ASK)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    Comparison.model_validate(told)
    digests = [None, case.registry.resolve("sum@1").digest, case.registry.resolve("sum@2").digest]
    assert [side["model"] for side in told["data"]] == ASK["models"]
    assert [side["adapter_digest"] for side in told["data"]] == digests
    assert [side["text"] for side in told["data"]] == ["base", *(str(digest)[:8] for digest in digests[1:])]
    assert all(side["timing"]["total_ms"] >= side["timing"]["first_token_ms"] for side in told["data"])
    assert [side["cache"] for side in told["data"]] == [None, "disk", "disk"]
    assert all(side["usage"]["prompt_tokens"] == 5 and side["error"] is None for side in told["data"])
    assert case.gateway.admission.inflight == 0


async def test_all_are_submitted_before_the_first_token_with_one_seed(case: Case, client: httpx.AsyncClient) -> None:
    case.engine.gate.clear()
    seen: list[int] = []

    async def watch() -> None:

        async with asyncio.timeout(20):
            while case.engine.running < 3:
                await asyncio.sleep(0)
        seen.append(sum(s.sent for s in case.engine.submissions))
        case.engine.gate.set()

    answer, _ = await asyncio.gather(client.post("/v1/compare", json={**ASK, "temperature": 1}), watch())
    assert seen == [0]
    assert {s.sampling.seed for s in case.engine.submissions} == {answer.json()["seed"]}
    assert {s.prompt for s in case.engine.submissions} == {tuple(b"hello")}


async def test_messages_are_rendered_in_each_models_own_format(case: Case, client: httpx.AsyncClient) -> None:
    body = {"models": ["sum@1", "sum@2"], "messages": [{"role": "user", "content": "hi"}]}
    assert (await client.post("/v1/compare", json=body)).status_code == 200
    prompts = [bytes(s.prompt).decode() for s in case.engine.submissions]
    assert prompts == ["user: hi\nassistant: ", "user: Sum: hi\nassistant: "]


async def test_an_alias_is_its_own_version_whatever_canary_runs(case: Case, client: httpx.AsyncClient) -> None:
    case.registry.canaries.set_canary("sum", 2, 50, who="t")
    case.registry.canaries.set_shadow("sum", 2, 100, who="t")
    for _ in range(8):
        told = (await client.post("/v1/compare", json={**ASK, "models": ["sum", "sum@2"]})).json()
        assert [side["model"] for side in told["data"]] == ["sum@1", "sum@2"]
    assert not any(s.shadow for s in case.engine.submissions)


async def test_one_that_fails_fails_alone_and_all_that_fail_are_an_error(case: Case, client: httpx.AsyncClient) -> None:
    plain = case.engine.script
    bad = Failed(1, "adapter_numerics", "planted")
    case.engine.script = lambda s: [bad] if s.adapter else plain(s)
    told = (await client.post("/v1/compare", json=ASK)).json()
    assert [side["error"] and side["error"]["code"] for side in told["data"]] == [None] + ["adapter_numerics"] * 2
    assert (told["data"][0]["text"], told["data"][1]["text"]) == ("base", None)
    case.engine.script = lambda s: [bad]
    answer = await client.post("/v1/compare", json=ASK)
    assert (answer.status_code, error_body(answer)["code"]) == (503, "adapter_numerics")
    assert (case.engine.running, case.gateway.admission.inflight) == (0, 0)


async def test_a_revocation_ends_the_side_that_it_is_about(case: Case, client: httpx.AsyncClient) -> None:
    case.engine.script = lambda s: b"on and on " * 500
    case.engine.pause_s = 0.01
    asked = asyncio.create_task(client.post("/v1/compare", json={**ASK, "max_tokens": 100}))
    async with asyncio.timeout(20):
        while sum(s.sent > 2 for s in case.engine.submissions) < 3:
            await asyncio.sleep(0.01)
    body = {"reason": "leaked data", "in_flight": "end"}
    assert (await client.post("/v1/adapters/sum/versions/2/revoke", json=body)).status_code == 200
    told = (await asked).json()["data"]
    assert [side["error"] and side["error"]["code"] for side in told] == [None, None, "version_revoked"]
    assert "leaked data" in told[2]["error"]["message"]
    assert [side["usage"] and side["usage"]["completion_tokens"] for side in told] == [100, 100, None]
    assert (case.engine.running, case.gateway.admission.inflight) == (0, 0)
    assert case.gateway.end({case.registry.resolve("sum@1").digest or "": InvalidRequest("x")}) == 0


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"models": ["base"]}, 400, "models"),
        ({"models": ["base"] * 9}, 400, "models"),
        ({"models": "base"}, 400, "models"),
        ({"models": ["base", "nobody"]}, 404, "models[1]"),
        ({"models": ["Not a name", "base"]}, 404, "models[0]"),
        ({"models": ["base", ""]}, 400, "models[1]"),
        ({"prompt": None}, 400, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [999999]}, 400, "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "prompt"),
        ({"stream": True}, 400, "stream"),
        ({"temperature": "hot"}, 400, "temperature"),
    ],
)
async def test_what_cannot_be_compared_is_refused_by_name(
    case: Case, client: httpx.AsyncClient, change: dict[str, Any], status: int, param: str
) -> None:
    answer = await client.post("/v1/compare", json={**ASK, **change})
    assert (answer.status_code, error_body(answer)["param"]) == (status, param)
    assert (case.engine.submissions, case.gateway.admission.inflight) == ([], 0)


# -- canaries and shadows over HTTP ------------------------------------------------------------------------------


async def test_a_canary_is_begun_shown_and_stopped_over_http(client: httpx.AsyncClient) -> None:
    body = {"version": 2, "percent": 20, "sticky": "key", "limits": {"min_requests": 7}, "reason": "try"}
    begun = (await client.put("/v1/adapters/sum/canary", json=body)).json()
    assert (begun["object"], begun["id"], begun["canary"]["percent"]) == ("adapter.split", "sum@champion", 20)
    assert begun["canary"]["limits"]["min_requests"] == 7
    shadow = await client.put("/v1/adapters/sum/shadow", json={"version": 2, "percent": 5})
    assert shadow.json()["canary"] == begun["canary"]
    told = (await client.get("/v1/adapters/sum/canary")).json()
    assert (told["live"], told["fault"], told["champion"]["error_rate"], told["shadow"]["agreement"]) == (
        True,
        None,
        0,
        1,
    )
    for kind in ("canary", "shadow"):
        assert (await client.post(f"/v1/adapters/sum/{kind}/stop", json={"reason": "enough"})).status_code == 200
    told = (await client.get("/v1/adapters/sum/canary")).json()
    assert (told["live"], told["ended"]["action"]) == (False, "shadow_stop")
    text = (await client.get("/metrics")).text
    assert 'adapter_moves_total{action="canary_stop"} 1.0' in text


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("canary", {"version": 2, "percent": 51}, 400, "invalid_value"),
        ("canary", {"version": 2, "percent": 0}, 400, "invalid_value"),
        ("canary", {"version": 2}, 400, "missing_required_parameter"),
        ("canary", {"version": 1, "percent": 5}, 409, "conflict"),
        ("canary", {"version": 9, "percent": 5}, 404, "model_not_found"),
        ("canary", {"version": 2, "percent": 5, "expected_version": 2}, 409, "generation_mismatch"),
        ("canary", {"version": 2, "percent": 5, "sticky": "cookie"}, 400, "invalid_value"),
        ("canary", {"version": 2, "percent": 5, "alias": "prod"}, 404, "not_found"),
        ("canary", {"version": 2, "percent": 5, "alias": "../x"}, 400, "invalid_value"),
        ("canary", {"version": 2, "percent": 5, "limits": {"min_agreement": 2}}, 400, "invalid_value"),
        ("canary", {"version": 2, "percent": 5, "reason": "a\x00b"}, 400, "invalid_value"),
        ("shadow", {"version": 2, "percent": 101}, 400, "invalid_value"),
        ("shadow", {"version": 2, "percent": 5, "sticky": "user"}, 400, "invalid_value"),
    ],
)
async def test_a_wrong_trial_is_refused_with_its_code(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    answer = await client.put(f"/v1/adapters/sum/{path}", json=body)
    assert (answer.status_code, error_body(answer)["code"]) == (status, code)
    missing = await client.get("/v1/adapters/sum/canary")
    assert (missing.status_code, error_body(missing)["code"]) == (404, "not_found")


@pytest.fixture
def url(case: Case) -> Iterator[str]:
    with served(case) as url:
        yield url


def test_the_door_does_all_of_it_with_the_errors_that_were_raised(url: str) -> None:
    door = HttpDoor(url)
    split = door.set_canary("sum", 2, 10, alias="champion", sticky=Sticky.USER, limits=CanaryLimits(), reason="try")
    assert (split.canary and split.canary.number, split.number) == (2, 1)
    assert door.set_shadow("sum", 2, 5, alias="champion").canary == split.canary
    report = door.trials("sum", "champion")
    assert (report.split.shadow and report.split.shadow.percent, report.ended) == (5, None)
    assert door.stop_trial("sum", Arm.CANARY, alias="champion").action == "canary_stop"
    with pytest.raises(RecordNotFound):
        door.stop_trial("sum", Arm.CANARY, alias="champion")
    with pytest.raises(Conflict):
        door.set_shadow("sum", 1, 5, alias="champion")
    door.close()


def document(printed: str) -> dict[str, Any]:
    """The one document on stdout, where the server of this very process logs too."""
    found: dict[str, Any] = json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])[0]
    return found


def test_the_commands_begin_show_stop_and_compare(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str, code: int = 0) -> str:
        assert run([*words, "--url", url]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    assert "canary sum@2 answers 10 %, sticky by user" in told("canary", "sum", "--to", "2", "--percent", "10")
    assert "shadow sum@2 computes 5 % beside" in told("shadow", "sum@champion", "--to", "2", "--percent", "5")
    shown = told("canary", "show", "sum")
    assert "ERROR RATE" in shown
    assert "0 compared, 0 dropped" in shown
    assert document(told("canary", "show", "sum", "--json"))["split"]["canary"]["number"] == 2
    assert "sum@champion has no canary any more; sum@1 answers" in told("canary", "stop", "sum", "--reason", "enough")
    assert "error[not_found]" in told("canary", "stop", "sum", code=4)
    assert "error[invalid_value]" in told("canary", "sum@1", "--to", "2", code=2)
    assert "error[invalid_value]" in told("canary", "sum", "--to", "2", "--percent", "80", code=2)
    sides = told("compare", "base", "sum@2", "--prompt", "hello")
    assert "== base (" in sides
    assert "== sum@2 (" in sides
    assert len(document(told("compare", "base", "sum", "--message", "x", "--json"))["data"]) == 2
    assert "error[invalid_value]" in told("compare", "base", "sum", code=2)


def test_a_canary_can_be_begun_without_a_server_and_a_comparison_not(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["canary", "sum", "--to", "2", "--home", str(tmp_path)]) == 0
    assert case.registry.route("sum").canary is not None
    assert run(["compare", "base", "sum", "--prompt", "x", "--home", str(tmp_path)]) == 8
    assert "loraplane serve" in capsys.readouterr().err
