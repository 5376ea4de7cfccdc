"""What the edge accepts, refuses by name, and survives."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import error_body, say
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("home"))


@pytest.fixture
def case(shared: Case) -> Case:
    shared.engine.submissions.clear()
    shared.engine.script = say("Hello, world")
    return shared


@pytest.fixture
async def client(case: Case) -> AsyncIterator[httpx.AsyncClient]:
    async with case.client() as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"n": 1},
        {"max_tokens": 1},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stop": None},
        {"stop": "x"},
        {"stop": ["a", "b", "c", "d"]},
        {"stop": []},
        {"seed": 2**63 - 1},
        {"n": 2.0, "max_tokens": 3.0, "stop_token_ids": [7.0]},
        {"seed": -(2**63)},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {"5": -100, "6": 100}},
        {"logprobs": True, "top_logprobs": 20},
        {"logprobs": True, "top_logprobs": 0},
        {"logprobs": False, "top_logprobs": 0},
        {"metadata": {"k" * 64: "v" * 512}},
        {"top_k": -1},
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True},
        {"stop_token_ids": [3], "include_stop_str_in_output": True, "skip_special_tokens": False},
        {"request_id": "abc"},
        {"tools": None},
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"chat_template_kwargs": {}},
        {"modalities": ["text"]},
        {"service_tier": "auto", "verbosity": "low", "reasoning_effort": "none", "prompt_cache_key": "k"},
        {"prediction": {"type": "content", "content": "x"}, "moderation": {}, "parallel_tool_calls": True},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": [{"role": "developer", "content": "d"}, {"role": "user", "content": "u", "name": "n"}]},
        {"stream": True, "stream_options": {}},
        {"add_generation_prompt": True, "continue_final_message": False},
    ],
    ids=json.dumps,
)
async def test_a_legal_request_is_answered(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await client.post(CHAT, json=chat(**fields))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"metadata": {str(at): "" for at in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x"}] * 257}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"request_id": "a b"}, "request_id"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
    ],
)
async def test_a_field_out_of_range_is_named(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    answer = await client.post(CHAT, json=chat(**fields))
    assert answer.status_code == 400, answer.text
    body = error_body(answer)
    assert body["type"] == "invalid_request_error"
    assert (body["param"] or "").startswith(param)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"structured_outputs": {"regex": "a"}},
        {"guided_regex": "a"},
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"x": 1}},
        {"truncate_prompt_tokens": 5},
        {"prompt_logprobs": 1},
        {"priority": 3},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"echo": True},
    ],
    ids=json.dumps,
)
async def test_what_is_not_supported_is_refused_by_name(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await client.post(CHAT, json=chat(**fields))
    assert answer.status_code == 400
    body = error_body(answer)
    assert body["code"] == "unsupported_parameter"
    assert body["param"].split(".")[0] in fields


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
async def test_images_and_sounds_are_refused(client: httpx.AsyncClient, kind: str) -> None:
    parts = [{"type": kind, kind: {"url": "http://x"}}]
    answer = await client.post(CHAT, json=chat(messages=[{"role": "user", "content": parts}]))
    assert answer.status_code == 400
    body = error_body(answer)
    assert body["param"] == "messages[0].content[0].type"
    assert "'text'" in body["message"]


@pytest.mark.parametrize("field", ["best_of", "suffix"])
async def test_completions_refuse_what_they_cannot_do(client: httpx.AsyncClient, field: str) -> None:
    value: Any = {"best_of": 2, "suffix": "x"}[field]
    answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": "x", field: value})
    assert (answer.status_code, error_body(answer)["code"]) == (400, "unsupported_parameter")
    inert: Any = {"best_of": 1, "echo": False, "suffix": ""}[field]
    answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": "x", field: inert})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], [-1], [999], [[1], [999]], [1.5], [True], [1, "a"], {"a": 1}, None, ["x"] * 129]
)
async def test_a_prompt_that_is_none_is_refused(client: httpx.AsyncClient, prompt: Any) -> None:
    answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": prompt})
    assert (answer.status_code, (error_body(answer)["param"] or "").split("[")[0]) == (400, "prompt")


async def test_an_unknown_field_is_named_with_the_nearest(client: httpx.AsyncClient) -> None:
    body = error_body(await client.post(CHAT, json=chat(temprature=1)))
    assert body["param"] == "temprature"
    assert "'temperature'" in body["message"]


async def test_a_missing_field_is_named(client: httpx.AsyncClient) -> None:
    body = error_body(await client.post(CHAT, json={"model": "base"}))
    assert (body["code"], body["param"]) == ("missing_required_parameter", "messages")


async def test_parts_of_a_message_are_joined_by_lines(client: httpx.AsyncClient, case: Case) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await client.post(CHAT, json=chat(messages=[{"role": "user", "content": parts}]))
    assert bytes(case.engine.submissions[0].prompt) == b"user: one\ntwo\nassistant: "


async def test_the_last_message_can_be_continued(client: httpx.AsyncClient, case: Case) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "be"}]
    answer = await client.post(CHAT, json=chat(messages=turns, continue_final_message=True))
    assert answer.status_code == 200
    assert bytes(case.engine.submissions[0].prompt) == b"user: a\nassistant: be\n"


async def test_a_prompt_beyond_the_context_is_told_with_figures(client: httpx.AsyncClient) -> None:
    answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": "x" * 300})
    body = error_body(answer)
    assert (answer.status_code, body["code"], body["param"]) == (400, "context_length_exceeded", "prompt")
    assert "300" in body["message"]
    assert "256" in body["message"]


BOMBS = {
    "not json": b"{",
    "empty": b"",
    "nan": b'{"model": "base", "prompt": "x", "temperature": NaN}',
    "infinity": b'{"model": "base", "prompt": "x", "temperature": 1e999}',
    "twice": b'{"model": "base", "model": "other", "prompt": "x"}',
    "twice deep": b'{"model": "base", "prompt": "x", "metadata": {"a": "1", "a": "2"}}',
    "deep": b'{"model": ' + b"[" * 100_000,
    "deep and closed": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "surrogate": b'{"model": "base", "prompt": "\\ud800"}',
    "not utf-8": b'{"model": "base", "prompt": "\xff"}',
    "million digits": b'{"model": "base", "prompt": "x", "seed": ' + b"9" * 1_000_000 + b"}",
    "utf-16": '{"model": "base", "prompt": "x"}'.encode("utf-16"),
    "an array": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
}


@pytest.mark.parametrize("name", BOMBS)
async def test_F17_a_hostile_body_is_a_400_at_once(client: httpx.AsyncClient, case: Case, name: str) -> None:
    answer = await client.post(COMPLETIONS, content=BOMBS[name], headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    body = error_body(answer)
    assert len(body["message"]) < 400
    assert case.engine.submissions == []


async def test_a_body_beyond_the_limit_is_a_413(tmp_path: Path) -> None:
    case = make_case(tmp_path, max_json_bytes=1024)
    async with case.client() as client:
        declared = await client.post(COMPLETIONS, json={"model": "base", "prompt": "x" * 2000})

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 100

        headers = {"content-type": "application/json"}
        streamed = await client.post(COMPLETIONS, content=endless(), headers=headers)
    assert [declared.status_code, streamed.status_code] == [413, 413]
    assert error_body(declared)["code"] == error_body(streamed)["code"] == "too_large"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "multipart/form-data; boundary=x"},
        {},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_only_plain_json_is_read(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    answer = await client.post(CHAT, content=json.dumps(chat()).encode(), headers=headers)
    assert (answer.status_code, error_body(answer)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/models/", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405)],
)
async def test_unknown_paths_and_methods_have_the_one_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert error_body(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("model", ["no/such", "UPPER", "a@b@c", "x" * 200, "sum:1"])
async def test_what_is_no_model_id_is_not_found(client: httpx.AsyncClient, model: str) -> None:
    answer = await client.post(CHAT, json=chat(model=model))
    assert (answer.status_code, error_body(answer)["code"]) == (404, "model_not_found")


async def test_an_adapter_without_a_champion_lists_its_versions(client: httpx.AsyncClient, case: Case) -> None:
    case.publish("fresh", promote=False)
    answer = await client.post(CHAT, json=chat(model="fresh"))
    assert (answer.status_code, error_body(answer)["code"]) == (404, "no_champion")
    assert "fresh@1" in error_body(answer)["message"]
    assert (await client.post(CHAT, json=chat(model="fresh@1"))).json()["model"] == "fresh@1"


async def test_an_id_with_a_quoted_at_sign_is_understood(client: httpx.AsyncClient, case: Case) -> None:
    case.publish("summarize")
    answer = await client.get("/v1/models/summarize%401")
    assert answer.json()["id"] == "summarize@1"


async def test_tokens_and_text_go_there_and_back(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "né", "return_token_strs": True})).json()
    assert (answer["count"], answer["tokens"]) == (3, list("né".encode()))
    back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "né"}
    assert (await client.post("/detokenize", json={"tokens": [999]})).status_code == 400


async def test_messages_are_tokenised_as_chat_renders_them(client: httpx.AsyncClient, case: Case) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = (await client.post("/tokenize", json={"model": "base", "messages": messages})).json()["tokens"]
    await client.post(CHAT, json=chat())
    assert tuple(tokens) == case.engine.submissions[0].prompt


async def test_the_tokenizer_tells_its_end_token(client: httpx.AsyncClient) -> None:
    assert (await client.get("/tokenizer_info")).json()["eos_token"] == "<|end|>"


async def test_a_crash_inside_tells_nothing_but_the_request_id(tmp_path: Path) -> None:
    case = make_case(tmp_path)

    def broken(*_: object) -> Any:
        raise RuntimeError("/root/secret/place.py line 7")

    case.engine.script = broken
    async with case.client() as client:
        first = await client.post(CHAT, json=chat())
        case.gateway.renderer.chat = broken  # type: ignore[method-assign]
        second = await client.post(CHAT, json=chat())
    for answer in (first, second):
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"].startswith("req_")
    assert case.gateway.admission.inflight == 0


async def test_many_headers_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.get("/version", headers={f"x-{at}": "1" for at in range(120)})
    assert (answer.status_code, error_body(answer)["code"]) == (431, "headers_too_large")


async def test_one_header_larger_than_the_limit_is_refused_however_it_arrives(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health", headers={"x-large": "a" * 20_000})
    assert (answer.status_code, error_body(answer)["code"]) == (431, "headers_too_large")


async def test_bytes_of_another_kind_are_told_which_kind_is_wanted(client: httpx.AsyncClient) -> None:
    answer = await client.put(f"/v1/blobs/sha256:{'0' * 64}", content=b"x", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert "application/octet-stream" in error_body(answer)["message"]


async def test_a_strange_request_id_is_replaced(client: httpx.AsyncClient) -> None:
    answer = await client.get("/version", headers={"x-request-id": "a b\tc"})
    assert answer.headers["x-request-id"].startswith("req_")


async def test_multiplex_headers_of_a_client_change_nothing(client: httpx.AsyncClient, case: Case) -> None:
    case.engine.script = say("ok")
    answer = await client.post(CHAT, json=chat(), headers={"serve_multiplexed_model_id": "other"})
    assert answer.json()["model"] == "base"
