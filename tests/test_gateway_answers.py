"""The gateway's use cases without HTTP: sequences, endings, limits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.canaries import Route
from adapters.errors import (
    AdapterCapacity,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFault,
    EngineLost,
    InvalidRequest,
    LoraplaneError,
    ModelNotFound,
    NotReady,
    QueueFull,
)
from adapters.prompts import Message
from adapters.records import AdapterVersion, GenerationDefaults, PromptFormat, parse_model_id
from serving.commands import ChatCommand, CompletionCommand, Wishes
from serving.engine.admission import ALL_PINNED
from serving.engine.request import Failed, FinishReason
from serving.failures import engine_error
from serving.resolver import Resolver
from tests.fakes import EOS, ByteTokenizer, FakeEngine, repeat_forever, say
from tests.http_case import Case, make_case

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


def ask(model: str = "base", **wishes: Any) -> ChatCommand:
    return ChatCommand(Wishes(model, **wishes), (Message("user", "hi"),))


async def baseline(case: Case) -> None:
    """Wait until the engine holds no row and the gateway no request (contract C8)."""
    async with asyncio.timeout(2):
        while case.engine.running or case.gateway.admission.inflight:
            await asyncio.sleep(0.001)


async def test_three_choices_share_a_seed_and_differ_in_number(case: Case) -> None:
    answer = await case.gateway.chat(ask(n=3, seed=11))
    choices = await answer.collect()
    assert [c.index for c in choices] == [0, 1, 2]
    assert [(s.sampling.seed, s.choice) for s in case.engine.submissions] == [(11, 0), (11, 1), (11, 2)]
    assert answer.usage.completion_tokens == 3 * len("Hello, world") + 3
    await baseline(case)


async def test_prompts_times_n_are_indexed_prompt_by_prompt(case: Case) -> None:
    command = CompletionCommand(Wishes("base", n=2), ("one", (1, 2)))
    choices = await (await case.gateway.completion(command)).collect()
    assert [c.index for c in choices] == [0, 1, 2, 3]
    assert [(s.prompt, s.choice) for s in case.engine.submissions] == [
        (tuple(b"one"), 0),
        (tuple(b"one"), 1),
        ((1, 2), 0),
        ((1, 2), 1),
    ]


async def test_a_stop_string_ends_the_choice_and_frees_its_row(case: Case) -> None:
    case.engine.script = repeat_forever
    answer = await case.gateway.chat(ask(stops=("de",), max_tokens=200))
    (choice,) = await answer.collect()
    assert (choice.text, choice.finish) == ("abc", FinishReason.STOP)
    await baseline(case)
    assert case.engine.submissions[0].ended == "closed"
    assert case.engine.submissions[0].sent < 10


async def test_one_choice_that_stops_leaves_its_neighbour_running(case: Case) -> None:
    case.engine.script = lambda s: b"xx!yy" if s.choice == 0 else b"long answer"
    answer = await case.gateway.chat(ask(n=2, stops=("!",)))
    assert [c.text for c in await answer.collect()] == ["xx", "long answer"]


async def test_length_is_told_when_tokens_run_out(case: Case) -> None:
    (choice,) = await (await case.gateway.chat(ask(max_tokens=3))).collect()
    assert (choice.text, choice.finish) == ("Hel", FinishReason.LENGTH)


async def test_an_early_close_frees_every_row(case: Case) -> None:
    case.engine.script, case.engine.pause_s = repeat_forever, 0.001
    answer = await case.gateway.chat(ask(n=3, max_tokens=200))
    pieces = answer.pieces()
    await anext(pieces)
    answer.close()
    await baseline(case)
    assert [s.ended for s in case.engine.submissions] == ["closed"] * 3


async def test_a_caller_who_leaves_before_the_first_token_frees_the_row(case: Case) -> None:
    case.engine.gate.clear()
    task = asyncio.create_task(case.gateway.chat(ask()))
    while not case.engine.submissions:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await baseline(case)
    assert case.engine.submissions[0].ended == "closed"


async def test_the_deadline_ends_a_request_that_hangs(case: Case) -> None:
    case.engine.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await case.gateway.chat(ask(deadline_s=0.05))
    await baseline(case)


async def test_the_callers_deadline_cannot_exceed_the_servers(case: Case) -> None:
    await (await case.gateway.chat(ask(deadline_s=10_000.0))).collect()
    assert case.engine.submissions[0].deadline_s == case.gateway.limits.request_deadline_s


async def test_a_failure_before_the_first_token_is_raised_at_once(case: Case) -> None:
    case.engine.script = lambda s: [Failed(1, "adapter_capacity", "/secret/path", 3.0)]
    with pytest.raises(AdapterCapacity) as caught:
        await case.gateway.chat(ask())
    assert caught.value.retry_after_s == 3.0
    assert "secret" not in str(caught.value)
    await baseline(case)


async def test_who_finds_every_slot_pinned_is_told_so_and_what_helps(case: Case) -> None:
    """Trying again in a moment, as for slots that are in use, would never have helped."""
    case.engine.script = lambda s: [Failed(1, "adapter_capacity", ALL_PINNED, 3.0)]
    with pytest.raises(AdapterCapacity, match=r"pinned.*loraplane unpin") as caught:
        await case.gateway.chat(ask())
    assert caught.value.retry_after_s == 3.0
    await baseline(case)


async def test_a_failure_after_the_first_token_comes_after_its_text(case: Case) -> None:
    case.engine.script = lambda s: [*b"ab", Failed(1, "engine_lost", "gone")]
    answer = await case.gateway.chat(ask())
    shown = ""
    error: LoraplaneError | None = None
    try:
        async for piece in answer.pieces():
            shown += piece.text
    except LoraplaneError as caught:
        error = caught
    assert isinstance(error, EngineLost)
    assert shown == "ab"
    await baseline(case)


async def test_an_engine_that_just_stops_talking_is_an_error_not_an_answer(case: Case) -> None:
    async def silent(*_: object) -> Any:
        for event in ():
            yield event

    case.gateway.door.submit = silent  # type: ignore[method-assign]
    with pytest.raises(EngineLost):
        await case.gateway.chat(ask())
    assert case.gateway.admission.inflight == 0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("queue_full", QueueFull),
        ("not_ready", NotReady),
        ("engine_lost", EngineLost),
        ("engine_fault", EngineFault),
        ("deadline_exceeded", DeadlineExceeded),
        ("something_new", EngineFault),
    ],
)
def test_every_code_of_an_engine_becomes_a_typed_error(code: str, kind: type[LoraplaneError]) -> None:
    error = engine_error(Failed(1, code, "Traceback /root/x.py"), "base")
    assert type(error) is kind
    assert "/root" not in str(error)


async def test_a_version_brings_its_stops_and_defaults(case: Case) -> None:
    fmt = PromptFormat(prefix="Q: ", stops=("\n",), defaults=GenerationDefaults(max_tokens=7, temperature=0.0))
    case.publish("tuned", fmt=fmt)
    case.engine.script = say("one\ntwo")
    answer = await case.gateway.chat(ask("tuned"))
    assert (await answer.collect())[0].text == "one"
    sent = case.engine.submissions[0]
    assert (sent.sampling.max_tokens, sent.sampling.temperature) == (7, 0.0)
    assert ByteTokenizer().decode(sent.prompt) == "user: Q: hi\nassistant: "


async def test_a_request_overrules_the_defaults_of_a_version(case: Case) -> None:
    case.publish("tuned", fmt=PromptFormat(defaults=GenerationDefaults(max_tokens=7, temperature=0.0)))
    await (await case.gateway.chat(ask("tuned", max_tokens=3, temperature=0.5))).collect()
    sampling = case.engine.submissions[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (3, 0.5)


async def test_a_flip_during_an_answer_does_not_touch_it(case: Case) -> None:
    first = case.publish("summarize", seed=1)
    answer = await case.gateway.chat(ask("summarize"))
    second = case.publish("summarize", seed=2)
    await answer.collect()
    assert answer.head.weights.digest == first.digest == case.engine.submissions[0].adapter
    after = await case.gateway.chat(ask("summarize"))
    assert after.head.weights.digest == second.digest
    after.close()


class Foreign:
    """A registry whose only version belongs to another base."""

    def __init__(self, version: AdapterVersion) -> None:
        self.version = replace(version, base_digest="0" * 64)

    def route(self, model: str) -> Route:
        parse_model_id(model)
        return Route(self.version)


async def test_a_version_of_another_base_does_not_exist_here(case: Case) -> None:
    resolver = Resolver(Foreign(case.publish("alien")), case.gateway.resolver.base)
    with pytest.raises(ModelNotFound):
        await resolver.resolve("alien")


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("Docstring-Summary", "docstring-summary"),
        ("docstring summary", "docstring-summary"),
        ("__docstring__summary", "docstring-summary"),
        (" Docstring-Summary@1 ", "docstring-summary@1"),
        ("Docstring-Summary@9", "docstring-summary@1"),
        ("docstring-summary@V1", "docstring-summary@1"),
        ("Dokstring-Summary", "docstring-summary"),
        ("Tiny", "tiny"),
        ("Unheard/of " + "x" * 5000, None),
        ("@@@", None),
        ("", None),
    ],
)
async def test_a_text_that_is_no_id_is_not_found_and_the_near_names_are_said(
    case: Case, model: str, near: str | None
) -> None:
    """A capital or a blank made the hint disappear, and they are the commonest slips of all."""
    case.publish("docstring-summary")
    with pytest.raises(ModelNotFound) as caught:
        await case.gateway.chat(ask(model))
    assert (near in caught.value.nearest) if near else not caught.value.nearest
    assert len(str(caught.value)) < 300


async def test_a_version_of_another_base_is_not_suggested(case: Case) -> None:
    resolver = Resolver(Foreign(case.publish("alien")), case.gateway.resolver.base)
    with pytest.raises(ModelNotFound) as caught:
        await resolver.resolve("Alien")
    assert caught.value.nearest == ()


@pytest.mark.parametrize("model", ["base", "tiny", "Tests/tiny-Instruct"])
async def test_the_base_answers_to_all_its_names(case: Case, model: str) -> None:
    answer = await case.gateway.chat(ask(model))
    await answer.collect()
    assert (answer.head.weights.model, case.engine.submissions[0].adapter) == ("base", None)


async def test_prompt_and_answer_must_fit_the_context(case: Case) -> None:
    room = case.engine.max_model_len - len("user: hi\nassistant: ")
    await (await case.gateway.chat(ask(max_tokens=room))).collect()
    with pytest.raises(ContextLengthExceeded):
        await case.gateway.chat(ask(max_tokens=room + 1))
    assert case.gateway.admission.inflight == 0


@pytest.mark.parametrize("max_tokens", [None, 7])
async def test_a_prompt_that_fills_the_context_is_told_to_be_shorter(case: Case, max_tokens: int | None) -> None:
    """It said `and 1 more were asked for` to somebody who had asked for none, and to lower what was not there."""
    command = CompletionCommand(Wishes("base", max_tokens=max_tokens), (tuple([1] * case.engine.max_model_len),))
    with pytest.raises(ContextLengthExceeded, match=r"no room for an answer\. Shorten the prompt\.$") as caught:
        await case.gateway.completion(command)
    assert caught.value.max_tokens == (max_tokens or 0)


async def test_a_default_length_is_cut_to_what_the_context_has_left(case: Case) -> None:
    command = CompletionCommand(Wishes("base"), (tuple([1] * 250),))
    await (await case.gateway.completion(command)).collect()
    assert case.engine.submissions[0].sampling.max_tokens == 6


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"logit_bias": {EOS + 99: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (99_999,)}, "stop_token_ids"),
        ({"stops": ("a",) * 5}, "stop"),
        ({"stops": ("a" * 65,)}, "stop"),
        ({"n": 129}, "n"),
    ],
)
async def test_wishes_beyond_the_limits_are_refused_by_name(case: Case, wishes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await case.gateway.chat(ask(**wishes))
    assert caught.value.param == param
    assert case.engine.submissions == []


async def test_the_gateway_takes_no_more_than_its_limit(tmp_path: Path) -> None:
    case = make_case(tmp_path, max_inflight=1)
    case.engine.gate.clear()
    first = asyncio.create_task(case.gateway.chat(ask()))
    while not case.engine.submissions:
        await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await case.gateway.chat(ask())
    case.engine.gate.set()
    await (await first).collect()
    await baseline(case)


async def test_a_draining_gateway_finishes_what_runs_and_takes_nothing_new(case: Case) -> None:
    answer = await case.gateway.chat(ask())
    case.gateway.admission.drain()
    with pytest.raises(NotReady):
        await case.gateway.chat(ask())
    assert not await case.gateway.admission.wait_empty(0.01)
    assert (await answer.collect())[0].text == "Hello, world"
    assert await case.gateway.admission.wait_empty(1)


async def test_no_engine_is_told_before_anything_is_submitted(tmp_path: Path) -> None:
    case = make_case(tmp_path, FakeEngine(connected=False))
    with pytest.raises(NotReady):
        await case.gateway.chat(ask())
    assert case.engine.submissions == []
