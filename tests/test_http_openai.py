"""The OpenAI SDK, as strict as it can be made, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serving.engine.request import Failed
from tests.fakes import FakeEngine, repeat_forever, say
from tests.http_case import Case, make_case, served, wait_until


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = make_case(tmp_path_factory.mktemp("home"))
    case.publish("summarize")
    return case


@pytest.fixture(scope="module")
def url(case: Case) -> Iterator[str]:
    with served(case) as url:
        yield url


@pytest.fixture
def sdk(url: str, case: Case) -> Iterator[openai.OpenAI]:
    case.engine.script = say("Hello, world")
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True, timeout=10
    ) as client:
        yield client


HI: list[Any] = [{"role": "user", "content": "hi"}]


def test_a_whole_chat_completion_passes_strict_validation(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="summarize", messages=HI, n=3, metadata={"run": "7"})
    assert [c.message.content for c in answer.choices] == ["Hello, world"] * 3
    assert [c.finish_reason for c in answer.choices] == ["stop"] * 3
    assert answer.model == "summarize@1"
    assert answer.metadata == {"run": "7"}
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_every_streamed_chunk_passes_strict_validation(sdk: openai.OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="summarize", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {(c.id, c.created, c.model) for c in chunks} == {(chunks[0].id, chunks[0].created, "summarize@1")}
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", "assistant"]
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        assert chunk.usage is None
    assert texts == {0: "Hello, world", 1: "Hello, world"}
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop", "stop"]
    assert (chunks[-1].choices, chunks[-1].usage is None) == ([], False)


def test_every_chunk_names_the_weights(sdk: openai.OpenAI, case: Case) -> None:
    digest = case.registry.resolve("summarize").digest
    for chunk in sdk.chat.completions.create(model="summarize@champion", messages=HI, stream=True):
        extra = chunk.model_extra or {}
        assert (extra["adapter"], extra["adapter_version"], extra["adapter_digest"]) == ("summarize", 1, digest)
        assert extra["base_digest"] == case.gateway.resolver.base.digest


def test_usage_comes_with_every_chunk_when_asked_for(sdk: openai.OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="base", messages=HI, stream=True, extra_body={"stream_options": {"continuous_usage_stats": True}}
    )
    counts = [c.usage.completion_tokens for c in stream if c.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == len("Hello, world") + 1


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_pass_strict_validation(sdk: openai.OpenAI, stream: bool) -> None:
    options: Any = {"model": "base", "messages": HI, "logprobs": True, "top_logprobs": 3, "max_tokens": 4}
    if stream:
        chunks = list(sdk.chat.completions.create(stream=True, **options))
        told = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        tokens = [token for part in told for token in part.content or []]
    else:
        (choice,) = sdk.chat.completions.create(**options).choices
        assert choice.logprobs is not None
        tokens = list(choice.logprobs.content or [])
    assert "".join(t.token for t in tokens) == "Hell"
    assert [len(t.top_logprobs) for t in tokens] == [3] * 4
    assert tokens[0].bytes == [ord("H")]
    assert tokens[0].top_logprobs[-1].logprob == -9999.0


def test_whole_completions_pass_strict_validation(sdk: openai.OpenAI) -> None:
    for prompt, count in [("one", 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]:
        answer = sdk.completions.create(model="summarize", prompt=prompt, n=2, logprobs=2)
        assert [c.index for c in answer.choices] == list(range(2 * count))
        assert {c.text for c in answer.choices} == {"Hello, world"}
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.text_offset == list(range(len("Hello, world")))


def test_streamed_completions_end_with_a_finish_reason(url: str, case: Case) -> None:
    """Not strict: the SDK's type has no null finish_reason, which OpenAI's own chunks carry until the last."""
    case.engine.script = say("Hello, world")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
        chunks = list(sdk.completions.create(model="summarize", prompt="x", stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "Hello, world"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_models_list_the_base_first(sdk: openai.OpenAI) -> None:
    models = list(sdk.models.list())
    assert [m.id for m in models] == ["base", "tiny", "summarize", "summarize@champion", "summarize@1"]
    assert sdk.models.retrieve("summarize@champion").id == "summarize@champion"
    assert sdk.models.retrieve("Tests/tiny-Instruct").id == "Tests/tiny-Instruct"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("nobody")


def test_errors_are_the_sdks_own_classes(sdk: openai.OpenAI, case: Case) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="summarise", messages=HI)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert "summarize" in missing.value.message
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.chat.completions.create(model="base", messages=HI, temperature=2.1)
    assert wrong.value.param == "temperature"
    case.engine.script = lambda s: [Failed(1, "queue_full", "", 3.0)]
    with pytest.raises(openai.RateLimitError) as full:
        sdk.chat.completions.create(model="base", messages=HI)
    assert full.value.response.headers["retry-after"] == "3"


def test_an_error_before_the_first_token_is_a_status_even_for_a_stream(sdk: openai.OpenAI, case: Case) -> None:
    case.engine.script = lambda s: [Failed(1, "not_ready", "", 2.0)]
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(model="base", messages=HI, stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")


def test_an_error_after_the_first_token_travels_in_the_stream(sdk: openai.OpenAI, case: Case) -> None:
    case.engine.script = lambda s: [*b"ab", Failed(1, "engine_lost", "boom")]
    text = ""
    error: openai.APIError | None = None
    try:
        for chunk in sdk.chat.completions.create(model="base", messages=HI, stream=True):
            text += chunk.choices[0].delta.content or ""
    except openai.APIError as caught:
        error = caught
    assert text == "ab"
    assert error is not None
    assert error.code == "engine_lost"


def test_a_stream_is_lines_of_data_and_ends_with_done(url: str, case: Case) -> None:
    for script in (say("ok"), lambda s: [*b"ok", Failed(1, "engine_lost", "boom")]):
        case.engine.script = script
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "base", "messages": HI, "stream": True})
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(e.startswith("data: ") for e in events[:-1])
        assert all(json.loads(e.removeprefix("data: ")) for e in events[:-2])


def test_headers_name_the_weights_and_the_request(url: str, case: Case) -> None:
    case.engine.script = say("ok")
    version = case.registry.resolve("summarize")
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={"model": "summarize", "messages": HI, "store": True, "user": "u"},
        headers={"x-request-id": "abc-1"},
    )
    headers = answer.headers
    assert (headers["x-adapter"], headers["x-adapter-version"]) == ("summarize", "1")
    assert (headers["x-adapter-digest"], headers["x-base-digest"]) == (version.digest, version.base_digest)
    assert (headers["x-request-id"], headers["x-adapter-cache"]) == ("abc-1", "disk")
    assert headers["x-ignored-fields"] == "store"
    assert "prefill;dur=" in headers["server-timing"]
    assert int(headers["openai-processing-ms"]) >= 0
    assert answer.json()["id"] == "chatcmpl-abc-1"


def test_the_sdks_read_timeout_becomes_the_deadline_of_a_whole_answer_and_of_no_stream(url: str, case: Case) -> None:
    case.engine.script = say("ok")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3.5) as sdk:
        sdk.chat.completions.create(model="base", messages=HI)
        assert case.engine.submissions[-1].deadline_s == 3.5
        list(sdk.chat.completions.create(model="base", messages=HI, stream=True))
    assert case.engine.submissions[-1].deadline_s == case.gateway.limits.request_deadline_s


@pytest.mark.parametrize("stream", [False, True])
def test_F11_a_client_that_hangs_up_frees_its_rows(tmp_path: Path, stream: bool) -> None:
    """Scale: 20 hang-ups at random points, one after the other; the issue names 1,000."""
    case = make_case(tmp_path, FakeEngine(script=repeat_forever, pause_s=0.002))
    with served(case) as url:
        for at in range(20):
            body = {"model": "base", "messages": HI, "stream": stream, "max_tokens": 230, "n": 2}
            seen = len(case.engine.submissions)
            with httpx.Client() as client:
                request = client.build_request("POST", f"{url}/v1/chat/completions", json=body)
                try:
                    answer = client.send(request, stream=True) if stream else _hang_up_early(client, request)
                    for _, _chunk in zip(range(at % 5), answer.iter_raw(), strict=False):
                        pass
                    answer.close()
                except httpx.ReadTimeout:
                    pass
            wait_until(lambda seen=seen: len(case.engine.submissions) == seen + 2)  # type: ignore[misc]
            wait_until(lambda: case.engine.running == 0 and case.gateway.admission.inflight == 0)
        assert {s.ended for s in case.engine.submissions} == {"closed"}
        assert max(s.sent for s in case.engine.submissions) < 230


def _hang_up_early(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    request.extensions["timeout"] = {"connect": 1, "write": 1, "pool": 1, "read": 0.03}
    return client.send(request, stream=True)
