"""Repeated prompts and their log-probabilities on POST /v1/completions, as OpenAI's clients and lm-eval read them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.records import GenerationDefaults, PromptFormat
from tests.fakes import EOS, FakeEngine, error_body, say
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio
COMPLETIONS = "/v1/completions"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path, FakeEngine(script=say(" there")))


@pytest.fixture
async def client(case: Case) -> AsyncIterator[httpx.AsyncClient]:
    async with case.client() as client:
        yield client


async def ask(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    answer = await client.post(COMPLETIONS, json={"model": "base", "echo": True, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


@pytest.mark.parametrize("prompt", ["Hi", list(b"Hi")])
async def test_the_prompt_comes_before_its_answer(client: httpx.AsyncClient, prompt: Any) -> None:
    (choice,) = await ask(client, prompt=prompt)
    assert choice["text"] == "Hi there"
    assert choice["logprobs"] is None


async def test_every_token_of_prompt_and_answer_has_its_place(client: httpx.AsyncClient, case: Case) -> None:
    (choice,) = await ask(client, prompt="Hé", logprobs=2, max_tokens=3)
    assert choice["text"] == "Hé th"
    told = choice["logprobs"]
    assert told["tokens"] == ["H", "\ufffd", "\ufffd", " ", "t", "h"]
    assert told["token_logprobs"] == [None] + [-0.5] * 5
    assert told["top_logprobs"][0] is None
    assert told["top_logprobs"][3] == {" ": -0.5, "!": -9999.0}
    assert told["text_offset"] == [0, 1, 1, 2, 3, 4]
    sent = case.engine.submissions[0].sampling
    assert (sent.prompt_logprobs, sent.logprobs) == (2, 2)


@pytest.mark.parametrize("prompt", ["Hi", list(b"Hi")])
async def test_a_prompt_can_be_scored_without_an_answer(client: httpx.AsyncClient, prompt: Any) -> None:
    (choice,) = await ask(client, prompt=prompt, logprobs=1, max_tokens=0)
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    (choice,) = await ask(client, prompt=prompt, max_tokens=0)
    assert (choice["text"], choice["logprobs"]) == ("Hi", None)


async def test_several_prompts_of_ids_are_scored_in_one_request(client: httpx.AsyncClient) -> None:
    """What lm-eval sends: entries for each prompt's tokens and one more, whatever that one is."""
    prompts = [list(b"a"), list(b"bcd"), list(b"ef")]
    choices = await ask(client, prompt=prompts, logprobs=1, max_tokens=1, seed=1234)
    assert [c["index"] for c in choices] == [0, 1, 2]
    for choice, prompt in zip(choices, prompts, strict=True):
        told = choice["logprobs"]
        assert {len(told[key]) for key in told} == {len(prompt) + 1}
        for logprob, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
            assert logprob == max(top.values())


@pytest.mark.parametrize("what", ["end of text", "stop of the version", "stop token"])
async def test_the_answers_one_token_is_told_of_though_it_ends_the_answer(
    client: httpx.AsyncClient, case: Case, what: str
) -> None:
    """lm-eval leaves out the last entry: were it not the answer's, a token of the prompt would go uncounted."""
    stops = PromptFormat("text", "", "", "", ("Z",), GenerationDefaults())
    case.publish("sum", fmt=stops)
    case.engine.script = lambda s: [EOS if what == "end of text" else ord("Z")]
    extra = {"stop_token_ids": [ord("Z")]} if what == "stop token" else {}
    model = "sum" if what == "stop of the version" else "base"
    (choice,) = await ask(client, model=model, prompt=list(b"abc"), logprobs=1, max_tokens=1, **extra)
    assert choice["text"] == "abc"
    assert len(choice["logprobs"]["tokens"]) == 4
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_a_stream_begins_with_the_prompt(client: httpx.AsyncClient, logprobs: int | None) -> None:
    body = {"model": "base", "prompt": "Hi", "echo": True, "stream": True, "logprobs": logprobs}
    answer = await client.post(COMPLETIONS, json=body)
    events = [json.loads(e.removeprefix("data: ")) for e in answer.text.split("\n\n")[:-2]]
    assert events[0]["choices"][0]["text"].startswith("Hi")
    assert "".join(e["choices"][0]["text"] for e in events) == "Hi there"
    if logprobs:
        offsets = [at for e in events for at in e["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == [*range(8), 8]  # the end of text last


async def test_a_stop_text_in_the_prompt_stops_nothing(client: httpx.AsyncClient) -> None:
    (choice,) = await ask(client, prompt="the there", stop=["there"])
    assert choice["text"] == "the there "


async def test_nothing_new_without_the_prompt_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": "x", "max_tokens": 0})
    error = error_body(answer)
    assert (answer.status_code, error["param"]) == (400, "max_tokens")
    assert "echo" in error["message"]


async def test_a_prompt_that_fills_the_context_can_be_scored(client: httpx.AsyncClient) -> None:
    for length, status in ((256, 200), (257, 400)):
        body = {"model": "base", "prompt": [97] * length, "echo": True, "logprobs": 0, "max_tokens": 0}
        answer = await client.post(COMPLETIONS, json=body)
        assert answer.status_code == status
    assert error_body(answer)["message"].endswith("the prompt has 257. Shorten the prompt.")


async def test_beams_are_refused_where_the_base_has_none(client: httpx.AsyncClient) -> None:
    answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": "x", "num_beams": 2})
    assert (answer.status_code, error_body(answer)["code"]) == (400, "unsupported_parameter")
    one = {"model": "base", "prompt": "x", "num_beams": 1, "length_penalty": 1, "early_stopping": False}
    assert (await client.post(COMPLETIONS, json=one)).status_code == 200
    for lone in ({"length_penalty": 2.0}, {"early_stopping": True}, {"num_beams": 1, "length_penalty": 0}):
        answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": "x", **lone})
        assert answer.status_code == 400, lone
        assert "num_beams" in error_body(answer)["message"]


async def test_runs_that_may_not_come_twice_reach_the_engine(client: httpx.AsyncClient, case: Case) -> None:
    for path, prompt in ((COMPLETIONS, {"prompt": "x"}), ("/v1/chat/completions", {"messages": [
        {"role": "user", "content": "x"}]})):  # fmt: skip
        answer = await client.post(path, json={"model": "base", "no_repeat_ngram_size": 3, **prompt})
        assert answer.status_code == 200
        assert case.engine.submissions[-1].sampling.no_repeat_ngram_size == 3
        for wrong in (-1, 101, 1.5, "3"):
            answer = await client.post(path, json={"model": "base", "no_repeat_ngram_size": wrong, **prompt})
            assert (answer.status_code, error_body(answer)["param"]) == (400, "no_repeat_ngram_size")
