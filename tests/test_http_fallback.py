"""A version that the engine has set aside: nobody answers for it, or the one before, by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest

from adapters.records import Fallback
from serving.engine.request import Failed
from tests.fakes import Submission, error_body
from tests.flips_case import ask, digest_of, events, flips_case, on
from tests.gateway_child import say_digest
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
